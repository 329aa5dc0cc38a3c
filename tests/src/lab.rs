//! A lab is the scratch directory of one test. It owns all that the test makes outside of its own process (file systems, mounts,
//! namespaces, whatever runs in them) and takes it away when dropped, also when the test panics.
//!
//! A test that was killed cannot do that. So each lab holds a lock on its directory for as long as its process lives, and the
//! first lab of a process sweeps those that nobody holds any more.
//!
//! `SNAPFERRY_KEEP_LABS=1` leaves the lab of a failed test in place, mounts and all, until the next sweep.

use std::{
    fs::{self, File},
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::{
        Once,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use rustix::fs::FlockOperation;

use crate::host::{self, Host};

/// The beginning of the name of every lab's directory; it lies in the directory for temporary files.
const PREFIX: &str = "snapferry-lab-";

/// Bytes of a file system that is big enough for most tests; its image is sparse.
pub const SMALL: u64 = 1 << 30;

/// The scratch directory of one test.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    /// Tells a sweep that this lab is in use.
    _lock: File,
}

impl Lab {
    /// Makes an empty lab. Panics unless run by root.
    #[must_use]
    pub fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "system tests mount btrfs images and make network namespaces: run them as root (sudo tests/run.sh)"
        );
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{count}", process::id()));
        // A sweep by another process must not find it before it is locked: until then it has a name that no sweep looks at.
        let fresh = std::env::temp_dir().join(format!(".{PREFIX}{}-{count}", process::id()));
        fs::create_dir_all(&fresh).unwrap();
        let lock = File::create(fresh.join("lock")).unwrap();
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        fs::rename(&fresh, &dir).unwrap();
        Self { dir: dir.canonicalize().unwrap(), _lock: lock }
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes a new directory in it.
    #[must_use]
    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.dir.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Makes a btrfs of `bytes` (at least some 110 MiB) and mounts it at `name` with these mount options; its image is
    /// `name.image`.
    #[must_use]
    pub fn file_system(&self, name: &str, bytes: u64, options: &str) -> PathBuf {
        let image = self.image(name);
        File::create(&image).unwrap().set_len(bytes).unwrap();
        run(Command::new("mkfs.btrfs").arg("-q").arg(&image));
        self.mount(name, options)
    }

    /// The file that holds the file system `name`.
    #[must_use]
    pub fn image(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.image"))
    }

    /// Mounts the file system `name` once more, for instance after [`Lab::unmount_all`].
    #[must_use]
    pub fn mount(&self, name: &str, options: &str) -> PathBuf {
        let mountpoint = self.directory(name);
        let options = if options.is_empty() { "loop".to_owned() } else { format!("loop,{options}") };
        run(Command::new("mount").args(["-t", "btrfs", "-o", &options]).arg(self.image(name)).arg(&mountpoint));
        mountpoint
    }

    /// Unmounts everything that is mounted at or below a path, the last mount first, as a shutdown does.
    pub fn unmount_all(&self, below: &Path) {
        assert!(below.starts_with(&self.dir), "{} is not of this lab", below.display());
        unmount_below(below);
    }

    /// Makes two hosts with a network between them: [`host::HEAD_ADDRESS`] and [`host::MIRROR_ADDRESS`].
    #[must_use]
    pub fn network(&self) -> (Host, Host) {
        host::network(&namespace_prefix(&self.dir))
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let keep = std::env::var_os("SNAPFERRY_KEEP_LABS").is_some_and(|value| value == "1");
        if keep && thread::panicking() {
            eprintln!("the lab of this test stays: {}", self.dir.display());
            return;
        }
        tear_down(&self.dir);
    }
}

/// Takes away what killed test runs left behind.
fn sweep() {
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else { return };
    for entry in entries.flatten() {
        let is_lab = entry.file_name().to_string_lossy().starts_with(PREFIX);
        let Ok(lock) = File::open(entry.path().join("lock")) else { continue };
        if is_lab && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            eprintln!("sweeping {}, left by a test that was killed", entry.path().display());
            tear_down(&entry.path());
        }
    }
}

/// The beginning of the names of a lab's network namespaces.
fn namespace_prefix(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    format!("sf-{}-", name.trim_start_matches(PREFIX))
}

/// Ends what runs in the lab's namespaces, removes these, unmounts what is mounted and deletes the directory. Never panics: it
/// runs while tests fail.
fn tear_down(dir: &Path) {
    host::remove_all(&namespace_prefix(dir));
    unmount_below(dir);
    if mounts_below(dir).is_empty() {
        if let Err(error) = fs::remove_dir_all(dir) {
            eprintln!("cannot remove {}: {error}", dir.display());
        }
    } else {
        eprintln!("still mounted below {}; remove it by hand", dir.display());
    }
}

/// Unmounts, last mount first; what is busy is detached, so that it goes with its last user.
fn unmount_below(dir: &Path) {
    for mountpoint in mounts_below(dir).iter().rev() {
        let plain = Command::new("umount").arg(mountpoint).stderr(Stdio::null()).status();
        if !plain.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(mountpoint).stderr(Stdio::null()).status();
        }
    }
}

/// The mount points at or below a path, in the order in which they were mounted. A path twice if it is mounted over.
#[must_use]
pub fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let fifth = |line: &[u8]| line.split(|&b| b == b' ').nth(4).map(unescape);
    let points = table.split(|&b| b == b'\n').filter_map(fifth);
    points.filter(|point| point.starts_with(dir)).collect()
}

/// mountinfo writes blanks and the like as three octal digits behind a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let code = after.get(..3).and_then(|d| std::str::from_utf8(d).ok()).and_then(|d| u8::from_str_radix(d, 8).ok());
        match code.filter(|_| first == b'\\') {
            Some(byte) => {
                out.push(byte);
                rest = &after[3..];
            }
            None => {
                out.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Runs a program to its end and returns what it wrote to stdout; panics with what it said if it fails or is missing.
pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!("{}: {error}; deploy/prerequisites.sh installs what is missing", command.get_program().display())
    });
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_takes_away_what_it_made() {
        let lab = Lab::new();
        let dir = lab.path().to_owned();
        let root = lab.file_system("head node", 128 << 20, "noatime");
        fs::write(root.join("file"), "x").unwrap();
        assert_eq!(mounts_below(&dir), vec![root]);
        let (head, _mirror) = lab.network();
        let mut sleeper = head.command("sleep").arg("1000").spawn().unwrap();
        drop(lab);
        assert!(!dir.exists());
        assert!(mounts_below(&dir).is_empty());
        assert!(!sleeper.wait().unwrap().success());
        assert!(!head.exists());
    }

    #[test]
    fn a_file_that_is_still_open_does_not_keep_the_lab() {
        let lab = Lab::new();
        let dir = lab.path().to_owned();
        let _open = File::create(lab.file_system("fs", 128 << 20, "").join("file")).unwrap();
        drop(lab);
        assert!(!dir.exists());
    }

    #[test]
    fn what_a_killed_run_left_is_swept_and_what_is_in_use_is_not() {
        let used = Lab::new();
        let mut left = Lab::new();
        let dir = left.path().to_owned();
        let _ = left.file_system("fs", 128 << 20, "");
        let _ = left.network();
        // As if its process had been killed: the lock is free, nothing is cleaned up.
        left._lock = File::open("/dev/null").unwrap();
        std::mem::forget(left);
        sweep();
        assert!(!dir.exists());
        assert!(mounts_below(&dir).is_empty());
        assert!(used.path().exists());
    }
}
