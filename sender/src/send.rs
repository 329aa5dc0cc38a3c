//! The stream of a snapshot, from the kernel: BTRFS_IOC_SEND on a thread of its own into a pipe, and how much it will be.
//!
//! The ioctl blocks until the whole stream is written and must not meet a signal (see [`common::btrfs::send`]): hence a thread of its
//! own with all signals blocked. What ends it early is a reader that goes away.

mod total;

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use common::{
    btrfs::{self, BtrfsError, Found, SendOptions, Sending, Subvolume, SubvolumeInfo},
    snapshot::SnapshotId,
    stream::{RootTimes, StreamError},
};
use rustix::{io::Errno, pipe::PipeFlags};

pub use self::total::TotalPass;

/// Size of the pipe between the kernel and us: a command of 128 KiB fits eight times, so neither waits for the other after each.
/// It is what an unprivileged process may ask for, too.
pub const PIPE_BYTES: usize = 1 << 20;

/// Why there is no stream, or no end of it.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// A snapshot cannot be opened.
    #[error(transparent)]
    Btrfs(#[from] BtrfsError),
    /// Somebody put another subvolume in a snapshot's place, or changed it.
    #[error("{path:?} is not the snapshot {expected} (any more); it changed under us, the next cycle plans anew")]
    Changed {
        /// Where it should be.
        path: PathBuf,
        /// What should be there.
        expected: SnapshotId,
    },
    /// A writable subvolume cannot be sent.
    #[error("{0:?} is writable; somebody changed a snapshot: delete it, the next cycle takes another")]
    Writable(PathBuf),
    /// The system refuses a pipe or a thread.
    #[error("cannot set up the sending of {path:?}: {source}")]
    SetUp {
        /// What should be sent.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel gave up in the middle: what was read so far is not a whole stream.
    #[error("the kernel could not send {path:?} to the end: {source}; its log (dmesg) may say more")]
    Kernel {
        /// What was sent.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// We stopped reading before the end.
    #[error("sending {0:?} was ended before its end")]
    Ended(PathBuf),
    /// The kernel wrote what we do not understand.
    #[error("the kernel's stream is not as expected: {0}")]
    Stream(#[from] StreamError),
    /// The thread that sends or counts panicked; a mistake of ours.
    #[error("a thread that reads {0:?} panicked; please report it")]
    Panicked(PathBuf),
}

/// A snapshot ready to be sent, with its base. Both stay open, so that their paths no longer matter.
#[derive(Debug)]
pub struct Source {
    snapshot: Subvolume,
    base: Option<(Subvolume, SubvolumeInfo)>,
}

impl Source {
    /// Opens a snapshot and its base and makes sure that they still are what was found.
    pub fn open(snapshot: &Found, base: Option<&Found>) -> Result<Self, SendError> {
        let (snapshot, _) = open_unchanged(snapshot)?;
        let base = base.map(open_unchanged).transpose()?;
        Ok(Self { snapshot, base })
    }

    /// The times of the snapshot's root directory. The stream of an increment does not restore them always.
    pub fn root_times(&self) -> Result<RootTimes, SendError> {
        let stat = rustix::fs::fstat(&self.snapshot).map_err(|error| self.set_up(error.into()))?;
        // The stream spells times before 1970 as the two's complement, too.
        Ok(RootTimes {
            atime: (stat.st_atime as u64, stat.st_atime_nsec as u32),
            mtime: (stat.st_mtime as u64, stat.st_mtime_nsec as u32),
            ctime: (stat.st_ctime as u64, stat.st_ctime_nsec as u32),
        })
    }

    /// Starts to send it all, in that version of the stream (1, or 2 where [`btrfs::stream_version`] says so).
    pub fn stream(&self, version: u32) -> Result<Stream, SendError> {
        self.start("send", version, Sending::All, || {})
    }

    /// Starts to say what it would send, without file data: what changed against the base.
    pub fn changes(&self, version: u32) -> Result<Stream, SendError> {
        self.start("send-changes", version, Sending::NoFileData, || {})
    }

    /// Where the snapshot was opened.
    pub fn path(&self) -> &Path {
        self.snapshot.path()
    }

    /// Starts a send on a thread that calls `first` before anything else and keeps what it returns to the end.
    fn start<G>(
        &self,
        thread: &'static str,
        version: u32,
        sending: Sending,
        first: impl FnOnce() -> G + Send + 'static,
    ) -> Result<Stream, SendError> {
        let options = SendOptions { base: self.base.as_ref().map(|(_, info)| info.tree_id), version, sending };
        let set_up = || {
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            if matches!(sending, Sending::All) {
                // A smaller pipe is slower and nothing else: the limits of the system may not leave us this one.
                let _ = rustix::pipe::fcntl_setpipe_size(&writer, PIPE_BYTES);
            }
            let subvolume = self.snapshot.as_fd().try_clone_to_owned()?;
            let send = move || {
                let _kept = first();
                send_on_this_thread(&subvolume, &writer, options)
            };
            let sender = thread::Builder::new().name(thread.into()).spawn(send)?;
            Ok(Stream { path: self.snapshot.path().to_owned(), reader: File::from(reader), sender })
        };
        set_up().map_err(|source| self.set_up(source))
    }

    fn set_up(&self, source: io::Error) -> SendError {
        SendError::SetUp { path: self.snapshot.path().to_owned(), source }
    }
}

/// The body of a sending thread. The pipe is closed by its end, so that its reader sees the end of the stream.
fn send_on_this_thread(subvolume: &OwnedFd, writer: &OwnedFd, options: SendOptions) -> io::Result<()> {
    common::thread::block_signals()?;
    btrfs::send(subvolume.as_fd(), writer, options)
}

fn open_unchanged(found: &Found) -> Result<(Subvolume, SubvolumeInfo), SendError> {
    let subvolume = Subvolume::open(&found.path)?;
    let info = subvolume.info()?;
    if info.stream_id() != found.snapshot.id {
        return Err(SendError::Changed { path: found.path.clone(), expected: found.snapshot.id });
    }
    if !info.read_only {
        return Err(SendError::Writable(found.path.clone()));
    }
    Ok((subvolume, info))
}

/// A stream under way. Read it to its end, then ask [`Stream::finish`] whether it is whole: an end of file alone proves nothing.
///
/// Dropped, it ends the send: the kernel's next write finds nobody who reads. Until then the snapshots cannot be deleted.
#[derive(Debug)]
pub struct Stream {
    path: PathBuf,
    reader: File,
    sender: JoinHandle<io::Result<()>>,
}

impl Stream {
    /// Where the snapshot was opened that is sent.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the kernel's verdict. To be called after the end of file; before it, this ends the send ([`SendError::Ended`]).
    pub fn finish(self) -> Result<(), SendError> {
        drop(self.reader);
        let source = match self.sender.join() {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(source)) => source,
            Err(_) => return Err(SendError::Panicked(self.path)),
        };
        if Errno::from_io_error(&source) == Some(Errno::PIPE) {
            Err(SendError::Ended(self.path))
        } else {
            Err(SendError::Kernel { path: self.path, source })
        }
    }
}

/// The pipe, for reads that block.
impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        process::Command,
        time::{Duration, Instant},
    };

    use common::testing::{SMALL, TestFs, run};
    use jiff::Timestamp;

    use super::*;
    use crate::create::Site;

    /// A source with some files, on a file system of its own.
    fn site(fs: &TestFs) -> (Site, PathBuf) {
        let source = fs.subvolume("source");
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        for i in 0..200 {
            fs::write(source.join(format!("file-{i}")), vec![i as u8; 20_000]).unwrap();
        }
        (Site::open(&source, &dir).unwrap(), source)
    }

    fn take(site: &Site) -> Found {
        site.create(&"v".parse().unwrap(), Timestamp::from_second(1_795_330_800).unwrap()).unwrap()
    }

    fn whole(mut stream: Stream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        stream.finish().unwrap();
        bytes
    }

    fn as_the_program_sends(snapshot: &Found, base: Option<&Found>, file: &Path) -> Vec<u8> {
        let mut command = Command::new("btrfs");
        command.args(["send", "-q", "--proto", "2", "-f"]).arg(file);
        if let Some(base) = base {
            command.arg("-p").arg(&base.path);
        }
        run(command.arg(&snapshot.path));
        fs::read(file).unwrap()
    }

    #[test]
    fn full_and_increment_are_what_the_btrfs_program_sends() {
        let fs = TestFs::new(SMALL);
        let (site, source) = site(&fs);
        let first = take(&site);
        fs::write(source.join("file-7"), "changed").unwrap();
        fs::remove_file(source.join("file-8")).unwrap();
        let second = take(&site);
        let file = fs.path().join("stream");
        let full = whole(Source::open(&first, None).unwrap().stream(2).unwrap());
        assert_eq!(full, as_the_program_sends(&first, None, &file));
        let increment = whole(Source::open(&second, Some(&first)).unwrap().stream(2).unwrap());
        assert_eq!(increment, as_the_program_sends(&second, Some(&first), &file));
        assert!(increment.len() < 10_000, "{} bytes for one small file", increment.len());
    }

    #[test]
    fn the_pipe_is_wide_and_the_sending_thread_hears_no_signals() {
        let fs = TestFs::new(SMALL);
        let (site, _) = site(&fs);
        let mut stream = Source::open(&take(&site), None).unwrap().stream(2).unwrap();
        assert_eq!(rustix::pipe::fcntl_getpipe_size(&stream).unwrap(), PIPE_BYTES);
        // Once a byte is there the thread is in the ioctl, and it stays there: the pipe is smaller than the stream.
        stream.read_exact(&mut [0]).unwrap();
        let deaf = fs::read_dir("/proc/self/task").unwrap().any(|task| {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap_or_default();
            status.starts_with("Name:\tsend\n") && status.contains("SigBlk:\tfffffffe7ffbfeff")
        });
        assert!(deaf, "no thread `send` with all signals blocked");
    }

    #[test]
    fn a_stream_that_is_dropped_lets_go_of_the_snapshot() {
        let fs = TestFs::new(SMALL);
        let (site, _) = site(&fs);
        let found = take(&site);
        let source = Source::open(&found, None).unwrap();
        let mut stream = source.stream(2).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        assert_eq!(btrfs::delete(&found.path).unwrap_err().errno(), Some(Errno::PERM), "deleted while it is sent");
        assert!(matches!(stream.finish(), Err(SendError::Ended(_))));

        let mut stream = source.stream(1).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        drop(stream);
        let deadline = Instant::now() + Duration::from_secs(20);
        while let Err(error) = btrfs::delete(&found.path) {
            assert!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn what_cannot_be_sent_is_said() {
        let fs = TestFs::new(SMALL);
        let (site, _) = site(&fs);
        let (first, second) = (take(&site), take(&site));
        let swapped = Found { path: second.path.clone(), ..first.clone() };
        assert!(matches!(Source::open(&swapped, None), Err(SendError::Changed { .. })));
        assert!(matches!(Source::open(&first, Some(&swapped)), Err(SendError::Changed { .. })));
        Subvolume::open(&second.path).unwrap().set_read_only(false).unwrap();
        assert!(matches!(Source::open(&second, None), Err(SendError::Writable(_))));
        let mut stream = Source::open(&first, None).unwrap().stream(99).unwrap();
        let mut nothing = Vec::new();
        assert_eq!(stream.read_to_end(&mut nothing).unwrap(), 0);
        let error = stream.finish().unwrap_err();
        assert!(
            matches!(&error, SendError::Kernel { source, .. } if Errno::from_io_error(source) == Some(Errno::PROTO))
        );
        btrfs::delete(&first.path).unwrap();
        assert!(matches!(Source::open(&first, None), Err(SendError::Btrfs(_))));
    }

    #[test]
    fn the_times_of_the_root_are_those_of_the_snapshot() {
        let fs = TestFs::new(SMALL);
        let (site, source) = site(&fs);
        let set = rustix::fs::Timestamps {
            last_access: rustix::fs::Timespec { tv_sec: -1, tv_nsec: 5 },
            last_modification: rustix::fs::Timespec { tv_sec: 1_000_000_007, tv_nsec: 999_999_999 },
        };
        rustix::fs::futimens(File::open(&source).unwrap(), &set).unwrap();
        let found = take(&site);
        let times = Source::open(&found, None).unwrap().root_times().unwrap();
        assert_eq!((times.atime, times.mtime), ((u64::MAX, 5), (1_000_000_007, 999_999_999)));
        assert!(times.ctime.0 > 1_700_000_000);
    }
}
