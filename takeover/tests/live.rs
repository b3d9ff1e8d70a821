//! A takeover for real, in namespaces that stand for the host.
#![allow(clippy::unwrap_used, reason = "a test's broken assumption is a panic with a line number")]

mod support;

use support::{Host, PLAN, on_a_host_of_its_own, outcomes, quiet};
use varve_takeover::{Mode, Outcome};

#[test]
fn every_step_is_done_and_taken_back() {
    on_a_host_of_its_own(|| {
        let host = Host::new("live");
        let before = host.seen();
        let runner = host.runner(PLAN, Mode::Live);
        let dry = runner.dry_run();
        assert_eq!(dry.problems, []);
        host.assert_as(&before);

        let report = runner.run(&mut quiet).unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert_eq!(report.checks, 2);
        assert!(report.rto_seconds.is_some_and(|rto| rto > 0.0 && rto < 30.0), "{report}");
        assert!(outcomes(&report).iter().all(|outcome| outcome.ends_with(" done")), "{report}");
        assert_ne!(host.seen(), before);
        println!("{dry}\n{report}");

        let again = runner.run(&mut quiet).expect_err("it is in place");
        assert!(again.why.contains("still in place"), "{again}");

        println!("{}", host.undo(Mode::Live));
        host.assert_as(&before);
        let nothing = varve_takeover::undo(&host.undoing(Mode::Live), &mut quiet).expect_err("nothing is left");
        assert_eq!(nothing.kind.exit_code(), 5);
    });
}
