//! Which snapshots stay, as an operator meets it: by the calendar, and while the receiver is away.

#![allow(clippy::unwrap_used)]

use std::fs;

use snapferry_tests::{
    btrfs,
    config::Settings,
    nar,
    pair::{Disks, Pair, name},
    wait,
};

#[test]
fn while_the_receiver_is_away_few_snapshots_wait_and_the_base_stays() {
    let settings = Settings { sender_keeps: 9, interval: "1s".to_owned(), ..Settings::default() };
    let pair = Pair::with(&settings, Disks::default());
    let config = fs::read_to_string(pair.sender_config()).unwrap();
    fs::write(pair.sender_config(), config.replace("keep = ", "max_unsent = 2\nkeep = ")).unwrap();
    let receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 100_000, 1).unwrap();
    pair.ferry();
    let base = name(&pair.newest());
    receiver.stop().0.expect(0);

    let sender = pair.sender(&["run"]);
    let warned = sender.wait_where("snapshots wait for the receiver", |event| event.count("unsent") == 3);
    assert_eq!((warned.text("base"), warned.count("max_unsent")), (&*base, 2));
    assert!(warned.number("seconds") > 0.0 && warned.count("free") > 0, "{warned:?}");
    sender.wait_for("pruned");
    sender.stop().0.expect(0);
    let left: Vec<String> = pair.snapshots().iter().map(|path| name(path)).collect();
    assert!(left.contains(&base) && left.len() <= 4, "{left:?}");
    // What is here is said, although the receiver cannot be asked.
    let listed = pair.sender(&["snapshots"]).wait().expect(4).expect_said("not on the receiver yet");
    assert!(left.iter().all(|snapshot| listed.stdout.contains(snapshot)), "{}", listed.stdout);

    let _receiver = pair.start_receiver();
    nar::grow(&pair.places.source, 100_000, 2).unwrap();
    let sender = pair.run_once().expect(0);
    assert_eq!(sender.log.only("transfer started").text("base"), base);
    pair.assert_arrived();
}

#[test]
fn the_calendar_keeps_one_of_a_day_and_says_which() {
    let pair = Pair::new();
    let config = fs::read_to_string(pair.sender_config()).unwrap();
    fs::write(pair.sender_config(), config.replace("keep = { last = 3 }", "keep = { daily = 2, yearly = 5 }")).unwrap();
    for moment in ["20240229T120000Z", "20240301T000000Z", "20240301T235959Z", "20250101T000000Z"] {
        fs::write(pair.places.source.join("file"), moment).unwrap();
        btrfs::snapshot(&pair.places.source, &pair.places.snapshot_dir.join(format!("substitutes.{moment}")));
        // So that each has a transaction of its own.
        btrfs::sync(&pair.places.source);
    }
    let _receiver = pair.start_receiver();
    let plan = pair.sender(&["plan"]).wait().expect(0).stdout;
    let line =
        |moment: &str| plan.lines().find(|line| line.contains("  ") && line.contains(moment)).unwrap().to_owned();
    for (moment, why) in [
        ("20250101T000000Z", "newest, daily 2025-01-01, yearly 2025"),
        ("20240301T235959Z", "daily 2024-03-01, yearly 2024"),
    ] {
        assert!(
            plan.lines().any(|line| line.contains("keep") && line.contains(moment) && line.ends_with(why)),
            "{plan}"
        );
    }
    for moment in ["20240229T120000Z", "20240301T000000Z"] {
        assert!(line(moment).contains("prune"), "{plan}");
    }
    pair.ferry();
    wait::until("three snapshots", || (pair.snapshots().len() == 3).then_some(()));
}
