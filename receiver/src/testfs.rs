//! A btrfs on a loop device for the tests of this crate.

#![allow(clippy::unwrap_used)]

use std::{path::Path, process::Command};

use tempfile::TempDir;

/// A mounted btrfs; everything that is mounted below it goes with it.
pub struct TestFs {
    dir: TempDir,
}

impl TestFs {
    /// Makes and mounts one of `size` bytes (sparse).
    pub fn new(size: u64) -> Self {
        let dir = TempDir::with_prefix("snapferry-test-").unwrap();
        let image = dir.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(size).unwrap();
        std::fs::create_dir(dir.path().join("fs")).unwrap();
        run("mkfs.btrfs", &["-q".as_ref(), image.as_ref()]);
        let fs = Self { dir };
        run("mount", &["-o".as_ref(), "loop".as_ref(), image.as_ref(), fs.path().as_ref()]);
        fs
    }

    /// Where it is mounted.
    pub fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("fs")
    }

    /// A directory beside it, on another file system.
    pub fn beside(&self, name: &str) -> std::path::PathBuf {
        let path = self.dir.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for TestFs {
    fn drop(&mut self) {
        unmount_below(self.dir.path());
    }
}

/// Lazily unmounts everything below `dir`, as a reboot would.
pub fn unmount_below(dir: &Path) {
    for mount in crate::mount::table().unwrap_or_default().iter().rev() {
        if mount.point.starts_with(dir) {
            let _ = rustix::mount::unmount(&mount.point, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// Runs a tool and panics with what it says if it fails.
pub fn run(program: &str, args: &[&std::ffi::OsStr]) {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}
