//! Deletes our own snapshots that a retention plan lets go, once the receiver has confirmed the newest.

use std::{path::Path, sync::Arc};

use common::{
    btrfs::{self, BtrfsError},
    deletion::Deletions,
    retention::Plan,
    snapshot::VolumeName,
};
use tracing::{info, warn};

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pruned {
    /// So many snapshots are gone.
    pub deleted: u32,
    /// So many are still there; the log says which and why.
    pub remaining: u32,
}

/// Deletes what the plan lets go, with a line in the log for each; one that cannot be deleted does not keep the others.
///
/// Only what is still exactly the snapshot that the plan means, name and identity, is deleted. The kernel refuses to delete one that
/// is being sent (EPERM).
pub fn execute(
    deletions: &Arc<Deletions>,
    snapshot_dir: &Path,
    volume: &VolumeName,
    plan: &Plan,
) -> Result<Pruned, BtrfsError> {
    let mut result = Pruned::default();
    if plan.delete.is_empty() {
        return Ok(result);
    }
    let present = btrfs::snapshots(snapshot_dir, volume)?;
    for found in plan.delete.iter().filter_map(|gone| present.iter().find(|found| found.snapshot == *gone)) {
        let (volume, snapshot) = (volume.as_str(), found.snapshot.to_string());
        if let Err(error) = deletions.delete(found) {
            result.remaining += 1;
            warn!(volume, snapshot, %error, "snapshot not pruned; the next cycle tries again");
        } else {
            result.deleted += 1;
            info!(volume, snapshot, "pruned");
        }
    }
    if result.deleted > 0 {
        deletions.commit()?;
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, num::NonZeroU32};

    use common::{
        deletion::Pace,
        retention::{self, Policy, Reason},
        snapshot::Snapshot,
        testing::{SMALL, TestFs},
    };
    use jiff::Timestamp;

    use super::*;
    use crate::{create::Site, send::Source};

    #[test]
    fn what_the_plan_lets_go_goes_but_for_what_is_being_sent() {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        fs::write(source.join("file"), vec![1; 4 << 20]).unwrap();
        let dir = fs.path().join("snapshots");
        fs::create_dir(&dir).unwrap();
        let volume: VolumeName = "v".parse().unwrap();
        let site = Site::open(&source, &dir).unwrap();
        (0..5).for_each(|_| drop(site.create(&volume, Timestamp::from_second(1_795_330_800).unwrap()).unwrap()));
        let found = btrfs::snapshots(&dir, &volume).unwrap();
        let all: Vec<Snapshot> = found.iter().map(|found| found.snapshot.clone()).collect();
        let plan =
            retention::plan(&all, &Policy::last(NonZeroU32::MIN), Timestamp::UNIX_EPOCH, &[(all[1].id, Reason::Base)]);
        assert_eq!(plan.delete.len(), 3);

        let deletions = Deletions::new(&dir, &volume, Pace::default());
        let mut stream = Source::open(&found[4], None).unwrap().stream(2).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        assert_eq!(execute(&deletions, &dir, &volume, &plan).unwrap(), Pruned { deleted: 2, remaining: 1 });
        assert!(stream.finish().is_err());
        assert_eq!(execute(&deletions, &dir, &volume, &plan).unwrap(), Pruned { deleted: 1, remaining: 0 });
        let left: Vec<Snapshot> = btrfs::snapshots(&dir, &volume).unwrap().into_iter().map(|f| f.snapshot).collect();
        assert_eq!(left, all[..2]);
    }
}
