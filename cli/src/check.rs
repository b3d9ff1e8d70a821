//! Names, addresses and times as typed by people, checked before anything is done.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;
use varve_common::config::DEFAULT_PORT;
use varve_common::problem::{Problem, check_name};
use varve_net::hosts::INVITE_TTL_MAX;

const HOST_NAME_BYTES_MAX: usize = 253;

/// A group's name.
pub(crate) fn group(name: &str) -> Result<(), Problem> {
    check_name("group", name)
}

/// A host's name: what its certificate may carry.
pub(crate) fn host(name: &str) -> Result<(), Problem> {
    varve_net::hosts::check_name(name).map_err(|error| {
        Problem::usage(
            error.context(),
            "a host's name has 1 to 64 of a-z, 0-9, '.', '_' and '-', and starts with a letter or a digit",
            "choose another name",
        )
    })
}

/// A receiver's address, `HOST[:PORT]`; gives it with its port.
pub(crate) fn peer(text: &str) -> Result<String, Problem> {
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not the address of a receiver", text.escape_debug()),
            why,
            format!(
                "give a name or IP address and a port, such as recovery.example:{DEFAULT_PORT} or [2001:db8::1]:{DEFAULT_PORT}"
            ),
        )
    };
    if let Some(address) = with_default_port(text) {
        return match address {
            _ if address.port() == 0 => Err(bad("port 0 cannot be connected to")),
            _ if address.ip().is_unspecified() => {
                Err(bad("it stands for every address of a host that listens, nobody can connect to it"))
            }
            _ => Ok(address.to_string()),
        };
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| bad("the port is not a number from 1 to 65535"))?),
        None => (text, DEFAULT_PORT),
    };
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
            && !label.starts_with('-')
    };
    if port == 0 {
        return Err(bad("port 0 cannot be connected to"));
    }
    if host.len() > HOST_NAME_BYTES_MAX || !host.trim_end_matches('.').split('.').all(label) {
        return Err(bad("what stands before the port is neither a host name nor an IP address"));
    }
    if host.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return Err(bad("it looks like an IP address and is none"));
    }
    Ok(format!("{host}:{port}"))
}

/// The address to listen on, `ADDR[:PORT]`.
pub(crate) fn listen(text: &str) -> Result<SocketAddr, Problem> {
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not an address to listen on", text.escape_debug()),
            why,
            format!(
                "give an IP address of this host and a port, such as 0.0.0.0:{DEFAULT_PORT} or [::]:{DEFAULT_PORT}"
            ),
        )
    };
    match with_default_port(text) {
        Some(address) if address.port() == 0 => Err(bad("with port 0 nobody would know where to connect")),
        Some(address) => Ok(address),
        None => Err(bad("it is not an IP address with a port")),
    }
}

fn with_default_port(text: &str) -> Option<SocketAddr> {
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let bare = inner.unwrap_or(text).parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, DEFAULT_PORT));
    text.parse().ok().or(bare)
}

/// How long an invitation is good: `90s`, `15m`, `1h`, `2d`.
pub(crate) fn ttl(text: &str) -> Result<Duration, Problem> {
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not a time that an invitation can be good for", text.escape_debug()),
            why,
            "give a number and a unit, such as 90s, 15m, 1h or 2d",
        )
    };
    let unit_seconds = match text.as_bytes().last() {
        Some(b's') => 1,
        Some(b'm') => 60,
        Some(b'h') => 3600,
        Some(b'd') => 86_400,
        _ => return Err(bad("it does not end in s, m, h or d")),
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad("before the unit there is no whole number"));
    }
    let seconds = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_seconds));
    match seconds.map(Duration::from_secs) {
        Some(ttl) if !ttl.is_zero() && ttl <= INVITE_TTL_MAX => Ok(ttl),
        _ => Err(bad("it is not between 1 second and 30 days")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_common::problem::ProblemKind;

    #[test]
    fn peers() {
        let good = [
            ("10.0.0.2", "10.0.0.2:7443"),
            ("10.0.0.2:99", "10.0.0.2:99"),
            ("recovery", "recovery:7443"),
            ("a.b-c.example.:1", "a.b-c.example.:1"),
            ("[2001:db8::1]:5", "[2001:db8::1]:5"),
            ("[2001:db8::1]", "[2001:db8::1]:7443"),
            ("2001:db8::1", "[2001:db8::1]:7443"),
        ];
        for (text, peer_text) in good {
            assert_eq!(peer(text).expect(text), peer_text);
        }
        let long = "a".repeat(254);
        let bad = [
            "",
            ":7443",
            "host:",
            "host:0",
            "host:65536",
            "host:x",
            "10.0.0.300",
            "0.0.0.0",
            "[::]:7443",
            "a b",
            "https://h",
            "a..b",
            "-h",
            "h/7443",
            "1.2.3.4:0",
            &long,
        ];
        for text in bad {
            let problem = peer(text).expect_err(text);
            assert_eq!(problem.kind, ProblemKind::Usage, "{text}");
        }
    }

    #[test]
    fn listening() {
        assert_eq!(listen("0.0.0.0").expect("an address").to_string(), "0.0.0.0:7443");
        assert_eq!(listen("[::]:99").expect("an address").to_string(), "[::]:99");
        for text in ["", "7443", ":7443", "localhost:7443", "0.0.0.0:0", "0.0.0.0:70000"] {
            assert_eq!(listen(text).expect_err(text).kind, ProblemKind::Usage, "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, seconds) in [("90s", 90), ("15m", 900), ("1h", 3600), ("30d", 2_592_000)] {
            assert_eq!(ttl(text).expect(text).as_secs(), seconds);
        }
        for text in ["", "h", "1", "0s", "-1h", "+1h", "1.5h", "31d", "99999999999999999999d", "1w", "1 h", "1ü"] {
            assert_eq!(ttl(text).expect_err(text).kind, ProblemKind::Usage, "{text}");
        }
    }
}
