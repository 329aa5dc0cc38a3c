//! Too little room on the mirror box: what does not fit is refused with figures, what runs out of room fails cleanly, what is published
//! stays as it is, and everything goes on by itself when room appears.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::FallocateFlags;
use snapferry_tests::{
    agent::Agent,
    btrfs,
    config::Settings,
    event::Event,
    manifest::{Manifest, View, assert_copy},
    nar,
    pair::{Disks, Pair, name},
    rsync, wait,
};

const MB: u64 = 1_000_000;
const MIB: u64 = 1 << 20;

/// Small enough to be filled, large enough that a few chunks of either kind have room.
const DISKS: Disks = Disks { bytes: 768 * MIB, head: "noatime", mirror: "noatime" };

/// A pair whose sender comes back every second or two, and whose transfers make checkpoints often.
fn settings() -> Settings {
    Settings {
        interval: "2s".to_owned(),
        checkpoint: Some("4MiB".to_owned()),
        reserve: Some("16MiB".to_owned()),
        ..Settings::default()
    }
}

/// A pair that has published a first snapshot of a few megabytes.
fn published_pair(settings: &Settings) -> (Pair, Agent) {
    let pair = Pair::with(settings, DISKS);
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 5 * MB, 1).unwrap();
    pair.ferry();
    pair.assert_arrived();
    (pair, receiver)
}

/// The file system of the mirror box.
fn disk(pair: &Pair) -> &Path {
    pair.places.store.parent().unwrap()
}

fn free(pair: &Pair) -> u64 {
    let figures = rustix::fs::statvfs(disk(pair)).unwrap();
    figures.f_bavail * figures.f_frsize
}

/// Somebody else writes to the mirror box, until about so much is free there. Returns what to delete for room to appear.
fn fill(pair: &Pair, leave: u64) -> PathBuf {
    let dir = disk(pair).join("somebody else's");
    fs::create_dir(&dir).unwrap();
    let (mut pieces, mut piece) = (Vec::new(), 4 * MIB);
    while piece >= 4096 {
        if free(pair) < leave + piece {
            piece /= 2;
            continue;
        }
        let path = dir.join(format!("piece{}", pieces.len()));
        match File::create(&path).and_then(|file| Ok(rustix::fs::fallocate(file, FallocateFlags::empty(), 0, piece)?)) {
            Ok(()) => pieces.push(path),
            Err(error) if error.kind() == io::ErrorKind::StorageFull => piece /= 2,
            Err(error) => panic!("{error}"),
        }
        btrfs::sync(disk(pair));
    }
    // On the way the kernel has taken chunks for other things, too.
    while free(pair) < leave
        && let Some(last) = pieces.pop()
    {
        fs::remove_file(last).unwrap();
        btrfs::sync(disk(pair));
    }
    dir
}

/// What is published is exactly that snapshot: locally, and for a client.
fn assert_still_published(pair: &Pair, snapshot: &Path, copy: &str) {
    assert_eq!(pair.published(), Some(name(snapshot)));
    assert_copy(snapshot, &pair.live());
    let copy = pair.lab.path().join(copy);
    rsync::copy(&pair.head, &pair.url(), &copy);
    assert_copy(snapshot, &copy);
}

/// Waits for so many refusals for want of room; returns the last one.
fn wait_for_refusals(sender: &Agent, count: usize) -> Event {
    let what = format!("{count} times no room");
    let mut all = wait::until(&what, || {
        let all = sender.log().all("no room on the receiver");
        (all.len() >= count).then_some(all)
    });
    all.pop().unwrap()
}

/// The agents recover without anybody's help; then they are as they ever were.
fn recovers(pair: &Pair, sender: Agent) {
    sender.wait_for("cycle finished");
    let (ended, _) = sender.stop();
    ended.expect(0);
    pair.ferry();
    pair.assert_arrived();
    pair.assert_no_leftovers();
    assert_eq!(nar::broken(&pair.live()), Vec::<PathBuf>::new());
}

#[test]
fn what_does_not_fit_is_refused_with_figures_until_room_appears() {
    let (pair, receiver) = published_pair(&settings());
    let first = pair.newest();
    let others = fill(&pair, 60 * MIB);
    nar::grow(&pair.places.source, 90 * MB, 2).unwrap();

    let sender = pair.sender(&["run"]);
    let refused = wait_for_refusals(&sender, 3);
    let (need, have) = (refused.count("need"), refused.count("have"));
    assert!((90 * MB..110 * MB).contains(&need), "{refused:?}");
    assert!(have <= 50 * MIB && have > 20 * MIB, "60 MiB free, 16 of them reserved: {refused:?}");
    let said = refused.text("error");
    for part in ["needs", "kept in reserve", &name(&first), "alone (", "published"] {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    assert!(refused.number("retry") >= 0.9, "not every moment: {refused:?}");
    let here = receiver.log().all("offer refused").pop().unwrap();
    assert!(here.count("need") >= 90 * MB && here.text("error").contains("no room for"), "{here:?}");
    assert_eq!(receiver.log().all("transfer started").len(), 1, "nothing was begun");
    assert!(pair.snapshots().contains(&first), "the base stays");
    assert_still_published(&pair, &first, "copy");
    assert_eq!(pair.replicas().len(), 1);

    fs::remove_dir_all(others).unwrap();
    recovers(&pair, sender);
}

#[test]
fn a_first_transfer_is_ended_when_its_total_comes() {
    let pair = Pair::with(&settings(), DISKS);
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 150 * MB, 1).unwrap();
    let others = fill(&pair, 100 * MIB);
    // Slow enough that it is under way when the total comes.
    pair.head.limit_rate(50);
    let sender = pair.sender(&["run"]);
    let refused = wait_for_refusals(&sender, 2);
    assert!(refused.count("need") > 100 * MB && refused.count("have") < 100 * MIB, "{refused:?}");
    let failed = receiver.log().all("transfer failed");
    assert!(!failed.is_empty() && failed[0].count("need") > 100 * MB, "{failed:?}");
    assert_eq!(pair.published(), None);
    assert!(free(&pair) > 16 * MIB, "the reserve was kept");

    pair.head.unlimit_rate();
    fs::remove_dir_all(others).unwrap();
    recovers(&pair, sender);
}

#[test]
fn a_first_transfer_that_found_no_room_is_not_begun_to_find_none_again() {
    let pair = Pair::with(&Settings { level: Some("debug".to_owned()), ..settings() }, DISKS);
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 100 * MB, 1).unwrap();
    let sender = under_way(&pair, &receiver);
    let others = fill(&pair, 0);
    wait_for_refusals(&sender, 4);
    // Once as an unfinished one: from then on its total is known.
    assert_eq!(receiver.log().all("transfer started").len(), 1, "{}", receiver.log().as_text());
    assert_eq!(pair.published(), None);

    pair.head.unlimit_rate();
    fs::remove_dir_all(others).unwrap();
    assert!(receiver.wait_where("transfer started", |event| event.has("durable")).count("total") > 100 * MB);
    recovers(&pair, sender);
}

/// Starts a transfer, and lets it come so far that there is a checkpoint.
fn under_way(pair: &Pair, receiver: &Agent) -> Agent {
    pair.head.limit_rate(60);
    let sender = pair.sender(&["run"]);
    receiver.wait_where("checkpoint", |event| event.count("bytes") > 0);
    sender
}

#[test]
fn a_disk_that_others_fill_to_the_brim_ends_a_transfer_and_nothing_else() {
    let (pair, receiver) = published_pair(&Settings { level: Some("debug".to_owned()), ..settings() });
    let first = pair.newest();
    nar::grow(&pair.places.source, 90 * MB, 2).unwrap();
    let sender = under_way(&pair, &receiver);
    let others = fill(&pair, 0);

    let refused = wait_for_refusals(&sender, 1);
    assert!(refused.text("error").contains("ran full"), "{refused:?}");
    assert!(refused.count("need") > 0, "{refused:?}");
    assert!(receiver.log().all("transfer failed").pop().unwrap().text("error").contains("No space left"));
    wait_for_refusals(&sender, 3);
    assert_still_published(&pair, &first, "copy");
    assert!(fs::write(disk(&pair).join("one more"), vec![1; 64 << 20]).is_err(), "it is full indeed");

    pair.head.unlimit_rate();
    fs::remove_dir_all(others).unwrap();
    let _ = fs::remove_file(disk(&pair).join("one more"));
    let resumed = sender.wait_where("transfer started", |event| event.text("base").starts_with(&name(&first)));
    assert!(resumed.has("total"), "{resumed:?}");
    // What was there was not sent again.
    let accepted = receiver.wait_where("transfer started", |event| event.has("durable"));
    assert!(accepted.count("durable") >= 4 * MIB, "{accepted:?}");
    recovers(&pair, sender);
}

/// Many small files: nearly all of it is metadata.
fn grow_small(source: &Path, files: usize, round: u32) {
    let dir = source.join(format!("small{round}"));
    fs::create_dir(&dir).unwrap();
    let mut rng = fastrand::Rng::with_seed(round.into());
    for i in 0..files {
        let mut data = vec![0; rng.usize(200..2000)];
        rng.fill(&mut data);
        fs::write(dir.join(format!("a file with a name of some length {i}")), data).unwrap();
    }
}

/// Somebody else writes small files until there is no room for the metadata of one more.
fn fill_metadata(pair: &Pair) -> PathBuf {
    let dir = disk(pair).join("somebody else's files");
    fs::create_dir(&dir).unwrap();
    let mut written = 0;
    loop {
        match fs::write(dir.join(format!("file{written}")), [1; 2000]) {
            Ok(()) => written += 1,
            Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert!(written > 1000);
    btrfs::sync(disk(pair));
    dir
}

#[test]
fn a_disk_without_room_for_metadata_is_not_begun_on() {
    let (pair, receiver) = published_pair(&settings());
    let first = pair.newest();
    // Chunks of data take all that is unallocated; in them there is room.
    let others = fill(&pair, 0);
    for piece in fs::read_dir(&others).unwrap().map(|entry| entry.unwrap().path()).step_by(2) {
        fs::remove_file(piece).unwrap();
    }
    btrfs::sync(disk(&pair));
    assert!(free(&pair) > 100 * MIB);
    let small = fill_metadata(&pair);
    nar::grow(&pair.places.source, MB, 2).unwrap();
    grow_small(&pair.places.source, 2000, 2);

    let sender = pair.sender(&["run"]);
    let refused = wait_for_refusals(&sender, 3);
    assert!(refused.text("error").contains("for metadata"), "{refused:?}");
    assert!(refused.text("error").contains("btrfs balance"), "{refused:?}");
    assert_eq!(receiver.log().all("transfer started").len(), 1, "nothing was begun");
    assert_still_published(&pair, &first, "copy");

    fs::remove_dir_all(small).unwrap();
    fs::remove_dir_all(others).unwrap();
    recovers(&pair, sender);
}

#[test]
fn a_disk_that_runs_out_of_metadata_ends_a_transfer_and_nothing_else() {
    let (pair, receiver) = published_pair(&Settings { level: Some("debug".to_owned()), ..settings() });
    let first = pair.newest();
    grow_small(&pair.places.source, 50_000, 2);
    let sender = under_way(&pair, &receiver);
    let others = fill(&pair, 0);

    let refused = wait_for_refusals(&sender, 1);
    assert!(refused.text("error").contains("ran full"), "{refused:?}");
    wait_for_refusals(&sender, 2);
    assert_still_published(&pair, &first, "copy");

    pair.head.unlimit_rate();
    fs::remove_dir_all(others).unwrap();
    recovers(&pair, sender);
}

/// Makes the source one file of so many bytes.
fn replace(source: &Path, bytes: u64, round: u64) {
    for entry in fs::read_dir(source).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    add(source, bytes, round);
}

fn add(source: &Path, bytes: u64, round: u64) {
    let mut data = vec![0; usize::try_from(bytes).unwrap()];
    fastrand::Rng::with_seed(round).fill(&mut data);
    fs::write(source.join(format!("file{round}")), data).unwrap();
}

#[test]
fn what_is_being_deleted_is_waited_for() {
    let settings = Settings { sender_keeps: 1, receiver_keeps: 1, ..settings() };
    let pair = Pair::with(&settings, DISKS);
    let receiver = pair.start_receiver();
    let _others = fill(&pair, 180 * MIB);
    // Two of them fit, three do not; each is gone from the source with the next.
    for round in 0..5 {
        replace(&pair.places.source, 60 * MB, round);
        pair.ferry();
        pair.assert_arrived();
    }
    assert!(!receiver.log().all("there is room now").is_empty(), "{}", receiver.log().as_text());
    assert!(!receiver.log().all("waiting for the cleaner").is_empty());
}

#[test]
fn a_client_in_a_former_snapshot_is_named_and_not_cut_off() {
    let settings = Settings { sender_keeps: 1, receiver_keeps: 1, ..settings() };
    let pair = Pair::with(&settings, DISKS);
    let receiver = pair.start_receiver();
    let source = &pair.places.source;
    let _others = fill(&pair, 180 * MIB);
    replace(source, 60 * MB, 1);
    pair.ferry();
    let first = pair.newest();
    let expected = Manifest::of(&first, View::Client);
    let mut slow = rsync::Client::start(&pair.head, &pair.url(), &pair.lab.path().join("slow"), 5000);
    slow.wait_until_half_way(1);
    replace(source, 60 * MB, 2);
    pair.ferry();
    replace(source, 60 * MB, 3);
    let sender = pair.sender(&["run"]);
    let refused = wait_for_refusals(&sender, 1);
    let said = refused.text("error");
    assert!(said.contains(&name(&first)) && said.contains("has clients"), "{said}");
    assert!(slow.is_running());
    let copy = slow.copy.clone();
    slow.finish(Duration::from_secs(60));
    expected.assert_equal(&Manifest::of(&copy, View::Client), "the slow client's copy");
    sender.wait_for("cycle finished");
    sender.stop().0.expect(0);
    assert!(!receiver.log().all("last client has left").is_empty());
    pair.assert_no_leftovers();
}

#[test]
fn a_volume_takes_no_more_than_its_max_size() {
    let settings = Settings { sender_keeps: 1, receiver_keeps: 1, max_size: Some("100MB".to_owned()), ..settings() };
    let pair = Pair::with(&settings, DISKS);
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    // On the same file system there may be more: it is not the volume's.
    fs::write(disk(&pair).join("somebody else's"), vec![1; 120 << 20]).unwrap();
    add(source, 60 * MB, 1);
    pair.ferry();
    add(source, 30 * MB, 2);
    pair.ferry();
    pair.assert_arrived();
    let published = pair.newest();

    add(source, 30 * MB, 3);
    let ended = pair.run_once().expect(1);
    let refused = ended.log.only("no room on the receiver");
    assert!(refused.count("need") >= 30 * MB && refused.count("need") < 31 * MB, "{refused:?}");
    assert!(refused.count("have") <= 10 * MB && refused.count("have") > 9 * MB, "{refused:?}");
    assert!(refused.text("error").contains("max_size"), "{refused:?}");
    assert_eq!(pair.published(), Some(name(&published)));

    // What only deletes always fits, and makes room.
    fs::remove_file(source.join("file1")).unwrap();
    fs::remove_file(source.join("file3")).unwrap();
    pair.ferry();
    add(source, 60 * MB, 4);
    pair.ferry();
    pair.assert_arrived();
}

#[test]
fn a_first_transfer_is_no_exception_from_max_size() {
    let pair = Pair::with(&Settings { max_size: Some("50MB".to_owned()), ..settings() }, DISKS);
    let receiver = pair.start_receiver();
    add(&pair.places.source, 60 * MB, 1);
    // Whatever is faster: the transfer is not over before its total was judged.
    for _ in 0..2 {
        let refused = pair.run_once().expect(1).log.only("no room on the receiver");
        assert!(refused.text("error").contains("of max_size") && refused.count("need") >= 60 * MB, "{refused:?}");
        assert_eq!(pair.published(), None);
    }
    receiver.stop().0.expect(0);
    let _receiver = {
        pair.configure(&Settings { max_size: Some("70MB".to_owned()), ..settings() });
        pair.start_receiver()
    };
    pair.ferry();
    pair.ferry();
    pair.assert_arrived();
}

#[test]
fn check_says_what_room_there_is() {
    let pair = Pair::with(&Settings { max_size: Some("50MiB".to_owned()), ..settings() }, DISKS);
    fs::create_dir_all(&pair.places.store).unwrap();
    let checked = pair.receiver(&["check"]).wait().expect(0);
    let checked = checked.expect_said("room for 50.0 MiB of data").expect_said("16.0 MiB kept in reserve");
    let _ = checked.expect_said("max_size 50.0 MiB");
    let _others = fill(&pair, 8 * MIB);
    pair.receiver(&["check"]).wait().expect_said("room for 0 B of data").expect_said("warning");
}
