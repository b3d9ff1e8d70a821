use super::*;

/// A group whose file is damaged is not protected any more, and nobody may have to find that out in a log.
#[tokio::test]
async fn a_damaged_file_is_seen_in_the_status_and_can_be_let_go_of() {
    let dir = tempfile::tempdir().expect("temp dir");
    let paths = Paths::new(dir.path().to_owned());
    let groups = paths.agent_state().join("groups");
    std::fs::create_dir_all(&groups).expect("made");
    std::fs::write(groups.join("db.json"), b"{").expect("written");
    let daemon = Daemon::open(paths).expect("opens");
    daemon.start_groups().await.expect("starts");
    let status = daemon.status(Some("db")).expect("it is there");
    let reason = status.groups[0].reason.clone().expect("a reason");
    assert!(reason.contains("not protected") && reason.contains("db.json"), "{reason}");
    assert!(!status.groups[0].data.is_consistent());
    daemon.unprotect("db").await.expect("let go of");
    assert!(daemon.status(Some("db")).is_err() && !groups.join("db.json").exists());
}

/// Whether events were skipped is looked at although a group takes its time to start, or to end.
#[tokio::test]
async fn skipped_events_are_seen_while_the_daemon_is_busy() {
    let dir = tempfile::tempdir().expect("temp dir");
    let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
    let tick = tokio::spawn(daemon.clone().tick());
    let (_capture, _changes) = (daemon.capture.lock().await, daemon.changes.lock().await);
    let skipped = Arc::new(AtomicU64::new(0));
    let counter = skipped.clone();
    daemon.misses.watch(move || Some(Ok(counter.load(Ordering::SeqCst))));
    skipped.store(5, Ordering::SeqCst);
    let seen = async {
        while daemon.misses.count() != 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), seen).await.expect("seen");
    tick.abort();
}

/// The group was called home. Its return is stopped, and the tick finds it called once more before it is gone.
#[tokio::test]
async fn what_is_unprotected_does_not_begin_to_come_home_again() {
    let dir = tempfile::tempdir().expect("temp dir");
    let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
    let file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
    daemon.store.save(&file).expect("saved");
    let first = daemon.remember_return(file.clone());
    let changes = daemon.changes.lock().await;
    let (unprotecting, name) = (daemon.clone(), file.name.clone());
    let unprotect = tokio::spawn(async move { unprotecting.unprotect(&name).await });
    while daemon.is_returning("db") {
        tokio::task::yield_now().await;
    }
    let again = daemon.remember_return(file);
    assert!(!Arc::ptr_eq(&first, &again));
    drop(changes);
    unprotect.await.expect("ends").expect("unprotected");
    assert!(!daemon.is_returning("db"), "its volumes would be overwritten");
    assert!(daemon.store.load().expect("list").is_empty());
}

/// What the tick found in the list of failed groups is not what is there when its turn to change something comes: `change` came
/// before it.
async fn failed_and_changed<F: Future<Output = ()>>(
    change: impl FnOnce(Arc<Daemon>) -> F,
) -> (tempfile::TempDir, Arc<Daemon>) {
    let dir = tempfile::tempdir().expect("temp dir");
    let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
    let file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
    daemon.store.save(&file).expect("saved");
    daemon.start_or_remember(file).await;
    let changes = daemon.changes.lock().await;
    // Each waits for its turn when the other one has begun to wait.
    let mut changed = std::pin::pin!(change(daemon.clone()));
    let ticking = daemon.clone();
    let mut tried = std::pin::pin!(ticking.try_failed_again());
    assert!(!begins(&mut changed).await && !begins(&mut tried).await, "both wait");
    drop(changes);
    changed.await;
    tried.await;
    (dir, daemon)
}

/// Has it go as far as it can; whether that was to its end.
async fn begins<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|context| std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_ready()))
        .await
}

#[tokio::test]
async fn what_was_unprotected_is_not_started_by_a_tick_that_waited() {
    let unprotect = async |daemon: Arc<Daemon>| daemon.unprotect("db").await.expect("unprotected");
    let (_dir, daemon) = failed_and_changed(unprotect).await;
    assert!(daemon.status(Some("db")).is_err(), "it would be captured and sent again");
}

#[tokio::test]
async fn what_has_other_volumes_now_is_not_started_in_its_old_ones() {
    let change = async |daemon: Arc<Daemon>| {
        let _changes = daemon.changes.lock().await;
        let file = GroupFile::new("db".into(), vec!["/dev/other".into()], vec![1 << 20], Vec::new());
        lock(&daemon.failed).insert("db".into(), Failed { file, problem: no_group("db") });
    };
    let (_dir, daemon) = failed_and_changed(change).await;
    let status = daemon.status(Some("db")).expect("it is there");
    assert_eq!(status.groups[0].volumes[0].path, "/dev/other");
}

#[tokio::test]
async fn what_was_called_home_is_not_started_by_a_tick_that_waited() {
    let called = async |daemon: Arc<Daemon>| {
        let _changes = daemon.changes.lock().await;
        let file = lock(&daemon.failed)["db"].file.clone();
        lock(&daemon.failed).insert("db".into(), Failed { file: file.clone(), problem: no_group("db") });
        daemon.remember_return(file);
    };
    let (_dir, daemon) = failed_and_changed(called).await;
    assert_eq!(lock(&daemon.failed)["db"].problem, no_group("db"), "it was tried");
}
