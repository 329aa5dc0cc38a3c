//! Holds, roll-backs and pins on a real btrfs, across restarts.

use std::{fs, num::NonZeroU32, path::PathBuf, process::Command, time::Duration};

use common::{
    btrfs::{self, Subvolume, mark_received},
    retention::{Policy, Reason},
    snapshot::SnapshotId,
    testing::{SMALL, TestFs, run},
};
use jiff::SignedDuration;
use uuid::Uuid;

use super::*;
use crate::{config, volume::Publication};

/// A mirror box on which snapshots arrive.
pub(crate) struct Mirror {
    pub fs: TestFs,
}

pub(crate) fn snapshot(n: u64) -> Snapshot {
    let id = SnapshotId { uuid: Uuid::from_u64_pair(1, n), ctransid: 100 + n };
    Snapshot { name: format!("v.20260101T00000{n}Z").parse().unwrap(), id }
}

impl Mirror {
    /// One that has the snapshots 1 and 2.
    pub fn new() -> Self {
        let mirror = Self { fs: TestFs::new(SMALL) };
        fs::create_dir(mirror.state_dir()).unwrap();
        fs::create_dir(mirror.config().store).unwrap();
        (1..=2).for_each(|n| mirror.receive(n));
        mirror
    }

    pub fn state_dir(&self) -> PathBuf {
        self.fs.path().join("state")
    }

    pub fn config(&self) -> config::Volume {
        config::Volume {
            name: "v".parse().unwrap(),
            store: self.fs.path().join("store"),
            publish: self.fs.path().join("publish"),
            keep: Policy::last(NonZeroU32::MIN),
            checkpoint: 1 << 30,
            checkpoint_interval: Duration::from_secs(300),
            reserve: config::Reserve::default(),
            max_size: None,
        }
    }

    /// What a transfer leaves behind before anything is published.
    pub fn receive(&self, n: u64) {
        let path = self.config().store.join(snapshot(n).name.to_string());
        btrfs::create(&path).unwrap();
        fs::write(path.join("number"), n.to_string()).unwrap();
        mark_received(&Subvolume::open(&path).unwrap(), snapshot(n).id).unwrap();
    }

    /// What a transfer does in the end.
    pub fn arrive(&self, volume: &Volume, n: u64) -> Publication {
        self.receive(n);
        volume.publish(verify::verify(&volume.store, &snapshot(n)).unwrap()).unwrap()
    }

    /// An agent's start.
    pub fn start(&self) -> Volume {
        let volume = Volume::open(&self.config(), &self.state_dir()).unwrap();
        volume.catch_up().unwrap();
        volume
    }

    /// What a new client reads.
    pub fn live(&self) -> u64 {
        fs::read_to_string(self.config().publish.join("live/tree/number")).unwrap().parse().unwrap()
    }
}

fn publish(n: u64, pin: bool) -> Request {
    Request::Publish { snapshot: snapshot(n).name, pin }
}

fn hold(n: u64, why: &str) -> Request {
    Request::Hold { snapshot: snapshot(n).name, why: why.to_owned() }
}

fn latest() -> Request {
    Request::PublishLatest { volume: "v".parse().unwrap() }
}

/// The snapshots that are there.
fn there(volume: &Volume) -> Vec<u64> {
    volume.store.snapshots().unwrap().iter().map(|found| found.snapshot.id.ctransid - 100).collect()
}

#[test]
fn what_is_held_is_not_pruned_until_it_is_released() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    volume.obey(&hold(1, "release 1.4")).unwrap();
    volume.tidy().unwrap();
    assert_eq!(there(&volume), [2, 1]);
    // Said again, it has another reason, and one release is enough.
    volume.obey(&hold(1, "release 1.5")).unwrap();
    drop(volume);
    let volume = mirror.start();
    let plan = volume.retention(&[snapshot(1), snapshot(2)], Timestamp::UNIX_EPOCH);
    assert_eq!(plan.keep[1], (snapshot(1), vec![Reason::Held { why: "release 1.5".to_owned() }]));
    volume.tidy().unwrap();
    assert_eq!(there(&volume), [2, 1]);
    let release = Request::Release { snapshot: snapshot(1).name };
    volume.obey(&release).unwrap();
    volume.tidy().unwrap();
    assert_eq!(there(&volume), [2]);
    assert!(matches!(volume.obey(&release), Err(RequestError::NotHeld(_))));
    assert!(matches!(volume.obey(&hold(1, "")), Err(RequestError::Unknown(_))));
}

#[test]
fn a_roll_back_lasts_until_the_next_arrival_also_across_a_restart() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    assert_eq!(mirror.live(), 2);
    volume.obey(&publish(1, false)).unwrap();
    assert_eq!(mirror.live(), 1);
    drop(volume);
    let volume = mirror.start();
    assert_eq!(mirror.live(), 1, "a restart does not undo it");
    volume.tidy().unwrap();
    assert_eq!(there(&volume), [2, 1], "the newest is the sender's base, the older one is published");
    assert!(matches!(mirror.arrive(&volume, 3), Publication::Done(_)));
    assert_eq!(mirror.live(), 3);
    drop(volume);
    mirror.start();
    assert_eq!(mirror.live(), 3);
}

#[test]
fn what_arrived_just_before_a_crash_ends_a_roll_back_too() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    volume.obey(&publish(1, false)).unwrap();
    drop(volume);
    mirror.receive(3);
    mirror.start();
    assert_eq!(mirror.live(), 3);
}

#[test]
fn the_sender_that_offers_the_newest_again_ends_a_roll_back() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    volume.obey(&publish(1, false)).unwrap();
    let again = verify::verify(&volume.store, &snapshot(2)).unwrap();
    assert!(matches!(volume.publish(again).unwrap(), Publication::Done(_)));
    drop(volume);
    mirror.start();
    assert_eq!(mirror.live(), 2, "a restart does not roll back again");
}

#[test]
fn a_pin_lasts_until_it_is_taken_back() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    volume.obey(&publish(1, true)).unwrap();
    assert!(volume.inventory(2).unwrap().pinned);
    assert_eq!(mirror.arrive(&volume, 3), Publication::Pinned(snapshot(1)));
    assert_eq!(mirror.live(), 1);
    drop(volume);
    let volume = mirror.start();
    assert_eq!(mirror.live(), 1);
    volume.publisher().retire_at(Timestamp::now() + SignedDuration::from_hours(1));
    volume.tidy().unwrap();
    assert_eq!(there(&volume), [3, 1], "the newest is the sender's base, the pinned one is published");
    let inventory = volume.inventory(2).unwrap();
    assert_eq!((inventory.published, inventory.snapshots.len()), (Some(snapshot(1)), 2));

    volume.obey(&latest()).unwrap();
    assert_eq!(mirror.live(), 3);
    assert!(!volume.inventory(2).unwrap().pinned);
    assert!(matches!(mirror.arrive(&volume, 4), Publication::Done(_)));
    assert_eq!(mirror.live(), 4);
}

#[test]
fn a_name_without_pin_takes_a_pin_back() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    volume.obey(&publish(2, true)).unwrap();
    assert_eq!(mirror.arrive(&volume, 3), Publication::Pinned(snapshot(2)));
    volume.obey(&publish(2, false)).unwrap();
    assert!(!volume.inventory(2).unwrap().pinned);
    assert!(matches!(mirror.arrive(&volume, 4), Publication::Done(_)));
    assert_eq!(mirror.live(), 4);
}

#[test]
fn what_cannot_be_published_changes_nothing() {
    let mirror = Mirror::new();
    let volume = mirror.start();
    assert!(matches!(volume.obey(&publish(7, true)), Err(RequestError::Unknown(_))));
    // Somebody mounted something where clients look.
    let tree = mirror.config().publish.join("live/tree");
    run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&tree));
    assert!(matches!(volume.obey(&publish(1, true)), Err(RequestError::Publish(_))));
    run(Command::new("umount").arg(&tree));
    assert!(!volume.inventory(2).unwrap().pinned, "the wish is not there either");
    assert!(matches!(mirror.arrive(&volume, 3), Publication::Done(_)));
}
