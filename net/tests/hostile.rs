//! Peers that do not keep the rules: the receiver lives on, within its bounds.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use common::*;
use varve_net::ErrorKind;
use varve_net::endpoint::{self, HANDSHAKE_TIMEOUT, HANDSHAKES_CALM, HANDSHAKES_MAX};
use varve_net::join::JOIN_MESSAGE_BYTES_MAX;
use varve_net::tls::{ALPN_JOIN, ALPN_SESSION};

#[tokio::test(flavor = "multi_thread")]
async fn garbage_on_the_port_does_not_matter() {
    let receiver = Receiver::start();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..5000u64 {
        let length = (random() % 1500) as usize;
        let mut datagram: Vec<u8> = (0..length).map(|_| random() as u8).collect();
        // Every second one begins as a QUIC version 1 Initial does, so that it gets further in.
        if round % 2 == 0 && length > 20 {
            datagram[..7].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8, random() as u8]);
        }
        let _ = socket.send_to(&datagram, &receiver.addr);
    }
    let identity = receiver.enrolled("db-1").await;
    receiver.session(&identity).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_that_sends_rubbish_is_named_and_uses_up_nothing() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    let rubbish = [
        Vec::new(),
        b"VJQ1".to_vec(),
        b"VJQ1 and a secret of the wrong length, somewhat longer".to_vec(),
        vec![0; JOIN_MESSAGE_BYTES_MAX + 1],
        vec![b'x'; 1 << 20],
    ];
    for bytes in rubbish {
        let connection = raw_dial(&receiver.addr, Some(join_credentials(&token)), ALPN_JOIN).await.unwrap();
        let accepted = receiver.accept().await;
        let sending = async {
            let (mut send, _receive) = connection.open_bi().await.unwrap();
            let _ = send.write_all(&bytes).await;
            let _ = send.finish();
            connection.closed().await
        };
        let serving = async {
            let result = endpoint::serve_join(&accepted, &receiver.authority, &receiver.hosts).await;
            drop(accepted);
            result
        };
        let (_, served) = within(async { tokio::join!(sending, serving) }).await;
        let error = served.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Protocol);
        assert!(error.to_string().contains("127.0.0.1:"), "who it was: {error}");
    }
    assert_eq!(receiver.join(&token).await.1.unwrap(), "db-1", "the invitation is still open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_that_says_nothing_is_given_up() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    let _connection = raw_dial(&receiver.addr, Some(join_credentials(&token)), ALPN_JOIN).await.unwrap();
    let accepted = receiver.accept().await;
    let served = within(endpoint::serve_join(&accepted, &receiver.authority, &receiver.hosts)).await;
    assert_eq!(served.unwrap_err().kind(), ErrorKind::Timeout);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_joiner_whose_secret_does_not_fit_its_certificate_is_refused() {
    let receiver = Receiver::start();
    let token = receiver.token("db-1", HOUR);
    let connection = raw_dial(&receiver.addr, Some(join_credentials(&token)), ALPN_JOIN).await.unwrap();
    let accepted = receiver.accept().await;
    let asking = async {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(&[&b"VJQ1"[..], &[8; 32]].concat()).await.unwrap();
        send.finish().unwrap();
        let answer = receive.read_to_end(JOIN_MESSAGE_BYTES_MAX).await.unwrap();
        connection.close(0u8.into(), b"");
        answer
    };
    let serving = endpoint::serve_join(&accepted, &receiver.authority, &receiver.hosts);
    let (answer, served) = within(async { tokio::join!(asking, serving) }).await;
    assert_eq!(answer, b"VJA1\x01");
    assert_eq!(served.unwrap_err().kind(), ErrorKind::UnknownToken);
}

/// Many handshakes that stop after their first datagram, from another address.
#[tokio::test(flavor = "multi_thread")]
async fn stalled_handshakes_are_bounded_and_do_not_keep_others_out() {
    const STALLED: usize = 3 * HANDSHAKES_MAX;
    let receiver = Receiver::start();
    let identity = receiver.enrolled("db-1").await;
    let server: SocketAddr = receiver.addr.parse().unwrap();

    // A client that talks to a trap; what reaches the trap is passed on once, the server's answers never are.
    let trap = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let victim = trap.local_addr().unwrap();
    let stall = quinn::Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
    let mut connecting = Vec::new();
    let mut sockets = Vec::new();
    let mut most = 0;
    for _ in 0..STALLED {
        connecting.push(stall.connect_with(raw_config(None, ALPN_SESSION), victim, "varve-receiver").unwrap());
        let mut datagram = [0; 2048];
        let (length, _) = within(trap.recv_from(&mut datagram)).await.unwrap();
        let socket = UdpSocket::bind("127.0.0.2:0").unwrap();
        socket.send_to(&datagram[..length], server).unwrap();
        sockets.push(socket);
        most = most.max(receiver.server.handshakes());
    }
    until("the stalled handshakes arrive", || receiver.server.handshakes() >= HANDSHAKES_CALM).await;
    let began = Instant::now();
    let (_connection, _accepted) = receiver.session(&identity).await;
    assert!(began.elapsed() < HANDSHAKE_TIMEOUT / 2, "an honest host waits {:?}", began.elapsed());
    most = most.max(receiver.server.handshakes());
    assert!(most <= HANDSHAKES_CALM + 1, "{most} handshakes: unproved addresses must not get further");
    until("all are given up", || receiver.server.handshakes() == 0).await;
    assert!(began.elapsed() < HANDSHAKE_TIMEOUT + Duration::from_secs(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_where_nobody_answers_is_unreachable() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let receiver = Receiver::start();
    let identity = receiver.enrolled("db-1").await;
    let error = within(endpoint::connect(&identity, &silent.local_addr().unwrap().to_string())).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unreachable);
    assert!(error.hint().contains("UDP port"), "{}", error.hint());
}
