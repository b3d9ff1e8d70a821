use super::*;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(20);

fn socket() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("run/agent.sock");
    (dir, path)
}

/// Answers each request with itself, twice, until the client is done.
async fn serve(server: LocalServer) {
    loop {
        let mut peer = server.accept().await.expect("accept");
        tokio::spawn(async move {
            while let Ok(Some(request)) = peer.read_request::<Value>().await {
                for _ in 0..2 {
                    if peer.send(&request).await.is_err() {
                        return;
                    }
                }
            }
        });
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let task = tokio::task::spawn_blocking(work);
    timeout(LIMIT, task).await.expect("in time").expect("no panic")
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_and_replies_go_through_and_the_socket_is_private() {
    let (_dir, path) = socket();
    tokio::spawn(serve(LocalServer::bind(&path).expect("bind")));
    let mode = |p: &Path| std::fs::metadata(p).expect("metadata").permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(path.parent().expect("parent"))), (0o600, 0o700));
    let replies = blocking(move || {
        let mut client = LocalClient::connect(&path).expect("connect");
        client.request(&json!({"ask": "status"})).expect("request");
        client.stream.get_ref().shutdown(std::net::Shutdown::Write).expect("done asking");
        client.replies::<Value>().collect::<Result<Vec<_>>>().expect("replies")
    })
    .await;
    assert_eq!(replies, vec![json!({"ask": "status"}); 2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_in_both_directions() {
    let (_dir, path) = socket();
    let server = LocalServer::bind(&path).expect("bind");
    let client = tokio::task::spawn_blocking(move || {
        let mut client = LocalClient::connect(&path).expect("connect");
        let error = client.request(&"x".repeat(REQUEST_BYTES_MAX)).expect_err("refused before it is sent");
        assert_eq!(error.kind(), ErrorKind::Limit);
        client.request(&"x".repeat(REQUEST_BYTES_MAX - 2)).expect("just fits");
        let reply: Value = client.reply().expect("reply").expect("one");
        assert_eq!(reply.as_str().map(str::len), Some(REPLY_BYTES_MAX - 2));
        // Past the client's own check: a line that never ends.
        let raw = client.stream.get_mut();
        let _ = raw.write_all(&vec![b'x'; REQUEST_BYTES_MAX + 2]);
        client.reply::<Value>().expect_err("the server gave up on us").kind()
    });
    let mut peer = server.accept().await.expect("accept");
    let request: Value = peer.read_request().await.expect("fits").expect("one");
    assert_eq!(request.as_str().map(str::len), Some(REQUEST_BYTES_MAX - 2));
    assert_eq!(peer.send(&"y".repeat(REPLY_BYTES_MAX)).await.expect_err("too long").kind(), ErrorKind::Limit);
    peer.send(&"y".repeat(REPLY_BYTES_MAX - 2)).await.expect("just fits");
    assert_eq!(peer.read_request::<Value>().await.expect_err("endless").kind(), ErrorKind::Limit);
    assert!(peer.partial.capacity() <= 2 * REQUEST_BYTES_MAX);
    peer.send(&"no").await.expect("an error can still be told");
    drop(peer);
    let result = timeout(LIMIT, client).await.expect("in time");
    assert!(result.is_err(), "the client had a reply where it expected none");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_client_bounds_what_a_daemon_sends() {
    let (_dir, path) = socket();
    let server = LocalServer::bind(&path).expect("bind");
    let client = tokio::task::spawn_blocking(move || {
        let mut client = LocalClient::connect(&path).expect("connect");
        client.request(&1).expect("request");
        client.reply::<Value>().expect_err("endless").kind()
    });
    let mut peer = server.accept().await.expect("accept");
    let _ = peer.read_request::<Value>().await.expect("request");
    let _ = peer.writer.write_all(&vec![b'1'; REPLY_BYTES_MAX + 1]).await;
    assert_eq!(timeout(LIMIT, client).await.expect("in time").expect("no panic"), ErrorKind::Limit);
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_and_half_requests_are_errors_and_end_only_that_client() {
    let (_dir, path) = socket();
    let server = LocalServer::bind(&path).expect("bind");
    for (bytes, kind) in [(&b"\xff\xfe\n"[..], ErrorKind::Protocol), (b"{\"ask\":", ErrorKind::Closed)] {
        let mut raw = BlockingStream::connect(&path).expect("connect");
        raw.write_all(bytes).expect("write");
        drop(raw);
        let mut peer = server.accept().await.expect("accept");
        assert_eq!(peer.read_request::<Value>().await.expect_err("garbage").kind(), kind);
    }
    drop(BlockingStream::connect(&path).expect("connect"));
    let mut peer = server.accept().await.expect("accept");
    assert!(peer.read_request::<Value>().await.expect("no error").is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_can_be_cancelled_in_the_middle_of_a_line() {
    let (_dir, path) = socket();
    let server = LocalServer::bind(&path).expect("bind");
    let mut raw = UnixStream::connect(&path).await.expect("connect");
    let mut peer = server.accept().await.expect("accept");
    raw.write_all(b"[1,").await.expect("first half");
    let cut = async {
        while peer.partial.is_empty() {
            let _ = timeout(Duration::from_millis(1), peer.read_request::<Value>()).await;
        }
    };
    timeout(LIMIT, cut).await.expect("the first half arrives");
    raw.write_all(b"2]\n").await.expect("second half");
    let whole = timeout(LIMIT, peer.read_request::<Value>()).await.expect("in time").expect("whole");
    assert_eq!(whole, Some(json!([1, 2])));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_too_many_is_turned_away_and_told() {
    let (_dir, path) = socket();
    let server = LocalServer::bind(&path).expect("bind");
    let mut clients = Vec::new();
    let mut peers = Vec::new();
    for _ in 0..CLIENTS_MAX {
        clients.push(BlockingStream::connect(&path).expect("connect"));
        peers.push(server.accept().await.expect("accept"));
    }
    let late = tokio::task::spawn_blocking({
        let path = path.clone();
        move || {
            let mut client = LocalClient::connect(&path).expect("the kernel connects");
            client.request(&1).expect("sent or already closed");
            client.reply::<Value>().expect_err("turned away").kind()
        }
    });
    // Nobody is accepted; the call turns the late one away in passing.
    let accepting = tokio::select! {
        _ = server.accept() => None,
        kind = late => Some(kind.expect("no panic")),
    };
    assert_eq!(accepting, Some(ErrorKind::Busy));
    peers.pop();
    let _again = BlockingStream::connect(&path).expect("connect");
    timeout(LIMIT, server.accept()).await.expect("a place is free again").expect("accept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_socket_is_replaced_and_a_served_one_is_not() {
    let (_dir, path) = socket();
    let first = LocalServer::bind(&path).expect("bind");
    assert_eq!(LocalServer::bind(&path).expect_err("served").kind(), ErrorKind::AlreadyRunning);
    drop(first);
    assert!(!path.exists());
    // As a killed daemon leaves it: a socket file that nobody listens on.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bind"));
    assert!(path.exists());
    let second = LocalServer::bind(&path).expect("stale socket replaced");
    drop(second);
    // Served by something that does not know our lock.
    let foreign = std::os::unix::net::UnixListener::bind(&path).expect("bind");
    assert_eq!(LocalServer::bind(&path).expect_err("served").kind(), ErrorKind::AlreadyRunning);
    drop(foreign);
    std::fs::remove_file(&path).expect("remove");
    std::fs::write(&path, "precious").expect("write");
    assert_eq!(LocalServer::bind(&path).expect_err("not a socket").kind(), ErrorKind::Io);
    assert_eq!(std::fs::read_to_string(&path).expect("still there"), "precious");
}

#[test]
fn who_does_not_run_is_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    for (socket, daemon) in [("agent.sock", "varve-agent"), ("receiver.sock", "varve-receiver")] {
        let error = LocalClient::connect(&dir.path().join(socket)).expect_err("nobody there");
        assert_eq!(error.kind(), ErrorKind::Unreachable);
        assert!(error.to_string().contains(socket) && error.to_string().contains(daemon), "{error}");
        assert!(error.hint().contains(&format!("systemctl start {daemon}")), "{}", error.hint());
    }
}

#[test]
fn a_daemon_that_takes_no_calls_is_given_up() {
    let (_dir, path) = socket();
    std::fs::create_dir_all(path.parent().expect("parent")).expect("directory");
    // Somebody who listens and never accepts: room for two.
    let listener = Socket::new(Domain::UNIX, Type::STREAM, None).expect("socket");
    listener.bind(&SockAddr::unix(&path).expect("address")).expect("bind");
    listener.listen(1).expect("listen");
    let limit = Duration::from_millis(300);
    let mut taken = Vec::new();
    let error = loop {
        let start = std::time::Instant::now();
        match LocalClient::connect_within(&path, limit) {
            Ok(client) => taken.push(client),
            Err(error) => {
                assert!((limit / 2..limit * 10).contains(&start.elapsed()), "{:?}", start.elapsed());
                break error;
            }
        }
        assert!(taken.len() < 100, "there is no end to it");
    };
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let parts = [error.to_string(), error.why(), error.hint().to_string()];
    assert!(parts[0].contains("varve-agent does not take calls on ") && parts[0].contains("agent.sock"), "{parts:?}");
    assert!(parts[1].contains("hangs"), "{parts:?}");
    assert!(parts[2].contains("systemctl restart varve-agent"), "{parts:?}");
    // One whose call was kept and whose question is not answered gets the same kind.
    let client = taken.first_mut().expect("one was kept");
    client.set_timeout(Some(limit)).expect("limit");
    client.request(&json!({"ask": "status"})).expect("the kernel keeps it");
    assert_eq!(client.reply::<Value>().expect_err("nobody answers").kind(), ErrorKind::Timeout);
}
