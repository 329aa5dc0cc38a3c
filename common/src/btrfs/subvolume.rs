//! One subvolume: opened, described, switched between read-only and writable.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::{BtrfsError, ROOT_INODE, open_on_btrfs, raw, search};
use crate::snapshot::SnapshotId;

/// An open subvolume. The file descriptor keeps meaning this subvolume, whatever becomes of its path.
#[derive(Debug)]
pub struct Subvolume {
    fd: OwnedFd,
    path: PathBuf,
}

/// What the kernel says about a subvolume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubvolumeInfo {
    /// The id of its tree, by which the kernel names it; never used again in the life of the file system.
    pub tree_id: u64,
    /// Its own identity.
    pub uuid: Uuid,
    /// The uuid of the subvolume that it is a snapshot of.
    pub parent_uuid: Option<Uuid>,
    /// The uuid in the stream that it was received from; only complete received subvolumes have one.
    pub received_uuid: Option<Uuid>,
    /// The transaction that changed it last.
    pub ctransid: u64,
    /// The transaction that made it.
    pub otransid: u64,
    /// If received: the ctransid in the stream that it was received from.
    pub stransid: u64,
    /// The transaction that wrote its root last.
    pub generation: u64,
    /// Whether it can be changed.
    pub read_only: bool,
}

impl SubvolumeInfo {
    /// What a send of it would put into the stream, as `fs/btrfs/send.c` does it: the uuid that it was received under if there is
    /// one, else its own; and its own ctransid.
    pub fn stream_id(&self) -> SnapshotId {
        SnapshotId { uuid: self.received_uuid.unwrap_or(self.uuid), ctransid: self.ctransid }
    }

    /// What it was received as. None if it was not, or not to the end: a complete one has a received uuid *and* is read-only.
    pub fn received_id(&self) -> Option<SnapshotId> {
        let uuid = self.received_uuid.filter(|_| self.read_only)?;
        Some(SnapshotId { uuid, ctransid: self.stransid })
    }
}

impl Subvolume {
    /// Opens the subvolume at `path`. A symlink, a directory inside a subvolume, or another file system are errors.
    pub fn open(path: &Path) -> Result<Self, BtrfsError> {
        let fd = open_on_btrfs(path)?;
        let stat = rustix::fs::fstat(&fd).map_err(BtrfsError::call("look at", path))?;
        if stat.st_ino != ROOT_INODE {
            return Err(BtrfsError::NotSubvolume(path.to_owned()));
        }
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the kernel says about it now.
    pub fn info(&self) -> Result<SubvolumeInfo, BtrfsError> {
        let raw = raw::subvol_info(self.fd.as_fd()).map_err(BtrfsError::call("describe the subvolume", &self.path))?;
        Ok(SubvolumeInfo {
            tree_id: raw.treeid,
            uuid: Uuid::from_bytes(raw.uuid),
            parent_uuid: unless_nil(raw.parent_uuid),
            received_uuid: unless_nil(raw.received_uuid),
            ctransid: raw.ctransid,
            otransid: raw.otransid,
            stransid: raw.stransid,
            generation: raw.generation,
            read_only: raw.flags & raw::ROOT_SUBVOL_RDONLY != 0,
        })
    }

    /// Makes it read-only or writable. Writable again it would no longer equal what was sent or received: take a snapshot instead.
    pub fn set_read_only(&self, read_only: bool) -> Result<(), BtrfsError> {
        let change = || {
            let flags = raw::subvol_flags(self.fd.as_fd())?;
            let flags = if read_only { flags | raw::SUBVOL_RDONLY } else { flags & !raw::SUBVOL_RDONLY };
            raw::set_subvol_flags(self.fd.as_fd(), flags)
        };
        change().map_err(BtrfsError::call("change the read-only flag of", &self.path))
    }

    /// The subvolumes inside it, as paths relative to it. A snapshot has empty directories in their places, and so has a replica.
    pub fn nested(&self) -> Result<Vec<PathBuf>, BtrfsError> {
        let tree_id = self.info()?.tree_id;
        search::children(self.fd.as_fd(), tree_id).map_err(BtrfsError::call("list the subvolumes inside", &self.path))
    }
}

impl AsFd for Subvolume {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The kernel spells "none" as sixteen zero bytes.
fn unless_nil(bytes: [u8; 16]) -> Option<Uuid> {
    Some(Uuid::from_bytes(bytes)).filter(|uuid| !uuid.is_nil())
}
