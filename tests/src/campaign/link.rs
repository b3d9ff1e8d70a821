//! A link that can be cut and that loses packets: a forwarder of UDP datagrams between the two sides.

use std::collections::HashMap;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// How long a thread waits before it looks whether it is still wanted.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const DATAGRAM_BYTES_MAX: usize = 65536;
/// Addresses of the near side that are remembered.
const PEERS_MAX: usize = 256;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    cut: AtomicBool,
    /// Of 1000.
    lost: AtomicU32,
    /// For the choice of what is lost.
    state: AtomicU64,
}

impl Shared {
    fn passes(&self) -> bool {
        if self.cut.load(Ordering::Relaxed) {
            return false;
        }
        let lost = self.lost.load(Ordering::Relaxed);
        // Which packet meets which number is up to the scheduler; how many are lost is not.
        let number = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        lost == 0 || (number ^ (number >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 33 & 1023 >= u64::from(lost)
    }
}

/// Forwards until it is dropped.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Link {
    /// To the far side at `to`.
    #[track_caller]
    pub fn new(to: &str) -> Self {
        let to: SocketAddr = to.parse().unwrap();
        let near = UdpSocket::bind("127.0.0.1:0").unwrap();
        large(&near);
        near.set_read_timeout(Some(LOOK_EVERY)).unwrap();
        let address = near.local_addr().unwrap();
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || forward(&Arc::new(near), to, &theirs));
        Link { address, shared, thread: Some(thread) }
    }

    /// Where the near side sends to.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Nothing passes any more; `false`: it does again.
    pub fn cut(&self, cut: bool) {
        self.shared.cut.store(cut, Ordering::Relaxed);
    }

    /// So many of 1000 datagrams are lost.
    pub fn lose(&self, of_1000: u32) {
        self.shared.lost.store(of_1000, Ordering::Relaxed);
    }
}

fn large(socket: &UdpSocket) {
    use nix::sys::socket::{setsockopt, sockopt};
    // As much as the machine allows.
    let _ = setsockopt(socket, sockopt::RcvBuf, &(4 << 20));
    let _ = setsockopt(socket, sockopt::SndBuf, &(4 << 20));
}

fn forward(near: &Arc<UdpSocket>, to: SocketAddr, shared: &Arc<Shared>) {
    let mut far: HashMap<SocketAddr, Arc<UdpSocket>> = HashMap::new();
    let mut threads = Vec::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while !shared.stop.load(Ordering::Relaxed) {
        let Ok((bytes, peer)) = near.recv_from(&mut buffer) else { continue };
        if !shared.passes() {
            continue;
        }
        if !far.contains_key(&peer) {
            assert!(far.len() < PEERS_MAX, "too many addresses of one agent");
            let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap());
            large(&socket);
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(LOOK_EVERY)).unwrap();
            far.insert(peer, socket.clone());
            let (near, shared) = (near.clone(), shared.clone());
            threads.push(std::thread::spawn(move || back(&near, &socket, peer, &shared)));
        }
        // A datagram that nobody takes is lost, as on any link.
        let _ = far[&peer].send(&buffer[..bytes]);
    }
    for thread in threads {
        let _ = thread.join();
    }
}

fn back(near: &UdpSocket, far: &UdpSocket, peer: SocketAddr, shared: &Shared) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while !shared.stop.load(Ordering::Relaxed) {
        if let Ok(bytes) = far.recv(&mut buffer)
            && shared.passes()
        {
            let _ = near.send_to(&buffer[..bytes], peer);
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
