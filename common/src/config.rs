//! Configuration: a file form (TOML, every key optional, an unknown key is an error that names it) and a validated form.

use crate::limits::{RING_BYTES_MAX, RING_BYTES_MIN};
use crate::problem::Problem;
use crate::watch::Limits;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

/// `agent.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentFile {
    /// Receiver, `host:port`. Written by `varve join`.
    pub receiver: Option<String>,
    /// This host's name at the receiver. Written by `varve join`.
    pub name: Option<String>,
    /// Ring of each group in MiB: a power of two, 4 to 1024.
    pub ring_mib: Option<u32>,
    /// A group is *lagging* when its RPO is longer than this many seconds.
    pub lagging_seconds: Option<f64>,
    /// Compress frames where it pays.
    pub compression: Option<bool>,
    /// Compare all after a boot, whatever proves that nobody wrote.
    pub compare_after_boot: Option<bool>,
    /// Most MiB that one group's journal may take on disk: 0 (no journal), or 64 to 4194304.
    pub journal_max_mib: Option<u32>,
    /// Alert when the RPO is longer than this many seconds; 0: never.
    pub alert_rpo_seconds: Option<f64>,
    /// Alert when nothing was acknowledged for this many seconds.
    pub alert_no_ack_seconds: Option<f64>,
    /// Alert when ring and journal will be full in less than this many minutes; 0: never.
    pub alert_journal_minutes: Option<f64>,
    /// Alerts that nobody wants to hear of: `GROUP`, `GROUP/ID`, `*/ID`.
    pub alert_mute: Option<Vec<String>>,
    /// Program that is told of alerts (docs/monitor.md).
    pub alert_hook: Option<String>,
    /// How long it may take.
    pub alert_hook_seconds: Option<f64>,
    /// Where metrics are written to, in Prometheus' text format.
    pub metrics_file: Option<String>,
}

/// What the agent runs with.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentConfig {
    /// Receiver, `host:port`; `None` before `varve join`.
    pub receiver: Option<String>,
    /// This host's name at the receiver.
    pub name: Option<String>,
    /// Ring of each group.
    pub ring_bytes: u32,
    /// Limit beyond which a group is *lagging*.
    pub lagging_after: Duration,
    /// Compress frames where it pays.
    pub compression: bool,
    /// Compare all after a boot, whatever proves that nobody wrote.
    pub compare_after_boot: bool,
    /// Most bytes of one group's journal; 0: there is none.
    pub journal_bytes_max: u64,
    /// What is watched and who is told.
    pub watch: WatchConfig,
}

/// `receiver.toml`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReceiverFile {
    /// UDP address to listen on.
    pub listen: Option<String>,
    /// This receiver's name, for people.
    pub name: Option<String>,
    /// Size of one landing segment in MiB, 8 to 1024.
    pub landing_segment_mib: Option<u32>,
    /// Most MiB that one group's landing log may hold before the agent has to wait, at least four segments.
    pub landing_max_mib: Option<u32>,
    /// Size at which a layer of history is closed in MiB, 1 to 512.
    pub history_layer_mib: Option<u32>,
    /// Alert when the RPO is longer than this many seconds; 0: never.
    pub alert_rpo_seconds: Option<f64>,
    /// Alert when nothing was acknowledged for this many seconds.
    pub alert_no_ack_seconds: Option<f64>,
    /// Alert when the window is shorter than this many hours; 0: never.
    pub alert_window_hours: Option<f64>,
    /// Alert when no verify found the replica equal for this many days; 0: never.
    pub alert_verify_days: Option<f64>,
    /// Alerts that nobody wants to hear of: `GROUP`, `GROUP/ID`, `*/ID`.
    pub alert_mute: Option<Vec<String>>,
    /// Program that is told of alerts (docs/monitor.md).
    pub alert_hook: Option<String>,
    /// How long it may take.
    pub alert_hook_seconds: Option<f64>,
    /// Where metrics are written to, in Prometheus' text format.
    pub metrics_file: Option<String>,
}

/// What the receiver runs with.
#[derive(Clone, Debug, PartialEq)]
pub struct ReceiverConfig {
    /// UDP address to listen on.
    pub listen: std::net::SocketAddr,
    /// This receiver's name, for people.
    pub name: String,
    /// Size of one landing segment.
    pub landing_segment_bytes: u64,
    /// Most bytes of one group's landing log.
    pub landing_bytes_max: u64,
    /// A layer of history is closed when it has this many bytes.
    pub history_layer_bytes: u64,
    /// What is watched and who is told.
    pub watch: WatchConfig,
}

/// The watch of a daemon.
#[derive(Clone, Debug, PartialEq)]
pub struct WatchConfig {
    /// When an alert is raised.
    pub limits: Limits,
    /// Program that is told.
    pub hook: Option<PathBuf>,
    /// How long it may take.
    pub hook_timeout: Duration,
    /// Where metrics are written to.
    pub metrics_file: Option<PathBuf>,
}

/// The port unless the operator says otherwise.
pub const DEFAULT_PORT: u16 = 7443;
const DEFAULT_RING_MIB: u32 = 64;
const DEFAULT_JOURNAL_MIB: u32 = 4096;
const DEFAULT_LAGGING: Duration = Duration::from_secs(10);
const DEFAULT_HOOK: Duration = Duration::from_secs(30);
const DEFAULT_SEGMENT_MIB: u32 = 64;
const DEFAULT_LANDING_MIB: u32 = 1024;
const DEFAULT_LAYER_MIB: u32 = 512;

fn parse<T: for<'de> Deserialize<'de>>(name: &str, text: &str) -> Result<T, Problem> {
    toml::from_str(text).map_err(|error| {
        Problem::usage(
            format!("{name} is not understood"),
            error.to_string().trim_end().replace('\n', "; "),
            format!("correct {name}; docs/install.md lists its keys"),
        )
    })
}

fn out_of_range(name: &str, key: &str, range: &str) -> Problem {
    Problem::usage(format!("{name}: {key} is out of range"), format!("{key} is {range}"), format!("correct {name}"))
}

/// A number of `unit` seconds within a range in which 0 may mean off.
fn seconds(
    name: &str,
    key: &str,
    given: Option<f64>,
    default: Duration,
    unit: f64,
    (least, most): (f64, f64),
) -> Result<Duration, Problem> {
    let Some(given) = given else { return Ok(default) };
    if !(least..=most).contains(&given) {
        return Err(out_of_range(name, key, &format!("a number from {least} to {most}")));
    }
    Ok(Duration::from_secs_f64(given * unit))
}

fn absolute(name: &str, key: &str, given: Option<String>) -> Result<Option<PathBuf>, Problem> {
    let path = given.map(PathBuf::from);
    match path {
        Some(path) if !path.is_absolute() => Err(out_of_range(name, key, "an absolute path")),
        path => Ok(path),
    }
}

fn mutes(name: &str, given: Option<Vec<String>>) -> Result<Vec<String>, Problem> {
    let given = given.unwrap_or_default();
    let known = |word: &str| crate::watch::AlertId::ALL.iter().any(|id| id.word() == word);
    // A mute that mutes nothing is found when the alert comes at night.
    match given.iter().find(|mute| mute.split_once('/').is_some_and(|(_, word)| !known(word))) {
        Some(_) => Err(out_of_range(name, "alert_mute", "a list of GROUP, GROUP/ID and */ID (docs/monitor.md)")),
        None => Ok(given),
    }
}

const DAY_SECONDS: f64 = 86_400.0;

impl AgentConfig {
    /// Reads and checks the text of `agent.toml` (named `name` in errors).
    pub fn parse(name: &str, text: &str) -> Result<Self, Problem> {
        let file: AgentFile = parse(name, text)?;
        let ring_bytes = u64::from(file.ring_mib.unwrap_or(DEFAULT_RING_MIB)) << 20;
        if !ring_bytes.is_power_of_two() || !(RING_BYTES_MIN..=RING_BYTES_MAX).contains(&ring_bytes) {
            return Err(out_of_range(name, "ring_mib", "a power of two from 4 to 1024"));
        }
        let lagging = file.lagging_seconds.unwrap_or(DEFAULT_LAGGING.as_secs_f64());
        if !(0.1..=86_400.0).contains(&lagging) {
            return Err(out_of_range(name, "lagging_seconds", "a number from 0.1 to 86400"));
        }
        let journal = file.journal_max_mib.unwrap_or(DEFAULT_JOURNAL_MIB);
        if journal != 0 && !(64..=4 << 20).contains(&journal) {
            return Err(out_of_range(name, "journal_max_mib", "0 (no journal) or a number from 64 to 4194304"));
        }
        let limits = Limits::default();
        let watch = WatchConfig {
            limits: Limits {
                rpo: seconds(name, "alert_rpo_seconds", file.alert_rpo_seconds, limits.rpo, 1.0, (0.0, DAY_SECONDS))?,
                no_ack: seconds(
                    name,
                    "alert_no_ack_seconds",
                    file.alert_no_ack_seconds,
                    limits.no_ack,
                    1.0,
                    (5.0, DAY_SECONDS),
                )?,
                journal_full: seconds(
                    name,
                    "alert_journal_minutes",
                    file.alert_journal_minutes,
                    limits.journal_full,
                    60.0,
                    (0.0, 10_000.0),
                )?,
                mute: mutes(name, file.alert_mute)?,
                ..limits
            },
            hook: absolute(name, "alert_hook", file.alert_hook)?,
            hook_timeout: seconds(
                name,
                "alert_hook_seconds",
                file.alert_hook_seconds,
                DEFAULT_HOOK,
                1.0,
                (0.1, 600.0),
            )?,
            metrics_file: absolute(name, "metrics_file", file.metrics_file)?,
        };
        Ok(Self {
            receiver: file.receiver,
            name: file.name,
            ring_bytes: ring_bytes as u32,
            lagging_after: Duration::from_secs_f64(lagging),
            compression: file.compression.unwrap_or(true),
            compare_after_boot: file.compare_after_boot.unwrap_or(false),
            journal_bytes_max: u64::from(journal) << 20,
            watch,
        })
    }
}

impl ReceiverConfig {
    /// Reads and checks the text of `receiver.toml` (named `name` in errors).
    pub fn parse(name: &str, text: &str) -> Result<Self, Problem> {
        let file: ReceiverFile = parse(name, text)?;
        let listen = file.listen.unwrap_or_else(|| format!("[::]:{DEFAULT_PORT}"));
        let listen = listen
            .parse()
            .map_err(|_| out_of_range(name, "listen", "an address and a port such as 0.0.0.0:7443 or [::]:7443"))?;
        let segment = file.landing_segment_mib.unwrap_or(DEFAULT_SEGMENT_MIB);
        if !(8..=1024).contains(&segment) {
            return Err(out_of_range(name, "landing_segment_mib", "a number from 8 to 1024"));
        }
        let most = file.landing_max_mib.unwrap_or(DEFAULT_LANDING_MIB.max(4 * segment));
        if most < 4 * segment {
            return Err(out_of_range(name, "landing_max_mib", "at least four times landing_segment_mib"));
        }
        let layer = file.history_layer_mib.unwrap_or(DEFAULT_LAYER_MIB);
        if !(1..=DEFAULT_LAYER_MIB).contains(&layer) {
            return Err(out_of_range(name, "history_layer_mib", "a number from 1 to 512"));
        }
        let limits = Limits::default();
        let watch = WatchConfig {
            limits: Limits {
                rpo: seconds(name, "alert_rpo_seconds", file.alert_rpo_seconds, limits.rpo, 1.0, (0.0, DAY_SECONDS))?,
                no_ack: seconds(
                    name,
                    "alert_no_ack_seconds",
                    file.alert_no_ack_seconds,
                    limits.no_ack,
                    1.0,
                    (5.0, DAY_SECONDS),
                )?,
                window: seconds(
                    name,
                    "alert_window_hours",
                    file.alert_window_hours,
                    limits.window,
                    3600.0,
                    (0.0, 1e6),
                )?,
                verify_age: seconds(
                    name,
                    "alert_verify_days",
                    file.alert_verify_days,
                    limits.verify_age,
                    DAY_SECONDS,
                    (0.0, 1e5),
                )?,
                mute: mutes(name, file.alert_mute)?,
                ..limits
            },
            hook: absolute(name, "alert_hook", file.alert_hook)?,
            hook_timeout: seconds(
                name,
                "alert_hook_seconds",
                file.alert_hook_seconds,
                DEFAULT_HOOK,
                1.0,
                (0.1, 600.0),
            )?,
            metrics_file: absolute(name, "metrics_file", file.metrics_file)?,
        };
        Ok(Self {
            listen,
            name: file.name.unwrap_or_else(|| "receiver".to_owned()),
            landing_segment_bytes: u64::from(segment) << 20,
            landing_bytes_max: u64::from(most) << 20,
            history_layer_bytes: u64::from(layer) << 20,
            watch,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_key_is_named() {
        let problem = AgentConfig::parse("agent.toml", "ring_mb = 64\n").expect_err("typo");
        assert!(problem.why.contains("ring_mb"), "{problem:?}");
    }

    #[test]
    fn limits_are_checked() {
        assert!(AgentConfig::parse("a", "ring_mib = 48").is_err(), "not a power of two");
        assert!(AgentConfig::parse("a", "ring_mib = 2048").is_err());
        assert!(AgentConfig::parse("a", "lagging_seconds = 0").is_err());
        assert!(AgentConfig::parse("a", "journal_max_mib = 63").is_err());
        assert_eq!(AgentConfig::parse("a", "journal_max_mib = 0").expect("none").journal_bytes_max, 0);
        assert!(ReceiverConfig::parse("r", "listen = \"7443\"").is_err());
        assert!(ReceiverConfig::parse("r", "landing_max_mib = 65").is_err());
        assert!(ReceiverConfig::parse("r", "history_layer_mib = 0").is_err());
        assert!(ReceiverConfig::parse("r", "history_layer_mib = 513").is_err());
        for wrong in [
            "alert_no_ack_seconds = 0",
            "alert_rpo_seconds = -1",
            "alert_rpo_seconds = nan",
            "alert_hook = \"hook\"",
            "alert_hook_seconds = 0",
            "alert_mute = [\"db/no-such\"]",
            "metrics_file = \"a\"",
        ] {
            assert!(AgentConfig::parse("a", wrong).is_err() && ReceiverConfig::parse("r", wrong).is_err(), "{wrong}");
        }
        let right = "alert_window_hours = 24\nalert_verify_days = 0\nalert_mute = [\"db\", \"*/gap\"]";
        let limits = ReceiverConfig::parse("r", right).expect("right").watch.limits;
        assert_eq!((limits.window.as_secs(), limits.verify_age.as_secs(), limits.mute.len()), (86_400, 0, 2));
        let defaults = ReceiverConfig::parse("r", "").expect("all keys are optional");
        assert_eq!((defaults.listen.port(), defaults.history_layer_bytes), (DEFAULT_PORT, 512 << 20));
        assert_eq!(AgentConfig::parse("a", "").expect("defaults").ring_bytes, 64 << 20);
    }
}
