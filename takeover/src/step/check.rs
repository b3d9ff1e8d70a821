//! Checks: asked again until the answer is good or the time is up.

use super::{StepError, Work};
use crate::plan::Probe;
use crate::process;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// One try that gets no answer does not use up the time of all.
const TRY_MAX: Duration = Duration::from_secs(5);
/// Of an answer, this much is looked at.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Of an answer that was not expected, this much is shown.
const SHOWN_BYTES_MAX: usize = 512;

pub(super) fn apply(work: &Work<'_>, probe: &Probe, every: Duration) -> Result<String, StepError> {
    let mut tries = 0;
    let mut earlier: Option<StepError> = None;
    loop {
        tries += 1;
        let until = (Instant::now() + TRY_MAX).min(work.deadline);
        let fault = match probe {
            Probe::Tcp { host, port } => match connect(host, *port, until) {
                Ok(_) => return Ok(after(tries)),
                Err(why) => StepError::new(why),
            },
            Probe::Http { host, port, path, status, text } => match http(host, *port, path, until) {
                Ok(answer) => match verdict(&answer, *status, text.as_deref()) {
                    Ok(()) => return Ok(after(tries)),
                    Err(error) => error,
                },
                Err(why) => StepError::new(why),
            },
            // A program has all the time there is: it may do something.
            Probe::Command { run } => match process::run_ok(work, run) {
                Ok(_) => return Ok(after(tries)),
                Err(error) => error,
            },
        };
        // A try that the end cut short says less than the one before it.
        let cut_short = until == work.deadline && Instant::now() >= until;
        let fault = earlier.take().filter(|_| cut_short).unwrap_or(fault);
        if !work.pause(every) {
            let how_often = if tries == 1 { "once".to_owned() } else { format!("{tries} times") };
            let why = match work.is_cancelled() {
                true => "the operator stopped it".to_owned(),
                false => format!("asked {how_often}; the last time {}", fault.why),
            };
            return Err(StepError { why, ..fault });
        }
        earlier = Some(fault);
    }
}

fn after(tries: u32) -> String {
    if tries == 1 { String::new() } else { format!("good at try {tries}") }
}

/// Names are looked up on a thread of their own, which is left behind when that takes too long: it has no time limit.
fn addresses(host: &str, port: u16, until: Instant) -> Result<Vec<SocketAddr>, String> {
    if let Ok(address) = host.parse() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (send, receive) = mpsc::channel();
    let name = host.to_owned();
    std::thread::spawn(move || {
        let found = (name.as_str(), port).to_socket_addrs().map(|found| found.collect::<Vec<_>>());
        let _ = send.send(found);
    });
    match receive.recv_timeout(until.saturating_duration_since(Instant::now())) {
        Ok(Ok(found)) if !found.is_empty() => Ok(found),
        Ok(Ok(_)) => Err(format!("the name {host} has no address")),
        Ok(Err(error)) => Err(format!("the name {host} is not known: {error}")),
        Err(_) => Err(format!("the name {host} could not be looked up in time")),
    }
}

fn connect(host: &str, port: u16, until: Instant) -> Result<TcpStream, String> {
    let mut last = String::new();
    for address in addresses(host, port, until)? {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(format!("{address} did not answer in time"));
        }
        match TcpStream::connect_timeout(&address, left) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = format!("{address} did not answer: {}", plain(&error)),
        }
    }
    Err(last)
}

fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_lowercase()
}

struct Answer {
    status: u16,
    body: Vec<u8>,
}

/// HTTP/1.0: the answer ends with the connection, and does not come in chunks.
fn http(host: &str, port: u16, path: &str, until: Instant) -> Result<Answer, String> {
    let mut stream = connect(host, port, until)?;
    let name = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let failed = |error: std::io::Error| format!("{name}:{port} did not answer: {}", plain(&error));
    let request = format!(
        "GET {path} HTTP/1.0\r\nHost: {name}:{port}\r\nUser-Agent: varve\r\nAccept: */*\r\nConnection: close\r\n\r\n"
    );
    let limit = |stream: &TcpStream| {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).and_then(|()| stream.set_write_timeout(Some(left)))
    };
    limit(&stream).and_then(|()| stream.write_all(request.as_bytes())).map_err(failed)?;
    let mut answer = Vec::new();
    let mut buffer = [0; 16 << 10];
    while answer.len() < ANSWER_BYTES_MAX {
        if Instant::now() >= until {
            return Err(format!("{name}:{port} did not finish its answer in time"));
        }
        limit(&stream).map_err(failed)?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(bytes) => answer.extend_from_slice(&buffer[..bytes]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // All of it may be here: some servers leave the connection open.
            Err(error) => match complete(&answer) {
                true => break,
                false => return Err(failed(error)),
            },
        }
        if complete(&answer) {
            break;
        }
    }
    parse(&answer).ok_or_else(|| format!("{name}:{port} answered, but not with HTTP"))
}

fn head_end(answer: &[u8]) -> Option<usize> {
    answer.windows(4).position(|four| four == b"\r\n\r\n").map(|place| place + 4)
}

/// Whether everything that the server announced is there.
fn complete(answer: &[u8]) -> bool {
    let Some(end) = head_end(answer) else { return false };
    let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    length.and_then(|length| length.trim().parse::<usize>().ok()).is_some_and(|length| answer.len() - end >= length)
}

fn parse(answer: &[u8]) -> Option<Answer> {
    let end = head_end(answer).unwrap_or(answer.len());
    let head = String::from_utf8_lossy(&answer[..end]);
    let mut words = head.lines().next()?.split(' ');
    if !words.next()?.starts_with("HTTP/") {
        return None;
    }
    Some(Answer { status: words.next()?.parse().ok()?, body: answer[end..].to_vec() })
}

fn verdict(answer: &Answer, status: u16, text: Option<&str>) -> Result<(), StepError> {
    let body = || {
        let shown = &answer.body[..answer.body.len().min(SHOWN_BYTES_MAX)];
        String::from_utf8_lossy(shown).trim_end().to_owned()
    };
    if answer.status != status {
        let why = format!("the answer had the status {} and not {status}", answer.status);
        return Err(StepError::new(why).with_output(body()));
    }
    let has = |text: &str| answer.body.windows(text.len()).any(|part| part == text.as_bytes());
    if let Some(text) = text
        && !has(text)
    {
        return Err(StepError::new(format!("the answer did not contain '{text}'")).with_output(body()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        let answer = parse(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello").expect("HTTP");
        assert_eq!((answer.status, answer.body.as_slice()), (200, b"hello".as_slice()));
        assert_eq!(verdict(&answer, 200, Some("ell")), Ok(()));
        assert!(verdict(&answer, 200, Some("world")).expect_err("text").why.contains("'world'"));
        assert!(verdict(&answer, 503, None).expect_err("status").why.contains("200 and not 503"));
        assert!(complete(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"));
        assert!(!complete(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhell"));
        assert!(!complete(b"HTTP/1.1 200 OK\r\n"));
        for bad in [b"SSH-2.0-x\r\n".as_slice(), b"", b"HTTP/1.1\r\n\r\n", b"HTTP/1.1 OK\r\n\r\n"] {
            assert!(parse(bad).is_none());
        }
    }
}
