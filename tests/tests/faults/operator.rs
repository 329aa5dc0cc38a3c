//! An operator who deletes what a transfer needs, in the middle of it. What is gone cannot be gone on from: the transfer begins from
//! nothing, says so, and the replica is right in the end.

use std::{path::PathBuf, process::Command};

use snapferry_tests::{
    agent::Agent,
    btrfs,
    measure::{grow, stream_bytes},
    pair::name,
    trial::{Books, Cost, Transfer, Trial},
};

const BULK: u64 = 30_000_000;

/// Two snapshots have arrived, a third is in its middle, and there is a checkpoint of it.
fn in_the_middle(seed: u64) -> (Trial, Transfer) {
    let mut trial = Trial::new(seed);
    for (number, bytes) in [2_000_000, 2_000_000, BULK].into_iter().enumerate() {
        grow(trial.source(), seed + number as u64, bytes);
        let transfer = trial.take();
        trial.start();
        if bytes < BULK {
            trial.arrives(&transfer);
            continue;
        }
        let checkpoints = trial.rng.usize(1..5);
        let made = |trial: &Trial| trial.receiver().log().all("checkpoint").len() >= checkpoints;
        let there = trial.during(&transfer, |trial| made(trial).then_some(()));
        assert!(there.is_some(), "the transfer was over too early");
        return (trial, transfer);
    }
    unreachable!("the third one returns");
}

fn says(agent: &Agent, part: &str) {
    assert!(agent.log().as_text().contains(part), "{part:?} is not in\n{}", agent.log().as_text());
}

/// The snapshot on its way. While it is sent the kernel does not let it go; between two attempts it can be deleted.
pub fn snapshot(seed: u64) -> Books {
    let (mut trial, transfer) = in_the_middle(seed);
    let path = trial.pair.places.snapshot_dir.join(&transfer.snapshot);
    let refused = Command::new("btrfs").args(["-q", "subvolume", "delete"]).arg(&path).output().unwrap();
    assert!(!refused.status.success() || trial.has_arrived(&transfer), "it could be deleted under the kernel's send");
    trial.kill_sender();
    btrfs::delete(&path);
    let mut next = trial.take();
    trial.start();
    trial.interrupted(&mut next, 1, Cost::Everything);
    trial.arrives(&next);
    says(trial.sender(), "the unfinished transfer cannot go on");
    trial.end()
}

/// Its base. An older one is still on both sides.
pub fn base(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    trial.kill_sender();
    let dir = trial.pair.places.snapshot_dir.clone();
    btrfs::delete(&dir.join(transfer.base.as_ref().unwrap()));
    let older = trial.pair.snapshots().remove(0);
    trial.interrupted(&mut transfer, 1, Cost::Everything);
    transfer.stream = stream_bytes(&dir.join(&transfer.snapshot), Some(&older));
    trial.start_sender();
    trial.arrives(&transfer);
    says(trial.sender(), "the unfinished transfer cannot go on");
    let base = trial.sender().log().only("cycle finished").text("base").to_owned();
    assert!(base.starts_with(&name(&older)), "{base}");
    trial.end()
}

/// The receiver's checkpoint.
pub fn checkpoint(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    trial.kill_receiver();
    trial.pair.assert_no_processes(&trial.pair.mirror);
    segments(&trial).iter().for_each(|segment| btrfs::delete(segment));
    trial.start_receiver();
    trial.interrupted(&mut transfer, 1, Cost::Everything);
    trial.arrives(&transfer);
    says(trial.receiver(), "the checkpoint's segment is gone");
    trial.end()
}

/// The receiver's copy of the base, which is what it publishes, too: that much an operator can do to the clients.
pub fn replica(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    trial.kill_receiver();
    trial.watcher.learn();
    trial.watcher.pause();
    trial.pair.assert_no_processes(&trial.pair.mirror);
    btrfs::delete(&trial.pair.places.store.join(transfer.base.as_ref().unwrap()));
    let (dir, older) = (trial.pair.places.snapshot_dir.clone(), trial.pair.snapshots().remove(0));
    trial.interrupted(&mut transfer, 1, Cost::Everything);
    transfer.stream = stream_bytes(&dir.join(&transfer.snapshot), Some(&older));
    trial.start_receiver();
    trial.arrives(&transfer);
    trial.watcher.go_on();
    trial.end()
}

/// The segment that `btrfs receive` writes at the moment.
pub fn segment(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    let writable = |path: &PathBuf| {
        let flags = Command::new("btrfs").args(["property", "get", "-ts"]).arg(path).arg("ro").output().unwrap();
        flags.stdout.starts_with(b"ro=false")
    };
    let deleted = trial.during(&transfer, |trial| {
        let under_way = segments(trial).into_iter().find(writable)?;
        let delete = Command::new("btrfs").args(["-q", "subvolume", "delete"]).arg(under_way).output().unwrap();
        delete.status.success().then_some(())
    });
    assert!(deleted.is_some(), "the transfer was over too early");
    trial.interrupted(&mut transfer, 1, Cost::Crash);
    trial.arrives(&transfer);
    trial.end()
}

fn segments(trial: &Trial) -> Vec<PathBuf> {
    trial.pair.replicas().into_iter().filter(|path| name(path).contains(".segment-")).collect()
}
