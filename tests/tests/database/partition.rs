//! Both sides are cut from each other, and both run their database: only one of them writes the history of each epoch, and what
//! the other one wrote is kept apart, whole.

use crate::bed::*;
use crate::ledger::{self, Era, Load};
use rand::Rng;
use varve_tests::*;

#[test]
fn of_two_that_write_one_goes_into_the_history_and_the_other_is_a_branch() {
    let (mut bed, mut database) = Bed::new();
    let mut eras: Vec<Era> = Vec::new();
    for round in 0..rounds() {
        bed.say(&format!("--- round {round}"));
        let (era, clients) = (bed.era(), bed.rng.random_range(2..4));
        bed.some_line();
        let theirs = Load::start(&database.postgres, era, clients, &mut bed.rng);
        theirs.wait_more(if soak() { bed.rng.random_range(50..1000) } else { 200 });
        bed.line.cut(true);
        bed.sleep_up_to(if soak() { 12_000 } else { 500 });
        let (there, reply) = bed.take_over(&[]);
        let split = ledger::read(&there.postgres);
        let (era, clients) = (bed.era(), bed.rng.random_range(2..4));
        let ours = Load::start(&there.postgres, era, clients, &mut bed.rng);
        // Both write and know nothing of each other.
        theirs.wait_more(50);
        ours.wait_more(100);
        bed.line_back();
        bed.wait_fenced();
        // The old source's database goes on: it is only refused.
        theirs.wait_more(20);
        ours.wait_more(20);

        // In the history there is up to the point of the split only what the old source wrote, after it only what was written here.
        let time = reply["point"]["time"].as_str().unwrap().to_owned();
        assert_eq!(bed.view(GROUP, &time), split, "the point of the split");
        let latest = bed.view(GROUP, "latest");
        let of = |rows: &ledger::Rows, number: u32| rows.keys().filter(|(era, ..)| *era == number).count();
        assert_eq!(of(&latest, era - 1), of(&split, era - 1), "the old source wrote into the history");
        assert!(of(&latest, era) >= 120, "{} of what was written here", of(&latest, era));

        bed.say("the history is whole");
        let theirs = theirs.finish();
        let expected: Vec<&Era> = eras.iter().chain([&theirs]).collect();
        ledger::assert_exactly(&ledger::read(&database.postgres), &expected, "at the old source");
        if round % 2 == 0 {
            database.stop();
        } else {
            database.kill();
        }
        let look = bed.on_recovery(&["failback", GROUP, "--dry-run"]);
        assert!(look["branch_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{look:#}");
        let branch = format!("old{round}");
        bed.say("the old source's database is stopped");
        let (home, ours) = bed.go_home(&["--keep-branch", &branch], |bed| {
            ours.wait_more(50);
            // Everything that the old source ever acknowledged, and nothing of here.
            ledger::assert_exactly(&bed.view(&branch, "latest"), &expected, "the branch");
            assert_eq!(bed.view(&branch, "bookmark:split"), split, "the branch's point of the split");
            bed.say("the branch is whole");
            let ours = ours.finish();
            there.stop();
            ours
        });
        let mut kept = theirs.clone();
        kept.settle(&split);
        bed.say(&format!(
            "{} acknowledged at the old source, {} of them before the split; {} here",
            theirs.acknowledged(),
            kept.acknowledged(),
            ours.acknowledged()
        ));
        eras.extend([kept, ours]);
        ledger::assert_exactly(&ledger::read(&home.postgres), &eras.iter().collect::<Vec<_>>(), "at home");
        home.postgres.amcheck();
        bed.line.set(Conditions::default());
        eras.push(bed.works_at_home(home));
        bed.pair.recovery.varve(&["forget", &branch, "--yes"]).ok();
        if round + 1 == rounds() {
            break;
        }
        database = bed.next_round(&mut eras);
    }
}
