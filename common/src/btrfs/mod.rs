//! btrfs as the agents need it: subvolumes, snapshots, sends, commits, space. Safe calls over the ioctls in `raw`.
//!
//! The ioctls are called directly, not through the `btrfs` program: no text to parse, an errno for every failure, and a send that
//! a signal cannot repeat (see [`send()`]). The one thing left to the program is `receive`.

mod extents;
mod find;
mod raw;
mod search;
mod send;
mod space;
mod subvolume;

use std::{
    ffi::OsStr,
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags, RenameFlags},
    io::Errno,
};
use uuid::Uuid;

pub use self::{
    extents::{Extent, Piece, extents, pieces},
    find::{Candidate, Found, candidates, snapshots},
    send::{SendOptions, Sending, send, stream_version},
    space::{Cost, Pool, Space, space},
    subvolume::{Subvolume, SubvolumeInfo},
};

/// The inode number of the root directory of every subvolume; no other directory has it.
const ROOT_INODE: u64 = 256;

/// Why a call about btrfs failed.
#[derive(Debug, thiserror::Error)]
pub enum BtrfsError {
    /// The kernel refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Call {
        /// What was tried, to be read before the path.
        action: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The path is on another kind of file system.
    #[error("{} is not on btrfs; put it on a btrfs file system", .0.display())]
    NotBtrfs(PathBuf),
    /// The path is a directory like any other.
    #[error("{} is not a btrfs subvolume; `btrfs subvolume create` makes one", .0.display())]
    NotSubvolume(PathBuf),
    /// The path has no last part that could name a subvolume.
    #[error("{} does not name a subvolume: give its directory and its name", .0.display())]
    NoName(PathBuf),
    /// The kernel's btrfs does not tell what it can send.
    #[error("cannot read {}: {source}; is the btrfs module loaded?", path.display())]
    NoFeature {
        /// The file of /sys that was looked for.
        path: PathBuf,
        /// Why it could not be read.
        #[source]
        source: io::Error,
    },
}

impl BtrfsError {
    /// The kernel's error number, if this is about one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call { source, .. } | Self::NoFeature { source, .. } => Errno::from_io_error(source),
            Self::NotBtrfs(_) | Self::NotSubvolume(_) | Self::NoName(_) => None,
        }
    }

    /// Makes the closure for `map_err` that says what was tried on what.
    fn call<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Call { action, path: path.to_owned(), source: source.into() }
    }
}

/// What a new snapshot is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Can be sent; never changes.
    ReadOnly,
    /// Can be changed.
    Writable,
}

/// Whether the path is on a btrfs file system.
pub fn is_btrfs(path: &Path) -> Result<bool, BtrfsError> {
    let dir = File::open(path).map_err(BtrfsError::call("open", path))?;
    fd_is_btrfs(&dir).map_err(BtrfsError::call("look at the file system of", path))
}

/// Whether the path itself is the root directory of a btrfs subvolume; a symlink to one is not.
pub fn is_subvolume(path: &Path) -> Result<bool, BtrfsError> {
    match Subvolume::open(path) {
        Ok(_) => Ok(true),
        Err(BtrfsError::NotBtrfs(_) | BtrfsError::NotSubvolume(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The identity of the file system that the path is on.
pub fn file_system(path: &Path) -> Result<Uuid, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    let info = raw::fs_info(dir.as_fd()).map_err(BtrfsError::call("identify the file system of", path))?;
    Ok(Uuid::from_bytes(info.fsid))
}

/// The id of the tree that the directory `path` is in: that of the subvolume that contains it, or that it is.
pub fn tree_of(path: &Path) -> Result<u64, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    let info = raw::subvol_info(dir.as_fd()).map_err(BtrfsError::call("find the subvolume of", path))?;
    Ok(info.treeid)
}

/// Makes an empty subvolume at `path`, in a directory that exists.
pub fn create(path: &Path) -> Result<(), BtrfsError> {
    let (dir, name) = parent(path)?;
    raw::subvol_create(dir.as_fd(), name.as_bytes()).map_err(BtrfsError::call("create the subvolume", path))
}

/// Makes `path`, in a directory of the same file system, a snapshot of `source`. EEXIST if there is something of that name.
pub fn snapshot(source: &Subvolume, path: &Path, access: Access) -> Result<(), BtrfsError> {
    let (dir, name) = parent(path)?;
    let flags = match access {
        Access::ReadOnly => raw::SUBVOL_RDONLY,
        Access::Writable => 0,
    };
    raw::snap_create(dir.as_fd(), name.as_bytes(), source.as_fd(), flags)
        .map_err(BtrfsError::call("take the snapshot", path))
}

/// Gives a subvolume, also a read-only one, another name in its directory. EEXIST if there is something of that name.
///
/// A crash before the next commit undoes it.
pub fn rename(from: &Path, to: &Path) -> Result<(), BtrfsError> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(BtrfsError::call("rename", from))
}

/// Deletes the subvolume at `path`, read-only or not, mounted or not, with everything in it.
///
/// It is gone from the directory at once, from disk only when the cleaner is done with it; a crash before the next commit brings
/// it back. ENOTEMPTY if it contains other subvolumes, EPERM while it is being sent.
pub fn delete(path: &Path) -> Result<(), BtrfsError> {
    let (dir, name) = parent(path)?;
    raw::snap_destroy(dir.as_fd(), name.as_bytes()).map_err(BtrfsError::call("delete the subvolume", path))
}

/// Starts to commit what the file system of `path` has in memory; returns the number of that transaction.
pub fn start_sync(path: &Path) -> Result<u64, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    raw::start_sync(dir.as_fd()).map_err(BtrfsError::call("start a commit of", path))
}

/// Waits until a transaction of the file system of `path` is on disk.
pub fn wait_sync(path: &Path, transaction: u64) -> Result<(), BtrfsError> {
    let dir = open_on_btrfs(path)?;
    raw::wait_sync(dir.as_fd(), transaction).map_err(BtrfsError::call("wait for a commit of", path))
}

/// Writes all that the file system of `path` has in memory to disk, file data too, and waits for it.
pub fn sync(path: &Path) -> Result<(), BtrfsError> {
    let dir = open_on_btrfs(path)?;
    rustix::fs::syncfs(&dir).map_err(BtrfsError::call("sync the file system of", path))
}

/// Whether a deleted subvolume is gone from disk: the cleaner has freed what it alone held.
///
/// `path` is any directory of the file system, `tree_id` is from [`SubvolumeInfo`] as it was before the deletion.
pub fn is_gone(path: &Path, tree_id: u64) -> Result<bool, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    search::has_root(dir.as_fd(), tree_id).map(|has| !has).map_err(BtrfsError::call("search the root tree of", path))
}

/// The ids of the trees of subvolumes that were deleted, by whomever, and are not gone from disk yet.
///
/// `path` is any directory of the file system.
pub fn being_deleted(path: &Path) -> Result<Vec<u64>, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    search::orphans(dir.as_fd()).map_err(BtrfsError::call("search the root tree of", path))
}

/// Commits, so that what was deleted stays so, and sets the cleaner to work on it; without that it may wait for half a minute.
pub fn start_cleaner(path: &Path) -> Result<(), BtrfsError> {
    let dir = open_on_btrfs(path)?;
    raw::sync(dir.as_fd()).map_err(BtrfsError::call("commit on the file system of", path))
}

/// Whether quota groups are enabled on the file system of `path`: with them deleting snapshots can stall it for minutes.
pub fn has_qgroups(path: &Path) -> Result<bool, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    search::has_quota_tree(dir.as_fd()).map_err(BtrfsError::call("search the quota tree of", path))
}

/// Opens a directory, without following a symlink in its last part, and makes sure that it is on btrfs.
fn open_on_btrfs(path: &Path) -> Result<OwnedFd, BtrfsError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(BtrfsError::call("open", path))?;
    match fd_is_btrfs(&dir) {
        Ok(true) => Ok(dir),
        Ok(false) => Err(BtrfsError::NotBtrfs(path.to_owned())),
        Err(error) => Err(BtrfsError::call("look at the file system of", path)(error)),
    }
}

/// Splits the path of a subvolume into its directory, opened, and its name.
fn parent(path: &Path) -> Result<(OwnedFd, &OsStr), BtrfsError> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(BtrfsError::NoName(path.to_owned()));
    };
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    // The directory is the operator's: a symlink to it is fine. Only the subvolume itself must not be one.
    let dir = std::fs::canonicalize(dir).map_err(BtrfsError::call("find", dir))?;
    Ok((open_on_btrfs(&dir)?, name))
}

fn fd_is_btrfs(fd: impl AsFd) -> io::Result<bool> {
    /// `BTRFS_SUPER_MAGIC` of `linux/magic.h`.
    const BTRFS_SUPER_MAGIC: u32 = 0x9123_683E;
    // The field is a signed word whose size depends on the machine; the magic number is its low 32 bits.
    Ok(rustix::fs::fstatfs(fd)?.f_type as u32 == BTRFS_SUPER_MAGIC)
}

/// Gives a writable subvolume the marks of a received one and makes it read-only, as `btrfs receive` does at the end of a stream.
#[cfg(any(test, feature = "testing"))]
pub fn mark_received(subvolume: &Subvolume, id: crate::snapshot::SnapshotId) -> Result<(), BtrfsError> {
    raw::set_received(subvolume.as_fd(), id.uuid.into_bytes(), id.ctransid)
        .map_err(BtrfsError::call("mark as received", subvolume.path()))?;
    subvolume.set_read_only(true)
}

#[cfg(test)]
mod tests;
