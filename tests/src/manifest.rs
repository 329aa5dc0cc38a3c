//! What is in a tree, down to the last attribute, and how two trees differ.
//!
//! This is the judge of every test about replicas, so it asks the file system itself and believes nobody: no code of the agents
//! in here. What `btrfs receive` cannot carry over is left out: inode numbers, ctime, otime, chattr flags, preallocation.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{CStr, OsStr},
    fmt::Write as _,
    fs::{self, File, Metadata},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{FileExt, FileTypeExt, MetadataExt},
    },
    path::Path,
};

use rustix::{
    fs::{SeekFrom, llistxattr},
    io::Errno,
};
use sha2::{Digest, Sha256};

/// At most so many differences are shown; a tree that is all wrong must not fill the log.
const SHOWN: usize = 20;

/// The unit in which contents are compared, in bytes: the file system's block, so that holes begin and end with one.
const BLOCK: usize = 4096;

/// Where in a file its data are, in bytes: `0-4096,8192-9000`.
const DATA_AT: &str = "data at";

/// Which attributes count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// All that a send carries over.
    Replica,
    /// The same, but not where in a file its holes are. Whether a send writes zeros or leaves a hole depends on what it may clone from at
    /// that moment; a transfer that was interrupted is made of several sends.
    Resumed,
    /// What `rsync -a` of a plain tree carries over: no hard links, xattrs, access times, holes.
    Client,
}

/// A tree: what stands at each path, the root directory (the empty path) included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest(BTreeMap<Vec<u8>, Entry>);

/// What stands at a path: attributes by name, each in a form that people can read.
type Entry = BTreeMap<&'static str, String>;

impl Manifest {
    /// Reads a whole tree. Panics if anything in it cannot be read.
    #[must_use]
    pub fn of(root: &Path, view: View) -> Self {
        let mut reader = Reader { root, view, first_path: HashMap::new(), entries: BTreeMap::new() };
        reader.read(&[]);
        Self(reader.entries)
    }

    /// How many files, directories and so on there are, the root directory not counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() - 1
    }

    /// Whether there is nothing but the root directory.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The paths, relative to the root, in the order of their bytes.
    pub fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.0.keys().map(Vec::as_slice)
    }

    /// An attribute of what stands at a path, as it is shown in differences.
    #[must_use]
    pub fn attribute(&self, path: &[u8], name: &str) -> Option<&str> {
        self.0.get(path)?.get(name).map(String::as_str)
    }

    /// How `other` differs from this tree, one line a difference; empty when they are equal.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let missing = self.0.keys().filter(|path| !other.0.contains_key(*path));
        let missing = missing.map(|path| format!("{}: missing", shown(path)));
        let extra = other.0.keys().filter(|path| !self.0.contains_key(*path));
        let extra = extra.map(|path| format!("{}: should not be there", shown(path)));
        let mut lines: Vec<String> = missing.chain(extra).collect();
        for (path, ours) in &self.0 {
            let Some(theirs) = other.0.get(path) else { continue };
            let names = ours.keys().chain(theirs.keys().filter(|name| !ours.contains_key(*name)));
            for name in names.filter(|name| ours.get(*name) != theirs.get(*name)) {
                let value = |entry: &Entry| entry.get(name).map_or("nothing", String::as_str).to_owned();
                lines.push(format!("{}: {name} is {}, should be {}", shown(path), value(theirs), value(ours)));
            }
        }
        lines
    }

    /// Gives the files that differ from `expected` only by single blocks where there should be a hole the ranges that they should have.
    fn excuse_old_ends(&mut self, expected: &Self) {
        for (path, ours) in &mut self.0 {
            let theirs = expected.0.get(path).and_then(|entry| entry.get(DATA_AT));
            if let (Some(ours), Some(theirs)) = (ours.get_mut(DATA_AT), theirs)
                && has_single_blocks_more(&blocks(ours), &blocks(theirs))
            {
                ours.clone_from(theirs);
            }
        }
    }

    /// Panics with the differences if `other` is not equal. `what` says which trees these are.
    pub fn assert_equal(&self, other: &Self, what: &str) {
        let lines = self.differences(other);
        assert!(
            lines.is_empty(),
            "{what}: {} differences among {} paths, for instance\n  {}",
            lines.len(),
            self.0.len(),
            lines.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("\n  ")
        );
    }
}

/// Panics unless two trees are equal in every attribute that a send carries over.
pub fn assert_replica(source: &Path, replica: &Path) {
    assert_alike(source, replica, View::Replica, |_, _| {});
}

/// The same for what came by increments of any kind, with one flaw of the stock tools excused. When a file was cut and has grown again
/// between two snapshots, the send punches the hole before it makes the file longer. So what is left of the block that was the file's
/// last is not taken away, but filled with zeros.
pub fn assert_increments(source: &Path, replica: &Path) {
    assert_alike(source, replica, View::Replica, Manifest::excuse_old_ends);
}

/// Panics unless two trees are equal in every attribute that a send which was interrupted and went on carries over.
pub fn assert_resumed(source: &Path, replica: &Path) {
    assert_alike(source, replica, View::Resumed, |_, _| {});
}

/// Panics unless a client's copy is equal to a tree in all that `rsync -a` carries over.
pub fn assert_copy(source: &Path, copy: &Path) {
    assert_alike(source, copy, View::Client, |_, _| {});
}

/// Panics unless two trees are equal in what counts in `view`, but for what `excuse` takes back of the second one's differences.
fn assert_alike(source: &Path, copy: &Path, view: View, excuse: fn(&mut Manifest, &Manifest)) {
    let (expected, mut got) = (Manifest::of(source, view), Manifest::of(copy, view));
    excuse(&mut got, &expected);
    expected.assert_equal(&got, &format!("{} against {}", copy.display(), source.display()));
}

/// The blocks of ranges as they stand in an entry.
fn blocks(ranges: &str) -> BTreeSet<usize> {
    let ranges = ranges.split(',').filter_map(|range| range.split_once('-'));
    ranges.flat_map(|(start, end)| number(start) / BLOCK..number(end).div_ceil(BLOCK)).collect()
}

fn number(text: &str) -> usize {
    text.parse().unwrap()
}

fn has_single_blocks_more(ours: &BTreeSet<usize>, theirs: &BTreeSet<usize>) -> bool {
    let more: Vec<usize> = ours.difference(theirs).copied().collect();
    theirs.is_subset(ours) && more.windows(2).all(|two| two[0] + 1 < two[1])
}

/// Walks a tree.
struct Reader<'a> {
    root: &'a Path,
    view: View,
    /// Where an inode with several names was seen first.
    first_path: HashMap<u64, Vec<u8>>,
    entries: BTreeMap<Vec<u8>, Entry>,
}

impl Reader<'_> {
    /// Reads what stands at a path and, if it is a directory, what is below.
    fn read(&mut self, relative: &[u8]) {
        // The root itself without a trailing slash, whatever it is.
        let path = if relative.is_empty() { self.root.to_owned() } else { self.root.join(OsStr::from_bytes(relative)) };
        let meta = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut entry = self.attributes(&path, &meta);
        if self.view != View::Client && !meta.is_dir() && meta.nlink() > 1 {
            let first = self.first_path.entry(meta.ino()).or_insert_with(|| relative.to_vec());
            entry.insert("hard link to", shown(first));
        }
        self.entries.insert(relative.to_vec(), entry);
        if meta.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|found| found.unwrap().file_name()).collect();
            names.sort();
            for name in names {
                let mut below = relative.to_vec();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend(name.into_vec());
                self.read(&below);
            }
        }
    }

    fn attributes(&self, path: &Path, meta: &Metadata) -> Entry {
        let mut entry = BTreeMap::from([
            ("type", kind(meta).to_owned()),
            ("owner", format!("{}:{}", meta.uid(), meta.gid())),
            ("mtime", format!("{}.{:09}", meta.mtime(), meta.mtime_nsec())),
        ]);
        if !meta.is_symlink() {
            entry.insert("mode", format!("{:04o}", meta.mode() & 0o7777));
        }
        if meta.is_file() {
            entry.insert("size", meta.len().to_string());
            entry.insert("content", content(path));
        }
        if meta.is_symlink() {
            entry.insert("target", shown(fs::read_link(path).unwrap().as_os_str().as_bytes()));
        }
        if meta.file_type().is_char_device() || meta.file_type().is_block_device() {
            let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
            entry.insert("device", format!("{major}:{minor}"));
        }
        if self.view != View::Client {
            entry.insert("atime", format!("{}.{:09}", meta.atime(), meta.atime_nsec()));
            entry.insert("xattrs", xattrs(path));
            if !meta.is_dir() {
                entry.insert("links", meta.nlink().to_string());
            }
            if meta.is_file() && self.view == View::Replica {
                let ranges = data(&File::open(path).unwrap());
                let ranges: Vec<_> = ranges.iter().map(|(start, end)| format!("{start}-{end}")).collect();
                entry.insert(DATA_AT, ranges.join(","));
            }
        }
        entry
    }
}

fn kind(meta: &Metadata) -> &'static str {
    let kind = meta.file_type();
    match () {
        () if kind.is_dir() => "directory",
        () if kind.is_file() => "file",
        () if kind.is_symlink() => "symlink",
        () if kind.is_fifo() => "fifo",
        () if kind.is_socket() => "socket",
        () if kind.is_char_device() => "character device",
        () => "block device",
    }
}

/// The hash of a file's blocks, each with its place; blocks of zeros are left out, so that it is quick over large holes and the
/// same whether zeros are stored or not.
fn content(path: &Path) -> String {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; 64 * BLOCK]);
    for (start, end) in data(&file) {
        let mut at = start;
        while at < end {
            let wanted = buffer.len().min(usize::try_from(end - at).unwrap());
            file.read_exact_at(&mut buffer[..wanted], at).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            for block in buffer[..wanted].chunks(BLOCK) {
                if block.iter().any(|&byte| byte != 0) {
                    hash.update(at.to_le_bytes());
                    hash.update(block);
                }
                at += block.len() as u64;
            }
        }
    }
    hex(&hash.finalize())
}

/// Where a file has data and no hole.
fn data(file: &File) -> Vec<(u64, u64)> {
    let (mut ranges, mut at) = (Vec::new(), 0);
    loop {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(start) => {
                at = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
                ranges.push((start, at));
            }
            Err(Errno::NXIO) => return ranges,
            Err(error) => panic!("cannot ask where the data is: {error}"),
        }
    }
}

/// All extended attributes, sorted: `user.a="x", security.capability=0x01..`.
fn xattrs(path: &Path) -> String {
    let mut names = Vec::with_capacity(1 << 16);
    llistxattr(path, rustix::buffer::spare_capacity(&mut names)).unwrap();
    let names = names.split_inclusive(|&b| b == 0).map(|name| CStr::from_bytes_with_nul(name).unwrap());
    let value = |name: &CStr| {
        let mut value = Vec::with_capacity(1 << 16);
        rustix::fs::lgetxattr(path, name, rustix::buffer::spare_capacity(&mut value)).unwrap();
        if value.len() > 100 { format!("sha256:{}", hex(&Sha256::digest(&value))) } else { shown(&value) }
    };
    let mut all: Vec<_> = names.map(|name| format!("{}={}", shown(name.to_bytes()), value(name))).collect();
    all.sort();
    all.join(", ")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Bytes for people: quoted, and what is not plain ASCII escaped.
fn shown(bytes: &[u8]) -> String {
    format!("\"{}\"", bytes.escape_ascii())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::lab::{Lab, run};

    #[test]
    fn every_kind_of_difference_is_found() {
        let lab = Lab::new();
        let root = lab.file_system("fs", 128 << 20, "noatime");
        let fresh = |name: &str| {
            let tree = root.join(name);
            fs::create_dir_all(tree.join("dir")).unwrap();
            fs::write(tree.join("file"), vec![7; 10_000]).unwrap();
            fs::hard_link(tree.join("file"), tree.join("link")).unwrap();
            fs::write(tree.join("dir/second"), "x").unwrap();
            let stamp = ["-h", "-d", "2001-02-03 04:05:06.789"];
            run(Command::new("touch").args(stamp).arg(tree.join("file")).arg(tree.join("dir/second")));
            run(Command::new("touch").args(stamp).arg(tree.join("dir")));
            run(Command::new("touch").args(stamp).arg(&tree));
            tree
        };
        let good = fresh("good");
        assert_replica(&good, &fresh("same"));
        for (script, expected) in [
            ("chmod 600 file", "mode"),
            ("chown 5 dir", "owner"),
            ("touch .", "mtime"),
            ("touch -a file", "atime"),
            ("setfattr -n user.x -v y dir/second", "xattrs"),
            (
                "printf y | dd of=dir/second conv=notrunc status=none && touch -d '2001-02-03 04:05:06.789' dir/second",
                "content",
            ),
            ("rm link; cp -p file link", "links"),
            ("rm link", "missing"),
            ("mknod device c 1 3", "should not be there"),
            ("fallocate -p -o 4096 -l 4096 file", "data at"),
        ] {
            let tree = fresh(&format!("bad {expected}"));
            run(Command::new("sh").args(["-ec", script]).current_dir(&tree));
            let lines = Manifest::of(&good, View::Replica).differences(&Manifest::of(&tree, View::Replica));
            assert!(lines.iter().any(|line| line.contains(expected)), "{script}: {lines:?}");
        }
    }

    #[test]
    fn single_blocks_are_excused_and_nothing_else() {
        let excused = |ours: &str, theirs: &str| has_single_blocks_more(&blocks(ours), &blocks(theirs));
        assert!(excused("0-32768,45056-49152", "0-32768"));
        assert!(excused("0-12288", "0-8192"), "at the end of what should be there");
        assert!(excused("4096-8192,12288-13000", ""));
        assert!(!excused("0-32768,40960-49152", "0-32768"), "two blocks in a row");
        assert!(!excused("0-4096,12288-16384", "0-8192"), "a hole where there should be none");
    }
}
