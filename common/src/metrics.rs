//! Every metric in one table, and their text in Prometheus' format (text/plain; version=0.0.4).
//!
//! Made of what the daemons say of themselves, so `varve metrics` and the file that a daemon writes hold the same.

use crate::control::{DaemonStatus, GroupStatus, StatusReply};
use crate::state::{Data, Link, Role};
use crate::watch::Flow;
use std::fmt::Write;

/// A metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name, unit last.
    pub name: &'static str,
    /// `gauge` or `counter`.
    pub kind: &'static str,
    /// What it is.
    pub help: &'static str,
    /// Which value means trouble; empty: none by itself.
    pub trouble: &'static str,
    values: fn(&StatusReply, &mut Values),
}

/// One number.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// Names and values.
    pub labels: Vec<(&'static str, String)>,
    /// The number.
    pub value: f64,
}

type Values = Vec<Value>;

const fn gauge(
    name: &'static str,
    help: &'static str,
    trouble: &'static str,
    values: fn(&StatusReply, &mut Values),
) -> Metric {
    Metric { name, kind: "gauge", help, trouble, values }
}

const fn counter(
    name: &'static str,
    help: &'static str,
    trouble: &'static str,
    values: fn(&StatusReply, &mut Values),
) -> Metric {
    Metric { name, kind: "counter", help, trouble, values }
}

/// All metrics. docs/monitor.md has the same table; a test compares them.
pub const TABLE: &[Metric] = &[
    gauge("varve_daemon_up", "the daemon answered; its version is a label", "0, or missing", |status, out| {
        for daemon in &status.daemons {
            out.push(of_daemon(daemon, 1.0, &[("version", daemon.version.clone())]));
        }
    }),
    gauge("varve_daemon_memory_bytes", "resident memory of its own", "grows for days", |status, out| {
        out.extend(status.daemons.iter().map(|daemon| of_daemon(daemon, daemon.rss_bytes as f64, &[])));
    }),
    gauge(
        "varve_hosts_connected",
        "production hosts with a connection (receiver)",
        "less than there are",
        |status, out| {
            let hosts = |daemon: &DaemonStatus| Some(of_daemon(daemon, daemon.hosts_connected? as f64, &[]));
            out.extend(status.daemons.iter().filter_map(hosts));
        },
    ),
    gauge("varve_alert", "1 for each alert that stands; `id` and `severity` are labels", "1", |status, out| {
        for group in &status.groups {
            for alert in &group.alerts {
                let labels = [("id", alert.id.clone()), ("severity", alert.severity.word().to_owned())];
                out.push(of_group(group, 1.0, &labels));
            }
        }
    }),
    gauge("varve_group_role", "1 for the role that holds", "`fenced` is 1", |status, out| {
        let all = [Role::Source, Role::Replica, Role::Promoted, Role::Fenced];
        states(status, out, "role", &all, |group| group.role);
    }),
    gauge("varve_group_link", "1 for the state of the link that holds", "`streaming` is 0", |status, out| {
        let all = [Link::Disconnected, Link::Handshaking, Link::Streaming, Link::Refused];
        states(status, out, "link", &all, |group| group.link);
    }),
    gauge("varve_group_data", "1 for what the replica is worth", "`protected` and `verifying` are 0", |status, out| {
        let all = [Data::InitialSync, Data::Protected, Data::Lagging, Data::Gap, Data::Resync, Data::Verifying];
        states(status, out, "data", &all, |group| group.data);
    }),
    gauge("varve_group_flow", "1 for how the stream is doing", "`stalled` is 1", |status, out| {
        for group in &status.groups {
            for flow in Flow::ALL {
                let holds = group.watch.as_ref().is_some_and(|watch| watch.flow == flow);
                out.push(of_group(group, f64::from(holds), &[("flow", flow.word().to_owned())]));
            }
        }
    }),
    gauge(
        "varve_group_rpo_seconds",
        "age of the oldest captured write that is not durable; missing: not known",
        "above your RPO",
        |s, o| {
            number(s, o, |group| group.rpo_seconds);
        },
    ),
    gauge(
        "varve_group_last_ack_seconds",
        "since something was newly acknowledged or landed",
        "above 5: canaries come every second",
        |s, o| {
            number(s, o, |group| Some(group.watch.as_ref()?.last_ack_seconds));
        },
    ),
    gauge("varve_group_lag_bytes", "captured and not durable at the receiver", "grows for minutes", |s, o| {
        number(s, o, |group| Some(group.lag_bytes as f64));
    }),
    gauge("varve_group_ring_used_bytes", "of the ring, not yet released (agent)", "near the total", |s, o| {
        number(s, o, |group| Some(group.ring.as_ref()?.used_bytes as f64));
    }),
    gauge("varve_group_ring_total_bytes", "size of the ring (agent)", "", |s, o| {
        number(s, o, |group| Some(group.ring.as_ref()?.total_bytes as f64));
    }),
    gauge(
        "varve_group_journal_used_bytes",
        "in the journal and not durable at the receiver (agent)",
        "above 0 for hours",
        |s, o| {
            number(s, o, |group| Some(group.journal.as_ref()?.used_bytes as f64));
        },
    ),
    gauge("varve_group_journal_total_bytes", "most that the journal may take (agent)", "", |s, o| {
        number(s, o, |group| Some(group.journal.as_ref()?.total_bytes as f64));
    }),
    gauge(
        "varve_group_full_in_seconds",
        "until ring and journal are full at the present rate; missing: never (agent)",
        "below 600",
        |s, o| {
            number(s, o, |group| group.watch.as_ref()?.full_in_seconds);
        },
    ),
    gauge(
        "varve_group_oldest_point_timestamp_seconds",
        "time of the oldest point (receiver)",
        "younger than retention says",
        |s, o| {
            number(s, o, |group| timestamp(group.window.from.as_deref()));
        },
    ),
    gauge("varve_group_newest_point_timestamp_seconds", "time of the newest point", "older than your RPO", |s, o| {
        number(s, o, |group| timestamp(group.window.to.as_deref()));
    }),
    gauge("varve_group_resync_done_bytes", "of a running sync, else missing", "stands still", |s, o| {
        number(s, o, |group| Some(group.resync.as_ref()?.done_bytes as f64));
    }),
    gauge("varve_group_resync_total_bytes", "of a running sync, else missing", "", |s, o| {
        number(s, o, |group| Some(group.resync.as_ref()?.total_bytes as f64));
    }),
    gauge("varve_group_volume_bytes", "size of all volumes of the group", "", |s, o| {
        number(s, o, |group| Some(group.volumes.iter().map(|volume| volume.bytes).sum::<u64>() as f64));
    }),
    gauge("varve_group_epoch", "counts the changes of who may write", "differs between the two sides", |s, o| {
        number(s, o, |group| Some(group.epoch as f64));
    }),
    gauge("varve_group_history_bytes", "history on disk (receiver)", "", |s, o| {
        number(s, o, |group| Some(group.history.as_ref()?.bytes as f64));
    }),
    gauge("varve_group_history_layers", "files of the history (receiver)", "", |s, o| {
        number(s, o, |group| Some(group.history.as_ref()?.layers as f64));
    }),
    gauge("varve_group_history_damaged", "stretches of points that damage took away (receiver)", "above 0", |s, o| {
        number(s, o, |group| Some(group.history.as_ref()?.damaged as f64));
    }),
    gauge("varve_group_views", "open views (receiver)", "", |s, o| {
        number(s, o, |group| Some(group.history.as_ref()?.views as f64));
    }),
    gauge("varve_group_free_bytes", "free where the history is (receiver)", "below 2 GiB", |s, o| {
        number(s, o, |group| Some(group.watch.as_ref()?.free_bytes? as f64));
    }),
    gauge(
        "varve_group_verified_timestamp_seconds",
        "when a verify last proved volume and replica equal; missing: never (receiver)",
        "a month ago",
        |s, o| {
            number(s, o, |group| timestamp(group.watch.as_ref()?.verified.as_deref()));
        },
    ),
    gauge("varve_group_drill_failed", "1: the last drill of the takeover plan failed (receiver)", "1", |s, o| {
        number(s, o, |group| Some(f64::from(!group.drill.as_ref()?.good)));
    }),
    gauge(
        "varve_group_drill_verified_timestamp_seconds",
        "the newest point that a drill brought up with its checks good; missing: never (receiver)",
        "older than your drills' interval",
        |s, o| {
            number(s, o, |group| timestamp(Some(&group.drill.as_ref()?.verified.as_ref()?.point)));
        },
    ),
    gauge(
        "varve_group_drill_rto_seconds",
        "how long that took: the measured RTO; missing: never (receiver)",
        "above your RTO",
        |s, o| {
            number(s, o, |group| Some(group.drill.as_ref()?.verified.as_ref()?.rto_seconds));
        },
    ),
    counter(
        "varve_group_events_total",
        "the counters of docs/json.md since the daemon started; `counter` is a label",
        "`gaps`, `dropped_records`, `failed_writes`, `refused_sessions`, `log_damages` rise",
        |status, out| {
            for group in &status.groups {
                let value =
                    |(name, value): (&String, &u64)| of_group(group, *value as f64, &[("counter", name.clone())]);
                out.extend(group.counters.iter().map(value));
            }
        },
    ),
];

impl Metric {
    /// Its numbers.
    pub fn values(&self, status: &StatusReply) -> Vec<Value> {
        let mut values = Vec::new();
        (self.values)(status, &mut values);
        values
    }
}

/// The role decides which daemon speaks.
fn daemon_of(group: &GroupStatus) -> &'static str {
    match group.role {
        Role::Source | Role::Fenced => "agent",
        Role::Replica | Role::Promoted => "receiver",
    }
}

fn of_daemon(daemon: &DaemonStatus, value: f64, more: &[(&'static str, String)]) -> Value {
    let labels = [("daemon", daemon.daemon.clone())].into_iter().chain(more.iter().cloned());
    Value { labels: labels.collect(), value }
}

fn of_group(group: &GroupStatus, value: f64, more: &[(&'static str, String)]) -> Value {
    let own = [("daemon", daemon_of(group).to_owned()), ("group", group.name.clone())];
    Value { labels: own.into_iter().chain(more.iter().cloned()).collect(), value }
}

fn number(status: &StatusReply, out: &mut Values, of: fn(&GroupStatus) -> Option<f64>) {
    out.extend(status.groups.iter().filter_map(|group| Some(of_group(group, of(group)?, &[]))));
}

fn states<T: PartialEq + serde::Serialize>(
    status: &StatusReply,
    out: &mut Values,
    label: &'static str,
    all: &[T],
    of: fn(&GroupStatus) -> T,
) {
    for group in &status.groups {
        for state in all {
            // The word of the status.
            let word = serde_json::to_value(state).ok().and_then(|word| word.as_str().map(str::to_owned));
            let labels = [(label, word.unwrap_or_default())];
            out.push(of_group(group, f64::from(of(group) == *state), &labels));
        }
    }
}

fn timestamp(text: Option<&str>) -> Option<f64> {
    let time: jiff::Timestamp = text?.parse().ok()?;
    Some(time.as_millisecond() as f64 / 1000.0)
}

/// Everything, as Prometheus reads it. `silent`: daemons that should have answered and did not.
pub fn exposition(status: &StatusReply, silent: &[&str]) -> String {
    let mut text = String::new();
    for metric in TABLE {
        let mut values = metric.values(status);
        if metric.name == "varve_daemon_up" {
            values.extend(
                silent.iter().map(|daemon| Value { labels: vec![("daemon", (*daemon).to_owned())], value: 0.0 }),
            );
        }
        if values.is_empty() {
            continue;
        }
        // Writing to a String does not fail.
        let _ = writeln!(text, "# HELP {} {}\n# TYPE {} {}", metric.name, metric.help, metric.name, metric.kind);
        for Value { labels, value } in values {
            let labels: Vec<String> =
                labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape(value))).collect();
            let _ = writeln!(text, "{}{{{}}} {value}", metric.name, labels.join(","));
        }
    }
    text
}

fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn names_are_unique_and_documented() {
        let text = include_str!("../../docs/monitor.md");
        let names: HashSet<&str> = TABLE.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), TABLE.len());
        for metric in TABLE {
            let row = format!("| `{}` | {} | {} | {} |", metric.name, metric.kind, metric.help, metric.trouble);
            assert!(text.contains(&row), "docs/monitor.md has no row\n{row}");
            assert!((metric.kind == "counter") == metric.name.ends_with("_total"), "{}", metric.name);
        }
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let daemon = DaemonStatus {
            daemon: "agent".into(),
            version: "0.1.0".into(),
            address: None,
            name: Some("a\"b".into()),
            rss_bytes: 4096,
            hosts_connected: None,
        };
        let status = StatusReply { groups: Vec::new(), daemons: vec![daemon] };
        assert_eq!(
            exposition(&status, &["receiver"]),
            "# HELP varve_daemon_up the daemon answered; its version is a label
# TYPE varve_daemon_up gauge
varve_daemon_up{daemon=\"agent\",version=\"0.1.0\"} 1
varve_daemon_up{daemon=\"receiver\"} 0
# HELP varve_daemon_memory_bytes resident memory of its own
# TYPE varve_daemon_memory_bytes gauge
varve_daemon_memory_bytes{daemon=\"agent\"} 4096
"
        );
        assert_eq!(escape("a\\\"\n"), "a\\\\\\\"\\n");
    }
}
