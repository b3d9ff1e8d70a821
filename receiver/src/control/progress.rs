//! How far a command is, told while it goes on; and that it goes on, while there is nothing to tell.

use super::send;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use varve_common::control::{Progress, Reply};
use varve_common::problem::Problem;
use varve_net::Error;
use varve_net::local::LocalPeer;

/// Between two lines about how far it is.
const INTERVAL: Duration = Duration::from_millis(200);
/// Between two lines when nothing is told: `varve` takes a longer silence for a daemon that hangs.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Where work tells how far it is.
#[derive(Debug)]
pub struct ProgressOut {
    /// Bytes done, and all of them.
    told: watch::Sender<(u64, u64)>,
    gone: Arc<AtomicBool>,
}

impl ProgressOut {
    /// Says how far it is.
    pub fn tell(&self, done_bytes: u64, total_bytes: u64) {
        self.told.send_replace((done_bytes, total_bytes));
    }

    /// Nobody listens any more.
    pub fn has_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }
}

/// What is told.
#[derive(Debug)]
pub(super) struct Told {
    told: watch::Receiver<(u64, u64)>,
    gone: Arc<AtomicBool>,
}

/// Both ends.
pub(super) fn progress() -> (ProgressOut, Told) {
    let (gone, (told, heard)) = (Arc::<AtomicBool>::default(), watch::channel((0, 0)));
    (ProgressOut { told, gone: gone.clone() }, Told { told: heard, gone })
}

/// Sends what the work tells, that it goes on, and its outcome. The work must not block, or nothing is sent meanwhile.
pub(super) async fn follow<T: serde::Serialize>(
    peer: &mut LocalPeer,
    told: Told,
    work: impl Future<Output = Result<T, Problem>>,
) -> Result<(), Error> {
    let mut work = pin!(work);
    let (mut sent, mut last) = (Instant::now(), (0, 0));
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => break outcome,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        let now = *told.told.borrow();
        if told.gone.load(Ordering::Relaxed) || (now == last && sent.elapsed() < SIGN_OF_LIFE) {
            continue;
        }
        let rate = now.0.saturating_sub(last.0) as f64 / sent.elapsed().as_secs_f64().max(1e-3);
        let left = now.1.saturating_sub(now.0) as f64;
        (sent, last) = (Instant::now(), now);
        let progress = Progress {
            done_bytes: now.0,
            total_bytes: now.1,
            bytes_per_second: rate,
            seconds_left: (rate > 0.0).then(|| left / rate),
        };
        if peer.send(&Reply::<()>::Progress(progress)).await.is_err() {
            told.gone.store(true, Ordering::Relaxed);
        }
    };
    send(peer, outcome).await
}

/// The same for work that has nothing to tell but that it goes on.
pub(super) async fn wait_for<T: serde::Serialize>(
    peer: &mut LocalPeer,
    work: impl Future<Output = Result<T, Problem>>,
) -> Result<(), Error> {
    follow(peer, progress().1, work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_net::local::{LocalClient, LocalServer};

    /// What a client hears of work, as it hears it.
    async fn heard(told: Told, work: impl Future<Output = Result<u32, Problem>>) -> Vec<Reply<u32>> {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("socket");
        let server = LocalServer::bind(&socket).expect("bound");
        let client = tokio::task::spawn_blocking(move || {
            let mut client = LocalClient::connect(&socket).expect("connected");
            client.request(&"work").expect("asked");
            std::iter::from_fn(|| client.reply().expect("understood")).collect()
        });
        let mut peer = server.accept().await.expect("a client");
        let _: Option<String> = peer.read_request().await.expect("asked");
        follow(&mut peer, told, work).await.expect("answered");
        drop(peer);
        client.await.expect("no panic")
    }

    #[tokio::test]
    async fn silent_work_gives_a_sign_of_life_each_second() {
        let work = async {
            tokio::time::sleep(Duration::from_millis(2700)).await;
            Ok(7)
        };
        let lines = heard(progress().1, work).await;
        let alive = lines.iter().filter(|line| matches!(line, Reply::Progress(step) if step.total_bytes == 0)).count();
        assert_eq!((alive, lines.len()), (2, 3), "{lines:?}");
        assert!(matches!(lines.last(), Some(Reply::Done(7))));
    }

    #[tokio::test]
    async fn what_is_told_is_sent_at_once_and_not_more_often() {
        let (out, told) = progress();
        let work = async {
            for done in 1..=100 {
                out.tell(done, 100);
                tokio::time::sleep(Duration::from_millis(7)).await;
            }
            Ok(7)
        };
        let begun = Instant::now();
        let lines = heard(told, work).await;
        // On a machine that is slow the work takes longer. The last line is its end.
        let most = begun.elapsed().as_millis() / INTERVAL.as_millis() + 1;
        assert!(lines.len() >= 2 && lines.len() as u128 <= most, "{lines:?}, at most {most}");
        assert!(matches!(&lines[0], Reply::Progress(step) if step.done_bytes > 0 && step.bytes_per_second > 0.0));
    }
}
