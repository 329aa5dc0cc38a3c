//! Takes what a filter excludes out of a writable snapshot.
//!
//! What stays keeps its times: a directory that something was taken out of gets back those that it had. It is left last, after all
//! below it (see [`crate::walk`]), so nothing changes them again.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::{
    fs::{AtFlags, FileType, IFlags, Mode, OFlags, Stat, Timespec, Timestamps},
    io::Errno,
};

use super::{Rules, files, files::Cache};
use crate::walk::{self, Entry, Options, Visit, WalkError, is_gone, open_below};

/// How far it is.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Entries that were looked at.
    pub seen: u64,
    /// Those of them that were removed.
    pub removed: u64,
}

/// Removes what is excluded, and makes the root's last change a new one whatever is removed: the snapshot's ctransid orders it.
///
/// `tick` is told how far it is every so often.
///
/// # Errors
/// The snapshot is then of no use.
pub fn remove(
    root: BorrowedFd<'_>,
    rules: &Rules<'_>,
    options: &Options<'_>,
    mut tick: impl FnMut(Done),
) -> Result<Done, WalkError> {
    let cache = Cache::open(root, rules.filter().max_age_by)?;
    let removal = Removal { root, rules, cache, removed: AtomicU64::new(0) };
    let top = Directory { touched: AtomicBool::new(true), ..Directory::default() };
    let done = |seen| Done { seen, removed: removal.removed.load(Ordering::Relaxed) };
    let seen = walk::walk(root, &removal, top, options, |seen| tick(done(seen)))?;
    Ok(done(seen.into_iter().sum()))
}

struct Removal<'a> {
    root: BorrowedFd<'a>,
    rules: &'a Rules<'a>,
    cache: Cache,
    removed: AtomicU64,
}

#[derive(Default)]
struct Directory {
    /// It is excluded, and all that is in it.
    goes: bool,
    /// Something was taken out of it.
    touched: AtomicBool,
    /// What it had before.
    times: OnceLock<Timestamps>,
}

impl Visit for Removal<'_> {
    type Directory = Directory;
    type Tally = u64;

    fn enter(&self, directory: &Directory, stat: &Stat) -> Result<(), WalkError> {
        // Entered once only.
        let _ = directory.times.set(Timestamps {
            last_access: timespec(stat.st_atime, stat.st_atime_nsec),
            last_modification: timespec(stat.st_mtime, stat.st_mtime_nsec),
        });
        Ok(())
    }

    /// Removing something locks its directory.
    fn is_for_one(&self, directory: &Directory) -> bool {
        directory.goes
    }

    fn entry(&self, seen: &mut u64, entry: &Entry<'_, Directory>) -> Result<Option<Directory>, WalkError> {
        *seen += 1;
        if entry.kind == FileType::Directory {
            let goes = entry.directory.goes || self.rules.directory(entry.path).is_some();
            return Ok(Some(Directory { goes, ..Directory::default() }));
        }
        let time = || {
            let stat = files::stat(entry.fd, entry.name).map_err(WalkError::call("look at", entry.path))?;
            Ok(stat.map(|stat| self.rules.filter().max_age_by.time(&stat)))
        };
        if entry.directory.goes || self.rules.file(entry.path, time, &self.cache)?.is_some() {
            unlink(entry.fd, entry.name.to_bytes(), AtFlags::empty()).map_err(WalkError::call("remove", entry.path))?;
            entry.directory.touched.store(true, Ordering::Relaxed);
            self.removed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(None)
    }

    fn leave(&self, path: &[u8], directory: &Directory, above: Option<&Directory>) -> Result<(), WalkError> {
        if let Some(above) = above.filter(|_| directory.goes) {
            let slash = path.iter().rposition(|&b| b == b'/');
            let (parent, name) = slash.map_or((&b""[..], path), |slash| (&path[..slash], &path[slash + 1..]));
            let removed =
                open_below(self.root, parent).and_then(|parent| Ok(unlink(parent.as_fd(), name, AtFlags::REMOVEDIR)?));
            removed.map_err(WalkError::call("remove the directory", path))?;
            above.touched.store(true, Ordering::Relaxed);
            self.removed.fetch_add(1, Ordering::Relaxed);
        } else if let Some(times) = directory.times.get().filter(|_| directory.touched.load(Ordering::Relaxed)) {
            let put_back =
                open_below(self.root, path).and_then(|directory| Ok(rustix::fs::futimens(directory, times)?));
            put_back.map_err(WalkError::call("put back the times of", path))?;
        }
        Ok(())
    }
}

fn timespec(seconds: i64, nanoseconds: u64) -> Timespec {
    // Below a billion.
    Timespec { tv_sec: seconds, tv_nsec: nanoseconds.cast_signed() }
}

/// Removes an entry of a directory. What `chattr` made immutable is not so in a snapshot that is ours: a stream does not carry that.
fn unlink(directory: BorrowedFd<'_>, name: &[u8], flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(directory, name, flags) {
        Err(Errno::PERM) => {}
        Err(error) if is_gone(error) => return Ok(()),
        other => return other,
    }
    make_mutable(directory)?;
    let open = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
    let is_plain =
        |stat: Stat| matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Directory);
    if files::stat(directory, name)?.is_some_and(is_plain) {
        make_mutable(rustix::fs::openat(directory, name, open, Mode::empty())?)?;
    }
    rustix::fs::unlinkat(directory, name, flags)
}

fn make_mutable(file: impl AsFd) -> Result<(), Errno> {
    let flags = rustix::fs::ioctl_getflags(&file)?;
    let mutable = flags - (IFlags::IMMUTABLE | IFlags::APPEND);
    if mutable == flags { Ok(()) } else { rustix::fs::ioctl_setflags(&file, mutable) }
}
