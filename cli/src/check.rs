//! Names, addresses and times as typed by people, checked before anything is done.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};
use varve_common::config::DEFAULT_PORT;
use varve_common::point::{PointSpec, age_of};
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

/// A point of a group's timeline; a time without a zone is of this host's zone.
pub(crate) fn point(text: &str) -> Result<PointSpec, Problem> {
    PointSpec::parse(text, &jiff::tz::TimeZone::system())
}

/// A time or an age, as nanoseconds since 1970.
pub(crate) fn time_ns(text: &str) -> Result<u64, Problem> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
    point(text)?.time_ns(now_ns).ok_or_else(|| {
        Problem::usage(
            format!("'{}' is not a time", text.escape_debug()),
            "a bookmark, a position or the newest point is a point and not a time",
            "say '2026-11-20 14:03:22.5' (local time), 2026-11-20T14:03:22.5Z or an age such as -2h",
        )
    })
}

/// How long history is kept: `7d`, `36h`; `none`: no limit, which is 0.
pub(crate) fn retention_age(text: &str) -> Result<u64, Problem> {
    if text == "none" {
        return Ok(0);
    }
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not a time that history can be kept", text.escape_debug()),
            why,
            "give a number and a unit, such as 36h, 7d or 4w, or none for no limit",
        )
    };
    let age = age_of(text).map_err(bad)?;
    match age.as_secs() {
        0 => Err(bad("it is less than a second")),
        seconds => Ok(seconds),
    }
}

/// How often something is done: a minute at least.
pub(crate) fn interval(text: &str) -> Result<std::time::Duration, Problem> {
    let bad = |why: &str| {
        let what = format!("'{}' is not how often something is done", text.escape_debug());
        Problem::usage(what, why, "give a number and a unit, such as 12h or 7d")
    };
    let every = age_of(text).map_err(bad)?;
    if every.as_secs() < 60 { Err(bad("it is less than a minute")) } else { Ok(every) }
}

/// After how many seconds a takeover goes back by itself.
pub(crate) fn abort_after(text: &str) -> Result<u64, Problem> {
    let bad = |why: &str| {
        let what = format!("'{}' is not when a takeover goes back", text.escape_debug());
        Problem::usage(what, why, "give a number and a unit, such as 30m or 2h")
    };
    let seconds = age_of(text).map_err(bad)?.as_secs();
    if seconds < 5 { Err(bad("it is less than five seconds")) } else { Ok(seconds) }
}

/// A limit of bytes; `none`: no limit, which is 0.
pub(crate) fn retention_bytes(text: &str) -> Result<u64, Problem> {
    if text == "none" { Ok(0) } else { size(text) }
}

/// A number of bytes: `100GiB`, `1.5T`, `500MB`.
pub(crate) fn size(text: &str) -> Result<u64, Problem> {
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not a number of bytes", text.escape_debug()),
            why,
            "give a number and a unit, such as 200MiB, 100GiB or 1.5TiB",
        )
    };
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let factor: f64 = match unit.trim_end_matches("/s").trim_start() {
        "B" | "" => 1.0,
        "K" | "KiB" => 1024.0,
        "M" | "MiB" => 1_048_576.0,
        "G" | "GiB" => 1_073_741_824.0,
        "T" | "TiB" => 1_099_511_627_776.0,
        "kB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        _ => return Err(bad("its unit is none of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB")),
    };
    let number: f64 = number.parse().map_err(|_| bad("before the unit there is no number"))?;
    let bytes = number * factor;
    match bytes {
        _ if bytes < 1.0 => Err(bad("it is less than a byte")),
        _ if bytes > 1e18 => Err(bad("it is more than any disk has")),
        _ => Ok(bytes as u64),
    }
}

/// Where NBD is to be served, `ADDR[:PORT]`.
pub(crate) fn nbd_listen(text: &str) -> Result<String, Problem> {
    const NBD_PORT: u16 = 10809;
    let bad = |why: &str| {
        Problem::usage(
            format!("'{}' is not an address to serve NBD at", text.escape_debug()),
            why,
            format!("give an IP address of this host and a port, such as 10.0.0.2:{NBD_PORT}"),
        )
    };
    let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let bare = inner.unwrap_or(text).parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, NBD_PORT));
    let address = text.parse().ok().or(bare).ok_or_else(|| bad("it is not an IP address with a port"))?;
    Ok(address.to_string())
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

    #[test]
    fn sizes() {
        let good = [
            ("1", 1),
            ("512B", 512),
            ("200MiB", 200 << 20),
            ("200MiB/s", 200 << 20),
            ("1.5G", 3 << 29),
            ("1 TiB", 1 << 40),
            ("500MB", 500_000_000),
        ];
        for (text, bytes) in good {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GiB", "0", "0.1B", "-1G", "1X", "1.2.3G", "9999999TiB", "inf", "1e9"] {
            assert_eq!(size(text).expect_err(text).kind, ProblemKind::Usage, "{text}");
        }
        assert_eq!(retention_bytes("none"), Ok(0));
    }

    #[test]
    fn ages_and_addresses() {
        for (text, seconds) in [("none", 0), ("7d", 604_800), ("4w", 2_419_200), ("1h30m", 5400)] {
            assert_eq!(retention_age(text), Ok(seconds), "{text}");
        }
        for text in ["", "7", "0s", "100ms", "-7d", "x"] {
            assert_eq!(retention_age(text).expect_err(text).kind, ProblemKind::Usage, "{text}");
        }
        assert_eq!(nbd_listen("10.0.0.2").as_deref(), Ok("10.0.0.2:10809"));
        assert_eq!(nbd_listen("[::1]:5").as_deref(), Ok("[::1]:5"));
        assert!(nbd_listen("host:5").is_err());
        assert!(time_ns("bookmark:b").is_err() && time_ns("-5m").is_ok());
    }
}
