//! The room of a volume: measured, judged, promised; and what its snapshots hold of it.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::Instant,
};

use common::{
    btrfs::{self, BtrfsError, Found, Space, Subvolume},
    snapshot::SnapshotId,
    wire::message::Offer,
};
use rustix::io::Errno;
use uuid::Uuid;

use super::{
    Limits, Need, Share, Verdict,
    claim::{Claim, Claims},
    holdings::{self, Holdings},
    judge,
};
use crate::{
    config::{self, Reserve},
    store::{Store, StoreError},
    volume::lock,
};

/// The room of a volume.
#[derive(Debug)]
pub struct Room {
    pub(super) store: Store,
    file_system: Uuid,
    reserve: Reserve,
    max_size: Option<u64>,
    known: Mutex<Known>,
}

/// What is known of what the snapshots take.
#[derive(Debug, Default)]
struct Known {
    /// As it was counted last.
    counted: Option<Counted>,
    /// Data of transfers that were admitted since.
    arrived: u64,
    /// Trees that were not read to the end in the time there was.
    given_up: Vec<u64>,
}

/// What certain trees take: as long as they are the same, so is the rest.
#[derive(Debug)]
struct Counted {
    trees: Vec<u64>,
    holdings: Holdings,
    /// What the complete snapshots take.
    complete: u64,
}

/// What holds data of the volume: a snapshot, or all that stands of an unfinished one.
pub(super) struct Holder {
    pub(super) name: String,
    /// None of an unfinished one.
    pub(super) id: Option<SnapshotId>,
    /// With the ids of their trees.
    subvolumes: Vec<(u64, Subvolume)>,
}

impl Holder {
    fn opened(&self) -> Vec<&Subvolume> {
        self.subvolumes.iter().map(|(_, subvolume)| subvolume).collect()
    }
}

/// A moment's truth.
pub(super) struct Look {
    pub(super) verdict: Verdict,
    pub(super) space: Space,
    pub(super) limits: Limits,
    pub(super) need: Need,
    pub(super) others: Need,
    pub(super) knows_total: bool,
}

impl Room {
    /// The room of the volume in `store`.
    ///
    /// # Errors
    /// The file system cannot be identified.
    pub fn open(store: &Store, config: &config::Volume) -> Result<Self, StoreError> {
        Ok(Self {
            store: store.clone(),
            file_system: btrfs::file_system(store.dir())?,
            reserve: config.reserve,
            max_size: config.max_size,
            known: Mutex::default(),
        })
    }

    /// What the offered transfer will claim, if it fits: that is for [`super::make()`] to find out. `position` is that of its checkpoint.
    pub fn claim(&self, offer: &Offer, position: u64) -> Arc<Claim> {
        Arc::new(Claim::new(offer, position, self.file_system))
    }

    /// Measures and judges; what fits is promised from then on. `position` is how far the stream had been applied when all of that
    /// was on disk.
    pub(super) fn look(&self, claim: &Arc<Claim>, position: u64) -> Result<Look, BtrfsError> {
        let mut claims = Claims::lock();
        let space = btrfs::space(self.store.dir())?;
        let (need, others) = (claim.need(position, &space), claims.of_others(claim, &space));
        let limits = Limits { reserve: self.reserve.bytes(space.total), max_size: self.max_size };
        let share = Share { takes: self.takes_at_most(&space), adds: claim.need(0, &space).data };
        let verdict = judge(need, others, &space, limits, share);
        if verdict == Verdict::Fits {
            claims.promise(claim);
            let mut known = lock(&self.known);
            known.arrived = known.arrived.saturating_add(share.adds);
        }
        Ok(Look { verdict, space, limits, need, others, knows_total: claim.knows_total() })
    }

    /// What the snapshots take is not more than this: all data of the file system, or what was counted once and what came since.
    fn takes_at_most(&self, space: &Space) -> u64 {
        let known = lock(&self.known);
        let counted = known.counted.as_ref().map(|counted| counted.complete.saturating_add(known.arrived));
        counted.map_or(space.data.used, |counted| counted.min(space.data.used))
    }

    /// Counts what the snapshots take, unless they are those that were counted last. None if `stop` said so before the end.
    pub(super) fn count(&self, holders: &[Holder], stop: impl Fn() -> bool) -> Result<Option<Holdings>, BtrfsError> {
        let trees = trees(holders);
        {
            let mut known = lock(&self.known);
            if let Some(counted) = known.counted.as_ref().filter(|counted| counted.trees == trees) {
                let holdings = counted.holdings.clone();
                known.arrived = 0;
                return Ok(Some(holdings));
            }
        }
        let (begun, volume) = (Instant::now(), self.store.volume());
        let subvolumes: Vec<Vec<&Subvolume>> = holders.iter().map(Holder::opened).collect();
        let counted = holdings::measure(&subvolumes, stop)?;
        let (total, seconds) = (counted.as_ref().map(|counted| counted.total), begun.elapsed().as_secs_f64());
        tracing::debug!(%volume, snapshots = holders.len(), total, seconds, "counted what the snapshots take");
        let mut known = lock(&self.known);
        if let Some(holdings) = &counted {
            let unfinished = holders.iter().zip(&holdings.alone).filter(|(holder, _)| holder.id.is_none());
            let complete = holdings.total.saturating_sub(unfinished.map(|(_, alone)| alone).sum());
            known.counted = Some(Counted { trees, holdings: holdings.clone(), complete });
            known.arrived = 0;
        } else {
            known.given_up = trees;
        }
        Ok(counted)
    }

    /// Whether reading these trees took too long once.
    pub(super) fn has_given_up(&self, holders: &[Holder]) -> bool {
        lock(&self.known).given_up == trees(holders)
    }

    /// All that holds data of the volume: the snapshots, the newest first, then what is unfinished.
    pub(super) fn holders(&self) -> Result<Vec<Holder>, StoreError> {
        let mut holders = Vec::new();
        for Found { snapshot, path, .. } in self.store.snapshots()? {
            let subvolumes = open(&path)?.into_iter().collect();
            holders.push(Holder { name: snapshot.to_string(), id: Some(snapshot.id), subvolumes });
        }
        let unfinished = self.store.unfinished()?;
        if let Some(one) = unfinished.first() {
            let name = format!("{} (unfinished)", one.snapshot);
            let mut holder = Holder { name, id: None, subvolumes: Vec::new() };
            for leftover in &unfinished {
                holder.subvolumes.extend(open(&leftover.path)?);
            }
            holders.push(holder);
        }
        Ok(holders)
    }
}

/// The subvolume with the id of its tree; None if it was deleted in this moment.
fn open(path: &Path) -> Result<Option<(u64, Subvolume)>, BtrfsError> {
    match Subvolume::open(path).and_then(|subvolume| Ok((subvolume.info()?.tree_id, subvolume))) {
        Ok(opened) => Ok(Some(opened)),
        Err(error) if error.errno() == Some(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn trees(holders: &[Holder]) -> Vec<u64> {
    holders.iter().flat_map(|holder| &holder.subvolumes).map(|(tree, _)| *tree).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use common::{
        btrfs::Access,
        retention::Policy,
        snapshot::{Snapshot, SnapshotId},
        stream::{DigestScope, RootTimes, Total},
        testing::{SMALL, TestFs},
    };
    use uuid::Uuid;

    use super::{
        super::{Resource, Shortage},
        *,
    };

    const MIB: u64 = 1 << 20;

    fn room(fs: &TestFs, volume: &str, max_size: Option<u64>) -> Room {
        let dir = fs.path().join(volume);
        fs::create_dir(&dir).unwrap();
        let store = Store::open(&dir, volume.parse().unwrap()).unwrap();
        let config = config::Volume {
            name: volume.parse().unwrap(),
            store: dir,
            publish: PathBuf::new(),
            keep: Policy::default(),
            checkpoint: 0,
            checkpoint_interval: std::time::Duration::ZERO,
            reserve: Reserve::Bytes(8 * MIB),
            max_size,
        };
        Room::open(&store, &config).unwrap()
    }

    fn snapshot(volume: &str, second: u64) -> Snapshot {
        let name = format!("{volume}.20260101T00000{second}Z");
        let id = SnapshotId { uuid: Uuid::from_u64_pair(1, second), ctransid: second };
        Snapshot { name: name.parse().unwrap(), id }
    }

    fn offer(snapshot: Snapshot, total: Option<u64>) -> Offer {
        let total =
            total.map(|bytes| Total { bytes, data_bytes: bytes, extent_bytes: bytes, files: 1, ..Total::default() });
        let times = RootTimes { atime: (0, 0), mtime: (0, 0), ctime: (0, 0) };
        let digest = DigestScope::Full;
        Offer { snapshot, base: None, stream_version: 2, digest, root_times: times, total, run: [0; 16], resume: true }
    }

    fn look(room: &Room, claim: &Arc<Claim>) -> Verdict {
        room.look(claim, claim.position()).unwrap().verdict
    }

    #[test]
    fn what_is_promised_to_one_volume_is_not_promised_to_another() {
        let fs = TestFs::new(SMALL);
        let (one, other) = (room(&fs, "one", None), room(&fs, "other", None));
        let free = btrfs::space(fs.path()).unwrap().free;
        let total = free * 6 / 10;
        let first = one.claim(&offer(snapshot("one", 1), Some(total)), 0);
        let second = other.claim(&offer(snapshot("other", 1), Some(total)), 0);
        assert_eq!(look(&one, &first), Verdict::Fits);
        assert_eq!(look(&one, &first), Verdict::Fits, "its own claim is not in its way");
        assert!(matches!(look(&other, &second), Verdict::Short(Shortage { of: Resource::Data, .. })));
        // What is written is not promised any more (and taken instead, but nothing is written here).
        first.advance(total / 2);
        assert_eq!(look(&other, &second), Verdict::Fits);
        drop((first, second));
        let third = other.claim(&offer(snapshot("other", 2), None), 0);
        assert_eq!(look(&other, &third), Verdict::Fits);
        assert!(!third.is_open(), "nobody knows what it needs");
        third.learn(Total { extent_bytes: 2 * free, bytes: 2 * free, ..Total::default() });
        assert!(third.is_open() && matches!(look(&other, &third), Verdict::Short(_)));
    }

    #[test]
    fn what_the_snapshots_take_is_counted_when_it_decides() {
        let fs = TestFs::new(SMALL);
        let room = room(&fs, "v", Some(20 * MIB));
        let live = fs.subvolume("live");
        fs::write(fs.path().join("others"), vec![1; 30 << 20]).unwrap();
        fs::write(live.join("file"), vec![1; 10 << 20]).unwrap();
        btrfs::sync(fs.path()).unwrap();
        let at = room.store.path_of(&snapshot("v", 1).name);
        btrfs::snapshot(&Subvolume::open(&live).unwrap(), &at, Access::Writable).unwrap();
        btrfs::mark_received(&Subvolume::open(&at).unwrap(), snapshot("v", 1).id).unwrap();

        let claim = room.claim(&offer(snapshot("v", 2), Some(9 * MIB)), 0);
        let Verdict::Short(short) = look(&room, &claim) else { panic!("there may be 40 MiB of the volume") };
        assert_eq!((short.of, short.have), (Resource::MaxSize, 0));
        let counted = room.count(&room.holders().unwrap(), || false).unwrap().unwrap();
        assert_eq!(counted.total, 10 * MIB);
        assert_eq!(look(&room, &claim), Verdict::Fits);
        // What was admitted counts from then on.
        let claim = room.claim(&offer(snapshot("v", 3), Some(9 * MIB)), 0);
        assert!(matches!(look(&room, &claim), Verdict::Short(Shortage { of: Resource::MaxSize, .. })));
        // It did not arrive, as counting shows; what stands unfinished does not count.
        let begun = room.store.dir().join("v.20260101T000002Z.segment-1");
        btrfs::create(&begun).unwrap();
        fs::write(begun.join("file"), vec![1; 8 << 20]).unwrap();
        btrfs::sync(fs.path()).unwrap();
        let holders = room.holders().unwrap();
        assert_eq!(room.count(&holders, || false).unwrap().unwrap().alone, [10 * MIB, 8 * MIB]);
        assert_eq!(look(&room, &claim), Verdict::Fits);
        // Stopped before the end, it is not known.
        btrfs::delete(&begun).unwrap();
        let holders = room.holders().unwrap();
        assert_eq!(room.count(&holders, || true).unwrap(), None);
        assert!(room.has_given_up(&holders));
    }
}
