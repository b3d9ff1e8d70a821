//! The runner is killed (SIGKILL) at every moment of every step, forwards and backwards. Whatever it left, going on ends
//! with everything in place, and taking back ends with nothing.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use nix::sys::signal::{Signal, raise};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use support::{Host, PLAN, on_a_host_of_its_own, quiet};
use varve_takeover::runner::Moment;
use varve_takeover::{Mode, Outcome};

const MOMENTS: [Moment; 4] = [Moment::Before, Moment::Noted, Moment::Acted, Moment::After];

/// The process that is killed. It is this test again, started by the others.
#[test]
fn victim() {
    let Ok(orders) = std::env::var("VARVE_VICTIM") else { return };
    let orders: Vec<&str> = orders.split(' ').collect();
    let [task, mode, dir, group, device, step, moment] = orders.as_slice() else { panic!("{orders:?}") };
    let mode = if *mode == "test" { Mode::Test } else { Mode::Live };
    let mut runner = support::runner(Path::new(dir), group, Path::new(device), PLAN, mode);
    let (step, moment) = (step.parse::<usize>().unwrap(), moment.to_string());
    runner.set_trap(move |at, what| {
        if at == step && format!("{what:?}") == moment {
            raise(Signal::SIGKILL).unwrap();
        }
    });
    let report = if *task == "undo" { runner.undo(&mut quiet) } else { runner.run(&mut quiet) };
    panic!("not killed: {report:?}");
}

/// Starts the victim; true if it was killed where it should be.
fn kill(host: &Host, task: &str, mode: Mode, step: usize, moment: Moment) -> bool {
    let orders = [
        task.to_owned(),
        mode.word().to_owned(),
        host.dir().display().to_string(),
        host.group.clone(),
        host.device.path().display().to_string(),
        step.to_string(),
        format!("{moment:?}"),
    ];
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "victim"]).env("VARVE_VICTIM", orders.join(" "));
    let output = command.output().unwrap();
    let killed = output.status.signal() == Some(9);
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(killed || said.contains("not killed: Ok"), "{said}");
    killed
}

fn everywhere() -> impl Iterator<Item = (usize, Moment)> {
    let steps = PLAN.matches("[[step]]").count();
    (1..=steps).flat_map(|step| MOMENTS.map(|moment| (step, moment)))
}

fn killed_forwards_then_taken_back(mode: Mode) {
    on_a_host_of_its_own(move || {
        let host = Host::new(&format!("back-{}", mode.word()));
        let before = host.seen();
        for (step, moment) in everywhere() {
            assert!(kill(&host, "run", mode, step, moment), "step {step}, {moment:?}");
            println!(
                "killed at step {step}, {moment:?}: {:?}",
                varve_takeover::standing(&host.paths, &host.group, mode)
            );
            host.undo(mode);
            host.assert_as(&before);
        }
    });
}

fn killed_forwards_then_resumed(mode: Mode) {
    on_a_host_of_its_own(move || {
        let host = Host::new(&format!("on-{}", mode.word()));
        let before = host.seen();
        for (step, moment) in everywhere() {
            assert!(kill(&host, "run", mode, step, moment), "step {step}, {moment:?}");
            let runner = host.runner(PLAN, mode);
            assert!(runner.run(&mut quiet).is_err(), "it must not begin twice");
            let report = runner.resume(&mut quiet).unwrap();
            assert_eq!(report.outcome, Outcome::Done, "step {step}, {moment:?}: {report}");
            // The web server was not started twice, and it serves the page.
            assert_eq!(report.checks, 2, "{report}");
            host.undo(mode);
            host.assert_as(&before);
        }
    });
}

fn killed_backwards(mode: Mode) {
    on_a_host_of_its_own(move || {
        let host = Host::new(&format!("undo-{}", mode.word()));
        let before = host.seen();
        let mut killed = 0;
        for (step, moment) in everywhere() {
            let report = host.runner(PLAN, mode).run(&mut quiet).unwrap();
            assert_eq!(report.outcome, Outcome::Done, "{report}");
            if kill(&host, "undo", mode, step, moment) {
                killed += 1;
                let problem = host.runner(PLAN, mode).resume(&mut quiet).expect_err("it is being taken back");
                assert!(problem.why.contains("being taken back"), "{problem}");
                host.undo(mode);
            }
            host.assert_as(&before);
        }
        // Every moment but "noted as begun", which the way back does not have.
        assert_eq!(killed, PLAN.matches("[[step]]").count() * 3);
    });
}

#[test]
fn live_killed_forwards_then_taken_back() {
    killed_forwards_then_taken_back(Mode::Live);
}

#[test]
fn live_killed_forwards_then_resumed() {
    killed_forwards_then_resumed(Mode::Live);
}

#[test]
fn live_killed_backwards() {
    killed_backwards(Mode::Live);
}

#[test]
fn test_killed_forwards_then_taken_back() {
    killed_forwards_then_taken_back(Mode::Test);
}

#[test]
fn test_killed_forwards_then_resumed() {
    killed_forwards_then_resumed(Mode::Test);
}

#[test]
fn test_killed_backwards() {
    killed_backwards(Mode::Test);
}

/// Killed by somebody else, at no particular moment: while programs run.
#[test]
fn killed_while_a_program_runs() {
    on_a_host_of_its_own(|| {
        for mode in [Mode::Live, Mode::Test] {
            let host = Host::new(&format!("while-{}", mode.word()));
            let before = host.seen();
            let plan = r#"
version = 1
[[step]]
name = "slow"
kind = "command"
run = "sleep 1005 & setsid sleep 1006 & wait"
undo = []
"#;
            // The runner is on a process of its own, so that it can be killed.
            let (dir, group) = (host.dir().to_owned(), host.group.clone());
            let mut command = Command::new(std::env::current_exe().unwrap());
            let orders =
                [mode.word(), &dir.display().to_string(), &group, &host.device.path().display().to_string()].join(" ");
            command.args(["--exact", "slow_victim"]).env("VARVE_SLOW_VICTIM", orders).env("VARVE_SLOW_PLAN", plan);
            let mut victim = command.spawn().unwrap();
            varve_tests::wait_until(std::time::Duration::from_secs(20), "the programs run", || {
                support::processes(&group).len() == 3
            });
            victim.kill().unwrap();
            victim.wait().unwrap();
            assert_eq!(support::processes(&group).len(), 3, "nobody ends them yet");
            host.undo(mode);
            host.assert_as(&before);
        }
    });
}

/// See [`killed_while_a_program_runs`].
#[test]
fn slow_victim() {
    let Ok(orders) = std::env::var("VARVE_SLOW_VICTIM") else { return };
    let orders: Vec<&str> = orders.split(' ').collect();
    let [mode, dir, group, device] = orders.as_slice() else { panic!("{orders:?}") };
    let mode = if *mode == "test" { Mode::Test } else { Mode::Live };
    let plan = std::env::var("VARVE_SLOW_PLAN").unwrap();
    let runner = support::runner(Path::new(dir), group, Path::new(device), &plan, mode);
    panic!("{:?}", runner.run(&mut quiet));
}
