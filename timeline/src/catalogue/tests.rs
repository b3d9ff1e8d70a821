use super::*;
use crate::entry::Stored;
use crate::testing::{Change, GROUP, History, Then};
use std::fs;

fn layer(number: u32) -> LayerInfo {
    LayerInfo {
        number,
        first_height: u64::from(number) * 100,
        last_height: u64::from(number) * 100 + 100,
        first_time_ns: 0,
        last_time_ns: 0,
        bytes: 10,
        records: 5,
        open: true,
    }
}

/// Layers 1 to `count`, all merges made, and an open one.
fn catalogue(count: u32) -> Catalogue {
    let mut catalogue = Catalogue::new();
    for number in 1..=count + 1 {
        catalogue.set_layer(layer(number)).expect("room");
        if number <= count {
            catalogue.add_run(RunKey::of_layer(number));
        }
        for key in catalogue.due_merges() {
            catalogue.add_run(key);
        }
    }
    while let Some(key) = catalogue.due_merges().first() {
        catalogue.add_run(*key);
    }
    catalogue
}

fn names(plan: &[RunKey]) -> Vec<(u8, u32)> {
    plan.iter().map(|key| (key.level, key.first)).collect()
}

/// A long change closes a layer with its stamp, and the next one is begun before the change is complete.
#[test]
fn the_layer_with_the_highest_stamp_is_found_behind_one_that_begins_below_it() {
    for before in 1..9 {
        let mut catalogue = catalogue(before);
        let closed = LayerInfo { last_height: 5000, open: false, ..layer(before + 1) };
        let begun = LayerInfo { first_height: 950, last_height: 950, ..layer(before + 2) };
        catalogue.set_layer(closed).expect("room");
        catalogue.set_layer(begun).expect("room");
        let found = catalogue.first_needed(4000).map(|layer| layer.number);
        assert_eq!(found, Some(before + 1), "behind {before}");
        assert!(catalogue.first_needed(5000).is_none());
    }
}

#[test]
fn a_plan_has_few_runs_and_all_layers() {
    for count in [0, 1, 7, 8, 9, 63, 64, 65, 600, 5000] {
        let catalogue = catalogue(count);
        for number in (1..=count + 1).step_by(if count > 1000 { 97 } else { 1 }) {
            for (point, holds) in [(u64::from(number) * 100, 0), (u64::from(number) * 100 + 50, 1)] {
                let plan = catalogue.plan(point).expect("all is there");
                let mut next = number;
                for (index, key) in plan.iter().enumerate() {
                    assert_eq!(key.first, next, "without holes");
                    assert!(key.level == 0 || index >= holds, "the layer of the point has all its entries");
                    next = key.end();
                }
                assert_eq!(next, count + 1, "up to the open layer");
                let levels = f64::from(count + 1).log(8.0).ceil() as usize + 1;
                assert!(plan.len() <= 14 * levels, "{} runs of {count}", plan.len());
            }
        }
    }
    let catalogue = catalogue(20);
    assert_eq!(
        names(&catalogue.plan(550).expect("plan")),
        [(0, 5), (0, 6), (0, 7), (1, 8), (0, 16), (0, 17), (0, 18), (0, 19), (0, 20)]
    );
    assert_eq!(names(&catalogue.plan(800).expect("plan"))[0], (1, 8));
    assert_eq!(names(&catalogue.plan(799).expect("plan"))[..2], [(0, 7), (1, 8)]);
    assert_eq!(names(&catalogue.plan(801).expect("plan"))[..2], [(0, 8), (0, 9)]);
    assert_eq!(names(&catalogue.plan(2150).expect("plan")), [], "the open one is in memory");
    assert_eq!(names(&catalogue.plan(u64::MAX).expect("plan")), []);
    assert_eq!(catalogue.plan(99), Err(PlanError::Expired { begin: 100 }));
}

#[test]
fn a_hole_takes_away_only_the_points_before_it() {
    let mut lost = catalogue(30);
    lost.layers.remove(&20);
    lost.forget_run(RunKey::of_layer(20));
    lost.forget_run(RunKey { level: 1, first: 16 });
    assert_eq!(lost.plan(1050), Err(PlanError::MissingLayer(20)));
    assert_eq!(lost.plan(2050), Err(PlanError::MissingLayer(20)), "the point is in it");
    assert_eq!(names(&lost.plan(2100).expect("after it"))[0], (0, 21));
    let mut lost = catalogue(30);
    lost.forget_run(RunKey::of_layer(20));
    assert_eq!(lost.plan(2050), Err(PlanError::MissingRun(20)));
    assert!(lost.plan(1500).expect("a merged run has it").contains(&RunKey { level: 1, first: 16 }));
    lost.forget_run(RunKey { level: 1, first: 8 });
    assert_eq!(lost.due_merges(), [RunKey { level: 1, first: 8 }], "made again");
    assert!(lost.plan(850).is_ok());
}

#[test]
fn runs_go_with_their_first_layer() {
    let mut catalogue = catalogue(80);
    let mut removed = Vec::new();
    let mut dropped = Vec::new();
    while let Some(gone) = catalogue.drop_oldest() {
        let begin = catalogue.layers().next().expect("the open one").first_height;
        assert!(catalogue.plan(begin).is_ok());
        dropped.push(gone.layer.number);
        removed.extend(gone.runs);
        assert!(catalogue.due_merges().is_empty(), "nothing is made of what is gone");
    }
    assert_eq!(dropped, (1..=80).collect::<Vec<_>>());
    assert_eq!(catalogue.runs().count(), 0);
    assert_eq!(removed.len(), 80 + 9);
    assert_eq!(catalogue.layers().len(), 1, "the open layer stays");
}

#[test]
fn loading_names_what_is_wrong_and_goes_on() {
    let change = |index: u64| Change {
        volume: 0,
        sector: index % 50,
        sectors: 3,
        step: 8,
        stored: Stored::Plain,
        then: Then::Layer,
    };
    let changes: Vec<Change> = (0..70).map(change).collect();
    let history = History::of(&changes);
    let dir = history.dir.path();
    let layers: BTreeSet<u32> = (1..=71).collect();
    let loaded = load(dir, GROUP, &layers, &history.cache).expect("load");
    assert_eq!(loaded.unindexed, [71], "the open one");
    assert_eq!(loaded.runs.len(), history.runs.len());
    assert!(loaded.damaged.is_empty() && loaded.left_over.is_empty() && loaded.unknown.is_empty());
    let closed: Vec<_> = history.catalogue.layers().filter(|layer| !layer.open).copied().collect();
    let found: Vec<_> = loaded.catalogue.layers().copied().collect();
    assert_eq!(found, closed, "all is in the footers");

    fs::write(dir.join("L0-0000000005.run"), b"short").expect("write");
    fs::write(dir.join("L1-0000000016.run"), vec![0; 8192]).expect("write");
    fs::write(dir.join("notes.txt"), b"mine").expect("write");
    fs::remove_file(dir.join("L0-0000000009.run")).expect("remove");
    fs::copy(dir.join("L0-0000000006.run"), dir.join("L0-0000000007.run")).expect("copy");
    let layers: BTreeSet<u32> = (2..=71).collect();
    let loaded = load(dir, GROUP, &layers, &history.cache).expect("load");
    assert_eq!(loaded.unindexed, [5, 7, 9, 71]);
    assert_eq!(loaded.damaged.len(), 3, "{:?}", loaded.damaged);
    assert_eq!(loaded.left_over, [dir.join("L0-0000000001.run")]);
    assert_eq!(loaded.unknown, [dir.join("notes.txt")]);
    assert_eq!(loaded.catalogue.due_merges(), [RunKey { level: 1, first: 16 }], "merged again");
}
