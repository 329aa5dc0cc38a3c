//! Makes a verified snapshot the one that new clients see, in one atomic step; whoever is inside the former one stays there.
//!
//! | step | what is durable behind it | after a crash there, mounts alive | after a reboot there |
//! |---|---|---|---|
//! | 1 | `gen-N/tree`, empty | the directories are removed | the same; the former snapshot is mounted again |
//! | 2 | the new snapshot is mounted there | unmounted, removed | as 1 |
//! | 3 | read-only, nosuid, nodev, noexec, noatime | as 2 | as 1 |
//! | 4 | the intent is in the state file | the new snapshot is published | the new snapshot is published |
//! | 5 | `live` and `gen-N` have changed places | the result is written | as 4 |
//! | 6 | the directory is synced | as 5 | as 4 |
//! | 7 | the result is in the state file | nothing to do | the new snapshot is mounted again |
//!
//! The first publication ever has no `live` to change places with: step 5 renames `gen-N` to `live`. So `live/tree` is never an
//! empty directory before it is a snapshot.
//!
//! Invariants: as long as `live/tree` shows a complete snapshot, it is the published one, whatever the state file says (it may
//! have been restored from an older day); nothing but step 5 changes it. A snapshot is only ever mounted at a generation.

mod layout;
mod recover;
mod state;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use common::{
    crash,
    durable::DurableError,
    snapshot::{Snapshot, VolumeName},
};
use jiff::Timestamp;

use self::{
    layout::{Layout, Occupant},
    state::{Intent, State, StateFile},
};
pub use self::{recover::Unrecovered, state::Retiring};
use crate::{
    mount::{self, MountError, Unmounted},
    verify::Verified,
};

/// The publication of one volume, in one of its valid states. One agent at a time (the caller holds the volume's lock).
///
/// All calls block, for milliseconds: mounts, renames and two small synced writes.
#[derive(Debug)]
pub struct Publisher {
    layout: Layout,
    file: StateFile,
    state: State,
}

/// What a publication took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The exchange itself; zero if the snapshot was the published one already.
    pub swap: Duration,
    /// All steps.
    pub total: Duration,
}

/// See [`look`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// What new clients see.
    pub published: Option<Snapshot>,
    /// What others may be inside.
    pub retiring: Vec<Snapshot>,
}

/// Why a publication or its recovery failed. Unless said otherwise `live/tree` shows what it showed before.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A mount call failed.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The state file cannot be read or written. If that was the last step, the new snapshot is published already.
    #[error(transparent)]
    State(#[from] DurableError),
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The call, as a verb.
        what: &'static str,
        /// What it was about.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory holds something that no publication made.
    #[error("{} is not what this agent makes there; `publish` must name a directory of its own: move it away", path.display())]
    NotOurs {
        /// The thing.
        path: PathBuf,
    },
    /// Somebody else mounted something where clients look.
    #[error("{what} is mounted at {}, and it is no snapshot of this volume: unmount it", path.display())]
    Foreign {
        /// Where.
        path: PathBuf,
        /// What.
        what: String,
    },
    /// Between verification and publication something happened to the snapshot.
    #[error("{} is not the verified snapshot {snapshot} any more; do not touch snapshots in the store", path.display())]
    Changed {
        /// The snapshot that was to be published.
        snapshot: Snapshot,
        /// Where it should be.
        path: PathBuf,
    },
}

impl PublishError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }
}

/// What clients see of a volume and what they may still be inside, found out without touching anything: for people who ask
/// beside a running agent, or while none is running. What is not mounted is what the next start would mount.
pub fn look(volume: &VolumeName, publish_dir: &Path, state_dir: &Path) -> Result<Looked, PublishError> {
    let layout = Layout::new(publish_dir, volume);
    let state = StateFile::new(state_dir, volume).load()?;
    let remembered = state.intent.map(|intent| intent.snapshot).or(state.published);
    if !publish_dir.try_exists().map_err(PublishError::io("look at", publish_dir))? {
        return Ok(Looked { published: remembered, retiring: Vec::new() });
    }
    let shown = layout.look_at_live()?.and_then(|occupant| occupant.as_snapshot().cloned());
    // An agent at work may have removed one of them meanwhile.
    let occupant = |number: u64| layout.look_at(&layout.generation(number)).ok()?.as_snapshot().cloned();
    let retiring = layout.generations()?.into_iter().filter_map(occupant).collect();
    Ok(Looked { published: shown.or(remembered), retiring })
}

impl Publisher {
    /// Reads what is remembered of `volume`; [`Unrecovered::recover`] then makes it true.
    pub fn open(volume: &VolumeName, publish_dir: &Path, state_dir: &Path) -> Result<Unrecovered, PublishError> {
        let file = StateFile::new(state_dir, volume);
        let state = file.load()?;
        let layout = Layout::new(publish_dir, volume);
        layout.make_directory()?;
        Ok(Unrecovered(Self { layout, file, state }))
    }

    /// Makes a verified snapshot the published one. Nothing happens if it is already.
    pub fn publish(&mut self, verified: Verified) -> Result<Published, PublishError> {
        let begun = Instant::now();
        let live = self.layout.look_at_live()?;
        if live == Some(Occupant::Snapshot(verified.snapshot().clone())) {
            self.settle(verified.snapshot().clone())?;
            return Ok(Published { swap: Duration::ZERO, total: begun.elapsed() });
        }
        self.put_live(verified.snapshot(), verified.path(), live)
    }

    /// The volume.
    pub fn volume(&self) -> &VolumeName {
        self.layout.volume()
    }

    /// What new clients see. None before the first publication.
    pub fn published(&self) -> Option<&Snapshot> {
        self.state.published.as_ref()
    }

    /// Former snapshots that clients are or may be inside: not to be deleted.
    pub fn retiring(&self) -> &[Retiring] {
        &self.state.retiring
    }

    /// The seven steps. `live` is who is there now.
    fn put_live(
        &mut self,
        snapshot: &Snapshot,
        path: &Path,
        live: Option<Occupant>,
    ) -> Result<Published, PublishError> {
        let begun = Instant::now();
        let number = self.next_generation()?;
        let exchanged = self.stage(number, snapshot, path, live.as_ref()).and_then(|()| self.exchange(number, &live));
        let swap = match exchanged {
            Ok(swap) => swap,
            Err(error) => {
                self.unstage(number);
                return Err(error);
            }
        };
        // From here on the new snapshot is the published one, even if writing that down should fail.
        self.state.published = Some(snapshot.clone());
        self.state.intent = None;
        let former = live.as_ref().and_then(Occupant::as_snapshot).cloned();
        if let Some(former) = &former {
            tracing::info!(volume = %self.volume(), snapshot = %former, generation = number, "retiring");
        }
        if matches!(live, Some(Occupant::Snapshot(_) | Occupant::Spoiled(_))) {
            self.state.retiring.push(Retiring { generation: number, snapshot: former, since: Timestamp::now() });
        }
        let synced = self.layout.sync();
        crash::point("publish", 6);
        self.file.store(&self.state)?;
        crash::point("publish", 7);
        if live == Some(Occupant::Nobody) {
            // After a reboot: nothing was mounted at the `live` that is gen-N now. If it stays, the next recovery removes it.
            let _ = self.layout.remove(number);
        }
        synced?;
        let published = Published { swap, total: begun.elapsed() };
        let (swap_us, publish_us) = (micros(swap), micros(published.total));
        tracing::info!(volume = %self.volume(), %snapshot, swap_us, publish_us, generation = number, "published");
        Ok(published)
    }

    /// Steps 1 to 4: everything that may take time or fail.
    fn stage(
        &mut self,
        number: u64,
        snapshot: &Snapshot,
        path: &Path,
        live: Option<&Occupant>,
    ) -> Result<(), PublishError> {
        let tree = self.layout.generation_tree(number);
        self.layout.make(number)?;
        crash::point("publish", 1);
        mount::bind(path, &tree)?;
        crash::point("publish", 2);
        mount::protect(&tree)?;
        crash::point("publish", 3);
        if self.layout.look_at(&self.layout.generation(number))? != Occupant::Snapshot(snapshot.clone()) {
            return Err(PublishError::Changed { snapshot: snapshot.clone(), path: path.to_owned() });
        }
        let replaces = live.and_then(Occupant::as_snapshot).cloned();
        self.state.generation = number;
        self.state.intent = Some(Intent { generation: number, snapshot: snapshot.clone(), replaces });
        self.file.store(&self.state)?;
        crash::point("publish", 4);
        Ok(())
    }

    /// Step 5: the only thing that ever changes what new clients see.
    fn exchange(&self, number: u64, live: &Option<Occupant>) -> Result<Duration, PublishError> {
        let (staged, target) = (self.layout.generation(number), self.layout.live());
        let begun = Instant::now();
        match live {
            Some(_) => mount::exchange(&staged, &target)?,
            None => mount::rename_to_free_name(&staged, &target)?,
        }
        let swap = begun.elapsed();
        crash::point("publish", 5);
        Ok(swap)
    }

    /// Takes back what [`Self::stage`] did. The error that led here is the one to report: what fails in here is only logged.
    fn unstage(&mut self, number: u64) {
        let snapshot = self.state.intent.take().map(|intent| intent.snapshot);
        // On the list, so that a later tick gets rid of it if it is in use just now.
        self.state.retiring.push(Retiring { generation: number, snapshot, since: Timestamp::now() });
        if let Err(error) = self.let_go(number) {
            let volume = self.layout.volume();
            tracing::warn!(%volume, generation = number, %error, "what was prepared for a publication could not be removed yet");
        }
    }

    /// Writes down that `snapshot` is the published one, if the state file says anything else.
    fn settle(&mut self, snapshot: Snapshot) -> Result<(), PublishError> {
        let settled = State { published: Some(snapshot), intent: None, ..self.state.clone() };
        if self.file.load()? != settled {
            self.file.store(&settled)?;
        }
        self.state = settled;
        Ok(())
    }

    /// A number that no generation has or had.
    fn next_generation(&self) -> Result<u64, PublishError> {
        let highest = self.layout.generations()?.last().copied().unwrap_or(0);
        Ok(highest.max(self.state.generation) + 1)
    }

    /// Tries to unmount a retiring generation and to remove its directories.
    pub(crate) fn let_go(&mut self, generation: u64) -> Result<Unmounted, PublishError> {
        let tree = self.layout.generation_tree(generation);
        // More than one mount there is not our doing, but no reason to stay for ever.
        while mounted(&tree)? {
            if mount::unmount(&tree)? == Unmounted::Busy {
                return Ok(Unmounted::Busy);
            }
            crash::point("retire", 1);
        }
        self.layout.remove(generation)?;
        crash::point("retire", 2);
        self.state.retiring.retain(|retiring| retiring.generation != generation);
        self.file.store(&self.state)?;
        crash::point("retire", 3);
        Ok(Unmounted::Done)
    }
}

/// Whether anything is mounted at a path that may be gone.
fn mounted(path: &Path) -> Result<bool, PublishError> {
    if !path.try_exists().map_err(PublishError::io("look at", path))? {
        return Ok(false);
    }
    Ok(mount::at(path)?.is_some())
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}
