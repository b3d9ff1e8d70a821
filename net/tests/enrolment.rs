//! Who gets in, who does not, and what each is told.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::*;
use varve_net::ErrorKind;
use varve_net::endpoint::{self, CONNECTIONS_PER_HOST, Peer, Purpose, explain};
use varve_net::hosts::Hosts;
use varve_net::identity::{Authority, HostIdentity, HostKey};
use varve_net::tls::{ALPN_JOIN, ALPN_SESSION};
use varve_net::token::JoinToken;

#[tokio::test(flavor = "multi_thread")]
async fn a_host_joins_and_talks() {
    let receiver = Receiver::start();
    let text = receiver.token("db-1", HOUR).encode();
    let (identity, served) = receiver.join(&JoinToken::decode(&text).unwrap()).await;
    assert_eq!(served.unwrap(), "db-1");
    let dir = receiver.dir.path().join("host");
    identity.unwrap().save(&dir).unwrap();
    let identity = HostIdentity::load(&dir).unwrap();
    assert_eq!(identity.name(), "db-1");

    let (connection, accepted) = receiver.session(&identity).await;
    assert_eq!(accepted.peer, Peer::Host { name: "db-1".into(), fingerprint: identity.fingerprint() });
    assert_eq!(receiver.server.live().len(), 1);
    let echo = async {
        let (mut send, mut receive) = accepted.connection.accept_bi().await.unwrap();
        let bytes = receive.read_to_end(100).await.unwrap();
        send.write_all(&bytes).await.unwrap();
        send.finish().unwrap();
    };
    let ask = async {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(b"layer").await.unwrap();
        send.finish().unwrap();
        receive.read_to_end(100).await.unwrap()
    };
    let (answer, ()) = within(async { tokio::join!(ask, echo) }).await;
    assert_eq!(answer, b"layer");
    drop(accepted);
    within(connection.closed()).await;
    assert_eq!(receiver.server.live().len(), 0, "a dropped connection leaves nothing behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_name_is_resolved_and_a_restarted_receiver_is_found() {
    let mut receiver = Receiver::start();
    let identity = receiver.enrolled("db-1").await;
    receiver.server.close().await;
    // Another address, the same CA: the receiver has moved.
    receiver.authority = Authority::open(&receiver.dir.path().join("pki")).unwrap().into();
    receiver.hosts = Hosts::open(receiver.dir.path().join("hosts.json")).unwrap().into();
    let addr = "127.0.0.2:0".parse().unwrap();
    receiver.server = endpoint::Server::bind(addr, &receiver.authority, receiver.hosts.clone()).unwrap().into();
    receiver.addr = receiver.server.local_addr().unwrap().to_string();
    receiver.session(&identity).await;
    // As a name. localhost may be ::1 first: a wildcard server takes both.
    let any = "[::]:0".parse().unwrap();
    receiver.server = endpoint::Server::bind(any, &receiver.authority, receiver.hosts.clone()).unwrap().into();
    receiver.addr = format!("localhost:{}", receiver.server.local_addr().unwrap().port());
    receiver.session(&identity).await;
    let error = endpoint::connect(&identity, "no-such-host.invalid:1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Resolve);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_token_is_told_apart() {
    let receiver = Receiver::start();
    let good = receiver.token("db-1", HOUR);
    receiver.join(&good).await.0.unwrap();

    assert_eq!(receiver.join_refused(&good).await.kind(), ErrorKind::UsedToken);
    let wrong = JoinToken { secret: [9; 32], ..good.clone() };
    assert_eq!(receiver.join_refused(&wrong).await.kind(), ErrorKind::UnknownToken);
    let withdrawn = receiver.token("db-2", HOUR);
    receiver.hosts.revoke("db-2", SystemTime::now()).unwrap();
    assert_eq!(receiver.join_refused(&withdrawn).await.kind(), ErrorKind::ExpiredToken);
    let past = receiver.hosts.invite("db-3", HOUR, UNIX_EPOCH + Duration::from_secs(1_000_000)).unwrap();
    let expired = JoinToken { secret: past, ..good.clone() };
    let error = receiver.join_refused(&expired).await;
    assert_eq!(error.kind(), ErrorKind::ExpiredToken);
    assert!(error.hint().contains("varve host invite"), "{}", error.hint());
    let elsewhere = JoinToken { ca_fingerprint: [1; 32], ..receiver.token("db-4", HOUR) };
    assert_eq!(receiver.join_refused(&elsewhere).await.kind(), ErrorKind::WrongCa);
    let mut slipped = good.encode();
    slipped.pop();
    assert_eq!(JoinToken::decode(&slipped).unwrap_err().kind(), ErrorKind::MalformedToken);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_race_with_one_token_do_not_both_get_in() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    // Both pass the handshake before either redeems.
    let racing = async { tokio::join!(endpoint::join(&receiver.addr, &token), endpoint::join(&receiver.addr, &token)) };
    let serving = async {
        let (a, b) = (receiver.accept().await, receiver.accept().await);
        tokio::join!(
            endpoint::serve_join(&a, &receiver.authority, &receiver.hosts),
            endpoint::serve_join(&b, &receiver.authority, &receiver.hosts)
        )
    };
    let ((a, b), (served_a, served_b)) = within(async { tokio::join!(racing, serving) }).await;
    let kinds = [a.map_err(|e| e.kind()).err(), b.map_err(|e| e.kind()).err()];
    assert!(kinds.contains(&None) && kinds.contains(&Some(ErrorKind::UsedToken)), "{kinds:?}");
    assert!(served_a.is_ok() != served_b.is_ok());
    assert_eq!(receiver.hosts.list().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_host_is_cut_off_and_refused_at_the_next_handshake() {
    let receiver = Receiver::start();
    let (bad, good) = (receiver.enrolled("bad").await, receiver.enrolled("good").await);
    let (bad_connection, _bad_accepted) = receiver.session(&bad).await;
    let (good_connection, _good_accepted) = receiver.session(&good).await;
    assert_eq!(receiver.server.enforce(), 0);
    receiver.hosts.revoke("bad", SystemTime::now()).unwrap();
    assert_eq!(receiver.server.enforce(), 1);
    let end = within(bad_connection.closed()).await;
    assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::Revoked);
    let error = within(endpoint::connect(&bad, &receiver.addr)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Revoked);
    assert!(error.hint().contains("varve join"), "{}", error.hint());
    assert!(good_connection.close_reason().is_none());
    // And it comes back by joining again.
    let again = receiver.enrolled("bad").await;
    receiver.session(&again).await;
    assert_eq!(receiver.server.close_host("good"), 1);
    within(good_connection.closed()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn joining_again_replaces_the_certificate() {
    let receiver = Receiver::start();
    let old = receiver.enrolled("db-1").await;
    let (old_connection, _accepted) = receiver.session(&old).await;
    let new = receiver.enrolled("db-1").await;
    assert_eq!(receiver.server.enforce(), 1);
    within(old_connection.closed()).await;
    receiver.session(&new).await;
    assert_eq!(within(endpoint::connect(&old, &receiver.addr)).await.unwrap_err().kind(), ErrorKind::Revoked);
}

#[tokio::test(flavor = "multi_thread")]
async fn foreign_authorities_are_refused_on_both_sides() {
    let receiver = Receiver::start();
    let foreign = Receiver::start();
    // Both CAs have the same name: only the keys differ.
    let stranger = foreign.enrolled("db-1").await;
    let error = within(endpoint::connect(&stranger, &receiver.addr)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongCa, "the host does not trust this receiver");
    let named = tempfile::tempdir().unwrap();
    let other = Authority::create(named.path(), "another-name").unwrap();
    for authority in [&*foreign.authority, &other] {
        let (chain, key) = host_credentials(authority, "db-1");
        let end = raw_dial(&receiver.addr, Some((chain, key)), ALPN_SESSION).await.unwrap_err();
        assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::UnknownHost, "{end}");
    }
    // Signed by our CA, but not in the registry (restored from an old backup).
    let end = raw_dial(&receiver.addr, Some(host_credentials(&receiver.authority, "x")), ALPN_SESSION).await;
    assert_eq!(explain(&end.unwrap_err(), Purpose::Session, "r").kind(), ErrorKind::UnknownHost);
    assert_eq!(receiver.server.live().len(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_certificate_or_an_invitation_nobody_gets_past_the_handshake() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    let never = JoinToken { secret: [5; 32], ..token.clone() };
    for alpn in [ALPN_SESSION, ALPN_JOIN] {
        for credentials in [
            None,
            Some(self_signed("db-1", None)),
            Some(self_signed("varve-join", None)),
            Some(self_signed("varve-join", Some("00".repeat(32)))),
            Some(self_signed("varve-join", Some("garbage".into()))),
            Some(join_credentials(&never)),
            // The server's own name and the CA's name are no way in either.
            Some(self_signed("varve-receiver", None)),
            Some(self_signed("Varve CA of recovery", None)),
        ] {
            let end = raw_dial(&receiver.addr, credentials, alpn).await.unwrap_err();
            let quinn::ConnectionError::ConnectionClosed(frame) = &end else { panic!("not by the handshake: {end}") };
            assert!((0x100..0x200).contains(&u64::from(frame.error_code)), "a TLS alert: {end}");
        }
    }
    assert!(receiver.hosts.invites().iter().all(|i| i.used_at.is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_count_only_on_their_own_protocol() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    let end = raw_dial(&receiver.addr, Some(join_credentials(&token)), ALPN_SESSION).await.unwrap_err();
    assert_eq!(explain(&end, Purpose::Join, "r").kind(), ErrorKind::WrongProtocol, "{end}");
    let (chain, key) = host_credentials(&receiver.authority, "db-2");
    let fingerprint = varve_net::identity::fingerprint(&chain[0]);
    receiver.hosts.enrol("db-2", fingerprint, SystemTime::now()).unwrap();
    let end = raw_dial(&receiver.addr, Some((chain.clone(), key.clone_key())), ALPN_JOIN).await.unwrap_err();
    assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::WrongProtocol, "{end}");
    for alpn in [&b"h3"[..], b"varve/2", b""] {
        let end = raw_dial(&receiver.addr, Some((chain.clone(), key.clone_key())), alpn).await.unwrap_err();
        assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::WrongProtocol, "{alpn:?}: {end}");
    }
    raw_dial(&receiver.addr, Some((chain, key)), ALPN_SESSION).await.expect("its own protocol");
    assert!(matches!(receiver.accept().await.peer, Peer::Host { .. }), "none of the others was handed out");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_gets_a_bounded_number_of_connections_and_the_newest_wins() {
    let receiver = Receiver::start();
    let (identity, other) = (receiver.enrolled("db-1").await, receiver.enrolled("db-2").await);
    let neighbour = receiver.session(&other).await;
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS_PER_HOST {
        open.push(receiver.session(&identity).await);
    }
    // As after a crash loop: those before are not closed by anybody.
    open.push(receiver.session(&identity).await);
    let (oldest, accepted) = &open[0];
    let end = within(oldest.closed()).await;
    assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::Busy, "{end}");
    assert!(accepted.connection.close_reason().is_some());
    for (connection, _) in &open[1..] {
        assert!(connection.close_reason().is_none());
    }
    assert!(neighbour.0.close_reason().is_none(), "another host's connection");
    let count = |name: &str| receiver.server.live().iter().filter(|live| live.0 == name).count();
    assert_eq!((count("db-1"), count("db-2")), (CONNECTIONS_PER_HOST, 1));
    // The end of a connection that made room takes nothing of the others.
    drop(open.remove(0));
    assert_eq!(count("db-1"), CONNECTIONS_PER_HOST);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_for_another_key_is_refused() {
    let receiver = Receiver::start();
    let (chain, _) = host_credentials(&receiver.authority, "db-1");
    let key = HostKey::generate().unwrap();
    let error = HostIdentity::new(&key, chain[0].clone(), receiver.authority.ca().clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Protocol);
}

/// TLS 1.3 tickets would let a client skip the verifier. Ours has none; this one asks for them.
#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_host_does_not_come_back_with_a_session_ticket() {
    let receiver = Receiver::start();
    let (chain, key) = host_credentials(&receiver.authority, "db-1");
    let fingerprint = varve_net::identity::fingerprint(&chain[0]);
    receiver.hosts.enrol("db-1", fingerprint, SystemTime::now()).unwrap();
    let config = raw_config(Some((chain, key)), ALPN_SESSION);
    let first = raw_dial_with(&receiver.addr, config.clone()).await.unwrap();
    let mut accepted = vec![receiver.accept().await];
    // A ticket would come with or before the first answer.
    let (mut send, mut receive) = first.open_bi().await.unwrap();
    send.write_all(b"x").await.unwrap();
    let (mut back, _) = within(accepted[0].connection.accept_bi()).await.unwrap();
    back.write_all(b"y").await.unwrap();
    within(receive.read_chunk(1, true)).await.unwrap();
    drop(accepted.pop());
    receiver.hosts.revoke("db-1", SystemTime::now()).unwrap();
    let end = raw_dial_with(&receiver.addr, config).await.unwrap_err();
    assert_eq!(explain(&end, Purpose::Session, "r").kind(), ErrorKind::Revoked, "{end}");
    let quinn::ConnectionError::ConnectionClosed(_) = end else { panic!("not by the handshake: {end}") };
}
