//! A real btrfs for tests: an image in a file, mounted through a loop device, gone again when dropped. Needs root.

#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

/// Image and mount point are in a directory with this prefix, in the directory for temporary files.
pub const PREFIX: &str = "snapferry-test-";

/// Bytes of a file system that is big enough for most tests; the image is sparse.
pub const SMALL: u64 = 256 << 20;

/// A mounted btrfs of its own.
#[derive(Debug)]
pub struct TestFs {
    dir: PathBuf,
    mountpoint: PathBuf,
}

impl TestFs {
    /// Makes and mounts one of `bytes` (at least some 110 MiB). Panics, saying what is missing, if that cannot be done.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self::with_options(bytes, &[], "noatime")
    }

    /// The same with arguments for `mkfs.btrfs` and options for `mount`.
    #[must_use]
    pub fn with_options(bytes: u64, mkfs: &[&str], options: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test mounts a btrfs image through a loop device: run it as root"
        );
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{count}", std::process::id()));
        let fs = Self { mountpoint: dir.join("fs"), dir };
        std::fs::create_dir_all(&fs.mountpoint).unwrap();
        File::create(fs.image()).unwrap().set_len(bytes).unwrap();
        run(Command::new("mkfs.btrfs").arg("-q").args(mkfs).arg(fs.image()));
        run(Command::new("mount").args(["-o", &format!("loop,{options}")]).arg(fs.image()).arg(&fs.mountpoint));
        fs
    }

    /// The root directory of the file system.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    /// The file that holds the file system.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.dir.join("image")
    }

    /// Makes an empty subvolume; returns where it is.
    #[must_use]
    pub fn subvolume(&self, name: &str) -> PathBuf {
        let path = self.mountpoint.join(name);
        crate::btrfs::create(&path).unwrap();
        path
    }
}

impl Drop for TestFs {
    fn drop(&mut self) {
        // What a test mounted below goes too. A file that is still open anywhere must not keep the image in use for ever.
        let plain = Command::new("umount").args(["-q", "-R"]).arg(&self.mountpoint).status();
        if !plain.is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").args(["-q", "-R", "-l"]).arg(&self.mountpoint).status();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Runs a program to its end; panics with what it said if it fails or is missing.
pub fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{}: {error}; install it (deploy/prerequisites.sh)", command.get_program().display())
    });
    assert!(output.status.success(), "{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}
