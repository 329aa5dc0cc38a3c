//! Filtered snapshots on real file systems: what is in them, what is left of an interrupted one, and how they follow each other.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsStr,
    fs::{self, File, Permissions},
    io::{Read, Write},
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, fs::symlink},
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, UNIX_EPOCH},
};

use common::testing::{SMALL, TestFs, run};
use fastrand::Rng;
use jiff::Timestamp;
use rustix::fs::{FileType, Stat};

use super::*;
use crate::{
    filter::{AgeBy, Filter, Patterns},
    send::Source,
};

const NOW: i64 = 1_795_330_800;

static NEVER: AtomicBool = AtomicBool::new(false);

fn order<'a>(volume: &'a VolumeName, filter: &'a Filter, stop: &'a AtomicBool, second: i64) -> Order<'a> {
    let now = Timestamp::from_second(NOW + second).unwrap();
    let checked_file = Path::new("/nowhere");
    Order { volume, now, filter, stop, progress_interval: Duration::from_millis(10), checked_file }
}

fn filter(exclude: &[&str], max_age_days: Option<u64>) -> Filter {
    Filter {
        exclude: Patterns::new(exclude).unwrap(),
        max_age: max_age_days.map(|days| Duration::from_secs(days * 86_400)),
        max_age_by: AgeBy::Mtime,
        guix_cache: false,
    }
}

/// A file system with a source and the directory of its snapshots.
struct Lab {
    /// It keeps the source open: it goes first.
    site: Site,
    fs: TestFs,
    volume: VolumeName,
}

impl Lab {
    fn new() -> Self {
        let fs = TestFs::with_options(SMALL, &[], "strictatime");
        let source = fs.subvolume("source");
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        let site = Site::open(&source, &dir).unwrap();
        Self { site, fs, volume: "v".parse().unwrap() }
    }

    fn source(&self) -> PathBuf {
        self.fs.path().join("source")
    }

    fn take(&self, filter: &Filter, second: i64) -> Found {
        self.site.take(&order(&self.volume, filter, &NEVER, second)).unwrap()
    }

    /// The names in the directory of the snapshots.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.fs.path().join("snapshots")).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// All below a directory, by path.
fn tree(root: &Path) -> BTreeMap<PathBuf, Stat> {
    let mut all = BTreeMap::from([(PathBuf::new(), rustix::fs::lstat(root).unwrap())]);
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        // Without the times of reading, which are compared.
        let fd = walk::open_below(File::open(root).unwrap().as_fd(), dir.as_os_str().as_bytes()).unwrap();
        for entry in rustix::fs::Dir::new(fd).unwrap() {
            let entry = entry.unwrap();
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            let path = dir.join(OsStr::from_bytes(entry.file_name().to_bytes()));
            if entry.file_type() == FileType::Directory {
                waiting.push(path.clone());
            }
            let stat = rustix::fs::lstat(root.join(&path)).unwrap();
            all.insert(path, stat);
        }
    }
    all
}

/// What is compared of a file. A snapshot has the inode numbers of its source; the rest of the content goes with them.
fn essence(stat: &Stat) -> [i128; 9] {
    let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    let size = if is_dir { 0 } else { stat.st_size };
    [
        stat.st_ino.into(),
        stat.st_mode.into(),
        stat.st_uid.into(),
        stat.st_gid.into(),
        size.into(),
        stat.st_mtime.into(),
        stat.st_mtime_nsec.into(),
        stat.st_atime.into(),
        stat.st_atime_nsec.into(),
    ]
}

/// Panics unless `snapshot` is `source` without what `excluded` says; a directory goes with all that is in it.
#[track_caller]
fn assert_filtered(
    source: &BTreeMap<PathBuf, Stat>,
    snapshot: &Path,
    excluded: impl Fn(&Path, bool, &Stat) -> bool,
    what: &str,
) {
    let mut expected = BTreeMap::new();
    let mut gone: BTreeSet<&Path> = BTreeSet::new();
    for (path, stat) in source {
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let above = path.parent().is_some_and(|above| gone.contains(above));
        if above || !path.as_os_str().is_empty() && excluded(path, is_dir, stat) {
            gone.insert(path);
        } else {
            expected.insert(path, stat);
        }
    }
    let got = tree(snapshot);
    let paths = |tree: Vec<&PathBuf>| tree.into_iter().cloned().collect::<BTreeSet<_>>();
    let (wanted, there) = (paths(expected.keys().copied().collect()), paths(got.keys().collect()));
    assert_eq!(there.difference(&wanted).collect::<Vec<_>>(), Vec::<&PathBuf>::new(), "{what}: should be gone");
    assert_eq!(wanted.difference(&there).collect::<Vec<_>>(), Vec::<&PathBuf>::new(), "{what}: should be there");
    for (path, stat) in expected {
        assert_eq!(essence(stat), essence(&got[path]), "{what}: {path:?}");
    }
}

/// The bytes of the whole stream.
fn stream(snapshot: &Found, base: Option<&Found>) -> Vec<u8> {
    let mut stream = Source::open(snapshot, base).unwrap().stream(2).unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    stream.finish().unwrap();
    bytes
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

fn set_mtime(path: &Path, age_days: u64) {
    let time = UNIX_EPOCH + Duration::from_secs(NOW.cast_unsigned() - age_days * 86_400);
    File::open(path).unwrap().set_modified(time).unwrap();
}

#[test]
fn no_excluded_byte_or_name_leaves_the_machine_and_increments_stay_small() {
    let lab = Lab::new();
    let source = lab.source();
    let noise = |rng: &mut Rng| std::iter::repeat_with(|| rng.u8(..)).take(100_000).collect::<Vec<u8>>();
    let mut rng = Rng::with_seed(1);
    for dir in ["keep", "secret-directory"] {
        fs::create_dir(source.join(dir)).unwrap();
        (0..20).for_each(|i| fs::write(source.join(dir).join(format!("{dir}-{i}")), noise(&mut rng)).unwrap());
    }
    fs::write(source.join("secret-directory/marked"), b"EXCLUDED BYTES").unwrap();
    fs::write(source.join("keep/some.secret-name"), b"EXCLUDED BYTES too").unwrap();
    let filter = filter(&["/secret-directory/", "*.secret-name"], None);
    let mut base: Option<Found> = None;
    for cycle in 0..3_u8 {
        let before = tree(&source);
        let taken = lab.take(&filter, cycle.into());
        assert_eq!(
            tree(&source).iter().map(|(path, stat)| (path, essence(stat), stat.st_ctime)).collect::<Vec<_>>(),
            before.iter().map(|(path, stat)| (path, essence(stat), stat.st_ctime)).collect::<Vec<_>>(),
            "the source is never touched"
        );
        assert!(taken.info.read_only);
        let bytes = stream(&taken, base.as_ref());
        for part in [&b"EXCLUDED"[..], b"secret"] {
            assert!(!contains(&bytes, part), "{} is in the stream", part.escape_ascii());
        }
        assert!(
            contains(&bytes, &taken.snapshot.id.uuid.into_bytes()),
            "the stream is that of {:?}",
            taken.snapshot.id
        );
        assert_eq!(base.is_some(), bytes.len() < 300_000, "{} bytes in cycle {cycle}", bytes.len());
        base = Some(taken);
        fs::write(source.join("keep").join(format!("new-{cycle}")), noise(&mut rng)).unwrap();
        fs::write(source.join("secret-directory").join(format!("new-{cycle}")), b"EXCLUDED BYTES").unwrap();
        fs::write(source.join("keep/some.secret-name"), [b"EXCLUDED", &[cycle][..]].concat()).unwrap();
    }
}

#[test]
fn snapshots_are_in_order_whether_filtered_or_not() {
    let lab = Lab::new();
    let source = lab.source();
    for name in ["a.lz", "b"] {
        fs::write(source.join(name), "x").unwrap();
    }
    let (idle, lz, all) = (Filter::default(), filter(&["*.lz"], None), filter(&["*"], None));
    // The source rests; then it changes between a snapshot and the next; then it rests again.
    let filters = [&idle, &lz, &all, &lz, &lz, &idle, &idle, &all, &idle];
    let mut taken = Vec::new();
    for (second, filter) in filters.into_iter().enumerate() {
        if second == 5 {
            fs::write(source.join("c"), "y").unwrap();
        }
        taken.push(lab.take(filter, i64::try_from(second).unwrap()).snapshot);
    }
    let listed: Vec<Snapshot> =
        btrfs::snapshots(&lab.site.dir, &lab.volume).unwrap().into_iter().rev().map(|found| found.snapshot).collect();
    assert_eq!(listed, taken);
    let count = |snapshot: &Snapshot| fs::read_dir(lab.site.dir.join(snapshot.name.to_string())).unwrap().count();
    assert_eq!(taken.iter().map(count).collect::<Vec<_>>(), [2, 1, 0, 1, 1, 3, 3, 0, 3]);
}

#[test]
fn the_name_comes_last_and_an_interrupted_one_leaves_nothing() {
    let lab = Lab::new();
    let source = lab.source();
    fs::create_dir(source.join("sub")).unwrap();
    (0..5000).for_each(|i| drop(File::create(source.join(format!("sub/{i}"))).unwrap()));
    let filter = filter(&["/sub/"], None);

    let stopped = AtomicBool::new(true);
    let error = lab.site.take(&order(&lab.volume, &filter, &stopped, 0)).unwrap_err();
    assert!(matches!(error, CreateError::Filter(walk::WalkError::Stopped)), "{error}");
    assert_eq!(lab.names(), Vec::<String>::new());

    // A crash leaves the draft behind, writable or not, and nobody takes it for a snapshot.
    for access in [Access::Writable, Access::ReadOnly] {
        btrfs::snapshot(lab.site.source(), &lab.site.draft(&lab.volume), access).unwrap();
        assert_eq!(lab.names(), ["v.filtering"]);
        assert!(btrfs::snapshots(&lab.site.dir, &lab.volume).unwrap().is_empty());
        lab.site.sweep(&lab.volume).unwrap();
        lab.site.sweep(&lab.volume).unwrap();
        assert_eq!(lab.names(), Vec::<String>::new());
    }
    btrfs::snapshot(lab.site.source(), &lab.site.draft(&lab.volume), Access::ReadOnly).unwrap();
    lab.take(&filter, 0);
    btrfs::snapshot(lab.site.source(), &lab.site.draft(&lab.volume), Access::ReadOnly).unwrap();
    lab.take(&Filter::default(), 1);
    assert_eq!(lab.names(), ["v.20261122T070000Z", "v.20261122T070001Z"]);

    // While it is being made there is no name yet.
    let (done, site) = (AtomicBool::new(false), &lab.site);
    thread::scope(|scope| {
        scope.spawn(|| {
            site.take(&order(&lab.volume, &filter, &NEVER, 0)).unwrap();
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let newest = lab.names().into_iter().rfind(|name| name.ends_with('Z')).unwrap();
            if newest == "v.20261122T070002Z" {
                assert!(!lab.site.dir.join(&newest).join("sub").exists(), "it has its name and is not complete");
            }
        }
    });
}

#[test]
fn what_cannot_be_removed_easily_is_removed_too() {
    let lab = Lab::new();
    let source = lab.source();
    fs::create_dir_all(source.join("keep/x")).unwrap();
    fs::create_dir_all(source.join("x/sub")).unwrap();
    for file in ["keep/x/immutable", "x/sub/immutable", "x/sub/append"] {
        fs::write(source.join(file), "").unwrap();
    }
    symlink("/etc", source.join("x/link")).unwrap();
    symlink("nowhere", source.join("keep/x.lz")).unwrap();
    run(std::process::Command::new("mkfifo").arg(source.join("x/fifo")));
    btrfs::create(&source.join("x/nested")).unwrap();
    btrfs::create(&source.join("keep/nested")).unwrap();
    fs::set_permissions(source.join("x/sub"), Permissions::from_mode(0o000)).unwrap();
    let chattr = |flag: &str, path: &str| run(std::process::Command::new("chattr").arg(flag).arg(source.join(path)));
    chattr("+a", "x/sub/append");
    ["keep/x/immutable", "x/sub/immutable", "keep/x", "x/sub", "x"].iter().for_each(|path| chattr("+i", path));
    let taken = lab.take(&filter(&["x", "*.lz"], None), 0);
    let paths: Vec<PathBuf> = tree(&taken.path).into_keys().collect();
    assert_eq!(paths, ["", "keep", "keep/nested"].map(PathBuf::from));
    ["x", "x/sub", "keep/x", "x/sub/immutable", "keep/x/immutable"].iter().for_each(|path| chattr("-i", path));
}

/// A pattern with what it means, said in another way.
type Meaning = (&'static str, fn(&Path, bool) -> bool);

const MEANINGS: [Meaning; 7] = [
    ("*.lz", |path, _| path.as_os_str().as_bytes().ends_with(b".lz")),
    ("d1/", |path, is_dir| is_dir && path.file_name().unwrap() == "d1"),
    ("/d0/d2", |path, _| path == Path::new("d0/d2")),
    ("d2/*", |path, _| path.parent() == Some(Path::new("d2"))),
    ("**/d0/f*", |path, _| {
        path.parent().and_then(Path::file_name) == Some("d0".as_ref())
            && path.file_name().unwrap().as_bytes()[0] == b'f'
    }),
    ("[!a-z]*", |path, _| !path.file_name().unwrap().as_bytes()[0].is_ascii_lowercase()),
    ("nothing-has-this-name", |_, _| false),
];

/// Makes a random change below `root`: the same with the same seed.
fn change(root: &Path, rng: &mut Rng, unique: usize) {
    let all = tree(root);
    let of_kind = |kind: FileType| {
        let is_kind =
            |(path, stat): (&PathBuf, &Stat)| (FileType::from_raw_mode(stat.st_mode) == kind).then(|| path.clone());
        all.iter().filter_map(is_kind).collect::<Vec<_>>()
    };
    let (dirs, files) = (of_kind(FileType::Directory), of_kind(FileType::RegularFile));
    let dir = root.join(rng.choice(&dirs).unwrap());
    let suffix: &[u8] = rng.choice([&b""[..], b".lz", b".x", b"\xff\n"]).unwrap();
    let first: &[u8] = rng.choice([&b"f"[..], b"\xfe", b"F"]).unwrap();
    let fresh = dir.join(OsStr::from_bytes(&[first, unique.to_string().as_bytes(), suffix].concat()));
    let file = rng.choice(&files).map(|file| root.join(file));
    match (rng.u8(..12), file) {
        (0..2, _) if dir.components().count() < root.components().count() + 4 => {
            let _ = fs::create_dir(dir.join(format!("d{}", rng.u8(..4))));
        }
        (2, Some(file)) => fs::hard_link(file, fresh).unwrap(),
        (3, Some(file)) => {
            let copy = File::create(fresh).unwrap();
            rustix::fs::ioctl_ficlone(copy, File::open(file).unwrap()).unwrap();
        }
        (4 | 5, Some(file)) => fs::rename(file, fresh).unwrap(),
        (6, Some(file)) => fs::remove_file(file).unwrap(),
        (7, Some(file)) => fs::OpenOptions::new().append(true).open(file).unwrap().write_all(&[7; 5000]).unwrap(),
        (8, _) if dir != root => {
            let _ = fs::rename(&dir, root.join(format!("d{}", rng.u8(..4))));
        }
        (9, _) => symlink("nowhere", fresh).unwrap(),
        _ => {
            fs::write(&fresh, vec![rng.u8(..); rng.usize(..20_000)]).unwrap();
            set_mtime(&fresh, rng.u64(..100));
        }
    }
}

#[test]
fn random_trees_are_filtered_as_a_plain_walk_does_it() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let lab = Lab::new();
    for tree_number in 0..20 {
        let mut rng = Rng::with_seed(seed ^ tree_number);
        let source = lab.source();
        let dir = source.join(format!("t{tree_number}"));
        fs::create_dir(&dir).unwrap();
        for cycle in 0..3 {
            // The trees lie in one source, and a change may hit any of them.
            let first = (tree_number as usize * 3 + cycle) * 60;
            (first..first + 60).for_each(|unique| change(&source, &mut rng, unique));
            let meanings: Vec<Meaning> = MEANINGS.into_iter().filter(|_| rng.u8(..3) == 0).collect();
            let patterns: Vec<&str> = meanings.iter().map(|(pattern, _)| *pattern).collect();
            let age = rng.bool().then(|| rng.u64(1..100));
            let what = format!("seed {seed}, tree {tree_number}, cycle {cycle}, {patterns:?}, {age:?}");
            let before = tree(&source);
            let taken = lab.take(&filter(&patterns, age), 0);
            let name_time = taken.snapshot.name.taken().as_second();
            assert!(name_time >= NOW);
            let excluded = |path: &Path, is_dir: bool, stat: &Stat| {
                let old = age.is_some_and(|age| stat.st_mtime < NOW - i64::try_from(age * 86_400).unwrap());
                meanings.iter().any(|(_, means)| means(path, is_dir)) || !is_dir && old
            };
            assert_filtered(&before, &taken.path, excluded, &what);
            assert_filtered(&before, &source, |_, _, _| false, &what);
            btrfs::delete(&taken.path).unwrap();
        }
        if tree_number % 3 == 2 {
            for entry in fs::read_dir(&source).unwrap() {
                let path = entry.unwrap().path();
                let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
            }
        }
    }
}
