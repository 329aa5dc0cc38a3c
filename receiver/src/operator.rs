//! What an operator asks of a volume: hold and release a snapshot, publish one by name, publish the newest again.
//!
//! The wish is durable first, then it is done; a start does what a crash in between has left undone (`Volume::catch_up`).

use std::{
    sync::{MutexGuard, TryLockError},
    thread,
    time::{Duration, Instant},
};

use common::{
    durable::DurableError,
    snapshot::{Snapshot, SnapshotName, VolumeName},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    publish::PublishError,
    store::StoreError,
    verify::{self, VerifyError},
    volume::{Volume, lock},
    wishes::{Choice, Hold},
};

/// How long an operator waits for the deletion of one snapshot, and how often it is looked.
const MAX_ORDER_WAIT: Duration = Duration::from_secs(30);
const ORDER_POLL: Duration = Duration::from_millis(20);

/// What an operator asks for. A snapshot's name says which volume it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", tag = "do")]
pub enum Request {
    /// Never delete it.
    Hold {
        /// Which.
        snapshot: SnapshotName,
        /// Why; may be empty.
        why: String,
    },
    /// Retention may delete it again.
    Release {
        /// Which.
        snapshot: SnapshotName,
    },
    /// Publish it.
    Publish {
        /// Which.
        snapshot: SnapshotName,
        /// Whether it stays published, whatever arrives.
        pin: bool,
    },
    /// Publish the newest, and again whatever arrives.
    PublishLatest {
        /// Of which volume.
        volume: VolumeName,
    },
}

impl Request {
    /// Which volume it is about.
    pub fn volume(&self) -> &VolumeName {
        match self {
            Self::Hold { snapshot, .. } | Self::Release { snapshot } | Self::Publish { snapshot, .. } => {
                snapshot.volume()
            }
            Self::PublishLatest { volume } => volume,
        }
    }
}

/// Why a request is not done. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no such snapshot, or it is not complete.
    #[error("there is no complete snapshot {0} in the store; `snapshots` lists what there is")]
    Unknown(SnapshotName),
    /// Nobody holds it.
    #[error("{0} is not held; `snapshots` shows what is")]
    NotHeld(SnapshotName),
    /// There is nothing yet.
    #[error("there is no complete snapshot of the volume {0} yet")]
    Nothing(VolumeName),
    /// A deletion is in the way, which may be of the very snapshot.
    #[error("a snapshot is being deleted, and that takes long; the log says which; try again later")]
    Busy,
    /// It cannot be written down.
    #[error(transparent)]
    State(#[from] DurableError),
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The snapshot is not what it should be.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// It cannot be published.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

impl Volume {
    /// Does what an operator asks for; returns what to tell the operator.
    ///
    /// # Errors
    /// See [`RequestError`].
    pub fn obey(&self, request: &Request) -> Result<String, RequestError> {
        // What is about to be pruned must not be held or published in between.
        let _order = self.turn_for_order()?;
        match request {
            Request::Hold { snapshot, why } => self.hold(snapshot, why),
            Request::Release { snapshot } => self.release(snapshot),
            Request::Publish { snapshot, pin } => self.publish_chosen(snapshot, *pin),
            Request::PublishLatest { .. } => self.publish_latest(),
        }
    }

    fn turn_for_order(&self) -> Result<MutexGuard<'_, ()>, RequestError> {
        let given_up = Instant::now() + MAX_ORDER_WAIT;
        loop {
            match self.gate.orders.try_lock() {
                Ok(turn) => return Ok(turn),
                Err(TryLockError::Poisoned(turn)) => return Ok(turn.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() < given_up => thread::sleep(ORDER_POLL),
                Err(TryLockError::WouldBlock) => return Err(RequestError::Busy),
            }
        }
    }

    fn hold(&self, name: &SnapshotName, why: &str) -> Result<String, RequestError> {
        let snapshot = self.complete(name)?;
        let hold = Hold { why: why.to_owned(), since: Timestamp::now(), snapshot };
        lock(&self.wishes).change(|state| {
            state.holds.retain(|other| other.snapshot.id != hold.snapshot.id);
            state.holds.push(hold);
        })?;
        tracing::info!(volume = %self.config.name, snapshot = %name, why, "held");
        Ok(format!("{name} is held: it is not deleted until `release {name}`"))
    }

    fn release(&self, name: &SnapshotName) -> Result<String, RequestError> {
        let mut wishes = lock(&self.wishes);
        if !wishes.state().holds.iter().any(|hold| hold.snapshot.name == *name) {
            return Err(RequestError::NotHeld(name.clone()));
        }
        wishes.change(|state| state.holds.retain(|hold| hold.snapshot.name != *name))?;
        tracing::info!(volume = %self.config.name, snapshot = %name, "released");
        Ok(format!("{name} is released: retention decides again"))
    }

    fn publish_chosen(&self, name: &SnapshotName, pin: bool) -> Result<String, RequestError> {
        let (snapshot, newest) = (self.complete(name)?, self.newest()?);
        let choice = match pin {
            true => Some(Choice::Pinned(snapshot.clone())),
            false if snapshot == newest => None,
            false => Some(Choice::RolledBack { to: snapshot.clone(), over: newest.clone() }),
        };
        self.choose(&snapshot, choice.clone())?;
        let volume = &self.config.name;
        Ok(match choice {
            None => format!("{name} is published; it is the newest"),
            Some(Choice::Pinned(_)) => {
                tracing::info!(%volume, %snapshot, "publication pinned");
                format!(
                    "{name} is published, and stays so: what arrives is kept, but not published until `publish --latest`"
                )
            }
            Some(Choice::RolledBack { .. }) => {
                tracing::info!(%volume, %snapshot, newest = %newest, "rolled back");
                format!("{name} is published until the next transfer ends; `--pin` would keep it published")
            }
        })
    }

    fn publish_latest(&self) -> Result<String, RequestError> {
        let newest = self.newest()?;
        self.choose(&newest, None)?;
        tracing::info!(volume = %self.config.name, snapshot = %newest, "publication follows the newest");
        Ok(format!("{newest} is published, and what arrives next will be"))
    }

    /// Publishes `snapshot` and remembers why; if it cannot be published, what was wished before holds on.
    fn choose(&self, snapshot: &Snapshot, choice: Option<Choice>) -> Result<(), RequestError> {
        let verified = verify::verify(&self.store, snapshot)?;
        let mut publisher = self.publisher();
        let mut wishes = lock(&self.wishes);
        let before = wishes.state().choice.clone();
        wishes.change(|state| state.choice = choice)?;
        if let Err(error) = publisher.publish(verified) {
            // The first error is the one to tell.
            let _ = wishes.change(|state| state.choice = before);
            return Err(error.into());
        }
        Ok(())
    }

    fn complete(&self, name: &SnapshotName) -> Result<Snapshot, RequestError> {
        let found = self.store.snapshots()?.into_iter().find(|found| found.snapshot.name == *name);
        found.map(|found| found.snapshot).ok_or_else(|| RequestError::Unknown(name.clone()))
    }

    fn newest(&self) -> Result<Snapshot, RequestError> {
        let newest = self.store.snapshots()?.into_iter().next();
        newest.map(|found| found.snapshot).ok_or_else(|| RequestError::Nothing(self.config.name.clone()))
    }
}

#[cfg(test)]
pub(crate) mod tests;
