//! Deletes the received snapshots that a retention plan lets go.
//!
//! The plan was made from what is published, retiring, held and the sender's base. One more rule holds here, whatever the plan says:
//! never delete what is mounted, for its readers would see files vanish or, worse, listings that silently stop.

use common::{btrfs, retention::Plan, snapshot::Snapshot};
use tracing::{info, warn};

use crate::store::{Deleted, Store, StoreError};

/// Deletes what the plan lets go, with a line in the log for each; one that cannot be deleted does not keep the others.
///
/// Only what is still exactly the snapshot that the plan means, name and identity, is deleted.
pub fn execute(store: &Store, plan: &Plan) -> Result<Deleted, StoreError> {
    let mut result = Deleted::default();
    if plan.delete.is_empty() {
        return Ok(result);
    }
    let present = store.snapshots()?;
    let mounted = store.mounted()?;
    for found in plan.delete.iter().filter_map(|gone: &Snapshot| present.iter().find(|found| found.snapshot == *gone)) {
        let (volume, snapshot) = (store.volume().as_str(), found.snapshot.to_string());
        if mounted.contains(&found.path) {
            result.remaining += 1;
            warn!(volume, snapshot, "snapshot not pruned, it is mounted");
        } else if let Err(error) = btrfs::delete(&found.path) {
            result.remaining += 1;
            warn!(volume, snapshot, %error, "snapshot not pruned; the next cycle tries again");
        } else {
            result.deleted += 1;
            info!(volume, snapshot, "pruned");
        }
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::{fs, num::NonZeroU32, process::Command};

    use common::{
        btrfs::{Subvolume, mark_received},
        retention::{self, Policy, Reason},
        snapshot::SnapshotId,
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

        assert_eq!(execute(&store, &plan).unwrap(), Deleted { deleted: 2, remaining: 1 });
        let left: Vec<String> = store.snapshots().unwrap().iter().map(|found| found.snapshot.to_string()).collect();
        let expected = [5, 3, 1, 0].map(|i| format!("v.20260101T00000{i}Z"));
        assert_eq!(left, expected);
    }
}
