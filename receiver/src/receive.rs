//! `btrfs receive` as a child process: started, fed, finished, stopped. The one file that spawns `btrfs`.

use std::{
    collections::VecDeque,
    io::{self, BufRead, BufReader, Read as _},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::JoinHandle,
};

use rustix::{
    io::Errno,
    pipe::{IoSliceRaw, SpliceFlags, fcntl_setpipe_size},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

/// The pipe into the child. The default of 64 KiB makes both sides wait for each other: 5.0 s instead of 3.8 s for 2.5 GB.
pub const PIPE_BYTES: usize = 1 << 20;

/// Lines of the child's stderr that are kept for the error message: the last ones say why it ended.
const KEPT_LINES: usize = 8;

/// Why `btrfs receive` did not take a segment.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// It cannot be started.
    #[error("cannot start btrfs receive; is btrfs-progs installed?")]
    Start(#[source] io::Error),
    /// Nobody knows what it can do.
    #[error("`btrfs --version` says {0:?}, which is no version of btrfs-progs")]
    Version(String),
    /// It ended with an error.
    #[error("btrfs receive ended with {status}: {stderr}")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Its last lines.
        stderr: String,
    },
    /// The pipe into it failed while it lives.
    #[error("cannot write to btrfs receive")]
    Write(#[source] io::Error),
    /// Nobody knows how it ended.
    #[error("cannot wait for btrfs receive")]
    Wait(#[source] io::Error),
    /// It was stopped through its [`Stopper`].
    #[error("the transfer was stopped")]
    Stopped,
}

/// The newest version of the send stream that `btrfs receive` on this machine takes: 2 from btrfs-progs 6.0 on.
///
/// # Errors
/// [`ReceiveError::Start`] if there is none, [`ReceiveError::Version`] if it says what nobody understands.
pub fn stream_version() -> Result<u32, ReceiveError> {
    let output = Command::new("btrfs").arg("--version").output().map_err(ReceiveError::Start)?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse_version(&text).ok_or_else(|| ReceiveError::Version(text.lines().next().unwrap_or_default().to_owned()))
}

/// From `btrfs-progs v6.2` and whatever follows it.
fn parse_version(text: &str) -> Option<u32> {
    let version = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let major: u32 = version.split('.').next()?.parse().ok()?;
    Some(if major >= 6 { 2 } else { 1 })
}

/// Stops what another thread is feeding, even while that thread is blocked in the pipe. Clones stop the same.
#[derive(Debug, Clone, Default)]
pub struct Stopper(Arc<Mutex<Stop>>);

#[derive(Debug, Default)]
struct Stop {
    stopped: bool,
    child: Option<OwnedFd>,
    pid: u32,
}

impl Stopper {
    /// Kills the child of the moment; none is started afterwards.
    pub fn stop(&self) {
        let mut stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stop.stopped = true;
        if let Some(child) = &stop.child {
            // It may have ended just now: then there is nothing to stop.
            let _ = pidfd_send_signal(child, Signal::KILL);
        }
    }

    /// Whether [`Stopper::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).stopped
    }

    /// The child of the moment as the kernel sees it: its pid, its state (D: it waits for a disk that does not answer) and where.
    pub fn child_state(&self) -> Option<String> {
        let stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        stop.child.as_ref()?;
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", stop.pid)).ok();
        let status = read("status")?;
        let state = status.lines().find_map(|line| line.strip_prefix("State:"))?.trim().to_owned();
        let place = read("wchan").filter(|place| place.len() > 1).unwrap_or_default();
        Some(format!("btrfs receive, pid {}, state {state} {place}", stop.pid).trim_end().to_owned())
    }

    fn guard(&self, child: &Child) -> Result<(), ReceiveError> {
        let mut stop = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if stop.stopped {
            return Err(ReceiveError::Stopped);
        }
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty());
        stop.child = Some(pidfd.map_err(|error| ReceiveError::Start(error.into()))?);
        stop.pid = child.id();
        Ok(())
    }
}

/// A running `btrfs receive`. Dropped before [`Receive::finish`], it is killed and waited for.
#[derive(Debug)]
pub struct Receive {
    child: Child,
    pipe: Option<ChildStdin>,
    /// What the pipe may still refer to: see [`Receive::feed`].
    lent: Vec<u8>,
    stderr: Option<JoinHandle<String>>,
    stopper: Stopper,
}

impl Receive {
    /// Starts it for one stream into `store`, in the mount namespace of the calling thread.
    ///
    /// # Errors
    /// [`ReceiveError::Start`], or [`ReceiveError::Stopped`] after a stop.
    pub fn start(store: &Path, stopper: &Stopper) -> Result<Self, ReceiveError> {
        let mut child = Command::new("btrfs")
            .args(["-q", "receive", "--chroot"])
            .arg(store)
            .env("LC_ALL", "C")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(ReceiveError::Start)?;
        let pipe = child.stdin.take();
        let stderr = child.stderr.take().map(|stderr| std::thread::spawn(move || last_lines(BufReader::new(stderr))));
        let receive = Self { child, pipe, lent: Vec::new(), stderr, stopper: stopper.clone() };
        receive.stopper.guard(&receive.child)?;
        if let Some(pipe) = &receive.pipe {
            // A smaller pipe, as an unprivileged user's limit may force it, is only slower.
            let _ = fcntl_setpipe_size(pipe, PIPE_BYTES);
        }
        Ok(receive)
    }

    /// Feeds it with `bytes`, and leaves an empty buffer in their place. Waits while the pipe is full.
    ///
    /// As much as the pipe holds is not copied into it, but lent: the child reads it where it is. So the buffer must be left alone
    /// until all of it is read. That is the case when the next one that is lent is in the pipe as a whole, for then there is no room
    /// for anything else in there. Two buffers take turns.
    ///
    /// # Errors
    /// It ended, by itself or because it was stopped.
    pub fn feed(&mut self, bytes: &mut Vec<u8>) -> Result<(), ReceiveError> {
        if bytes.len() < PIPE_BYTES {
            self.put(bytes, |pipe, rest| rustix::io::write(pipe, rest))?;
        } else {
            // SAFETY: the pipe refers to the buffer from now on, and is only ever read. Nothing touches the buffer before the next one
            // has taken its place, or the child is dead and the pipe with it.
            let lend = |pipe: &ChildStdin, rest: &[u8]| unsafe {
                rustix::pipe::vmsplice(pipe, &[IoSliceRaw::from_slice(rest)], SpliceFlags::empty())
            };
            if let Err(error) = self.put(bytes, lend) {
                self.kill();
                return Err(error);
            }
            std::mem::swap(bytes, &mut self.lent);
        }
        bytes.clear();
        Ok(())
    }

    /// Puts all bytes into the pipe by as many calls of `some` as it takes; that answers with how many it has put there.
    fn put(
        &mut self,
        mut bytes: &[u8],
        some: impl Fn(&ChildStdin, &[u8]) -> rustix::io::Result<usize>,
    ) -> Result<(), ReceiveError> {
        let Some(pipe) = &self.pipe else { return Ok(()) };
        while !bytes.is_empty() {
            match some(pipe, bytes) {
                Ok(put) => bytes = &bytes[put..],
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => {
                    self.end()?;
                    // It ended well without reading all of it: not what it does with a stream that we wrote.
                    return Err(ReceiveError::Write(Errno::PIPE.into()));
                }
                Err(error) => return Err(ReceiveError::Write(error.into())),
            }
        }
        Ok(())
    }

    /// Bytes in the pipe that it has not read yet.
    pub fn pending(&self) -> u64 {
        let Some(pipe) = &self.pipe else { return 0 };
        rustix::io::ioctl_fionread(pipe.as_fd()).unwrap_or(0)
    }

    /// Ends the stream and waits for it to say that all is applied.
    ///
    /// # Errors
    /// See [`ReceiveError`].
    pub fn finish(mut self) -> Result<(), ReceiveError> {
        self.end()
    }

    /// If it was waited for already, nothing happens.
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn end(&mut self) -> Result<(), ReceiveError> {
        self.pipe = None;
        let status = self.child.wait().map_err(ReceiveError::Wait)?;
        let stderr = self.stderr.take().and_then(|reading| reading.join().ok()).unwrap_or_default();
        if self.stopper.is_stopped() {
            Err(ReceiveError::Stopped)
        } else if status.success() {
            Ok(())
        } else {
            Err(ReceiveError::Ended { status, stderr })
        }
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        self.kill();
    }
}

fn last_lines(mut stderr: impl BufRead) -> String {
    let mut lines: VecDeque<String> = VecDeque::new();
    let mut line = Vec::new();
    // A line is whatever the child writes, file names included: bounded here, escaped by the log.
    while stderr.by_ref().take(4096).read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(&line).trim_end().to_owned());
        line.clear();
    }
    Vec::from(lines).join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_what_the_tool_said() {
        let mut receive = Receive::start(Path::new("/nonexistent"), &Stopper::default()).unwrap();
        // Whichever of them meets its end first has its words.
        let error =
            receive.feed(&mut b"not a stream".to_vec()).and_then(|()| receive.finish()).unwrap_err().to_string();
        assert!(error.contains("/nonexistent"), "{error}");
    }

    #[test]
    fn a_stop_ends_a_child_that_waits_for_more_and_forbids_the_next() {
        let stopper = Stopper::default();
        let dir = tempfile::tempdir().unwrap();
        // Without a stream it waits for one, or says at once that this is no btrfs: stopped it is in both cases.
        let receive = Receive::start(dir.path(), &stopper).unwrap();
        stopper.stop();
        assert!(matches!(receive.finish(), Err(ReceiveError::Stopped)));
        assert!(matches!(Receive::start(dir.path(), &stopper), Err(ReceiveError::Stopped)));
    }

    #[test]
    fn the_stream_version_follows_the_tool() {
        assert_eq!(parse_version("btrfs-progs v6.2\n"), Some(2));
        assert_eq!(parse_version("btrfs-progs v6.14.1\n+EXPERIMENTAL\n"), Some(2));
        assert_eq!(parse_version("btrfs-progs v5.16.2\n"), Some(1));
        assert_eq!(parse_version("something else"), None);
    }

    #[test]
    fn only_the_last_lines_are_kept() {
        let text: String = (0..100).map(|n| format!("line {n}\n")).collect();
        let kept = last_lines(text.as_bytes());
        assert!(kept.ends_with("line 99") && kept.starts_with("line 92"), "{kept}");
    }
}
