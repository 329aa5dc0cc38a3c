//! A snapshot that is worked on before it gets its name: a filtered one.
//!
//! 1. A writable snapshot of the source is taken as `<volume>.filtering`, which is no snapshot's name: nobody sends or prunes it.
//! 2. What is excluded is removed from it, and the times of directories are put back.
//! 3. It is made read-only.
//! 4. It gets its name. A read-only subvolume may be renamed within its directory. The name is on disk before anybody uses it: were
//!    it lost in a crash, so would be the base that the receiver has.
//!
//! Whatever ends this early leaves no snapshot; a draft that a crash left is deleted before the next one is made.

use std::{os::fd::AsFd, path::PathBuf, time::Instant};

use common::{
    btrfs::{self, Access, Found, Subvolume},
    crash,
    snapshot::{Snapshot, VolumeName},
};
use rustix::io::Errno;

use super::{CreateError, Order, Site};
use crate::{
    filter::remove::{self, Done},
    walk::{self, Options},
};

/// What stands behind the volume's name in the name of a draft.
const SUFFIX: &str = ".filtering";

/// A snapshot without a name; deleted when dropped.
struct Draft<'a> {
    volume: &'a VolumeName,
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

    /// Makes a filtered snapshot.
    pub(super) fn create_filtered(&self, order: &Order<'_>) -> Result<Found, CreateError> {
        self.sweep(order.volume)?;
        let path = self.draft(order.volume);
        btrfs::snapshot(&self.source, &path, Access::Writable)?;
        let mut draft = Draft { volume: order.volume, subvolume: Subvolume::open(&path)?, kept: false };
        crash::point("filter", 1);
        draft.remove_excluded(order)?;
        crash::point("filter", 2);
        draft.subvolume.set_read_only(true)?;
        crash::point("filter", 3);
        let name = self.with_free_name(order.volume, order.now, |path| btrfs::rename(draft.subvolume.path(), path))?;
        draft.kept = true;
        crash::point("filter", 4);
        btrfs::wait_sync(&self.dir, btrfs::start_sync(&self.dir)?)?;
        let path = self.dir.join(name.to_string());
        let info = Subvolume::open(&path)?.info()?;
        Ok(Found { snapshot: Snapshot { name, id: info.stream_id() }, path, info })
    }
}

impl Draft<'_> {
    fn remove_excluded(&self, order: &Order<'_>) -> Result<(), CreateError> {
        let (started, volume) = (Instant::now(), self.volume.as_str());
        let options = Options { threads: walk::threads(), stop: order.stop, tick_interval: order.progress_interval };
        let rules = order.filter.at(order.now);
        let progress = |Done { seen, removed }| {
            let seconds = started.elapsed().as_secs_f64();
            tracing::info!(volume, stage = "filter", files = seen, removed, seconds, "filter progress");
        };
        let Done { seen, removed } = remove::remove(self.subvolume.as_fd(), &rules, &options, progress)?;
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(volume, stage = "filter", files = seen, removed, seconds, "filtered");
        Ok(())
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = btrfs::delete(self.subvolume.path()) {
            tracing::warn!(volume = %self.volume, %error, "leftover not removed; the next snapshot tries again");
        }
    }
}

#[cfg(test)]
mod tests;
