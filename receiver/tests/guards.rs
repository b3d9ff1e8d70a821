//! What keeps a group's files from its own receiver, or from another one: a group that is not understood, a replica that has a
//! writer.
#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests say what they test by their names")]

mod support;

use std::path::Path;
use support::agent::{Agent, hello};
use support::stream::{Model, Source};
use support::{Receiver, assert_equal, seed};
use varve_common::control::{GroupStatus, PointsReply, ReceiverRequest, Reply};
use varve_common::format::MarkKind;
use varve_common::wire::messages::{Hello, RefusedReason};

const VOLUMES: [u64; 1] = [4 << 20];

fn alerted(group: &GroupStatus) -> bool {
    group.alerts.iter().any(|alert| alert.id == "storage-failed")
}

/// Every file below `dir`, with its bytes.
fn content(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(content(&path)),
            false => found.push((path.clone(), std::fs::read(path).unwrap())),
        }
    }
    found.sort();
    found
}

/// A group's file of a newer version, or one that cannot be read for now: its agent comes again, and must neither get through
/// nor make the group anew over what is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_not_understood_is_left_alone() {
    let mut receiver = Receiver::new();
    receiver.start(None);
    let mut source = Source::new(seed(), &VOLUMES);
    let mut model = Model::new(&VOLUMES);
    let begin = source.position;
    let identity = receiver.enrol("production").await;
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    agent.hello(&hello("db", &source, begin)).await.unwrap();
    agent.say(&source.mark(MarkKind::Begin)).await;
    agent.say(&source.mark(MarkKind::GapEnd)).await;
    for _ in 0..20 {
        let sent = source.blocks(0, 16);
        model.apply(&sent);
        agent.say(&sent).await;
    }
    agent.wait_durable(source.position, true).await;
    receiver.stop();
    let dir = receiver.paths.receiver_group("db");
    let file = dir.join("group.json");
    let good = std::fs::read_to_string(&file).unwrap();
    let newer = [
        (good.replacen("\"version\": 1", "\"version\": 3", 1), "version 3"),
        (good.replacen("\"epoch\"", "\"quorum\": 2,\n  \"epoch\"", 1), "'quorum'"),
        (good[..good.len() / 2].to_owned(), "group.json"),
    ];
    for (text, word) in newer {
        std::fs::write(&file, &text).unwrap();
        let before = content(&dir);
        receiver.start(None);
        let group = receiver.wait_for("db", "alerted", alerted);
        assert!(group.reason.as_ref().is_some_and(|why| why.contains(word)), "{group:#?}");
        let refused = Agent::connect(&identity, &receiver.address()).await;
        let mut agent = refused;
        let refused = agent.hello(&hello("db", &source, begin)).await.unwrap_err();
        assert_eq!((refused.reason, refused.retry), (RefusedReason::Storage, true), "{refused:?}");
        assert!(refused.text.contains(word) && refused.next.contains("version of Varve"), "{refused:?}");
        let points = ReceiverRequest::Points { group: "db".into(), from_ns: None, to_ns: None };
        let Reply::Problem(problem) = receiver.request::<PointsReply>(&points) else { panic!("there are no points") };
        assert!(problem.why.contains(word), "{problem:?}");
        receiver.stop();
        assert!(content(&dir) == before, "something of the group was changed");
    }
    // What passes by itself, as a disk that does not answer for a while: nobody has to start the receiver again.
    receiver.start(None);
    std::fs::write(&file, &good).unwrap();
    let mut agent = Agent::connect(&identity, &receiver.address()).await;
    let welcome = agent.hello(&hello("db", &source, begin)).await.unwrap();
    assert_eq!((welcome.resume, welcome.consistent), (Some(source.position), true));
    let sent = source.blocks(0, 16);
    model.apply(&sent);
    agent.say(&sent).await;
    agent.wait_durable(source.position, true).await;
    assert_equal(&receiver.replica("db", 0), &model.volumes[0], "the replica");
    assert!(!alerted(&receiver.wait_for("db", "well again", |group| !alerted(group))));
    receiver.stop();
}

/// Two receivers on one host, or one directory that two hosts have mounted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_another_receiver_is_refused() {
    let (mut one, mut two) = (Receiver::new(), Receiver::new());
    one.start(None);
    two.start(None);
    let source = Source::new(1, &VOLUMES);
    let replica = one.dir.path().join("r.img");
    let hail = |group: &str| {
        let mut hail: Hello = hello(group, &source, source.position);
        hail.volumes[0].replica = Some(replica.display().to_string());
        hail
    };
    let first = one.enrol("production").await;
    let mut agent = Agent::connect(&first, &one.address()).await;
    agent.hello(&hail("db")).await.unwrap();
    let second = two.enrol("production").await;
    let mut other = Agent::connect(&second, &two.address()).await;
    let refused = other.hello(&hail("db")).await.unwrap_err();
    assert_eq!((refused.reason, refused.retry), (RefusedReason::Replica, true), "{refused:?}");
    assert!(refused.text.contains("r.img") && refused.text.contains("varve-receiver"), "{refused:?}");
    assert!(two.group("db").is_none(), "nothing was made");
    // It is free as soon as the first one has ended, in whatever way.
    one.kill();
    let mut other = Agent::on(other.connection.clone()).await;
    other.hello(&hail("db")).await.unwrap();
    // And the first one says so when it is back.
    one.start(None);
    let group = one.wait_for("db", "alerted", alerted);
    assert!(group.reason.as_ref().is_some_and(|why| why.contains("has claimed it")), "{group:#?}");
    one.stop();
    two.stop();
}
