//! The three axes of a group's state: who it is (role), whether it talks (link), what the replica is worth (data).
//! Never one merged word. Pure: the daemons feed events in, tests feed every pair.

use serde::{Deserialize, Serialize};

/// Who a side is for a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// The production host: it writes.
    Source,
    /// The recovery host: it keeps the replica.
    Replica,
    /// The recovery host after a failover: it writes.
    Promoted,
    /// A former source that may not write into the history any more.
    Fenced,
}

/// Whether the two sides talk.
///
/// ```text
///             connect                welcome
/// disconnected ──────► handshaking ──────────► streaming
///      ▲  ▲                │  │                  │  │
///      │  └── lost ────────┘  │ refused          │  │ refused
///      │                      ▼                  │  ▼
///      │                   refused ◄─────────────┼──┘
///      └───────── retry ──────┘        lost      │
///      └─────────────────────────────────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// No connection.
    Disconnected,
    /// Connected, not agreed yet.
    Handshaking,
    /// Data may flow.
    Streaming,
    /// The peer refused, and says why; tried again later.
    Refused,
}

impl Link {
    /// Whether one step may lead from `self` to `next`.
    pub fn may_become(self, next: Link) -> bool {
        use Link::*;
        matches!(
            (self, next),
            (Disconnected, Handshaking)
                | (Handshaking, Streaming | Refused | Disconnected)
                | (Streaming, Disconnected | Refused)
                | (Refused, Disconnected | Handshaking)
        )
    }
}

/// Why there is a stretch of the timeline in which no point can be recovered. The numbers are kept on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum GapReason {
    /// The replica has not been equal to the volume yet.
    InitialSync = 1,
    /// The agent has a new ring: what was written between the old one's end and now is not known.
    NewRing = 2,
    /// The ring was full: writes went past the stream, their regions are known.
    RingFull = 3,
    /// A page of a write could not be read by the capture program; its region is known.
    UnreadablePage = 4,
    /// A write failed at the source: what the volume holds there is read again.
    FailedWrite = 5,
    /// A write that was under way before capture began completed late; its region is known.
    LateWrite = 6,
    /// A write crossed the volume's boundary; its region is known.
    StraddlingWrite = 7,
    /// A passthrough command may have written past the block layer.
    Passthrough = 8,
    /// The kernel skipped the capture program: which writes is not known.
    MissedEvents = 9,
    /// Verification found a difference and repairs it.
    Repair = 10,
    /// A replica was exchanged or changed behind the receiver's back.
    ReplicaChanged = 11,
    /// The volume's size changed. If it grew, what is new is sent, and the gap closes.
    VolumeChanged = 12,
    /// The replicas are being rolled back.
    Rollback = 13,
    /// Part of the agent's journal was lost: what it held is not known.
    JournalLost = 14,
    /// The group came home from a takeover. Begun and ended at once: both sides were compared and equal.
    Failback = 15,
}

impl GapReason {
    /// All reasons, for tables and tests.
    pub const ALL: [GapReason; 15] = [
        Self::InitialSync,
        Self::NewRing,
        Self::RingFull,
        Self::UnreadablePage,
        Self::FailedWrite,
        Self::LateWrite,
        Self::StraddlingWrite,
        Self::Passthrough,
        Self::MissedEvents,
        Self::Repair,
        Self::ReplicaChanged,
        Self::VolumeChanged,
        Self::Rollback,
        Self::JournalLost,
        Self::Failback,
    ];

    /// The reason with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| *reason as u8 == number)
    }

    /// One line for an operator, while the gap is open.
    pub fn explain(self) -> &'static str {
        match self {
            Self::InitialSync => "the first sync has not finished yet",
            Self::NewRing => "the agent began a new capture, and what may have been written before it is compared",
            Self::RingFull => "the ring was full, the regions written meanwhile are sent again",
            Self::UnreadablePage => "a page of a write could not be read, its region is sent again",
            Self::FailedWrite => "a write failed at the source, its region is read again",
            Self::LateWrite => "a write from before capture began completed late, its region is read again",
            Self::StraddlingWrite => "a write crossed the volume's boundary, its region is read again",
            Self::Passthrough => "a passthrough command may have written, so the whole volume is compared",
            Self::MissedEvents => "the kernel skipped the capture program, so the whole volume is compared",
            Self::Repair => "verification found a difference, which is being repaired",
            Self::ReplicaChanged => "the replica was changed or exchanged, so the whole volume is compared",
            Self::VolumeChanged => "the volume's size changed",
            Self::JournalLost => "part of the agent's journal was lost, so the whole volume is compared",
            Self::Failback => "the group came home from a takeover",
            Self::Rollback => {
                "the replicas are being rolled back or taken over; if that was broken off, run the same command again"
            }
        }
    }

    /// The same of a gap that is closed: nothing is under way any more, nothing is to be done.
    pub fn explain_closed(self) -> &'static str {
        match self {
            Self::InitialSync => "the first sync had not finished",
            Self::NewRing => "the agent had begun a new capture",
            Self::RingFull => "the ring was full, the regions written meanwhile were sent again",
            Self::UnreadablePage => "a page of a write could not be read, its region was sent again",
            Self::FailedWrite => "a write failed at the source, its region was read again",
            Self::LateWrite => "a write from before capture began completed late, its region was read again",
            Self::StraddlingWrite => "a write crossed the volume's boundary, its region was read again",
            Self::Passthrough => "a passthrough command may have written, the whole volume was compared",
            Self::MissedEvents => "the kernel had skipped the capture program, the whole volume was compared",
            Self::Repair => "verification had found a difference, which was repaired",
            Self::ReplicaChanged => "the replica had been changed or exchanged, the whole volume was compared",
            Self::VolumeChanged => "the volume's size had changed",
            Self::JournalLost => "part of the agent's journal was lost, the whole volume was compared",
            Self::Failback => "the group came home from a takeover",
            Self::Rollback => "the replicas were rolled back or taken over",
        }
    }
}

/// What the replica is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Data {
    /// The first sync runs or waits to run; nothing can be recovered yet.
    InitialSync,
    /// The replica equals the volume at the durable position, and that is close to the newest write.
    Protected,
    /// As [`Data::Protected`], but the durable position is further behind than the group's limit.
    Lagging,
    /// Points from the gap's begin on cannot be recovered; the last good point before can.
    Gap,
    /// As [`Data::Gap`], and what differs is being sent.
    Resync,
    /// As [`Data::Protected`], and volume and replica are being compared.
    Verifying,
}

impl Data {
    /// Whether the newest durable point may be handed out as consistent.
    pub fn is_consistent(self) -> bool {
        matches!(self, Self::Protected | Self::Lagging | Self::Verifying)
    }
}

/// What the data axis is derived from. There is no transition to get wrong: the word follows from the facts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DataFacts {
    /// The group was consistent at least once since it was made.
    pub ever_consistent: bool,
    /// An open gap.
    pub gap: Option<GapReason>,
    /// Regions are being compared and sent.
    pub sync_running: bool,
    /// Captured bytes that are not durable at the receiver are older than the limit, or there is no link.
    pub behind: bool,
    /// A verify runs.
    pub verifying: bool,
}

impl DataFacts {
    /// The word for these facts.
    pub fn word(&self) -> Data {
        match (self.gap, self.ever_consistent) {
            (Some(_), false) | (None, false) => Data::InitialSync,
            (Some(_), true) if self.sync_running => Data::Resync,
            (Some(_), true) => Data::Gap,
            (None, true) if self.behind => Data::Lagging,
            (None, true) if self.verifying => Data::Verifying,
            (None, true) => Data::Protected,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_gap_reason_is_documented() {
        let page = include_str!("../../docs/json.md");
        let row = page.lines().find(|line| line.starts_with("| `groups[].gap_reason` |")).expect("a row");
        for reason in GapReason::ALL {
            let word = serde_json::to_string(&reason).expect("a word");
            assert!(row.contains(&word.replace('"', "`")), "{word} is not in docs/json.md");
        }
    }

    #[test]
    fn link_every_pair() {
        use Link::*;
        let all = [Disconnected, Handshaking, Streaming, Refused];
        let allowed: Vec<(Link, Link)> = all
            .into_iter()
            .flat_map(|a| all.into_iter().map(move |b| (a, b)))
            .filter(|(a, b)| a.may_become(*b))
            .collect();
        assert_eq!(
            allowed,
            [
                (Disconnected, Handshaking),
                (Handshaking, Disconnected),
                (Handshaking, Streaming),
                (Handshaking, Refused),
                (Streaming, Disconnected),
                (Streaming, Refused),
                (Refused, Disconnected),
                (Refused, Handshaking),
            ]
        );
    }

    /// Over all combinations of facts: nothing with an open gap, and nothing never synced, is ever called consistent.
    #[test]
    fn no_gap_is_called_protected() {
        let gaps = [None, Some(GapReason::RingFull)];
        for bits in 0..16u8 {
            for gap in gaps {
                let facts = DataFacts {
                    ever_consistent: bits & 1 != 0,
                    gap,
                    sync_running: bits & 2 != 0,
                    behind: bits & 4 != 0,
                    verifying: bits & 8 != 0,
                };
                let consistent = facts.word().is_consistent();
                assert_eq!(consistent, facts.ever_consistent && gap.is_none(), "{facts:?}");
                assert_eq!(facts.word() == Data::InitialSync, !facts.ever_consistent, "{facts:?}");
            }
        }
    }

    #[test]
    fn reason_numbers_are_stable() {
        for (index, reason) in GapReason::ALL.into_iter().enumerate() {
            assert_eq!(reason as u8, index as u8 + 1);
            assert_eq!(GapReason::from_number(reason as u8), Some(reason));
        }
        assert_eq!(GapReason::from_number(0), None);
    }

    #[test]
    fn what_is_past_is_told_as_past() {
        for reason in GapReason::ALL {
            let text = reason.explain_closed();
            let present = [" is ", " are ", " has ", "yet", "run the same"];
            assert!(!present.iter().any(|word| text.contains(word)), "{reason:?}: {text}");
        }
    }
}
