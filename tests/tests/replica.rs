//! A replica is equal to its source, whatever the source holds and however it changes.

#![allow(clippy::unwrap_used)]

use std::{fs, path::Path, process::Command};

use snapferry_tests::{
    btrfs::{self, Usage},
    change,
    config::Settings,
    lab::run,
    manifest::{self, Manifest, View},
    pair::{Disks, Pair, name},
    tree,
};

/// How much disk a replica takes that the stock tools made.
fn stock_usage(pair: &Pair, snapshot: &Path) -> Usage {
    let to = pair.lab.path().join("mirror/stock");
    fs::create_dir(&to).unwrap();
    let script = "set -o pipefail; btrfs send -q --proto 2 \"$1\" | btrfs receive -q \"$2\"";
    run(Command::new("bash").args(["-ec", script, "-"]).arg(snapshot).arg(&to));
    let replica = to.join(name(snapshot));
    let usage = btrfs::usage(&replica);
    btrfs::delete(&replica);
    usage
}

/// Half-random files, specials, odd names, all of it, in full and then with everything changed.
fn full_and_incremental(pair: &Pair) {
    let source = &pair.places.source;
    let _receiver = pair.start_receiver();
    tree::everything(source, 11);
    let full = pair.ferry();
    assert_eq!(full.text("base"), "none");
    pair.assert_arrived();
    let first = pair.newest();
    // What reflinks spare at the source is spared here as far as btrfs can send it. (Compressed data is another matter.)
    let (ours, stock) = (btrfs::usage(&pair.replicas()[0]), stock_usage(pair, &first));
    assert!(ours.unique <= stock.unique + stock.unique / 50, "{ours:?}, with the stock tools {stock:?}");
    assert!(stock.total > stock.unique + (25 << 20), "{stock:?}");

    change::everything(source, 12);
    let increment = pair.ferry();
    assert!(increment.text("base").starts_with(&name(&first)), "{increment:?}");
    assert_ne!(pair.newest(), first);
    pair.assert_arrived();
    pair.assert_no_leftovers();
}

#[test]
fn every_kind_of_file_arrives_in_full_and_changed() {
    full_and_incremental(&Pair::new());
}

#[test]
fn a_compressed_source_arrives() {
    let disks = Disks { head: "noatime,compress-force=zstd", ..Disks::default() };
    full_and_incremental(&Pair::with(&Settings::default(), disks));
}

#[test]
fn a_compressed_mirror_is_filled() {
    let disks = Disks { mirror: "noatime,compress-force=zstd", ..Disks::default() };
    full_and_incremental(&Pair::with(&Settings { digest: "full".to_owned(), ..Settings::default() }, disks));
}

#[test]
fn an_empty_subvolume_arrives_and_can_be_filled_and_emptied() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    tree::set_mtime(&pair.places.source, 86_400, 123);
    let full = pair.ferry();
    assert_eq!(full.count("files"), 0);
    pair.assert_arrived();
    let empty = Manifest::of(&pair.live(), View::Replica);
    assert!(empty.is_empty());
    assert_eq!(empty.attribute(b"", "mtime"), Some("86400.000000123"));

    tree::everything(&pair.places.source, 21);
    pair.ferry();
    pair.assert_arrived();

    for entry in fs::read_dir(&pair.places.source).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    pair.ferry();
    pair.assert_arrived();
    assert!(Manifest::of(&pair.live(), View::Replica).is_empty());
}

#[test]
fn the_root_directory_keeps_its_times_in_an_increment_that_leaves_it_alone() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    fs::create_dir(source.join("below")).unwrap();
    tree::set_mtime(source, 1_000_000_000, 5);
    pair.ferry();
    fs::write(source.join("below/new"), "x").unwrap();
    fs::create_dir(source.join("below/newer")).unwrap();
    pair.ferry();
    pair.assert_arrived();
    let live = Manifest::of(&pair.live(), View::Replica);
    assert_eq!(live.attribute(b"", "mtime"), Some("1000000000.000000005"));
}

#[test]
fn fifty_increments_in_a_row_arrive() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    change::randomly(source, seed, 100);
    pair.ferry();
    for round in 1..=50 {
        let base = name(&pair.newest());
        change::randomly(source, seed ^ round, 25);
        let cycle = pair.ferry();
        assert!(cycle.text("base").starts_with(&base), "round {round}: {cycle:?}");
        pair.assert_arrived_by(manifest::assert_increments);
    }
    pair.assert_no_leftovers();
    assert_eq!(pair.snapshots().len(), 3, "both sides keep the last three");
}

#[test]
fn an_increment_without_any_change_arrives() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    tree::everything(&pair.places.source, 31);
    pair.ferry();
    let again = pair.ferry();
    assert_ne!(again.text("base"), "none");
    assert_eq!(again.count("files"), 0);
    assert!(again.count("bytes") < 1000, "{again:?}");
    pair.assert_arrived();
}

#[test]
fn a_nested_subvolume_is_left_out() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    btrfs::create(&source.join("nested"));
    fs::write(source.join("nested/inside"), "not of this volume").unwrap();
    fs::write(source.join("beside"), "of this volume").unwrap();
    pair.ferry();
    let live = |pair: &Pair| Manifest::of(&pair.live(), View::Client).paths().map(<[u8]>::to_vec).collect::<Vec<_>>();
    assert_eq!(live(&pair), [&b""[..], b"beside"]);
    // A directory in its place is no subvolume and arrives.
    btrfs::delete(&source.join("nested"));
    fs::create_dir(source.join("nested")).unwrap();
    pair.ferry();
    pair.assert_arrived();
    assert_eq!(live(&pair), [&b""[..], b"beside", b"nested"]);
}
