//! The log is the main user interface: what it says is complete, exact and one line an event.

#![allow(clippy::unwrap_used)]

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt};

use snapferry_tests::{
    config::Settings,
    event::Event,
    nar,
    pair::{Disks, Pair, name},
    tree,
};

/// Bytes of a transfer that reports its progress several times.
const BYTES: u64 = 15_000_000;
/// Megabits a second for it.
const SLOW: u32 = 60;

#[test]
fn progress_is_exact_and_ends_with_a_summary() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    // A full send first, then an increment: their totals come by different ways.
    for round in 1..3 {
        nar::grow(&pair.places.source, BYTES, round).unwrap();
        pair.head.limit_rate(SLOW);
        let ended = pair.run_once().expect(0);
        pair.head.unlimit_rate();
        let cycle = ended.log.only("cycle finished");
        let snapshot = name(&pair.newest());
        let bytes = cycle.count("bytes");
        assert!(bytes > BYTES, "{cycle:?}");
        assert_eq!(cycle.count("files"), files_of(&pair, round), "{cycle:?}");
        assert!(cycle.number("seconds") > 1.0 && cycle.number("average_rate") > 1e6, "{cycle:?}");
        assert!(cycle.count("publish_us") >= cycle.count("swap_us") && cycle.count("swap_us") > 0, "{cycle:?}");
        assert_eq!(cycle.text("base") == "none", round == 1, "{cycle:?}");
        let ours = ended.log.all("transfer progress");
        let theirs = receiver.log().all("transfer progress");
        let theirs: Vec<_> = theirs.into_iter().filter(|event| event.text("snapshot").starts_with(&snapshot)).collect();
        for progress in [ours, theirs] {
            assert!(progress.len() >= 3, "{progress:?}");
            assert_progress(&progress, bytes, &snapshot);
        }
        let verified = receiver.wait_where("verified", |event| event.text("snapshot").starts_with(&snapshot));
        assert_eq!(verified.count("bytes"), bytes, "both sides count the same");
    }
}

/// The regular files that the round added.
fn files_of(pair: &Pair, round: u64) -> u64 {
    let count = |dir: &std::path::Path| {
        let below = |part: &str| fs::read_dir(dir.join(part)).unwrap().count() as u64;
        below("zstd") + below("lzip") + below("hashes")
    };
    let snapshots = pair.snapshots();
    let now = count(snapshots.last().unwrap());
    if round == 1 { now } else { now - count(&snapshots[snapshots.len() - 2]) }
}

fn assert_progress(progress: &[Event], total: u64, snapshot: &str) {
    let mut before = 0;
    for event in progress {
        assert!(event.text("snapshot").starts_with(snapshot), "{event:?}");
        let bytes = event.count("bytes");
        assert!(bytes >= before && bytes <= total, "{before} .. {total}: {event:?}");
        before = bytes;
        if event.has("total") {
            assert_eq!(event.count("total"), total, "the total is exact: {event:?}");
            let percent = 100.0 * bytes as f64 / total as f64;
            assert!((event.number("percent") - percent).abs() < 0.1, "{percent}: {event:?}");
        }
    }
    let last = progress.last().unwrap();
    assert!(last.has("total") && last.has("eta") && last.number("rate") > 0.0, "{last:?}");
    assert!(last.number("average_rate") > 0.0 && !last.text("file").is_empty(), "{last:?}");
}

#[test]
fn what_does_not_shrink_is_sent_as_it_is_and_what_shrinks_is_compressed() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let mut rng = fastrand::Rng::with_seed(1);
    fs::write(pair.places.source.join("random"), tree::random(&mut rng, 5_000_000)).unwrap();
    let cycle = pair.ferry();
    let (bytes, sent) = (cycle.count("bytes"), cycle.count("sent"));
    assert!(sent >= bytes * 99 / 100 && sent <= bytes * 101 / 100, "{cycle:?}");
    fs::write(pair.places.source.join("text"), "the same line over and over\n".repeat(200_000)).unwrap();
    let cycle = pair.ferry();
    let (bytes, sent) = (cycle.count("bytes"), cycle.count("sent"));
    assert!(bytes > 5_000_000 && sent < bytes / 10, "{cycle:?}");
}

#[test]
fn a_json_log_is_json_to_the_last_line() {
    let pair = Pair::new();
    let receiver = pair.start_receiver();
    fs::write(pair.places.source.join(OsStr::from_bytes(b"new\nline \xff \"quoted\"")), "x").unwrap();
    let ended = pair.run_once().expect(0);
    let (stopped, _) = receiver.stop();
    for log in [ended.log, stopped.log] {
        assert_eq!(log.lines().len(), log.events().len(), "{}", log.as_text());
        for event in log.events() {
            assert!(!event.message().is_empty() && !event.level().is_empty() && event.has("time"), "{event:?}");
        }
    }
}

#[test]
fn a_text_log_is_a_line_an_event_whatever_files_are_called() {
    let pair = Pair::with(&Settings { format: "text".to_owned(), ..Settings::default() }, Disks::default());
    let receiver = pair.receiver(&["run"]);
    let mut rng = fastrand::Rng::with_seed(2);
    for i in 0..10 {
        let name = format!("{i}\n2026-11-22T07:00:00Z ERROR forged\x1b[31m");
        fs::write(pair.places.source.join(name), tree::random(&mut rng, 1_500_000)).unwrap();
    }
    snapferry_tests::wait::until("the receiver listens", || {
        receiver.log().as_text().contains("listening").then_some(())
    });
    pair.head.limit_rate(SLOW);
    let ended = pair.run_once().expect(0);
    pair.head.unlimit_rate();
    let (stopped, _) = receiver.stop();
    let said = ended.log.as_text();
    assert!(said.contains("forged") && said.contains("transfer progress"), "{said}");
    assert!(said.contains("B/s") && said.contains('%'), "{said}");
    for line in [ended.log.lines(), stopped.log.lines()].concat() {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time.len() == 20 && time.ends_with('Z'), "{line}");
        assert!(["INFO ", "WARN "].iter().any(|level| rest.starts_with(level)), "{line}");
        assert!(!line.contains('\x1b'), "{line}");
    }
    pair.assert_arrived();
}

#[test]
fn a_terminal_gets_a_progress_bar() {
    let pair = Pair::with(&Settings { format: "text".to_owned(), ..Settings::default() }, Disks::default());
    let receiver = pair.receiver(&["run"]);
    snapferry_tests::wait::until("the receiver listens", || {
        receiver.log().as_text().contains("listening").then_some(())
    });
    nar::grow(&pair.places.source, BYTES, 1).unwrap();
    pair.head.limit_rate(SLOW);
    let program = snapferry_tests::programs::path(snapferry_tests::programs::SENDER);
    let line = format!("{} --config {} run --once", program.display(), pair.sender_config().display());
    let typescript = pair.lab.path().join("typescript");
    let done = pair.head.command("script").args(["-qec", &line]).arg(&typescript).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    let shown = String::from_utf8_lossy(&fs::read(typescript).unwrap()).into_owned();
    assert!(shown.contains('%') && shown.contains('\r'), "{shown}");
    assert!(!shown.contains("transfer progress"), "the bar takes the place of these lines");
    pair.assert_arrived();
}
