//! A planned switch-over under load and back: not one commit is missing.

use crate::bed::*;
use crate::ledger::{self, Era, Load};
use rand::Rng;
use std::os::unix::fs::PermissionsExt;
use varve_tests::*;

/// What an operator's unit would do: stop the database, which removes its lock file last, and unmount.
fn quiesce_hook(bed: &Bed, database: &Database) {
    let dir = bed.pair.production.root().join("etc/varve/hooks");
    std::fs::create_dir_all(&dir).unwrap();
    let place = database.mounted_at().display();
    let text = format!(
        "#!/bin/sh\nlock={place}/data/postmaster.pid\nkill -INT $(head -n 1 $lock) || exit 1\n\
         while [ -e $lock ]; do sleep 0.02; done\nuntil umount {place} 2>/dev/null; do sleep 0.02; done\n"
    );
    let path = dir.join("quiesce");
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
}

#[test]
fn planned_there_and_back_nothing_is_missing() {
    let (mut bed, mut database) = Bed::new();
    let mut eras: Vec<Era> = Vec::new();
    for round in 0..rounds() {
        bed.say(&format!("--- round {round}"));
        quiesce_hook(&bed, &database);
        bed.some_line();
        let (era, clients) = (bed.era(), bed.rng.random_range(2..5));
        let load = Load::start(&database.postgres, era, clients, &mut bed.rng);
        load.wait_more(if soak() { bed.rng.random_range(50..2000) } else { 300 });
        let (there, reply) = bed.take_over(&["--planned"]);
        eras.push(load.gone());
        database.stopped_by_hook();
        bed.say(&format!("{} acknowledged, {}", eras.last().unwrap().acknowledged(), reply["planned"]));
        assert!(!there.recovered(), "it was shut down");
        let rows = ledger::read(&there.postgres);
        ledger::assert_exactly(&rows, &eras.iter().collect::<Vec<_>>(), "after the switch-over");
        // What was asked for and not acknowledged is there or not, and stays so.
        eras.last_mut().unwrap().settle(&rows);
        there.postgres.amcheck();

        let (era, clients) = (bed.era(), bed.rng.random_range(2..5));
        let load = Load::start(&there.postgres, era, clients, &mut bed.rng);
        load.wait_more(100);
        bed.line_back();
        let (home, era) = bed.go_home(&[], |bed| {
            bed.sleep_up_to(500);
            load.wait_more(50);
            let era = load.finish();
            there.stop();
            era
        });
        eras.push(era);
        assert!(!home.recovered(), "it was shut down");
        let rows = ledger::read(&home.postgres);
        ledger::assert_exactly(&rows, &eras.iter().collect::<Vec<_>>(), "at home");
        home.postgres.amcheck();
        bed.say(&format!("at home: {} rows of {} eras", rows.len(), eras.len()));
        bed.line.set(Conditions::default());
        eras.push(bed.works_at_home(home));
        if round + 1 == rounds() {
            break;
        }
        database = bed.next_round(&mut eras);
    }
}
