//! Agents that die or are told to stop in the middle of a transfer: what is published stays, nothing half done is left, and the
//! next cycle succeeds.

#![allow(clippy::unwrap_used)]

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use snapferry_tests::{
    agent::Agent,
    config::Settings,
    manifest::assert_copy,
    nar,
    pair::{Disks, Pair, name},
    wait,
};

/// Bytes of a transfer that can be caught in its middle.
const BYTES: u64 = 25_000_000;
/// Megabits a second at which it then takes about five seconds.
const SLOW: u32 = 40;
/// Agents that are told to stop have stopped within this time.
const MAX_SHUTDOWN: Duration = Duration::from_secs(5);

/// Each fault strikes a full transfer first, then an increment.
const KINDS: [&str; 2] = ["full", "increment"];

/// A pair whose transfers wait so long for a peer that is gone.
fn pair_with_grace(grace: &str) -> Pair {
    Pair::with(&Settings { reconnect_grace: grace.to_owned(), ..Settings::default() }, Disks::default())
}

/// Starts a transfer and waits until it is in its middle, as the receiver sees it. Answers with the sender and the snapshot.
fn under_way(pair: &Pair, receiver: &Agent, round: usize) -> (Agent, String) {
    nar::grow(&pair.places.source, BYTES, round as u64).unwrap();
    pair.head.limit_rate(SLOW);
    let sender = pair.sender(&["run", "--once"]);
    let snapshot = sender.wait_for("transfer started").text("snapshot").to_owned();
    receiver.wait_where("transfer progress", |event| {
        event.text("snapshot") == snapshot && event.count("bytes") > 3_000_000
    });
    assert!(pair.btrfs_receive().is_some());
    (sender, snapshot)
}

/// What must hold after a fault: what was published still is, then everything arrives by the next cycle.
fn recovers(pair: &Pair, before: Option<String>, kind: &str) {
    pair.head.unlimit_rate();
    assert_eq!(pair.published(), before, "{kind}: the fault must not touch what is published");
    if let Some(before) = before {
        assert_copy(&pair.places.store.join(before), &pair.live());
    }
    pair.ferry();
    arrived(pair);
}

fn arrived(pair: &Pair) {
    pair.assert_arrived();
    pair.assert_no_leftovers();
    assert_eq!(nar::broken(&pair.live()), Vec::<PathBuf>::new());
}

/// Waits until nothing of the transfer is left on the mirror box.
fn wait_until_removed(pair: &Pair, snapshot: &str) {
    wait::until("what is left of the transfer is removed", || {
        let left = pair.replicas().into_iter().find(|replica| name(replica).starts_with(snapshot));
        (left.is_none() && pair.btrfs_receive().is_none()).then_some(())
    });
    pair.assert_no_leftovers();
}

#[test]
fn a_killed_sender_leaves_nothing_behind_once_the_receiver_has_given_it_up() {
    let pair = pair_with_grace("1s");
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round);
        sender.kill();
        receiver.wait_where("connection lost", |event| event.text("snapshot") == snapshot);
        receiver.wait_where("the sender did not come back", |event| event.text("snapshot") == snapshot);
        wait_until_removed(&pair, &snapshot);
        recovers(&pair, before, kind);
    }
}

#[test]
fn the_cycle_after_a_killed_sender_need_not_wait() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round);
        sender.kill();
        recovers(&pair, before, kind);
        assert!(
            pair.replicas().iter().any(|replica| name(replica) == snapshot),
            "what was interrupted is finished first"
        );
    }
}

#[test]
fn a_killed_receiver_that_comes_back_gets_everything() {
    let pair = Pair::new();
    let mut receiver = pair.start_receiver();
    for round in 0..KINDS.len() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round);
        receiver.kill();
        pair.assert_no_processes(&pair.mirror);
        receiver = pair.start_receiver();
        pair.assert_no_leftovers();
        assert_eq!(pair.published(), before);
        pair.head.unlimit_rate();
        sender.wait().expect(0);
        arrived(&pair);
    }
}

#[test]
fn a_sender_gives_a_killed_receiver_up_and_the_next_cycle_succeeds() {
    let pair = pair_with_grace("1s");
    let mut receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round);
        receiver.kill();
        let ended = sender.wait();
        assert!(!ended.status.success());
        let said = ended.log.all("cycle failed").len() + ended.log.all("receiver cannot be reached").len();
        assert_eq!(said, 1, "{}", ended.log.as_text());
        receiver = pair.start_receiver();
        pair.assert_no_leftovers();
        recovers(&pair, before, kind);
    }
}

#[test]
fn both_agents_killed_at_once_and_the_next_cycle_succeeds() {
    let pair = Pair::new();
    let mut receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round);
        receiver.kill();
        sender.kill();
        pair.assert_no_processes(&pair.head);
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
        let (sender, snapshot) = under_way(&pair, &receiver, round);
        rustix::process::kill_process(pair.btrfs_receive().unwrap(), Signal::KILL).unwrap();
        let ended = sender.wait().expect(1);
        assert!(ended.log.only("cycle failed").text("error").contains("btrfs receive"), "{}", ended.log.as_text());
        receiver.wait_where("transfer failed", |event| event.text("snapshot") == snapshot);
        wait_until_removed(&pair, &snapshot);
        recovers(&pair, before, kind);
    }
}

#[test]
fn a_receiver_that_is_told_to_stop_does_so_in_mid_transfer() {
    let pair = pair_with_grace("1s");
    let mut receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, _) = under_way(&pair, &receiver, round);
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
    let pair = pair_with_grace("1s");
    let receiver = pair.start_receiver();
    for (round, kind) in KINDS.into_iter().enumerate() {
        let before = pair.published();
        let (sender, snapshot) = under_way(&pair, &receiver, round);
        sender.signal(if round == 0 { Signal::TERM } else { Signal::INT });
        let start = Instant::now();
        let ended = sender.wait();
        assert!(start.elapsed() < MAX_SHUTDOWN, "{:?}", start.elapsed());
        assert!(!ended.status.success(), "a cycle that was interrupted is not done");
        pair.assert_no_processes(&pair.head);
        wait_until_removed(&pair, &snapshot);
        recovers(&pair, before, kind);
    }
}

#[test]
fn both_can_be_stopped_while_the_other_is_gone() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    let (sender, _) = under_way(&pair, &receiver, 0);
    // The receiver keeps the transfer of a dead sender for a while ...
    sender.kill();
    receiver.wait_for("connection lost");
    let (ended, took) = receiver.stop();
    ended.expect(0);
    assert!(took < MAX_SHUTDOWN, "{took:?}");
    pair.assert_no_processes(&pair.mirror);
    pair.assert_no_leftovers();
    // ... and so does a sender with that of a dead receiver.
    let receiver = pair.start_receiver();
    let (sender, _) = under_way(&pair, &receiver, 1);
    receiver.kill();
    sender.wait_for("connection lost");
    let (ended, took) = sender.stop();
    assert!(!ended.status.success());
    assert!(took < MAX_SHUTDOWN, "{took:?}");
    pair.assert_no_processes(&pair.head);
    let _receiver = pair.start_receiver();
    recovers(&pair, None, "full");
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
            let start = Instant::now();
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
    sender.stop().0.expect(0);

    // And again after the receiver went and came in mid-transfer.
    nar::grow(&pair.places.source, BYTES, 2).unwrap();
    pair.configure(&Settings { interval: "1s".to_owned(), ..Settings::default() });
    pair.head.limit_rate(SLOW);
    let sender = pair.sender(&["run"]);
    let snapshot = sender.wait_for("transfer started").text("snapshot").to_owned();
    receiver.wait_where("transfer progress", |event| {
        event.text("snapshot") == snapshot && event.count("bytes") > 3_000_000
    });
    receiver.kill();
    sender.wait_for("connection lost");
    pair.head.unlimit_rate();
    let receiver = pair.start_receiver();
    receiver.wait_where("published", |event| event.text("snapshot") == snapshot);
    sender.stop();
    receiver.stop().0.expect(0);
    pair.assert_no_leftovers();
}
