//! Every QUIC setting and socket option in one place, with its reason. Both sides use the same.
//!
//! Measured with `examples/loopback.rs` (TLS on, one stream, chunks of 1 MiB, sender and receiver as two processes on
//! two busy cores; CPU in ms per 10^6 bytes, the middle of three runs; rates vary by a factor of two with the machine's
//! other work, CPU by ±10 %):
//!
//! | largest datagram | rate MB/s | send | receive | |
//! |---|---|---|---|---|
//! | 1452 (a 1500-byte network) | 470 | 0.83 | 0.71 | |
//! | 4000 | 1,090 | 0.40 | 0.36 | |
//! | **6500** | 1,430 | 0.29 | 0.29 | one runtime thread: 0.26 / 0.27 |
//! | 6500, no segmentation offload | 1,000 | 0.81 | 0.69 | |
//! | 6500, chunks of 4 KiB | 1,660 | 0.46 | 0.33 | |
//! | 6500, socket buffers of 208 KiB | 1,270 | 0.34 | 0.32 | 1 % of the packets lost |
//! | 6500, BBR | 920–1,900 | 0.34 | 0.32 | within the noise of Cubic |
//! | 8952 | 430 | 1.13 | 1.00 | broken: see [`MTU_MAX`] |
//!
//! Acknowledging every 2, 11 or 33 packets makes no difference beyond noise here; 4, 16 or 32 MiB of send window neither.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::{AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;
use socket2::{Domain, Protocol, Socket, Type};

use crate::error::{Error, Result};

/// A ping at this distance keeps the path and middleboxes open and notices a dead peer.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// A peer that is silent for this long (five keep-alives) is gone.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// First datagram size: what every IPv6 path carries.
pub const MTU_INITIAL: u16 = 1200;
/// Largest datagram that path-MTU discovery may find: every jumbo-frame network carries it, and so does loopback.
/// Not the 8952 that would fill a 9000-byte frame: quinn 0.11 hands the kernel up to [`SEGMENTS_MAX`] datagrams as one
/// buffer, the kernel refuses more than [`UDP_BYTES_MAX`], and quinn takes that refusal for a lost packet. (Tried:
/// with 8952 discovery falls back to 1200 and the rate to a third.)
pub const MTU_MAX: u16 = 6500;
/// Datagrams that quinn 0.11 gives the kernel at once.
pub const SEGMENTS_MAX: usize = 10;
/// The most that one UDP send may carry, segmented or not.
pub const UDP_BYTES_MAX: usize = 65_507;

const _: () = assert!(MTU_MAX as usize * SEGMENTS_MAX <= UDP_BYTES_MAX);

/// What one stream may have under way unread. One stream fills a path of 1 GB/s × 8 ms or 100 MB/s × 80 ms.
pub const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// What one connection may have under way unread: a peer can make us hold this much and no more.
pub const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// What we hold for a peer that has not acknowledged it. Part of the agent's fixed memory.
pub const SEND_WINDOW_BYTES: u64 = 16 << 20;
/// Streams that a peer may have open in each direction kind.
pub const STREAMS_MAX: u32 = 128;
/// What is asked of the kernel for each direction of a socket: 8 ms at 1 GB/s, the time in which a busy process may
/// not get to its socket.
pub const SOCKET_BUFFER_BYTES: usize = 8 << 20;
/// Packets that the peer may receive before it must acknowledge (draft-ietf-quic-ack-frequency).
pub const ACK_ELICITING_THRESHOLD: u32 = 10;
/// The longest that the peer may hold an acknowledgement back.
pub const ACK_DELAY_MAX: Duration = Duration::from_millis(5);

/// How the congestion window is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    /// Loss based, as TCP's default: proven, fair to the other traffic of a production line.
    Cubic,
    /// Model based; quinn calls its BBR experimental.
    Bbr,
}

/// The settings that are worth measuring (`examples/loopback.rs`). [`Tuning::default`] is what the product uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// See [`MTU_MAX`].
    pub mtu_max: u16,
    /// See [`Congestion`].
    pub congestion: Congestion,
    /// See [`ACK_ELICITING_THRESHOLD`]; `None` turns the extension off.
    pub ack_threshold: Option<u32>,
    /// Generic segmentation offload.
    pub offload: bool,
    /// See [`SEND_WINDOW_BYTES`].
    pub send_window_bytes: u64,
    /// See [`SOCKET_BUFFER_BYTES`].
    pub socket_buffer_bytes: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            mtu_max: MTU_MAX,
            congestion: Congestion::Cubic,
            ack_threshold: Some(ACK_ELICITING_THRESHOLD),
            offload: true,
            send_window_bytes: SEND_WINDOW_BYTES,
            socket_buffer_bytes: SOCKET_BUFFER_BYTES,
        }
    }
}

/// What the kernel granted a socket; `varve doctor` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketBuffers {
    /// What was asked for, each way.
    pub wanted_bytes: usize,
    /// What incoming packets may take.
    pub receive_bytes: usize,
    /// What outgoing packets may take.
    pub send_bytes: usize,
}

impl SocketBuffers {
    /// Whether all was granted. If not: the process lacks CAP_NET_ADMIN and `net.core.rmem_max` / `wmem_max` are lower.
    pub fn is_full(&self) -> bool {
        self.receive_bytes >= self.wanted_bytes && self.send_bytes >= self.wanted_bytes
    }
}

/// The QUIC settings.
pub fn transport_config(tuning: &Tuning) -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(IdleTimeout::try_from(IDLE_TIMEOUT).ok())
        .initial_mtu(MTU_INITIAL)
        .min_mtu(MTU_INITIAL)
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(tuning.send_window_bytes)
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(STREAMS_MAX))
        .datagram_receive_buffer_size(None)
        .enable_segmentation_offload(tuning.offload);
    let mut discovery = MtuDiscoveryConfig::default();
    discovery.upper_bound(tuning.mtu_max);
    config.mtu_discovery_config(Some(discovery));
    match tuning.congestion {
        Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
        Congestion::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
    };
    if let Some(threshold) = tuning.ack_threshold {
        let mut acks = AckFrequencyConfig::default();
        acks.ack_eliciting_threshold(VarInt::from_u32(threshold)).max_ack_delay(Some(ACK_DELAY_MAX));
        config.ack_frequency_config(Some(acks));
    }
    Arc::new(config)
}

/// Settings of the endpoint (shared by its connections): lets the peer send datagrams as large as discovery may find.
pub fn endpoint_config(tuning: &Tuning) -> EndpointConfig {
    with_datagram_size(EndpointConfig::default(), tuning)
}

/// As [`endpoint_config`], for a server that recognises the connections of its earlier lives and tells their peers at
/// once that they are gone (stateless reset, RFC 9000 section 10.3). Without it an agent would learn of a restart only
/// after [`IDLE_TIMEOUT`], and its ring would fill meanwhile. `secret` must be the same in every life.
pub fn lasting_endpoint_config(tuning: &Tuning, secret: &[u8]) -> EndpointConfig {
    let reset = ResetKey(blake3::derive_key("varve 1 stateless reset", secret));
    let ids = blake3::derive_key("varve 1 connection ids", secret);
    let ids = u64::from_le_bytes([ids[0], ids[1], ids[2], ids[3], ids[4], ids[5], ids[6], ids[7]]);
    let mut config = EndpointConfig::new(Arc::new(reset));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(ids)));
    with_datagram_size(config, tuning)
}

fn with_datagram_size(mut config: EndpointConfig, tuning: &Tuning) -> EndpointConfig {
    // Only refused below 1200.
    let _ = config.max_udp_payload_size(tuning.mtu_max.max(MTU_INITIAL));
    config
}

/// BLAKE3 keyed: authenticates the tokens of stateless resets.
struct ResetKey([u8; 32]);

impl quinn::crypto::HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        blake3::Hasher::new_keyed(&self.0).update(data).finalize_xof().fill(signature_out);
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), quinn::crypto::CryptoError> {
        // `blake3::Hash` compares in constant time.
        let expected = blake3::keyed_hash(&self.0, data);
        let given = blake3::Hash::from_slice(signature).map_err(|_| quinn::crypto::CryptoError)?;
        if expected == given { Ok(()) } else { Err(quinn::crypto::CryptoError) }
    }
}

/// A UDP socket with large buffers, and what the kernel granted. An IPv6 wildcard address also takes IPv4.
pub fn bind_udp(addr: SocketAddr, tuning: &Tuning) -> Result<(UdpSocket, SocketBuffers)> {
    let fail = |e| Error::io(format!("cannot listen on UDP {addr}"), e);
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, Some(Protocol::UDP)).map_err(fail)?;
    if addr.is_ipv6() && addr.ip().is_unspecified() {
        socket.set_only_v6(false).map_err(fail)?;
    }
    socket.set_nonblocking(true).map_err(fail)?;
    let buffers = enlarge_buffers(&socket, tuning.socket_buffer_bytes).map_err(fail)?;
    socket.bind(&addr.into()).map_err(|e| {
        fail(e).with_hint("check that no other program uses this address and port ('ss -lunp'), and that the address belongs to this machine")
    })?;
    Ok((socket.into(), buffers))
}

/// As root beyond `net.core.rmem_max`; otherwise as far as that allows.
fn enlarge_buffers(socket: &Socket, wanted: usize) -> std::io::Result<SocketBuffers> {
    if setsockopt(socket, sockopt::RcvBufForce, &wanted).is_err() {
        socket.set_recv_buffer_size(wanted)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &wanted).is_err() {
        socket.set_send_buffer_size(wanted)?;
    }
    // The kernel reports twice what may be asked for: half is for its own book-keeping.
    Ok(SocketBuffers {
        wanted_bytes: wanted,
        receive_bytes: socket.recv_buffer_size()? / 2,
        send_bytes: socket.send_buffer_size()? / 2,
    })
}
