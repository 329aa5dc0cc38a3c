//! A volume as the agent runs it: store, publisher, and the one transfer that may be under way.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError},
    time::{Duration, Instant},
};

use common::{
    btrfs::Found,
    deletion::{Deletions, Pace},
    durable::DurableError,
    lock::{Lock, LockError},
    retention::{self, Reason},
    snapshot::{Snapshot, SnapshotId},
    wire::message::{Inventory, Offer, Refusal, Unfinished},
};
use jiff::Timestamp;
use tokio::{sync::OwnedMutexGuard, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    apply::{Application, Feed, Order, Rhythm},
    checkpoint::Checkpoint,
    config,
    prune::{self, Gate},
    publish::{PublishError, Published, Publisher},
    space::Room,
    store::{Store, StoreError},
    verify::{self, Verified, VerifyError},
    wishes::Wishes,
};

/// How long a transfer that is pushed aside by its own sender's new connection may take to clean up.
const MAX_TAKE_OVER: Duration = Duration::from_secs(10);

/// A volume.
pub struct Volume {
    /// As configured.
    pub config: config::Volume,
    /// Where its snapshots are.
    pub store: Store,
    /// How much room they have.
    pub room: Room,
    publisher: Mutex<Publisher>,
    mount_point: PathBuf,
    under_way: Arc<tokio::sync::Mutex<Option<Parked>>>,
    cancel_under_way: Mutex<CancellationToken>,
    current: Current,
    /// Holds, and what is published by name. Locked after the publisher, if both are.
    pub wishes: Mutex<Wishes>,
    /// What is deleted, and not yet gone.
    pub deletions: Arc<Deletions>,
    /// Its `orders` are locked before all others.
    pub gate: Gate,
    /// Locked by whoever prunes: one at a time.
    pruning: Mutex<()>,
    _lock: Lock,
}

/// What is on its way, from its admission until its turn ends with nothing parked. Its base must not be pruned, and a sender that
/// asks meanwhile must hear of it, whether the death of its older connection was noticed already or not.
type Current = Arc<Mutex<Option<Unfinished>>>;

/// The right to transfer into a volume, and the token that takes it away.
pub struct Turn {
    /// What waits for its sender since its connection broke.
    pub parked: OwnedMutexGuard<Option<Parked>>,
    /// Cancelled when a newer connection takes the turn.
    pub taken_over: CancellationToken,
    current: Current,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.parked.is_none() {
            *lock(&self.current) = None;
        }
    }
}

/// A transfer without a connection: everything else of it is alive.
#[derive(Debug)]
pub struct Parked {
    /// Tells two parkings of one transfer apart.
    pub serial: u64,
    /// What is applied.
    pub offer: Offer,
    /// The thread that applies it.
    pub application: Application,
    /// Where the next block belongs; None before the sender has found the mark of the checkpoint.
    pub fed: Option<u64>,
    /// What has come, and counts in `fed`, while the application had no room for it.
    pub waiting: Option<Feed>,
    /// When the end of the stream came.
    pub ended: Option<Instant>,
}

/// Why a volume cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A directory that the agent needs.
    #[error("cannot make the directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another agent holds it.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The published tree.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// A snapshot that should be published is not what it should be.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// Holds and pins cannot be read or written.
    #[error("it is not known what is held and what is pinned")]
    Wishes(#[source] DurableError),
}

/// What became of a verified snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Publication {
    /// New clients see it.
    Done(Published),
    /// It stays, unpublished: an operator pinned another.
    Pinned(Snapshot),
}

/// Why an offer is not taken, for both sides.
#[derive(Debug)]
pub struct Refused {
    /// For the program.
    pub why: Refusal,
    /// For people.
    pub detail: String,
}

impl Refused {
    /// For want of room: what was needed and what there was, in bytes.
    pub fn no_room(&self) -> Option<(u64, u64)> {
        match self.why {
            Refusal::NoSpace { need, have } => Some((need, have)),
            _ => None,
        }
    }
}

impl Volume {
    /// Opens the volume: locks it, removes what a crash left behind, brings the published tree back.
    ///
    /// # Errors
    /// See [`VolumeError`]. Nothing is accepted before all of this is done, and [`Self::catch_up`] too.
    pub fn open(config: &config::Volume, state_dir: &Path) -> Result<Self, VolumeError> {
        let mount_point = state_dir.join("receive");
        for path in [&config.store, &config.publish, &mount_point] {
            std::fs::create_dir_all(path).map_err(|source| VolumeError::Directory { path: path.clone(), source })?;
        }
        let lock = Lock::acquire(&config.store.join(format!(".{}.lock", config.name)))?;
        let wishes = Wishes::load(state_dir, &config.name).map_err(VolumeError::Wishes)?;
        let store = Store::open(&config.store, config.name.clone())?;
        let checkpoint = Checkpoint::load(&store);
        if checkpoint.is_none() {
            Checkpoint::forget(&store).map_err(StoreError::Record)?;
        }
        store.sweep(checkpoint.as_ref())?;
        let unrecovered = Publisher::open(&config.name, &config.publish, state_dir)?;
        let (publisher, _) = unrecovered.recover(&store.snapshots()?)?;
        Ok(Self {
            config: config.clone(),
            room: Room::open(&store, config)?,
            store,
            publisher: Mutex::new(publisher),
            mount_point,
            under_way: Arc::default(),
            cancel_under_way: Mutex::default(),
            current: Current::default(),
            wishes: Mutex::new(wishes),
            deletions: Deletions::new(&config.store, &config.name, Pace::default()),
            gate: Gate::default(),
            pruning: Mutex::default(),
            _lock: lock,
        })
    }

    /// Publishes what was complete, and so verified, when the agent ended, but not published yet; unless an operator chose another.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn catch_up(&self) -> Result<(), VolumeError> {
        let complete: Vec<Snapshot> = self.store.snapshots()?.into_iter().map(|found| found.snapshot).collect();
        let mut publisher = self.publisher();
        let wishes = lock(&self.wishes);
        if let Some(choice) = &wishes.state().choice {
            let (snapshot, is_pinned) = (choice.snapshot(), wishes.pinned().is_some());
            tracing::info!(volume = %self.config.name, %snapshot, is_pinned, "an operator chose what is published");
            if !complete.contains(snapshot) {
                tracing::warn!(volume = %self.config.name, %snapshot, "it is not in the store any more; `publish --latest` goes back to the newest");
            }
        }
        if let Some(snapshot) = wishes.to_publish(publisher.published(), &complete) {
            tracing::info!(volume = %self.config.name, %snapshot, "complete, but not published yet");
            publisher.publish(verify::verify(&self.store, snapshot)?)?;
        }
        Ok(())
    }

    /// What the sender may ask for.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn inventory(&self, stream_version: u32) -> Result<Inventory, StoreError> {
        let snapshots = self.store.snapshots()?.into_iter().map(|found| found.snapshot).collect();
        let published = self.publisher().published().cloned();
        let pinned = lock(&self.wishes).pinned().is_some();
        Ok(Inventory { snapshots, published, unfinished: self.unfinished(), stream_version, pinned })
    }

    /// The transfer that can go on: one that is under way or waits for its sender makes checkpoints too, or soon will.
    fn unfinished(&self) -> Option<Unfinished> {
        let kept =
            || Checkpoint::load(&self.store).map(|Checkpoint { snapshot, base, .. }| Unfinished { snapshot, base });
        lock(&self.current).clone().or_else(kept)
    }

    /// Takes the turn to transfer. A transfer under way is ended: its sender has a new connection, or it would not offer again.
    /// (Another agent cannot be in the way: its certificate is not the pinned one, or its volume lock kept it from starting.)
    pub async fn take_turn(&self) -> Result<Turn, Refused> {
        let taken_over = CancellationToken::new();
        let before = std::mem::replace(&mut *lock(&self.cancel_under_way), taken_over.clone());
        before.cancel();
        match timeout(MAX_TAKE_OVER, Arc::clone(&self.under_way).lock_owned()).await {
            Ok(parked) => Ok(Turn { parked, taken_over, current: Arc::clone(&self.current) }),
            Err(_) => Err(Refused {
                why: Refusal::Busy,
                detail: format!(
                    "the transfer before this one does not end; look for a btrfs receive in D state: volume {}",
                    self.config.name
                ),
            }),
        }
    }

    /// Admits an offer: everything that can be known before the first byte.
    ///
    /// # Errors
    /// [`Refused`] with what would help.
    pub fn admit(&self, offer: &Offer, stream_version: u32) -> Result<Admitted, Refused> {
        let broken = |error: StoreError| Refused { why: Refusal::Busy, detail: error.to_string() };
        let bad = |detail: String| Refused { why: Refusal::BadOffer, detail };
        if offer.snapshot.name.volume() != &self.config.name {
            return Err(bad(format!("{} is no snapshot of volume {}", offer.snapshot.name, self.config.name)));
        }
        if !(1..=stream_version).contains(&offer.stream_version) {
            return Err(bad(format!("stream version {} is not one of 1 to {stream_version}", offer.stream_version)));
        }
        if offer.base.as_ref().is_some_and(|base| base.id.uuid == offer.snapshot.id.uuid) {
            return Err(bad("the snapshot is offered as its own base".to_owned()));
        }
        let checkpoint = self.checkpoint_for(offer).map_err(broken)?;
        if self.store.find(offer.snapshot.id).map_err(broken)?.is_some() {
            return verify::verify(&self.store, &offer.snapshot).map(Admitted::Complete).map_err(|error| Refused {
                why: Refusal::NameTaken,
                detail: format!("the snapshot is here under another name: {error}"),
            });
        }
        let path = self.store.path_of(&offer.snapshot.name);
        if path.symlink_metadata().is_ok() {
            return Err(Refused {
                why: Refusal::NameTaken,
                detail: format!(
                    "{} is in the way: not a snapshot that snapferry received as {}",
                    path.display(),
                    offer.snapshot.id
                ),
            });
        }
        // First said, then looked for: see `Gate`. If it is refused, its turn ends, and this with it.
        *lock(&self.current) = Some(Unfinished { snapshot: offer.snapshot.clone(), base: offer.base.clone() });
        if let Some(base) = &offer.base
            && (*lock(&self.gate.condemned) == Some(base.id) || self.store.find(base.id).map_err(broken)?.is_none())
        {
            return Err(Refused {
                why: Refusal::BaseMissing,
                detail: format!("the base {base} is not in {}", self.store.dir().display()),
            });
        }
        Ok(Admitted::Order(Box::new(Order {
            volume: self.config.name.clone(),
            offer: offer.clone(),
            store: self.store.clone(),
            mount_point: self.mount_point.clone(),
            claim: self.room.claim(offer, checkpoint.as_ref().map_or(0, |checkpoint| checkpoint.position)),
            checkpoint,
            rhythm: Rhythm { bytes: self.config.checkpoint, time: self.config.checkpoint_interval },
        })))
    }

    /// The checkpoint of the offered transfer. Whatever else is left of others is removed: one volume, one transfer.
    fn checkpoint_for(&self, offer: &Offer) -> Result<Option<Checkpoint>, StoreError> {
        let checkpoint = Checkpoint::load(&self.store).filter(|checkpoint| offer.resume && checkpoint.fits(offer));
        if checkpoint.is_none() {
            Checkpoint::forget(&self.store).map_err(StoreError::Record)?;
        }
        self.store.sweep(checkpoint.as_ref())?;
        Ok(checkpoint)
    }

    /// Lets a transfer wait for its sender.
    pub fn park(turn: &mut Turn, parked: Parked) {
        *turn.parked = Some(parked);
    }

    /// What is parked, if it still is the parking of that number, with the turn that it was parked in.
    pub async fn unpark(&self, serial: u64) -> Option<(Turn, Parked)> {
        let mut guard = Arc::clone(&self.under_way).lock_owned().await;
        let parked = guard.take_if(|parked| parked.serial == serial)?;
        let taken_over = lock(&self.cancel_under_way).clone();
        Some((Turn { parked: guard, taken_over, current: Arc::clone(&self.current) }, parked))
    }

    /// Ends what is parked, down to its checkpoint: for the shutdown.
    pub async fn abandon_parked(&self) {
        if let Some(parked) = self.under_way.lock().await.take() {
            parked.application.abandon().await;
        }
    }

    /// Publishes what a transfer brought, unless an operator pinned another. A roll-back ends with it.
    ///
    /// # Errors
    /// See [`PublishError`]; the snapshot before stays published.
    pub fn publish(&self, verified: Verified) -> Result<Publication, PublishError> {
        let mut publisher = self.publisher();
        let mut wishes = lock(&self.wishes);
        if let Some(pinned) = wishes.pinned().filter(|pinned| *pinned != verified.snapshot()) {
            let snapshot = verified.snapshot();
            tracing::info!(volume = %self.config.name, %snapshot, %pinned, "arrived, not published: publication is pinned");
            return Ok(Publication::Pinned(pinned.clone()));
        }
        if wishes.pinned().is_none() {
            // First: a start after a crash here publishes the newest, and that is this one.
            wishes.change(|state| state.choice = None)?;
        }
        publisher.publish(verified).map(Publication::Done)
    }

    /// Whether clients are still inside a former snapshot.
    pub fn is_retiring(&self) -> bool {
        !self.publisher().retiring().is_empty()
    }

    /// Unmounts former snapshots whose last client has left, then prunes.
    ///
    /// # Errors
    /// As [`Self::prune`].
    #[allow(dead_code, reason = "for whoever needs room at once")]
    pub fn tidy(&self) -> Result<(), StoreError> {
        self.retire();
        self.prune()
    }

    /// Unmounts former snapshots whose last client has left. Whether there were any.
    pub fn retire(&self) -> bool {
        !self.publisher().retire().is_empty()
    }

    /// Deletes what retention lets go, unless somebody is at it already. May take as long as the kernel wants.
    ///
    /// # Errors
    /// The store cannot be read. What cannot be deleted is logged and tried again.
    pub fn prune(&self) -> Result<(), StoreError> {
        let _one_at_a_time = match self.pruning.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let plan = |present: &[Found]| {
            let snapshots: Vec<Snapshot> = present.iter().map(|found| found.snapshot.clone()).collect();
            self.retention(&snapshots, Timestamp::now())
        };
        prune::execute(&self.store, &self.deletions, &self.gate, plan)?;
        Ok(())
    }

    /// What retention says of `snapshots` at `now`: never the published one, a retiring or held one, or the newest, which is the
    /// sender's base.
    pub fn retention(&self, snapshots: &[Snapshot], now: Timestamp) -> retention::Plan {
        let publisher = self.publisher();
        let published = publisher.published().map(|snapshot| (snapshot.id, Reason::Published));
        let retiring = publisher.retiring().iter().filter_map(|retiring| retiring.snapshot.as_ref());
        let retiring = retiring.map(|snapshot| (snapshot.id, Reason::Retiring));
        let base = self.unfinished().and_then(|unfinished| unfinished.base).map(|base| (base.id, Reason::Unfinished));
        let kept: Vec<(SnapshotId, Reason)> =
            published.into_iter().chain(lock(&self.wishes).reasons()).chain(retiring).chain(base).collect();
        retention::plan(snapshots, &self.config.keep, now, &kept)
    }

    /// The publisher; whoever panicked with it in hand left it at a numbered step, which is as good as a crash there.
    pub fn publisher(&self) -> MutexGuard<'_, Publisher> {
        lock(&self.publisher)
    }
}

/// What admission makes of an offer.
#[derive(Debug)]
pub enum Admitted {
    /// It is here already.
    Complete(Verified),
    /// It can be applied.
    Order(Box<Order>),
}

/// Locks, also what somebody panicked with in hand: all that is behind a mutex here changes in one step or is durable.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
