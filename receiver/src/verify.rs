//! Verify: the proof that a snapshot is complete, as a type. Only what holds a [`Verified`] can be published.
//!
//! The order of things makes the file system the database. The last segment, the one that carries the real uuid, is fed to
//! `btrfs receive` only after bytes, stream digest and canonical digest were compared (`apply`). So a read-only subvolume of the
//! right name with that received_uuid *is* a replica whose stream was checked, also after a crash, and nothing else has to be
//! remembered.

use std::path::{Path, PathBuf};

use common::{
    snapshot::{Snapshot, SnapshotId},
    stream::Mark,
    wire::message::End,
};

use crate::store::{Store, StoreError};

/// A complete replica, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    snapshot: Snapshot,
    path: PathBuf,
}

impl Verified {
    /// Which snapshot.
    pub fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Without a check, for tests of what comes after it.
    #[cfg(test)]
    pub fn unchecked(snapshot: Snapshot, path: PathBuf) -> Self {
        Self { snapshot, path }
    }
}

/// How a replica differs from what was sent.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Bytes were lost or added.
    #[error("the sender sent {sent} bytes, {came} came")]
    Bytes {
        /// By the sender's count.
        sent: u64,
        /// By ours.
        came: u64,
    },
    /// Bytes were changed.
    #[error("the {which} digest differs from the sender's")]
    Digest {
        /// `stream` or `canonical`.
        which: &'static str,
    },
    /// `btrfs receive` said yes, but there is no complete subvolume of that identity.
    #[error(
        "after btrfs receive there is no read-only subvolume {name} with received uuid {id}; look at `btrfs subvolume show`"
    )]
    Missing {
        /// Its name.
        name: String,
        /// What it should be.
        id: SnapshotId,
    },
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Compares what came with what the sender says it sent.
///
/// # Errors
/// The first difference.
pub fn compare(sent: &End, came: &End) -> Result<(), VerifyError> {
    if sent.bytes != came.bytes {
        return Err(VerifyError::Bytes { sent: sent.bytes, came: came.bytes });
    }
    if sent.stream_digest != came.stream_digest {
        return Err(VerifyError::Digest { which: "stream" });
    }
    let Mark { count, digest } = sent.canonical;
    if (count, digest) != (came.canonical.count, came.canonical.digest) {
        return Err(VerifyError::Digest { which: "canonical" });
    }
    Ok(())
}

/// Looks for the complete replica of `snapshot`: read-only, of that name, received_uuid and stransid as offered.
///
/// # Errors
/// [`VerifyError::Missing`] if it is not there, or not complete.
pub fn verify(store: &Store, snapshot: &Snapshot) -> Result<Verified, VerifyError> {
    let found = store.find(snapshot.id)?.filter(|found| found.snapshot.name == snapshot.name);
    match found {
        Some(found) => Ok(Verified { snapshot: found.snapshot, path: found.path }),
        None => Err(VerifyError::Missing { name: snapshot.name.to_string(), id: snapshot.id }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_difference_is_found() {
        let end = End { bytes: 10, stream_digest: [1; 32], canonical: Mark { count: 3, digest: [2; 32] } };
        assert!(compare(&end, &end).is_ok());
        let mark = |count, digest| End { canonical: Mark { count, digest: [digest; 32] }, ..end };
        for other in [End { bytes: 11, ..end }, End { stream_digest: [3; 32], ..end }, mark(4, 2), mark(3, 3)] {
            assert!(compare(&end, &other).is_err(), "{other:?}");
        }
    }
}
