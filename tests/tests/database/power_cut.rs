//! The source is gone without a warning. What is missing at the recovery side is what was written since the point that is
//! there, as was said before anybody had to decide; and none of the rest is lost, there and back.

use crate::bed::*;
use crate::ledger::{self, Era, Load};
use rand::Rng;
use serde_json::Value;
use varve_tests::*;

fn time_ns(text: &Value) -> u64 {
    let time: jiff::Timestamp = text.as_str().unwrap().parse().unwrap();
    time.as_nanosecond() as u64
}

fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// The receiver knows what it was told, and sees by its dates that something comes late: when a sign of life is overdue.
const HEARD_SLACK_NS: u64 = 2_000_000_000;

/// The RPO that a side shows, and since when nothing is missing if that is so. `None`: it says that it does not know.
fn shown(side: &Installation) -> Option<(f64, u64)> {
    let asked = ledger::now_ns();
    let rpo = side.group(GROUP).expect("the group")["rpo_seconds"].as_f64()?;
    Some((rpo, asked.saturating_sub((rpo * 1e9) as u64)))
}

fn rpo_text(shown: Option<(f64, u64)>) -> String {
    shown.map_or_else(|| "unknown".to_owned(), |(rpo, _)| format!("{rpo:.3} s"))
}

#[test]
fn what_a_power_cut_loses_is_what_was_said_and_the_rest_comes_home() {
    let (mut bed, mut database) = Bed::with_slow_recovery();
    let mut eras: Vec<Era> = Vec::new();
    for round in 0..rounds() {
        bed.say(&format!("--- round {round}"));
        let (era, clients) = (bed.era(), bed.rng.random_range(2..5));
        bed.some_line();
        let load = Load::start(&database.postgres, era, clients, &mut bed.rng);
        load.wait_more(if soak() { bed.rng.random_range(50..2000) } else { 300 });

        // The line goes first, a moment later the host: so there is something that only it has.
        // The receiver's may still be from before the first point.
        let (agents, receivers) = (shown(&bed.pair.production), shown(&bed.pair.recovery));
        assert!(agents.is_some(), "a source that is protected knows its RPO");
        bed.line.cut(true);
        let line_cut = ledger::now_ns();
        bed.sleep_up_to(700);
        load.wait_more(20);
        bed.pair.production.kill(Role::Agent);
        database.kill();
        let cut = ledger::now_ns();
        let mut before = load.gone();
        if round % 2 == 0 {
            // After a reboot nothing of the capture is left; else it was only the agent and the database.
            run(bed.pair.production.command(Role::Agent).arg("--unpin-all")).ok();
        }
        if soak() {
            bed.sleep_up_to(12_000);
        }

        let looked = ledger::now_ns();
        let plan = bed.on_recovery(&["failover", GROUP, "--dry-run"]);
        let age = plan["newest_age_seconds"].as_f64().expect("the age of the newest point");
        let point = time_ns(&plan["newest"]["time"]);
        let words = bed.pair.recovery.varve(&["failover", GROUP, "--dry-run"]).ok().stdout;
        assert!(words.contains("not here: what was written since the newest point, "), "{words}");
        let (database_there, reply) = bed.take_over(&[]);
        // The source may have been heard of a moment ago. That it is dead shows soon.
        let waited = reply["drained"]["seconds"].as_f64().unwrap_or_default();
        assert!(waited < 2.5, "a dead source was waited for {waited} s");
        assert_eq!(reply["point"]["position"], plan["point"]["position"], "nothing came meanwhile");
        assert!(database_there.recovered(), "{}", database_there.postgres.log());
        let rows = ledger::read(&database_there.postgres);

        let missing = before.assert_cut_at(&rows, point, SLACK_NS);
        let oldest = missing.iter().filter_map(|(_, commit)| commit.acked_ns).min().expect("something is missing");
        bed.say(&format!(
            "{} acknowledged, {} missing, the oldest {:.3} s before the end, {:.3} s before the line was cut; shown before: RPO {} at the source, {} here; shown for the failover: {:.3} s of it before the end",
            before.acknowledged(),
            missing.len(),
            seconds(cut - oldest),
            seconds(line_cut.saturating_sub(oldest)),
            rpo_text(agents),
            rpo_text(receivers),
            seconds(cut - point),
        ));
        // The same in the words that the operator sees.
        let said = looked.saturating_sub((age * 1e9) as u64);
        assert!(said <= point + SLACK_NS && point <= said + 1_000_000_000, "the point's age was given as {age} s");
        assert!(
            oldest + SLACK_NS > said,
            "a commit is missing that is {:.3} s older than said",
            seconds(said - oldest)
        );
        // What was not on its way when the line was whole is here.
        for (shown, slack) in [(agents, SLACK_NS), (receivers, HEARD_SLACK_NS)] {
            let Some((rpo, safe)) = shown else { continue };
            assert!(oldest + slack > safe, "missing, {:.3} s older than the RPO of {rpo} s", seconds(safe - oldest));
        }

        // What is missing was declared lost. The rest has to be there from now on.
        before.settle(&rows);
        eras.push(before);
        database_there.postgres.amcheck();
        let era = bed.era();
        let load = Load::start(&database_there.postgres, era, 6, &mut bed.rng);
        load.wait_more(if soak() { bed.rng.random_range(1..500) } else { 100 });
        load.hurry();
        load.wait_more(100);
        let database_there = bed.receiver_killed(database_there);
        let mut era = load.gone();
        let rows = ledger::read(&database_there.postgres);
        era.assert_whole(&rows, "after a kill of the receiver");
        bed.say(&format!("{} acknowledged there, the receiver killed, all of them there", era.acknowledged()));
        era.settle(&rows);
        eras.push(era);

        let (era, clients) = (bed.era(), bed.rng.random_range(2..5));
        let load = Load::start(&database_there.postgres, era, clients, &mut bed.rng);
        load.wait_more(20);
        bed.line_back();
        bed.pair.production.start(Role::Agent);
        bed.wait_fenced();
        let look = bed.on_recovery(&["failback", GROUP, "--dry-run"]);
        assert!(look["branch_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{look:#}");

        let (home, there) = bed.go_home(&[], |bed| {
            bed.sleep_up_to(500);
            load.wait_more(50);
            let there = load.finish();
            database_there.stop();
            there
        });
        assert!(!home.recovered(), "it was shut down");
        eras.push(there);
        let rows = ledger::read(&home.postgres);
        ledger::assert_exactly(&rows, &eras.iter().collect::<Vec<_>>(), "at home");
        home.postgres.amcheck();
        bed.say(&format!(
            "at home: {} rows of {} eras, all that was acknowledged and not declared lost",
            rows.len(),
            eras.len()
        ));
        bed.line.set(Conditions::default());
        eras.push(bed.works_at_home(home));
        if round + 1 == rounds() {
            break;
        }
        database = bed.next_round(&mut eras);
    }
}
