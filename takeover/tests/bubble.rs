//! A test of a takeover, in a bubble: the host and its network stay as they are.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use support::{Host, PLAN, on_a_host_of_its_own, outcomes, processes, quiet};
use varve_takeover::{DrillRecord, Mode, Outcome};
use varve_tests::{run, run_ok};

#[test]
fn a_test_touches_nothing_of_the_host_and_leaves_nothing() {
    on_a_host_of_its_own(|| {
        let host = Host::new("bubble");
        let before = host.seen();
        let runner = host.runner(PLAN, Mode::Test);
        let report = runner.run(&mut quiet).unwrap();
        println!("{}\n{report}", runner.dry_run());
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert_eq!(report.checks, 2);
        let page = "point 2026-11-20T14:03:22.512345678Z test 1 of";
        assert!(runner.dry_run().steps[4].what.contains("http.server"));

        // The web server is real, and nobody outside can see it, its address or its filesystem.
        let bubble = host.paths.takeover_bubble(&host.group);
        let enter = format!("--net={}", bubble.join("net").display());
        let url = "http://192.0.2.10:8080/index.html";
        assert!(run_ok("nsenter", &[&enter, "curl", "-fsS", url]).contains(page));
        assert!(!support::try_run("curl", &["-fsS", "--max-time", "2", url]));
        assert!(!host.mnt().join("index.html").exists());
        assert!(!run_ok("ip", &["-brief", "address"]).contains(support::ADDRESS));
        assert!(!processes(&host.group).is_empty());

        println!("{}", host.undo(Mode::Test));
        host.assert_as(&before);
        let clean = varve_takeover::clean(&host.paths, &host.group, &host.tools).unwrap();
        assert_eq!(clean, None);
        // It can be released: nobody holds the device.
        run_ok("e2fsck", &["-f", "-n", &host.device.path().to_string_lossy()]);
    });
}

#[test]
fn inside_the_host_is_read_only_and_its_services_are_out_of_reach() {
    on_a_host_of_its_own(|| {
        let host = Host::new("inside");
        std::fs::create_dir_all(host.scratch.join("private")).unwrap();
        std::fs::write(host.scratch.join("private/file"), "of the host").unwrap();
        let plan = r#"
version = 1
[bubble]
private = ["@DIR@/private"]
[[step]]
name = "look"
kind = "command"
undo = []
run = """
! touch @DIR@/x || exit 11
! touch /etc/varve-x || exit 12
! touch /dev/varve-x || exit 13
[ -z "$(ls -A /run)" ] || exit 14
touch /tmp/x /run/x /dev/shm/x || exit 15
[ -z "$(ls -A @DIR@/private)" ] || exit 16
touch @DIR@/private/x || exit 17
echo x >/dev/null || exit 18
[ "$(ip -brief link | wc -l)" = 1 ] || exit 19
[ "$(cat /proc/sysvipc/shm | wc -l)" = 1 ] || exit 20
[ "$VARVE_TEST" = 1 ] || exit 21
[ -z "$CARGO_PKG_NAME" ] || exit 22
"""
[[step]]
name = "systemd"
kind = "unit"
unit = "web"
[[step]]
name = "left out"
kind = "check"
tcp = "192.0.2.1:9"
in_test = "skip"
"#;
        // Something of System V IPC that belongs to the host.
        let shm = run_ok("ipcmk", &["-M", "4096"]);
        let id = shm.rsplit(' ').next().unwrap().to_owned();
        let before = host.seen();
        let report = host.runner(plan, Mode::Test).run(&mut quiet).unwrap();
        run_ok("ipcrm", &["-m", &id]);
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert_eq!(outcomes(&report), ["look done", "systemd skipped", "left out skipped"]);
        host.undo(Mode::Test);
        host.assert_as(&before);
        assert_eq!(std::fs::read_to_string(host.scratch.join("private/file")).unwrap(), "of the host");
    });
}

#[test]
fn daemons_that_got_away_are_ended_with_the_bubble() {
    on_a_host_of_its_own(|| {
        let host = Host::new("daemons");
        let before = host.seen();
        // One forgets its environment and its session, and holds the filesystem; one does not want to end.
        let plan = PLAN.split("[[step]]\nname = \"page\"").next().unwrap().to_owned()
            + r#"
[[step]]
name = "daemons"
kind = "command"
run = """
cd @DIR@/mnt
env -i setsid sh -c 'exec 5>held; exec sleep 1003' &
env -i setsid sh -c 'trap "" TERM; while :; do sleep 1004; done' >/dev/null &
exit 0
"""
undo = []
"#;
        let report = host.runner(&plan, Mode::Test).run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        let inside = || run(std::process::Command::new("pgrep").args(["-f", "sleep 100[34]"])).stdout;
        assert_eq!(inside().lines().count(), 3);
        host.undo(Mode::Test);
        assert_eq!(inside(), "");
        host.assert_as(&before);
    });
}

#[test]
fn drills_are_remembered() {
    on_a_host_of_its_own(|| {
        let host = Host::new("drill");
        let load = || DrillRecord::load(&host.paths, &host.group).unwrap();
        assert_eq!(load(), None);
        let good = host.runner(PLAN, Mode::Test).run(&mut quiet).unwrap();
        host.undo(Mode::Test);
        let record = DrillRecord::remember(&host.paths, &good).unwrap();
        assert_eq!(load().as_ref(), Some(&record));
        let verified = record.verified.unwrap();
        assert_eq!((record.runs, record.failures), (1, 0));
        assert_eq!(Some(verified.rto_seconds), good.rto_seconds);

        // A failed one leaves the last good one, and one without a check proves nothing.
        let broken = PLAN.replace("point 2026", "point 2027").replace("20s", "300ms");
        let bad = host.runner(&broken, Mode::Test).run(&mut quiet).unwrap();
        assert_eq!(bad.outcome, Outcome::Stopped, "{bad}");
        host.undo(Mode::Test);
        let record = DrillRecord::remember(&host.paths, &bad).unwrap();
        assert_eq!((record.runs, record.failures, record.verified.as_ref()), (2, 1, Some(&verified)));
        assert!(record.last.problem.is_some());
        let unchecked = PLAN.split("[[step]]\nname = \"port\"").next().unwrap().to_owned();
        let mut report = host.runner(&unchecked, Mode::Test).run(&mut quiet).unwrap();
        assert!(report.to_string().contains("nothing was checked"), "{report}");
        host.undo(Mode::Test);
        let record = DrillRecord::remember(&host.paths, &report).unwrap();
        assert_eq!((record.runs, record.failures, record.verified.as_ref()), (3, 1, Some(&verified)));
        report.mode = Mode::Live;
        assert!(DrillRecord::remember(&host.paths, &report).is_err());
    });
}
