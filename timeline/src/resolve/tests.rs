use super::*;
use crate::catalogue::PlanError;
use crate::merge::all_addresses;
use crate::testing::{GROUP, History, SECTORS, VOLUMES, changes};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use std::fs;

fn whole(history: &History, plan: &Plan, volume: u16, point: u64) -> Vec<Part> {
    let bytes = SECTORS * SECTOR_BYTES;
    let parts = resolve(plan, volume, 0, bytes, point).expect("whole index");
    history.check(&parts, volume, 0, bytes, point);
    parts
}

fn check_changed(history: &History, plan: &Plan, range: Range<Address>, point: u64) {
    let pieces: Result<Vec<Entry>, _> = changed(plan, range.clone(), point).expect("whole index").collect();
    let pieces = pieces.expect("whole index");
    assert!(pieces.windows(2).all(|pair| pair[0].end() <= pair[1].address), "in order, no overlaps");
    for volume in 0..VOLUMES {
        for sector in 0..SECTORS {
            let address = Address::new(volume, sector);
            let piece = pieces.iter().find(|piece| piece.address <= address && address < piece.end());
            let origin = match piece {
                Some(piece) if piece.stored == Stored::Zero => Origin::Zero,
                Some(piece) => Origin::Record(*piece),
                None => Origin::Replica,
            };
            if range.contains(&address) {
                history.check_sector(&origin, address, point);
            } else {
                assert_eq!(origin, Origin::Replica, "outside");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Every sector at every point, from merged and from unmerged runs, with open index; read in parts; as what changed.
    #[test]
    fn every_point_is_what_the_model_says(changes in changes(150), cuts in prop::collection::vec(0..=SECTORS, 2..6)) {
        let history = History::of(&changes);
        for point in history.points() {
            let (merged, unmerged) = (history.plan(&history.catalogue, point), history.plan(&history.unmerged, point));
            prop_assert!(merged.runs.len() <= unmerged.runs.len());
            for volume in 0..VOLUMES {
                prop_assert_eq!(whole(&history, &merged, volume, point), whole(&history, &unmerged, volume, point));
            }
            for pair in cuts.windows(2) {
                let (start, end) = (pair[0].min(pair[1]) * SECTOR_BYTES, pair[0].max(pair[1]) * SECTOR_BYTES);
                let parts = resolve(&merged, 1, start, end - start, point).expect("whole index");
                history.check(&parts, 1, start, end - start, point);
                // Short enough for the filters.
                for sectors in [1, 8, 100].map(|sectors| sectors.min(SECTORS - pair[0])) {
                    let (start, bytes) = (pair[0] * SECTOR_BYTES, sectors * SECTOR_BYTES);
                    let parts = resolve(&merged, 0, start, bytes, point).expect("whole index");
                    history.check(&parts, 0, start, bytes, point);
                }
            }
        }
        let points = history.points();
        for point in points.iter().step_by(points.len() / 4 + 1) {
            let plan = history.plan(&history.catalogue, *point);
            check_changed(&history, &plan, all_addresses(), *point);
            let part = addresses_of(1, cuts[0].min(cuts[1]) * SECTOR_BYTES, 77 * SECTOR_BYTES).expect("sectors");
            check_changed(&history, &plan, part, *point);
        }
    }

    /// Dropping the oldest layers takes away the points before them and changes no other.
    #[test]
    fn what_is_left_answers_as_before(changes in changes(120), drops in 1usize..20) {
        let mut history = History::of(&changes);
        for _ in 0..drops {
            let Some(dropped) = history.catalogue.drop_oldest() else { break };
            for key in &dropped.runs {
                history.runs.remove(key);
                fs::remove_file(history.dir.path().join(key.file_name())).expect("its file");
            }
        }
        let begin = history.catalogue.begin();
        for point in history.points() {
            match history.catalogue.plan(point) {
                Ok(_) => {
                    prop_assert!(point >= begin);
                    let plan = history.plan(&history.catalogue, point);
                    (0..VOLUMES).for_each(|volume| drop(whole(&history, &plan, volume, point)));
                }
                Err(error) => {
                    prop_assert_eq!(error, PlanError::Expired { begin });
                    prop_assert!(point < begin);
                }
            }
        }
    }
}

/// A damaged index never gives a wrong answer, whichever byte is hit.
#[test]
fn damage_is_an_error_or_changes_nothing() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let changes = changes(400).new_tree(&mut runner).expect("changes").current();
    let history = History::of(&changes);
    let bytes = SECTORS * SECTOR_BYTES;
    for level in 0..=1 {
        let key = history.runs.keys().find(|key| key.level == level).expect("some run of the level");
        let path = history.dir.path().join(key.file_name());
        let good = fs::read(&path).expect("read");
        let point = history.runs[key].head().first_height;
        let plan = |run: Run| Plan { runs: [Arc::new(run)].into(), open: Vec::new() };
        let answers = |run: Run| -> Result<Vec<Vec<Part>>, HistoryError> {
            let plan = plan(run);
            let whole = (0..VOLUMES).map(|volume| resolve(&plan, volume, 0, bytes, point));
            let mut parts: Vec<Vec<Part>> = whole.collect::<Result<_, _>>()?;
            for start in (0..bytes - 4096).step_by(20480) {
                parts.push(resolve(&plan, 0, start, 4096, point)?);
            }
            let tail = plan.runs[0].tail()?;
            let changed: Result<Vec<Entry>, _> = changed(&plan, all_addresses(), point)?.collect();
            assert_eq!(tail.is_empty(), level == 1);
            changed.map(|_| parts)
        };
        let open = || Run::open(&path, GROUP, &Arc::new(crate::cache::IndexCache::new(1 << 16, 2)));
        let expected = answers(open().expect("whole")).expect("whole");
        let mut errors = 0;
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1 << (at % 8);
            fs::write(&path, &bad).expect("write");
            match open().and_then(answers) {
                Ok(parts) => assert_eq!(parts, expected, "byte {at}"),
                Err(_) => errors += 1,
            }
        }
        // All but the zeroes before the footer and after it.
        assert!(errors >= good.len() - 2 * 4096 + 140, "{errors} of {}", good.len());
        for length in (0..good.len()).step_by(512) {
            fs::write(&path, &good[..length]).expect("write");
            assert!(open().is_err(), "cut to {length}");
        }
        fs::remove_file(&path).expect("remove");
        assert!(matches!(open(), Err(HistoryError::Missing { .. })));
        fs::write(&path, &good).expect("write");
        assert_eq!(answers(open().expect("whole")).expect("whole"), expected);
    }
}

#[test]
fn odd_ranges_are_refused() {
    let plan = Plan::default();
    let part = |start, end| Part { start, end, origin: Origin::Replica };
    assert_eq!(resolve(&plan, 3, 512, 1 << 20, 0).expect("range"), [part(512, (1 << 20) + 512)]);
    assert_eq!(resolve(&plan, 3, 512, 0, 0).expect("range"), []);
    assert!(matches!(resolve(&plan, 3, 1, 512, 0), Err(HistoryError::Range { .. })));
    assert!(matches!(resolve(&plan, 3, 0, 513, 0), Err(HistoryError::Range { .. })));
    assert!(matches!(resolve(&plan, 3, u64::MAX - 511, 512, 0), Err(HistoryError::Range { .. })));
    assert!(matches!(resolve(&plan, 3, 0, (1 << 20) + 512, 0), Err(HistoryError::Limit { .. })));
}
