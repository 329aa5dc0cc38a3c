//! The checkpoint of an unfinished transfer: a segment that stands on disk, and what must be known to go on behind it.
//!
//! The segment is a read-only subvolume in the store, whole because it has (had) a successor. The record beside it says where in the
//! stream it ends, by a mark of the canonical form, and where the canonical digest is in its work. The record is written after the
//! segment stands and before the older one is deleted, so at every moment one of them is good:
//!
//! | step | what is on disk behind it | after a crash there |
//! |---|---|---|
//! | 1 | segment k is finished, perhaps not on disk; the record names k-1 | goes on behind k-1; k is swept |
//! | 2 | k has a successor, so it is on disk; the record names k | goes on behind k; k-1 and the successor are swept |
//! | 3 | k-1 is deleted, beside what comes behind k | as 2 |
//! | 4 | the snapshot itself is complete | it is published; record and segments are swept |
//!
//! A record whose segment is gone, or that cannot be read, is no checkpoint: the transfer begins again, and nothing else is lost.

use std::{fs, io, path::PathBuf};

use common::{
    btrfs::Subvolume,
    durable::{self, DurableError},
    exit::chain,
    snapshot::{Snapshot, SnapshotId},
    stream::{Canonical, CanonicalState, Mark},
    wire::message::Offer,
};
use serde::{Deserialize, Serialize};

use crate::store::{Store, segment_name};

/// A place from which a transfer can go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The number of the segment.
    pub segment: u32,
    /// Version of the send stream.
    pub stream_version: u32,
    /// Bytes of the stream up to the mark, in the send that was under way.
    pub position: u64,
    /// What the segment is, as its received_uuid and stransid say.
    pub id: SnapshotId,
    /// The snapshot on its way.
    pub snapshot: Snapshot,
    /// What its stream builds on.
    pub base: Option<Snapshot>,
    /// Where the stream can go on.
    pub mark: Mark,
    /// The canonical digest at the mark.
    pub canonical: CanonicalState,
}

impl Checkpoint {
    /// The checkpoint of a volume, if there is one that is good.
    pub fn load(store: &Store) -> Option<Self> {
        let volume = store.volume();
        match durable::load::<Self>(&record(store)) {
            // The last crash came between the completion of the snapshot and the removal of the record.
            Ok(Some(checkpoint)) if checkpoint.is_spent(store) => None,
            Ok(Some(checkpoint)) if checkpoint.stands(store) => Some(checkpoint),
            Ok(Some(checkpoint)) => {
                let snapshot = &checkpoint.snapshot;
                tracing::warn!(%volume, %snapshot, "the checkpoint's segment is gone; its transfer starts again from nothing");
                None
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%volume, error = chain(&error), "the checkpoint cannot be read; its transfer starts again from nothing");
                None
            }
        }
    }

    /// Writes it down, durably.
    ///
    /// # Errors
    /// See [`DurableError`]; the record before stays.
    pub fn keep(&self, store: &Store) -> Result<(), DurableError> {
        durable::store(&record(store), self)
    }

    /// Forgets the record, whatever it says. The segments are the store's to sweep.
    ///
    /// # Errors
    /// From the file system.
    pub fn forget(store: &Store) -> io::Result<()> {
        match fs::remove_file(record(store)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Whether an offer is of the same stream.
    pub fn fits(&self, offer: &Offer) -> bool {
        self.snapshot == offer.snapshot && self.base == offer.base && self.stream_version == offer.stream_version
    }

    /// Whether the snapshot itself is complete: then there is nothing to go on with. A store that cannot be read shows nothing.
    fn is_spent(&self, store: &Store) -> bool {
        store.find(self.snapshot.id).is_ok_and(|found| found.is_some())
    }

    /// Whether its segment is there, complete.
    fn stands(&self, store: &Store) -> bool {
        let path = store.dir().join(segment_name(&self.snapshot.name, self.segment));
        let info = Subvolume::open(&path).and_then(|segment| segment.info());
        info.is_ok_and(|info| info.received_id() == Some(self.id)) && Canonical::resume(&self.canonical).is_some()
    }
}

fn record(store: &Store) -> PathBuf {
    store.dir().join(format!(".{}.checkpoint.toml", store.volume()))
}
