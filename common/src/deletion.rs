//! Deletes snapshots as btrfs wants it: delete, commit, and know when they are really gone.
//!
//! A deleted subvolume is gone from its directory at once, and from disk when the kernel's cleaner has walked its trees: seconds or
//! hours later, and never as long as anybody is inside. Before the next commit a crash brings it back. So whoever deletes does not wait
//! for the end, but somebody has to: a thread here watches, says how far it is, and names what does not end, the call to the kernel
//! included.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    btrfs::{self, BtrfsError, Found},
    exit::chain,
    snapshot::VolumeName,
};

/// When the log says what.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often it is looked whether something is gone.
    pub look: Duration,
    /// The first word about a wait comes after this, each further one after twice the time of the one before.
    pub first_word: Duration,
    /// What has not moved for so long is said not to end.
    pub endless: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { look: seconds(1), first_word: seconds(5), endless: seconds(600) }
    }
}

/// The deletions of a volume's snapshots, from the call to the kernel to the last byte.
#[derive(Debug)]
pub struct Deletions {
    dir: PathBuf,
    volume: VolumeName,
    pace: Pace,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What a thread is doing in the kernel just now, and since when.
    call: Option<(String, Instant)>,
    /// Deleted, but not gone.
    pending: Vec<Doomed>,
    /// So many are gone since nothing was pending.
    gone: usize,
    /// Whether the thread that watches lives.
    watched: bool,
}

#[derive(Debug)]
struct Doomed {
    snapshot: String,
    tree_id: u64,
}

impl Deletions {
    /// Nothing is being deleted. `dir` is where the snapshots are, or any other directory of their file system.
    pub fn new(dir: &Path, volume: &VolumeName, pace: Pace) -> Arc<Self> {
        Arc::new(Self {
            // What btrfs is asked about must not be a symlink; the configuration may name one.
            dir: std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned()),
            volume: volume.clone(),
            pace,
            state: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Deletes a snapshot. On return it is gone from its directory; [`Self::commit`] makes that last.
    ///
    /// # Errors
    /// The kernel refuses; EPERM while it is being sent.
    pub fn delete(self: &Arc<Self>, found: &Found) -> Result<(), BtrfsError> {
        let snapshot = found.snapshot.to_string();
        let deleted = self.call(&snapshot, || btrfs::delete(&found.path));
        if deleted.is_ok() {
            self.lock().pending.push(Doomed { snapshot, tree_id: found.info.tree_id });
        }
        deleted
    }

    /// Commits what was deleted, and sets the cleaner to work. To be called once behind several deletions.
    ///
    /// # Errors
    /// The file system cannot commit: it is broken.
    pub fn commit(self: &Arc<Self>) -> Result<(), BtrfsError> {
        self.call("the commit", || btrfs::start_cleaner(&self.dir))
    }

    /// Snapshots that are deleted, but not gone from disk yet.
    pub fn pending(&self) -> usize {
        self.lock().pending.len()
    }

    /// Waits until all that was deleted is gone; false if it is not within `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| !state.pending.is_empty());
        waited.unwrap_or_else(PoisonError::into_inner).0.pending.is_empty()
    }

    /// Makes a call that may take long under the eyes of the thread that watches.
    fn call<T>(self: &Arc<Self>, what: &str, work: impl FnOnce() -> T) -> T {
        self.lock().call = Some((what.to_owned(), Instant::now()));
        self.watch();
        let done = work();
        self.lock().call = None;
        done
    }

    fn watch(self: &Arc<Self>) {
        if std::mem::replace(&mut self.lock().watched, true) {
            return;
        }
        let ours = Arc::clone(self);
        let name = format!("deletions {}", self.volume);
        if let Err(error) = thread::Builder::new().name(name).spawn(move || ours.keep_watch()) {
            tracing::warn!(volume = %self.volume, %error, "nobody watches the cleaner");
            self.lock().watched = false;
        }
    }

    /// Until everything is gone.
    fn keep_watch(&self) {
        let begun = Instant::now();
        let (mut moved, mut said, mut patience) = (begun, begun, self.pace.first_word);
        let mut left = 0;
        loop {
            thread::sleep(self.pace.look);
            let still = match btrfs::being_deleted(&self.dir) {
                Ok(still) => still,
                Err(error) => {
                    tracing::warn!(volume = %self.volume, error = chain(&error), "cannot see what the cleaner does");
                    let mut state = self.lock();
                    *state = State { call: state.call.take(), ..State::default() };
                    self.changed.notify_all();
                    return;
                }
            };
            let mut state = self.lock();
            let before = state.pending.len();
            state.pending.retain(|doomed| still.contains(&doomed.tree_id));
            state.gone += before - state.pending.len();
            if state.pending.is_empty() && state.call.is_none() {
                let gone = std::mem::take(&mut state.gone);
                state.watched = false;
                self.changed.notify_all();
                drop(state);
                return self.all_gone(gone, begun);
            }
            let now = Instant::now();
            // Something new or something less: as long as it changes, it will end.
            if state.pending.len() != left {
                (left, moved) = (state.pending.len(), now);
            }
            if now.duration_since(said) >= patience {
                (said, patience) = (now, patience.saturating_mul(2));
                let (call, deletions) = (state.call.clone(), state.pending.len());
                let oldest = state.pending.first().map(|doomed| doomed.snapshot.clone());
                // Not in hand while the file system is asked for more: it may hang.
                drop(state);
                self.say_if_it_hangs(call);
                self.say_if_it_waits(oldest, deletions, now.duration_since(moved), begun);
            }
        }
    }

    fn all_gone(&self, snapshots: usize, begun: Instant) {
        if snapshots == 0 {
            return;
        }
        let (seconds, free) = (begun.elapsed().as_secs_f64(), self.free());
        tracing::info!(volume = %self.volume, snapshots, seconds, free, "deleted snapshots are gone from disk");
    }

    fn say_if_it_hangs(&self, call: Option<(String, Instant)>) {
        let Some((what, since)) = call.filter(|(_, since)| since.elapsed() >= self.pace.first_word) else { return };
        let (volume, seconds) = (&self.volume, since.elapsed().as_secs_f64());
        tracing::warn!(%volume, snapshot = what, seconds, "a deletion hangs in the kernel; look for what else the file system is doing");
    }

    /// Progress, or that there is none.
    fn say_if_it_waits(&self, oldest: Option<String>, deletions: usize, idle: Duration, begun: Instant) {
        let Some(snapshot) = oldest else { return };
        let (volume, free) = (&self.volume, self.free());
        let (seconds, idle_seconds) = (begun.elapsed().as_secs_f64(), idle.as_secs_f64());
        if idle < self.pace.endless {
            tracing::info!(%volume, snapshot, deletions, seconds, free, "waiting for the cleaner");
        } else {
            tracing::warn!(
                %volume, snapshot, deletions, seconds = idle_seconds, free,
                "a deletion does not end; is anybody inside, or are quotas on?"
            );
        }
    }

    /// Bytes that the file system has free, as far as it says.
    fn free(&self) -> Option<u64> {
        btrfs::space(&self.dir).ok().map(|space| space.free)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::{
        btrfs::{Access, Subvolume, snapshot, snapshots},
        testing::{SMALL, TestFs},
    };

    const QUICK: Pace = Pace {
        look: Duration::from_millis(10),
        first_word: Duration::from_millis(20),
        endless: Duration::from_millis(100),
    };

    /// A file system with snapshots of a megabyte.
    fn with_snapshots(count: usize) -> (TestFs, Arc<Deletions>, Vec<Found>) {
        let fs = TestFs::new(SMALL);
        let source = Subvolume::open(&fs.subvolume("source")).unwrap();
        for i in 0..count {
            fs::write(source.path().join("file"), vec![i as u8; 1 << 20]).unwrap();
            snapshot(&source, &fs.path().join(format!("v.20260101T00000{i}Z")), Access::ReadOnly).unwrap();
        }
        let volume = "v".parse().unwrap();
        let found = snapshots(fs.path(), &volume).unwrap();
        let deletions = Deletions::new(fs.path(), &volume, QUICK);
        (fs, deletions, found)
    }

    #[test]
    fn what_is_deleted_is_gone_in_the_end() {
        let (fs, deletions, found) = with_snapshots(3);
        assert!(deletions.wait(Duration::ZERO), "nothing is pending");
        found[1..].iter().for_each(|found| deletions.delete(found).unwrap());
        assert_eq!(deletions.pending(), 2);
        deletions.commit().unwrap();
        assert!(deletions.wait(Duration::from_secs(60)), "the cleaner did not come");
        for gone in &found[1..] {
            assert!(btrfs::is_gone(fs.path(), gone.info.tree_id).unwrap());
        }
        assert!(deletions.delete(&found[1]).is_err(), "deleted twice");
        assert_eq!(deletions.pending(), 0);
        // Somebody watches again.
        deletions.delete(&found[0]).unwrap();
        deletions.commit().unwrap();
        assert!(deletions.wait(Duration::from_secs(60)));
    }

    #[test]
    fn as_long_as_somebody_is_inside_it_is_not_gone_and_in_nobodys_way() {
        let (_fs, deletions, found) = with_snapshots(2);
        let inside = File::open(found[1].path.join("file")).unwrap();
        deletions.delete(&found[1]).unwrap();
        deletions.commit().unwrap();
        assert!(!deletions.wait(Duration::from_millis(500)), "the cleaner took what is in use");
        deletions.delete(&found[0]).unwrap();
        deletions.commit().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while deletions.pending() > 1 {
            assert!(Instant::now() < deadline, "the other one is not gone");
            thread::sleep(QUICK.look);
        }
        drop(inside);
        // Else the cleaner would look again in half a minute.
        deletions.commit().unwrap();
        assert!(deletions.wait(Duration::from_secs(60)));
    }
}
