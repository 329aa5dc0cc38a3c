//! A view of the file system in which a stream can do no harm outside of the store.
//!
//! `btrfs receive` runs with root's power on bytes from a network. `--chroot` keeps absolute paths and `..` inside the
//! directory it is given, but a stream may make a symlink there and write through it to a sibling: another snapshot. In
//! here no symlink is followed at all (mount option `nosymfollow`), device nodes and setuid bits mean nothing, and nothing
//! that is mounted here is seen outside.
//!
//! The *top level* of the file system is mounted, not the store: stock `btrfs receive` looks its base up from there and
//! refuses to work below a bind mount or a mount of another subvolume.

use std::{
    io,
    marker::PhantomData,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags},
    thread::UnshareFlags,
};

use crate::mount::{self, Mount, MountError};

/// Proof that the current thread is inside, and stays inside: there is no way out but its end.
#[derive(Debug)]
pub struct Jail {
    store: PathBuf,
    /// It says something about one thread only: not `Send`.
    _thread: PhantomData<*const ()>,
}

/// Why the jail could not be entered. The thread may be in a mount namespace of its own by then: let it end.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The store does not exist or cannot be looked at.
    #[error("cannot look at the store {}", path.display())]
    Store {
        /// The store.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The directory to mount at could not be made.
    #[error("cannot make the directory {}", path.display())]
    Mountpoint {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No mount namespace of its own.
    #[error("cannot enter a mount namespace of its own; the receiver must run as root, with CAP_SYS_ADMIN")]
    Namespace {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// mountinfo could not be read.
    #[error(transparent)]
    Mounts(#[from] MountError),
    /// A store must be on btrfs.
    #[error("the store {} is on {fs_type}, not on btrfs; name a directory of a btrfs file system as `store`", path.display())]
    NotBtrfs {
        /// The store.
        path: PathBuf,
        /// What it is on.
        fs_type: String,
    },
    /// mount(2) failed.
    #[error("cannot mount the top level of {} at {}; nosymfollow needs Linux 5.10 or newer", device.display(), point.display())]
    Mount {
        /// The device.
        device: PathBuf,
        /// Where.
        point: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The store is not where mountinfo says.
    #[error("{} is not the store {}; is something else mounted over a part of its path?", inside.display(), path.display())]
    Elsewhere {
        /// The store.
        path: PathBuf,
        /// Where it should be, seen from inside.
        inside: PathBuf,
    },
}

impl Jail {
    /// Puts the current thread, and every process that it starts from now on, into a mount namespace of its own, where
    /// the whole file system of `store` is mounted at `mountpoint` (made if missing; it stays empty for everybody else).
    ///
    /// For a thread of its own, never for one of an async runtime: nothing takes the thread out again. Unmounts on the host
    /// still reach it, so that it does not keep a retired snapshot busy; mounts made in here reach nobody. All of it goes
    /// when the thread and the processes that it started have ended.
    pub fn enter(store: &Path, mountpoint: &Path) -> Result<Self, JailError> {
        let path = store.to_owned();
        let store = store.canonicalize().map_err(|source| JailError::Store { path, source })?;
        std::fs::create_dir_all(mountpoint)
            .map_err(|source| JailError::Mountpoint { path: mountpoint.to_owned(), source })?;
        leave_the_mounts_of_the_host()?;

        let below = mount::holding(&store)?;
        if below.fs_type != "btrfs" {
            return Err(JailError::NotBtrfs { path: store, fs_type: below.fs_type });
        }
        let inside = path_inside(&store, &below, mountpoint);
        mount_top_level(&below.source, mountpoint)?;
        // Before the bytes of a peer are let loose: is this the directory that was meant?
        if is_same_directory(&store, &inside) {
            Ok(Self { store: inside, _thread: PhantomData })
        } else {
            Err(JailError::Elsewhere { path: store, inside })
        }
    }

    /// The store as seen from inside: what `btrfs receive --chroot` is given.
    pub fn store_path(&self) -> &Path {
        &self.store
    }
}

fn leave_the_mounts_of_the_host() -> Result<(), JailError> {
    let failed = |errno: rustix::io::Errno| JailError::Namespace { source: errno.into() };
    // SAFETY: NEWNS (and FS, which it implies) replaces this thread's view of mounts and working directory; unlike FILES it
    // does not touch the table of file descriptors, which is what makes unshare unsafe.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(failed)?;
    // Slave, not private: an unmount on the host must reach this copy too, or a retired snapshot would stay mounted here.
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).map_err(failed)
}

/// Where `store`, which is on the mount `below`, appears once the top level is mounted at `mountpoint`.
fn path_inside(store: &Path, below: &Mount, mountpoint: &Path) -> PathBuf {
    let from_top_level = below.root.join(store.strip_prefix(&below.point).unwrap_or(Path::new("")));
    mountpoint.join(from_top_level.strip_prefix("/").unwrap_or(&from_top_level))
}

fn mount_top_level(device: &Path, mountpoint: &Path) -> Result<(), JailError> {
    let flags = MountFlags::NOSYMFOLLOW | MountFlags::NODEV | MountFlags::NOSUID | MountFlags::NOEXEC;
    // 5 is the number of the top-level subvolume of every btrfs.
    rustix::mount::mount(device, mountpoint, "btrfs", flags, c"subvolid=5").map_err(|errno| JailError::Mount {
        device: device.to_owned(),
        point: mountpoint.to_owned(),
        source: errno.into(),
    })
}

/// Each subvolume of a btrfs has a device number of its own, the same in all its mounts; so two numbers say it all.
fn is_same_directory(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino())).ok();
    identity(one).is_some_and(|id| identity(other) == Some(id))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{
        fs,
        io::Write,
        process::{Command, Output, Stdio},
        thread,
    };

    use common::{
        btrfs,
        testing::{SMALL, TestFs, run},
    };

    use super::*;

    /// A command of a version 1 stream.
    fn command(kind: u16, attrs: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (attr, value) in attrs {
            body.extend(attr.to_le_bytes());
            body.extend(u16::try_from(value.len()).unwrap().to_le_bytes());
            body.extend(*value);
        }
        let mut whole = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
        whole.extend(kind.to_le_bytes());
        whole.extend([0; 4]);
        whole.extend(body);
        let crc = crc32c(&whole);
        whole[6..10].copy_from_slice(&crc.to_le_bytes());
        whole
    }

    /// As btrfs wants it: seed 0, no final inversion.
    fn crc32c(bytes: &[u8]) -> u32 {
        bytes.iter().fold(0, |crc, byte| {
            (0..8).fold(crc ^ u32::from(*byte), |c: u32, _| if c & 1 == 1 { c >> 1 ^ 0x82f6_3b78 } else { c >> 1 })
        })
    }

    /// A stream whose subvolume `evil` has a symlink `way` to `target`, and which then makes a directory through it.
    fn hostile(target: &str) -> Vec<u8> {
        let mut stream = b"btrfs-stream\0\x01\0\0\0".to_vec();
        stream.extend(command(1, &[(15, b"evil"), (1, &[7; 16]), (2, &9u64.to_le_bytes())]));
        stream.extend(command(8, &[(15, b"way"), (3, &257u64.to_le_bytes()), (17, target.as_bytes())]));
        stream.extend(command(4, &[(15, b"way/planted"), (3, &258u64.to_le_bytes())]));
        stream.extend(command(21, &[]));
        stream
    }

    fn receive(store: &Path, stream: &[u8]) -> Output {
        let mut child = Command::new("btrfs")
            .args(["receive", "--chroot"])
            .arg(store)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A receive that refuses the stream closes the pipe early: not an error of the writer.
        let _ = child.stdin.take().unwrap().write_all(stream);
        child.wait_with_output().unwrap()
    }

    /// A directory of the test's own; what is mounted there goes with the file system.
    fn beside(fs: &TestFs, name: &str) -> PathBuf {
        let path = fs.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// What `btrfs receive` in a jail says to a stream.
    fn receive_in_jail(store: &Path, mountpoint: &Path, stream: &[u8]) -> Output {
        let inside = || {
            let jail = Jail::enter(store, mountpoint).unwrap();
            receive(jail.store_path(), stream)
        };
        thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }

    /// A store with a sibling that nobody may touch.
    fn store_with_victim(fs: &Path) -> PathBuf {
        let store = fs.join("deep/store");
        fs::create_dir_all(store.join("victim")).unwrap();
        store
    }

    #[test]
    fn a_stream_cannot_go_through_the_symlink_that_it_made() {
        let fs = TestFs::new(SMALL);
        let store = store_with_victim(fs.path());
        for target in ["/victim", "../victim"] {
            let output = receive_in_jail(&store, &beside(&fs, "jail"), &hostile(target));
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                !output.status.success() && stderr.contains("Too many levels of symbolic links"),
                "{target}: {stderr}"
            );
            assert!(!store.join("victim/planted").exists());
            btrfs::delete(&store.join("evil")).unwrap();
        }
        // The stream is one that would get through without the jail.
        let output = receive(&store, &hostile("/victim"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(store.join("victim/planted").exists());
    }

    /// Sends a snapshot with symlinks of all kinds into a store and says what arrived.
    fn a_good_stream_comes_out(fs: &TestFs, store: &Path) {
        let source = fs.path().join("source");
        btrfs::create(&source).unwrap();
        fs::write(source.join("file"), "content").unwrap();
        for (link, target) in [("near", "file"), ("far", "/etc/passwd"), ("up", "../../.."), ("nowhere", "not there")] {
            std::os::unix::fs::symlink(target, source.join(link)).unwrap();
        }
        let snapshot = fs.path().join("v.20261122T070000Z");
        btrfs::snapshot(&btrfs::Subvolume::open(&source).unwrap(), &snapshot, btrfs::Access::ReadOnly).unwrap();
        let sent = Command::new("btrfs").args(["send", "-q"]).arg(&snapshot).output().unwrap();
        assert!(sent.status.success());

        let output = receive_in_jail(store, &beside(fs, "jail"), &sent.stdout);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let replica = store.join("v.20261122T070000Z");
        assert_eq!(fs::read_to_string(replica.join("file")).unwrap(), "content");
        assert_eq!(fs::read_link(replica.join("far")).unwrap(), Path::new("/etc/passwd"));
        assert_eq!(fs::read_link(replica.join("up")).unwrap(), Path::new("../../.."));
        // Nothing of it is seen from outside.
        assert_eq!(fs::read_dir(beside(fs, "jail")).unwrap().count(), 0);
    }

    #[test]
    fn a_good_stream_comes_out_of_it() {
        let fs = TestFs::new(SMALL);
        let store = store_with_victim(fs.path());
        a_good_stream_comes_out(&fs, &store);
    }

    #[test]
    fn it_works_when_the_store_is_on_a_mount_of_another_subvolume() {
        let fs = TestFs::new(SMALL);
        let _ = fs.subvolume("@data");
        let device = mount::holding(fs.path()).unwrap().source;
        let other = beside(&fs, "other mount");
        run(Command::new("mount").args(["-o", "subvol=@data"]).arg(device).arg(&other));
        a_good_stream_comes_out(&fs, &store_with_victim(&other));
    }

    #[test]
    fn a_store_that_is_a_symlink_or_a_bind_mount_is_found_too() {
        let fs = TestFs::new(SMALL);
        let store = store_with_victim(fs.path());
        let bound = beside(&fs, "bound");
        run(Command::new("mount").arg("--bind").arg(&store).arg(&bound));
        let link = beside(&fs, "links").join("store");
        std::os::unix::fs::symlink(&bound, &link).unwrap();
        a_good_stream_comes_out(&fs, &link);
    }

    #[test]
    fn a_store_that_is_not_on_btrfs_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let jail = dir.path().join("jail");
        let entered = thread::scope(|scope| {
            scope
                .spawn(|| matches!(Jail::enter(Path::new("/proc/self"), &jail), Err(JailError::NotBtrfs { .. })))
                .join()
        });
        assert!(entered.unwrap());
    }
}
