use super::*;

const MS: Duration = Duration::from_millis(1);

fn decide_all(lane: &mut Lane, count: u32, bytes: usize, every: Duration) -> Vec<[Option<Duration>; 2]> {
    (0..count).map(|number| lane.decide(every * number, bytes)).collect()
}

fn lane(seed: u64, conditions: Conditions) -> Lane {
    Lane { conditions, ..Lane::new(seed) }
}

#[test]
fn the_same_seed_gives_the_same_line() {
    let bad = Conditions {
        loss: 0.05,
        duplicate: 0.02,
        reorder: 0.05,
        held: 20 * MS,
        latency: 300 * MS,
        jitter: 50 * MS,
        ..Conditions::bandwidth(10_000_000)
    };
    let play = |seed| decide_all(&mut lane(seed, bad), 2000, 1200, MS);
    assert_eq!(play(7), play(7));
    assert_ne!(play(7), play(8));
    // The same dice for the n-th, whatever the conditions were before: the lost ones are lost among others.
    let lost = |conditions| -> Vec<bool> {
        let all = decide_all(&mut lane(7, conditions), 2000, 1200, MS);
        all.iter().map(|arrivals| arrivals[0].is_none()).collect()
    };
    let (five, ten) =
        (lost(Conditions { loss: 0.05, ..Default::default() }), lost(Conditions { loss: 0.1, ..bad_without(bad) }));
    assert!(five.iter().zip(&ten).all(|(five, ten)| !five || *ten));
}

fn bad_without(bad: Conditions) -> Conditions {
    Conditions { bytes_per_s: None, ..bad }
}

#[test]
fn so_many_are_lost_repeated_and_reordered_as_was_asked() {
    let mut lane =
        lane(1, Conditions { loss: 0.05, duplicate: 0.1, reorder: 0.2, held: 5 * MS, ..Conditions::default() });
    let all = decide_all(&mut lane, 20_000, 100, MS);
    let tally = lane.tally;
    assert_eq!((tally.datagrams, tally.bytes, tally.overflowed), (20_000, 2_000_000, 0));
    let lost = all.iter().filter(|arrivals| arrivals[0].is_none()).count() as u64;
    assert_eq!(lost, tally.lost);
    for (count, of) in [(tally.lost, 1000.0), (tally.duplicated, 1900.0), (tally.reordered, 3800.0)] {
        assert!((count as f64 - of).abs() < of / 5.0, "{tally:?}");
    }
    let firsts: Vec<Duration> = all.iter().filter_map(|arrivals| arrivals[0]).collect();
    assert!(!firsts.is_sorted(), "some were passed by others");
}

#[test]
fn latency_is_kept_and_jitter_keeps_the_order() {
    let mut lane = lane(2, Conditions { latency: 300 * MS, jitter: 100 * MS, ..Conditions::default() });
    let all = decide_all(&mut lane, 1000, 100, MS);
    let firsts: Vec<Duration> = all.iter().filter_map(|arrivals| arrivals[0]).collect();
    assert_eq!(firsts.len(), 1000);
    assert!(firsts.is_sorted());
    for (number, due) in (0..).zip(&firsts) {
        let took = *due - MS * number;
        assert!((300 * MS..=400 * MS).contains(&took), "{took:?}");
    }
}

#[test]
fn the_bandwidth_is_what_it_is_and_its_queue_is_bounded() {
    // 1 Mbit/s gets 8 Mbit/s for ten seconds.
    let mut lane = lane(3, Conditions::bandwidth(1_000_000));
    let all = decide_all(&mut lane, 10_000, 1000, MS);
    let last = all.iter().filter_map(|arrivals| arrivals[0]).max().unwrap();
    let passed = all.iter().filter(|arrivals| arrivals[0].is_some()).count();
    assert_eq!(passed as u64 + lane.tally.overflowed, 10_000);
    let rate = passed as f64 * 8000.0 / last.as_secs_f64();
    assert!((0.98e6..1.02e6).contains(&rate), "{rate}");
    // Nobody waits longer than the queue is.
    for (number, arrivals) in (0u32..).zip(&all) {
        if let Some(due) = arrivals[0] {
            assert!(due - MS * number <= Duration::from_secs_f64(65536.0 / 125_000.0));
        }
    }
    // It is idle for long: no credit is saved up.
    let [due, _] = lane.decide(Duration::from_secs(100), 1000);
    assert_eq!(due, Some(Duration::from_secs(100) + 8 * MS));
}

struct Ends {
    agent: UdpSocket,
    receiver: UdpSocket,
    line: Impair,
}

impl Ends {
    fn new() -> Self {
        let [agent, receiver] = std::array::from_fn(|_| UdpSocket::bind("127.0.0.1:0").unwrap());
        for end in [&agent, &receiver] {
            end.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        }
        let line = Impair::new(&receiver.local_addr().unwrap().to_string(), &Seed::of(5));
        Ends { agent, receiver, line }
    }

    fn ask(&self, word: &[u8]) {
        self.agent.send_to(word, self.line.address()).unwrap();
    }

    fn wait_tally(&self, way: Way, wanted: impl Fn(Tally) -> bool) {
        crate::wait_until(Duration::from_secs(5), "datagrams come", || wanted(self.line.tally(way)));
    }
}

fn hear(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    (buffer[..length].to_vec(), from)
}

#[test]
fn both_ways_dark_ways_and_other_addresses() {
    let ends = Ends::new();
    ends.ask(b"one");
    let (word, first) = hear(&ends.receiver);
    assert_eq!(word, b"one");
    ends.receiver.send_to(b"answer", first).unwrap();
    let (word, from) = hear(&ends.agent);
    assert_eq!((word, from.to_string()), (b"answer".to_vec(), ends.line.address()));

    // The agent is seen elsewhere; answers to where it was go nowhere.
    ends.line.move_agent();
    crate::wait_until(Duration::from_secs(5), "it is seen elsewhere", || {
        ends.ask(b"two");
        hear(&ends.receiver).1 != first
    });
    let before = ends.line.tally(Way::Down).datagrams;
    let _ = ends.receiver.send_to(b"late", first);
    ends.ask(b"three");
    let second = loop {
        let (word, from) = hear(&ends.receiver);
        if word == b"three" {
            break from;
        }
    };
    assert_ne!(first, second);
    assert_eq!(ends.line.tally(Way::Down).datagrams, before);

    // Half open: up it goes, down it does not.
    ends.line.cut_way(Way::Down, true);
    ends.receiver.send_to(b"lost", second).unwrap();
    ends.wait_tally(Way::Down, |tally| tally.lost == 1);
    ends.ask(b"heard");
    assert_eq!(hear(&ends.receiver).0, b"heard");
    ends.line.cut_way(Way::Down, false);

    // From an address that was never asked.
    ends.line.answer_from_elsewhere(true);
    ends.receiver.send_to(b"who?", second).unwrap();
    let (word, from) = hear(&ends.agent);
    assert_eq!(word, b"who?");
    assert_ne!(from.to_string(), ends.line.address());
    ends.line.answer_from_elsewhere(false);

    // The receiver is somewhere else.
    let other = UdpSocket::bind("127.0.0.1:0").unwrap();
    other.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    ends.line.move_receiver(&other.local_addr().unwrap().to_string());
    ends.ask(b"there?");
    let (word, from) = hear(&other);
    assert_eq!(word, b"there?");
    other.send_to(b"here", from).unwrap();
    assert_eq!(hear(&ends.agent).0, b"here");

    ends.line.cut(true);
    ends.ask(b"nobody");
    ends.wait_tally(Way::Up, |tally| tally.lost == 1);
}

#[test]
fn what_is_late_arrives_late_and_whole() {
    let ends = Ends::new();
    ends.line.set(Conditions { latency: 100 * MS, ..Conditions::default() });
    let begun = Instant::now();
    for number in 0..40u32 {
        ends.ask(&number.to_le_bytes().repeat(300));
    }
    for number in 0..40u32 {
        assert_eq!(hear(&ends.receiver).0, number.to_le_bytes().repeat(300));
    }
    assert!(begun.elapsed() >= 100 * MS);
}
