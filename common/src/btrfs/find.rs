//! The snapshots of a volume in a directory. The file system is the database: nothing else remembers them.

use std::{
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::{BtrfsError, Subvolume, SubvolumeInfo};
use crate::{
    retention::newest_first,
    snapshot::{Snapshot, SnapshotName, VolumeName},
};

/// A snapshot and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Its name and identity.
    pub snapshot: Snapshot,
    /// Where it is.
    pub path: PathBuf,
    /// What the kernel says about it.
    pub info: SubvolumeInfo,
}

/// An entry of a directory whose name is of interest, and the subvolume that it is, if it is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate<N> {
    /// What the name says.
    pub name: N,
    /// Where it is.
    pub path: PathBuf,
    /// None if it is no subvolume.
    pub info: Option<SubvolumeInfo>,
}

/// Our own snapshots of a volume: read-only subvolumes in `dir`, named after it; the newest first.
///
/// Their ids are those that a send of them has.
pub fn snapshots(dir: &Path, volume: &VolumeName) -> Result<Vec<Found>, BtrfsError> {
    let name = |name: &OsStr| name.to_str()?.parse().ok().filter(|name: &SnapshotName| name.volume() == volume);
    let found = candidates(dir, name)?.into_iter().filter_map(|Candidate { name, path, info }| {
        let info = info.filter(|info| info.read_only)?;
        Some(Found { snapshot: Snapshot { name, id: info.stream_id() }, path, info })
    });
    let mut found: Vec<Found> = found.collect();
    found.sort_by_cached_key(|found| newest_first(&found.snapshot));
    Ok(found)
}

/// The entries of `dir` that `interesting` makes something of, in no order. What vanishes meanwhile is left out.
pub fn candidates<N>(dir: &Path, interesting: impl Fn(&OsStr) -> Option<N>) -> Result<Vec<Candidate<N>>, BtrfsError> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(BtrfsError::call("list", dir))? {
        let file_name: OsString = entry.map_err(BtrfsError::call("list", dir))?.file_name();
        let Some(name) = interesting(&file_name) else { continue };
        let path = dir.join(&file_name);
        let info = match Subvolume::open(&path).and_then(|subvolume| subvolume.info()) {
            Ok(info) => Some(info),
            Err(BtrfsError::NotBtrfs(_) | BtrfsError::NotSubvolume(_)) => None,
            Err(error) if matches!(error.errno(), Some(Errno::NOTDIR | Errno::LOOP)) => None,
            Err(error) if error.errno() == Some(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        found.push(Candidate { name, path, info });
    }
    Ok(found)
}
