//! How much room a file system has. btrfs can be full with bytes free: metadata needs room that no chunk owns yet.

use std::{os::fd::AsFd, path::Path};

use rustix::io::Errno;

use super::{BtrfsError, open_on_btrfs, raw};

/// Room on a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What the kernel estimates can still be written, as `df` shows it.
    pub free: u64,
    /// What belongs to no chunk yet, on all devices together (raw: a mirrored chunk takes twice its size).
    pub unallocated: u64,
}

/// The room on the file system of `path`.
pub fn space(path: &Path) -> Result<Space, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    let figures = rustix::fs::fstatvfs(&dir).map_err(BtrfsError::call("ask for the free space of", path))?;
    let info = raw::fs_info(dir.as_fd()).map_err(BtrfsError::call("identify the file system of", path))?;
    let mut unallocated = 0_u64;
    for devid in 1..=info.max_id {
        match raw::dev_info(dir.as_fd(), devid) {
            Ok(device) => unallocated += device.total_bytes.saturating_sub(device.bytes_used),
            // Ids of devices that were removed stay unused.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => {}
            Err(error) => return Err(BtrfsError::call("look at the devices of", path)(error)),
        }
    }
    let bytes = |blocks: u64| blocks.saturating_mul(figures.f_frsize);
    Ok(Space { total: bytes(figures.f_blocks), free: bytes(figures.f_bavail), unallocated })
}
