//! Steps that fail: what is told, what is left, and that it can be taken back or gone on with.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use support::{Host, PLAN, on_a_host_of_its_own, outcomes, processes, quiet};
use varve_takeover::{Mode, Outcome, Phase, Plan, standing};
use varve_tests::{run_ok, wait_until};

/// The plan with one more step before step `place` (from 0).
fn with_step(place: usize, step: &str) -> String {
    let mut parts: Vec<&str> = PLAN.split("[[step]]").collect();
    parts.insert(place + 1, step);
    parts.join("[[step]]")
}

#[test]
fn a_failure_before_every_step_is_taken_back() {
    on_a_host_of_its_own(|| {
        for mode in [Mode::Live, Mode::Test] {
            let host = Host::new(&format!("fail-{}", mode.word()));
            let before = host.seen();
            let steps = PLAN.matches("[[step]]").count();
            for place in 0..=steps {
                let plan = with_step(
                    place,
                    "\nname = \"broken\"\nkind = \"command\"\nrun = \"echo told >&2; exit 3\"\nundo = []\n\n",
                );
                let report = host.runner(&plan, mode).run(&mut quiet).unwrap();
                assert_eq!(report.outcome, Outcome::Stopped, "{report}");
                let words: Vec<&str> = report.steps.iter().map(|step| step.name.as_str()).collect();
                assert_eq!(words[place], "broken");
                assert_eq!(report.steps[place].output.as_deref(), Some("told"));
                assert!(report.steps[place].detail.contains("exit code 3"), "{report}");
                assert!(outcomes(&report)[place + 1..].iter().all(|outcome| outcome.ends_with(" not-reached")));
                let problem = report.problem.clone().unwrap();
                assert!(problem.what.contains(&format!("step {} 'broken'", place + 1)), "{problem}");
                assert!(problem.next.contains("varve failover abort"), "{problem}");
                assert_eq!(report.rto_seconds, None);
                // What a check leaves is nothing; the broken command itself may have left something.
                assert_eq!(report.left.len(), place.min(5) + 1, "{report}");
                let stands = standing(&host.paths, &host.group, mode).unwrap().unwrap();
                assert_eq!((stands.phase, stands.done, stands.left), (Phase::Stopped, place, report.left.clone()));
                host.undo(mode);
                host.assert_as(&before);
                assert_eq!(standing(&host.paths, &host.group, mode).unwrap(), None);
            }
        }
    });
}

#[test]
fn every_step_can_fail_by_itself_and_be_gone_on_with() {
    on_a_host_of_its_own(|| {
        let host = Host::new("mend");
        let before = host.seen();
        let flag = host.scratch.join("units/broken");
        std::fs::write(&flag, "").unwrap();
        let report = host.runner(PLAN, Mode::Live).run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Stopped);
        assert_eq!(outcomes(&report)[4], "server failed");
        assert!(report.steps[4].output.as_ref().unwrap().contains("web.service is broken"), "{report}");
        assert!(report.problem.unwrap().next.contains("journalctl -u web.service"));

        // Mended on the host: it goes on, and does nothing twice.
        std::fs::remove_file(&flag).unwrap();
        let report = host.runner(PLAN, Mode::Live).resume(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        let names = ["volumes", "data", "page", "address"].map(|name| format!("{name} in-place"));
        assert_eq!(outcomes(&report)[..4], names);
        assert_eq!(outcomes(&report)[4..], ["server done", "port done", "answer done"]);
        host.undo(Mode::Live);
        host.assert_as(&before);

        // Mended in the plan.
        let wrong = PLAN.replace("point 2026", "point 2027").replace("timeout = \"20s\"", "timeout = \"2s\"");
        let report = host.runner(&wrong, Mode::Live).run(&mut quiet).unwrap();
        assert_eq!(outcomes(&report)[6], "answer failed", "{report}");
        assert!(report.steps[6].detail.contains("did not contain 'point 2027-11-20'"), "{report}");
        let mended = wrong.replace("point 2027", "point 2026");
        let report = host.runner(&mended, Mode::Live).resume(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");

        // What was done may not be another thing afterwards.
        let changed = mended.replace("noatime", "nodiratime");
        let problem = host.runner(&changed, Mode::Live).resume(&mut quiet).expect_err("changed");
        assert!(problem.why.contains("step 2 'data' was done and has changed"), "{problem}");
        host.undo(Mode::Live);
        host.assert_as(&before);
        let problem = host.runner(PLAN, Mode::Live).resume(&mut quiet).expect_err("nothing there");
        assert_eq!(problem.kind.exit_code(), 5);
    });
}

#[test]
fn what_a_reboot_took_is_done_again() {
    on_a_host_of_its_own(|| {
        let host = Host::new("reboot");
        let before = host.seen();
        let runner = host.runner(PLAN, Mode::Live);
        assert_eq!(runner.run(&mut quiet).unwrap().outcome, Outcome::Done);
        // As a reboot would: the unit, the address, the mount and the links are gone, the boot has another name.
        run_ok(&host.scratch.join("bin/systemctl").to_string_lossy(), &["stop", "web.service"]);
        run_ok("ip", &["address", "delete", "192.0.2.10/24", "dev", "v0"]);
        run_ok("umount", &[&host.mnt()]);
        std::fs::remove_dir_all(host.scratch.join("root/dev/varve")).unwrap();
        let state = host.paths.takeover_state(&host.group).join("live/state.json");
        let text = std::fs::read_to_string(&state).unwrap();
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert!(text.contains(boot.trim()));
        std::fs::write(&state, text.replace(boot.trim(), "another")).unwrap();

        let report = runner.resume(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert!(outcomes(&report).iter().all(|outcome| outcome.ends_with(" done")), "{report}");
        host.undo(Mode::Live);
        host.assert_as(&before);

        // And what it took need not be taken back.
        assert_eq!(runner.run(&mut quiet).unwrap().outcome, Outcome::Done);
        run_ok(&host.scratch.join("bin/systemctl").to_string_lossy(), &["stop", "web.service"]);
        run_ok("ip", &["address", "delete", "192.0.2.10/24", "dev", "v0"]);
        run_ok("umount", &[&host.mnt()]);
        std::fs::remove_dir_all(host.scratch.join("root/dev/varve")).unwrap();
        host.undo(Mode::Live);
        host.assert_as(&before);
    });
}

#[test]
fn devices_that_changed_their_numbers_are_attached_and_mounted_anew() {
    on_a_host_of_its_own(|| {
        let host = Host::new("renumber");
        let before = host.seen();
        let text = &PLAN.replace("timeout = \"20s\"", "timeout = \"3s\"");
        assert_eq!(host.runner(text, Mode::Live).run(&mut quiet).unwrap().outcome, Outcome::Done);
        let second = varve_tests::LoopDevice::new(&host.scratch, "second", 16 << 20);
        run_ok("mkfs.ext4", &["-q", "-F", &second.path().to_string_lossy()]);
        // The old filesystem is in use.
        let mut holder = std::process::Command::new("sleep").arg("1012").current_dir(host.mnt()).spawn().unwrap();
        let plan = text.replace("options = \"noatime\"", "options = \"noatime\"\ntimeout = \"1s\"");
        let runner = support::runner(host.dir(), &host.group, second.path(), &plan, Mode::Live);
        let problem = runner.resume(&mut quiet).expect_err("the plan is another one");
        assert!(problem.why.contains("has changed since"), "{problem}");
        let runner = support::runner(host.dir(), &host.group, second.path(), text, Mode::Live);
        let stop = runner.canceller();
        let watcher = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_secs(1));
            stop.store(true, Ordering::Relaxed);
        });
        let report = runner.resume(&mut quiet).unwrap();
        watcher.join().unwrap();
        assert_eq!(outcomes(&report)[..3], ["volumes done", "data failed", "page not-reached"], "{report}");
        assert!(report.steps[1].detail.contains("in use by sleep"), "{report}");
        holder.kill().unwrap();
        holder.wait().unwrap();
        let runner = support::runner(host.dir(), &host.group, second.path(), text, Mode::Live);
        let report = runner.resume(&mut quiet).unwrap();
        // The page was written to the old one. Nothing in the plan says when it is there, so it is not written again,
        // and the check says that it is missing.
        assert_eq!(outcomes(&report)[..3], ["volumes in-place", "data done", "page in-place"], "{report}");
        assert_eq!(outcomes(&report)[6], "answer failed", "{report}");
        host.undo(Mode::Live);
        drop(second);
        std::fs::remove_file(host.scratch.join("second")).unwrap();
        host.assert_as(&before);
    });
}

#[test]
fn what_was_there_before_stays() {
    on_a_host_of_its_own(|| {
        let host = Host::new("found");
        run_ok("mount", &[host.device.path(), &host.mnt()]);
        run_ok("ip", &["address", "add", "192.0.2.10/24", "dev", "v0"]);
        run_ok(&host.scratch.join("bin/systemctl").to_string_lossy(), &["start", "web.service"]);
        let before = host.seen();
        let plan = PLAN.replace("{data}", "{volume0}");
        let report = host.runner(&plan, Mode::Live).run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert_eq!(
            outcomes(&report)[..5],
            ["volumes done", "data in-place", "page done", "address in-place", "server in-place"]
        );
        assert!(report.steps[1].detail.contains("there before"));
        let undone = host.undo(Mode::Live);
        assert_eq!(
            outcomes(&undone),
            ["server left-as-found", "address left-as-found", "page undone", "data left-as-found", "volumes undone"]
        );
        host.assert_as(&before);
        run_ok(&host.scratch.join("bin/systemctl").to_string_lossy(), &["stop", "web.service"]);
        run_ok("umount", &[&host.mnt()]);
    });
}

#[test]
fn what_cannot_be_taken_back_is_named_and_the_rest_is() {
    on_a_host_of_its_own(|| {
        let host = Host::new("stuck");
        let before = host.seen();
        let plan = PLAN.replace("options = \"noatime\"", "timeout = \"1s\"").replace(
            "undo = [\"/bin/rm\", \"-f\", \"@DIR@/mnt/index.html\"]",
            "undo = \"rm -f @DIR@/mnt/index.html; [ ! -e @DIR@/refuse ] || {{ echo not now; exit 4; }}\"",
        );
        assert_eq!(host.runner(&plan, Mode::Live).run(&mut quiet).unwrap().outcome, Outcome::Done);
        std::fs::write(host.scratch.join("refuse"), "").unwrap();
        let mut holder = std::process::Command::new("sleep").arg("1007").current_dir(host.mnt()).spawn().unwrap();
        let report = varve_takeover::undo(&host.undoing(Mode::Live), &mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::UndoIncomplete);
        assert_eq!(
            outcomes(&report),
            ["server undone", "address undone", "page undo-failed", "data undo-failed", "volumes undone"]
        );
        let problem = report.problem.clone().unwrap();
        assert!(problem.what.contains("step 3 'page', step 2 'data'"), "{problem}");
        assert!(problem.why.contains(&format!("in use by sleep ({})", holder.id())), "{problem}");
        assert_eq!(report.left.len(), 2, "{report}");
        let page = report.steps.iter().find(|step| step.name == "page").unwrap();
        assert_eq!(page.output.as_deref(), Some("not now"));
        // A newer takeover is not to be undone for it.
        let runner = host.runner(&plan, Mode::Live);
        for problem in [runner.run(&mut quiet).expect_err("left"), runner.resume(&mut quiet).expect_err("left")] {
            assert!(problem.next.contains("plan undo") && !problem.next.contains("abort"), "{problem:?}");
        }

        holder.kill().unwrap();
        holder.wait().unwrap();
        std::fs::remove_file(host.scratch.join("refuse")).unwrap();
        let report = host.undo(Mode::Live);
        assert_eq!(outcomes(&report), ["page undone", "data undone"], "only what is left");
        host.assert_as(&before);
    });
}

#[test]
fn a_time_limit_ends_a_program_with_all_that_it_started() {
    on_a_host_of_its_own(|| {
        for mode in [Mode::Live, Mode::Test] {
            let host = Host::new(&format!("slow-{}", mode.word()));
            let before = host.seen();
            let plan = r#"
version = 1
[[step]]
name = "slow"
kind = "command"
run = "yes | head -c 20000000; trap '' TERM; sleep 1008 & setsid sleep 1009 & echo last; wait; wait; sleep 1010"
undo = []
timeout = "1s"
"#;
            let at = Instant::now();
            let report = host.runner(plan, mode).run(&mut quiet).unwrap();
            assert!(at.elapsed() < Duration::from_secs(10), "{report}");
            assert!(report.steps[0].detail.contains("took longer than 1 s"), "{report}");
            assert!(report.steps[0].output.as_ref().unwrap().ends_with("last"), "{report}");
            assert!(report.steps[0].output.as_ref().unwrap().len() <= 8192);
            assert!(processes(&host.group).is_empty(), "{:?}", processes(&host.group));
            host.undo(mode);
            host.assert_as(&before);
        }
    });
}

#[test]
fn the_operator_can_stop_it() {
    on_a_host_of_its_own(|| {
        let host = Host::new("stop");
        let before = host.seen();
        let plan = with_step(2, "\nname = \"long\"\nkind = \"command\"\nrun = \"sleep 1011\"\nundo = []\n\n");
        let runner = host.runner(&plan, Mode::Live);
        let stop = runner.canceller();
        let at = Instant::now();
        let group = host.group.clone();
        let watcher = std::thread::spawn(move || {
            wait_until(Duration::from_secs(20), "it runs", || !processes(&group).is_empty());
            stop.store(true, Ordering::Relaxed);
        });
        let report = runner.run(&mut quiet).unwrap();
        watcher.join().unwrap();
        assert!(at.elapsed() < Duration::from_secs(20));
        assert_eq!(report.outcome, Outcome::Stopped, "{report}");
        assert!(report.problem.unwrap().why.contains("operator stopped it"));
        assert_eq!(runner.undo(&mut quiet).unwrap().outcome, Outcome::Undone);
        host.assert_as(&before);
    });
}

#[test]
fn two_runs_of_one_group_do_not_meet_but_a_test_beside_a_takeover_does() {
    on_a_host_of_its_own(|| {
        let host = Host::new("both");
        let before = host.seen();
        let live = host.runner(PLAN, Mode::Live);
        let plan = PLAN.replace("name = \"volumes\"", "name = \"links\"");
        let second = varve_tests::LoopDevice::new(&host.scratch, "second", 16 << 20);
        run_ok("mkfs.ext4", &["-q", "-F", &second.path().to_string_lossy()]);
        let test = support::runner(host.dir(), &host.group, second.path(), &plan, Mode::Test);
        let mut inside = false;
        let report = live
            .run(&mut |_| {
                if !std::mem::replace(&mut inside, true) {
                    let problem = host.runner(PLAN, Mode::Live).run(&mut quiet).expect_err("locked");
                    assert!(problem.why.contains("another command"), "{problem}");
                    let report = test.run(&mut quiet).unwrap();
                    assert_eq!(report.outcome, Outcome::Done, "{report}");
                }
            })
            .unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        host.undo(Mode::Test);
        assert_eq!(live.resume(&mut quiet).unwrap().outcome, Outcome::Done, "untouched by the test's end");
        host.undo(Mode::Live);
        drop(second);
        std::fs::remove_file(host.scratch.join("second")).unwrap();
        host.assert_as(&before);
    });
}

#[test]
fn an_undo_needs_neither_plan_nor_devices() {
    on_a_host_of_its_own(|| {
        let host = Host::new("lost");
        let file = host.scratch.join("plan.toml");
        std::fs::write(&file, host.text(PLAN)).unwrap();
        assert_eq!(Plan::load(&file).unwrap().steps.len(), 7);
        std::fs::remove_file(&file).unwrap();
        assert_eq!(Plan::load(&file).expect_err("gone").kind.exit_code(), 5);
        let before = host.seen();
        assert_eq!(host.runner(PLAN, Mode::Live).run(&mut quiet).unwrap().outcome, Outcome::Done);
        host.undo(Mode::Live);
        host.assert_as(&before);

        // A state that cannot be understood is told, not guessed at.
        let state = host.paths.takeover_state(&host.group).join("live/state.json");
        for (text, why) in [("{}", "version"), ("{\"version\":9}", "version 9"), ("no", "expected")] {
            std::fs::write(&state, text).unwrap();
            let problem = host.runner(PLAN, Mode::Live).run(&mut quiet).expect_err(text);
            assert!(problem.why.contains(why), "{problem}");
        }
        std::fs::remove_file(&state).unwrap();
    });
}

/// The state of a live run, to be changed as another boot or an older version would have it.
fn change_state(host: &Host, change: impl Fn(&mut serde_json::Value)) {
    let file = host.paths.takeover_state(&host.group).join("live/state.json");
    let mut state = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut state);
    std::fs::write(&file, state.to_string()).unwrap();
}

fn reboot(host: &Host) {
    change_state(host, |state| {
        state["boot"] = "another".into();
        for step in state["steps"].as_array_mut().unwrap() {
            step["boot"] = "another".into();
        }
    });
}

#[test]
fn a_command_is_run_once_in_a_boot() {
    on_a_host_of_its_own(|| {
        let host = Host::new("once");
        let plan = r#"
version = 1
[[step]]
name = "count"
kind = "command"
run = "echo once >>@DIR@/count"
undo = []
[[step]]
name = "never"
kind = "check"
run = "false"
every = "50ms"
timeout = "0.1s"
"#;
        let runner = host.runner(plan, Mode::Live);
        let stops = |first: bool, count: usize| {
            let report = if first { runner.run(&mut quiet) } else { runner.resume(&mut quiet) }.unwrap();
            assert_eq!(report.outcome, Outcome::Stopped, "{report}");
            let text = std::fs::read_to_string(host.scratch.join("count")).unwrap();
            assert_eq!(text.lines().count(), count, "{report}");
        };
        stops(true, 1);
        stops(false, 1);
        // What it did is gone with the boot; doing it again once is enough, though the run does not come to its end.
        reboot(&host);
        stops(false, 2);
        stops(false, 2);

        // A version before noted the boot for all steps together.
        let forget = |state: &mut serde_json::Value| {
            for step in state["steps"].as_array_mut().unwrap() {
                step.as_object_mut().unwrap().remove("boot");
            }
        };
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        change_state(&host, |state| {
            forget(state);
            state["boot"] = boot.trim().into();
        });
        stops(false, 2);
        change_state(&host, |state| {
            forget(state);
            state["boot"] = "another".into();
        });
        stops(false, 3);
        stops(false, 3);
        host.undo(Mode::Live);
    });
}

#[test]
fn what_was_there_before_a_reboot_and_is_ours_since_is_taken_back() {
    on_a_host_of_its_own(|| {
        let host = Host::new("found-gone");
        let before = host.seen();
        let add = || run_ok("ip", &["address", "add", "192.0.2.10/24", "dev", "v0"]);
        add();
        let runner = host.runner(PLAN, Mode::Live);
        let report = runner.run(&mut quiet).unwrap();
        assert_eq!(outcomes(&report)[3], "address in-place", "{report}");
        run_ok(&host.scratch.join("bin/systemctl").to_string_lossy(), &["stop", "web.service"]);
        run_ok("ip", &["address", "delete", "192.0.2.10/24", "dev", "v0"]);
        reboot(&host);
        let report = runner.resume(&mut quiet).unwrap();
        assert_eq!(outcomes(&report)[3], "address done", "{report}");
        assert!(report.left.iter().any(|left| left.contains("192.0.2.10")), "{report}");
        let undone = host.undo(Mode::Live);
        assert!(outcomes(&undone).contains(&"address undone".to_owned()), "{undone}");
        host.assert_as(&before);
    });
}
