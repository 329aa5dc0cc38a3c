//! The calls, on a real file system.

use std::{
    fs,
    io::Read,
    ops::ControlFlow,
    os::unix::fs::symlink,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use rustix::io::Errno;

use super::*;
use crate::{
    snapshot::{SnapshotId, VolumeName},
    testing::{SMALL, TestFs, run},
};

fn volume() -> VolumeName {
    "v".parse().unwrap()
}

fn open(path: &Path) -> Subvolume {
    Subvolume::open(path).unwrap()
}

#[test]
fn only_the_root_of_a_subvolume_is_one() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    fs::create_dir(source.join("dir")).unwrap();
    symlink(&source, fs.path().join("link")).unwrap();
    assert!(is_btrfs(&source).unwrap() && is_btrfs(&source.join("dir")).unwrap());
    assert!(!is_btrfs(Path::new("/proc")).unwrap());
    assert!(is_subvolume(&source).unwrap());
    assert!(is_subvolume(fs.path()).unwrap());
    assert!(!is_subvolume(&source.join("dir")).unwrap());
    assert!(!is_subvolume(Path::new("/proc")).unwrap());
    assert!(matches!(Subvolume::open(Path::new("/proc")), Err(BtrfsError::NotBtrfs(_))));
    let link = Subvolume::open(&fs.path().join("link")).unwrap_err();
    assert!(matches!(link.errno(), Some(Errno::NOTDIR | Errno::LOOP)), "{link}");
    assert_eq!(file_system(&source).unwrap(), file_system(fs.path()).unwrap());
}

#[test]
fn what_the_kernel_says_is_what_the_btrfs_program_prints() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    fs::write(source.join("file"), "x").unwrap();
    let path = fs.path().join("snapshot");
    snapshot(&open(&source), &path, Access::ReadOnly).unwrap();
    let info = open(&path).info().unwrap();
    let output = Command::new("btrfs").args(["subvolume", "show"]).arg(&path).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let printed = |label: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(label)).unwrap();
        line.split_once(':').unwrap().1.trim().to_owned()
    };
    assert_eq!(printed("UUID"), info.uuid.to_string());
    assert_eq!(printed("Parent UUID"), info.parent_uuid.unwrap().to_string());
    assert_eq!((printed("Received UUID").as_str(), info.received_uuid), ("-", None));
    assert_eq!(printed("Subvolume ID"), info.tree_id.to_string());
    assert_eq!(printed("Gen at creation"), info.otransid.to_string());
    assert_eq!(printed("Generation"), info.generation.to_string());
    assert_eq!(printed("Flags"), "readonly");
    assert!(info.read_only);
    assert_eq!(info.parent_uuid, Some(open(&source).info().unwrap().uuid));
    assert_eq!(info.stream_id(), SnapshotId { uuid: info.uuid, ctransid: info.ctransid });
}

#[test]
fn a_snapshot_is_taken_written_to_and_deleted_as_asked() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    fs::write(source.join("file"), "before").unwrap();
    let (fixed, open_one) = (fs.path().join("fixed"), fs.path().join("open"));
    snapshot(&open(&source), &fixed, Access::ReadOnly).unwrap();
    snapshot(&open(&source), &open_one, Access::Writable).unwrap();
    let again = snapshot(&open(&source), &fixed, Access::ReadOnly).unwrap_err();
    assert_eq!(again.errno(), Some(Errno::EXIST), "{again}");
    assert!(again.to_string().contains("fixed"), "{again}");
    fs::write(source.join("file"), "after").unwrap();
    assert_eq!(fs::read_to_string(fixed.join("file")).unwrap(), "before");
    assert!(fs::write(fixed.join("file"), "x").is_err());
    fs::write(open_one.join("file"), "x").unwrap();

    let subvolume = open(&open_one);
    subvolume.set_read_only(true).unwrap();
    assert!(subvolume.info().unwrap().read_only);
    assert!(fs::write(open_one.join("file"), "y").is_err());
    subvolume.set_read_only(false).unwrap();
    assert!(!subvolume.info().unwrap().read_only);

    delete(&fixed).unwrap();
    assert!(!fixed.exists());
    assert_eq!(delete(&fixed).unwrap_err().errno(), Some(Errno::NOENT));
    assert!(matches!(delete(Path::new("/")), Err(BtrfsError::NoName(_))));
    assert!(delete(&source.join("file")).is_err(), "a file was deleted as if it were a subvolume");
    assert!(source.join("file").exists());
}

#[test]
fn a_deleted_snapshot_is_gone_once_the_cleaner_was_there() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    fs::write(source.join("file"), vec![1; 1 << 20]).unwrap();
    let path = fs.path().join("snapshot");
    snapshot(&open(&source), &path, Access::ReadOnly).unwrap();
    let tree_id = open(&path).info().unwrap().tree_id;
    assert!(!is_gone(fs.path(), tree_id).unwrap());
    delete(&path).unwrap();
    let commit = start_sync(fs.path()).unwrap();
    wait_sync(fs.path(), commit).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_gone(fs.path(), tree_id).unwrap() {
        assert!(Instant::now() < deadline, "the cleaner did not come");
        sync(fs.path()).unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn nested_subvolumes_are_found_wherever_they_are() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    assert_eq!(open(&source).nested().unwrap(), Vec::<PathBuf>::new());
    fs::create_dir_all(source.join("a/b")).unwrap();
    // Enough that the kernel answers in several batches of 4 KiB.
    let mut expected: Vec<PathBuf> = (0..100).map(|i| PathBuf::from(format!("a/b/{}-{i}", "n".repeat(60)))).collect();
    expected.push("at the root".into());
    expected.iter().for_each(|path| create(&source.join(path)).unwrap());
    // Not ours: inside one of them.
    create(&source.join("at the root/deeper")).unwrap();
    let mut nested = open(&source).nested().unwrap();
    nested.sort();
    expected.sort();
    assert_eq!(nested, expected);
}

#[test]
fn quota_groups_are_seen() {
    let fs = TestFs::new(SMALL);
    assert!(!has_qgroups(fs.path()).unwrap());
    run(Command::new("btrfs").args(["quota", "enable"]).arg(fs.path()));
    assert!(has_qgroups(fs.path()).unwrap());
    run(Command::new("btrfs").args(["quota", "disable"]).arg(fs.path()));
    assert!(!has_qgroups(fs.path()).unwrap());
}

#[test]
fn snapshots_are_listed_newest_first_and_nothing_else_is() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    let take = |name: &str, access| {
        snapshot(&open(&source), &fs.path().join(name), access).unwrap();
    };
    // The clock ran backwards between the first two; nothing was written between the last two.
    fs::write(source.join("1"), "1").unwrap();
    take("v.20300101T000000Z", Access::ReadOnly);
    sync(fs.path()).unwrap();
    fs::write(source.join("2"), "2").unwrap();
    take("v.20260101T000000Z", Access::ReadOnly);
    take("v.20260101T000001Z", Access::ReadOnly);
    take("v.20260101T000002Z", Access::Writable);
    take("w.20260101T000003Z", Access::ReadOnly);
    take("v.20260101T000004Z.segment-1", Access::ReadOnly);
    fs::create_dir(fs.path().join("v.20260101T000005Z")).unwrap();
    fs::write(fs.path().join("v.20260101T000006Z"), "").unwrap();
    symlink("v.20300101T000000Z", fs.path().join("v.20260101T000007Z")).unwrap();

    let found = snapshots(fs.path(), &volume()).unwrap();
    let names: Vec<String> = found.iter().map(|found| found.snapshot.name.to_string()).collect();
    assert_eq!(names, ["v.20260101T000001Z", "v.20260101T000000Z", "v.20300101T000000Z"]);
    let transactions: Vec<u64> = found.iter().map(|found| found.snapshot.id.ctransid).collect();
    assert_eq!(transactions[0], transactions[1], "an unchanged source has an unchanged ctransid");
    assert!(transactions[1] > transactions[2]);
    assert_eq!(found[0].path, fs.path().join(&names[0]));
}

#[test]
fn a_stream_carries_the_identity_that_we_say_it_does_and_a_received_one_keeps_it() {
    let (here, there) = (TestFs::new(SMALL), TestFs::new(SMALL));
    let source = here.subvolume("source");
    fs::write(source.join("file"), "content").unwrap();
    let path = here.path().join("v.20260101T000000Z");
    snapshot(&open(&source), &path, Access::ReadOnly).unwrap();
    let sent = open(&path);
    let id = sent.info().unwrap().stream_id();

    let options = SendOptions { base: None, version: stream_version().unwrap(), sending: Sending::All };
    let stream = read_stream(&sent, options).unwrap();
    assert_eq!(&stream[..13], b"btrfs-stream\0");
    assert_eq!(u32::from_le_bytes(stream[13..17].try_into().unwrap()), options.version);
    let (uuid, ctransid) = (id.uuid.into_bytes(), id.ctransid.to_le_bytes());
    let head = &stream[17..200];
    assert!(head.windows(16).any(|w| w == uuid) && head.windows(8).any(|w| w == ctransid));

    let file = there.path().join("stream");
    // So that the transactions of the two file systems do not happen to be the same.
    for round in 0..20 {
        fs::write(&file, round.to_string()).unwrap();
        sync(there.path()).unwrap();
    }
    fs::write(&file, &stream).unwrap();
    run(Command::new("btrfs").args(["receive", "-q", "-f"]).arg(&file).arg(there.path()));
    let received = open(&there.path().join("v.20260101T000000Z")).info().unwrap();
    assert_eq!(received.received_id(), Some(id));
    assert_ne!(received.ctransid, received.stransid);

    let marked = there.subvolume("marked");
    assert_eq!(open(&marked).info().unwrap().received_id(), None);
    mark_received(&open(&marked), id).unwrap();
    assert_eq!(open(&marked).info().unwrap().received_id(), Some(id));
    // Sent on, it keeps the identity of its origin, but for the transaction.
    let on = open(&marked).info().unwrap();
    assert_eq!(on.stream_id(), SnapshotId { uuid: id.uuid, ctransid: on.ctransid });
}

#[test]
fn a_send_that_cannot_be_says_why() {
    let fs = TestFs::new(SMALL);
    let source = fs.subvolume("source");
    fs::write(source.join("file"), vec![7; 4 << 20]).unwrap();
    let path = fs.path().join("snapshot");
    snapshot(&open(&source), &path, Access::ReadOnly).unwrap();
    let options = SendOptions { base: None, version: 1, sending: Sending::All };
    let errno = |result: io::Result<Vec<u8>>| Errno::from_io_error(&result.unwrap_err());
    assert_eq!(errno(read_stream(&open(&source), options)), Some(Errno::PERM), "a writable subvolume was sent");
    let future = SendOptions { version: 99, ..options };
    assert_eq!(errno(read_stream(&open(&path), future)), Some(Errno::PROTO));
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let gone = send(open(&path).as_fd(), writer, options);
    assert_eq!(Errno::from_io_error(&gone.unwrap_err()), Some(Errno::PIPE));
    let all = read_stream(&open(&path), options).unwrap().len();
    let without = read_stream(&open(&path), SendOptions { sending: Sending::NoFileData, ..options }).unwrap().len();
    assert!(all > 4 << 20 && without < 4096, "{all} {without}");
}

#[test]
fn space_is_counted() {
    let fs = TestFs::new(SMALL);
    let before = space(fs.path()).unwrap();
    assert_eq!(before.total, SMALL);
    assert!(before.free > 0 && before.free < SMALL, "{before:?}");
    assert!(before.unallocated > 0 && before.unallocated < SMALL, "{before:?}");
    assert!(before.data.total > 0 && before.data.used < before.data.total, "{before:?}");
    assert!(before.metadata.used > 0 && before.metadata.used < before.metadata.total, "{before:?}");
    assert!(before.set_aside > 0 && before.set_aside < before.metadata.total && !before.mixed, "{before:?}");
    assert_eq!((before.node_bytes, before.sector_bytes, before.checksum_bytes), (16_384, 4096, 4));
    // What is allocated is what the chunks take, with the small ones of the system itself.
    let allocated = before.data.cost.raw(before.data.total) + before.metadata.cost.raw(before.metadata.total);
    let rest = SMALL - before.unallocated - allocated;
    assert!(rest < 32 << 20, "{before:?}");

    fs::write(fs.path().join("file"), vec![7; 10 << 20]).unwrap();
    sync(fs.path()).unwrap();
    let after = space(fs.path()).unwrap();
    assert_eq!(after.data.used - before.data.used, 10 << 20);
    assert_eq!(before.free - after.free, 10 << 20);
}

#[test]
fn space_of_mixed_chunks_is_counted_once() {
    let fs = TestFs::with_options(SMALL, &["--mixed"], "noatime");
    let space = space(fs.path()).unwrap();
    assert!(space.mixed && space.data.used > 0 && space.metadata.total == 0, "{space:?}");
}

#[test]
fn extents_that_are_shared_have_one_address() {
    let fs = TestFs::new(SMALL);
    let path = fs.subvolume("v");
    fs::write(path.join("large"), vec![1; 3 << 20]).unwrap();
    fs::write(path.join("small"), "in the tree itself").unwrap();
    File::create(path.join("hole")).unwrap().set_len(1 << 20).unwrap();
    let cloned = Command::new("cp").arg("--reflink=always").args([path.join("large"), path.join("clone")]).status();
    assert!(cloned.unwrap().success());
    for i in 0..3000 {
        fs::write(path.join(format!("f{i}")), vec![2; 5000]).unwrap();
    }
    sync(fs.path()).unwrap();
    let subvolume = open(&path);
    let mut all = Vec::new();
    let walked = extents(&subvolume, |extent| {
        all.push(extent);
        ControlFlow::<()>::Continue(())
    });
    assert_eq!(walked.unwrap(), ControlFlow::Continue(()));
    let bytes = |all: &[Extent]| all.iter().map(|extent| extent.length).sum::<u64>();
    assert_eq!(bytes(&all), 2 * (3 << 20) + 3000 * 8192);
    all.sort();
    all.dedup();
    assert_eq!(bytes(&all), (3 << 20) + 3000 * 8192);
    assert_eq!(space(fs.path()).unwrap().data.used, bytes(&all));
    assert_eq!(extents(&subvolume, ControlFlow::Break).unwrap(), ControlFlow::Break(all[0]));
}

#[test]
fn what_is_deleted_is_told_until_it_is_gone() {
    let fs = TestFs::new(SMALL);
    let path = fs.subvolume("v");
    for i in 0..2000 {
        fs::write(path.join(format!("f{i}")), vec![1; 5000]).unwrap();
    }
    sync(fs.path()).unwrap();
    let tree = open(&path).info().unwrap().tree_id;
    assert!(being_deleted(fs.path()).unwrap().is_empty());
    delete(&path).unwrap();
    assert_eq!(being_deleted(fs.path()).unwrap(), [tree]);
    let begun = Instant::now();
    while !being_deleted(fs.path()).unwrap().is_empty() {
        start_cleaner(fs.path()).unwrap();
        assert!(begun.elapsed().as_secs() < 20, "the cleaner was not set to work");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(is_gone(fs.path(), tree).unwrap());
    sync(fs.path()).unwrap();
    assert_eq!(space(fs.path()).unwrap().data.used, 0);
}

fn read_stream(subvolume: &Subvolume, options: SendOptions) -> io::Result<Vec<u8>> {
    let (reader, writer) = rustix::pipe::pipe()?;
    let fd = subvolume.as_fd().try_clone_to_owned()?;
    let sender = std::thread::spawn(move || send(fd.as_fd(), writer, options));
    let mut stream = Vec::new();
    File::from(reader).read_to_end(&mut stream)?;
    sender.join().unwrap().map(|()| stream)
}
