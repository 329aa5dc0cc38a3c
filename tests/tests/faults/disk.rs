//! A disk that is full in the middle of a transfer: it fails cleanly, keeps its checkpoint, leaves what is published alone, and goes on
//! by itself when there is room.

use std::{fs::File, path::PathBuf};

use rustix::fs::FallocateFlags;
use snapferry_tests::{
    measure::{entries, grow},
    pair::Disks,
    trial::{Books, Cost, Trial},
};

/// Bytes of either disk.
const DISK: u64 = 768 << 20;
/// Bytes of the transfer that meets the full disk.
const BULK: u64 = 100_000_000;
/// Bytes that are left for it, about.
const LEFT: u64 = 20_000_000;

pub fn full(seed: u64) -> Books {
    let mut trial = Trial::with(seed, Disks { bytes: DISK, ..Disks::default() }, |_| {});
    grow(trial.source(), seed, 5_000_000);
    let first = trial.take();
    trial.start();
    trial.arrives(&first);

    let bulk = trial.rng.u64(..);
    grow(trial.source(), bulk, BULK);
    let mut transfer = trial.take();
    // What does not fit is not begun; so somebody else must fill the disk while it is under way.
    trial.pair.head.limit_rate(100);
    trial.start();
    trial.receiver().wait_where("checkpoint", |event| event.text("snapshot") == transfer.snapshot);
    let filler = fill(&trial);
    trial.receiver().wait_where("transfer failed", |event| event.text("error").contains("No space left on device"));
    trial.sender().wait_for("no room on the receiver");
    assert_eq!(trial.pair.published(), transfer.base);
    trial.pair.head.unlimit_rate();
    let records = entries(&trial.pair.places.store).into_iter().filter(|name| name.ends_with("checkpoint.toml"));
    assert_eq!(records.count(), 1, "the checkpoint must stay");
    std::fs::remove_file(filler).unwrap();
    trial.arrived(&transfer);
    let failures = trial.receiver().log().all("transfer failed").len() as u64;
    trial.interrupted(&mut transfer, failures, Cost::Crash);
    trial.arrives(&transfer);
    let books = trial.end();
    assert!(books.at_checkpoint >= 1, "{books:?}");
    books
}

/// Leaves only little room on the mirror box's disk.
fn fill(trial: &Trial) -> PathBuf {
    let path = trial.pair.lab.path().join("mirror/filler");
    let space = rustix::fs::statvfs(path.parent().unwrap()).unwrap();
    let bytes = (space.f_bavail * space.f_frsize).saturating_sub(LEFT);
    let file = File::create(&path).unwrap();
    // Not all of what statvfs says can be had.
    let taken = [bytes, bytes * 9 / 10, bytes * 3 / 4];
    let taken = taken.iter().find(|bytes| rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, **bytes).is_ok());
    assert!(taken.is_some(), "the disk cannot be filled");
    path
}
