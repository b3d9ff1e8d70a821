//! Quinn's own rate on this machine, without Varve on top: the baseline for the benches, and the tool with which the
//! settings in `varve_net::transport` were chosen.
//!
//! ```text
//! cargo run --release -p varve-net --example loopback -- [--seconds 5] [--chunk 1048576] [--mtu 6500] [--ack 32|off]
//!     [--listen 127.0.0.1] [--sender-prefix "ip netns exec NAME"] [--congestion cubic|bbr] [--offload on|off] [--send-window BYTES] [--buffers BYTES] [--threads 2] [--json]
//! ```
//! Sender and receiver are two processes, so that the CPU of each is its own. TLS, enrolment and all settings are the
//! product's. MB is 10^6 bytes.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use nix::sys::resource::{UsageWho, getrusage};
use varve_net::endpoint::{CloseCode, Server, connect_tuned, join, serve_join};
use varve_net::hosts::Hosts;
use varve_net::identity::{Authority, HostIdentity};
use varve_net::token::JoinToken;
use varve_net::transport::{Congestion, Tuning};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const CHUNKS_READ_AT_ONCE: usize = 64;

#[derive(Clone)]
struct Options {
    tuning: Tuning,
    seconds: u64,
    chunk: usize,
    threads: usize,
    json: bool,
    listen: IpAddr,
    /// Words before the sender's command line: puts it into another network namespace.
    sender_prefix: Vec<String>,
    /// Set in the child process.
    send_to: Option<String>,
    identity: Option<PathBuf>,
}

fn main() -> Result<(), Failure> {
    let options = parse(std::env::args().skip(1))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(options.threads).enable_all().build()?;
    match (&options.send_to, &options.identity) {
        (Some(addr), Some(dir)) => runtime.block_on(send(addr, dir, &options)),
        _ => runtime.block_on(measure(&options)),
    }
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, Failure> {
    let mut options = Options {
        tuning: Tuning::default(),
        seconds: 5,
        chunk: 1 << 20,
        threads: 2,
        json: false,
        listen: IpAddr::from([127, 0, 0, 1]),
        sender_prefix: Vec::new(),
        send_to: None,
        identity: None,
    };
    let mut args = args;
    while let Some(name) = args.next() {
        if name == "--json" {
            options.json = true;
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{name} needs a value"))?;
        let tuning = &mut options.tuning;
        match name.as_str() {
            "--seconds" => options.seconds = value.parse()?,
            "--chunk" => options.chunk = value.parse()?,
            "--threads" => options.threads = value.parse()?,
            "--mtu" => tuning.mtu_max = value.parse()?,
            "--ack" if value == "off" => tuning.ack_threshold = None,
            "--ack" => tuning.ack_threshold = Some(value.parse()?),
            "--congestion" if value == "bbr" => tuning.congestion = Congestion::Bbr,
            "--congestion" if value == "cubic" => tuning.congestion = Congestion::Cubic,
            "--offload" => tuning.offload = value == "on",
            "--send-window" => tuning.send_window_bytes = value.parse()?,
            "--buffers" => tuning.socket_buffer_bytes = value.parse()?,
            "--listen" => options.listen = value.parse()?,
            "--sender-prefix" => options.sender_prefix = value.split_whitespace().map(str::to_owned).collect(),
            "--send-to" => options.send_to = Some(value),
            "--identity" => options.identity = Some(value.into()),
            _ => return Err(format!("unknown option {name} {value}").into()),
        }
    }
    Ok(options)
}

/// User and system time of this process.
fn cpu() -> Result<Duration, Failure> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let (user, system) = (usage.user_time(), usage.system_time());
    let micros = (user.tv_sec() + system.tv_sec()) * 1_000_000 + user.tv_usec() + system.tv_usec();
    Ok(Duration::from_micros(micros.try_into()?))
}

/// The most memory that this process has had, in MiB.
fn resident_mib() -> Result<u64, Failure> {
    Ok(u64::try_from(getrusage(UsageWho::RUSAGE_SELF)?.max_rss())? >> 10)
}

/// The receiver: enrols the sender, starts it, reads what it sends.
async fn measure(options: &Options) -> Result<(), Failure> {
    let dir = std::env::temp_dir().join(format!("varve-loopback-{}", std::process::id()));
    let result = measure_in(&dir, options).await;
    let _ = std::fs::remove_dir_all(&dir);
    result
}

async fn measure_in(dir: &Path, options: &Options) -> Result<(), Failure> {
    let authority = Arc::new(Authority::create(&dir.join("pki"), "loopback")?);
    let hosts = Arc::new(Hosts::open(dir.join("hosts.json"))?);
    let server = Server::bind_tuned(SocketAddr::new(options.listen, 0), &authority, hosts.clone(), &options.tuning)?;
    let addr = server.local_addr()?.to_string();
    let secret = hosts.invite("sender", Duration::from_secs(60), SystemTime::now())?;
    let token = JoinToken { ca_fingerprint: authority.fingerprint(), secret, name: "sender".into() };
    let joiner = async { server.accept().await.ok_or("no joiner") };
    let (identity, accepted) = tokio::join!(join(&addr, &token), async {
        let accepted = joiner.await?;
        serve_join(&accepted, &authority, &hosts).await?;
        Ok::<_, Failure>(accepted)
    });
    identity?.save(&dir.join("host"))?;
    drop(accepted?);

    let mut words = options.sender_prefix.clone();
    words.push(std::env::current_exe()?.to_string_lossy().into_owned());
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .args(std::env::args().skip(1))
        .arg("--send-to")
        .arg(&addr)
        .arg("--identity")
        .arg(dir.join("host"));
    let child = command.stdout(Stdio::piped()).spawn()?;
    let accepted = server.accept().await.ok_or("no sender")?;
    let mut stream = accepted.connection.accept_uni().await?;
    let mut chunks = vec![Bytes::new(); CHUNKS_READ_AT_ONCE];
    let (started, cpu_before) = (Instant::now(), cpu()?);
    let mut total = 0u64;
    while let Some(count) = stream.read_chunks(&mut chunks).await? {
        total += chunks[..count].iter().map(|c| c.len() as u64).sum::<u64>();
    }
    let (took, cpu_receive) = (started.elapsed(), cpu()? - cpu_before);
    CloseCode::Done.close(&accepted.connection);
    let sender = tokio::task::spawn_blocking(move || child.wait_with_output()).await??;
    report(options, total, took, cpu_receive, &String::from_utf8(sender.stdout)?, &server)
}

fn report(
    options: &Options,
    total: u64,
    took: Duration,
    cpu_receive: Duration,
    sender: &str,
    server: &Server,
) -> Result<(), Failure> {
    let mut words = sender.split_whitespace();
    let mut word = || words.next().ok_or("the sender said nothing");
    let (cpu_send_us, mtu, lost, sent): (f64, u64, u64, u64) =
        (word()?.parse()?, word()?.parse()?, word()?.parse()?, word()?.parse()?);
    let (rss_send, rss_receive): (u64, u64) = (word()?.parse()?, resident_mib()?);
    let mb = total as f64 / 1e6;
    let (rate, send, receive) = (mb / took.as_secs_f64(), cpu_send_us / 1e3 / mb, cpu_receive.as_secs_f64() * 1e3 / mb);
    if options.json {
        println!(
            "{{\"mb_per_s\":{rate:.1},\"send_cpu_ms_per_mb\":{send:.4},\"receive_cpu_ms_per_mb\":{receive:.4},\"mtu\":{mtu},\"lost_packets\":{lost},\"send_mib_max\":{rss_send},\"receive_mib_max\":{rss_receive}}}"
        );
        return Ok(());
    }
    println!(
        "{rate:7.0} MB/s   send {send:.3} ms/MB   receive {receive:.3} ms/MB   mtu {mtu}   lost {lost} of {sent} packets   memory {rss_send} / {rss_receive} MiB"
    );
    let buffers = server.buffers();
    if !buffers.is_full() {
        println!(
            "socket buffers: {} KiB in, {} KiB out (wanted {})",
            buffers.receive_bytes >> 10,
            buffers.send_bytes >> 10,
            buffers.wanted_bytes >> 10
        );
    }
    Ok(())
}

/// The sender: one stream of equal chunks for the given time.
async fn send(addr: &str, dir: &Path, options: &Options) -> Result<(), Failure> {
    let identity = HostIdentity::load(dir)?;
    let connection = connect_tuned(&identity, addr, &options.tuning).await?;
    let mut stream = connection.open_uni().await?;
    let chunk = Bytes::from((0..options.chunk).map(|i| ((i * 31) >> 3) as u8).collect::<Vec<_>>());
    let (started, cpu_before) = (Instant::now(), cpu()?);
    while started.elapsed() < Duration::from_secs(options.seconds) {
        stream.write_chunk(chunk.clone()).await?;
    }
    stream.finish()?;
    stream.stopped().await?;
    let used = cpu()? - cpu_before;
    let stats = connection.stats().path;
    let memory = resident_mib()?;
    println!("{} {} {} {} {memory}", used.as_micros(), stats.current_mtu, stats.lost_packets, stats.sent_packets);
    Ok(())
}
