//! A tree with every kind of file that a send has to carry over, the awkward ones above all.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io::Write,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, UNIX_EPOCH},
};

use fastrand::Rng;
use rustix::fs::{CWD, FallocateFlags, FileType, Mode, XattrFlags};

use crate::{btrfs, lab::run};

const MIB: usize = 1 << 20;

/// The longest name that a file can have, in bytes.
const NAME_MAX: usize = 255;

/// How long the longest path below the root gets, in bytes: near the kernel's limit of 4096, with room for where the tree lies.
const DEEP_BYTES: usize = 3700;

/// Makes the tree in an empty directory. The same seed gives the same tree, but for times that nobody sets.
pub fn everything(root: &Path, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    many_small_files(root, &mut rng);
    big_and_sparse_files(root, &mut rng);
    // Extents get their final addresses when they are written back; reflinks made before that would copy nothing.
    btrfs::sync(root);
    hard_links(root);
    reflinks(root);
    special_files(root);
    awkward_names(root);
    deep_directories(root);
    attributes_of_directories(root);
    btrfs::sync(root);
}

/// 40 directories of 50 files: sizes around what is stored inline and what is not, owners, modes, xattrs, times.
fn many_small_files(root: &Path, rng: &mut Rng) {
    for d in 0..40 {
        let dir = small_dir(root, d);
        fs::create_dir_all(&dir).unwrap();
        for i in 0..50 {
            let path = dir.join(format!("f{i}"));
            let size = *rng.choice(&[0, 17, 300, 1500, 2048, 3000, 4095, 4096, 5000, 9000, 20_000, 70_000]).unwrap();
            fs::write(&path, half_random(rng, size)).unwrap();
            if i % 13 == 0 {
                std::os::unix::fs::chown(&path, Some(1000 + i), Some(100)).unwrap();
            }
            if i % 5 == 0 {
                let mode = *rng.choice(&[0o600, 0o755, 0o4755, 0o2711, 0o1444, 0o000]).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            }
            if i % 7 == 0 {
                set_xattr(&path, "user.tag", format!("v{i}").as_bytes());
            }
            if i % 11 == 0 {
                set_xattr(&path, "user.big", &random(rng, 3000));
                set_xattr(&path, "trusted.empty", b"");
            }
            if i % 3 == 0 {
                let moment = UNIX_EPOCH + Duration::new(1_500_000_000 + u64::from(i), 123_456_789);
                let times = fs::FileTimes::new().set_modified(moment).set_accessed(moment + Duration::from_nanos(1));
                OpenOptions::new().write(true).open(&path).unwrap().set_times(times).unwrap();
            }
        }
    }
}

/// The directory number `d` of [`many_small_files`].
pub(crate) fn small_dir(root: &Path, d: usize) -> PathBuf {
    root.join(format!("d{}/s{d}", d % 8))
}

fn big_and_sparse_files(root: &Path, rng: &mut Rng) {
    fs::write(root.join("big"), random(rng, 6 * MIB)).unwrap();
    fs::write(root.join("text"), b"the same line over and over\n".repeat(150_000)).unwrap();
    fs::write(root.join("zeros"), vec![0; 2 * MIB]).unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.write_all_at(&random(rng, 100_000), 3 * MIB as u64).unwrap();
    sparse.set_len(9 * MIB as u64).unwrap();
    // A hole longer than 32 bits can say.
    let huge = File::create(root.join("huge hole")).unwrap();
    huge.write_all_at(b"head", 0).unwrap();
    huge.write_all_at(b"tail", 5 << 30).unwrap();
    File::create(root.join("only a hole")).unwrap().set_len(7_654_321).unwrap();
    let allocated = File::create(root.join("preallocated")).unwrap();
    rustix::fs::fallocate(&allocated, FallocateFlags::empty(), 0, 2 * MIB as u64).unwrap();
    allocated.write_all_at(&random(rng, 8192), 65_536).unwrap();
}

fn hard_links(root: &Path) {
    for d in 0..30 {
        let file = small_dir(root, d).join("f1");
        fs::hard_link(&file, root.join(format!("d{}/hard{d}", d % 8))).unwrap();
        fs::hard_link(&file, root.join(format!("hard{d}"))).unwrap();
    }
    symlink("target", root.join("linked symlink")).unwrap();
    fs::hard_link(root.join("linked symlink"), root.join("linked symlink 2")).unwrap();
    // More names than fit into one item of the tree: the kernel then keeps them elsewhere.
    fs::create_dir(root.join("names")).unwrap();
    for i in 0..300 {
        fs::hard_link(root.join("text"), root.join(format!("names/{i}-{}", "n".repeat(100)))).unwrap();
    }
}

fn reflinks(root: &Path) {
    for d in 0..40 {
        let dir = small_dir(root, d);
        reflink(&dir.join("f8"), &dir.join("reflink"));
    }
    for i in 0..4 {
        reflink(&root.join("big"), &root.join(format!("reflink{i}")));
    }
    // A part of another file, a part of the same file, and a part that ends where the file does.
    reflink_range(&root.join("big"), MIB as u64, &root.join("reflinked part"), 0, 2 * MIB as u64);
    reflink_range(&root.join("big"), 0, &root.join("big"), 12 * MIB as u64, MIB as u64);
    let text = root.join("text");
    let (tail, end) = (4 * MIB as u64, fs::metadata(&text).unwrap().len());
    reflink_range(&text, tail, &root.join("reflinked tail"), 0, end - tail);
}

fn special_files(root: &Path) {
    symlink("../etc/passwd", root.join("symlink")).unwrap();
    symlink(format!("/nowhere/{}", "a".repeat(1000)), root.join("long symlink")).unwrap();
    symlink(OsStr::from_bytes(b"not\xffutf8"), root.join("odd symlink")).unwrap();
    symlink(".", root.join("symlink to here")).unwrap();
    let at = |name: &str| root.join(name);
    let device = rustix::fs::makedev(1, 3);
    let big_device = rustix::fs::makedev(4095, 1_048_575);
    rustix::fs::mknodat(CWD, at("fifo"), FileType::Fifo, Mode::from(0o640), 0).unwrap();
    rustix::fs::mknodat(CWD, at("socket"), FileType::Socket, Mode::from(0o600), 0).unwrap();
    rustix::fs::mknodat(CWD, at("character device"), FileType::CharacterDevice, Mode::from(0o666), device).unwrap();
    rustix::fs::mknodat(CWD, at("block device"), FileType::BlockDevice, Mode::from(0o600), big_device).unwrap();
    rustix::fs::mknodat(CWD, at("owned fifo"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
    std::os::unix::fs::chown(at("owned fifo"), Some(33), Some(44)).unwrap();
    std::os::unix::fs::lchown(at("symlink"), Some(55), Some(66)).unwrap();
    fs::copy("/bin/true", at("capable")).unwrap();
    run(Command::new("setcap").arg("cap_net_raw,cap_net_admin+ep").arg(at("capable")));
}

fn awkward_names(root: &Path) {
    let dir = root.join("names that need care");
    fs::create_dir(&dir).unwrap();
    let long = [b'x'; NAME_MAX];
    let names: [&[u8]; 12] = [
        b"not\xff\xfeutf8",
        b"\xc0\xaf..",
        b"new\nline",
        b"\n",
        b" ",
        b"-rf",
        b"tab\tand\x1b[31mescape\x07",
        b"back\\slash \"quoted\" 'twice'",
        b"...",
        "größe \u{202e}drawrof".as_bytes(),
        // What the kernel's own temporary names in a stream look like.
        b"o257-7-0",
        &long,
    ];
    for name in names {
        fs::write(dir.join(OsStr::from_bytes(name)), name).unwrap();
    }
    let odd_dir = dir.join(OsStr::from_bytes(&[0xf0; NAME_MAX]));
    fs::create_dir(&odd_dir).unwrap();
    fs::write(odd_dir.join(OsStr::from_bytes(&[0x0a; NAME_MAX])), "deep in odd names").unwrap();
}

/// Long parts down to near the longest path, and many short parts.
fn deep_directories(root: &Path) {
    let mut path = PathBuf::new();
    while path.as_os_str().len() + 201 < DEEP_BYTES {
        path.push("d".repeat(200));
    }
    fs::create_dir_all(root.join(&path)).unwrap();
    fs::write(root.join(&path).join("at the bottom"), "x").unwrap();
    let stairs: PathBuf = (0..200).map(|i| i.to_string()).collect();
    fs::create_dir_all(root.join("stairs").join(&stairs)).unwrap();
    fs::write(root.join("stairs").join(&stairs).join("file"), "y").unwrap();
    fs::create_dir(root.join("empty directory")).unwrap();
    // Inodes whose parents are younger than they are.
    fs::create_dir_all(root.join("a/b/c")).unwrap();
    fs::write(root.join("a/b/c/file"), "z").unwrap();
    fs::rename(root.join("a/b/c"), root.join("z")).unwrap();
    fs::rename(root.join("a"), root.join("z/inner")).unwrap();
}

/// Directories have attributes too, the root above all.
fn attributes_of_directories(root: &Path) {
    set_xattr(&root.join("d2"), "user.directory", b"yes");
    fs::set_permissions(root.join("d2"), Permissions::from_mode(0o2770)).unwrap();
    std::os::unix::fs::chown(root.join("d3"), Some(7), Some(8)).unwrap();
    for dir in ["d0", "d1/s1", "z", "names"] {
        set_mtime(&root.join(dir), 981_173_106, 789_000_000);
    }
    fs::set_permissions(root, Permissions::from_mode(0o1751)).unwrap();
    std::os::unix::fs::chown(root, Some(9), Some(10)).unwrap();
    set_xattr(root, "user.root", b"of the tree");
    set_mtime(root, 1_000_000_007, 7);
}

/// Random bytes.
#[must_use]
pub fn random(rng: &mut Rng, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    rng.fill(&mut data);
    data
}

/// Random bytes, then one byte repeated: compressible by half.
pub(crate) fn half_random(rng: &mut Rng, bytes: usize) -> Vec<u8> {
    let mut data = random(rng, bytes / 2);
    data.resize(bytes, rng.u8(..));
    data
}

/// Sets an extended attribute.
pub fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
}

/// Sets the time of the last change, of a directory as well.
pub fn set_mtime(path: &Path, seconds: u64, nanoseconds: u32) {
    File::open(path).unwrap().set_modified(UNIX_EPOCH + Duration::new(seconds, nanoseconds)).unwrap();
}

/// Makes `to` share all the data of `from`.
pub fn reflink(from: &Path, to: &Path) {
    rustix::fs::ioctl_ficlone(File::create(to).unwrap(), File::open(from).unwrap()).unwrap();
}

/// Makes a range of `to` share the data of a range of `from`; both on the boundaries of blocks, or up to the end of `from`.
fn reflink_range(from: &Path, at: u64, to: &Path, to_at: u64, bytes: u64) {
    let source = File::open(from).unwrap();
    let target = OpenOptions::new().write(true).create(true).truncate(false).open(to).unwrap();
    let (mut at, mut to_at, mut left) = (at, to_at, usize::try_from(bytes).unwrap());
    // btrfs copies a range by sharing it.
    while left > 0 {
        let done = rustix::fs::copy_file_range(&source, Some(&mut at), &target, Some(&mut to_at), left).unwrap();
        assert!(done > 0, "{} ends early", from.display());
        left -= done;
    }
}

/// Appends to a file.
pub fn append(path: &Path, data: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(data).unwrap();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lab::{self, Lab},
        manifest::{Manifest, View, assert_replica},
    };

    #[test]
    fn the_tree_has_all_that_it_promises() {
        let lab = Lab::new();
        let root = lab.file_system("fs", lab::SMALL, "noatime").join("tree");
        btrfs::create(&root);
        everything(&root, 1);
        let tree = Manifest::of(&root, View::Replica);
        assert!(tree.len() > 2500, "{}", tree.len());
        assert!(tree.paths().any(|path| path.len() > 3400));
        let all_types = ["directory", "file", "symlink", "fifo", "socket", "character device", "block device"];
        for kind in all_types {
            assert!(tree.paths().any(|path| tree.attribute(path, "type") == Some(kind)), "no {kind}");
        }
        let shared = btrfs::usage(&root);
        assert!(shared.total - shared.unique > 25 << 20, "{shared:?}");
        assert!(tree.attribute(b"capable", "xattrs").unwrap().contains("security.capability"));
        assert_eq!(tree.attribute(b"only a hole", "data at"), Some(""));
        assert_eq!(tree.attribute(b"text", "links"), Some("301"));
    }

    #[test]
    fn the_same_seed_makes_the_same_tree() {
        let lab = Lab::new();
        let root = lab.file_system("fs", lab::SMALL, "noatime");
        let trees = ["one", "two", "three"].map(|name| root.join(name));
        for (tree, seed) in trees.iter().zip([5, 5, 6]) {
            fs::create_dir(tree).unwrap();
            everything(tree, seed);
        }
        let manifests = trees.map(|tree| Manifest::of(&tree, View::Client));
        let contents = |lines: Vec<String>| lines.into_iter().filter(|line| !line.contains("mtime")).count();
        assert_eq!(contents(manifests[0].differences(&manifests[1])), 0);
        assert!(contents(manifests[0].differences(&manifests[2])) > 1000);
    }

    /// The judge and the tree against the stock tools: what this finds, no agent of ours has to answer for.
    #[test]
    fn stock_send_and_receive_carry_the_tree_over() {
        let lab = Lab::new();
        let (from, to) = (lab.file_system("from", lab::SMALL, "noatime"), lab.file_system("to", lab::SMALL, "noatime"));
        btrfs::create(&from.join("live"));
        everything(&from.join("live"), 2);
        btrfs::snapshot(&from.join("live"), &from.join("one"));
        let ship = |base: &str| {
            let script = format!("btrfs send -q --proto 2 {base} | btrfs receive -q {}", to.display());
            run(Command::new("bash").args(["-ec", "set -o pipefail; eval \"$1\"", "-", &script]).current_dir(&from));
        };
        ship("one");
        assert_replica(&from.join("one"), &to.join("one"));
        let (ours, theirs) = (btrfs::usage(&from.join("one")), btrfs::usage(&to.join("one")));
        assert!(theirs.unique <= ours.unique + ours.unique / 10, "{ours:?} became {theirs:?}");
    }
}
