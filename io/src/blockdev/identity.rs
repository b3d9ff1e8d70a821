//! What tells a block device from others over a reboot, which deals names and numbers anew.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::facts::BlockFacts;
use super::sysfs::{SysDevice, text};
use crate::IoError;

/// Word and value of all that the kernel knows; empty: nothing.
pub type Identity = BTreeMap<String, String>;

/// Of a disk, the surest first: where both sides have one of them, it decides.
const OF_DISK: [&str; 5] = ["dm-uuid", "md-uuid", "wwid", "serial", "loop-file"];
/// Of a partition on it.
const OF_PARTITION: [&str; 2] = ["partition-uuid", "partition-place"];
/// What is not said of the same device at another time: an older kernel does not have the attribute, a file was removed.
const MAY_GO: [&str; 2] = ["md-uuid", "loop-file"];

impl BlockFacts {
    /// What identifies it. Some drivers ask the device for that.
    ///
    /// # Errors
    /// If the device is gone.
    pub fn identity(&self) -> Result<Identity, IoError> {
        let device = SysDevice::of(self.dev)?;
        let disk = &device.disk_dir;
        // A device without one answers with an error as often as with nothing.
        let known = |path: PathBuf| text(&path).ok().flatten().filter(|text| !text.is_empty());
        let either = |name: &str| known(disk.join(name)).or_else(|| known(disk.join("device").join(name)));
        let file = self.loop_backing_file.as_ref().map(|file| file.to_string_lossy().into_owned());
        let uevent = known(device.dir.join("uevent")).filter(|_| device.is_partition()).unwrap_or_default();
        let uuid = uevent.lines().find_map(|line| line.strip_prefix("PARTUUID=")).map(str::to_owned);
        let number = known(device.dir.join("partition"));
        let all = [
            ("dm-uuid", known(disk.join("dm/uuid"))),
            ("md-uuid", known(disk.join("md/uuid"))),
            ("wwid", either("wwid")),
            ("serial", either("serial")),
            ("loop-file", file.filter(|file| !file.ends_with(" (deleted)"))),
            ("partition-uuid", uuid),
            ("partition-place", number.map(|number| format!("{number} at {}", self.start_bytes))),
        ];
        Ok(all.into_iter().filter_map(|(word, value)| Some((word.to_owned(), value?))).collect())
    }
}

/// Why a device is another one than what was known of it says; `None`: it is the same, as far as can be told.
pub fn is_another(known: &Identity, now: &Identity) -> Option<String> {
    differs(known, now, &OF_DISK).or_else(|| differs(known, now, &OF_PARTITION))
}

fn differs(known: &Identity, now: &Identity, words: &[&str]) -> Option<String> {
    let mut decisive = words.iter().filter_map(|word| Some((word, known.get(*word)?, now.get(*word)?))).peekable();
    // A kernel that no longer believes what an NVMe disk says of itself makes its wwid of the serial.
    let made = |wwid: &str| wwid.starts_with("nvme.");
    if decisive.peek().is_some_and(|(word, was, is)| **word == "wwid" && made(was) != made(is))
        && known.contains_key("serial")
    {
        decisive.next();
    }
    if let Some((word, was, is)) = decisive.next() {
        return (was != is).then(|| format!("its {word} was '{was}' and is '{is}' now"));
    }
    let first = |identity: &Identity| words.iter().find_map(|word| Some((*word, identity.get(*word)?.clone())));
    let (word, was) = first(known)?;
    match first(now) {
        Some((other, is)) => Some(format!("its {word} was '{was}', and now it has none, but {other} '{is}'")),
        None if MAY_GO.contains(&word) => None,
        None => Some(format!("its {word} was '{was}', and now it has none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(parts: &[(&str, &str)]) -> Identity {
        parts.iter().map(|(word, value)| ((*word).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn the_surest_that_both_have_decides() {
        let same =
            |known: &[(&str, &str)], now: &[(&str, &str)]| is_another(&identity(known), &identity(now)).is_none();
        assert!(same(&[], &[("serial", "a")]), "nothing was known");
        assert!(same(&[("serial", "a")], &[("serial", "a"), ("wwid", "w")]), "a kernel that knows more");
        assert!(!same(&[("serial", "a")], &[("serial", "b")]));
        assert!(same(&[("wwid", "w"), ("serial", "a")], &[("wwid", "w"), ("serial", "b")]));
        assert!(!same(&[("wwid", "w"), ("serial", "a")], &[("wwid", "x"), ("serial", "a")]));
        assert!(!same(&[("serial", "a")], &[]), "names were swapped with a disk without a serial");
        assert!(!same(&[("serial", "a")], &[("loop-file", "/f")]));
        assert!(same(&[("loop-file", "/f")], &[]), "the file was removed");
        assert!(same(&[("md-uuid", "u")], &[]), "an older kernel");
        assert!(
            same(&[("wwid", "eui.1"), ("serial", "a")], &[("wwid", "nvme.a-1"), ("serial", "a")]),
            "another kernel"
        );
        assert!(!same(&[("wwid", "eui.1"), ("serial", "a")], &[("wwid", "nvme.b-1"), ("serial", "b")]));
        assert!(
            !same(&[("wwid", "nvme.a-1"), ("serial", "a")], &[("wwid", "nvme.a-2"), ("serial", "a")]),
            "namespaces"
        );
        let part = [("serial", "a"), ("partition-place", "1 at 1048576")];
        assert!(same(&part, &part) && !same(&part, &[("serial", "a"), ("partition-place", "2 at 1048576")]));
        assert!(!same(&part, &[("serial", "b"), ("partition-place", "1 at 1048576")]));
        assert!(!same(&part, &[("serial", "a")]), "the whole disk");
        assert!(same(&part, &[("serial", "a"), ("partition-place", "1 at 1048576"), ("partition-uuid", "p")]));
        let why = is_another(&identity(&[("serial", "a")]), &identity(&[("serial", "b")])).expect("another");
        assert_eq!(why, "its serial was 'a' and is 'b' now");
    }
}
