//! A played agent against the real receiver over real QUIC: the way of the data, and everything that must be refused.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use std::collections::BTreeMap;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;
use support::agent::{Agent, Got, hello};
use support::stream::{Model, Sent, Source, record, wire};
use support::{Receiver, assert_equal, seed};
use varve_common::control::{ReceiverRequest, Reply, VerifyReply};
use varve_common::format::MarkKind;
use varve_common::problem::ProblemKind;
use varve_common::record::RecordKind;
use varve_common::state::{Data, GapReason, Link};
use varve_common::wire::digest::block_digest;
use varve_common::wire::messages::{Ask, Probe, RefusedReason, Report, Verify};
use varve_common::wire::{Frame, FrameKind, Image, Preamble};
use zerocopy::IntoBytes;

const VOLUMES: [u64; 2] = [6 << 20, (1 << 20) + 512 * 3];
const WAIT: Duration = Duration::from_secs(5);

fn report(captured: u64) -> Report {
    Report {
        captured,
        data: Data::Protected,
        rpo_ms: Some(3),
        lagging_after_ms: 5000,
        reason: None,
        resync: None,
        verify: None,
    }
}

fn image(position: u64, id: u64, volume: u16, extents: &[(u64, u64, Option<&[u8]>)]) -> Vec<u8> {
    let mut body = Vec::new();
    Image::encode(id, volume, extents, &mut body);
    wire(&Frame::plain(FrameKind::Image, position, &body), &body)
}

fn probe_of(model: &Model, id: u64, volume: u16, offset: u64) -> Probe {
    let bytes = &model.volumes[usize::from(volume)][offset as usize..];
    let bytes = &bytes[..bytes.len().min(1 << 20)];
    let digests = bytes.chunks(64 << 10).map(block_digest).collect();
    Probe { id, volume, offset, length: bytes.len() as u32, digests }
}

/// A started session of a new group.
async fn begun(receiver: &Receiver, host: &str, group: &str, source: &Source) -> Agent {
    let identity = receiver.enrol(host).await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let welcome = agent.hello(&hello(group, source, source.position)).await.unwrap();
    assert_eq!((welcome.resume, welcome.consistent), (None, false));
    agent.say(&source.mark(MarkKind::Begin)).await;
    agent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_way_and_back_again() {
    let seed = seed();
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed, &VOLUMES);
    let mut model = Model::new(&VOLUMES);
    let identity = receiver.enrol("production").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let begin = source.position;
    let welcome = agent.hello(&hello("db", &source, begin)).await.unwrap();
    assert_eq!((welcome.resume, welcome.consistent, &welcome.fresh[..]), (None, false, &[true, true][..]));
    agent.say(&source.mark(MarkKind::Begin)).await;
    agent.control(FrameKind::Report, 0, &report(source.position)).await;

    // First sync: data and images side by side.
    let mut images = 0;
    for round in 0..40u64 {
        let sent = source.data(20_000);
        model.apply(&sent);
        agent.say(&sent).await;
        let (offset, length) = ((round % 5) << 20 | 8192, 70_000 + round);
        let bytes = vec![round as u8 | 1; length as usize];
        let extents = [(offset, length, Some(&bytes[..])), (offset + (1 << 19), 12345, None)];
        agent.raw(&image(source.position, round, 0, &extents)).await;
        model.volumes[0][offset as usize..(offset + length) as usize].copy_from_slice(&bytes);
        model.volumes[0][(offset + (1 << 19)) as usize..][..12345].fill(0);
        images += 1;
    }
    let mut done = 0;
    while done < images {
        done += u64::from(matches!(agent.next().await, Got::ImageDone(_)));
    }
    for (id, volume, offset) in [(1, 0, 0), (2, 0, 5 << 20), (3, 1, 0), (4, 1, 1 << 20)] {
        agent.control(FrameKind::Probe, source.position, &probe_of(&model, id, volume, offset)).await;
    }
    let mut wrong = probe_of(&model, 5, 0, 1 << 20);
    wrong.digests[3][0] ^= 1;
    agent.control(FrameKind::Probe, source.position, &wrong).await;
    // In any order.
    let mut replies = BTreeMap::new();
    while replies.len() < 5 {
        if let Got::ProbeReply(reply) = agent.next().await {
            assert_eq!(replies.insert(reply.id, reply.differs), None);
        }
    }
    assert_eq!(replies.into_iter().collect::<Vec<_>>(), [(1, 0), (2, 0), (3, 0), (4, 0), (5, 1 << 3)]);
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    for _ in 0..100 {
        let sent = source.data(50_000);
        model.apply(&sent);
        agent.say(&sent).await;
    }
    agent.wait_durable(source.position, true).await;
    agent.control(FrameKind::Report, 0, &report(source.position)).await;
    let group =
        receiver.wait_for("db", "protected", |group| group.captured == group.durable && group.data == Data::Protected);
    assert_eq!((group.link, group.lag_bytes, group.gap_reason), (Link::Streaming, 0, None));
    assert_eq!((group.applied.as_ref(), group.captured.as_ref()), (group.durable.as_ref(), group.durable.as_ref()));
    assert!(group.window.to.is_some() && group.gaps.len() == 1, "{group:#?}");
    assert_equal(&receiver.replica("db", 0), &model.volumes[0], "volume 0");
    assert_equal(&receiver.replica("db", 1), &model.volumes[1], "volume 1");

    // The connection is lost, and both agree where to go on.
    agent.connection.close(0u32.into(), b"");
    receiver.wait_for("db", "disconnected", |group| group.link == Link::Disconnected);
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let welcome = agent.hello(&hello("db", &source, begin)).await.unwrap();
    assert_eq!((welcome.resume, welcome.consistent), (Some(source.position), true));
    let sent = source.data(100_000);
    model.apply(&sent);
    agent.say(&sent).await;
    agent.wait_durable(source.position, false).await;
    receiver.stop();
    assert!(matches!(agent.wait_refused().await.reason, RefusedReason::Stopping));
    receiver.start(None);
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let welcome = agent.hello(&hello("db", &source, begin)).await.unwrap();
    assert_eq!(
        (welcome.resume, welcome.consistent, &welcome.fresh[..]),
        (Some(source.position), true, &[false; 2][..])
    );
    receiver.wait_for("db", "applied", |group| group.applied == group.durable);
    assert_equal(&receiver.replica("db", 0), &model.volumes[0], "volume 0");
    assert_equal(&receiver.replica("db", 1), &model.volumes[1], "volume 1");
    assert_eq!(receiver.unexpected(&[]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_lost_its_ring_begins_anew_and_the_good_point_stays() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    let first = source.data(10_000);
    agent.say(&first).await;
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    agent.wait_durable(source.position, true).await;
    let good = receiver.wait_for("db", "consistent", |group| group.gap_reason.is_none()).window;
    let mut second = Source::new(4711, &VOLUMES);
    let mut agent = Agent::on(agent.connection.clone()).await;
    let welcome = agent.hello(&hello("db", &second, second.position)).await.unwrap();
    assert_eq!((welcome.resume, welcome.consistent), (None, true));
    agent.say(&second.mark(MarkKind::Begin)).await;
    agent.say(&second.data(5000)).await;
    agent.wait_durable(second.position, true).await;
    let group = receiver.group("db").unwrap();
    assert_eq!((group.data, group.gap_reason), (Data::Gap, Some(GapReason::NewRing)));
    assert_eq!(group.window, good, "the good point is still the old one");
    assert!(group.gaps.last().unwrap().to.is_none());

    // And one that cannot go on although it is the same ring: data that was acknowledged is lost here.
    let mut agent = Agent::on(agent.connection.clone()).await;
    let welcome = agent.hello(&hello("db", &second, second.position + 8)).await.unwrap();
    assert_eq!(welcome.resume, None);
    agent.say(&second.data(8)).await;
    assert_eq!(agent.wait_refused().await.reason, RefusedReason::Hole, "a begin must come first");
    assert_eq!(receiver.unexpected(&["cannot go on where the landing log ends", "reason=Hole"]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_and_broken_frames_end_the_session_and_nothing_else() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let identity = receiver.enrol("production").await;
    let connection = varve_net::endpoint::connect(&identity, &receiver.address()).await.unwrap();
    let mut source = Source::new(seed(), &VOLUMES);
    let mut begun = false;
    let good = |source: &mut Source| source.data(3000);
    let plain = |source: &Source, bytes: &[u8]| wire(&Frame::plain(FrameKind::Data, source.position, bytes), bytes);
    type Make<'a> = Box<dyn Fn(&mut Source) -> Vec<u8> + 'a>;
    let cases: Vec<(&str, RefusedReason, Make<'_>)> = vec![
        (
            "hole",
            RefusedReason::Hole,
            Box::new(|s| {
                good(s);
                good(s).bytes
            }),
        ),
        ("garbage", RefusedReason::Protocol, Box::new(|_| vec![0xaa; 4000])),
        (
            "oversized",
            RefusedReason::Protocol,
            Box::new(|s| {
                let mut frame = Frame::plain(FrameKind::Data, s.position, &[]);
                (frame.body_bytes, frame.plain_bytes) = (1 << 30, 1 << 30);
                frame.encode().to_vec()
            }),
        ),
        (
            "a bomb",
            RefusedReason::Protocol,
            Box::new(|s| {
                let body = lz4_flex::block::compress(&vec![0; 1 << 20]);
                let mut frame = Frame::plain(FrameKind::Data, s.position, &body);
                (frame.codec, frame.plain_bytes) = (varve_common::wire::Codec::Lz4, 4096);
                wire(&frame, &body)
            }),
        ),
        (
            "damaged body",
            RefusedReason::Protocol,
            Box::new(|s| {
                let position = s.position;
                let mut bytes = good(s).bytes;
                s.position = position;
                *bytes.last_mut().unwrap() ^= 1;
                bytes
            }),
        ),
        ("empty data", RefusedReason::Protocol, Box::new(|s| plain(s, &[]))),
        ("not records", RefusedReason::Protocol, Box::new(|s| plain(s, &[0x77; 4096]))),
        (
            "half a record",
            RefusedReason::Protocol,
            Box::new(|s| {
                let record = record(RecordKind::Write, 0, 0, 4096, &[1; 4096]);
                plain(s, &record[..2048])
            }),
        ),
        (
            "beyond the end",
            RefusedReason::Volumes,
            Box::new(|s| plain(s, &record(RecordKind::Write, 0, VOLUMES[0] - 100, 4096, &[1; 4096]))),
        ),
        (
            "discard beyond the end",
            RefusedReason::Volumes,
            Box::new(|s| plain(s, &record(RecordKind::Discard, 1, 0, VOLUMES[1] + 1, &[]))),
        ),
        (
            "no such volume",
            RefusedReason::Volumes,
            Box::new(|s| plain(s, &record(RecordKind::Write, 7, 0, 512, &[1; 512]))),
        ),
        (
            "mark elsewhere",
            RefusedReason::Hole,
            Box::new(|s| {
                s.position += 8;
                let mark = s.mark(MarkKind::GapEnd).bytes;
                s.position -= 8;
                mark
            }),
        ),
        (
            "mark of another epoch",
            RefusedReason::Epoch,
            Box::new(|s| {
                s.epoch = 9;
                let mark = s.mark(MarkKind::GapEnd).bytes;
                s.epoch = 1;
                mark
            }),
        ),
        (
            "mark of another ring",
            RefusedReason::Protocol,
            Box::new(|s| {
                let own = std::mem::replace(&mut s.incarnation, [1; 16]);
                let mark = s.mark(MarkKind::Begin).bytes;
                s.incarnation = own;
                mark
            }),
        ),
        (
            "image beyond the end",
            RefusedReason::Protocol,
            Box::new(|s| image(s.position, 1, 1, &[(VOLUMES[1] - 4096, 8192, None)])),
        ),
        (
            "image of another position",
            RefusedReason::Hole,
            Box::new(|s| image(s.position + 8, 1, 1, &[(0, 8192, None)])),
        ),
        (
            "probe beyond the end",
            RefusedReason::Protocol,
            Box::new(|s| {
                let probe = Probe { id: 1, volume: 0, offset: VOLUMES[0], length: 65536, digests: vec![[0; 16]] };
                let body = varve_common::wire::messages::encode(&probe);
                wire(&Frame::plain(FrameKind::Probe, s.position, &body), &body)
            }),
        ),
        (
            "probe with too few digests",
            RefusedReason::Protocol,
            Box::new(|s| {
                let probe = Probe { id: 1, volume: 0, offset: 0, length: 1 << 20, digests: vec![[0; 16]] };
                let body = varve_common::wire::messages::encode(&probe);
                wire(&Frame::plain(FrameKind::Probe, s.position, &body), &body)
            }),
        ),
        (
            "a report that is none",
            RefusedReason::Protocol,
            Box::new(|s| wire(&Frame::plain(FrameKind::Report, s.position, &[0xff; 40]), &[0xff; 40])),
        ),
        ("a welcome", RefusedReason::Protocol, Box::new(|_| wire(&Frame::plain(FrameKind::Welcome, 0, b"x"), b"x"))),
        ("a second hello", RefusedReason::Protocol, Box::new(|_| wire(&Frame::plain(FrameKind::Hello, 0, b"x"), b"x"))),
    ];
    let mut model = Model::new(&VOLUMES);
    for (name, reason, make) in cases {
        let mut agent = Agent::on(connection.clone()).await;
        let welcome = agent.hello(&hello("db", &source, 0)).await.unwrap();
        match begun {
            true => assert_eq!(welcome.resume, Some(source.position), "{name}"),
            false => agent.say(&source.mark(MarkKind::Begin)).await,
        }
        begun = true;
        let sent = good(&mut source);
        model.apply(&sent);
        agent.say(&sent).await;
        agent.wait_durable(source.position, false).await;
        let (position, bytes) = (source.position, make(&mut source));
        source.position = position;
        agent.raw(&bytes).await;
        let refused = agent.wait_refused().await;
        assert_eq!(refused.reason, reason, "{name}: {refused:?}");
        assert!(!refused.text.is_empty() && !refused.next.is_empty());
        let log = receiver.log();
        let line = log.lines().rfind(|line| line.contains("session refused")).unwrap_or_default();
        assert!(line.contains("host=\"production\"") && line.contains("group=\"db\""), "{name}: {line}");
    }
    // Truncated: the stream ends in a frame.
    let mut agent = Agent::on(connection.clone()).await;
    agent.hello(&hello("db", &source, 0)).await.unwrap();
    let sent = source.clone_position(|s| good(s));
    agent.raw(&sent.bytes[..sent.bytes.len() - 5]).await;
    agent.send.finish().unwrap();
    while !matches!(agent.next().await, Got::End) {}
    // Nothing of all this has reached the replica.
    let mut agent = Agent::on(connection).await;
    let welcome = agent.hello(&hello("db", &source, 0)).await.unwrap();
    assert_eq!(welcome.resume, Some(source.position));
    receiver.wait_for("db", "applied", |group| group.applied == group.durable);
    assert_equal(&receiver.replica("db", 0), &model.volumes[0], "volume 0");
    assert_equal(&receiver.replica("db", 1), &model.volumes[1], "volume 1");
    assert!(receiver.is_running());
    assert_eq!(receiver.unexpected(&["session refused"]), Vec::<String>::new());
}

impl Source {
    /// Makes something and goes back.
    fn clone_position(&mut self, make: impl Fn(&mut Self) -> Sent) -> Sent {
        let position = self.position;
        let sent = make(self);
        self.position = position;
        sent
    }
}

/// Probes whose answers nobody reads: a place among the probes is free once one is answered, so only this bounds them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_does_not_read_its_answers_is_gone() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let source = Source::new(seed(), &VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    let mut probes = Vec::new();
    for id in 0..20_000 {
        let probe = Probe { id, volume: 0, offset: 0, length: 64 << 10, digests: vec![[0; 16]] };
        let body = varve_common::wire::messages::encode(&probe);
        probes.extend(wire(&Frame::plain(FrameKind::Probe, source.position, &body), &body));
    }
    let flood = async { while agent.send.write_all(&probes).await.is_ok() {} };
    tokio::time::timeout(support::LIMIT, flood).await.expect("the session ends");
    assert!(receiver.log().contains("does not take its answers"));
    let mut agent = Agent::on(agent.connection.clone()).await;
    agent.hello(&hello("db", &source, source.position)).await.unwrap();
}

/// Refused for its hello alone, before anybody looks whose group it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_does_not_show_up_in_a_groups_status() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let source = Source::new(seed(), &VOLUMES);
    let agent = begun(&receiver, "production", "db", &source).await;
    receiver.wait_for("db", "streaming", |group| group.link == Link::Streaming);
    agent.connection.close(0u32.into(), b"");
    receiver.wait_for("db", "gone", |group| group.link == Link::Disconnected);
    let identity = receiver.enrol("stranger").await;
    let mut stranger = Agent::connect(&identity, &receiver.address()).await;
    let mut lie = hello("db", &source, source.position);
    (lie.volumes[0].path, lie.volumes[0].bytes) = ("all is lost".to_owned(), 0);
    assert_eq!(stranger.hello(&lie).await.unwrap_err().reason, RefusedReason::Limit);
    let group = receiver.group("db").unwrap();
    assert_eq!(group.link, Link::Disconnected);
    assert!(!group.reason.unwrap_or_default().contains("all is lost"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_only_in_a_gap_and_no_end_before_they_are_done() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let source = Source::new(seed(), &VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    receiver.wait_for("db", "consistent", |group| group.data != Data::InitialSync);
    agent.raw(&image(source.position, 1, 0, &[(0, 4096, Some(&[7; 4096]))])).await;
    let refused = agent.wait_refused().await;
    assert!(refused.text.contains("no gap is open"), "{refused:?}");
    assert!(receiver.replica("db", 0)[..4096].iter().all(|byte| *byte == 0));

    let mut agent = Agent::on(agent.connection.clone()).await;
    agent.hello(&hello("db", &source, source.position)).await.unwrap();
    let both = [source.mark(MarkKind::GapBegin).bytes, image(source.position, 1, 0, &[(0, 4096, None)])].concat();
    agent.raw(&[both, source.mark(MarkKind::GapEnd).bytes].concat()).await;
    let refused = agent.wait_refused().await;
    assert!(refused.text.contains("before all images are done"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_write_to_a_group() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    source.epoch = 5;
    let mut agent = begun(&receiver, "production", "db", &source).await;
    // Another host, the same name: refused, and the owner's session is not disturbed.
    let other = receiver.enrol("other").await;
    let mut stranger = Agent::connect(&other, &receiver.address()).await;
    let refused = stranger.hello(&hello("db", &source, 0)).await.unwrap_err();
    assert_eq!(refused.reason, RefusedReason::Owner);
    assert!(refused.text.contains("'production'") && !refused.retry, "{refused:?}");
    let sent = source.data(1000);
    agent.say(&sent).await;
    agent.wait_durable(source.position, false).await;
    // An older epoch of the right host.
    let mut late = Agent::on(agent.connection.clone()).await;
    source.epoch = 4;
    let refused = late.hello(&hello("db", &source, 0)).await.unwrap_err();
    assert_eq!(refused.reason, RefusedReason::Epoch);
    assert!(refused.next.contains("varve"), "{refused:?}");
    // A newer one becomes the group's.
    source.epoch = 6;
    let mut newer = Agent::on(agent.connection.clone()).await;
    assert_eq!(newer.hello(&hello("db", &source, 0)).await.unwrap().epoch, 6);
    source.epoch = 5;
    let mut late = Agent::on(agent.connection.clone()).await;
    assert_eq!(late.hello(&hello("db", &source, 0)).await.unwrap_err().reason, RefusedReason::Epoch);
    // A volume that shrank; one that grew is followed.
    source.epoch = 6;
    source.volumes[1] -= 512;
    let refused = late_hello(&agent, &source).await;
    assert_eq!(refused.reason, RefusedReason::Volumes);
    assert!(refused.text.contains("shrank"), "{refused:?}");
    // A name that would leave the directory.
    let mut hail = hello("../../etc", &source, 0);
    let refused = Agent::on(agent.connection.clone()).await.hello(&hail).await.unwrap_err();
    assert_eq!(refused.reason, RefusedReason::Limit);
    hail.group = "empty".into();
    hail.volumes.clear();
    let refused = Agent::on(agent.connection.clone()).await.hello(&hail).await.unwrap_err();
    assert_eq!(refused.reason, RefusedReason::Limit);
    assert!(receiver.group("empty").is_none(), "what was refused does not exist");
}

fn losetup(arguments: &[&str]) -> String {
    let out = std::process::Command::new("losetup").args(arguments).output().unwrap();
    assert!(out.status.success(), "root is needed: {out:?}");
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

async fn late_hello(agent: &Agent, source: &Source) -> varve_common::wire::messages::Refused {
    Agent::on(agent.connection.clone()).await.hello(&hello("db", source, 0)).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_connection_takes_over_at_once() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    let mut old = begun(&receiver, "production", "db", &source).await;
    old.say(&source.data(100_000)).await;
    old.wait_durable(source.position, false).await;
    let identity = receiver.enrol("production").await;
    // The old one's certificate was replaced by this join, so its connection is closed; its session may linger.
    let start = std::time::Instant::now();
    let mut new = Agent::connect(&identity, &receiver.address()).await;
    assert_eq!(new.hello(&hello("db", &source, 0)).await.unwrap().resume, Some(source.position));
    assert!(start.elapsed() < WAIT);
    // On one connection: the older stream is told.
    let mut newest = Agent::on(new.connection.clone()).await;
    assert!(newest.hello(&hello("db", &source, 0)).await.is_ok());
    assert_eq!(new.wait_refused().await.reason, RefusedReason::Busy);
    newest.say(&source.data(1000)).await;
    newest.wait_durable(source.position, false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_versions_and_other_protocols() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let identity = receiver.enrol("production").await;
    let connection = varve_net::endpoint::connect(&identity, &receiver.address()).await.unwrap();
    let mut offer = Preamble::offer();
    (offer.low, offer.high) = (7.into(), 9.into());
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(offer.as_bytes()).await.unwrap();
    let answer = recv.read_to_end(1000).await.unwrap();
    assert_eq!(answer, b"VARVE\r\n\x1a\0\0\x01\0\0\0\0\0", "an answer that every version can read, and nothing else");
    let (mut send, mut recv) = connection.open_bi().await.unwrap();
    send.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let _ = recv.read_to_end(100_000).await;
    let log = receiver.log();
    assert!(log.contains("protocol versions 7 to 9 only") && log.contains("host=\"production\""), "{log}");
    assert!(receiver.is_running());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_cannot_be_used() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let identity = receiver.enrol("production").await;
    let connection = varve_net::endpoint::connect(&identity, &receiver.address()).await.unwrap();
    let source = Source::new(1, &VOLUMES[..1]);
    let dir = receiver.dir.path().to_owned();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    std::fs::write(path("small.img"), [0; 4096]).unwrap();
    std::fs::write(path("fstab"), vec![0; VOLUMES[0] as usize]).unwrap();
    let attempt = async |group: &str, replica: String| {
        let mut hail = hello(group, &source, 0);
        hail.volumes[0].replica = Some(replica);
        Agent::on(connection.clone()).await.hello(&hail).await
    };
    for (replica, word) in [
        (path("small.img"), "too small"),
        (path("fstab"), "does not look like"),
        (path("none/x.img"), "no directory"),
        ("x.img".to_owned(), "not usable"),
        (receiver.paths.receiver_identity().join("x.img").to_str().unwrap().to_owned(), "own directories"),
    ] {
        let refused = attempt("db", replica).await.unwrap_err();
        assert_eq!(refused.reason, RefusedReason::Replica);
        assert!(refused.text.contains(word), "{refused:?}");
    }
    assert!(receiver.group("db").is_none());
    let used = path("used.img");
    std::fs::File::create(&used).unwrap().set_len(VOLUMES[0]).unwrap();
    let device = losetup(&["--find", "--show", &used]);
    let refused = attempt("db", used.clone()).await.unwrap_err();
    assert!(refused.text.contains("in use") && refused.text.contains(&device), "{refused:?}");
    let claim = std::fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_EXCL).open(&device).unwrap();
    let refused = attempt("db", device.clone()).await.unwrap_err();
    assert!(refused.text.contains("in use"), "{refused:?}");
    drop(claim);
    let welcome = attempt("device", device.clone()).await.unwrap();
    assert_eq!(welcome.fresh, [false], "what a device held before is not known");
    losetup(&["-d", &device]);
    let welcome = attempt("db", path("r.img")).await.unwrap();
    assert_eq!((welcome.replicas, welcome.fresh), (vec![path("r.img")], vec![true]));
    let refused = attempt("db2", path("r.img")).await.unwrap_err();
    assert!(refused.text.contains("already a replica of the group 'db'"), "{refused:?}");
    // Gone behind the receiver's back: not replaced by an empty one.
    drop(connection.clone());
    receiver.stop();
    std::fs::remove_file(path("r.img")).unwrap();
    receiver.start(None);
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let refused = agent.hello(&hello("db", &source, 0)).await.unwrap_err();
    assert!(refused.text.contains("is not there"), "{refused:?}");
    assert!(receiver.group("db").unwrap().reason.unwrap().contains("is not there"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_is_asked_of_the_agent_and_forget_needs_it_gone() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let source = Source::new(seed(), &VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    agent.wait_durable(source.position, true).await;
    let socket = receiver.paths.receiver_socket();
    let asking = tokio::task::spawn_blocking(move || {
        let mut client = varve_net::local::LocalClient::connect(&socket).unwrap();
        client.request(&ReceiverRequest::Verify { group: "db".into(), repair: false }).unwrap();
        client.replies::<Reply<VerifyReply>>().map(Result::unwrap).take_while_inclusive_done()
    });
    let Got::Ask(Ask::Verify { id, repair: false }) = agent.next().await else { panic!("no ask") };
    let mut verify = Verify { id, done_bytes: 5, total_bytes: 10, ..Verify::default() };
    let mut report = report(source.position);
    report.verify = Some(verify.clone());
    agent.control(FrameKind::Report, 0, &report).await;
    receiver.wait_for("db", "verifying", |group| group.verify.as_ref().is_some_and(|verify| verify.done_bytes == 5));
    tokio::time::sleep(Duration::from_millis(500)).await;
    verify.done_bytes = 10;
    verify.finished = true;
    report.verify = Some(verify.clone());
    agent.control(FrameKind::Report, 0, &report).await;
    let replies = asking.await.unwrap();
    let Some(Reply::Done(done)) = replies.last() else { panic!("{replies:?}") };
    assert_eq!((done.group.as_str(), &done.verify), ("db", &verify));
    assert!(replies.iter().any(|reply| matches!(reply, Reply::Progress(_))), "{replies:?}");

    let forget = ReceiverRequest::Forget { group: "db".into() };
    let Reply::Problem(problem) = receiver.request::<()>(&forget) else { panic!("forgotten under an open session") };
    assert_eq!(problem.kind, ProblemKind::Refused);
    agent.connection.close(0u32.into(), b"");
    receiver.wait_for("db", "disconnected", |group| group.link == Link::Disconnected);
    receiver.done::<()>(&forget);
    assert!(receiver.group("db").is_none());
    assert_eq!(receiver.replica("db", 0).len() as u64, VOLUMES[0], "the replica stays");
    let dir = receiver.paths.receiver_group("db");
    assert!(!dir.join("group.json").exists() && !dir.join("landing").exists());
    // Revoked: the connection is closed at once.
    let identity = receiver.enrol("second").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    agent.hello(&hello("other", &source, 0)).await.unwrap();
    receiver.done::<()>(&ReceiverRequest::Revoke { name: "second".into() });
    while !matches!(agent.next().await, Got::End) {}
}

/// On a slow line the word "protected" is seconds old when it comes: what is durable here is no younger for it.
#[tokio::test(flavor = "multi_thread")]
async fn an_old_word_of_the_source_protects_nothing() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let source = Source::new(seed(), &VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    agent.wait_durable(source.position, true).await;
    let say = |captured, lagging_after_ms| Report { captured, lagging_after_ms, ..report(captured) };
    agent.control(FrameKind::Report, 0, &say(source.position + 4096, 60_000)).await;
    receiver.wait_for("db", "protected", |group| group.data == Data::Protected);
    agent.control(FrameKind::Report, 0, &say(source.position + 4096, 200)).await;
    receiver.wait_for("db", "lagging", |group| group.data == Data::Lagging);
    assert!(receiver.group("db").unwrap().rpo_seconds > Some(1.5));
    agent.control(FrameKind::Report, 0, &say(source.position, 60_000)).await;
    receiver.wait_for("db", "protected", |group| group.data == Data::Protected);
}

/// The window of a group that was opened again has the gaps that it had.
#[tokio::test(flavor = "multi_thread")]
async fn gaps_are_shown_after_a_restart() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    let identity = receiver.enrol("production").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    agent.hello(&hello("db", &source, source.position)).await.unwrap();
    agent.say(&source.mark(MarkKind::Begin)).await;
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    for _ in 0..2 {
        for mark in [MarkKind::Begin, MarkKind::GapEnd] {
            agent.say(&source.data(20_000)).await;
            agent.say(&source.mark(mark)).await;
        }
    }
    agent.wait_durable(source.position, true).await;
    let reached =
        |group: &varve_common::control::GroupStatus| group.applied.is_some() && group.applied == group.durable;
    receiver.wait_for("db", "applied", reached);
    for _ in 0..2 {
        receiver.stop();
        receiver.start(None);
        let mut agent = Agent::connect(&identity, &receiver.address()).await;
        agent.hello(&hello("db", &source, source.position)).await.unwrap();
        let gaps = receiver.group("db").unwrap().gaps;
        assert!(gaps.len() >= 2 && gaps.iter().all(|gap| gap.to.is_some()), "{gaps:#?}");
    }
}

trait TakeWhileInclusive {
    fn take_while_inclusive_done(self) -> Vec<Reply<VerifyReply>>;
}

impl<I: Iterator<Item = Reply<VerifyReply>>> TakeWhileInclusive for I {
    fn take_while_inclusive_done(self) -> Vec<Reply<VerifyReply>> {
        let mut all = Vec::new();
        for reply in self {
            let last = !matches!(reply, Reply::Progress(_));
            all.push(reply);
            if last {
                break;
            }
        }
        all
    }
}

/// Far more than the landing log may hold, from a peer that does not wait: segments are recycled, memory is bounded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_the_log_holds() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    let mut model = Model::new(&VOLUMES);
    let mut agent = begun(&receiver, "production", "db", &source).await;
    let mut sent_bytes = 0;
    while sent_bytes < 400 << 20 {
        let sent = source.data(1 << 20);
        model.apply(&sent);
        sent_bytes += sent.bytes.len();
        agent.say(&sent).await;
    }
    agent.wait_durable(source.position, true).await;
    assert_equal(&receiver.replica("db", 0), &model.volumes[0], "volume 0");
    assert_equal(&receiver.replica("db", 1), &model.volumes[1], "volume 1");
    let landing = receiver.paths.receiver_group("db").join("landing");
    let held: u64 = std::fs::read_dir(landing).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
    assert!(held <= 32 << 20, "the log has {held} bytes");
    assert_eq!(receiver.unexpected(&[]), Vec::<String>::new());
}
