use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn fresh() -> (tempfile::TempDir, Hosts) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let hosts = Hosts::open(dir.path().join("hosts.json")).expect("empty registry");
    (dir, hosts)
}

#[test]
fn a_secret_works_once_and_the_reason_is_told_afterwards() {
    let (dir, hosts) = fresh();
    let secret = hosts.invite("db-1", HOUR, at(1000)).expect("invite");
    let stale = hosts.invite("db-2", HOUR, at(1000)).expect("invite");
    assert_eq!(hosts.redeem(&[0; 32], at(1001)), Err(RedeemError::Unknown));
    assert_eq!(hosts.redeem(&secret, at(1001)), Ok("db-1".to_owned()));
    assert_eq!(hosts.redeem(&secret, at(1002)), Err(RedeemError::Used));
    assert_eq!(hosts.redeem(&stale, at(1000 + 3600)), Err(RedeemError::Expired));
    // Another process, later: what was said stays said.
    let again = Hosts::open(dir.path().join("hosts.json")).expect("reopen");
    assert_eq!(again.redeem(&secret, at(9_000_000)), Err(RedeemError::Used));
    assert_eq!(again.redeem(&stale, at(1000 + 3599)), Ok("db-2".to_owned()));
}

#[test]
fn the_file_holds_no_secret_and_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let (_dir, hosts) = fresh();
    let secret = hosts.invite("db-1", HOUR, at(1000)).expect("invite");
    let text = std::fs::read_to_string(hosts.path()).expect("file");
    assert!(!text.contains(&hex(&secret)));
    let mode = std::fs::metadata(hosts.path()).expect("metadata").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn joining_again_revokes_the_old_certificate() {
    let (_dir, hosts) = fresh();
    hosts.enrol("db-1", [1; 32], at(10)).expect("enrol");
    hosts.enrol("db-1", [2; 32], at(20)).expect("enrol again");
    assert_eq!(hosts.standing(&[1; 32]), Standing::Revoked("db-1".into()));
    assert_eq!(hosts.standing(&[2; 32]), Standing::Enrolled("db-1".into()));
    assert_eq!(hosts.standing(&[3; 32]), Standing::Unknown);
    assert!(hosts.is_enrolled("db-1") && !hosts.is_enrolled("db-2"));
    assert_eq!(hosts.revoke("db-1", at(30)).expect("revoke"), vec![[2; 32]]);
    assert!(!hosts.is_enrolled("db-1"), "nobody is replaced any more");
    assert_eq!(hosts.revoke("db-1", at(31)).expect("twice"), Vec::<Fingerprint>::new());
    assert_eq!(hosts.standing(&[2; 32]), Standing::Revoked("db-1".into()));
    assert_eq!(hosts.revoke("nobody", at(31)).expect_err("unknown").kind(), ErrorKind::NoSuchHost);
}

#[test]
fn revoking_withdraws_open_invitations() {
    let (_dir, hosts) = fresh();
    let secret = hosts.invite("db-1", HOUR, at(1000)).expect("invite");
    hosts.revoke("db-1", at(1001)).expect("withdraw");
    assert_eq!(hosts.redeem(&secret, at(1002)), Err(RedeemError::Expired));
}

#[test]
fn names_and_times_are_checked() {
    let (_dir, hosts) = fresh();
    for bad in ["", "Db", "a b", "../x", ".x", "-x", "ä", "a\n", &"a".repeat(65)] {
        assert_eq!(hosts.invite(bad, HOUR, at(0)).expect_err("bad name").kind(), ErrorKind::BadName, "{bad:?}");
        assert_eq!(hosts.enrol(bad, [0; 32], at(0)).expect_err("bad name").kind(), ErrorKind::BadName, "{bad:?}");
    }
    for bad in [Duration::ZERO, Duration::from_millis(10), INVITE_TTL_MAX + HOUR, Duration::MAX] {
        assert_eq!(hosts.invite("a", bad, at(0)).expect_err("bad time").kind(), ErrorKind::Limit);
    }
    hosts.invite(&"a".repeat(64), INVITE_TTL_MAX, at(0)).expect("the longest of both");
    hosts.invite("a", HOUR, UNIX_EPOCH - HOUR).expect("a clock before 1970");
}

#[test]
fn what_a_crash_left_behind_does_not_matter() {
    let (dir, hosts) = fresh();
    hosts.enrol("db-1", [1; 32], at(10)).expect("enrol");
    let left_over = dir.path().join(".hosts.json.varve-tmp-1-0");
    std::fs::write(&left_over, "{\"version\":1,\"inv").expect("torn temporary file");
    let hosts = Hosts::open(dir.path().join("hosts.json")).expect("the file itself is whole");
    assert_eq!(hosts.standing(&[1; 32]), Standing::Enrolled("db-1".into()));
    hosts.enrol("db-2", [2; 32], at(11)).expect("the left-over is no obstacle");
}

#[test]
fn a_change_that_cannot_be_written_does_not_count() {
    let (dir, hosts) = fresh();
    let secret = hosts.invite("db-1", HOUR, at(1000)).expect("invite");
    // The directory is gone: fails for root as well, unlike permissions.
    let away = dir.path().with_extension("away");
    std::fs::rename(dir.path(), &away).expect("away");
    assert_eq!(hosts.redeem(&secret, at(1001)), Err(RedeemError::NotRecorded));
    assert_eq!(hosts.enrol("x", [1; 32], at(1)).expect_err("cannot write").kind(), ErrorKind::Io);
    assert_eq!(hosts.standing(&[1; 32]), Standing::Unknown);
    std::fs::rename(&away, dir.path()).expect("back");
    assert_eq!(hosts.redeem(&secret, at(1002)), Ok("db-1".into()));
}

#[test]
fn damaged_and_foreign_files_are_refused_by_name() {
    let (dir, _) = fresh();
    let path = dir.path().join("hosts.json");
    let bad = [
        "",
        "{}",
        "[]",
        "{\"version\":2,\"invites\":[],\"hosts\":[]}",
        "{\"version\":1,\"invites\":[],\"hosts\":[],\"more\":1}",
        "{\"version\":1,\"invites\":[],\"hosts\":[{\"name\":\"../x\",\"fingerprint\":\"00\",\"joined_at\":0,\"revoked_at\":null}]}",
    ];
    for text in bad {
        std::fs::write(&path, text).expect("write");
        let error = Hosts::open(&path).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Identity, "{text}");
        assert!(error.to_string().contains("hosts.json"), "{error}");
    }
    let large = std::fs::File::create(&path).expect("create");
    large.set_len(HOSTS_FILE_BYTES_MAX as u64 + 1).expect("sparse");
    assert_eq!(Hosts::open(&path).expect_err("too large").kind(), ErrorKind::Limit);
}

#[test]
fn full_lists_drop_what_is_spent_and_never_what_counts() {
    let mut list: Vec<(u64, bool)> = vec![(5, true), (3, true), (9, false)];
    assert!(make_room(&mut list, 3, |x| x.1, |x| x.0));
    assert_eq!(list, vec![(5, true), (9, false)]);
    let mut full = vec![(1, false), (2, false)];
    assert!(!make_room(&mut full, 2, |x| x.1, |x| x.0));
    assert_eq!(full.len(), 2);
}

#[test]
fn the_registry_is_bounded() {
    let (_dir, hosts) = fresh();
    // Filled by hand: 4096 synced files would take long.
    {
        let mut registry = hosts.lock();
        for i in 0..INVITES_MAX {
            let mut id = [0; 32];
            id[..8].copy_from_slice(&(i as u64).to_le_bytes());
            registry.invites.push(Invite { name: "x".into(), id, expires_at: 5000, used_at: None });
            registry.hosts.push(Host { name: format!("h{i}"), fingerprint: id, joined_at: 0, revoked_at: None });
        }
    }
    assert_eq!(hosts.invite("y", HOUR, at(1000)).expect_err("full").kind(), ErrorKind::Limit);
    assert_eq!(hosts.enrol("y", [9; 32], at(1000)).expect_err("full").kind(), ErrorKind::Limit);
    hosts.invite("y", HOUR, at(6000)).expect("expired ones give way");
    hosts.revoke("h0", at(6000)).expect("revoke");
    hosts.enrol("y", [9; 32], at(6001)).expect("revoked ones give way");
    assert_eq!(hosts.list().len(), HOSTS_MAX);
    assert_eq!(hosts.invites().len(), INVITES_MAX);
    let size = std::fs::metadata(hosts.path()).expect("metadata").len();
    assert!(size < HOSTS_FILE_BYTES_MAX as u64 / 2, "{size} bytes must be readable again with room");
}
