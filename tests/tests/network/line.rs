//! Lines that are bad, not broken.

use super::bed::*;
use std::time::{Duration, Instant};
use varve_tests::*;

/// 5 % loss, reordering, repeats, 300 ms there and back, then 1 Mbit/s under more than that.
#[test]
fn a_bad_line_makes_it_slow_and_nothing_else() {
    let mut bed = Bed::new(64 << 20, "");
    let sessions = bed.sessions();
    let ms = Duration::from_millis;
    bed.line.set(Conditions {
        loss: 0.05,
        duplicate: 0.02,
        reorder: 0.05,
        held: ms(30),
        latency: ms(150),
        jitter: ms(20),
        ..Conditions::default()
    });
    let writer = bed.writer(200_000);
    let watch = |bed: &Bed, time: Duration| {
        let (begun, mut worst) = (Instant::now(), 0f64);
        while begun.elapsed() < time {
            let (agent, _) = bed.assert_answers();
            worst = worst.max(agent["rpo_seconds"].as_f64().unwrap());
            std::thread::sleep(ms(100));
        }
        worst
    };
    let mut worst = watch(&bed, Duration::from_secs(if soak() { 120 } else { 8 }));
    // On such a line little goes out in a second: until each kind of damage was met.
    wait_until(LIMIT, "the line did all that it was told to", || {
        worst = worst.max(watch(&bed, ms(500)));
        let tally = bed.line.tally(Way::Up);
        tally.lost > 0 && tally.reordered > 0 && tally.duplicated > 0
    });
    bed.bookmark(&writer, "lossy");
    eprintln!("RPO at most {worst:.1} s on the lossy line; up {:?}", bed.line.tally(Way::Up));
    // Half a round trip and what is lost again and again.
    assert!(worst > 0.1, "300 ms there and back are seen");

    // More than fits: it lags and says so, and it is over when it is over.
    bed.line.set(Conditions { latency: ms(20), ..Conditions::bandwidth(1_000_000) });
    writer.set_rate(1_000_000);
    let worst = watch(&bed, Duration::from_secs(if soak() { 60 } else { 8 }));
    let (agent, receiver) = bed.assert_answers();
    assert_eq!((&agent["data"], &agent["watch"]["flow"]), (&"lagging".into(), &"lagging".into()), "{agent:#}");
    assert_ne!(receiver["data"], "protected", "{receiver:#}");
    assert!(worst > 3.0, "RPO grows: {worst}");
    bed.bookmark(&writer, "narrow");
    let written = writer.stop();
    assert!(written < HELD, "nobody held the writer: {written:?}");
    bed.line.set(Conditions::default());
    let (mut before, mut rises) = (bed.rpo(), 0);
    wait_until(LIMIT, "it has caught up", || {
        let (agent, _) = bed.assert_answers();
        let now = agent["rpo_seconds"].as_f64().unwrap();
        rises += u32::from(now > before + 1.0);
        before = now;
        agent["data"] == "protected"
    });
    assert!(rises <= 5, "RPO falls: it rose {rises} times");
    assert_eq!(bed.sessions(), sessions, "no session ended");
    bed.assert_whole();
    bed.assert_sent_once();
    bed.assert_bookmarks();
    wait_until(LIMIT, "the alerts go", || bed.alerts(&bed.pair.production).is_empty());
}

/// The receiver takes everything and acknowledges nothing: its disk hangs. It is told, and both sides answer.
#[test]
fn a_receiver_that_acknowledges_nothing_is_told() {
    let scratch = Scratch::disk();
    let disk = LoopDevice::new(&scratch, "disk", 1 << 30);
    let mount = Mount::format(&scratch, "mnt", Filesystem::Ext4, disk.path());
    let mut bed = Bed::with_recovery(64 << 20, "", Installation::inside(mount.path()));
    let sessions = bed.sessions();
    let writer = bed.writer(2_000_000);
    std::thread::sleep(Duration::from_secs(1));
    mount.frozen(|| {
        let begun = Instant::now();
        wait_until(Duration::from_secs(30), "no-ack is told", || {
            let (agent, _) = bed.assert_answers();
            agent["alerts"].as_array().unwrap().iter().any(|alert| alert["id"] == "no-ack")
        });
        let took = begun.elapsed();
        assert!((Duration::from_secs(4)..Duration::from_secs(12)).contains(&took), "{took:?}");
        let (agent, _) = bed.assert_answers();
        assert_eq!((&agent["link"], &agent["watch"]["flow"]), (&"streaming".into(), &"stalled".into()), "{agent:#}");
        assert_ne!(agent["data"], "protected");
        let alerts = agent["alerts"].as_array().unwrap();
        let text = alerts.iter().find(|alert| alert["id"] == "no-ack").unwrap()["text"].as_str().unwrap().to_owned();
        assert!(text.contains("acknowledged"), "{text}");
        bed.bookmark(&writer, "stalled");
    });
    bed.wait_caught_up();
    let slowest = writer.stop();
    assert!(slowest < HELD, "nobody held the writer: {slowest:?}");
    assert_eq!(bed.sessions(), sessions, "no session ended");
    bed.assert_whole();
    bed.assert_sent_once();
    bed.assert_bookmarks();
    wait_until(LIMIT, "the alert goes", || bed.alerts(&bed.pair.production).is_empty());
}
