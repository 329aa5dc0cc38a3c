//! The files of a cache that a filter asks about, where they are: in a snapshot, or in the source.

use std::{
    io::Read,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, Stat},
    io::Errno,
};

use super::{
    AgeBy, Look,
    guix::{self, COMPRESSIONS, HASHES, Member, Suffix},
};
use crate::walk::{WalkError, is_gone, open_below};

/// The longest path of a store item that is believed in; the kernel takes no longer one.
const MAX_MAPPING_BYTES: usize = 4096;

/// The directories of a cache, open.
#[derive(Debug)]
pub struct Cache {
    compressions: [Option<OwnedFd>; COMPRESSIONS.len()],
    hashes: Option<OwnedFd>,
    by: AgeBy,
}

impl Cache {
    /// Opens those that are there.
    ///
    /// # Errors
    /// Of the file system.
    pub fn open(root: BorrowedFd<'_>, by: AgeBy) -> Result<Self, WalkError> {
        let directory = |name: &str| match open_below(root, name.as_bytes()) {
            Ok(fd) => Ok(Some(fd)),
            Err(error) if Errno::from_io_error(&error).is_some_and(is_gone) => Ok(None),
            Err(error) => Err(WalkError::call("open", name.as_bytes())(error)),
        };
        let mut compressions = [const { None }; COMPRESSIONS.len()];
        for (place, name) in compressions.iter_mut().zip(COMPRESSIONS) {
            *place = directory(name)?;
        }
        Ok(Self { compressions, hashes: directory(HASHES)?, by })
    }

    /// What the file system says of a file of an item; None if it is not there.
    ///
    /// # Errors
    /// Of the file system.
    pub fn stat(&self, member: Member<'_>, suffix: Suffix) -> Result<Option<Stat>, WalkError> {
        let Some(fd) = &self.compressions[member.compression] else { return Ok(None) };
        stat(fd.as_fd(), guix::name(member.item, suffix))
            .map_err(|error| WalkError::call("look at", &guix::path(member, suffix))(error))
    }

    /// The beginning of a narinfo, at most `limit` bytes; None if it is not there.
    ///
    /// # Errors
    /// Of the file system.
    pub fn narinfo(&self, member: Member<'_>, limit: usize) -> Result<Option<Vec<u8>>, WalkError> {
        let Some(fd) = &self.compressions[member.compression] else { return Ok(None) };
        let content = read(fd.as_fd(), &guix::name(member.item, Suffix::Narinfo), limit);
        content.map_err(|error| WalkError::call("read", &guix::path(member, Suffix::Narinfo))(error))
    }
}

impl Look for Cache {
    type Error = WalkError;

    fn time(&self, member: Member<'_>, suffix: Suffix) -> Result<Option<i64>, WalkError> {
        Ok(self.stat(member, suffix)?.map(|stat| self.by.time(&stat)))
    }

    fn mapping(&self, hash: &[u8]) -> Result<Option<Vec<u8>>, WalkError> {
        let Some(fd) = &self.hashes else { return Ok(None) };
        let content = read(fd.as_fd(), hash, MAX_MAPPING_BYTES);
        content.map_err(|error| WalkError::call("read", &[HASHES.as_bytes(), b"/", hash].concat())(error))
    }
}

impl AgeBy {
    /// The time of a file, in seconds since 1970.
    pub fn time(self, stat: &Stat) -> i64 {
        match self {
            Self::Mtime => stat.st_mtime,
            Self::Atime => stat.st_atime,
        }
    }
}

/// What the file system says of an entry of a directory, a symlink itself; None if it is not there (any more).
///
/// # Errors
/// Of the file system.
pub fn stat(directory: BorrowedFd<'_>, name: impl rustix::path::Arg) -> Result<Option<Stat>, Errno> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        // No directory has a name that is too long.
        Err(error) if is_gone(error) || error == Errno::NAMETOOLONG => Ok(None),
        Err(error) => Err(error),
    }
}

/// The beginning of a regular file, without a trace of having read it. None if there is none; opening anything else could do harm.
fn read(directory: BorrowedFd<'_>, name: &[u8], limit: usize) -> std::io::Result<Option<Vec<u8>>> {
    let is_file = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    if !stat(directory, name)?.is_some_and(is_file) {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(error) if is_gone(error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut content = Vec::with_capacity(limit.min(MAX_MAPPING_BYTES));
    file.take(limit as u64).read_to_end(&mut content)?;
    Ok(Some(content))
}
