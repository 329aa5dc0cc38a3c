//! What is mounted where, and the few mount calls that publishing needs.
//!
//! The kernel tells which mount a path is on (statx: its id, and whether the path is its root), and `mountinfo` tells the rest.
//! Paths are never compared to find out: mounts may be stacked, hidden or moved along with a renamed directory.

use std::{
    ffi::OsString,
    io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, CWD, RenameFlags, StatxAttributes, StatxFlags},
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

/// The mounts as the calling *thread* sees them: a thread in a jail has a mount namespace of its own.
const MOUNTINFO: &str = "/proc/thread-self/mountinfo";

/// How published snapshots are mounted, as flags and as mountinfo spells them.
const PUBLISHED_FLAGS: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NOSUID)
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NOATIME);
const PUBLISHED_OPTIONS: [&[u8]; 5] = [b"ro", b"nosuid", b"nodev", b"noexec", b"noatime"];

/// A line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Its id; ids of mounts that are gone are used again.
    pub id: u64,
    /// Major and minor number of the file system (for btrfs: of the whole file system, not of the subvolume).
    pub device: (u32, u32),
    /// The path inside the file system that is its root; ends with `//deleted` once that is deleted.
    pub root: PathBuf,
    /// Where it is mounted, as seen from the root directory of this process.
    pub point: PathBuf,
    /// Options of this mount, not of the file system: `ro,nosuid,relatime`.
    pub options: Vec<u8>,
    /// For instance `btrfs`.
    pub fs_type: String,
    /// For instance `/dev/sda1`.
    pub source: PathBuf,
}

impl Mount {
    /// Whether it has every option of a published snapshot: a crash between the two halves of [`bind`] and [`protect`] leaves one without.
    pub fn is_protected(&self) -> bool {
        let has = |wanted: &&[u8]| self.options.split(|b| *b == b',').any(|option| option == *wanted);
        PUBLISHED_OPTIONS.iter().all(has)
    }
}

/// Why a mount call failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// A system call failed.
    #[error("cannot {what} {}", path.display())]
    Call {
        /// The call, as a verb.
        what: &'static str,
        /// What it was about.
        path: PathBuf,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// A line of mountinfo does not look as proc(5) says.
    #[error("line {line} of {MOUNTINFO} is not understood: {text:?}")]
    Mountinfo {
        /// From 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// mountinfo has no line for a mount that statx has just named.
    #[error("{MOUNTINFO} does not list the mount that {} is on; was it unmounted just now? Try again", path.display())]
    Unlisted {
        /// The path that was asked about.
        path: PathBuf,
    },
}

/// What a plain unmount came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// It is gone.
    Done,
    /// Somebody, in whatever namespace, is inside: a working directory, a root directory, an open file.
    Busy,
}

fn call(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> MountError {
    let path = path.to_owned();
    move |errno| MountError::Call { what, path, source: errno.into() }
}

/// The mount whose root `path` is (the topmost one, if several are stacked there), or None if nothing is mounted there.
///
/// Fails if `path` does not exist. A symlink is not followed.
pub fn at(path: &Path) -> Result<Option<Mount>, MountError> {
    let (id, is_root) = mount_id(path)?;
    if is_root { listed(id, path).map(Some) } else { Ok(None) }
}

/// The mount that `path` is on.
pub fn holding(path: &Path) -> Result<Mount, MountError> {
    let (id, _) = mount_id(path)?;
    listed(id, path)
}

/// The id of the mount that `path` is on, and whether `path` is its root.
fn mount_id(path: &Path) -> Result<(u64, bool), MountError> {
    let stat =
        rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID).map_err(call("stat", path))?;
    // MNT_ID: Linux 5.8. The receiver needs more than that anyway (nosymfollow: 5.10).
    Ok((stat.stx_mnt_id, stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)))
}

fn listed(id: u64, path: &Path) -> Result<Mount, MountError> {
    let unlisted = || MountError::Unlisted { path: path.to_owned() };
    table()?.into_iter().find(|mount| mount.id == id).ok_or_else(unlisted)
}

/// Every mount that the calling thread sees.
pub fn table() -> Result<Vec<Mount>, MountError> {
    let bytes =
        std::fs::read(MOUNTINFO).map_err(|source| MountError::Call { what: "read", path: MOUNTINFO.into(), source })?;
    parse(&bytes)
}

/// Reads the text of a mountinfo file, see proc_pid_mountinfo(5).
fn parse(bytes: &[u8]) -> Result<Vec<Mount>, MountError> {
    let lines = bytes.split(|b| *b == b'\n').enumerate().filter(|(_, line)| !line.is_empty());
    lines
        .map(|(index, line)| {
            let bad = || MountError::Mountinfo { line: index + 1, text: String::from_utf8_lossy(line).into_owned() };
            parse_line(line).ok_or_else(bad)
        })
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let id = number(fields.next()?)?;
    let _parent = fields.next()?;
    let (major, minor) = std::str::from_utf8(fields.next()?).ok()?.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let root = unescape(fields.next()?);
    let point = unescape(fields.next()?);
    let options = fields.next()?.to_vec();
    // Any number of optional fields (shared:1, master:2, ...) up to a dash.
    fields.find(|field| *field == b"-")?;
    let fs_type = String::from_utf8(fields.next()?.to_vec()).ok()?;
    let source = unescape(fields.next()?);
    Some(Mount { id, device, root, point, options, fs_type, source })
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// The kernel writes space, tab, newline, backslash and `#` as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = tail;
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Makes `source` visible at `target` too. [`protect`] comes next: mount(2) cannot do both at once.
pub fn bind(source: &Path, target: &Path) -> Result<(), MountError> {
    rustix::mount::mount_bind(source, target).map_err(call("bind-mount a snapshot at", target))
}

/// Makes the mount at `target` read-only, nosuid, nodev, noexec, noatime.
pub fn protect(target: &Path) -> Result<(), MountError> {
    let flags = MountFlags::BIND | PUBLISHED_FLAGS;
    rustix::mount::mount_remount(target, flags, "").map_err(call("make read-only the mount at", target))
}

/// Unmounts what is at `target`, if nobody is inside: never lazily, so that `Busy` is the answer to 'is anybody there?'.
pub fn unmount(target: &Path) -> Result<Unmounted, MountError> {
    match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(Unmounted::Done),
        Err(Errno::BUSY) => Ok(Unmounted::Busy),
        Err(errno) => Err(call("unmount", target)(errno)),
    }
}

/// Lets two directories change places in one step; mounts *inside* them travel along. (Mount points themselves: EBUSY.)
pub fn exchange(one: &Path, other: &Path) -> Result<(), MountError> {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)
        .map_err(call("exchange with another directory", one))
}

/// Gives a directory a name that nothing else has yet; mounts inside it travel along.
pub fn rename_to_free_name(from: &Path, to: &Path) -> Result<(), MountError> {
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(call("rename a directory to", to))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn mountinfo_is_read_as_proc_writes_it() {
        let text = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            36 35 98:0 /@data\\040x/s.20261122T070000Z /srv/a\\134b\\012c\\011\\043 ro,nosuid,nodev,noexec,noatime master:1 shared:7 - btrfs /dev/vd\\040b rw,subvol=/x\n\
            40 35 0:50 /s//deleted /m ro - fuse.sshfs host:\\040 rw\n";
        let mounts = parse(text).unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].point, Path::new("/proc"));
        assert!(!mounts[0].is_protected());
        let data = &mounts[1];
        assert_eq!((data.id, data.device), (36, (98, 0)));
        assert_eq!(data.root, Path::new("/@data x/s.20261122T070000Z"));
        assert_eq!(data.point, Path::new("/srv/a\\b\nc\t#"));
        assert_eq!((data.fs_type.as_str(), data.source.as_path()), ("btrfs", Path::new("/dev/vd b")));
        assert!(data.is_protected());
        assert_eq!(mounts[2].root, Path::new("/s//deleted"));
    }

    #[test]
    fn a_mountinfo_that_is_cut_short_is_an_error_with_its_line() {
        for bad in ["x", "1 2 3:4 / /m rw", "1 2 3 / /m rw - a b c", "1 2 3:4 / /m rw shared:1 btrfs /dev/x rw"] {
            let text = format!("22 27 0:21 / /proc rw - proc proc rw\n{bad}\n");
            let error = parse(text.as_bytes()).unwrap_err();
            assert!(matches!(error, MountError::Mountinfo { line: 2, .. }), "{bad}: {error}");
        }
    }

    #[test]
    fn the_mounts_of_this_machine_are_understood() {
        let mounts = table().unwrap();
        assert!(mounts.iter().any(|mount| mount.point == Path::new("/proc")));
        assert_eq!(at(Path::new("/proc")).unwrap().unwrap().fs_type, "proc");
        assert_eq!(at(Path::new("/proc/self")).unwrap(), None);
        assert_eq!(holding(Path::new("/proc/version")).unwrap().point, Path::new("/proc"));
        assert!(matches!(at(Path::new("/nowhere/at/all")), Err(MountError::Call { what: "stat", .. })));
    }

    #[test]
    fn unescaping_leaves_what_is_no_escape() {
        for (raw, plain) in [("a", "a"), ("\\04", "\\04"), ("\\", "\\"), ("\\999", "\\999"), ("\\040\\", " \\")] {
            assert_eq!(unescape(raw.as_bytes()), Path::new(plain), "{raw}");
        }
    }
}
