//! The first step of a cycle: a read-only snapshot of the source, named by the clock, and whether it is time for one.

mod draft;

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Duration,
};

use common::{
    btrfs::{self, Access, BtrfsError, Found, Subvolume},
    snapshot::{Snapshot, SnapshotName, VolumeName},
};
use jiff::{SignedDuration, Timestamp};
use rustix::io::Errno;

use crate::{
    filter::{Filter, check::CheckError},
    walk::WalkError,
};

/// How many seconds ahead of the clock a name may be when those before are taken. More than anybody needs: a name is taken only if
/// there are two snapshots within a second, or if the clock was set back.
const MAX_SECONDS_AHEAD: i64 = 3600;

/// Why there is no new snapshot.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A configured directory is not there, or cannot be reached.
    #[error("{key} = {path:?}: {source}; create the directory or correct the configuration")]
    Missing {
        /// The key of the configuration.
        key: &'static str,
        /// Its value.
        path: PathBuf,
        /// Why it cannot be reached.
        #[source]
        source: io::Error,
    },
    /// The source changes never.
    #[error("source = {0:?} is a read-only subvolume; name the writable one that the build farm works in")]
    SourceReadOnly(PathBuf),
    /// Snapshots do not cross file systems.
    #[error(
        "snapshot_dir = {dir:?} is not on the file system of source = {source_path:?}; choose a directory on that one"
    )]
    OtherFileSystem {
        /// Where the snapshots should go.
        dir: PathBuf,
        /// What they should be of.
        source_path: PathBuf,
    },
    /// Every snapshot would show the directory of the snapshots.
    #[error("snapshot_dir = {dir:?} is inside source = {source_path:?}; choose a directory beside it")]
    InsideSource {
        /// Where the snapshots should go.
        dir: PathBuf,
        /// What they should be of.
        source_path: PathBuf,
    },
    /// So many names were taken that something else must be wrong.
    #[error("all names from {first} on are taken in {dir:?}; is the clock right?")]
    NamesTaken {
        /// The name that the clock says.
        first: SnapshotName,
        /// Where the snapshots are.
        dir: PathBuf,
    },
    /// btrfs refused.
    #[error(transparent)]
    Btrfs(#[from] BtrfsError),
    /// What is excluded cannot be removed from the snapshot.
    #[error("cannot filter the snapshot: {0}")]
    Filter(#[from] WalkError),
    /// It is no cache of `guix publish` that could be published.
    #[error("the snapshot is not fit to be published, and removed again: {0}")]
    Check(#[from] CheckError),
}

impl CreateError {
    /// Whether it was [`Order::stop`].
    pub fn is_stop(&self) -> bool {
        matches!(self, Self::Filter(WalkError::Stopped) | Self::Check(CheckError::Walk(WalkError::Stopped)))
    }
}

/// A snapshot that is wanted.
#[derive(Debug)]
pub struct Order<'a> {
    /// Of which volume.
    pub volume: &'a VolumeName,
    /// The time that names it, and that ages are counted to.
    pub now: Timestamp,
    /// What must not be in it.
    pub filter: &'a Filter,
    /// Becomes true when it is wanted no more.
    pub stop: &'a AtomicBool,
    /// How often the log says how far it is.
    pub progress_interval: Duration,
    /// Where it is kept which snapshot was found fit to be published.
    pub checked_file: &'a Path,
}

/// A source and the directory of its snapshots, found fit for each other.
#[derive(Debug)]
pub struct Site {
    source: Subvolume,
    dir: PathBuf,
}

impl Site {
    /// Opens both and sees whether snapshots can be taken from the one into the other. Symlinks to them are followed.
    pub fn open(source: &Path, snapshot_dir: &Path) -> Result<Self, CreateError> {
        let found = |key, path: &Path| {
            let missing = |source| CreateError::Missing { key, path: path.to_owned(), source };
            std::fs::canonicalize(path).map_err(missing)
        };
        let source_path = found("source", source)?;
        let dir = found("snapshot_dir", snapshot_dir)?;
        let source = Subvolume::open(&source_path)?;
        let info = source.info()?;
        if info.read_only {
            return Err(CreateError::SourceReadOnly(source_path));
        }
        if btrfs::file_system(&source_path)? != btrfs::file_system(&dir)? {
            return Err(CreateError::OtherFileSystem { dir, source_path });
        }
        // By path for what lies in a subvolume inside the source, by tree for what is reached over another mount.
        if dir.starts_with(&source_path) || btrfs::tree_of(&dir)? == info.tree_id {
            return Err(CreateError::InsideSource { dir, source_path });
        }
        Ok(Self { source, dir })
    }

    /// The source.
    pub fn source(&self) -> &Subvolume {
        &self.source
    }

    /// Makes a snapshot as wanted. It is complete as soon as it has its name, and on disk on return.
    ///
    /// Without a filter and a check it is a plain snapshot of the source, unless that would be older than the newest one: a filtered one
    /// is changed after it was taken, so a source that rested since then has the smaller ctransid. Then it is made like a filtered one.
    ///
    /// # Errors
    /// See [`CreateError`]; there is no snapshot then.
    pub fn take(&self, order: &Order<'_>) -> Result<Found, CreateError> {
        let newest = btrfs::snapshots(&self.dir, order.volume)?.into_iter().next();
        let source = self.source.info()?;
        let is_behind = newest.is_some_and(|newest| newest.info.ctransid > source.ctransid);
        let access = if order.filter.is_idle() && !is_behind { Access::ReadOnly } else { Access::Writable };
        self.sweep(order.volume)?;
        if access == Access::ReadOnly && !order.filter.guix_cache {
            return self.create(order.volume, order.now);
        }
        self.create_from_draft(order, access)
    }

    /// Takes a read-only snapshot, named by the time `now` or by the next second whose name is free. It is on disk on return.
    pub fn create(&self, volume: &VolumeName, now: Timestamp) -> Result<Found, CreateError> {
        let name = self.with_free_name(volume, now, |path| btrfs::snapshot(&self.source, path, Access::ReadOnly))?;
        let path = self.dir.join(name.to_string());
        let info = Subvolume::open(&path)?.info()?;
        Ok(Found { snapshot: Snapshot { name, id: info.stream_id() }, path, info })
    }

    /// Calls `make` with paths until there is nothing of that name (EEXIST).
    ///
    /// Free means: behind the newest one's, too. The name of a pruned snapshot may be in use at the receiver still.
    fn with_free_name(
        &self,
        volume: &VolumeName,
        now: Timestamp,
        make: impl Fn(&Path) -> Result<(), BtrfsError>,
    ) -> Result<SnapshotName, CreateError> {
        let snapshots = btrfs::snapshots(&self.dir, volume)?;
        let begin = first_free(snapshots.first().map(|newest| &newest.snapshot.name), now);
        let first = SnapshotName::new(volume.clone(), begin);
        for ahead in 0..=MAX_SECONDS_AHEAD {
            let taken = begin.saturating_add(SignedDuration::from_secs(ahead)).unwrap_or(Timestamp::MAX);
            let name = SnapshotName::new(volume.clone(), taken);
            match make(&self.dir.join(name.to_string())) {
                Ok(()) => return Ok(name),
                Err(error) if error.errno() == Some(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(CreateError::NamesTaken { first, dir: self.dir.clone() })
    }
}

/// The first second whose name may be free: now, or the one behind the newest if that is a little ahead of the clock. Pure.
fn first_free(newest: Option<&SnapshotName>, now: Timestamp) -> Timestamp {
    let Some(newest) = newest else { return now };
    let ahead = newest.taken().duration_since(now).as_secs();
    let next = newest.taken().saturating_add(SignedDuration::from_secs(1)).unwrap_or(Timestamp::MAX);
    if ahead <= MAX_SECONDS_AHEAD { next.max(now) } else { now }
}

/// How long until the next snapshot is due; zero if it is now. Pure.
///
/// None so far, or a newest one from the far future (the clock was set back): due now, for waiting could take years. One that is
/// a little ahead of the clock is named so because others were taken just before it.
pub fn due_in(newest: Option<&SnapshotName>, now: Timestamp, interval: Duration) -> Duration {
    let Some(newest) = newest else { return Duration::ZERO };
    // Negative if the newest is from the future.
    let age = now.duration_since(newest.taken());
    if age.as_secs() < -MAX_SECONDS_AHEAD {
        return Duration::ZERO;
    }
    if age.is_negative() {
        interval.saturating_add(age.unsigned_abs())
    } else {
        interval.saturating_sub(age.unsigned_abs())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use common::testing::{SMALL, TestFs};

    use super::*;

    fn volume() -> VolumeName {
        "v".parse().unwrap()
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(1_795_330_800 + second).unwrap()
    }

    #[test]
    fn snapshots_are_read_only_named_by_the_clock_and_never_in_each_others_way() {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        fs::write(source.join("file"), "x").unwrap();
        let site = Site::open(&source, &dir).unwrap();
        let names: Vec<String> = [0, 0, 1, 0]
            .iter()
            .map(|&second| {
                let found = site.create(&volume(), at(second)).unwrap();
                assert!(found.info.read_only);
                assert_eq!(fs::read_to_string(found.path.join("file")).unwrap(), "x");
                found.snapshot.name.to_string()
            })
            .collect();
        assert_eq!(names, ["v.20261122T070000Z", "v.20261122T070001Z", "v.20261122T070002Z", "v.20261122T070003Z"]);
        let listed = btrfs::snapshots(&dir, &volume()).unwrap();
        assert_eq!(listed.len(), 4);
        assert_eq!(listed[0].snapshot.name.to_string(), names[3]);
    }

    #[test]
    fn the_name_of_a_pruned_snapshot_is_not_used_again() {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        let site = Site::open(&source, &dir).unwrap();
        for _ in 0..3 {
            site.create(&volume(), at(0)).unwrap();
        }
        btrfs::delete(&dir.join("v.20261122T070000Z")).unwrap();
        let next = site.create(&volume(), at(0)).unwrap();
        assert_eq!(next.snapshot.name.to_string(), "v.20261122T070003Z");
        // A clock that was hours ahead is not followed for ever.
        assert_eq!(first_free(Some(&next.snapshot.name), at(-10_000)), at(-10_000));
        assert_eq!(first_free(Some(&next.snapshot.name), at(100)), at(100));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_next_step() {
        let (fs, other) = (TestFs::new(SMALL), TestFs::new(SMALL));
        let source = fs.subvolume("source");
        let plain = source.join("plain");
        fs::create_dir(&plain).unwrap();
        btrfs::create(&source.join("nested")).unwrap();
        let beside = fs.path().join("beside");
        fs::create_dir(&beside).unwrap();
        let fixed = fs.path().join("fixed");
        btrfs::snapshot(&Subvolume::open(&source).unwrap(), &fixed, Access::ReadOnly).unwrap();
        let missing = fs.path().join("missing");

        let said = |source: &Path, dir: &Path| Site::open(source, dir).unwrap_err().to_string();
        assert!(said(&source, other.path()).contains("not on the file system of source"));
        assert!(said(&source, &plain).contains("choose a directory beside it"));
        assert!(said(&source, &source.join("nested")).contains("choose a directory beside it"));
        assert!(said(&source, &missing).contains("snapshot_dir = "));
        assert!(said(&missing, &beside).contains("source = "));
        assert!(said(&plain, &beside).contains("not a btrfs subvolume"));
        assert!(said(&fixed, &beside).contains("read-only"));
        assert!(said(Path::new("/proc"), &beside).contains("not on btrfs"));
        Site::open(&source, &beside).unwrap();
    }

    #[test]
    fn a_snapshot_is_due_when_the_newest_is_old_enough_or_from_the_future() {
        let hour = Duration::from_secs(3600);
        let newest = SnapshotName::new(volume(), at(0));
        assert_eq!(due_in(None, at(0), hour), Duration::ZERO);
        assert_eq!(due_in(Some(&newest), at(0), hour), hour);
        assert_eq!(due_in(Some(&newest), at(3599), hour), Duration::from_secs(1));
        assert_eq!(due_in(Some(&newest), at(3600), hour), Duration::ZERO);
        assert_eq!(due_in(Some(&newest), at(1_000_000), hour), Duration::ZERO);
        assert_eq!(due_in(Some(&newest), at(-1), hour), hour + Duration::from_secs(1));
        assert_eq!(due_in(Some(&newest), at(-3601), hour), Duration::ZERO);
    }
}
