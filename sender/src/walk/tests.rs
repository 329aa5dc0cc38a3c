//! A walk sees everything once, leaves no directory before what is below it, and goes nowhere else.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    sync::Mutex,
    time::Instant,
};

use common::{
    btrfs,
    testing::{SMALL, TestFs},
};

use super::*;

/// Notes everything, in the order in which it comes.
#[derive(Default)]
struct Notes {
    seen: Mutex<BTreeMap<Vec<u8>, FileType>>,
    left: Mutex<Vec<Vec<u8>>>,
}

impl Visit for Notes {
    type Directory = Vec<u8>;
    type Tally = u64;

    fn entry(&self, tally: &mut u64, entry: &Entry<'_, Vec<u8>>) -> Result<Option<Vec<u8>>, WalkError> {
        *tally += 1;
        let expected = if entry.directory.is_empty() { Vec::new() } else { [entry.directory, &b"/"[..]].concat() };
        assert_eq!(entry.path, [&expected, entry.name.to_bytes()].concat());
        let before = self.seen.lock().unwrap().insert(entry.path.to_vec(), entry.kind);
        assert!(before.is_none(), "{:?} came twice", entry.path);
        Ok((entry.kind == FileType::Directory).then(|| entry.path.to_vec()))
    }

    fn leave(&self, path: &[u8], directory: &Vec<u8>, above: Option<&Vec<u8>>) -> Result<(), WalkError> {
        assert_eq!(path, directory);
        let slash = path.iter().rposition(|&b| b == b'/').unwrap_or(0);
        assert_eq!(above.map(|above| &above[..]), (!path.is_empty()).then(|| &path[..slash]));
        self.left.lock().unwrap().push(path.to_vec());
        Ok(())
    }
}

fn options<'a>(threads: usize, stop: &'a AtomicBool) -> Options<'a> {
    Options { threads, stop, tick_interval: Duration::from_millis(1) }
}

fn notes(root: &Path, threads: usize) -> Notes {
    let (notes, stop) = (Notes::default(), AtomicBool::new(false));
    let mut last = 0;
    let tallies = walk(fs::File::open(root).unwrap(), &notes, Vec::new(), &options(threads, &stop), |seen| {
        assert!(seen >= last);
        last = seen;
    });
    let seen = notes.seen.lock().unwrap().len() as u64;
    assert_eq!(tallies.unwrap().iter().sum::<u64>(), seen);
    notes
}

#[test]
fn everything_is_seen_once_and_left_after_what_is_below_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = BTreeSet::new();
    for d in 0..50 {
        let below = dir.path().join(format!("{}/{d}/x", d % 7));
        fs::create_dir_all(&below).unwrap();
        for name in ["x", "", "y/z"].iter().take(1 + d % 3) {
            expected.insert(format!("{}/{d}/x/{name}", d % 7).trim_end_matches('/').to_owned());
            fs::create_dir_all(below.join(name)).unwrap();
        }
    }
    // More than a few batches.
    for i in 0..20_000 {
        fs::write(dir.path().join(format!("1/f{i}")), "").unwrap();
    }
    symlink("..", dir.path().join("1/up")).unwrap();
    symlink("1", dir.path().join("beside")).unwrap();
    for threads in [1, 2, 9] {
        let notes = notes(dir.path(), threads);
        let seen = notes.seen.into_inner().unwrap();
        let reference = reference(dir.path(), dir.path());
        assert_eq!(seen, reference);
        assert!(expected.iter().all(|path| seen.contains_key(path.as_bytes())));
        let left = notes.left.into_inner().unwrap();
        let directories = seen.iter().filter(|(_, kind)| **kind == FileType::Directory).count();
        assert_eq!(left.len(), directories + 1);
        let place: BTreeMap<&[u8], usize> = left.iter().enumerate().map(|(place, path)| (&path[..], place)).collect();
        for path in &left {
            let above = path.iter().rposition(|&b| b == b'/').map_or(&b""[..], |slash| &path[..slash]);
            assert!(path.is_empty() || place[&path[..]] < place[above], "{path:?} was left after {above:?}");
        }
    }
}

/// The same, one by one.
fn reference(root: &Path, dir: &Path) -> BTreeMap<Vec<u8>, FileType> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let stat = rustix::fs::lstat(&path).unwrap();
        let kind = FileType::from_raw_mode(stat.st_mode);
        all.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), kind);
        if kind == FileType::Directory {
            all.extend(reference(root, &path));
        }
    }
    all
}

#[test]
fn names_are_bytes_and_paths_may_be_longer_than_the_kernel_takes() {
    let dir = tempfile::tempdir().unwrap();
    let name = [&[0xff, b'\n', 0x80][..], &[b'n'; 252]].concat();
    let mut fd = OwnedFd::from(fs::File::open(dir.path()).unwrap());
    let levels = 200;
    for _ in 0..levels {
        rustix::fs::mkdirat(&fd, &name[..], Mode::RWXU).unwrap();
        fd = open_directory(fd.as_fd(), &name).unwrap();
    }
    let notes = notes(dir.path(), 2);
    let seen = notes.seen.into_inner().unwrap();
    assert_eq!(seen.keys().map(Vec::len).max(), Some(levels * 256 - 1));
    assert_eq!((seen.len(), notes.left.into_inner().unwrap().len()), (levels, levels + 1));
    open_below(fs::File::open(dir.path()).unwrap().as_fd(), seen.keys().max_by_key(|path| path.len()).unwrap())
        .unwrap();
}

#[test]
fn the_walk_stays_in_the_subvolume_and_leaves_no_trace() {
    let fs = TestFs::with_options(SMALL, &[], "strictatime");
    let root = fs.subvolume("root");
    fs::create_dir_all(root.join("a/mount")).unwrap();
    fs::create_dir(root.join("a/closed")).unwrap();
    fs::set_permissions(root.join("a/closed"), fs::Permissions::from_mode(0o000)).unwrap();
    btrfs::create(&root.join("a/nested")).unwrap();
    fs::write(root.join("a/nested/inside"), "").unwrap();
    common::testing::run(std::process::Command::new("mount").args(["-t", "tmpfs", "none"]).arg(root.join("a/mount")));
    fs::write(root.join("a/mount/inside"), "").unwrap();
    let times = |path: &str| {
        let stat = rustix::fs::lstat(root.join(path)).unwrap();
        (stat.st_atime, stat.st_atime_nsec, stat.st_mtime, stat.st_ctime)
    };
    let before = ["", "a", "a/closed"].map(times);
    let seen = notes(&root, 2).seen.into_inner().unwrap();
    let paths: Vec<&[u8]> = seen.keys().map(|path| &path[..]).collect();
    assert_eq!(paths, [&b"a"[..], b"a/closed", b"a/mount", b"a/nested"]);
    assert_eq!(["", "a", "a/closed"].map(times), before);
}

/// Fails, stops or panics at a name.
struct Trouble<'a>(&'a AtomicBool);

impl Visit for Trouble<'_> {
    type Directory = ();
    type Tally = ();

    fn entry(&self, (): &mut (), entry: &Entry<'_, ()>) -> Result<Option<()>, WalkError> {
        match entry.name.to_bytes() {
            b"fail" => return Err(WalkError::call("like", entry.path)(Errno::IO)),
            b"stop" => self.0.store(true, Ordering::Relaxed),
            b"panic" => panic!("at once"),
            _ => {}
        }
        Ok((entry.kind == FileType::Directory).then_some(()))
    }
}

#[test]
fn it_ends_with_the_first_error_or_when_told_to() {
    for (name, said) in [("fail", "cannot like \"sub/fail\": Input/output error"), ("stop", "stopped")] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub").join(name), "").unwrap();
        (0..100).for_each(|d| fs::create_dir_all(dir.path().join(format!("sub/{d}/x/y"))).unwrap());
        let stop = AtomicBool::new(false);
        let root = fs::File::open(dir.path()).unwrap();
        let error = walk(root, &Trouble(&stop), (), &options(3, &stop), |_| {}).unwrap_err();
        assert!(error.to_string().starts_with(said), "{error}");
    }
}

#[test]
fn a_panic_of_the_visitor_is_passed_on() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("panic"), "").unwrap();
    let stop = AtomicBool::new(false);
    let root = fs::File::open(dir.path()).unwrap();
    let walked = std::panic::catch_unwind(|| walk(root, &Trouble(&stop), (), &options(2, &stop), |_| {}).is_ok());
    assert!(walked.is_err());
}

/// Walks a tree while another thread takes it down.
#[test]
fn what_vanishes_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    (0..300).for_each(|d| fs::create_dir_all(root.join(format!("{}/{d}/x/y", d % 9))).unwrap());
    let fd = fs::File::open(&root).unwrap();
    let start = Instant::now();
    thread::scope(|scope| {
        let down = scope.spawn(|| fs::remove_dir_all(&root).unwrap());
        while !down.is_finished() && start.elapsed() < Duration::from_secs(10) {
            let (notes, stop) = (Notes::default(), AtomicBool::new(false));
            walk(&fd, &notes, Vec::new(), &options(2, &stop), |_| {}).unwrap();
        }
    });
}
