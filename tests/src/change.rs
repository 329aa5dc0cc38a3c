//! Changes to a tree between two snapshots: those that are hard on an incremental send, and any number of random ones.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions, Permissions},
    os::unix::fs::{FileExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use fastrand::Rng;
use rustix::fs::{CWD, FallocateFlags, RenameFlags};

use crate::{
    btrfs,
    tree::{append, half_random, random, reflink, set_mtime, set_xattr, small_dir},
};

const MIB: u64 = 1 << 20;

/// Changes the tree of [`crate::tree::everything`] in every way that a send has to tell apart.
pub fn everything(root: &Path, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    contents(root, &mut rng);
    names(root, &mut rng);
    attributes(root);
    crossed_renames(root);
    btrfs::sync(root);
}

fn contents(root: &Path, rng: &mut Rng) {
    for d in 0..40 {
        let dir = small_dir(root, d);
        append(&dir.join("f4"), b"and more");
        fs::write(dir.join("f9"), half_random(rng, 6000)).unwrap();
    }
    reflink(&root.join("big"), &root.join("new reflink"));
    reflink(&root.join("reflink0"), &root.join("newer reflink"));
    let writable = |name: &str| OpenOptions::new().write(true).open(root.join(name)).unwrap();
    writable("reflink1").write_all_at(&random(rng, 65_536), MIB).unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(writable("big"), punch, 2 * MIB, MIB).unwrap();
    writable("reflink2").set_len(5 * MIB + 17).unwrap();
    writable("sparse").set_len(20 * MIB).unwrap();
    writable("huge hole").write_all_at(b"middle", 3 << 30).unwrap();
    writable("only a hole").write_all_at(b"filled", 4 * MIB).unwrap();
    writable("text").set_len(0).unwrap();
    // Same inode, same size, other content; and same content, written again.
    writable("zeros").write_all_at(&[1], 1_500_000).unwrap();
    let preallocated = fs::read(root.join("preallocated")).unwrap();
    writable("preallocated").write_all_at(&preallocated, 0).unwrap();
}

fn names(root: &Path, rng: &mut Rng) {
    for d in 0..40 {
        let dir = small_dir(root, d);
        fs::remove_file(dir.join("f2")).unwrap();
        fs::rename(dir.join("f3"), root.join(format!("d{}/moved{d}", (d + 1) % 8))).unwrap();
        // One file over another.
        fs::rename(dir.join("f5"), dir.join("f6")).unwrap();
    }
    for d in 0..10 {
        let dir = small_dir(root, d);
        fs::remove_dir_all(&dir).unwrap();
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("fresh"), random(rng, 40_000)).unwrap();
    }
    fs::remove_file(root.join("hard3")).unwrap();
    fs::hard_link(root.join("big"), root.join("another name of big")).unwrap();
    fs::remove_dir_all(root.join("names")).unwrap();
    // The same name, another kind of thing.
    fs::remove_file(root.join("fifo")).unwrap();
    fs::create_dir(root.join("fifo")).unwrap();
    fs::remove_dir(root.join("empty directory")).unwrap();
    symlink("fifo", root.join("empty directory")).unwrap();
    fs::remove_file(root.join("symlink")).unwrap();
    symlink("elsewhere", root.join("symlink")).unwrap();
    fs::rename(root.join("capable"), root.join("d7/capable")).unwrap();
    fs::rename(root.join("stairs/0/1/2"), root.join("stairs from the third")).unwrap();
}

fn attributes(root: &Path) {
    for d in 10..40 {
        let path = small_dir(root, d).join("f0");
        rustix::fs::lremovexattr(&path, "user.tag").unwrap();
        set_xattr(&path, "user.big", b"small now");
        fs::set_permissions(small_dir(root, d).join("f7"), Permissions::from_mode(0o4711)).unwrap();
    }
    set_xattr(&root.join("text"), "user.x", b"y");
    fs::set_permissions(root.join("d5"), Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(root.join("d6"), Some(5), Some(6)).unwrap();
    std::os::unix::fs::chown(root.join("character device"), Some(5), Some(6)).unwrap();
    rustix::fs::lremovexattr(root, "user.root").unwrap();
    set_mtime(&root.join("d0"), 981_173_107, 1);
}

/// Names that change places, directories that go below what was below them.
fn crossed_renames(root: &Path) {
    let at = |name: &str| root.join(name);
    swap(&at("d3"), &at("d4"));
    swap(&at("d0/moved7"), &at("d1/moved0"));
    swap(&at("fifo"), &at("reflink3"));
    // z/inner/b becomes z's parent: the upper one goes below the lower one.
    fs::rename(at("z/inner"), at("inner")).unwrap();
    fs::rename(at("z"), at("inner/b/z")).unwrap();
    fs::rename(at("inner"), at("z")).unwrap();
    // A ring of three.
    fs::rename(at("hard0"), at("hold")).unwrap();
    fs::rename(at("hard1"), at("hard0")).unwrap();
    fs::rename(at("hard2"), at("hard1")).unwrap();
    fs::rename(at("hold"), at("hard2")).unwrap();
}

fn swap(one: &Path, other: &Path) {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

/// Does `count` random changes: to files, names, attributes and directories. The same seed on the same tree does the same.
pub fn randomly(root: &Path, seed: u64, count: usize) {
    let mut rng = Rng::with_seed(seed);
    for step in 0..count {
        let mut found = Found::default();
        found.look(root);
        found.change(&mut rng, &format!("{seed}-{step}"));
    }
}

/// What there is to change: sorted, so that the order in which directories are listed does not matter.
#[derive(Default)]
struct Found {
    /// The root comes first.
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Found {
    fn look(&mut self, dir: &Path) {
        self.directories.push(dir.to_owned());
        let mut names: Vec<OsString> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        for path in names.iter().map(|name| dir.join(name)) {
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            if kind.is_dir() {
                self.look(&path);
            } else if kind.is_file() {
                self.files.push(path);
            }
        }
    }

    /// One random change; `unique` becomes part of the name of what is new.
    fn change(&self, rng: &mut Rng, unique: &str) {
        let directory = rng.choice(&self.directories).unwrap();
        let fresh = directory.join(format!("new-{unique}"));
        let file = rng.choice(&self.files);
        let (Some(file), true) = (file, rng.u8(..) < 200) else {
            return match rng.u8(..4) {
                0 | 1 => fs::create_dir(fresh).unwrap(),
                2 => symlink("to nowhere", fresh).unwrap(),
                _ => fs::write(fresh, half_random(rng, 5000)).unwrap(),
            };
        };
        let writable = || OpenOptions::new().write(true).open(file).unwrap();
        let size = fs::metadata(file).unwrap().len();
        match rng.u8(..16) {
            0..3 => {
                let bytes = rng.usize(..200_000);
                fs::write(fresh, half_random(rng, bytes)).unwrap();
            }
            3 => append(file, b"appended"),
            4 => writable().write_all_at(&random(rng, 3000), rng.u64(..=size)).unwrap(),
            5 => writable().set_len(rng.u64(..=2 * size)).unwrap(),
            6 => fs::remove_file(file).unwrap(),
            7 => fs::rename(file, fresh).unwrap(),
            8 => fs::hard_link(file, fresh).unwrap(),
            9 => reflink(file, &fresh),
            10 => self.move_directory(rng, directory, &fresh),
            11 => self.swap(rng, file),
            12 => set_xattr(file, "user.random", unique.as_bytes()),
            13 => fs::set_permissions(file, Permissions::from_mode(rng.u32(..0o10000))).unwrap(),
            14 => std::os::unix::fs::chown(file, Some(rng.u32(..3000)), None).unwrap(),
            _ => File::open(file).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap(),
        }
    }

    /// Moves a directory, unless it would go below itself; now and then removes it instead.
    fn move_directory(&self, rng: &mut Rng, directory: &Path, fresh: &Path) {
        let moved = rng.choice(&self.directories[1..]);
        match moved {
            Some(moved) if rng.u8(..4) == 0 => fs::remove_dir_all(moved).unwrap(),
            Some(moved) if !directory.starts_with(moved) => fs::rename(moved, fresh).unwrap(),
            _ => fs::create_dir(fresh).unwrap(),
        }
    }

    /// Lets a file and a directory, or two directories, change places.
    fn swap(&self, rng: &mut Rng, file: &Path) {
        let (Some(one), Some(other)) = (rng.choice(&self.directories[1..]), rng.choice(&self.directories[1..])) else {
            return;
        };
        if !one.starts_with(other) && !other.starts_with(one) {
            swap(one, other);
        } else if !file.starts_with(one) {
            swap(one, file);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::{
        lab::{self, Lab, run},
        manifest::{self, Manifest, View},
        tree,
    };

    /// Stock send and receive of a new snapshot.
    fn ship(from: &Path, to: &Path, base: &str, snapshot: &str) {
        btrfs::snapshot(&from.join("live"), &from.join(snapshot));
        let base = if base.is_empty() { String::new() } else { format!("-p {base}") };
        let script = format!("btrfs send -q --proto 2 {base} {snapshot} | btrfs receive -q {}", to.display());
        run(Command::new("bash").args(["-ec", &format!("set -o pipefail; {script}")]).current_dir(from));
    }

    /// One volume through a row of snapshots. The judge's verdict but for one known flaw of the stock tools: an increment that
    /// leaves the root directory alone changes its time of last change at the receiver.
    fn ship_and_compare(from: &Path, to: &Path, base: &str, snapshot: &str) {
        ship(from, to, base, snapshot);
        let (expected, got) = (from.join(snapshot), to.join(snapshot));
        let (expected, got) = (Manifest::of(&expected, View::Replica), Manifest::of(&got, View::Replica));
        let lines = expected.differences(&got);
        assert!(lines.iter().all(|line| line.starts_with("\"\": mtime")), "{snapshot}: {lines:#?}");
    }

    #[test]
    fn stock_send_and_receive_carry_the_changes_over() {
        let lab = Lab::new();
        let (from, to) = (lab.file_system("from", lab::SMALL, "noatime"), lab.file_system("to", lab::SMALL, "noatime"));
        btrfs::create(&from.join("live"));
        tree::everything(&from.join("live"), 3);
        ship_and_compare(&from, &to, "", "one");
        everything(&from.join("live"), 4);
        ship_and_compare(&from, &to, "one", "two");
        let (one, two) = (from.join("one"), from.join("two"));
        let changed = Manifest::of(&one, View::Replica).differences(&Manifest::of(&two, View::Replica));
        assert!(changed.len() > 1000, "{}", changed.len());
    }

    #[test]
    fn stock_send_and_receive_carry_random_changes_over() {
        let lab = Lab::new();
        let (from, to) = (lab.file_system("from", lab::SMALL, "noatime"), lab.file_system("to", lab::SMALL, "noatime"));
        btrfs::create(&from.join("live"));
        let mut base = String::new();
        for round in 0..10 {
            randomly(&from.join("live"), round, 40);
            let snapshot = format!("s{round}");
            ship_and_compare(&from, &to, &base, &snapshot);
            base = snapshot;
        }
    }

    #[test]
    fn stock_send_and_receive_leave_the_old_last_block_of_a_file_that_was_cut_and_has_grown() {
        let lab = Lab::new();
        let (from, to) = (lab.file_system("from", lab::SMALL, "noatime"), lab.file_system("to", lab::SMALL, "noatime"));
        btrfs::create(&from.join("live"));
        let file = from.join("live/file");
        fs::write(&file, random(&mut Rng::with_seed(1), 47_000)).unwrap();
        ship_and_compare(&from, &to, "", "one");
        for size in [30_000, 60_000] {
            OpenOptions::new().write(true).open(&file).unwrap().set_len(size).unwrap();
        }
        // Where the data are is known only once they are written.
        btrfs::sync(&from);
        ship(&from, &to, "one", "two");
        let data_at = |tree: &Path| Manifest::of(tree, View::Replica).attribute(b"file", "data at").map(str::to_owned);
        assert_eq!(data_at(&from.join("two")).as_deref(), Some("0-32768"));
        assert_eq!(
            data_at(&to.join("two")).as_deref(),
            Some("0-32768,45056-49152"),
            "if it is right: excuse it no more"
        );
        manifest::assert_increments(&from.join("two"), &to.join("two"));
    }

    #[test]
    fn the_same_seed_does_the_same() {
        let lab = Lab::new();
        let root = lab.file_system("fs", lab::SMALL, "noatime");
        let trees = ["one", "two"].map(|name| root.join(name));
        for tree in &trees {
            fs::create_dir(tree).unwrap();
            randomly(tree, 7, 300);
        }
        let trees = trees.map(|tree| Manifest::of(&tree, View::Client));
        assert!(trees[0].len() > 20, "{}", trees[0].len());
        let lines = trees[0].differences(&trees[1]);
        assert!(lines.iter().all(|line| line.contains(": mtime is")), "{lines:#?}");
    }
}
