use super::*;
use crate::endpoint::Server;
use crate::hosts::Hosts;
use crate::identity::{Authority, HostKey};
use std::time::{Instant, SystemTime};

struct World {
    _dir: tempfile::TempDir,
    server: Server,
    identity: HostIdentity,
}

fn world() -> World {
    let dir = tempfile::tempdir().expect("temporary directory");
    let authority = Authority::create(&dir.path().join("pki"), "recovery").expect("authority");
    let hosts = Arc::new(Hosts::open(dir.path().join("hosts.json")).expect("registry"));
    let key = HostKey::generate().expect("key");
    let certificate = authority.sign_host_der("db-1", &key.spki()).expect("sign");
    let identity = HostIdentity::new(&key, certificate, authority.ca().clone()).expect("identity");
    hosts.enrol("db-1", identity.fingerprint(), SystemTime::now()).expect("enrol");
    let server = Server::bind(([127, 0, 0, 1], 0).into(), &authority, hosts).expect("bind");
    World { _dir: dir, server, identity }
}

fn config(world: &World) -> quinn::ClientConfig {
    quinn::ClientConfig::new(Arc::new(tls::session_config(&world.identity).expect("TLS")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_first_address_costs_a_head_start_and_no_more() {
    let world = world();
    let silent = std::net::UdpSocket::bind("127.0.0.1:0").expect("bind");
    let addresses = vec![silent.local_addr().expect("address"), world.server.local_addr().expect("address")];
    let began = Instant::now();
    let found = race(addresses, config(&world), Purpose::Session, &Tuning::default()).await.expect("connected");
    let found = found.expect("one of them");
    assert_eq!(found.connection.remote_address(), world.server.local_addr().expect("address"));
    assert!(began.elapsed() >= ADDRESS_HEAD_START && began.elapsed() < HANDSHAKE_TIMEOUT);
    let none = race(Vec::new(), config(&world), Purpose::Session, &Tuning::default()).await.expect("no error");
    assert!(none.is_none());
}

#[tokio::test]
async fn every_way_to_write_an_address_is_understood() {
    for (text, expected) in [
        ("127.0.0.1:99", "127.0.0.1:99"),
        (" 127.0.0.1 ", "127.0.0.1:7443"),
        ("[::1]:99", "[::1]:99"),
        ("[::1]", "[::1]:7443"),
        ("::1", "[::1]:7443"),
    ] {
        assert_eq!(resolve(text).await.expect(text), vec![expected.parse().expect("address")], "{text}");
    }
    let local = resolve("localhost:99").await.expect("localhost");
    assert!(local.iter().all(|a| a.ip().is_loopback() && a.port() == 99), "{local:?}");
    for bad in ["", ":", ":99", "a b", "no-such-host.invalid", "host:99999", "[::1", "\u{0}", &"x".repeat(300)] {
        assert_eq!(resolve(bad).await.expect_err(bad).kind(), ErrorKind::Resolve, "{bad:?}");
    }
}
