//! The command line, the configuration and the schedule, as an operator meets them.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, time::Duration};

use snapferry_tests::{
    agent::Agent,
    btrfs,
    config::Settings,
    nar,
    pair::{Disks, Pair, name},
    programs::{self, RECEIVER, SENDER},
    wait,
};

#[test]
fn a_sender_takes_a_snapshot_at_once_only_if_none_is_younger_than_the_interval() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let sender = pair.sender(&["run"]);
    sender.wait_for("cycle finished");
    sender.stop().0.expect(0);
    assert_eq!(pair.snapshots().len(), 1);
    // The next one is due in an hour; what is there is published already.
    let sender = pair.sender(&["run"]);
    sender.wait_for("nothing to send");
    sender.stop().0.expect(0);
    assert_eq!(pair.snapshots().len(), 1);
}

#[test]
fn a_sender_takes_a_snapshot_every_interval() {
    let pair = Pair::with(&Settings { interval: "1s".to_owned(), ..Settings::default() }, Disks::default());
    let _receiver = pair.start_receiver();
    let sender = pair.sender(&["run"]);
    wait::until("four cycles", || (sender.log().all("cycle finished").len() >= 4).then_some(()));
    sender.stop().0.expect(0);
    let bases: Vec<String> = sender_bases(&pair);
    assert!(bases.len() >= 3, "{bases:?}");
}

/// The names of the sender's snapshots.
fn sender_bases(pair: &Pair) -> Vec<String> {
    pair.snapshots().iter().map(|path| name(path)).collect()
}

#[test]
fn run_once_takes_one_snapshot_sends_it_and_ends() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 1_000_000, 1).unwrap();
    pair.ferry();
    pair.ferry();
    assert_eq!(pair.snapshots().len(), 2);
    receiver.stop().0.expect(0);
    pair.run_once().expect(4).expect_said("7440");
}

#[test]
fn plan_tells_what_would_happen_and_does_nothing() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    pair.sender(&["plan"]).wait().expect(0).expect_said("full");
    assert!(pair.snapshots().is_empty() && pair.replicas().is_empty());
    nar::grow(&pair.places.source, 1_000_000, 1).unwrap();
    pair.ferry();
    let first = name(&pair.newest());
    nar::grow(&pair.places.source, 500_000, 2).unwrap();
    let next = pair.places.snapshot_dir.join("substitutes.20991231T235959Z");
    btrfs::snapshot(&pair.places.source, &next);
    let plan = pair.sender(&["plan"]).wait().expect(0);
    let plan = plan.expect_said(&format!("base      {first}")).expect_said("substitutes.20991231T235959Z");
    assert!(plan.stdout.contains("size"), "{}", plan.stdout);
    assert_eq!((pair.snapshots().len(), pair.replicas().len()), (2, 1), "nothing was taken, sent or pruned");
}

#[test]
fn snapshots_are_listed_with_their_states_on_both_sides() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    for round in 0..2 {
        nar::grow(&pair.places.source, 100_000, round).unwrap();
        pair.ferry();
    }
    let line = |stdout: &str, name: &str| stdout.lines().find(|line| line.contains(name)).unwrap().to_owned();
    for listed in [pair.sender(&["snapshots"]).wait().expect(0), pair.receiver(&["snapshots"]).wait().expect(0)] {
        for (snapshot, published) in pair.snapshots().iter().zip([false, true]) {
            let line = line(&listed.stdout, &name(snapshot));
            assert_eq!(line.contains("published"), published, "{line}");
        }
    }
    let pruned = pair.receiver(&["prune", "--dry-run"]).wait().expect(0);
    assert!(line(&pruned.stdout, &name(&pair.newest())).contains("keep"), "{}", pruned.stdout);
    assert_eq!(pair.replicas().len(), 2);
}

#[test]
fn check_is_content_with_a_good_machine_and_names_what_is_wrong() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    pair.sender(&["check"]).wait().expect(0);
    receiver.stop().0.expect(0);
    pair.receiver(&["check"]).wait().expect(0);

    btrfs::create(&pair.places.source.join("nested"));
    let _receiver = pair.start_receiver();
    pair.sender(&["check"]).wait().expect_said("nested");
    btrfs::delete(&pair.places.source.join("nested"));
    btrfs::delete(&pair.places.source);
    pair.sender(&["check"]).wait().expect(1).expect_said(pair.places.source.to_str().unwrap());
}

#[test]
fn a_bad_configuration_is_refused_with_its_place() {
    let pair = Pair::new();
    for (file, start) in [(pair.sender_config(), SENDER), (pair.receiver_config(), RECEIVER)] {
        let good = fs::read_to_string(&file).unwrap();
        let run = || match start {
            SENDER => pair.sender(&["run"]).wait(),
            _ => pair.receiver(&["run"]).wait(),
        };
        let line = good.lines().count() + 1;
        fs::write(&file, format!("{good}colour = \"blue\"\n")).unwrap();
        let place = format!("{}:{line}:1", file.display());
        run().expect(2).expect_said("colour").expect_said(&place);
        fs::write(&file, good.replace("\"200ms\"", "\"soon\"")).unwrap();
        run().expect(2).expect_said("soon").expect_said(file.to_str().unwrap());
        fs::remove_file(&file).unwrap();
        run().expect(2).expect_said(file.to_str().unwrap());
        fs::write(&file, good).unwrap();
    }
}

#[test]
fn a_bad_command_line_is_refused_and_help_and_version_are_given() {
    let pair = Pair::new();
    for program in [SENDER, RECEIVER] {
        let run = |arguments: &[&str]| Agent::start(pair.head.command(programs::path(program)), arguments).wait();
        run(&["fly"]).expect(2);
        run(&["run", "--twice"]).expect(2);
        run(&["--help"]).expect(0).expect_said("keygen");
        run(&["--version"]).expect(0).expect_said(env!("CARGO_PKG_VERSION"));
    }
}

#[test]
fn two_agents_on_one_volume_are_one_too_many() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    pair.receiver(&["run"]).wait().expect(3);
    let sender = pair.sender(&["run"]);
    sender.wait_for("cycle finished");
    pair.run_once().expect(3);
    sender.stop().0.expect(0);
    pair.ferry();
    receiver.stop().0.expect(0);
}

#[test]
fn a_volume_that_the_receiver_does_not_know_is_refused() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let file = pair.sender_config();
    fs::write(&file, fs::read_to_string(&file).unwrap().replace("\"substitutes\"", "\"others\"")).unwrap();
    let ended = pair.run_once();
    assert!(!ended.status.success());
    ended.expect_said("others");
}

#[test]
fn a_snapshot_directory_on_another_file_system_is_refused() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let file = pair.sender_config();
    let elsewhere = pair.lab.directory("elsewhere");
    let text = fs::read_to_string(&file).unwrap();
    fs::write(&file, text.replace(pair.places.snapshot_dir.to_str().unwrap(), elsewhere.to_str().unwrap())).unwrap();
    pair.run_once().expect(1).expect_said(elsewhere.to_str().unwrap());
}

#[test]
fn a_snapshot_directory_is_made_only_where_the_source_is_mounted() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let file = pair.sender_config();
    let text = fs::read_to_string(&file).unwrap();
    let into = |dir: &Path| {
        fs::write(&file, text.replace(pair.places.snapshot_dir.to_str().unwrap(), dir.to_str().unwrap())).unwrap();
    };
    let unmounted = pair.lab.directory("unmounted").join("snapshots");
    into(&unmounted);
    for arguments in [&["check"][..], &["plan"], &["run", "--once"]] {
        pair.sender(arguments).wait().expect(1).expect_said("is that mounted?");
        assert!(!unmounted.exists(), "{arguments:?} made {}", unmounted.display());
    }
    let fresh = pair.places.snapshot_dir.join("deep/er");
    into(&fresh);
    pair.sender(&["check"]).wait().expect(0);
    assert!(fresh.is_dir());
}

#[test]
fn a_slow_first_transfer_does_not_hold_up_the_command_line() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 20_000_000, 1).unwrap();
    pair.head.limit_rate(30);
    let sender = pair.sender(&["run", "--once"]);
    sender.wait_for("transfer progress");
    let start = std::time::Instant::now();
    pair.sender(&["snapshots"]).wait().expect(0).expect_said("only here");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    pair.head.unlimit_rate();
    sender.wait().expect(0);
    pair.assert_arrived();
}
