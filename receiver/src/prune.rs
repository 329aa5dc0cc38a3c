//! Deletes the received snapshots that a retention plan lets go, and the segments that complete ones were made of.
//!
//! The plan was made from what is published, retiring, held and the sender's base. One more rule holds here, whatever the plan says:
//! never delete what is mounted, for its readers would see files vanish or, worse, listings that silently stop.

use std::sync::{Arc, Mutex};

use common::{btrfs::Found, deletion::Deletions, retention::Plan, snapshot::SnapshotId};
use tracing::{info, warn};

use crate::{
    store::{Deleted, Store, StoreError},
    volume::lock,
};

/// What keeps deletions and everybody else apart.
#[derive(Debug, Default)]
pub struct Gate {
    /// Locked while one snapshot is judged and deleted, and while an operator's request is carried out.
    pub orders: Mutex<()>,
    /// What is about to be deleted. Whoever begins to use a snapshot says so first, then looks here; the deletion says so here first,
    /// then looks whether anybody uses it. So one of the two gives way, and neither waits for the other.
    pub condemned: Mutex<Option<SnapshotId>>,
}

/// Deletes what the plan lets go, with a line in the log for each; one that cannot be deleted does not keep the others.
///
/// Planned anew before each deletion, for a deletion may take long, and the world goes on meanwhile. Only what is still exactly the
/// snapshot that the plan means, name and identity, is deleted.
pub fn execute(
    store: &Store,
    deletions: &Arc<Deletions>,
    gate: &Gate,
    plan: impl Fn(&[Found]) -> Plan,
) -> Result<Deleted, StoreError> {
    // They come back after a crash without a commit, but whoever starts sweeps them.
    if let Err(error) = store.discard_spent() {
        warn!(volume = store.volume().as_str(), %error, "a spent segment stays; it is tried again behind the next transfer");
    }
    let mut result = Deleted::default();
    let mut tried: Vec<SnapshotId> = Vec::new();
    loop {
        let _order = lock(&gate.orders);
        let present = store.snapshots()?;
        let next = plan(&present).delete.into_iter().filter(|gone| !tried.contains(&gone.id));
        let mut next = next.filter_map(|gone| present.iter().find(|found| found.snapshot == gone));
        let Some(found) = next.next() else { break };
        tried.push(found.snapshot.id);
        *lock(&gate.condemned) = Some(found.snapshot.id);
        let still_goes = plan(&present).delete.contains(&found.snapshot);
        if still_goes && delete(store, deletions, found)? {
            result.deleted += 1;
        } else {
            result.remaining += 1;
        }
        *lock(&gate.condemned) = None;
    }
    if result.deleted > 0 {
        deletions.commit()?;
    }
    Ok(result)
}

/// Whether it is gone.
fn delete(store: &Store, deletions: &Arc<Deletions>, found: &Found) -> Result<bool, StoreError> {
    let (volume, snapshot) = (store.volume().as_str(), found.snapshot.to_string());
    if store.mounted()?.contains(&found.path) {
        warn!(volume, snapshot, "snapshot not pruned, it is mounted");
        return Ok(false);
    }
    if let Err(error) = deletions.delete(found) {
        warn!(volume, snapshot, %error, "snapshot not pruned; the next cycle tries again");
        return Ok(false);
    }
    info!(volume, snapshot, "pruned");
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::{fs, num::NonZeroU32, process::Command, time::Duration};

    use common::{
        btrfs::{self, Subvolume, mark_received},
        deletion::Pace,
        retention::{self, Policy, Reason},
        snapshot::Snapshot,
        testing::{SMALL, TestFs, run},
    };
    use jiff::Timestamp;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn what_the_plan_lets_go_goes_unless_it_is_mounted_or_another() {
        let fs = TestFs::new(SMALL);
        let dir = fs.path().join("store");
        fs::create_dir(&dir).unwrap();
        let store = Store::open(&dir, "v".parse().unwrap()).unwrap();
        for i in 0..6 {
            let path = dir.join(format!("v.20260101T00000{i}Z"));
            btrfs::create(&path).unwrap();
            let id = SnapshotId { uuid: Uuid::from_u64_pair(1, i), ctransid: 100 + i };
            mark_received(&Subvolume::open(&path).unwrap(), id).unwrap();
        }
        let all: Vec<Snapshot> = store.snapshots().unwrap().into_iter().map(|found| found.snapshot).collect();
        let policy = Policy::last(NonZeroU32::MIN);
        let mut plan = retention::plan(&all, &policy, Timestamp::UNIX_EPOCH, &[(all[2].id, Reason::Published)]);
        assert_eq!(plan.delete.len(), 4);
        // The oldest: mounted. The next: not what the plan means any more. One that is not there at all.
        let at = fs.path().join("at");
        fs::create_dir(&at).unwrap();
        run(Command::new("mount").arg("--bind").arg(dir.join("v.20260101T000000Z")).arg(&at));
        plan.delete[1].id.ctransid += 1;
        plan.delete.push(Snapshot { name: "v.20200101T000000Z".parse().unwrap(), id: all[0].id });

        let deletions = Deletions::new(&dir, store.volume(), Pace::default());
        let pruned = execute(&store, &deletions, &Gate::default(), |_| plan.clone()).unwrap();
        assert_eq!(pruned, Deleted { deleted: 2, remaining: 1 });
        let left: Vec<String> = store.snapshots().unwrap().iter().map(|found| found.snapshot.to_string()).collect();
        let expected = [5, 3, 1, 0].map(|i| format!("v.20260101T00000{i}Z"));
        assert_eq!(left, expected);
    }
    #[test]
    fn what_is_taken_into_use_before_its_turn_stays() {
        let fs = TestFs::new(SMALL);
        let dir = fs.path().join("store");
        fs::create_dir(&dir).unwrap();
        let store = Store::open(&dir, "v".parse().unwrap()).unwrap();
        for i in 0..4 {
            let path = dir.join(format!("v.20260101T00000{i}Z"));
            btrfs::create(&path).unwrap();
            let id = SnapshotId { uuid: Uuid::from_u64_pair(1, i), ctransid: 100 + i };
            mark_received(&Subvolume::open(&path).unwrap(), id).unwrap();
        }
        let (deletions, gate) = (Deletions::new(&dir, store.volume(), Pace::default()), Gate::default());
        let all: Vec<Snapshot> = store.snapshots().unwrap().into_iter().map(|found| found.snapshot).collect();
        // A transfer takes the next one as its base as soon as it is condemned: the plan that looks once more sees it.
        let base = all[2].id;
        let plan = |present: &[Found]| {
            let present: Vec<Snapshot> = present.iter().map(|found| found.snapshot.clone()).collect();
            let in_use = (*lock(&gate.condemned) == Some(base)).then_some((base, Reason::Base));
            retention::plan(&present, &Policy::NONE, Timestamp::UNIX_EPOCH, in_use.as_slice())
        };
        assert_eq!(execute(&store, &deletions, &gate, plan).unwrap(), Deleted { deleted: 2, remaining: 1 });
        let left: Vec<SnapshotId> = store.snapshots().unwrap().iter().map(|found| found.snapshot.id).collect();
        assert_eq!(left, [all[0].id, base]);
        assert!(deletions.wait(Duration::from_secs(60)), "the cleaner did not come");
    }
}
