//! JSON files of the receiver: `group.json` and the registry of hosts. Any bytes are refused, or are a group and a
//! registry whose parts are possible, and come back after being written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::PathBuf;
use std::sync::LazyLock;
use varve_common::limits::{VOLUME_BYTES_MAX, VOLUMES_PER_GROUP_MAX};
use varve_net::hosts::{HOSTS_MAX, Hosts, INVITES_MAX, Standing, check_name};
use varve_receiver::group::meta::{FILE_NAME, GroupMeta};

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = varve_fuzz::work_dir("files").join("db");
    std::fs::create_dir(&dir).expect("directory");
    dir
});

fuzz_target!(|data: &[u8]| {
    let Some((what, bytes)) = data.split_first() else { return };
    if what % 2 == 0 { group(bytes) } else { hosts(bytes) }
});

fn group(bytes: &[u8]) {
    std::fs::write(DIR.join(FILE_NAME), bytes).expect("write");
    let Ok(found) = GroupMeta::load(&DIR) else { return };
    let meta = found.expect("the file is there");
    assert_eq!(meta.name, "db", "a file is only taken in the directory of its name");
    assert!((1..=VOLUMES_PER_GROUP_MAX).contains(&meta.volumes.len()));
    assert!(meta.volume_bytes().iter().all(|bytes| (1..=VOLUME_BYTES_MAX).contains(bytes)));
    let _ = meta.id();
    meta.save(&DIR).expect("save");
    assert_eq!(GroupMeta::load(&DIR).expect("our own file"), Some(meta));
}

fn hosts(bytes: &[u8]) {
    let path = DIR.join("hosts.json");
    std::fs::write(&path, bytes).expect("write");
    let Ok(registry) = Hosts::open(&path) else { return };
    let (hosts, invites) = (registry.list(), registry.invites());
    assert!(hosts.len() <= HOSTS_MAX && invites.len() <= INVITES_MAX);
    for host in &hosts {
        assert!(check_name(&host.name).is_ok());
        assert_ne!(registry.standing(&host.fingerprint), Standing::Unknown);
    }
    // A change writes the whole file again.
    let new = [0x77; 32];
    let before = hosts.len();
    if registry.enrol("fuzz", new, std::time::SystemTime::now()).is_ok() {
        let again = Hosts::open(&path).expect("our own file");
        assert_eq!(again.list(), registry.list());
        assert_eq!(again.invites(), invites);
        assert!(again.list().len() <= before + 1);
    }
}
