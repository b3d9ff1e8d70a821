//! Lines that break, and ends that move.

use super::bed::*;
use rand::Rng;
use std::time::{Duration, Instant};
use varve_tests::*;

/// Short cuts end no session; long ones and deaths do, and the stream goes on at the durable position.
#[test]
fn whatever_is_cut_or_moved_nothing_acknowledged_is_sent_again() {
    let mut bed = Bed::new(64 << 20, "ring_mib = 64\njournal_max_mib = 512\n");
    let mut rng = bed.seed.rng();
    let writer = bed.writer(4 << 20);
    let sessions = bed.sessions();

    // Milliseconds, and another address of the agent under load: QUIC's business alone.
    // A line that is away for most of a minute is another matter: between two tries to reach the other end it may seem dead.
    for _ in 0..if soak() { 10 } else { 1 } {
        for round in 0..6 {
            bed.line.cut(true);
            std::thread::sleep(Duration::from_millis(rng.random_range(1..800)));
            bed.line.cut(false);
            if round % 2 == 0 {
                bed.line.move_agent();
            }
            std::thread::sleep(Duration::from_millis(rng.random_range(1..400)));
        }
        bed.wait_caught_up();
    }
    assert_eq!(bed.sessions(), sessions, "no session ended");
    writer.held(|| {
        bed.pair.wait_applied(GROUP, LIMIT);
        bed.assert_sent_once();
    });

    // Half open: what the agent sends arrives and lands, nothing comes back. The receiver knows better where it stands.
    bed.line.cut_way(Way::Down, true);
    std::thread::sleep(Duration::from_millis(rng.random_range(200..1500)));
    bed.bookmark(&writer, "half-open");
    wait_until(SILENCE * 2, "the session is given up", || bed.status()["link"] != "streaming");
    let (agent, _) = bed.assert_answers();
    assert_ne!(agent["data"], "protected");
    bed.bookmark(&writer, "in-the-dark");
    bed.session_lost();
    bed.line.cut_way(Way::Down, false);
    let took = bed.wait_streaming(LIMIT);
    assert!(took < Duration::from_secs(25), "the back-off has a bound: {took:?}");
    bed.wait_caught_up();
    assert_eq!(bed.sessions(), sessions + 1, "one session more, no loop");

    // Killed, and found again at another port: an operator's change of the file, and a restart of the agent.
    bed.pair.recovery.kill(Role::Receiver);
    bed.bookmark(&writer, "receiver-dead");
    wait_until(LIMIT, "the agent knows", || bed.status()["link"] != "streaming");
    bed.session_lost();
    bed.pair.recovery.start(Role::Receiver);
    bed.wait_caught_up();
    writer.held(|| {
        bed.pair.wait_applied(GROUP, LIMIT);
        bed.assert_sent_once();
    });
    bed.pair.recovery.stop(Role::Receiver);
    let address = format!("127.0.0.1:{}", free_port());
    Bed::configure(&bed.pair.recovery.root().join("etc/varve/receiver.toml"), "listen", &format!("\"{address}\""));
    bed.pair.recovery.start(Role::Receiver);
    bed.bookmark(&writer, "receiver-moved");
    Bed::configure(&bed.pair.production.root().join("etc/varve/agent.toml"), "receiver", &format!("\"{address}\""));
    bed.pair.production.restart(Role::Agent);
    bed.wait_caught_up();
    let slowest = writer.stop();
    assert!(slowest < HELD, "nobody held the writer: {slowest:?}");
    bed.assert_whole();
    bed.assert_bookmarks();
    assert_eq!(bed.counter("image_bytes"), 0, "nothing was read from the volume");
}

/// Answers that come from where nobody was asked are not believed, and the session goes on when they stop.
#[test]
fn answers_from_elsewhere_are_not_believed() {
    let mut bed = Bed::new(32 << 20, "");
    let writer = bed.writer(1 << 20);
    let sessions = bed.sessions();
    bed.line.answer_from_elsewhere(true);
    wait_until(SILENCE * 2, "the session is given up", || bed.status()["link"] != "streaming");
    bed.bookmark(&writer, "elsewhere");
    bed.session_lost();
    bed.line.move_agent();
    bed.line.answer_from_elsewhere(false);
    bed.wait_caught_up();
    assert_eq!(bed.sessions(), sessions + 1, "one session more, no loop");
    drop(writer);
    bed.assert_whole();
    bed.assert_sent_once();
    bed.assert_bookmarks();
}

/// An agent that is killed again and again is let in at once when it stays.
#[test]
fn a_crash_loop_is_not_kept_out_afterwards() {
    let mut bed = Bed::new(32 << 20, "");
    let writer = bed.writer(2 << 20);
    let mut rng = bed.seed.rng();
    for _ in 0..if soak() { 100 } else { 14 } {
        bed.pair.production.kill(Role::Agent);
        bed.pair.production.start(Role::Agent);
        std::thread::sleep(Duration::from_millis(rng.random_range(0..250)));
    }
    let begun = Instant::now();
    bed.wait_streaming(LIMIT);
    let took = begun.elapsed();
    eprintln!("it streams {took:?} after the last start");
    assert!(took < Duration::from_secs(8), "{took:?}");
    bed.bookmark(&writer, "after-the-loop");
    drop(writer);
    bed.assert_whole();
    bed.assert_bookmarks();
}
