//! What coming home does to the daemon's groups. Each step is durable before the next.

use super::disks::{self, Claim};
use super::{Armed, Held};
use crate::daemon::{Daemon, remember_identities};
use crate::store::GroupFile;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use varve_common::control::{ProtectReply, VolumeStatus};
use varve_common::problem::{Problem, check_name};

/// How long writes from before the new capture are waited for: nobody but us wrote, and our writes are synced.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);
/// How long the operator waits for the receiver's answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(15);
const LOOK: Duration = Duration::from_millis(50);

impl Daemon {
    /// The connection, once there is one.
    pub(super) async fn connection(&self, limit: Duration) -> Result<quinn::Connection, Problem> {
        let mut view = self.link();
        let there = |view: &crate::link::LinkView| {
            view.connection.as_ref().is_some_and(|connection| connection.close_reason().is_none())
        };
        let found = tokio::time::timeout(limit, view.wait_for(there)).await;
        let connection = found.ok().and_then(Result::ok).and_then(|view| view.connection.clone());
        connection.ok_or_else(|| {
            let why = self.link().borrow().reason.clone().unwrap_or_else(|| "there is no connection".to_owned());
            Problem::unreachable("not home yet", why, "it goes on by itself when the receiver is connected")
        })
    }

    /// Claims the volumes.
    pub(super) async fn claim_for_return(&self, file: &GroupFile) -> Result<Claim, Problem> {
        // A planned switch-over may have them quiet.
        self.authorities().let_go(&file.name);
        let (own, file) = (self.own_dirs(), file.clone());
        let claimed = tokio::task::spawn_blocking(move || disks::claim(&file, &own)).await;
        claimed.map_err(|e| Problem::failed("the volumes were not claimed", e.to_string(), "see the log"))?
    }

    /// From here on what the volumes hold is the receiver's: nothing of them is captured, and whatever was is forgotten.
    pub(super) async fn begin_return(&self, file: &mut GroupFile, held: &mut Held) -> Result<(), Problem> {
        if !file.returning {
            // The token of a stream before stays until another one takes its place: with it the group may be given back at this
            // moment. If it never is, the token fits nothing there.
            file.returning = true;
            self.store().save(file)?;
            tracing::warn!(group = file.name, "its volumes are going to be overwritten with what the receiver has");
        }
        self.end_capture(file, held).await
    }

    /// Captures again; nobody else can write yet. What captures then is in `held`, and where its stream begins is answered.
    pub(super) async fn arm(
        &self,
        file: &mut GroupFile,
        epoch: u64,
        token: [u8; 16],
        held: &mut Held,
    ) -> Result<([u8; 16], u64), Problem> {
        file.set_token(token);
        self.store().save(file)?;
        self.end_capture(file, held).await?;
        let (link, view) = watch::channel(crate::link::LinkView {
            connection: None,
            link: varve_common::state::Link::Disconnected,
            reason: Some("the group comes home".to_owned()),
        });
        let handle = self.make_group(at_home(file.clone(), epoch), Some(view)).await?;
        let begin_of_stream = (handle.shared.incarnation, handle.began_at);
        let handle = &held.armed.insert(Armed { handle, link }).handle;
        let begin = Instant::now();
        while !handle.settled() {
            if begin.elapsed() > SETTLE_LIMIT {
                held.end_capture().await;
                let next = "see what writes to it; it is tried again";
                return Err(Problem::failed("not home yet", "a disk is being written by somebody else", next));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(begin_of_stream)
    }

    /// It is home: durably, then the volumes are free.
    pub(super) async fn arrive(self: &Arc<Self>, file: GroupFile, epoch: u64, held: &mut Held) -> Result<(), Problem> {
        let file = at_home(file, epoch);
        let name = file.name.clone();
        self.store().save(&file)?;
        self.forget_quiet(&name).await;
        match held.armed.take() {
            Some(Armed { handle, link }) => {
                // Nothing is waited for in between: one that is neither held nor the daemon's would be nobody's.
                self.adopt(handle);
                let mut view = self.link();
                tokio::spawn(async move {
                    loop {
                        link.send_replace(view.borrow_and_update().clone());
                        tokio::select! {
                            changed = view.changed() => if changed.is_err() { return },
                            () = link.closed() => return,
                        }
                    }
                });
            }
            // What captured was an agent before us: it is taken over if it is pinned.
            None => self.start_or_remember(file).await,
        }
        held.claim = None;
        let daemon = self.clone();
        tokio::spawn(async move { daemon.run_resume_hook(&name, "home").await });
        Ok(())
    }

    /// `varve failback GROUP --volume …`: this host shall have a group that it does not know.
    pub async fn come_home(self: &Arc<Self>, group: String, volumes: Vec<String>) -> Result<ProtectReply, Problem> {
        check_name("group", &group)?;
        let checked = self.check_protect_volumes(&group, &volumes)?;
        let bytes: Vec<u64> = checked.iter().map(|volume| volume.spec.bytes).collect();
        let mut file = GroupFile::new(group.clone(), volumes, bytes, Vec::new());
        remember_identities(&mut file, &checked);
        let returning = self.remember_return(file);
        let begin = Instant::now();
        while begin.elapsed() < ANSWER_LIMIT {
            let shown = returning.shown();
            if let Some(problem) = shown.ended {
                let next = format!("on the receiver: 'varve failback {group} --to' this host; {}", problem.next);
                return Err(Problem { what: format!("'{group}' does not come here"), next, ..problem });
            }
            if shown.claimed {
                let volume = |volume: &crate::volume::Checked| VolumeStatus {
                    path: volume.path.clone(),
                    bytes: volume.spec.bytes,
                    replica: None,
                };
                return Ok(ProtectReply { group, volumes: checked.iter().map(volume).collect(), notes: Vec::new() });
            }
            tokio::time::sleep(LOOK).await;
        }
        let why = returning.shown().reason.unwrap_or_else(|| "the receiver did not answer yet".to_owned());
        Err(Problem::unreachable(format!("'{group}' does not come here yet"), why, "it is tried on"))
    }

    /// Groups that were called home by the receiver.
    pub async fn look_for_calls(self: &Arc<Self>) {
        for handle in self.handles().into_iter().filter(|handle| handle.shared.is_called_home()) {
            if !self.is_returning(&handle.file.name) {
                self.called_home(&handle).await;
            }
        }
    }

    async fn end_capture(&self, file: &GroupFile, held: &mut Held) -> Result<(), Problem> {
        // What a try before has begun first: two would share a journal.
        held.end_capture().await;
        held.ending = self.let_go(&file.name).await;
        held.end_capture().await;
        self.end_pinned(file).await?;
        self.remove_journal(&file.name).await;
        Ok(())
    }
}

/// The file as it is when the group is home.
fn at_home(mut file: GroupFile, epoch: u64) -> GroupFile {
    (file.returning, file.armed, file.synced_once) = (false, None, true);
    file.epoch = epoch;
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use varve_common::paths::Paths;

    /// The agent began again after its last word before the group was given back, and its next stream was agreed to a moment
    /// before that was durable: only the token of the stream before tells the receiver that the group is given back to us.
    #[tokio::test]
    async fn another_stream_keeps_the_token_of_the_one_before() {
        let dir = tempfile::tempdir().expect("temp dir");
        let daemon = Daemon::open(Paths::new(dir.path().to_owned())).expect("opens");
        let mut file = GroupFile::new("db".into(), vec!["/dev/none".into()], vec![1 << 20], Vec::new());
        let stored = || daemon.store().load().expect("list").pop().and_then(|(_, file)| file.ok()).expect("stored");
        // What goes beyond the file needs the volume.
        daemon.begin_return(&mut file, &mut Held::default()).await.expect_err("no such volume");
        assert!(stored().returning && stored().armed.is_none());
        file.set_token([7; 16]);
        daemon.store().save(&file).expect("saved, as it is when it captures again");
        let mut file = stored();
        daemon.begin_return(&mut file, &mut Held::default()).await.expect_err("no such volume");
        assert_eq!((file.token(), stored()), ([7; 16], file));
    }
}
