//! Points as people ask for them, and as they are answered: the exact one that was taken, and how far it is from what
//! was asked. Pure: the time zone is an argument.

use crate::control::{PointReply, show_exact_time};
use crate::problem::{Problem, check_name};
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Timestamp, Zoned};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// Fewest hex digits that may stand for an incarnation.
pub const PREFIX_DIGITS_MIN: usize = 4;
/// All hex digits of an incarnation.
pub const PREFIX_DIGITS_MAX: usize = 32;

const NS_PER_SECOND: u64 = 1_000_000_000;
/// Units of an age, from long to short.
const UNITS: [(&str, u64); 6] = [
    ("w", 7 * 86_400 * NS_PER_SECOND),
    ("d", 86_400 * NS_PER_SECOND),
    ("h", 3600 * NS_PER_SECOND),
    ("m", 60 * NS_PER_SECOND),
    ("s", NS_PER_SECOND),
    ("ms", 1_000_000),
];

/// What a point promises about the programs that wrote. The numbers are kept on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Consistency {
    /// As after a power cut: every record of the stream is such a point.
    #[default]
    Crash = 1,
    /// The filesystems were quiet.
    Fs = 2,
    /// The applications were.
    App = 3,
}

impl Consistency {
    /// The consistency with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Crash, Self::Fs, Self::App].into_iter().find(|consistency| *consistency as u8 == number)
    }

    /// The word that people and scripts see.
    pub fn word(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Fs => "fs",
            Self::App => "app",
        }
    }
}

/// A point as asked for. [`fmt::Display`] gives a text that [`PointSpec::parse`] reads again, in any time zone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PointSpec {
    /// The newest that can be recovered.
    Latest,
    /// The newest bookmark of this name.
    Bookmark(String),
    /// The last one at or before this time of the source's clock, nanoseconds since 1970.
    Time(u64),
    /// The last one at or before now minus this.
    Age(Duration),
    /// With everything before this place in the stream.
    Position {
        /// First hex digits of the incarnation, lower case.
        incarnation_prefix: String,
        /// Offset in its stream.
        offset: u64,
    },
}

impl PointSpec {
    /// Reads what a person typed; times without a zone are in `zone`.
    pub fn parse(text: &str, zone: &TimeZone) -> Result<Self, Problem> {
        let text = text.trim();
        if text == "latest" {
            return Ok(Self::Latest);
        }
        if let Some(name) = text.strip_prefix("bookmark:") {
            check_name("bookmark", name)?;
            return Ok(Self::Bookmark(name.to_owned()));
        }
        if let Some(rest) = text.strip_prefix("pos:") {
            return position(text, rest);
        }
        if let Some(age) = text.strip_prefix('-') {
            return age_of(age).map(Self::Age).map_err(|why| not_a_point(text, why));
        }
        if text.starts_with(|c: char| c.is_ascii_digit()) && text.as_bytes().get(4) == Some(&b'-') {
            return time_of(text, zone).map(Self::Time);
        }
        Err(not_a_point(text, hint(text)))
    }

    /// The time that is asked for, if a time is; `now_ns` is for ages.
    pub fn time_ns(&self, now_ns: u64) -> Option<u64> {
        match self {
            Self::Time(time_ns) => Some(*time_ns),
            Self::Age(age) => Some(now_ns.saturating_sub(u64::try_from(age.as_nanos()).unwrap_or(u64::MAX))),
            Self::Latest | Self::Bookmark(_) | Self::Position { .. } => None,
        }
    }
}

impl fmt::Display for PointSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Bookmark(name) => write!(f, "bookmark:{name}"),
            Self::Time(time_ns) => f.write_str(&show_exact_time(*time_ns)),
            Self::Age(age) => show_age(f, *age),
            Self::Position { incarnation_prefix, offset } => write!(f, "pos:{incarnation_prefix}:{offset}"),
        }
    }
}

fn show_age(f: &mut fmt::Formatter<'_>, age: Duration) -> fmt::Result {
    let (seconds, fraction) = (age.as_secs(), age.subsec_nanos());
    f.write_str("-")?;
    let units = [(seconds / 86_400, "d"), (seconds / 3600 % 24, "h"), (seconds / 60 % 60, "m")];
    for (number, unit) in units.iter().filter(|(number, _)| *number > 0) {
        write!(f, "{number}{unit}")?;
    }
    let rest = seconds % 60;
    match fraction {
        0 if rest == 0 && seconds > 0 => Ok(()),
        0 => write!(f, "{rest}s"),
        _ => write!(f, "{}s", format!("{rest}.{fraction:09}").trim_end_matches('0')),
    }
}

/// A duration as typed: `7d`, `1h30m`, `1.5h`, `90s`, `500ms`; what is wrong with it otherwise.
pub fn age_of(text: &str) -> Result<Duration, &'static str> {
    let (mut rest, mut units, mut total) = (text, &UNITS[..], 0u64);
    if rest.is_empty() {
        return Err("an age has a number and a unit");
    }
    while !rest.is_empty() {
        let number_end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or("its last number has no unit")?;
        let (number, after) = rest.split_at(number_end);
        let unit_end = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit_end);
        let place = units.iter().position(|(word, _)| *word == unit);
        let place = place.ok_or("its units are w, d, h, m, s and ms, each once, from long to short")?;
        total = total.checked_add(scaled(number, units[place].1)?).ok_or("it is too long")?;
        (rest, units) = (after, &units[place + 1..]);
    }
    Ok(Duration::from_nanos(total))
}

/// A decimal number of units in nanoseconds.
fn scaled(number: &str, unit_ns: u64) -> Result<u64, &'static str> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return Err("before a unit there is no number");
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| "it is too long")? };
    // Digits beyond a nanosecond of the longest unit change nothing.
    let fraction = &fraction[..fraction.len().min(18)];
    let parts = fraction.parse::<u128>().unwrap_or(0) * u128::from(unit_ns) / 10u128.pow(fraction.len() as u32);
    let total = u128::from(whole) * u128::from(unit_ns) + parts;
    u64::try_from(total).map_err(|_| "it is too long")
}

fn position(text: &str, rest: &str) -> Result<PointSpec, Problem> {
    let bad = |why| not_a_point(text, why);
    let (prefix, offset) = rest.split_once(':').ok_or_else(|| bad("a position is pos:INCARNATION:OFFSET"))?;
    let hex = prefix.bytes().all(|b| b.is_ascii_hexdigit());
    if !hex || !(PREFIX_DIGITS_MIN..=PREFIX_DIGITS_MAX).contains(&prefix.len()) {
        return Err(bad("the incarnation of a position has 4 to 32 hexadecimal digits"));
    }
    let digits = !offset.is_empty() && offset.bytes().all(|b| b.is_ascii_digit());
    let offset = offset.parse().ok().filter(|_| digits).ok_or_else(|| bad("the offset of a position is a number"))?;
    Ok(PointSpec::Position { incarnation_prefix: prefix.to_ascii_lowercase(), offset })
}

/// A date with a time, with or without a zone, as nanoseconds since 1970.
fn time_of(text: &str, zone: &TimeZone) -> Result<u64, Problem> {
    let bad = |why| not_a_point(text, why);
    let since_1970 = |time: Timestamp| {
        u64::try_from(time.as_nanosecond()).map_err(|_| bad("it is not between the years 1970 and 2554"))
    };
    if text.contains('[') {
        let zoned: Zoned = text.parse().map_err(|_| bad("it is not a time in the zone that it names"))?;
        return since_1970(zoned.timestamp());
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        return since_1970(time);
    }
    // A zone that was not understood must not be taken for none.
    let bare = text.bytes().skip(10).all(|b| b.is_ascii_digit() || matches!(b, b':' | b'.' | b' ' | b'T' | b't'));
    let local: DateTime = match text.parse() {
        Ok(local) if bare => local,
        _ => return Err(bad("it looks like a time and is none")),
    };
    let ambiguous = zone.to_ambiguous_timestamp(local);
    let offset = match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { offset } => offset,
        AmbiguousOffset::Gap { .. } => {
            return Err(bad("the clocks were put forward over this local time, it never was"));
        }
        AmbiguousOffset::Fold { before, after } => {
            let why = "the clocks were put back, this local time was there twice";
            let said = |offset: Offset| match offset.to_timestamp(local) {
                Ok(time) => time.display_with_offset(offset).to_string(),
                Err(_) => format!("{local}{offset}"),
            };
            let next = format!("say '{}' for the first time or '{}' for the second", said(before), said(after));
            return Err(Problem::usage(format!("'{}' is not one point", text.escape_debug()), why, next));
        }
    };
    since_1970(offset.to_timestamp(local).map_err(|_| bad("it is not between the years 1970 and 2554"))?)
}

fn hint(text: &str) -> &'static str {
    let looks_like_position = text.split_once(':').is_some_and(|(prefix, offset)| {
        prefix.len() >= PREFIX_DIGITS_MIN
            && prefix.bytes().all(|b| b.is_ascii_hexdigit())
            && !offset.is_empty()
            && offset.bytes().all(|b| b.is_ascii_digit())
    });
    match text {
        "" => "nothing was said",
        _ if looks_like_position => "it looks like a position; 'pos:' must stand before it",
        _ if age_of(text).is_ok() => "it looks like an age; '-' must stand before it",
        _ => "it is neither 'latest', nor 'bookmark:NAME', nor a time with its date, nor an age, nor a position",
    }
}

fn not_a_point(text: &str, why: &str) -> Problem {
    Problem::usage(
        format!("'{}' is not a point", text.escape_debug()),
        why,
        "say latest, bookmark:NAME, '2026-11-20 14:03:22.5' (local time), 2026-11-20T14:03:22.5Z, \
         -5m (an age; also -1h30m, -90s) or pos:INCARNATION:OFFSET",
    )
}

/// The exact point that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocatedPoint {
    /// Orders all points of the group.
    pub height: u64,
    /// Its time at the source, nanoseconds since 1970.
    pub time_ns: u64,
    /// `incarnation:offset`; `unknown` if the chronicle lost it.
    pub position: String,
    /// What it promises.
    pub consistency: Consistency,
    /// What was asked for, as text.
    pub asked: String,
    /// Nanoseconds from what was asked to what was taken: negative if it is older. 0 if it is exact or nothing with a
    /// time was asked.
    pub distance_ns: i64,
}

impl LocatedPoint {
    /// As the control socket says it.
    pub fn reply(&self) -> PointReply {
        PointReply {
            time: show_exact_time(self.time_ns),
            position: self.position.clone(),
            height: self.height,
            consistency: self.consistency,
            asked: self.asked.clone(),
            distance_seconds: self.distance_ns as f64 / NS_PER_SECOND as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::problem::ProblemKind;
    use proptest::prelude::*;

    /// Berlin's rules, without a database of zones.
    fn zone() -> TimeZone {
        TimeZone::posix("CET-1CEST,M3.5.0,M10.5.0/3").expect("a zone")
    }

    const NOV: u64 = 1_795_179_802_500_000_000; // 2026-11-20T13:03:22.5Z

    #[test]
    fn what_is_a_point() {
        let position = |prefix: &str, offset| PointSpec::Position { incarnation_prefix: prefix.into(), offset };
        let age = |ns| PointSpec::Age(Duration::from_nanos(ns));
        let cases = [
            ("latest", PointSpec::Latest),
            (" latest ", PointSpec::Latest),
            ("bookmark:before-upgrade", PointSpec::Bookmark("before-upgrade".into())),
            ("2026-11-20T13:03:22.5Z", PointSpec::Time(NOV)),
            ("2026-11-20t13:03:22.500000001z", PointSpec::Time(NOV + 1)),
            ("2026-11-20T14:03:22.5+01:00", PointSpec::Time(NOV)),
            ("2026-11-20 08:03:22.5-05:00", PointSpec::Time(NOV)),
            ("2026-11-20 14:03:22.5", PointSpec::Time(NOV)),
            ("2026-11-20T14:03:22.5", PointSpec::Time(NOV)),
            ("2026-11-20 14:03", PointSpec::Time(NOV - 22_500_000_000)),
            ("2026-11-20", PointSpec::Time(NOV - 22_500_000_000 - 50_580_000_000_000)),
            ("2026-07-01 14:00:00", PointSpec::Time(1_782_907_200_000_000_000)),
            ("-5m", age(300_000_000_000)),
            ("-1h30m", age(5_400_000_000_000)),
            ("-90s", age(90_000_000_000)),
            ("-1.5h", age(5_400_000_000_000)),
            ("-.5s", age(500_000_000)),
            ("-1d2h3m4s5ms", age(93_784_005_000_000)),
            ("-250ms", age(250_000_000)),
            ("pos:ABABabab:4096", position("abababab", 4096)),
            ("pos:abab:0", position("abab", 0)),
        ];
        for (text, spec) in cases {
            assert_eq!(PointSpec::parse(text, &zone()), Ok(spec), "{text}");
        }
    }

    #[test]
    fn what_is_none() {
        let cases = [
            ("", "nothing was said"),
            ("newest", "neither 'latest'"),
            ("5m", "looks like an age"),
            ("abababab:4096", "'pos:' must stand before it"),
            ("-", "a number and a unit"),
            ("-5", "no unit"),
            ("-5x", "its units are"),
            ("-5m1h", "from long to short"),
            ("-5m5m", "each once"),
            ("-1.2.3h", "no number"),
            ("-.h", "no number"),
            ("-h", "no number"),
            ("--5m", "its units"),
            ("-99999999999999999999s", "too long"),
            ("-9999999999w", "too long"),
            ("pos:abababab", "pos:INCARNATION:OFFSET"),
            ("pos:xyz:1", "hexadecimal"),
            ("pos:aba:1", "4 to 32"),
            ("pos:abababab:", "is a number"),
            ("pos:abababab:+1", "is a number"),
            ("pos:abababab:18446744073709551616", "is a number"),
            ("bookmark:", "a name has"),
            ("bookmark:a b", "a name has"),
            ("14:03:22", "neither"),
            ("2026-13-01 00:00:00", "looks like a time"),
            ("2026-11-20 14:03:22 UTC", "looks like a time"),
            ("2026-11-20 14:03:22 +1", "looks like a time"),
            ("2026-11-20T25:00:00Z", "looks like a time"),
            ("1969-12-31T23:59:59Z", "1970"),
            ("2026-03-29 02:30:00", "never was"),
            ("2026-11-20T14:03:22[No/Where]", "in the zone"),
            ("²026-11-20", "neither"),
        ];
        for (text, why) in cases {
            let problem = PointSpec::parse(text, &zone()).expect_err(text);
            assert_eq!(problem.kind, ProblemKind::Usage, "{text}");
            assert!(problem.why.contains(why), "{text}: {}", problem.why);
            assert!(!problem.next.is_empty());
        }
    }

    #[test]
    fn a_local_time_that_was_twice() {
        let problem = PointSpec::parse("2026-10-25 02:30:00", &zone()).expect_err("twice");
        assert!(problem.why.contains("twice"));
        let expected =
            "say '2026-10-25T02:30:00+02:00' for the first time or '2026-10-25T02:30:00+01:00' for the second";
        assert_eq!(problem.next, expected);
        assert!(PointSpec::parse("2026-10-25T02:30:00+02:00", &zone()).is_ok());
    }

    #[test]
    fn words_on_the_socket() {
        let text = serde_json::to_string(&PointSpec::Bookmark("b".into())).expect("plain data");
        assert_eq!(text, r#"{"bookmark":"b"}"#);
        assert_eq!(PointSpec::Age(Duration::from_millis(5_400_500)).to_string(), "-1h30m0.5s");
        assert_eq!(PointSpec::Age(Duration::ZERO).to_string(), "-0s");
        assert_eq!(PointSpec::Time(NOV).time_ns(7), Some(NOV));
        assert_eq!(PointSpec::Age(Duration::from_nanos(5)).time_ns(7), Some(2));
        assert_eq!(PointSpec::Age(Duration::MAX).time_ns(7), Some(0));
        assert_eq!(PointSpec::Latest.time_ns(7), None);
    }

    #[test]
    fn consistencies_have_numbers() {
        for consistency in [Consistency::Crash, Consistency::Fs, Consistency::App] {
            assert_eq!(Consistency::from_number(consistency as u8), Some(consistency));
        }
        assert_eq!(Consistency::from_number(0), None);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "\\PC{0,40}") {
            let _ = PointSpec::parse(&text, &zone());
        }

        #[test]
        fn nearly_right_never_panics(text in "(-|pos:|bookmark:|2026-11-20)[-0-9a-zT:. \\[\\]+µ]{0,20}") {
            let _ = PointSpec::parse(&text, &zone());
        }

        #[test]
        fn what_is_shown_is_understood(ns in 0u64..u64::MAX / 2, offset: u64, which in 0u8..4) {
            let spec = match which {
                0 => PointSpec::Time(ns),
                1 => PointSpec::Age(Duration::from_nanos(ns)),
                2 => PointSpec::Position { incarnation_prefix: format!("{:08x}", ns as u32), offset },
                _ => PointSpec::Bookmark(format!("b{ns}")),
            };
            prop_assert_eq!(PointSpec::parse(&spec.to_string(), &zone()), Ok(spec.clone()));
            let json = serde_json::to_string(&spec).expect("plain data");
            prop_assert_eq!(serde_json::from_str::<PointSpec>(&json).expect("own words"), spec);
        }
    }
}
