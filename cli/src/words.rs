//! Numbers and causes as people read them.

use varve_common::control::PointReply;

const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/// `512 B`, `20.0 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `85.2 MiB/s`.
pub(crate) fn rate(bytes_per_second: f64) -> String {
    format!("{}/s", bytes(bytes_per_second.max(0.0) as u64))
}

/// `0.0 s`, `2 min 10 s`, `3 h 5 min`, `2 d 3 h`.
pub(crate) fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".to_owned();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// Full per cent, rounded down: 100 only when all is done.
pub(crate) fn per_cent(done: u64, total: u64) -> u64 {
    if total == 0 { 0 } else { (u128::from(done.min(total)) * 100 / u128::from(total)) as u64 }
}

/// RFC 3339 to the millisecond and without the `T`, as a person reads it; anything else as it is.
pub(crate) fn time(rfc3339: &str) -> String {
    match rfc3339.parse::<jiff::Timestamp>() {
        Ok(time) => time.strftime("%Y-%m-%d %H:%M:%S%.3fZ").to_string(),
        Err(_) => rfc3339.to_owned(),
    }
}

/// RFC 3339 as it is but for the `T`: all digits, because with fewer it may name another point.
pub(crate) fn exact_time(rfc3339: &str) -> String {
    match rfc3339.split_once('T') {
        Some((date, time)) => format!("{date} {time}"),
        None => rfc3339.to_owned(),
    }
}

/// Between two times.
pub(crate) fn span(from: &str, to: &str) -> Option<String> {
    let (from, to): (jiff::Timestamp, jiff::Timestamp) = (from.parse().ok()?, to.parse().ok()?);
    Some(seconds(to.duration_since(from).as_secs_f64()))
}

/// Seconds to the millisecond where that matters.
pub(crate) fn fine_seconds(span: f64) -> String {
    if (0.0..60.0).contains(&span) && span.is_finite() {
        let text = format!("{span:.3}");
        return format!("{} s", text.trim_end_matches('0').trim_end_matches('.'));
    }
    seconds(span)
}

/// The exact point that was taken and how far it is from what was asked.
pub(crate) fn point(point: &PointReply) -> String {
    let (far, asked) = (point.distance_seconds, &point.asked);
    let span = fine_seconds(far.abs());
    let distance = match asked.as_str() {
        "latest" if far < 0.0 => format!("the newest, {span} older than what came last: a gap is open"),
        "latest" => "the newest".to_owned(),
        _ if far == 0.0 => format!("exactly '{asked}'"),
        // Less than what is shown.
        _ if far.abs() < 0.0005 => format!("less than 1 ms from '{asked}'"),
        _ if far < 0.0 => format!("{span} before '{asked}'"),
        _ => format!("{span} after '{asked}'"),
    };
    let (time, position) = (exact_time(&point.time), &point.position);
    format!("{time} (position {position}, {}-consistent), {distance}", point.consistency.word())
}

/// The system's words for an error, without "(os error N)".
pub(crate) fn sentence(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => "the system gave no reason".to_owned(),
    }
}

/// `1 volume`, `2 volumes`.
pub(crate) fn count(number: usize, word: &str) -> String {
    if number == 1 { format!("1 {word}") } else { format!("{number} {word}s") }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Rows as columns, two spaces apart, without trailing space. The last column is not padded.
pub(crate) fn columns(rows: &[Vec<String>]) -> Vec<String> {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.iter().map(Vec::len).max().unwrap_or(0)).map(width).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

/// What a terminal may be shown: paths and reasons come from other hosts, and a control character in one must not move
/// the cursor or change what the operator has read. Lines stay lines.
pub(crate) fn visible(text: &str) -> std::borrow::Cow<'_, str> {
    if !text.chars().any(|c| c.is_control() && c != '\n') {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' => shown.push(c),
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        let sizes =
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), ((1 << 20) - 1, "1.0 MiB"), (20 << 30, "20.0 GiB")];
        for (size, text) in sizes {
            assert_eq!(bytes(size), text);
        }
        assert_eq!(bytes(u64::MAX), "16384.0 PiB");
        let spans =
            [(0.0, "0.0 s"), (9.96, "10 s"), (130.2, "2 min 10 s"), (11_100.0, "3 h 5 min"), (183_600.0, "2 d 3 h")];
        for (span, text) in spans {
            assert_eq!(seconds(span), text);
        }
        assert_eq!(seconds(f64::NAN), "unknown");
        assert_eq!(per_cent(999, 1000), 99);
        assert_eq!(per_cent(0, 0), 0);
        assert_eq!(per_cent(u64::MAX, u64::MAX), 100);
    }

    #[test]
    fn times_and_causes() {
        assert_eq!(time("2026-11-20T14:03:22.512345Z"), "2026-11-20 14:03:22.512Z");
        assert_eq!(time("soon"), "soon");
        assert_eq!(sentence(&std::io::Error::from_raw_os_error(13)), "permission denied");
    }

    #[test]
    fn points_say_how_far_they_are() {
        let mut taken = PointReply {
            time: "2026-11-20T14:03:22.512345678Z".into(),
            position: "abababab:4096".into(),
            asked: "-5m".into(),
            distance_seconds: -0.3124,
            ..PointReply::default()
        };
        let head = "2026-11-20 14:03:22.512345678Z (position abababab:4096, crash-consistent), ";
        let cases = [
            ("-5m", -0.3124, "0.312 s before '-5m'"),
            ("-5m", 75.0, "1 min 15 s after '-5m'"),
            ("-5m", 0.0000001, "less than 1 ms from '-5m'"),
            ("bookmark:b", 0.0, "exactly 'bookmark:b'"),
            ("latest", 0.0, "the newest"),
            ("latest", -90.0, "the newest, 1 min 30 s older than what came last: a gap is open"),
        ];
        for (asked, far, text) in cases {
            (taken.asked, taken.distance_seconds) = (asked.into(), far);
            assert_eq!(point(&taken), format!("{head}{text}"));
        }
        assert_eq!(fine_seconds(2.0), "2 s");
        assert_eq!(fine_seconds(0.0), "0 s");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "bb".into(), "c".into()], vec!["aaa".into(), String::new(), String::new()]];
        assert_eq!(columns(&rows), ["a    bb  c", "aaa"]);
    }

    #[test]
    fn control_characters_are_shown_not_obeyed() {
        assert_eq!(visible("a\nb"), "a\nb");
        assert_eq!(visible("/dev/\x1b[2Jx\u{9b}"), "/dev/\\u{1b}[2Jx\\u{9b}");
    }
}
