//! An outage longer than ring and journal last.

use super::bed::*;
use std::time::Duration;
use varve_tests::*;

/// A gap with its reason and time; the last good point stays; the dirty regions go while new writes flow; it ends.
#[test]
fn an_outage_beyond_ring_and_journal_is_a_gap_that_closes() {
    let mut bed = Bed::new(96 << 20, "ring_mib = 8\njournal_max_mib = 64\n");
    let writer = bed.writer(20 << 20);
    let memory_before = bed.pair.production.resident_bytes(Role::Agent);
    bed.line.cut(true);
    std::thread::sleep(Duration::from_millis(500));
    bed.bookmark(&writer, "before");
    wait_until(LIMIT, "a gap begins", || bed.status()["gap_reason"] == "ring-full");
    // Until the silence is noticed, the regions are on their way as far as the agent knows.
    wait_until(LIMIT, "nothing is said to be sent", || bed.assert_answers().0["data"] == "gap");
    bed.pair.production.varve(&["bookmark", GROUP, "inside"]).expect_code(3);
    std::thread::sleep(Duration::from_secs(if soak() { 120 } else { 12 }));
    let memory = bed.pair.production.resident_bytes(Role::Agent);
    // The ring is mapped twice, and frames, regions and chunks have their pools.
    assert!(memory < memory_before + (96 << 20), "from {memory_before} to {memory} bytes in an outage");
    let (agent, _) = bed.assert_answers();
    assert!(agent["rpo_seconds"].as_f64().unwrap() > 8.0, "{agent:#}");
    // What can be kept up with, while the regions are sent.
    writer.set_rate(4 << 20);
    bed.line.cut(false);
    let mut done = 0;
    wait_until(LIMIT, "the gap closes", || {
        let (agent, _) = bed.assert_answers();
        let now = agent["resync"]["done_bytes"].as_u64().unwrap_or(done);
        if now < done {
            // Only a new overflow takes back what was done.
            eprintln!("resync went back from {done} to {now}");
        }
        done = now;
        agent["data"] == "protected"
    });
    bed.bookmark(&writer, "after");
    let slowest = writer.stop();
    assert!(slowest < HELD, "nobody held the writer: {slowest:?}");
    bed.assert_equal();
    bed.assert_bookmarks();
    let points = bed.pair.recovery.varve(&["points", GROUP, "--json"]).ok().json();
    let gaps = points["gaps"].as_array().unwrap();
    let gap = gaps.iter().rfind(|gap| gap["reason"] == "ring-full").expect("the gap is known there");
    let [from, to] = ["from", "to"].map(|key| gap[key].as_str().unwrap_or_else(|| panic!("no {key}: {gap:#}")));
    assert!(from < to, "{gap:#}");
    // Its end is a point, and nothing before it is.
    let answer = bed.pair.recovery.varve(&["view", "open", GROUP, "--at", to, "--json"]).ok().json();
    assert_eq!(answer["point"]["distance_seconds"].as_f64(), Some(0.0), "{answer:#}");
    bed.pair.recovery.varve(&["view", "close", &answer["id"].to_string()]).ok();
}
