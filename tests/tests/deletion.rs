//! Deletions that take their time: said, and in nobody's way.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};

use snapferry_tests::{
    btrfs,
    config::Settings,
    nar,
    pair::{Disks, Pair, name},
    wait,
};

#[test]
fn a_deletion_that_does_not_end_is_named_and_blocks_nothing() {
    let settings = Settings { sender_keeps: 1, receiver_keeps: 1, interval: "1s".to_owned(), ..Settings::default() };
    let pair = Pair::with(&settings, Disks::default());
    let receiver = pair.start_receiver();
    fs::write(pair.places.source.join("file"), "x").unwrap();
    nar::grow(&pair.places.source, 100_000, 1).unwrap();
    pair.ferry();
    // As long as a file is open, btrfs does not begin to free its snapshot.
    let (ours, theirs) = (pair.snapshots().remove(0), pair.replicas().remove(0));
    let inside = [&ours, &theirs].map(|snapshot| File::open(snapshot.join("file")).unwrap());
    let sender = pair.sender(&["run"]);
    for (agent, snapshot) in [(&sender, name(&ours)), (&receiver, name(&theirs))] {
        agent.wait_where("pruned", |event| event.text("snapshot") == snapshot);
        let waiting = agent.wait_where("waiting for the cleaner", |event| event.text("snapshot") == snapshot);
        assert!(waiting.count("deletions") >= 1 && waiting.count("free") > 0, "{waiting:?}");
    }
    // Cycles go on meanwhile, and others are pruned.
    let cycles = sender.log().all("cycle finished").len();
    wait::until("two more cycles", || (sender.log().all("cycle finished").len() > cycles + 1).then_some(()));
    drop(inside);
    let gone = receiver.wait_for("deleted snapshots are gone from disk");
    assert!(gone.count("snapshots") >= 1, "{gone:?}");
    sender.wait_for("deleted snapshots are gone from disk");
    sender.stop().0.expect(0);
    receiver.stop().0.expect(0);
}

#[test]
fn what_is_nested_and_quotas_are_said_once() {
    let settings = Settings { interval: "1s".to_owned(), ..Settings::default() };
    let pair = Pair::with(&settings, Disks::default());
    let _receiver = pair.start_receiver();
    btrfs::create(&pair.places.source.join("nested"));
    let sender = pair.sender(&["run"]);
    sender.wait_for("nested subvolumes");
    wait::until("three cycles", || (sender.log().all("snapshot taken").len() > 2).then_some(()));
    assert_eq!(sender.log().all("nested subvolumes").len(), 1, "once a start");
    sender.stop().0.expect(0);
}
