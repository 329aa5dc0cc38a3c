//! A snapshot that is worked on before it gets its name: a filtered one, or one that is checked.
//!
//! 1. A snapshot of the source is taken as `<volume>.filtering`, which is no snapshot's name: nobody sends or prunes it.
//! 2. What is excluded is removed from it, and the times of directories are put back.
//! 3. It is made read-only. With `guix_cache` it is checked then.
//! 4. It gets its name. A read-only subvolume may be renamed within its directory. The name is on disk before anybody uses it: were
//!    it lost in a crash, so would be the base that the receiver has.
//!
//! Whatever ends this early leaves no snapshot; a draft that a crash left is deleted before the next one is made.

use std::{
    os::fd::AsFd,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use common::{
    btrfs::{self, Access, BtrfsError, Found, Subvolume},
    crash, durable,
    snapshot::{Snapshot, SnapshotName, VolumeName},
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::{CreateError, Order, Site};
use crate::{
    filter::{
        check::{self, CheckError},
        remove::{self, Done},
    },
    send::Source,
    walk::{self, Options},
};

/// What stands behind the volume's name in the name of a draft.
const SUFFIX: &str = ".filtering";

/// How often and with which pauses it is tried to delete a draft that is still being sent: for two seconds.
const DELETE_ATTEMPTS: u32 = 20;
const DELETE_PAUSE: Duration = Duration::from_millis(100);

/// A snapshot without a name; deleted when dropped.
struct Draft<'a> {
    order: &'a Order<'a>,
    subvolume: Subvolume,
    kept: bool,
}

impl Site {
    /// Where the draft of a volume is, if there is one.
    fn draft(&self, volume: &VolumeName) -> PathBuf {
        self.dir.join(format!("{volume}{SUFFIX}"))
    }

    /// Deletes a draft that was left behind. To be called by whoever holds the volume.
    ///
    /// # Errors
    /// It cannot be deleted, and is in the way of the next one.
    pub fn sweep(&self, volume: &VolumeName) -> Result<(), CreateError> {
        let path = self.draft(volume);
        match btrfs::delete(&path) {
            Ok(()) => tracing::info!(%volume, path = %path.display(), "leftover removed"),
            Err(error) if error.errno() == Some(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Makes a snapshot by way of a draft; `access` is Writable if there is anything to do to it.
    pub(super) fn create_from_draft(&self, order: &Order<'_>, access: Access) -> Result<Found, CreateError> {
        let path = self.draft(order.volume);
        btrfs::snapshot(&self.source, &path, access)?;
        let mut draft = Draft { order, subvolume: Subvolume::open(&path)?, kept: false };
        crash::point("filter", 1);
        if access == Access::Writable {
            draft.remove_excluded()?;
            crash::point("filter", 2);
            draft.subvolume.set_read_only(true)?;
        }
        if order.filter.guix_cache {
            draft.check(&btrfs::snapshots(&self.dir, order.volume)?)?;
        }
        crash::point("filter", 3);
        let name = self.with_free_name(order.volume, order.now, |path| btrfs::rename(draft.subvolume.path(), path))?;
        draft.kept = true;
        crash::point("filter", 4);
        btrfs::wait_sync(&self.dir, btrfs::start_sync(&self.dir)?)?;
        let path = self.dir.join(name.to_string());
        let info = Subvolume::open(&path)?.info()?;
        let found = Found { snapshot: Snapshot { name, id: info.stream_id() }, path, info };
        if order.filter.guix_cache {
            remember(order, &found.snapshot);
        }
        Ok(found)
    }
}

impl Draft<'_> {
    fn options(&self) -> Options<'_> {
        let Order { stop, progress_interval, .. } = *self.order;
        Options { threads: walk::threads(), stop, tick_interval: progress_interval }
    }

    fn remove_excluded(&self) -> Result<(), CreateError> {
        let (started, volume) = (Instant::now(), self.order.volume.as_str());
        let rules = self.order.filter.at(self.order.now);
        let progress = |Done { seen, removed }| {
            let seconds = started.elapsed().as_secs_f64();
            tracing::info!(volume, stage = "filter", files = seen, removed, seconds, "filter progress");
        };
        let Done { seen, removed } = remove::remove(self.subvolume.as_fd(), &rules, &self.options(), progress)?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(volume, stage = "filter", files = seen, removed, seconds, "filtered");
        Ok(())
    }

    /// Looks whether every narinfo fits the nars: of all, or of what changed since the snapshot that was found good last.
    fn check(&self, snapshots: &[Found]) -> Result<(), CreateError> {
        let (started, volume) = (Instant::now(), self.order.volume.as_str());
        let rules = self.order.filter.at(self.order.now);
        let root = self.subvolume.as_fd();
        let checked = checked(self.order);
        let good = snapshots.iter().find(|found| checked.as_ref() == Some(&found.snapshot));
        let changes = match good {
            Some(good) => check::changes(root, &self.against(good)?, &rules, &self.options())?,
            None => None,
        };
        let since = good.filter(|_| changes.is_some()).map(|good| good.snapshot.to_string());
        let good = match changes {
            Some(good) => good,
            None => check::everything(root, &rules, &self.options(), |files| {
                let seconds = started.elapsed().as_secs_f64();
                tracing::info!(volume, stage = "filter", files, seconds, "check progress");
            })?,
        };
        let (narinfos, partly_excluded, seconds) =
            (good.narinfos, good.partly_excluded, started.elapsed().as_secs_f64());
        tracing::info!(volume, stage = "filter", narinfos, partly_excluded, since, seconds, "narinfos checked");
        Ok(())
    }

    /// The draft and a snapshot before it, open to be compared.
    fn against(&self, base: &Found) -> Result<Source, CreateError> {
        let info = self.subvolume.info()?;
        // The name that it will have is not known yet, and does not matter.
        let name = SnapshotName::new(self.order.volume.clone(), self.order.now);
        let path = self.subvolume.path().to_owned();
        let draft = Found { snapshot: Snapshot { name, id: info.stream_id() }, path, info };
        Ok(Source::open(&draft, Some(base)).map_err(CheckError::from)?)
    }
}

/// The snapshot that was found good last. Lost, it costs a look at everything.
#[derive(Debug, Serialize, Deserialize)]
struct Checked {
    /// Under which patterns.
    exclude: Vec<String>,
    snapshot: Snapshot,
}

/// The snapshot that was found good under the same patterns.
fn checked(order: &Order<'_>) -> Option<Snapshot> {
    match durable::load::<Checked>(order.checked_file) {
        Ok(checked) => checked.filter(|checked| order.filter.exclude.texts().eq(&checked.exclude)).map(|c| c.snapshot),
        Err(error) => {
            tracing::warn!(volume = %order.volume, %error, "every narinfo is looked at again");
            None
        }
    }
}

fn remember(order: &Order<'_>, snapshot: &Snapshot) {
    let exclude = order.filter.exclude.texts().map(str::to_owned).collect();
    if let Err(error) = durable::store(order.checked_file, &Checked { exclude, snapshot: snapshot.clone() }) {
        tracing::warn!(volume = %order.volume, %error, "the next snapshot looks at every narinfo again");
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let mut deleted = btrfs::delete(self.subvolume.path());
        for _ in 0..DELETE_ATTEMPTS {
            // A send of it that was called off has not noticed yet.
            if deleted.as_ref().err().and_then(BtrfsError::errno) != Some(Errno::PERM) {
                break;
            }
            thread::sleep(DELETE_PAUSE);
            deleted = btrfs::delete(self.subvolume.path());
        }
        if let Err(error) = deleted {
            tracing::warn!(volume = %self.order.volume, %error, "leftover not removed; the next snapshot tries again");
        }
    }
}

#[cfg(test)]
mod tests;
