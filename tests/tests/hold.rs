//! Holds, roll-backs and pins, as an operator and a sender meet them.

#![allow(clippy::unwrap_used)]

use std::fs;

use snapferry_tests::{
    config::Settings,
    nar,
    pair::{Disks, Pair, name},
};

/// Grows the source and ferries it; returns the name of the snapshot.
fn ferry(pair: &Pair, round: u64) -> String {
    nar::grow(&pair.places.source, 100_000, round).unwrap();
    pair.ferry();
    name(&pair.newest())
}

/// The line of `snapshots` about this one.
fn listed(pair: &Pair, snapshot: &str) -> String {
    let list = pair.receiver(&["snapshots"]).wait().expect(0).stdout;
    list.lines().find(|line| line.trim_start().starts_with(snapshot)).unwrap_or_default().to_owned()
}

#[test]
fn what_is_held_outlives_retention_and_restarts() {
    let settings = Settings { receiver_keeps: 1, ..Settings::default() };
    let pair = Pair::with(&settings, Disks::default());
    let receiver = pair.start_receiver();
    let first = ferry(&pair, 1);
    pair.receiver(&["hold", &first, "--why", "the one with the fix"]).wait().expect(0).expect_said(&first);
    receiver.wait_for("held");
    receiver.stop().0.expect(0);

    let receiver = pair.start_receiver();
    let second = ferry(&pair, 2);
    let third = ferry(&pair, 3);
    receiver.wait_where("pruned", |event| event.text("snapshot") == second);
    assert_eq!(pair.replicas().iter().map(|path| name(path)).collect::<Vec<_>>(), [first.clone(), third]);
    assert!(listed(&pair, &first).ends_with("held: the one with the fix"), "{}", listed(&pair, &first));
    let table = pair.receiver(&["prune", "--dry-run"]).wait().expect(0);
    table.expect_said("held: the one with the fix");

    pair.receiver(&["release", &first]).wait().expect(0);
    receiver.wait_where("pruned", |event| event.text("snapshot") == first);
    pair.receiver(&["release", &first]).wait().expect(1).expect_said("not held");
    pair.receiver(&["hold", &first]).wait().expect(1).expect_said("no complete snapshot");
}

#[test]
fn a_roll_back_lasts_until_the_next_cycle_and_a_pin_until_it_is_taken_back() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    let first = ferry(&pair, 1);
    ferry(&pair, 2);
    pair.receiver(&["publish", &first]).wait().expect(0).expect_said("until the next transfer");
    receiver.wait_for("rolled back");
    assert_eq!(pair.published().as_ref(), Some(&first));
    let third = ferry(&pair, 3);
    assert_eq!(pair.published().as_ref(), Some(&third));

    pair.receiver(&["publish", &first, "--pin"]).wait().expect(0);
    nar::grow(&pair.places.source, 100_000, 4).unwrap();
    let sender = pair.run_once().expect(0);
    let fourth = name(&pair.newest());
    let arrived = sender.log.only(&format!("arrived; publication is pinned to {first}"));
    assert_eq!((arrived.text("snapshot"), arrived.text("pinned")), (&*fourth, &*first));
    assert!(!sender.log.only("cycle finished").has("swap_us"));
    assert_eq!(pair.published().as_ref(), Some(&first));
    assert!(listed(&pair, &first).contains("published, pinned"), "{}", listed(&pair, &first));
    pair.sender(&["snapshots"]).wait().expect(0).expect_said(&format!("publishes {first}, pinned"));
    receiver.stop().0.expect(0);

    let receiver = pair.start_receiver();
    assert_eq!(pair.published().as_ref(), Some(&first), "a restart respects it");
    // What has arrived is not sent again.
    let plan = pair.sender(&["plan"]).wait().expect(0);
    plan.expect_said(&format!("nothing: {fourth} is on the receiver, where another is pinned"));
    pair.receiver(&["publish", "--latest"]).wait().expect(0).expect_said(&fourth);
    assert_eq!(pair.published(), Some(fourth));
    let fifth = ferry(&pair, 5);
    assert_eq!(pair.published(), Some(fifth));
    pair.assert_arrived();
    receiver.stop().0.expect(0);
}

#[test]
fn an_operator_needs_no_running_agent() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    let first = ferry(&pair, 1);
    let second = ferry(&pair, 2);
    receiver.kill();
    pair.receiver(&["hold", &second]).wait().expect(0);
    pair.receiver(&["publish", &first, "--pin"]).wait().expect(0);
    assert_eq!(pair.published().as_ref(), Some(&first));
    pair.reboot_mirror();
    let _receiver = pair.start_receiver();
    assert_eq!(pair.published(), Some(first));
    assert!(listed(&pair, &second).contains("held"), "{}", listed(&pair, &second));
    let elsewhere = fs::read_to_string(pair.receiver_config()).unwrap().replace("/state\"", "/other-state\"");
    fs::write(pair.receiver_config(), elsewhere).unwrap();
    pair.receiver(&["hold", &second]).wait().expect(3).expect_said("another agent");
    pair.receiver(&["hold", "others.20260101T000000Z"]).wait().expect(2);
    pair.receiver(&["publish"]).wait().expect(2);
}
