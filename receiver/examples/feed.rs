//! What the whole receiver costs: the real program in another process, fed over QUIC on loopback by this one.
//!
//! `cargo build --release -p varve-receiver && cargo run --release -p varve-receiver --example feed -- [DIRECTORY]`

#![allow(clippy::unwrap_used, reason = "an example that measures")]

use rand::{Rng, RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};
use varve_common::control::{InviteReply, ReceiverRequest, Reply, StatusReply};
use varve_common::format::{Mark, MarkKind};
use varve_common::paths::Paths;
use varve_common::record::{RecordHeader, RecordKind, append_record};
use varve_common::state::GapReason;
use varve_common::wire::messages::{Ack, Hello, VolumeHello, decode, encode};
use varve_common::wire::{FRAME_HEADER_BYTES, Frame, FrameKind, Preamble};
use varve_net::identity::Authority;
use varve_net::local::LocalClient;
use varve_net::token::JoinToken;
use zerocopy::IntoBytes;

const VOLUME_BYTES: u64 = 2 << 30;

struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ends {
    /// User and system time of the receiver.
    fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        Duration::from_millis(fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum::<u64>() * 10)
    }

    fn rss_mib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }
}

fn ask<T: serde::de::DeserializeOwned>(paths: &Paths, request: &ReceiverRequest) -> Option<T> {
    let mut client = LocalClient::connect(&paths.receiver_socket()).ok()?;
    client.request(request).ok()?;
    match client.reply().ok()?? {
        Reply::Done(done) => Some(done),
        _ => None,
    }
}

fn wire(frame: &Frame, body: &[u8]) -> bytes::Bytes {
    [&frame.encode()[..], body].concat().into()
}

fn main() {
    let base = std::env::args().nth(1).map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let root = base.join(format!("varve-feed-{}", std::process::id()));
    let program = std::env::current_exe().unwrap().parent().and_then(Path::parent).unwrap().join("varve-receiver");
    let paths = Paths::new(&root);
    Authority::create(&paths.receiver_identity(), "feed").unwrap();
    std::fs::write(paths.receiver_config(), "listen = \"127.0.0.1:0\"\n").unwrap();
    let child = Command::new(program).arg("--root").arg(&root).env("RUST_LOG", "warn").spawn().unwrap();
    let receiver = Ends(child);
    let status = || ask::<StatusReply>(&paths, &ReceiverRequest::Status { group: None });
    while status().is_none() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let address = status().unwrap().daemons[0].address.clone().unwrap();
    let invite: InviteReply =
        ask(&paths, &ReceiverRequest::Invite { name: "feed".to_owned(), ttl_seconds: 60 }).unwrap();
    let token = JoinToken::decode(&invite.token).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let identity = varve_net::endpoint::join(&address, &token).await.unwrap();
        let connection = varve_net::endpoint::connect(&identity, &address).await.unwrap();
        println!("{:>10} {:>12} {:>10} {:>16} {:>10}", "record", "records/s", "MB/s", "receiver us/MB", "peak MiB");
        // Written once first, so that what is measured finds its blocks, as after a first sync.
        let mut position = 0;
        for (bytes, megabytes, rate) in [
            (1 << 20, VOLUME_BYTES as usize / 1_000_000, None),
            (4096, 1000, None),
            (4096, 1000, None),
            (256 << 10, 3000, None),
            (4096, 1000, Some(205e6)),
            (256 << 10, 1500, Some(300e6)),
            (4096, 200, Some(20e6)),
        ] {
            let (took, cpu) = feed(&connection, &receiver, &mut position, bytes, megabytes, rate).await;
            report(&receiver, bytes, megabytes, took, cpu);
        }
    });
    drop(receiver);
    std::fs::remove_dir_all(&root).unwrap();
}

fn report(receiver: &Ends, bytes: usize, megabytes: usize, took: Duration, cpu: Duration) {
    let took = took.as_secs_f64();
    println!(
        "{bytes:>10} {:>12.0} {:>10.0} {:>16.0} {:>10}",
        megabytes as f64 * 1e6 / bytes as f64 / took,
        megabytes as f64 / took,
        cpu.as_secs_f64() * 1e6 / megabytes as f64,
        receiver.rss_mib()
    );
}

/// One group from its first byte until everything is applied.
async fn feed(
    connection: &quinn::Connection,
    receiver: &Ends,
    position: &mut u64,
    bytes: usize,
    megabytes: usize,
    rate: Option<f64>,
) -> (Duration, Duration) {
    let incarnation = [7; 16];
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(Preamble::offer().as_bytes()).await.unwrap();
    recv.read_exact(&mut [0; 16]).await.unwrap();
    let volume = VolumeHello { path: "/dev/feed".into(), bytes: VOLUME_BYTES, replica: None };
    let volumes = vec![volume];
    let (group, software) = ("feed".to_owned(), String::new());
    let hello = Hello { group, epoch: 1, incarnation, oldest: 0, newest: u64::MAX / 2, volumes, software };
    let body = encode(&hello);
    send.write_all(&wire(&Frame::plain(FrameKind::Hello, 0, &body), &body)).await.unwrap();
    if *position == 0 {
        let (kind, reason) = (MarkKind::Begin, Some(GapReason::NewRing));
        let mark = Mark { kind, reason, incarnation, position: 0, time_ns: 1, epoch: 1, height_min: 0 }.encode();
        send.write_all(&wire(&Frame::plain(FrameKind::Mark, 0, &mark), &mark)).await.unwrap();
    }
    let mut rng = rand::rngs::StdRng::seed_from_u64(1);
    let mut payload = vec![0; bytes];
    rng.fill_bytes(&mut payload);
    let records = megabytes * 1_000_000 / bytes;
    let (start, cpu) = (Instant::now(), receiver.cpu());
    let per_frame = ((512 << 10) / bytes).max(1);
    let begin = *position;
    let end = begin + (records / per_frame * per_frame) as u64 * (bytes as u64 + 40);
    let reading = tokio::spawn(async move {
        let mut scratch = Vec::new();
        loop {
            let mut head = [0; FRAME_HEADER_BYTES];
            recv.read_exact(&mut head).await.unwrap();
            let frame = Frame::decode(&head).unwrap();
            let mut body = vec![0; frame.body_bytes];
            recv.read_exact(&mut body).await.unwrap();
            let plain = frame.open(&body, &mut scratch).unwrap();
            match frame.kind {
                FrameKind::Ack if decode::<Ack>(frame.kind, plain).unwrap().applied >= end => return,
                FrameKind::Ack | FrameKind::Welcome => {}
                other => panic!("{other:?}"),
            }
        }
    });
    let mut plain = Vec::new();
    for round in 0..records / per_frame {
        plain.clear();
        for number in 0..per_frame {
            let at = match begin {
                0 => (round * per_frame + number) as u64 * bytes as u64 % VOLUME_BYTES,
                _ => rng.random_range(0..VOLUME_BYTES / bytes as u64) * bytes as u64,
            };
            let header = RecordHeader {
                kind: RecordKind::Write as u8,
                flags: 0,
                volume: 0.into(),
                payload: (bytes as u32).into(),
                time_ns: 1.into(),
                offset: at.into(),
                length: (bytes as u64).into(),
            };
            append_record(&mut plain, header, &payload);
        }
        send.write_chunk(wire(&Frame::plain(FrameKind::Data, *position, &plain), &plain)).await.unwrap();
        *position += plain.len() as u64;
        if let Some(rate) = rate {
            tokio::time::sleep_until((start + Duration::from_secs_f64((*position - begin) as f64 / rate)).into()).await;
        }
    }
    reading.await.unwrap();
    let took = (start.elapsed(), receiver.cpu() - cpu);
    let _ = send.finish();
    took
}
