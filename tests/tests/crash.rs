//! Agents that die or are told to stop in the middle of a transfer: nothing half done stays, and the next cycle succeeds.

#![allow(clippy::unwrap_used)]

use std::{path::PathBuf, time::Duration};

use rustix::process::Signal;
use snapferry_tests::{
    agent::Agent,
    manifest::assert_copy,
    nar,
    pair::{Pair, name},
    wait,
};

/// Bytes of a transfer that can be caught in its middle.
const BYTES: u64 = 40_000_000;
/// Megabits a second at which it then takes about seven seconds.
const SLOW: u32 = 50;
/// Agents that are told to stop have stopped within this time.
const MAX_SHUTDOWN: Duration = Duration::from_secs(5);

/// Each fault strikes a full transfer first, then an increment.
const KINDS: [&str; 2] = ["full", "increment"];

/// Starts a transfer and waits until it is in its middle, as the receiver sees it.
fn under_way(pair: &Pair, receiver: &Agent, round: u64) -> (Agent, String) {
    nar::grow(&pair.places.source, BYTES, round).unwrap();
    pair.head.limit_rate(SLOW);
    let sender = pair.sender(&["run", "--once"]);
    let snapshot = sender.wait_for("transfer started").text("snapshot").to_owned();
    receiver.wait_where("transfer progress", |event| {
        event.text("snapshot") == snapshot && event.count("bytes") > 3_000_000
    });
    (sender, snapshot)
}

/// What must hold after a fault: what was published still is, then the next cycle brings everything.
fn recovers(pair: &Pair, before: Option<String>, kind: &str) {
    pair.head.unlimit_rate();
    assert_eq!(pair.published(), before, "{kind}: the fault must not touch what is published");
    if let Some(before) = before {
        assert_copy(&pair.places.store.join(before), &pair.live());
    }
    let cycle = pair.ferry();
    assert_eq!(cycle.text("base") == "none", kind == "full", "{kind}: {cycle:?}");
    pair.assert_arrived();
    pair.assert_no_leftovers();
    assert_eq!(nar::broken(&pair.live()), Vec::<PathBuf>::new());
}

#[test]
fn a_killed_sender_leaves_nothing_behind_and_the_next_cycle_succeeds() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round as u64);
        sender.kill();
        receiver.wait_where("transfer failed", |event| event.text("snapshot") == snapshot);
        wait::until("the leftover is removed", || {
            let none = !pair.replicas().iter().any(|replica| snapshot.starts_with(&name(replica)));
            (none && pair.btrfs_receive().is_none()).then_some(())
        });
        pair.assert_no_leftovers();
        recovers(&pair, before, kind);
    }
}

#[test]
fn after_a_killed_receiver_the_next_cycle_succeeds() {
    let pair = Pair::new();
    let mut receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round as u64);
        receiver.kill();
        let ended = sender.wait();
        assert!(!ended.status.success());
        assert!(!ended.log.all("cycle failed").is_empty(), "{}", ended.log.as_text());
        pair.assert_no_processes(&pair.mirror);
        receiver = pair.start_receiver();
        pair.assert_no_leftovers();
        recovers(&pair, before, kind);
    }
}

#[test]
fn a_killed_btrfs_receive_fails_the_transfer_in_both_logs() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round as u64);
        rustix::process::kill_process(pair.btrfs_receive().unwrap(), Signal::KILL).unwrap();
        let ended = sender.wait().expect(1);
        assert!(!ended.log.only("cycle failed").text("error").is_empty());
        receiver.wait_where("transfer failed", |event| event.text("snapshot") == snapshot);
        pair.assert_no_leftovers();
        recovers(&pair, before, kind);
    }
}

#[test]
fn a_receiver_that_is_told_to_stop_does_so_in_mid_transfer() {
    let pair = Pair::new();
    let mut receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round as u64);
        let (ended, took) = receiver.stop();
        ended.expect(0);
        assert!(took < MAX_SHUTDOWN, "{took:?}");
        pair.assert_no_processes(&pair.mirror);
        pair.assert_no_leftovers();
        assert!(!sender.wait().status.success());
        receiver = pair.start_receiver();
        recovers(&pair, before, kind);
    }
}

#[test]
fn a_sender_that_is_told_to_stop_does_so_in_mid_transfer() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round as u64);
        sender.signal(if round == 0 { Signal::TERM } else { Signal::INT });
        let start = std::time::Instant::now();
        let ended = sender.wait();
        assert!(start.elapsed() < MAX_SHUTDOWN, "{:?}", start.elapsed());
        assert!(!ended.status.success(), "a cycle that was interrupted is not done");
        pair.assert_no_processes(&pair.head);
        receiver.wait_where("transfer failed", |event| event.text("snapshot") == snapshot);
        wait::until("btrfs receive has ended", || pair.btrfs_receive().is_none().then_some(()));
        pair.assert_no_leftovers();
        recovers(&pair, before, kind);
    }
}

#[test]
fn agents_that_have_nothing_to_do_stop_at_once() {
    let pair = Pair::new();
    for signal in [Signal::TERM, Signal::INT] {
        let receiver = pair.start_receiver();
        let sender = pair.sender(&["run"]);
        wait::until("a cycle is done", || {
            let log = sender.log();
            (log.all("cycle finished").len() + log.all("nothing to send").len() > 0).then_some(())
        });
        for agent in [sender, receiver] {
            let start = std::time::Instant::now();
            agent.signal(signal);
            agent.wait().expect(0).expect_said("stopped");
            assert!(start.elapsed() < MAX_SHUTDOWN, "{:?}", start.elapsed());
        }
        pair.assert_no_processes(&pair.head);
        pair.assert_no_processes(&pair.mirror);
    }
}

#[test]
fn a_running_sender_reconnects_by_itself() {
    let pair = Pair::new();
    nar::grow(&pair.places.source, 1_000_000, 1).unwrap();
    let sender = pair.sender(&["run"]);
    let away = sender.wait_for("receiver cannot be reached");
    assert!(away.number("retry") > 0.0, "{away:?}");
    let receiver = pair.start_receiver();
    sender.wait_for("cycle finished");
    pair.assert_arrived();
    assert_eq!(sender.log().all("snapshot taken").len(), 1, "one attempt, one snapshot");
    // And again after a fault in the middle.
    drop(receiver);
    drop(sender);
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, BYTES, 2).unwrap();
    pair.configure(&snapferry_tests::config::Settings { interval: "1s".to_owned(), ..Default::default() });
    pair.head.limit_rate(SLOW);
    let sender = pair.sender(&["run"]);
    receiver.wait_where("transfer progress", |event| event.count("bytes") > 3_000_000);
    receiver.kill();
    sender.wait_for("cycle failed");
    pair.head.unlimit_rate();
    let receiver = pair.start_receiver();
    receiver.wait_for("published");
    sender.stop().0.expect(0);
    pair.assert_no_leftovers();
}
