//! What a hello must be: first by itself, then against the group that it names. Pure.

use crate::failure::{protocol, refuse};
use crate::group::meta::GroupMeta;
use varve_common::limits::{PATH_BYTES_MAX, VOLUME_BYTES_MAX, VOLUMES_PER_GROUP_MAX};
use varve_common::problem::check_name;
use varve_common::wire::messages::{Hello, Refused, RefusedReason};

/// A group's epoch rises by one with each takeover and each return. A source that is further ahead is wrong or evil, and the next
/// takeover needs a number after it.
const EPOCHS_AHEAD_MAX: u64 = 1 << 16;
/// The same for a group that nobody has heard of: the receiver may be new.
const FIRST_EPOCH_MAX: u64 = 1 << 32;

/// Checks names, numbers and lengths before anything is looked up or made.
pub fn check(hello: &Hello) -> Result<(), Refused> {
    if let Err(problem) = check_name("group", &hello.group) {
        return Err(refuse(RefusedReason::Limit, problem.to_string(), problem.next));
    }
    let count = hello.volumes.len();
    if !(1..=VOLUMES_PER_GROUP_MAX).contains(&count) {
        let text = format!("a group has 1 to {VOLUMES_PER_GROUP_MAX} volumes, this one {count}");
        return Err(refuse(RefusedReason::Limit, text, "protect the volumes in several groups"));
    }
    for volume in &hello.volumes {
        if !(1..=VOLUME_BYTES_MAX).contains(&volume.bytes) {
            let text = format!("{} has {} bytes; 1 to {VOLUME_BYTES_MAX} are possible", volume.path, volume.bytes);
            return Err(refuse(RefusedReason::Limit, text, "protect another volume"));
        }
        let paths = [Some(&volume.path), volume.replica.as_ref()];
        if paths.into_iter().flatten().any(|path| path.is_empty() || path.len() > PATH_BYTES_MAX) {
            return Err(refuse(RefusedReason::Limit, "a path is empty or too long", "give another path"));
        }
    }
    if hello.incarnation == [0; 16] || hello.oldest > hello.newest {
        return Err(protocol("the hello names no ring or impossible positions"));
    }
    Ok(())
}

/// Checks what a new group begins with.
pub fn check_first(hello: &Hello) -> Result<(), Refused> {
    match hello.epoch <= FIRST_EPOCH_MAX {
        true => Ok(()),
        false => Err(too_far(hello, "at most", FIRST_EPOCH_MAX)),
    }
}

fn too_far(hello: &Hello, known: &str, epoch: u64) -> Refused {
    let (name, theirs) = (&hello.group, hello.epoch);
    let text = format!("the source writes '{name}' under epoch {theirs}, which cannot be: here it is {known} {epoch}");
    let next =
        "find out what changed the agent's files on that host; 'varve unprotect' and 'varve protect' there begin anew";
    refuse(RefusedReason::Epoch, text, next)
}

/// Checks epoch and volumes against the group. `receiver`: our name, for the operator of the other side.
pub fn check_against(meta: &GroupMeta, hello: &Hello, receiver: &str) -> Result<(), Refused> {
    if let Some(branch) = &meta.branch {
        let text =
            format!("the group '{}' is a branch of '{}', which was kept: nobody writes to it", meta.name, branch.of);
        return Err(refuse(RefusedReason::Owner, text, "protect under another name"));
    }
    let name = &meta.name;
    if let Some(takeover) = &meta.takeover {
        if let Some(text) = unsure(meta, hello) {
            let next = format!(
                "find out who has the newest data. If this host has: 'varve unprotect {name}' here, then protect the volumes under \
                 another name. If '{receiver}' has: there 'varve failback {name} --keep-branch NAME'"
            );
            return Err(refuse(RefusedReason::Epoch, text, next));
        }
        let text = format!(
            "the group '{name}' was taken over at {}: it runs on the recovery host '{receiver}' under epoch {}",
            takeover.since, meta.epoch
        );
        let next = match takeover.committed {
            true => format!(
                "leave this host's volumes as they are; when it shall run here again, on '{receiver}': 'varve failback {name}' \
                 (--keep-branch NAME keeps what was written here since)"
            ),
            false => format!(
                "leave this host's volumes as they are; on '{receiver}': 'varve failover abort {name}' brings it back here, \
                 'varve failover commit {name}' keeps it there"
            ),
        };
        return Err(refuse(RefusedReason::Epoch, text, next));
    }
    if hello.epoch > meta.epoch.saturating_add(EPOCHS_AHEAD_MAX) {
        return Err(too_far(hello, "at", meta.epoch));
    }
    if hello.epoch < meta.source_epoch_min {
        let text = format!(
            "the source writes under epoch {}, the group '{}' is at {}",
            hello.epoch, meta.name, meta.source_epoch_min
        );
        let next = format!(
            "this host has an older state (an old image of it, or another host had the group since). Its volumes stay as they \
             are. On '{receiver}': 'varve failover {name}', then 'varve failback {name} --keep-branch NAME' brings the newest \
             state here; or 'varve unprotect {name}' here"
        );
        return Err(refuse(RefusedReason::Epoch, text, next));
    }
    let refuse_volumes = |text: String| {
        let next = "unprotect the group and protect it under another name, which keeps its history here; or 'varve forget' it here";
        Err(refuse(RefusedReason::Volumes, text, next))
    };
    if hello.volumes.len() != meta.volumes.len() {
        let (have, got) = (meta.volumes.len(), hello.volumes.len());
        return refuse_volumes(format!("the group '{}' has {have} volumes here, {got} at the source", meta.name));
    }
    for (number, (ours, theirs)) in meta.volumes.iter().zip(&hello.volumes).enumerate() {
        if theirs.bytes < ours.bytes {
            let (path, have, got) = (&theirs.path, ours.bytes, theirs.bytes);
            return refuse_volumes(format!(
                "volume {number} ({path}) shrank from {have} to {got} bytes; only growth is followed"
            ));
        }
        if let Some(wish) = theirs.replica.as_ref().filter(|wish| ours.replica.as_os_str() != wish.as_str()) {
            let have = ours.replica.display();
            return refuse_volumes(format!("the replica of volume {number} is {have}, the source asks for {wish}"));
        }
    }
    Ok(())
}

/// Whether a volume is larger than it is here.
pub fn grows(meta: &GroupMeta, hello: &Hello) -> bool {
    meta.volumes.iter().zip(&hello.volumes).any(|(ours, theirs)| ours.bytes < theirs.bytes)
}

/// The source has a younger epoch than a group that runs here: one of us has an old state.
pub fn unsure(meta: &GroupMeta, hello: &Hello) -> Option<String> {
    let contradicts = meta.takeover.is_some() && hello.epoch > meta.epoch;
    contradicts.then(|| {
        format!(
            "who is right is not known: the source writes '{}' under epoch {}, and as far as the recovery host knows it runs there \
             under epoch {}; one of them has an old state",
            meta.name, hello.epoch, meta.epoch
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::group::meta::VolumeMeta;
    use varve_common::wire::messages::VolumeHello;

    fn hello() -> Hello {
        Hello {
            group: "db".into(),
            epoch: 2,
            incarnation: [1; 16],
            oldest: 0,
            newest: 8,
            volumes: vec![VolumeHello { path: "/dev/vdb".into(), bytes: 4096, replica: Some("/r.img".into()) }],
            software: "test".into(),
        }
    }

    #[test]
    fn each_objection() {
        let meta = {
            let volume = VolumeMeta::new("/dev/vdb", 4096, "/r.img");
            GroupMeta::new("db", "host", 2, 0, vec![volume])
        };
        let both = |hello: &Hello| check(hello).and_then(|()| check_against(&meta, hello, "backup"));
        assert_eq!(both(&hello()), Ok(()));
        type Change = fn(&mut Hello);
        let cases: [(Change, RefusedReason); 11] = [
            (|h| h.group = "../x".into(), RefusedReason::Limit),
            (|h| h.volumes.clear(), RefusedReason::Limit),
            (|h| h.volumes[0].bytes = u64::MAX, RefusedReason::Limit),
            (|h| h.volumes[0].path = "x".repeat(5000), RefusedReason::Limit),
            (|h| h.incarnation = [0; 16], RefusedReason::Protocol),
            (|h| h.oldest = 9, RefusedReason::Protocol),
            (|h| h.epoch = 1, RefusedReason::Epoch),
            (|h| h.epoch = 3 + EPOCHS_AHEAD_MAX, RefusedReason::Epoch),
            (|h| h.volumes[0].bytes = 2048, RefusedReason::Volumes),
            (|h| h.volumes.push(h.volumes[0].clone()), RefusedReason::Volumes),
            (|h| h.volumes[0].replica = Some("/other.img".into()), RefusedReason::Volumes),
        ];
        let first = |epoch| check_first(&Hello { epoch, ..hello() }).is_ok();
        assert!(first(0) && first(FIRST_EPOCH_MAX) && !first(FIRST_EPOCH_MAX + 1) && !first(u64::MAX));
        let mut larger = hello();
        assert!(!grows(&meta, &larger));
        larger.volumes[0].bytes = 8192;
        assert!(both(&larger).is_ok() && grows(&meta, &larger));
        for (change, reason) in cases {
            let mut hello = hello();
            change(&mut hello);
            assert_eq!(both(&hello).map_err(|refused| refused.reason), Err(reason), "{hello:?}");
        }
    }
}
