//! What a transfer still needs, for as long as it lives: others on the same file system leave that room alone, so that two volumes do
//! not both take the last of it.

use std::sync::{
    Arc, Mutex, MutexGuard, Weak,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use common::{btrfs::Space, snapshot::Snapshot, stream::Total, wire::message::Offer};
use uuid::Uuid;

use super::Need;
use crate::volume::lock;

/// The claims of this process.
static CLAIMS: Mutex<Vec<Weak<Claim>>> = Mutex::new(Vec::new());

/// What a transfer still needs.
#[derive(Debug)]
pub struct Claim {
    pub(super) snapshot: Snapshot,
    file_system: Uuid,
    incremental: bool,
    total: Mutex<Option<Total>>,
    /// Bytes of the stream that are applied.
    position: AtomicU64,
    /// Whether there was room for the whole of it.
    promised: AtomicBool,
}

impl Claim {
    /// Of an offered transfer that goes on at `position`, on the file system of that identity. It counts once it is promised.
    pub(super) fn new(offer: &Offer, position: u64, file_system: Uuid) -> Self {
        Self {
            snapshot: offer.snapshot.clone(),
            file_system,
            // What stands behind a checkpoint shares its trees with the checkpoint.
            incremental: offer.base.is_some() || position > 0,
            total: Mutex::new(offer.total),
            position: AtomicU64::new(position),
            promised: AtomicBool::new(false),
        }
    }

    /// The stream has been applied up to there.
    pub fn advance(&self, position: u64) {
        self.position.fetch_max(position, Ordering::Relaxed);
    }

    pub(super) fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    /// Takes note of the total, unless it is known.
    pub(super) fn learn(&self, total: Total) {
        lock(&self.total).get_or_insert(total);
    }

    pub(super) fn knows_total(&self) -> bool {
        lock(&self.total).is_some()
    }

    /// Whether the total is known, but not whether there is room for it.
    pub(super) fn is_open(&self) -> bool {
        self.knows_total() && !self.promised.load(Ordering::Relaxed)
    }

    /// Of what is behind `position`.
    pub(super) fn need(&self, position: u64, space: &Space) -> Need {
        match *lock(&self.total) {
            Some(total) => Need::of(&total, position, self.incremental, space),
            None => Need::unknown(space),
        }
    }
}

/// All claims that live. While one holds them, nobody else is promised anything.
pub(super) struct Claims(MutexGuard<'static, Vec<Weak<Claim>>>);

impl Claims {
    /// Waits for its turn.
    pub(super) fn lock() -> Self {
        let mut claims = lock(&CLAIMS);
        claims.retain(|claim| claim.strong_count() > 0);
        Self(claims)
    }

    /// What is promised to other volumes on the same file system and not written yet.
    pub(super) fn of_others(&self, claim: &Claim, space: &Space) -> Need {
        let is_other = |other: &Arc<Claim>| {
            other.file_system == claim.file_system && other.snapshot.name.volume() != claim.snapshot.name.volume()
        };
        let others = self.0.iter().filter_map(Weak::upgrade).filter(is_other);
        others.fold(Need::default(), |sum, other| sum.plus(other.need(other.position(), space)))
    }

    /// What it needs is its own from now on.
    pub(super) fn promise(&mut self, claim: &Arc<Claim>) {
        claim.promised.store(claim.knows_total(), Ordering::Relaxed);
        if !self.0.iter().any(|other| other.as_ptr() == Arc::as_ptr(claim)) {
            self.0.push(Arc::downgrade(claim));
        }
    }
}
