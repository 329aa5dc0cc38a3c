//! One agent a volume: a lock that the kernel gives back when its holder ends, however it ends.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};

/// How often and with which pauses it is tried. A child that the former holder was just starting has a copy of the descriptor until it
/// executes its program, and for so long the lock outlives its holder.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(20);

/// Why a lock cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error("another agent{} holds this volume: {path} is locked; stop it first", pid_text(.pid))]
    Held {
        /// The lock file.
        path: PathBuf,
        /// Who, if it said so.
        pid: Option<u32>,
    },
    /// The file system.
    #[error("cannot lock {path}")]
    Io {
        /// The lock file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A lock that is held until it is dropped. The file stays: removing it would let two hold "the same" lock.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, and leaves our pid in the file for whoever comes second. Who holds it is not waited for.
    ///
    /// # Errors
    /// [`LockError::Held`] names the holder.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let io = |source| LockError::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match lock(&file) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                // Who holds it is only a help for the reader.
                let _ = file.read_to_string(&mut text);
                return Err(LockError::Held { path: path.to_owned(), pid: text.trim().parse().ok() });
            }
            Err(error) => return Err(io(error.into())),
        }
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(io)?;
        Ok(Self { _file: file })
    }
}

fn lock(file: &File) -> rustix::io::Result<()> {
    for _ in 1..ATTEMPTS {
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => thread::sleep(PAUSE),
            locked => return locked,
        }
    }
    flock(file, FlockOperation::NonBlockingLockExclusive)
}

fn pid_text(pid: &Option<u32>) -> String {
    pid.map_or(String::new(), |pid| format!(" (pid {pid})"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_is_first_and_gets_the_lock_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = Lock::acquire(&path).unwrap();
        let error = Lock::acquire(&path).unwrap_err();
        assert!(matches!(error, LockError::Held { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
        // As a child has it between fork and exec.
        let copy = first._file.try_clone().unwrap();
        drop(first);
        let late = thread::spawn(move || {
            thread::sleep(PAUSE);
            drop(copy);
        });
        Lock::acquire(&path).unwrap();
        late.join().unwrap();
    }
}
