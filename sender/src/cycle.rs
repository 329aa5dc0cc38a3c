//! One cycle of a volume, in the order of the words: snapshot, plan, transfer (the receiver verifies and publishes), prune.

use std::{
    path::PathBuf,
    pin::pin,
    sync::atomic::AtomicU64,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use common::{
    btrfs::{self, Found},
    deletion::Deletions,
    durable::{self, DurableError},
    link::LinkError,
    retention::{self, Reason},
    snapshot::{Snapshot, SnapshotId, VolumeName},
    stream::Total,
    wire::message::{Inventory, Offer, Refusal, Stage, Unfinished},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    config,
    connect::{ConnectError, ReceiverLink, Route, connect, query},
    create::{CreateError, Order, Site},
    hazard, pack,
    plan::{Base, Plan, Which, plan},
    prune,
    push::{Outcome, PushError, Transfer},
    report::Reporter,
    send::{SendError, Source, TotalPass},
    unsent,
};

/// An increment's total is usually known within this time; then the offer carries it. Else it follows.
const QUICK_TOTAL: Duration = Duration::from_millis(300);

/// Counting what is not quick begins so much later than the transfer at the most.
const LONGEST_HEAD_START: Duration = Duration::from_secs(5);

/// A progress bar moves this often.
const BAR_INTERVAL: Duration = Duration::from_millis(200);

/// Deletions that take longer than this go on beside the next cycle.
const MAX_PRUNING: Duration = Duration::from_secs(30);

/// A volume with all that its cycles need.
pub struct Volume {
    /// As configured.
    pub config: config::Volume,
    /// To the receiver.
    pub route: Route,
    /// Where the last confirmed base is remembered.
    pub state_file: PathBuf,
    /// How often a running transfer reports.
    pub progress_interval: Duration,
    /// Where the receiver had a checkpoint when it was last asked to go on: canonical commands behind it, 0 for none.
    pub resumed_at: AtomicU64,
    /// The newest snapshot when the log said last that snapshots wait for the receiver.
    pub warned_of: Mutex<Option<SnapshotId>>,
    /// What is deleted, and not yet gone.
    pub deletions: Arc<Deletions>,
    /// Locked while snapshots are being deleted, however long that takes.
    pub pruning: Arc<tokio::sync::Mutex<()>>,
    /// Whether nested subvolumes and quotas were looked for, and the log says what was found.
    pub looked_for_hazards: AtomicBool,
    /// The total that was counted last: a transfer that found no room is offered again and again, and must not be begun to find out.
    pub counted: Mutex<Option<CountedTotal>>,
}

/// Snapshots that wait for the receiver, and what is known of what they cost without hours of counting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// So many.
    pub count: usize,
    /// What the receiver is known to have: nothing that was deleted from the source since then is freed.
    pub base: Option<Snapshot>,
    /// How old it is; without one, the oldest of those that wait.
    pub age: Duration,
    /// What the file system of the source has free, in bytes; None if it does not say.
    pub free: Option<u64>,
}

/// A total, and of what it is.
#[derive(Debug, Clone, Copy)]
pub struct CountedTotal {
    snapshot: SnapshotId,
    base: Option<SnapshotId>,
    stream_version: u32,
    total: Total,
}

/// What survives a restart: needed only to keep pruning safe while the receiver cannot be asked.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct State {
    /// The newest snapshot of which the receiver said that it is published there, or has arrived.
    pub confirmed: Option<Snapshot>,
    /// The transfer that was begun last, until it ends well.
    pub unfinished: Option<Unfinished>,
}

/// What a plan says to send.
#[derive(Clone, Copy)]
struct What<'a> {
    snapshot: &'a Snapshot,
    base: &'a Base,
    /// It was interrupted.
    resumed: bool,
    /// It may go on.
    resume: bool,
}

/// Why a cycle ended early. Nothing is lost by it: the next one begins where the file system says.
#[derive(Debug, thiserror::Error)]
pub enum CycleError {
    /// No snapshot could be taken.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// Our snapshots cannot be listed.
    #[error(transparent)]
    Btrfs(#[from] btrfs::BtrfsError),
    /// There is none, and none was to be taken.
    #[error("there is no snapshot of the volume in {0}")]
    NoSnapshot(PathBuf),
    /// Somebody deleted one that the plan is about.
    #[error("the snapshot {0} vanished; the next cycle plans without it")]
    Vanished(Snapshot),
    /// The receiver.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The snapshot cannot be opened for sending.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The transfer.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The last confirmed base cannot be remembered.
    #[error(transparent)]
    State(#[from] DurableError),
    /// We were told to stop.
    #[error("interrupted by a shutdown")]
    Shutdown,
    /// A thread of ours died: a defect.
    #[error("a thread of the cycle died; please report it")]
    Died,
}

impl CycleError {
    /// The stage of the cycle in which it ended.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Create(_) => Stage::Snapshot,
            Self::Btrfs(_) | Self::NoSnapshot(_) | Self::Vanished(_) | Self::Connect(_) | Self::Died => Stage::Plan,
            Self::Push(PushError::Failed { stage, .. }) => *stage,
            Self::Send(_) | Self::Push(_) | Self::Shutdown => Stage::Transfer,
            Self::State(_) => Stage::Prune,
        }
    }

    /// If the receiver has too little room: the bytes that were needed, and those that there were.
    pub fn no_room(&self) -> Option<(u64, u64)> {
        match self {
            Self::Push(PushError::Refused { why: Refusal::NoSpace { need, have }, .. }) => Some((*need, *have)),
            _ => None,
        }
    }

    /// Whether the cycle ended because we were told to stop.
    pub fn is_shutdown(&self) -> bool {
        matches!(self, Self::Shutdown | Self::Push(PushError::Shutdown))
    }
}

impl Volume {
    /// Our snapshots of the volume, newest first.
    ///
    /// # Errors
    /// The snapshot directory cannot be read.
    pub fn snapshots(&self) -> Result<Vec<Found>, CycleError> {
        Ok(btrfs::snapshots(&self.config.snapshot_dir, &self.config.name)?)
    }

    /// Deletes what a killed agent left of a snapshot that was being made.
    pub async fn sweep(&self) {
        let config = self.config.clone();
        let swept = blocking(move || Site::open(&config.source, &config.snapshot_dir)?.sweep(&config.name)).await;
        if let Ok(Err(error)) = swept {
            tracing::debug!(volume = %self.config.name, %error, "not swept; taking a snapshot will meet the same trouble");
        }
    }

    /// Takes a snapshot, filtered as configured. A shutdown leaves none.
    ///
    /// # Errors
    /// See [`CreateError`].
    pub async fn take_snapshot(&self, shutdown: &CancellationToken) -> Result<(), CycleError> {
        let (config, progress_interval) = (self.config.clone(), self.progress_interval);
        let checked_file = self.state_file.with_extension("guix.toml");
        let looked = self.looked_for_hazards.swap(true, Ordering::Relaxed);
        let stop = Arc::new(AtomicBool::new(false));
        let (told, started) = (stop.clone(), Instant::now());
        let mut taking = pin!(blocking(move || {
            let order = Order {
                volume: &config.name,
                now: Timestamp::now(),
                filter: &config.filter,
                stop: &told,
                progress_interval,
                checked_file: &checked_file,
            };
            let site = Site::open(&config.source, &config.snapshot_dir)?;
            if !looked {
                warn_of_hazards(&config.name, &site);
            }
            site.take(&order)
        }));
        let taken = tokio::select! {
            taken = &mut taking => taken?,
            () = shutdown.cancelled() => {
                stop.store(true, Ordering::Relaxed);
                taking.await?
            }
        };
        let taken = match taken {
            Err(error) if error.is_stop() => return Err(CycleError::Shutdown),
            taken => taken?,
        };
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(volume = %self.config.name, snapshot = %taken.snapshot, seconds, "snapshot taken");
        Ok(())
    }

    /// Sends the newest snapshot, if the receiver has not published it yet, and prunes.
    ///
    /// # Errors
    /// See [`CycleError`].
    pub async fn ferry(&self, reporter: &mut Reporter, shutdown: &CancellationToken) -> Result<(), CycleError> {
        let ferried = self.connect_and_converse(true, reporter, shutdown).await;
        match ferried {
            Err(CycleError::Push(error)) if error.is_other_stream() => {
                tracing::warn!(volume = %self.config.name, error = %error, "cannot go on; starting again from nothing");
                self.connect_and_converse(false, reporter, shutdown).await
            }
            ferried => ferried,
        }
    }

    async fn connect_and_converse(
        &self,
        resume: bool,
        reporter: &mut Reporter,
        shutdown: &CancellationToken,
    ) -> Result<(), CycleError> {
        tokio::select! {
            connected = connect(&self.route, &self.config.name) => {
                let (mut link, inventory) = connected?;
                let ferried = self.converse(&mut link, inventory, resume, reporter, shutdown).await;
                link.close().await;
                ferried
            }
            () = shutdown.cancelled() => Err(CycleError::Shutdown),
        }
    }

    /// Sends until the receiver is up to date: what was interrupted first, then the newest.
    async fn converse(
        &self,
        link: &mut ReceiverLink,
        mut inventory: Inventory,
        mut resume: bool,
        reporter: &mut Reporter,
        shutdown: &CancellationToken,
    ) -> Result<(), CycleError> {
        let mut sent_any = false;
        loop {
            let found = self.snapshots()?;
            let ours: Vec<Snapshot> = found.iter().map(|found| found.snapshot.clone()).collect();
            self.say_if_vanished(&ours, &inventory);
            let (snapshot, base, resumed) = match plan(&ours, &inventory, self.which()) {
                Plan::NoSnapshot => return Err(CycleError::NoSnapshot(self.config.snapshot_dir.clone())),
                Plan::UpToDate(snapshot) => {
                    if !sent_any {
                        let pinned =
                            inventory.published.as_ref().filter(|_| inventory.pinned).map(tracing::field::display);
                        tracing::info!(volume = %self.config.name, snapshot = %snapshot, pinned, "nothing to send");
                        self.remember(State { confirmed: Some(snapshot), unfinished: None })?;
                    }
                    return Ok(());
                }
                Plan::Send { snapshot, base, resumed } => (snapshot, base, resumed && resume),
            };
            let source = open(&found, &snapshot, &base)?;
            let state: State = durable::load(&self.state_file)?.unwrap_or_default();
            let unfinished = Unfinished { snapshot: snapshot.clone(), base: base.snapshot().cloned() };
            self.remember(State { unfinished: Some(unfinished), ..state })?;
            let what = What { snapshot: &snapshot, base: &base, resumed, resume };
            self.send(link, &inventory, what, &source, reporter, shutdown).await?;
            self.remember(State { confirmed: Some(snapshot), unfinished: None })?;
            (sent_any, resume) = (true, true);
            inventory = self.ask_again(link).await?;
        }
    }

    fn remember(&self, state: State) -> Result<(), CycleError> {
        Ok(durable::store(&self.state_file, &state)?)
    }

    async fn ask_again(&self, link: &mut ReceiverLink) -> Result<Inventory, CycleError> {
        let answer = query(link, &self.config.name).await.map_err(PushError::Link)?;
        answer.map_err(|detail| CycleError::Push(PushError::Link(LinkError::Refused(detail))))
    }

    /// A transfer that cannot go on although the receiver could is worth a word: it costs what was sent already.
    fn say_if_vanished(&self, ours: &[Snapshot], inventory: &Inventory) {
        let Some(unfinished) = &inventory.unfinished else { return };
        let gone = |snapshot: &&Snapshot| !ours.contains(snapshot);
        if let Some(gone) = Some(&unfinished.snapshot).filter(gone).or_else(|| unfinished.base.as_ref().filter(gone)) {
            tracing::warn!(
                volume = %self.config.name, snapshot = %unfinished.snapshot,
                "the unfinished transfer cannot go on, {gone} is not here any more; starting again from nothing"
            );
        }
    }

    /// Which snapshots are sent.
    pub fn which(&self) -> Which {
        if self.config.every_snapshot { Which::Every } else { Which::Newest }
    }

    async fn send(
        &self,
        link: &mut ReceiverLink,
        inventory: &Inventory,
        what: What<'_>,
        source: &Source,
        reporter: &mut Reporter,
        shutdown: &CancellationToken,
    ) -> Result<(), CycleError> {
        let started = Instant::now();
        let What { snapshot, base, resumed, resume } = what;
        let stream_version = inventory.stream_version.min(btrfs::stream_version()?);
        let progress_interval = if reporter.draws() { BAR_INTERVAL } else { self.progress_interval };
        // It is wanted for what is reported: the first time when this is over.
        let (total, later) = self.total(source, stream_version, what, progress_interval / 2).await?;
        let offer = Offer {
            snapshot: snapshot.clone(),
            base: base.snapshot().cloned(),
            stream_version,
            digest: self.config.digest,
            root_times: source.root_times()?,
            total,
            run: uuid::Uuid::new_v4().into_bytes(),
            resume,
        };
        reporter.started(snapshot, base, resumed, total);
        let mut transfer = Transfer {
            source,
            offer,
            options: pack::Options {
                digest: self.config.digest,
                compress: self.config.compression.is_on(),
                skip_to: None,
            },
            shutdown,
            progress_interval,
            total: later,
            route: &self.route,
            resumed_at: &self.resumed_at,
        };
        let pushed = transfer.push(link, reporter).await;
        self.note_total(&transfer.offer);
        let outcome: Outcome = pushed?;
        reporter.finished(snapshot, base, &outcome, started.elapsed());
        Ok(())
    }

    /// The exact total: at once for what is quick, else through the channel, at idle priority beside the send.
    async fn total(
        &self,
        source: &Source,
        stream_version: u32,
        What { snapshot, base, .. }: What<'_>,
        head_start: Duration,
    ) -> Result<(Option<Total>, Option<mpsc::Receiver<Total>>), CycleError> {
        let base = base.snapshot().map(|base| base.id);
        let counted = *self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |counted: &CountedTotal| {
            (counted.snapshot, counted.base, counted.stream_version) == (snapshot.id, base, stream_version)
        };
        if let Some(counted) = counted.filter(same) {
            return Ok((Some(counted.total), None));
        }
        let mut pass: TotalPass = source.total(stream_version)?;
        if base.is_some()
            && let Some(total) = pass.wait(QUICK_TOTAL).await
        {
            return Ok((Some(total?), None));
        }
        pass.be_idle(head_start.min(LONGEST_HEAD_START));
        Ok((None, Some(pass.into_channel())))
    }

    fn note_total(&self, offer: &Offer) {
        if let Some(total) = offer.total {
            let Offer { snapshot, base, stream_version, .. } = offer;
            let (snapshot, base) = (snapshot.id, base.as_ref().map(|base| base.id));
            let counted = CountedTotal { snapshot, base, stream_version: *stream_version, total };
            *self.counted.lock().unwrap_or_else(PoisonError::into_inner) = Some(counted);
        }
    }

    /// Deletes what retention lets go; never the newest, never the last confirmed base.
    ///
    /// # Errors
    /// What cannot be read; a snapshot that cannot be deleted is logged and tried again after the next cycle.
    pub async fn prune(&self) -> Result<(), CycleError> {
        let (found, now) = (self.snapshots()?, Timestamp::now());
        self.warn_of_waiting(&found, now)?;
        let plan = self.retention(&found, now)?;
        let Ok(turn) = Arc::clone(&self.pruning).try_lock_owned() else {
            tracing::warn!(volume = %self.config.name, "the deletions of an earlier cycle have not ended; pruning is left to the next");
            return Ok(());
        };
        let (dir, name, deletions) =
            (self.config.snapshot_dir.clone(), self.config.name.clone(), Arc::clone(&self.deletions));
        let pruning = blocking(move || {
            let _turn = turn;
            prune::execute(&deletions, &dir, &name, &plan)
        });
        match timeout(MAX_PRUNING, pruning).await {
            Ok(pruned) => pruned?.map(drop).map_err(CycleError::from),
            // The log names what it hangs in. It goes on, and so does the next cycle.
            Err(_) => Ok(()),
        }
    }

    /// A warning for each new snapshot, once more than one waits for the receiver.
    fn warn_of_waiting(&self, found: &[Found], now: Timestamp) -> Result<(), CycleError> {
        let waiting = self.waiting(found, self.confirmed()?, now);
        let Some(Waiting { count, base, age, free }) = waiting.filter(|waiting| waiting.count > 1) else {
            return Ok(());
        };
        let newest = found.first().map(|found| found.snapshot.id);
        let before = std::mem::replace(&mut *self.warned_of.lock().unwrap_or_else(PoisonError::into_inner), newest);
        if before != newest {
            tracing::warn!(
                volume = %self.config.name, unsent = count, max_unsent = self.config.max_unsent,
                base = base.map_or("none".to_owned(), |base| base.to_string()), seconds = age.as_secs_f64(), free,
                "snapshots wait for the receiver; what was deleted from the source since the base stays on disk"
            );
        }
        Ok(())
    }

    /// The newest snapshot that the receiver is known to have.
    ///
    /// # Errors
    /// The state file cannot be read.
    pub fn confirmed(&self) -> Result<Option<Snapshot>, CycleError> {
        Ok(durable::load::<State>(&self.state_file)?.and_then(|state| state.confirmed))
    }

    /// The snapshots of `found` that are newer than what the receiver has; None if there are none.
    pub fn waiting(&self, found: &[Found], base: Option<Snapshot>, now: Timestamp) -> Option<Waiting> {
        let ours: Vec<Snapshot> = found.iter().map(|found| found.snapshot.clone()).collect();
        let unsent = unsent::newer(&ours, base.as_ref());
        let base = base.filter(|base| ours.contains(base));
        let since = base.as_ref().or(unsent.last())?;
        // From the future, if a clock was set back: then it has no age.
        let age = Duration::try_from(now.duration_since(since.name.taken())).unwrap_or_default();
        // It may be a symlink, to which the kernel's answer would be about another file system.
        let dir = std::fs::canonicalize(&self.config.snapshot_dir).ok();
        let free = dir.and_then(|dir| btrfs::space(&dir).ok()).map(|space| space.free);
        (!unsent.is_empty()).then_some(Waiting { count: unsent.len(), base, age, free })
    }

    /// What retention says of `found` at `now`.
    ///
    /// # Errors
    /// The state file cannot be read: then nothing may be deleted.
    pub fn retention(&self, found: &[Found], now: Timestamp) -> Result<retention::Plan, CycleError> {
        let state: State = durable::load(&self.state_file)?.unwrap_or_default();
        let confirmed = state.confirmed.iter().map(|confirmed| (confirmed.id, Reason::Base));
        let unfinished = state.unfinished.iter().flat_map(|Unfinished { snapshot, base }| {
            [Some(snapshot), base.as_ref()].into_iter().flatten().map(|snapshot| (snapshot.id, Reason::Unfinished))
        });
        let ours: Vec<Snapshot> = found.iter().map(|found| found.snapshot.clone()).collect();
        let next = self.will_be_sent(&ours, &state).into_iter().map(|snapshot| (snapshot.id, Reason::Unsent));
        let in_use: Vec<(SnapshotId, Reason)> = confirmed.chain(unfinished).chain(next).collect();
        let mut plan = retention::plan(&ours, &self.config.keep, now, &in_use);
        unsent::cap(&mut plan, &unsent::newer(&ours, state.confirmed.as_ref()), self.config.max_unsent);
        Ok(plan)
    }

    /// If every snapshot is wanted on the other side: those that are still to be sent. (A first transfer is of the newest; those
    /// before it are never sent.)
    fn will_be_sent(&self, ours: &[Snapshot], state: &State) -> Vec<Snapshot> {
        let first = state.confirmed.as_ref().or(state.unfinished.as_ref().map(|unfinished| &unfinished.snapshot));
        match (self.which(), first) {
            (Which::Every, Some(first)) => unsent::newer(ours, Some(first)),
            _ => Vec::new(),
        }
    }
}

/// Opens the snapshot and its base for sending.
///
/// # Errors
/// One of them vanished in between.
pub fn open(found: &[Found], snapshot: &Snapshot, base: &Base) -> Result<Source, CycleError> {
    let find = |wanted: &Snapshot| {
        let ours = found.iter().find(|found| found.snapshot.id == wanted.id);
        ours.ok_or_else(|| CycleError::Vanished(wanted.clone()))
    };
    Ok(Source::open(find(snapshot)?, base.snapshot().map(find).transpose()?)?)
}

/// At the first snapshot of a process: what is legal, but not what an operator expects.
fn warn_of_hazards(volume: &VolumeName, site: &Site) {
    match hazard::look(site) {
        Ok(hazards) => hazards.iter().for_each(|hazard| tracing::warn!(%volume, "{hazard}")),
        // Of no consequence for the snapshot; `check` says it too.
        Err(error) => tracing::warn!(%volume, %error, "cannot look for nested subvolumes and quotas"),
    }
}

/// Runs what blocks in a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, CycleError> {
    spawn_blocking(work).await.map_err(|_| CycleError::Died)
}
