//! What clients see: one complete snapshot at every moment, theirs to the end; the next one for whoever comes after.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::PathBuf,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustix::process::Signal;
use snapferry_tests::{
    config::Settings,
    lab,
    manifest::{Manifest, View, assert_copy},
    nar,
    pair::{Disks, Pair, name},
    rsync, wait,
};

/// Megabytes of the first snapshot in most tests here.
const MB: u64 = 1_000_000;

#[test]
fn a_client_across_a_swap_ends_with_what_it_began_with() {
    let pair = Pair::with(&Settings { receiver_keeps: 1, sender_keeps: 1, ..Settings::default() }, Disks::default());
    let receiver = pair.start_receiver();
    let source = &pair.places.source;
    nar::grow(source, 20 * MB, 1).unwrap();
    pair.ferry();
    let first = pair.newest();
    let expected_first = Manifest::of(&first, View::Client);

    let mut slow = rsync::Client::start(&pair.head, &pair.url(), &pair.lab.path().join("slow"), 5000);
    slow.wait_until_half_way(5);
    nar::collect(source, 50, 2).unwrap();
    nar::grow(source, 5 * MB, 3).unwrap();
    pair.ferry();
    pair.assert_arrived();
    let second = pair.newest();
    rsync::copy(&pair.head, &pair.url(), &pair.lab.path().join("fast"));
    assert!(slow.is_running(), "the slow client must be half-way through while the new one copies all");
    // The first snapshot is one too many now, but somebody is inside.
    receiver.wait_where("retiring", |event| event.text("snapshot").starts_with(&name(&first)));
    assert!(pair.places.store.join(name(&first)).is_dir(), "a snapshot with a client in it must stay");
    let slow_copy = slow.copy.clone();
    slow.finish(Duration::from_secs(60));

    expected_first.assert_equal(&Manifest::of(&slow_copy, View::Client), "the slow client's copy");
    assert_copy(&second, &pair.lab.path().join("fast"));
    for copy in ["slow", "fast"] {
        assert_eq!(nar::broken(&pair.lab.path().join(copy)), Vec::<PathBuf>::new());
    }
    // With its client gone it retires and is pruned.
    receiver.wait_where("last client has left", |event| event.text("snapshot").starts_with(&name(&first)));
    wait::until("the first snapshot is pruned", || (pair.replicas().len() == 1).then_some(()));
    let generations: Vec<_> = lab::mounts_below(&pair.places.publish);
    assert_eq!(generations, vec![pair.live()], "one mount, of the live tree");
}

#[test]
fn a_client_sees_the_new_snapshot_from_the_cycle_s_end_on() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    for round in 0..5 {
        nar::grow(&pair.places.source, MB, round).unwrap();
        pair.ferry();
        let copy = pair.lab.path().join(format!("copy{round}"));
        rsync::copy(&pair.head, &pair.url(), &copy);
        assert_copy(&pair.newest(), &copy);
    }
}

#[test]
fn a_receiver_that_was_restarted_serves_what_it_served() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 3 * MB, 1).unwrap();
    pair.ferry();
    let before = pair.published();
    assert!(before.is_some());
    let (ended, _) = receiver.stop();
    ended.expect(0);
    assert!(!rsync::probe(&pair.head, &pair.url()).success(), "the daemon ends with the agent");

    let receiver = pair.start_receiver();
    assert_eq!(pair.published(), before);
    wait::until("the daemon answers again", || rsync::probe(&pair.head, &pair.url()).success().then_some(()));
    rsync::copy(&pair.head, &pair.url(), &pair.lab.path().join("copy"));
    assert_copy(&pair.newest(), &pair.lab.path().join("copy"));
    receiver.kill();

    let _receiver = pair.start_receiver();
    assert_eq!(pair.published(), before);
    nar::grow(&pair.places.source, MB, 2).unwrap();
    assert_ne!(pair.ferry().text("base"), "none", "the next increment goes on from there");
    pair.assert_arrived();
}

#[test]
fn a_mirror_box_that_was_rebooted_publishes_before_it_listens() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 3 * MB, 1).unwrap();
    pair.ferry();
    nar::grow(&pair.places.source, MB, 2).unwrap();
    pair.ferry();
    receiver.kill();
    pair.reboot_mirror();
    assert_eq!(pair.published(), None);

    let _receiver = pair.start_receiver();
    assert_eq!(pair.published(), Some(name(&pair.newest())));
    assert_copy(&pair.newest(), &pair.live());
    assert_eq!(lab::mounts_below(&pair.places.publish), vec![pair.live()]);
    nar::grow(&pair.places.source, MB, 3).unwrap();
    assert_ne!(pair.ferry().text("base"), "none");
    pair.assert_arrived();
}

#[test]
fn without_a_base_in_common_everything_is_sent_with_a_warning() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 3 * MB, 1).unwrap();
    pair.ferry();
    snapferry_tests::btrfs::delete(&pair.newest());
    // The sender knows nothing of that snapshot any more: in the same second it would take another of the same name.
    let second = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let taken = second();
    wait::until("a second passes", || (second() > taken).then_some(()));
    nar::grow(&pair.places.source, MB, 2).unwrap();
    let ended = pair.run_once().expect(0);
    assert_eq!(ended.log.only("no base in common").level(), "warn");
    assert_eq!(ended.log.only("cycle finished").text("base"), "none");
    pair.assert_arrived();
    nar::grow(&pair.places.source, MB, 3).unwrap();
    let after = pair.run_once().expect(0);
    assert!(after.log.all("no base in common").is_empty());
    assert_ne!(after.log.only("cycle finished").text("base"), "none");
    pair.assert_arrived();
}

#[test]
fn a_first_transfer_is_full_without_a_warning() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let ended = pair.run_once().expect(0);
    assert!(ended.log.all("no base in common").is_empty(), "{}", ended.log.as_text());
}

#[test]
fn both_sides_keep_what_they_are_told_to() {
    let pair = Pair::with(&Settings { sender_keeps: 2, receiver_keeps: 4, ..Settings::default() }, Disks::default());
    let receiver = pair.start_receiver();
    let mut all = Vec::new();
    for round in 0..7 {
        nar::grow(&pair.places.source, 100_000, round).unwrap();
        pair.ferry();
        all.push(name(&pair.newest()));
    }
    let names = |paths: Vec<PathBuf>| paths.iter().map(|path| name(path)).collect::<Vec<_>>();
    assert_eq!(names(pair.snapshots()), all[5..]);
    wait::until("the receiver has pruned", || (pair.replicas().len() == 4).then_some(()));
    assert_eq!(names(pair.replicas()), all[3..]);
    assert_eq!(receiver.log().all("pruned").len(), 3, "{}", receiver.log().as_text());
    pair.assert_arrived();
}

#[test]
fn the_sender_keeps_the_last_confirmed_base_while_the_receiver_is_away() {
    let pair = Pair::with(&Settings { sender_keeps: 1, ..Settings::default() }, Disks::default());
    let receiver = pair.start_receiver();
    pair.ferry();
    let base = name(&pair.newest());
    receiver.stop().0.expect(0);
    // A loop of failing cycles; each takes a snapshot and prunes.
    pair.configure(&Settings { sender_keeps: 1, interval: "1s".to_owned(), ..Settings::default() });
    let sender = pair.sender(&["run"]);
    wait::until("some snapshots were taken", || (sender.log().all("snapshot taken").len() >= 3).then_some(()));
    let (ended, _) = sender.stop();
    ended.expect(0);
    assert!(pair.snapshots().iter().any(|path| name(path) == base), "{:?}", pair.snapshots());

    let _receiver = pair.start_receiver();
    let cycle = pair.ferry();
    assert!(cycle.text("base").starts_with(&base), "{cycle:?}");
    pair.assert_arrived();
}

#[test]
fn the_rsync_daemon_is_restarted_when_it_dies() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    pair.ferry();
    wait::until("the daemon answers", || rsync::probe(&pair.head, &pair.url()).success().then_some(()));
    let daemon = pair.mirror.process("rsync --daemon").unwrap();
    rustix::process::kill_process(daemon, Signal::KILL).unwrap();
    wait::until("another one answers", || {
        let other = pair.mirror.process("rsync --daemon").is_some_and(|pid| pid != daemon);
        (other && rsync::probe(&pair.head, &pair.url()).success()).then_some(())
    });
    receiver.stop().0.expect(0);
    pair.assert_no_processes(&pair.mirror);
}

#[test]
fn both_internet_protocols_reach_the_daemon() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    pair.ferry();
    for address in [snapferry_tests::host::MIRROR_ADDRESS, "[fd77::2]"] {
        let url = format!("rsync://{address}/{}/", snapferry_tests::config::VOLUME);
        wait::until(&format!("{url} answers"), || rsync::probe(&pair.head, &url).success().then_some(()));
    }
}

#[test]
fn nobody_writes_through_the_daemon() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    nar::grow(&pair.places.source, MB, 1).unwrap();
    pair.ferry();
    wait::until("the daemon answers", || rsync::probe(&pair.head, &pair.url()).success().then_some(()));
    let file = pair.lab.path().join("mine");
    fs::write(&file, "x").unwrap();
    let pushed = pair.head.command("rsync").arg("-q").arg(&file).arg(pair.url()).output().unwrap();
    assert!(!pushed.status.success());
    let listed = pair.head.command("rsync").arg(format!("{}../", pair.url())).output().unwrap();
    assert!(!String::from_utf8_lossy(&listed.stdout).contains("gen-"), "nothing above the snapshot is seen");
    pair.assert_arrived();
}

#[test]
fn an_external_daemon_gets_its_configuration_and_no_daemon_is_started() {
    let pair = Pair::with(&Settings { rsync: "external".to_owned(), ..Settings::default() }, Disks::default());
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, MB, 1).unwrap();
    pair.ferry();
    assert_eq!(pair.mirror.process("rsync"), None);
    let conf = pair.places.receiver.join("state/rsyncd.conf");
    let daemon = ["--daemon", "--no-detach", "--config", conf.to_str().unwrap()];
    let mut rsyncd = pair.mirror.command("rsync").args(daemon).spawn().unwrap();
    wait::until("the daemon answers", || rsync::probe(&pair.head, &pair.url()).success().then_some(()));
    // The agent goes; the clients stay.
    receiver.stop().0.expect(0);
    rsync::copy(&pair.head, &pair.url(), &pair.lab.path().join("copy"));
    assert_copy(&pair.newest(), &pair.lab.path().join("copy"));
    rsyncd.kill().unwrap();
    rsyncd.wait().unwrap();
}
