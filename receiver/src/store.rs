//! The directory of received snapshots: what in it is complete, what is left over from a transfer that failed, what is mounted.
//!
//! The file system is the database. A snapshot is complete if and only if it is read-only *and* has a received uuid: `btrfs
//! receive` sets the uuid first and the flag last. So what is writable is a leftover, and what is read-only without a received uuid
//! is not ours: somebody took it there, and it is left alone.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
};

use common::{
    btrfs::{self, BtrfsError, Candidate, Found},
    retention::newest_first,
    snapshot::{Snapshot, SnapshotId, SnapshotName, VolumeName},
};
use rustix::io::Errno;
use tracing::{info, warn};

use crate::{
    checkpoint::Checkpoint,
    mount::{self, MountError},
};

/// What stands between a snapshot's name and the number of a segment of it.
const SEGMENT_INFIX: &str = ".segment-";

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is not there, or cannot be reached.
    #[error("store = {path:?}: {source}; create the directory or correct the configuration")]
    Missing {
        /// As configured.
        path: PathBuf,
        /// Why it cannot be reached.
        #[source]
        source: std::io::Error,
    },
    /// btrfs refused.
    #[error(transparent)]
    Btrfs(#[from] BtrfsError),
    /// The record of a checkpoint cannot be removed.
    #[error("cannot remove the record of a checkpoint from the store")]
    Record(#[source] std::io::Error),
    /// The mounts are not known.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The store's path does not begin with the place where its file system is mounted.
    #[error("store = {path:?} is not below {point:?}, where its file system is mounted; was that moved just now?")]
    Moved {
        /// The store.
        path: PathBuf,
        /// The mount point.
        point: PathBuf,
    },
}

/// The store of one volume.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    volume: VolumeName,
}

/// What a transfer left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leftover {
    /// The snapshot that was on its way.
    pub snapshot: SnapshotName,
    /// The number of the segment; None if it has the name of the snapshot itself.
    pub segment: Option<u32>,
    /// Whether that snapshot is complete: then the segment has done its duty, and no transfer needs it any more.
    pub is_spent: bool,
    /// Where it is.
    pub path: PathBuf,
}

/// What came of deleting several subvolumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Deleted {
    /// So many are gone.
    pub deleted: u32,
    /// So many are still there: mounted, or refused by the kernel; the log says which and why.
    pub remaining: u32,
}

impl Store {
    /// Makes sure that the directory is there and on btrfs. A symlink to it is followed.
    pub fn open(dir: &Path, volume: VolumeName) -> Result<Self, StoreError> {
        let missing = |source| StoreError::Missing { path: dir.to_owned(), source };
        let found = std::fs::canonicalize(dir).map_err(missing)?;
        if !btrfs::is_btrfs(&found)? {
            return Err(BtrfsError::NotBtrfs(found).into());
        }
        Ok(Self { dir: found, volume })
    }

    /// The directory, without symlinks in its path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The volume.
    pub fn volume(&self) -> &VolumeName {
        &self.volume
    }

    /// Where a snapshot of that name is, or would be.
    pub fn path_of(&self, name: &SnapshotName) -> PathBuf {
        self.dir.join(name.to_string())
    }

    /// The complete snapshots of the volume, the newest first. Their ids are those that they were sent with.
    pub fn snapshots(&self) -> Result<Vec<Found>, StoreError> {
        let found = btrfs::candidates(&self.dir, |name| self.snapshot_name(name))?;
        let complete = found.into_iter().filter_map(|Candidate { name, path, info }| {
            let info = info?;
            Some(Found { snapshot: Snapshot { name, id: info.received_id()? }, path, info })
        });
        let mut complete: Vec<Found> = complete.collect();
        complete.sort_by_cached_key(|found| newest_first(&found.snapshot));
        Ok(complete)
    }

    /// The complete snapshot of that identity, whatever its name.
    pub fn find(&self, id: SnapshotId) -> Result<Option<Found>, StoreError> {
        Ok(self.snapshots()?.into_iter().find(|found| found.snapshot.id == id))
    }

    /// What transfers left behind. While one is under way its segments are among them.
    fn leftovers(&self) -> Result<Vec<Leftover>, StoreError> {
        let name = |name: &OsStr| self.snapshot_name(name).map(|name| (name, None)).or_else(|| self.segment(name));
        let found = btrfs::candidates(&self.dir, name)?;
        let is_complete = |snapshot: &SnapshotName| {
            let itself = found.iter().find(|found| found.name.0 == *snapshot && found.name.1.is_none());
            itself.and_then(|found| found.info.as_ref()?.received_id()).is_some()
        };
        let leftover =
            |Candidate { name: (snapshot, segment), path, info }: &Candidate<(SnapshotName, Option<u32>)>| {
                let info = info.as_ref()?;
                // A segment that is complete is one too: without its transfer it is good for nothing.
                let ours = !info.read_only || (segment.is_some() && info.received_uuid.is_some());
                let is_spent = segment.is_some() && is_complete(snapshot);
                ours.then(|| Leftover { snapshot: snapshot.clone(), segment: *segment, is_spent, path: path.clone() })
            };
        Ok(found.iter().filter_map(leftover).collect())
    }

    /// The leftovers of snapshots that are not complete. What a spent segment holds is its snapshot's too.
    pub fn unfinished(&self) -> Result<Vec<Leftover>, StoreError> {
        Ok(self.leftovers()?.into_iter().filter(|leftover| !leftover.is_spent).collect())
    }

    /// Deletes all leftovers but the segment of `checkpoint`, with a line in the log for each that is not spent. To be called only
    /// while no transfer of the volume is under way.
    pub fn sweep(&self, checkpoint: Option<&Checkpoint>) -> Result<Deleted, StoreError> {
        let spared = |leftover: &Leftover| {
            checkpoint.is_some_and(|checkpoint| {
                leftover.snapshot == checkpoint.snapshot.name && leftover.segment == Some(checkpoint.segment)
            })
        };
        let mut leftovers = self.leftovers()?;
        leftovers.retain(|leftover| !spared(leftover));
        let mounted = if leftovers.is_empty() { Mounted::default() } else { self.mounted()? };
        let mut result = Deleted::default();
        for Leftover { snapshot, segment, is_spent, path } in leftovers {
            let (volume, snapshot) = (self.volume.as_str(), snapshot.to_string());
            if mounted.contains(&path) {
                result.remaining += 1;
                warn!(volume, snapshot, segment, "leftover stays, it is mounted; unmount it");
            } else if let Err(error) = discard(&path) {
                result.remaining += 1;
                warn!(volume, snapshot, segment, %error, "leftover cannot be removed");
            } else {
                result.deleted += 1;
                if !is_spent {
                    info!(volume, snapshot, segment, "leftover removed");
                }
            }
        }
        Ok(result)
    }

    /// Deletes the segments of snapshots that are complete. Whether a transfer is under way does not matter to them.
    pub fn discard_spent(&self) -> Result<(), StoreError> {
        for leftover in self.leftovers()?.into_iter().filter(|leftover| leftover.is_spent) {
            discard(&leftover.path)?;
        }
        Ok(())
    }

    /// Which subvolumes of the store are mounted, or something below them is.
    ///
    /// Only mounts that the calling thread sees: not those in private namespaces of others.
    pub fn mounted(&self) -> Result<Mounted, StoreError> {
        let below = mount::holding(&self.dir)?;
        let Ok(relative) = self.dir.strip_prefix(&below.point) else {
            return Err(StoreError::Moved { path: self.dir.clone(), point: below.point });
        };
        let inside = below.root.join(relative);
        let mounts = mount::table()?.into_iter().filter(|mount| mount.device == below.device);
        let entry = |root: PathBuf| Some(self.dir.join(root.strip_prefix(&inside).ok()?.components().next()?));
        Ok(Mounted(mounts.filter_map(|mount| entry(mount.root)).collect()))
    }

    fn snapshot_name(&self, name: &OsStr) -> Option<SnapshotName> {
        name.to_str()?.parse().ok().filter(|name: &SnapshotName| *name.volume() == self.volume)
    }

    fn segment(&self, name: &OsStr) -> Option<(SnapshotName, Option<u32>)> {
        let (snapshot, number) = name.to_str()?.split_once(SEGMENT_INFIX)?;
        let (snapshot, number) = (self.snapshot_name(snapshot.as_ref())?, number.parse().ok()?);
        (segment_name(&snapshot, number).as_str() == name).then_some((snapshot, Some(number)))
    }
}

/// Subvolumes of a store that are mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mounted(Vec<PathBuf>);

impl Mounted {
    /// Whether the subvolume at `path`, directly in the store, is mounted.
    pub fn contains(&self, path: &Path) -> bool {
        self.0.iter().any(|mounted| mounted == path)
    }
}

/// Deletes what nobody needs any more, unless somebody else was faster.
///
/// With it the kernel drops from memory what was just written into it: a sixth of a second a GiB, so nobody should wait for it.
pub fn discard(path: &Path) -> Result<(), BtrfsError> {
    match btrfs::delete(path) {
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(()),
        deleted => deleted,
    }
}

/// The name of a segment of a snapshot that is on its way.
pub fn segment_name(snapshot: &SnapshotName, number: u32) -> String {
    format!("{snapshot}{SEGMENT_INFIX}{number}")
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use common::{
        btrfs::{Subvolume, mark_received},
        testing::{SMALL, TestFs, run},
    };
    use uuid::Uuid;

    use super::*;

    fn id(ctransid: u64) -> SnapshotId {
        SnapshotId { uuid: Uuid::from_u64_pair(1, ctransid), ctransid }
    }

    fn subvolume(store: &Store, name: &str) -> Subvolume {
        let path = store.dir().join(name);
        btrfs::create(&path).unwrap();
        fs::write(path.join("file"), name).unwrap();
        Subvolume::open(&path).unwrap()
    }

    fn received(store: &Store, name: &str, ctransid: u64) {
        mark_received(&subvolume(store, name), id(ctransid)).unwrap();
    }

    fn store(fs: &TestFs) -> Store {
        let dir = fs.path().join("a store");
        fs::create_dir(&dir).unwrap();
        Store::open(&dir, "v".parse().unwrap()).unwrap()
    }

    fn names(store: &Store) -> Vec<String> {
        let entries = fs::read_dir(store.dir()).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn complete_are_those_that_are_read_only_and_received() {
        let fs = TestFs::new(SMALL);
        let store = store(&fs);
        received(&store, "v.20260101T000000Z", 30);
        received(&store, "v.20260101T000001Z", 10);
        received(&store, "v.20260101T000002Z", 20);
        received(&store, "v.20260101T000003Z.segment-1", 40);
        received(&store, "w.20260101T000004Z", 50);
        subvolume(&store, "v.20260101T000005Z");
        subvolume(&store, "v.20260101T000006Z").set_read_only(true).unwrap();
        let complete: Vec<(String, u64)> = store
            .snapshots()
            .unwrap()
            .into_iter()
            .map(|found| (found.snapshot.name.to_string(), found.snapshot.id.ctransid))
            .collect();
        let expected = [("v.20260101T000000Z", 30), ("v.20260101T000002Z", 20), ("v.20260101T000001Z", 10)];
        assert_eq!(complete, expected.map(|(name, ctransid)| (name.to_owned(), ctransid)));
        let found = store.find(id(20)).unwrap().unwrap();
        assert_eq!(found.path, store.path_of(&found.snapshot.name));
        assert_eq!(store.find(SnapshotId { ctransid: 21, ..id(20) }).unwrap(), None);
    }

    #[test]
    fn spent_are_the_segments_of_complete_snapshots_and_no_others() {
        let fs = TestFs::new(SMALL);
        let store = store(&fs);
        received(&store, "v.20260101T000000Z", 1);
        received(&store, "v.20260101T000000Z.segment-1", 2);
        received(&store, "v.20260101T000000Z.segment-2", 3);
        // On its way: a checkpoint, what comes behind it, and the last one, which is not read-only yet.
        received(&store, "v.20260101T000001Z.segment-1", 4);
        subvolume(&store, "v.20260101T000001Z.segment-2");
        received(&store, "v.20260101T000001Z", 5);
        Subvolume::open(&store.dir().join("v.20260101T000001Z")).unwrap().set_read_only(false).unwrap();

        let on_its_way = ["v.20260101T000001Z", "v.20260101T000001Z.segment-1", "v.20260101T000001Z.segment-2"];
        store.discard_spent().unwrap();
        assert_eq!(names(&store), [&["v.20260101T000000Z"], &on_its_way[..]].concat());
        store.discard_spent().unwrap();
        assert_eq!(store.leftovers().unwrap().len(), 3, "what is on its way is left alone");
        discard(&store.dir().join("v.20260101T000000Z.segment-1")).expect("what is gone already is no error");
    }

    #[test]
    fn sweeping_takes_leftovers_and_nothing_else() {
        let fs = TestFs::new(SMALL);
        let store = store(&fs);
        received(&store, "v.20260101T000000Z", 1);
        subvolume(&store, "v.20260101T000001Z");
        subvolume(&store, "v.20260101T000002Z.segment-1");
        received(&store, "v.20260101T000002Z.segment-12", 2);
        // Received but not yet read-only: what a crash between the two leaves.
        received(&store, "v.20260101T000003Z", 3);
        Subvolume::open(&store.dir().join("v.20260101T000003Z")).unwrap().set_read_only(false).unwrap();
        // None of ours.
        subvolume(&store, "v.20260101T000004Z").set_read_only(true).unwrap();
        subvolume(&store, "v.20260101T000005Z.segment-01");
        subvolume(&store, "v.20260101T000006Z.segment-1.bak");
        subvolume(&store, "w.20260101T000007Z");
        subvolume(&store, "home");
        fs::create_dir(store.dir().join("v.20260101T000008Z")).unwrap();

        assert_eq!(store.sweep(None).unwrap(), Deleted { deleted: 4, remaining: 0 });
        let expected = [
            "home",
            "v.20260101T000000Z",
            "v.20260101T000004Z",
            "v.20260101T000005Z.segment-01",
            "v.20260101T000006Z.segment-1.bak",
            "v.20260101T000008Z",
            "w.20260101T000007Z",
        ];
        assert_eq!(names(&store), expected);
        assert_eq!(store.sweep(None).unwrap(), Deleted::default());
    }

    #[test]
    fn a_mounted_leftover_stays_wherever_the_mount_is_and_however_the_store_is_reached() {
        let fs = TestFs::new(SMALL);
        let inner = fs.subvolume("inner");
        fs::create_dir(inner.join("a store")).unwrap();
        // The store on a mount of its own subvolume, as `subvol=` gives it.
        let (outside, at) = (fs.path().join("outside"), fs.path().join("at"));
        fs::create_dir(&outside).unwrap();
        fs::create_dir(&at).unwrap();
        run(Command::new("mount").args(["--bind"]).args([&inner, &at]));
        let store = Store::open(&at.join("a store"), "v".parse().unwrap()).unwrap();
        subvolume(&store, "v.20260101T000000Z");
        subvolume(&store, "v.20260101T000001Z");
        run(Command::new("mount").args(["--bind"]).args([&store.dir().join("v.20260101T000000Z"), &outside]));
        assert_eq!(store.sweep(None).unwrap(), Deleted { deleted: 1, remaining: 1 });
        assert_eq!(names(&store), ["v.20260101T000000Z"]);
        run(Command::new("umount").arg(&outside));
        assert_eq!(store.sweep(None).unwrap(), Deleted { deleted: 1, remaining: 0 });
    }

    #[test]
    fn a_store_that_is_not_there_or_not_on_btrfs_is_refused() {
        let fs = TestFs::new(SMALL);
        let volume = || "v".parse().unwrap();
        let missing = Store::open(&fs.path().join("missing"), volume()).unwrap_err();
        assert!(missing.to_string().contains("create the directory"), "{missing}");
        let other = Store::open(Path::new("/proc"), volume()).unwrap_err();
        assert!(other.to_string().contains("not on btrfs"), "{other}");
        let link = fs.path().join("link");
        std::os::unix::fs::symlink(store(&fs).dir(), &link).unwrap();
        assert_eq!(Store::open(&link, volume()).unwrap().dir(), fs.path().join("a store"));
    }
}
