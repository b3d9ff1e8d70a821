//! The bodies of control frames. Small, bounded, encoded by bincode behind the two functions at the end of this file
//! and nowhere else; never for bytes on disk, never for data.

use super::{FrameKind, WireError};
use crate::limits::CONTROL_BYTES_MAX;
use crate::state::{Data, GapReason};
use serde::{Deserialize, Serialize};

/// Names one ring: made at random with it. Positions of different incarnations are not comparable.
pub type Incarnation = [u8; 16];
/// 128 bits of BLAKE3 of a digest block; [`ZERO_DIGEST`] stands for a block of zeroes.
pub type Digest = [u8; 16];
/// The digest of a block that holds only zeroes, of whatever length.
pub const ZERO_DIGEST: Digest = [0; 16];

/// The agent's first frame on a group's stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The group's name.
    pub group: String,
    /// Fencing token: the epoch under which the agent believes that it writes.
    pub epoch: u64,
    /// The ring that the agent holds now.
    pub incarnation: Incarnation,
    /// Oldest position that it can still send.
    pub oldest: u64,
    /// Newest position at this moment.
    pub newest: u64,
    /// In the order of their numbers.
    pub volumes: Vec<VolumeHello>,
    /// Version of the agent, for people.
    pub software: String,
}

/// A volume as the agent knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeHello {
    /// Path at the source, for people and for the replica's default name.
    pub path: String,
    /// Size.
    pub bytes: u64,
    /// Where the operator wants the replica: absolute path at the receiver; `None`: the receiver's default.
    pub replica: Option<String>,
}

/// The receiver agrees to a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Where the agent must go on in its incarnation; `None`: this incarnation is not known here, begin with
    /// [`MarkKind::Begin`](crate::format::MarkKind).
    pub resume: Option<u64>,
    /// The group's epoch here.
    pub epoch: u64,
    /// Whether the replicas equal a point of the timeline (no open gap).
    pub consistent: bool,
    /// Per volume: the replica has never been written (all zeroes), so no digest need be compared.
    pub fresh: Vec<bool>,
    /// Per volume: where the replica is.
    pub replicas: Vec<String>,
    /// Version of the receiver, for people.
    pub software: String,
}

/// Why a session was refused. The words go to the operator of the other side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// A stable word for scripts and tests.
    pub reason: RefusedReason,
    /// What and why.
    pub text: String,
    /// What to do next.
    pub next: String,
    /// Whether trying again later may help without anybody doing anything.
    pub retry: bool,
}

/// See [`Refused::reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusedReason {
    /// No protocol version in common.
    Version,
    /// The group belongs to another host.
    Owner,
    /// The source's epoch is older than the group's.
    Epoch,
    /// The volumes are not those that the replicas belong to.
    Volumes,
    /// A replica cannot be used (too small, in use, not there).
    Replica,
    /// The receiver's disk is full.
    DiskFull,
    /// Positions are not contiguous.
    Hole,
    /// A frame that is damaged, too large or out of order.
    Protocol,
    /// The receiver's storage failed.
    Storage,
    /// Another session of the same group is open.
    Busy,
    /// The receiver is stopping.
    Stopping,
    /// A limit on groups or volumes.
    Limit,
    /// The replicas were rolled back and replication was not let go on.
    Held,
    /// The group runs at the receiver and is to come home: the agent opens a stream for that.
    Failback,
}

/// Everything before `durable` is synced on the receiver's disk, everything before `applied` is in the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// May be released by the agent.
    pub durable: u64,
    /// For people.
    pub applied: u64,
}

/// Digests of one region as the volume holds it at the frame's position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// The sender's number for this region's work.
    pub id: u64,
    /// The volume's number.
    pub volume: u16,
    /// First byte of the region.
    pub offset: u64,
    /// Bytes of the region (the last one of a volume may be short).
    pub length: u32,
    /// One per digest block of 64 KiB, the last possibly of a shorter block.
    pub digests: Vec<Digest>,
}

/// Answer to a [`Probe`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeReply {
    /// The probe's number.
    pub id: u64,
    /// Bit *i*: digest block *i* differs.
    pub differs: u16,
}

/// Answer to an image frame, once it is durable in the replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDone {
    /// The image's number.
    pub id: u64,
}

/// What the agent says of itself, so that both ends can show the same status.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Position of the newest captured record.
    pub captured: u64,
    /// The data axis as the source sees it.
    pub data: Data,
    /// RPO at this moment; `None`: not known (before the first sync, or since when a gap is open is not known).
    pub rpo_ms: Option<u64>,
    /// RPO beyond which the source calls itself lagging: the receiver, which sees a slow line sooner, uses the same limit.
    pub lagging_after_ms: u64,
    /// Why there is a gap, if there is one.
    pub reason: Option<GapReason>,
    /// Done and total bytes of a running sync.
    pub resync: Option<(u64, u64)>,
    /// The newest verify, running or finished.
    pub verify: Option<Verify>,
}

/// Progress and outcome of a verify.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verify {
    /// Number of the request (see [`Ask::Verify`]), chosen by whoever asked.
    pub id: u64,
    /// Bytes compared.
    pub done_bytes: u64,
    /// Bytes to compare.
    pub total_bytes: u64,
    /// Bytes (in digest blocks of 64 KiB) that differ although nobody wrote them meanwhile.
    pub differing_bytes: u64,
    /// Bytes that were written so often that no comparison came to an end; not a difference, not a proof.
    pub unverified_bytes: u64,
    /// The first differing extents: volume, offset, length; at most [`VERIFY_EXTENTS_MAX`].
    pub extents: Vec<(u16, u64, u64)>,
    /// Positions between which the comparisons were made.
    pub from: u64,
    /// See `from`.
    pub to: u64,
    /// What differs is sent.
    pub repair: bool,
    /// Whether it came to its end; if so `error` says whether it was cut short.
    pub finished: bool,
    /// Why it did not come to a result.
    pub error: Option<String>,
}

/// See [`Verify::extents`].
pub const VERIFY_EXTENTS_MAX: usize = 64;

/// A wish of the receiver's operator that only the agent can fulfil.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Compare volume and replica; with `repair`, send what differs.
    Verify {
        /// Comes back in no frame: progress and outcome stand in the group's status.
        id: u64,
        /// Send what differs.
        repair: bool,
    },
    /// The outcome of [`Ask::Verify`] is not wanted any more.
    CancelVerify {
        /// The number of the verify.
        id: u64,
    },
    /// The group is about to be taken over: send what there is. Answer: [`AskReply::Drained`].
    Drain {
        /// Comes back in the answer.
        id: u64,
    },
    /// The group is about to be taken over as planned: run the operator's steps, and let nobody write the volumes until
    /// [`Ask::Resume`] or the next welcome. Answer: [`AskReply::Quiesced`] or [`AskReply::NotQuiesced`].
    Quiesce {
        /// Comes back in the answer.
        id: u64,
        /// How long that may take, milliseconds.
        limit_ms: u64,
    },
    /// It is not taken over: the volumes may be written again. No answer.
    Resume {
        /// Of the [`Ask::Quiesce`].
        id: u64,
    },
}

/// Answer to [`Ask::Drain`] and [`Ask::Quiesce`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AskReply {
    /// Everything that was captured before the ask stands before this position.
    Drained {
        /// Of the ask.
        id: u64,
        /// See above.
        position: u64,
    },
    /// Nobody can write the volumes; everything that was ever written to them stands before this position.
    Quiesced {
        /// Of the ask.
        id: u64,
        /// The barrier.
        position: u64,
        /// The volumes are read-only (else only claimed, and nobody had them open).
        read_only: bool,
        /// How long the operator's steps took, milliseconds; `None`: there are none.
        hook_ms: Option<u64>,
    },
    /// That could not be done; everything is as before.
    NotQuiesced {
        /// Of the ask.
        id: u64,
        /// What is in the way.
        text: String,
        /// What to do about it.
        next: String,
    },
}

impl AskReply {
    /// Of the ask.
    pub fn id(&self) -> u64 {
        match self {
            Self::Drained { id, .. } | Self::Quiesced { id, .. } | Self::NotQuiesced { id, .. } => *id,
        }
    }
}

/// The agent's first frame on the stream of a group that comes home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailbackHello {
    /// The group's name.
    pub group: String,
    /// In the order of their numbers.
    pub volumes: Vec<VolumeHello>,
    /// Made at random when the volumes were claimed; 0: they are not, or not any more.
    pub claim: u64,
    /// Of [`FailbackTell::Arm`], if that was done and nothing was heard since; zeroes: not.
    pub token: [u8; 16],
    /// Version of the agent, for people.
    pub software: String,
}

/// The receiver agrees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FailbackWelcome {
    /// What the stream is for.
    pub purpose: FailbackPurpose,
    /// The group's epoch now.
    pub epoch: u64,
    /// Version of the receiver, for people.
    pub software: String,
}

/// See [`FailbackWelcome::purpose`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailbackPurpose {
    /// Only to find out what differs: nothing is claimed, nothing is written.
    Look,
    /// What the volumes hold is overwritten by what the receiver has.
    Write,
    /// It is home already: the agent's token is the one under which it was given back.
    Home,
}

/// What the agent says while a group comes home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailbackSay {
    /// The volumes can be read (and, unless it only looks, nobody else writes them): compare.
    Ready {
        /// See [`FailbackHello::claim`].
        claim: u64,
    },
    /// They cannot.
    NotReady {
        /// What is in the way.
        text: String,
        /// What to do about it.
        next: String,
    },
    /// What is written from here on is captured; nobody but us writes.
    Armed {
        /// The new ring.
        incarnation: Incarnation,
        /// Nothing was written before it but what came from the receiver.
        position: u64,
    },
    /// It is known durably that the group is home under the new epoch.
    Home,
}

/// What the receiver wants while a group comes home.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailbackTell {
    /// Regions are going to be compared.
    Pass {
        /// From 1.
        number: u32,
        /// Bytes of the regions.
        total_bytes: u64,
    },
    /// Both are equal up to so long ago.
    Following {
        /// The longest that a write waits for being sent.
        lag_ms: u64,
    },
    /// Begin to capture, remember the token durably, and let nobody write yet.
    Arm {
        /// The epoch under which the group will be home.
        epoch: u64,
        /// Proves afterwards which attempt it was.
        token: [u8; 16],
    },
    /// It is home: the receiver has given up its right to write, durably.
    Home,
    /// Send what the volume holds there, in an Image frame of this id: what was written here and never sent is kept before it
    /// is overwritten.
    Fetch {
        /// Comes back as the image's.
        id: u64,
        /// The volume's number.
        volume: u16,
        /// First byte, a multiple of 64 KiB.
        offset: u64,
        /// At most a region.
        length: u32,
    },
}

/// Encodes a control body.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    // Cannot fail: every message is made of integers, strings and vectors, and writes into memory.
    let bytes = bincode::serde::encode_to_vec(message, bincode::config::standard()).unwrap_or_default();
    debug_assert!(!bytes.is_empty() && bytes.len() <= CONTROL_BYTES_MAX);
    bytes
}

/// Decodes a control body of `kind`: bounded, nothing may be left over.
pub fn decode<T: for<'de> Deserialize<'de>>(kind: FrameKind, plain: &[u8]) -> Result<T, WireError> {
    let wrong = |why: String| WireError::Decode { kind, why };
    let config = bincode::config::standard().with_limit::<CONTROL_BYTES_MAX>();
    let (message, used) = bincode::serde::decode_from_slice(plain, config).map_err(|e| wrong(e.to_string()))?;
    if used != plain.len() {
        return Err(wrong(format!("{} bytes left over", plain.len() - used)));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hello_bytes_are_frozen() {
        let hello = Hello {
            group: "db".into(),
            epoch: 1,
            incarnation: [7; 16],
            oldest: 8,
            newest: 300,
            volumes: vec![VolumeHello { path: "/dev/vdb".into(), bytes: 1 << 20, replica: None }],
            software: "0.1.0".into(),
        };
        let golden = [
            2, b'd', b'b', 1, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 251, 44, 1, 1, 8, b'/', b'd', b'e',
            b'v', b'/', b'v', b'd', b'b', 252, 0, 0, 16, 0, 0, 5, b'0', b'.', b'1', b'.', b'0',
        ];
        assert_eq!(encode(&hello), golden);
        assert_eq!(decode::<Hello>(FrameKind::Hello, &golden), Ok(hello));
    }

    #[test]
    fn asks_and_their_answers_are_frozen() {
        let asks: [(Ask, &[u8]); 5] = [
            (Ask::Verify { id: 3, repair: true }, &[0, 3, 1]),
            (Ask::CancelVerify { id: 3 }, &[1, 3]),
            (Ask::Drain { id: 4 }, &[2, 4]),
            (Ask::Quiesce { id: 5, limit_ms: 60_000 }, &[3, 5, 251, 96, 234]),
            (Ask::Resume { id: 5 }, &[4, 5]),
        ];
        for (ask, golden) in asks {
            assert_eq!(encode(&ask), golden, "{ask:?}");
            assert_eq!(decode::<Ask>(FrameKind::Ask, golden), Ok(ask));
        }
        let replies: [(AskReply, &[u8]); 3] = [
            (AskReply::Drained { id: 4, position: 80 }, &[0, 4, 80]),
            (AskReply::Quiesced { id: 5, position: 88, read_only: true, hook_ms: Some(7) }, &[1, 5, 88, 1, 1, 7]),
            (AskReply::NotQuiesced { id: 5, text: "no".into(), next: "x".into() }, &[2, 5, 2, b'n', b'o', 1, b'x']),
        ];
        for (reply, golden) in replies {
            assert_eq!(encode(&reply), golden, "{reply:?}");
            assert_eq!(decode::<AskReply>(FrameKind::AskReply, golden), Ok(reply));
        }
    }

    #[test]
    fn leftovers_are_refused() {
        let mut bytes = encode(&ImageDone { id: 3 });
        bytes.push(0);
        assert!(decode::<ImageDone>(FrameKind::ImageDone, &bytes).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Hello>(FrameKind::Hello, &bytes);
            let _ = decode::<Welcome>(FrameKind::Welcome, &bytes);
            let _ = decode::<Refused>(FrameKind::Refused, &bytes);
            let _ = decode::<Probe>(FrameKind::Probe, &bytes);
            let _ = decode::<Report>(FrameKind::Report, &bytes);
            let _ = decode::<Ask>(FrameKind::Ask, &bytes);
            let _ = decode::<AskReply>(FrameKind::AskReply, &bytes);
            let _ = decode::<FailbackHello>(FrameKind::FailbackHello, &bytes);
            let _ = decode::<FailbackWelcome>(FrameKind::FailbackWelcome, &bytes);
            let _ = decode::<FailbackSay>(FrameKind::FailbackSay, &bytes);
            let _ = decode::<FailbackTell>(FrameKind::FailbackTell, &bytes);
        }
    }
}
