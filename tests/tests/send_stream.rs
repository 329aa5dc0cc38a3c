//! What the library says and makes of send streams, against the real kernel and stock `btrfs receive`.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashSet,
    fs,
    ops::Range,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    snapshot::SnapshotId,
    stream::{
        Attr, Canonical, Expectation, Item, Kind, Mark, RootTimes, SegmentHead, SegmentWriter, Total, TotalCounter,
        Validator, Violation, Walker,
    },
};
use snapferry_tests::{
    btrfs, change,
    lab::{Lab, run},
    manifest::{Manifest, View},
    tree,
};
use uuid::Uuid;

const GIB: u64 = 1 << 30;

/// Two snapshots of one tree, the second with every kind of change.
struct Source {
    _lab: Lab,
    dir: PathBuf,
    mirror: PathBuf,
}

impl Source {
    fn new(options: &str) -> Self {
        let lab = Lab::new();
        let (dir, mirror) = (lab.file_system("head", 4 * GIB, options), lab.file_system("mirror", 4 * GIB, "noatime"));
        let live = dir.join("live");
        btrfs::create(&live);
        tree::everything(&live, 1);
        btrfs::snapshot(&live, &dir.join("first"));
        change::everything(&live, 2);
        change::randomly(&live, 3, 200);
        btrfs::snapshot(&live, &dir.join("second"));
        Self { _lab: lab, dir, mirror }
    }

    /// The streams of both snapshots, the second as an increment.
    fn streams(&self, version: u32, data: bool) -> [Vec<u8>; 2] {
        let (first, second) = (self.dir.join("first"), self.dir.join("second"));
        [send(version, data, &[first.as_path()]), send(version, data, &[Path::new("-p"), &first, &second])]
    }
}

fn send(version: u32, data: bool, what: &[&Path]) -> Vec<u8> {
    let mut command = Command::new("btrfs");
    command.args(["-q", "send", "--proto", &version.to_string()]);
    if !data {
        command.arg("--no-data");
    }
    let output = command.args(what).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Calls `each` with every command; the blocks are of an odd size.
fn walk(stream: &[u8], mut each: impl FnMut(Item<'_>) -> Result<(), Violation>) {
    let mut walker = Walker::new();
    for block in stream.chunks(100_003) {
        walker.walk(block, &mut each).unwrap_or_else(|violation| panic!("{}: {violation}", violation.rule()));
    }
    walker.finish().unwrap();
    assert_eq!(walker.position(), stream.len() as u64);
}

/// What the first command of a stream promises.
fn promised(stream: &[u8]) -> Expectation {
    let mut found = None;
    walk(stream, |item| {
        let Item::Command { command, .. } = item else { return Ok(()) };
        if matches!(command.kind(), Kind::Subvol | Kind::Snapshot) {
            let id = |uuid, ctransid| {
                Ok::<_, Violation>(SnapshotId { uuid: command.uuid(uuid)?, ctransid: command.u64(ctransid)? })
            };
            let incremental = command.kind() == Kind::Snapshot;
            found = Some(Expectation {
                name: String::from_utf8(command.path()?.to_vec()).unwrap(),
                id: id(Attr::Uuid, Attr::Ctransid)?,
                base: incremental.then(|| id(Attr::CloneUuid, Attr::CloneCtransid)).transpose()?,
                stream_version: command.version(),
            });
        }
        Ok(())
    });
    found.unwrap()
}

fn judge(stream: &[u8]) {
    let mut validator = Validator::new(promised(stream));
    walk(stream, |item| match item {
        Item::Version(version) => validator.version(version),
        Item::Command { command, .. } => validator.check(&command),
    });
}

/// Every mark of a stream, the end last, and its total.
fn measure(stream: &[u8]) -> (Vec<Mark>, Total) {
    let (mut canonical, mut total, mut marks) = (Canonical::new(), TotalCounter::new(), Vec::new());
    walk(stream, |item| {
        let Item::Command { command, .. } = item else { return Ok(()) };
        total.update(&command)?;
        if canonical.update(&command)? {
            marks.push(canonical.mark());
        }
        Ok(())
    });
    marks.push(canonical.finish());
    (marks, total.finish())
}

/// The segment that holds the commands of a stream with these numbers.
fn segment(stream: &[u8], head: &SegmentHead, numbers: Range<usize>, root_times: Option<&RootTimes>) -> Vec<u8> {
    let (mut bytes, mut number) = (Vec::new(), 0);
    let mut writer = SegmentWriter::begin(promised(stream).stream_version, head, &mut bytes);
    walk(stream, |item| {
        let Item::Command { command, .. } = item else { return Ok(()) };
        if numbers.contains(&number) {
            writer.push(&command, &mut bytes)?;
        }
        number += 1;
        Ok(())
    });
    writer.finish(root_times, &mut bytes);
    bytes
}

/// Receives a stream in `pieces` segments, cut behind marks, and an empty last one. Of the segments only the last one stays.
fn receive(stream: &[u8], pieces: usize, source: &Path, into: &Path) {
    let Expectation { name, id, mut base, .. } = promised(stream);
    let (mut marks, mut number) = (Vec::new(), 0);
    walk(stream, |item| {
        let Item::Command { command, .. } = item else { return Ok(()) };
        number += 1;
        if command.kind() == Kind::Utimes {
            marks.push(number);
        }
        Ok(())
    });
    let mut from = 0;
    for piece in 1..=pieces {
        let to = if piece == pieces { number } else { marks[piece * marks.len() / pieces] };
        let own = SnapshotId { uuid: Uuid::new_v4(), ctransid: id.ctransid };
        let head = SegmentHead { name: format!("{name}.segment-{piece}"), uuid: own.uuid, snapshot: id, origin: base };
        apply(&segment(stream, &head, from..to, None), into);
        if piece > 1 {
            btrfs::delete(&into.join(format!("{name}.segment-{}", piece - 1)));
        }
        (base, from) = (Some(own), to);
    }
    let head = SegmentHead { name: name.clone(), uuid: id.uuid, snapshot: id, origin: base };
    apply(&segment(stream, &head, 0..0, Some(&root_times(source))), into);
    btrfs::delete(&into.join(format!("{name}.segment-{pieces}")));
    assert_eq!(btrfs::show(&into.join(&name))["Received UUID"], id.uuid.to_string());
}

fn apply(segment: &[u8], into: &Path) {
    let file = into.with_extension("stream");
    fs::write(&file, segment).unwrap();
    run(Command::new("btrfs").args(["-q", "receive", "-f"]).arg(&file).arg(into));
    fs::remove_file(&file).unwrap();
}

/// Version 1 cannot punch holes: an increment of it writes zeros there. Everything else is equal.
fn compare(version: u32, source: &Path, replica: &Path) {
    let [expected, found] = [source, replica].map(|tree| Manifest::of(tree, View::Replica));
    let mut differences = expected.differences(&found);
    differences.retain(|line| version > 1 || !line.contains(": data at is "));
    assert!(differences.is_empty(), "{}: {differences:#?}", replica.display());
}

fn root_times(source: &Path) -> RootTimes {
    let meta = fs::metadata(source).unwrap();
    let time = |seconds: i64, nanoseconds: i64| (seconds as u64, nanoseconds as u32);
    RootTimes {
        atime: time(meta.atime(), meta.atime_nsec()),
        mtime: time(meta.mtime(), meta.mtime_nsec()),
        ctime: time(meta.ctime(), meta.ctime_nsec()),
    }
}

#[test]
fn streams_of_the_kernel_are_good_and_their_size_is_known_from_the_metadata() {
    for options in ["noatime", "noatime,compress-force=zstd"] {
        let source = Source::new(options);
        for version in [1, 2] {
            for (with, without) in source.streams(version, true).iter().zip(&source.streams(version, false)) {
                judge(with);
                let (marks, total) = measure(with);
                assert_eq!(total.bytes, with.len() as u64);
                let (marks_without, total_without) = measure(without);
                assert!(without.len() < with.len() && marks.len() > 100);
                assert_eq!(total_without, total, "version {version}, {options}");
                assert!(marks_without == marks, "version {version}, {options}: other marks without data");
            }
        }
        let files = measure(&source.streams(2, false)[0]).1.files;
        assert_eq!(files, regular_files(&source.dir.join("first")));
    }
}

#[test]
fn segments_make_an_equal_replica() {
    let source = Source::new("noatime");
    for version in [1, 2] {
        let streams = source.streams(version, true);
        for pieces in [1, 2, 9] {
            let into = source.mirror.join(format!("{version}-{pieces}"));
            fs::create_dir(&into).unwrap();
            for (stream, name) in streams.iter().zip(["first", "second"]) {
                let snapshot = source.dir.join(name);
                receive(stream, pieces, &snapshot, &into);
                compare(version, &snapshot, &into.join(name));
            }
            // The same uuid twice would leave the choice of a base to chance.
            for name in ["second", "first"] {
                btrfs::delete(&into.join(name));
            }
        }
    }
}

/// Regular files below a directory, each counted once by whatever number of names.
fn regular_files(root: &Path) -> u64 {
    let inodes = run(Command::new("find").arg(root).args(["-type", "f", "-printf", "%i\\n"]));
    inodes.lines().collect::<HashSet<_>>().len() as u64
}
