//! A walk of a subvolume on several threads: for trees of millions of files.
//!
//! * It never follows a symlink, never leaves the subvolume (nested ones and other file systems are passed by), and changes nothing,
//!   not even the time of the last read: what it does with an entry is the visitor's part.
//! * A huge directory, too, is read by one thread and looked at by all: its entries go round in batches.
//! * Memory is bounded by constants, not by the tree: so many batches, and so many directories that wait; when there are more, the
//!   thread that finds one enters it at once. (Only trees with tens of thousands of directories beside each other at each of
//!   [`MAX_NESTED`] levels make it remember more, some 100 bytes for each directory.)
//! * What vanishes meanwhile is left out, as if it had vanished before.

mod queue;
#[cfg(test)]
mod tests;

use std::{
    ffi::{CStr, OsStr},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{
    fs::{FileType, Mode, OFlags, RawDir, ResolveFlags, Stat},
    io::Errno,
};

use self::queue::{Queue, Work};

/// Entries of a batch: enough that taking it from the queue costs nothing beside looking at them.
const BATCH_ENTRIES: usize = 1024;

/// Bytes for the kernel's answer to one reading of a directory: what fills about a batch.
const READ_BYTES: usize = 64 << 10;

/// Directories that wait to be entered, and found when there are fewer than that.
const MAX_WAITING: usize = 1 << 16;

/// So many directories are entered by one thread from within each other; each keeps a file open.
const MAX_NESTED: usize = 16;

/// The longest path that the kernel takes at once, without its NUL.
const PATH_MAX_BYTES: usize = 4095;

/// The inode number of the root of every subvolume.
const ROOT_INODE: u64 = 256;

/// The most threads: the kernel's locks let more of them wait for each other.
const MAX_THREADS: usize = 16;

/// Why a walk ended early.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The file system refused.
    #[error("cannot {action} {path:?}: {source}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// It was told to stop.
    #[error("stopped before the end")]
    Stopped,
}

impl WalkError {
    /// Makes the closure for `map_err` that says what was tried on what, a path relative to the root.
    pub fn call<E: Into<io::Error>>(action: &'static str, path: &[u8]) -> impl FnOnce(E) -> Self {
        let path = PathBuf::from(OsStr::from_bytes(if path.is_empty() { b"." } else { path }));
        move |source| Self::Call { action, path, source: source.into() }
    }
}

/// What is done on a walk. Called by many threads at once.
pub trait Visit: Sync {
    /// What is known about a directory while it, or anything below it, is not done.
    type Directory: Send + Sync;
    /// What a thread counts for itself.
    type Tally: Default + Send;

    /// A directory was opened; its entries follow.
    ///
    /// # Errors
    /// End the walk.
    fn enter(&self, _directory: &Self::Directory, _stat: &Stat) -> Result<(), WalkError> {
        Ok(())
    }

    /// Whether one thread should look at all entries of a directory: where the kernel lets only one at a time do what is done to them,
    /// others would be in its way.
    fn is_for_one(&self, _directory: &Self::Directory) -> bool {
        false
    }

    /// An entry of a directory, in no order. What is returned for a directory lets the walk enter it.
    ///
    /// # Errors
    /// End the walk.
    fn entry(
        &self,
        tally: &mut Self::Tally,
        entry: &Entry<'_, Self::Directory>,
    ) -> Result<Option<Self::Directory>, WalkError>;

    /// A directory and all below it is done; `above` is what is known about the directory that it is in, None for the root.
    ///
    /// # Errors
    /// End the walk.
    fn leave(
        &self,
        _path: &[u8],
        _directory: &Self::Directory,
        _above: Option<&Self::Directory>,
    ) -> Result<(), WalkError> {
        Ok(())
    }
}

/// An entry of a directory.
#[derive(Debug)]
pub struct Entry<'a, D> {
    /// What is known about the directory.
    pub directory: &'a D,
    /// The directory, open.
    pub fd: BorrowedFd<'a>,
    /// The name in it.
    pub name: &'a CStr,
    /// The path from the root, without a slash at either end.
    pub path: &'a [u8],
    /// What it is.
    pub kind: FileType,
}

/// How a walk is done.
#[derive(Debug)]
pub struct Options<'a> {
    /// On so many threads; see [`threads`].
    pub threads: usize,
    /// Ends the walk early when it becomes true.
    pub stop: &'a AtomicBool,
    /// How often `tick` is called.
    pub tick_interval: Duration,
}

/// As many threads as there are processors, within reason.
pub fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// Walks the directory `root` and all below it; returns what the threads counted.
///
/// `tick` is called on this thread every so often, with the number of entries so far, directories included.
///
/// # Errors
/// The first one of the file system or of the visitor, or [`WalkError::Stopped`].
pub fn walk<V: Visit>(
    root: impl AsFd,
    visitor: &V,
    top: V::Directory,
    options: &Options<'_>,
    mut tick: impl FnMut(u64),
) -> Result<Vec<V::Tally>, WalkError> {
    let root = open_below(root.as_fd(), b"").map_err(WalkError::call("open", b""))?;
    let stat = rustix::fs::fstat(&root).map_err(WalkError::call("look at", b""))?;
    let queue = Queue::new(options.threads.max(1));
    queue.push_directory(Arc::new(Node { above: Above(None), name: Box::default(), directory: top }));
    let walker = Walker { root, device: stat.st_dev, visitor, queue, stop: options.stop, seen: AtomicU64::new(0) };
    let tallies = thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads.max(1)).map(|_| scope.spawn(|| walker.work())).collect();
        while !walker.queue.wait_for_end(options.tick_interval) {
            tick(walker.seen.load(Ordering::Relaxed));
        }
        let join = |thread: thread::ScopedJoinHandle<'_, V::Tally>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    walker.queue.into_result().map(|()| tallies)
}

/// Opens the directory at a path below another one, however long the path is, for reading its entries. No part of the path may be
/// a symlink.
///
/// # Errors
/// As openat2.
pub fn open_below(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let (mut rest, mut from) = (path, None::<OwnedFd>);
    while rest.len() > PATH_MAX_BYTES {
        let cut = rest[..PATH_MAX_BYTES].iter().rposition(|&b| b == b'/').ok_or(Errno::NAMETOOLONG)?;
        let base = from.as_ref().map_or(root, AsFd::as_fd);
        from = Some(open_directory(base, &rest[..cut])?);
        rest = &rest[cut + 1..];
    }
    let base = from.as_ref().map_or(root, AsFd::as_fd);
    Ok(open_directory(base, if rest.is_empty() { b"." } else { rest })?)
}

fn open_directory(base: BorrowedFd<'_>, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    rustix::fs::openat2(base, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

/// Whether a failed look at something means that it is not there (any more).
pub fn is_gone(error: Errno) -> bool {
    matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::LOOP)
}

/// A directory in its place. Those below it keep it alive: when the last of them is done, so is it.
struct Node<D> {
    above: Above<D>,
    name: Box<[u8]>,
    directory: D,
}

/// The directory that another one is in; none for the root.
struct Above<D>(Option<Arc<Node<D>>>);

/// One after the other: dropped from within each other, the directories of a very deep tree would not fit a stack.
impl<D> Drop for Above<D> {
    fn drop(&mut self) {
        let mut last = self.0.take();
        while let Some(node) = last {
            last = Arc::into_inner(node).and_then(|mut node| node.above.0.take());
        }
    }
}

impl<D> Node<D> {
    fn path(&self) -> Vec<u8> {
        let mut names = Vec::new();
        let mut node = self;
        while let Some(above) = &node.above.0 {
            names.push(&*node.name);
            node = above;
        }
        names.reverse();
        names.join(&b'/')
    }
}

/// A directory that is being read.
struct Open<D> {
    fd: OwnedFd,
    path: Vec<u8>,
    node: Arc<Node<D>>,
}

/// Entries of a directory that were read and not looked at.
struct Batch<D> {
    open: Arc<Open<D>>,
    entries: Entries,
}

/// Entries, packed.
#[derive(Default)]
struct Entries {
    /// The names, each with its NUL.
    names: Vec<u8>,
    items: Vec<Item>,
}

struct Item {
    /// The end of the name in `names`.
    end: usize,
    kind: FileType,
}

struct Walker<'a, V: Visit> {
    root: OwnedFd,
    device: u64,
    visitor: &'a V,
    queue: Queue<V::Directory>,
    stop: &'a AtomicBool,
    seen: AtomicU64,
}

impl<V: Visit> Walker<'_, V> {
    /// The life of a thread.
    fn work(&self) -> V::Tally {
        let mut tally = V::Tally::default();
        while let Some((work, busy)) = self.queue.next() {
            let done = match work {
                Work::Directory(node) => self.read(node, &mut tally, 0),
                Work::Batch(batch) => {
                    let done = self.look(&batch.open, &batch.entries, &mut tally, 0);
                    done.and_then(|()| self.close(batch.open))
                }
            };
            if let Err(error) = done {
                self.queue.fail(error);
            }
            drop(busy);
        }
        tally
    }

    /// Reads a directory, and looks at what of it nobody else takes.
    fn read(&self, node: Arc<Node<V::Directory>>, tally: &mut V::Tally, nested: usize) -> Result<(), WalkError> {
        let path = node.path();
        let fd = match open_below(self.root.as_fd(), &path) {
            Ok(fd) => fd,
            Err(error) if Errno::from_io_error(&error).is_some_and(is_gone) => return self.done(node),
            Err(error) => return Err(WalkError::call("open", &path)(error)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(WalkError::call("look at", &path))?;
        if stat.st_dev != self.device || stat.st_ino == ROOT_INODE && node.above.0.is_some() {
            return self.done(node);
        }
        self.visitor.enter(&node.directory, &stat)?;
        let is_for_one = self.visitor.is_for_one(&node.directory);
        let open = Arc::new(Open { fd, path, node });
        let mut buffer = vec![MaybeUninit::uninit(); READ_BYTES];
        let (mut entries, mut list) = (Entries::default(), RawDir::new(&open.fd, &mut buffer));
        while let Some(entry) = list.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // Removed while it was being read.
                Err(error) if is_gone(error) => break,
                Err(error) => return Err(WalkError::call("list", &open.path)(error)),
            };
            if entry.file_name() == c"." || entry.file_name() == c".." {
                continue;
            }
            entries.push(entry.file_name(), self.kind(&open.fd, &entry));
            if entries.items.len() == BATCH_ENTRIES {
                let batch = Batch { open: open.clone(), entries: std::mem::take(&mut entries) };
                let refused = if is_for_one { Err(batch) } else { self.queue.offer(batch) };
                if let Err(batch) = refused {
                    self.look(&open, &batch.entries, tally, nested)?;
                    entries = batch.entries.cleared();
                }
            }
        }
        self.look(&open, &entries, tally, nested)?;
        self.close(open)
    }

    /// Shows the visitor entries of a directory.
    fn look(
        &self,
        open: &Arc<Open<V::Directory>>,
        entries: &Entries,
        tally: &mut V::Tally,
        nested: usize,
    ) -> Result<(), WalkError> {
        if self.stop.load(Ordering::Relaxed) || self.queue.has_failed() {
            return Err(WalkError::Stopped);
        }
        self.seen.fetch_add(entries.items.len() as u64, Ordering::Relaxed);
        let mut path = open.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        let prefix = path.len();
        for (name, item) in entries.iter() {
            path.truncate(prefix);
            path.extend_from_slice(name.to_bytes());
            let (directory, fd) = (&open.node.directory, open.fd.as_fd());
            let entry = Entry { directory, fd, name, path: &path, kind: item.kind };
            if let Some(directory) = self.visitor.entry(tally, &entry)? {
                let node = Node { above: Above(Some(open.node.clone())), name: name.to_bytes().into(), directory };
                if nested < MAX_NESTED && self.queue.is_full() {
                    self.read(Arc::new(node), tally, nested + 1)?;
                } else {
                    self.queue.push_directory(Arc::new(node));
                }
            }
        }
        Ok(())
    }

    /// What an entry is. btrfs always says so with its name.
    fn kind(&self, fd: &OwnedFd, entry: &rustix::fs::RawDirEntry<'_>) -> FileType {
        match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(fd, entry.file_name(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW);
                stat.map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode))
            }
            known => known,
        }
    }

    /// A reader or looker is through with a directory; with the last of them, it is read.
    fn close(&self, open: Arc<Open<V::Directory>>) -> Result<(), WalkError> {
        match Arc::into_inner(open) {
            Some(Open { fd, node, .. }) => {
                drop(fd);
                self.done(node)
            }
            None => Ok(()),
        }
    }

    /// Leaves a directory, unless something below it is under way, and those above that waited only for it.
    fn done(&self, node: Arc<Node<V::Directory>>) -> Result<(), WalkError> {
        let mut last = Arc::into_inner(node);
        while let Some(mut node) = last {
            let above = node.above.0.as_ref().map(|above| &above.directory);
            self.visitor.leave(&node.path(), &node.directory, above)?;
            last = node.above.0.take().and_then(Arc::into_inner);
        }
        Ok(())
    }
}

impl Entries {
    fn push(&mut self, name: &CStr, kind: FileType) {
        self.names.extend_from_slice(name.to_bytes_with_nul());
        self.items.push(Item { end: self.names.len(), kind });
    }

    fn iter(&self) -> impl Iterator<Item = (&CStr, &Item)> {
        let starts = std::iter::once(0).chain(self.items.iter().map(|item| item.end));
        starts.zip(&self.items).filter_map(|(start, item)| {
            let name = CStr::from_bytes_with_nul(&self.names[start..item.end]).ok()?;
            Some((name, item))
        })
    }

    /// Empty again, its memory kept.
    fn cleared(mut self) -> Self {
        self.names.clear();
        self.items.clear();
        self
    }
}
