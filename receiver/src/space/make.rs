//! Makes room for a transfer: prunes what may go, and waits for the cleaner.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    btrfs::{self, Space},
    exit::chain,
    wire::message::Refusal,
};
use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{Resource, Shortage, Verdict, claim::Claim, refusal::refuse, room::Look};
use crate::{
    store::StoreError,
    volume::{Refused, Volume},
};

/// How long the cleaner is waited for at most. It frees some ten thousand files a second, or some hundred on a slow disk; what it has
/// not freed by then the next cycle of the sender finds.
const MAX_CLEANER_WAIT: Duration = Duration::from_secs(600);

/// And how long while nothing changes: a deletion may be stuck.
const MAX_IDLE_WAIT: Duration = Duration::from_secs(60);

/// How long a former snapshot is waited for that may only be in its grace: longer than that grace.
const MAX_RETIRE_WAIT: Duration = Duration::from_secs(3);

/// How often it is looked again. Each time is a commit.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often a wait is reported.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

/// Makes sure that there is room for what is claimed: if there is not, former snapshots without clients are retired, what retention
/// lets go is deleted, and the cleaner waited for. `midway`: the transfer goes on meanwhile.
///
/// Dropped, it stops.
///
/// # Errors
/// There is too little all the same: with need, have, and what would help.
pub async fn make(volume: &Arc<Volume>, claim: &Arc<Claim>, midway: bool) -> Result<(), Refused> {
    let stop = CancellationToken::new();
    let _stop_with_us = stop.clone().drop_guard();
    let Verdict::Short(short) = attempt(volume, claim, midway, &stop).await?.verdict else { return Ok(()) };
    let (name, snapshot) = (&volume.config.name, &claim.snapshot);
    let (what, Shortage { need, have, .. }) = (short.of.to_string(), short);
    tracing::info!(volume = %name, %snapshot, what, need, have, "too little room: pruning what may go");
    let mut wait = Wait::new();
    loop {
        let ours = Arc::clone(volume);
        let (pending, retiring) = blocking(move || prune(&ours)).await?;
        let look = attempt(volume, claim, true, &stop).await?;
        let Verdict::Short(short) = look.verdict else {
            let seconds = wait.begun.elapsed().as_secs_f64();
            tracing::info!(volume = %name, %snapshot, seconds, "there is room now");
            return Ok(());
        };
        if !wait.may_help(short, &pending, retiring, &look.space) {
            let (ours, claim) = (Arc::clone(volume), Arc::clone(claim));
            let refusal = move || Ok(refuse(&ours, &claim.snapshot, &look, "", &stop));
            return Err(blocking(refusal).await?);
        }
        wait.report(claim, short, pending.len(), retiring);
        sleep(LOOK_INTERVAL).await;
    }
}

/// Looks once; counts what the snapshots take if that decides.
async fn attempt(
    volume: &Arc<Volume>,
    claim: &Arc<Claim>,
    settle: bool,
    stop: &CancellationToken,
) -> Result<Look, Refused> {
    let (volume, claim, stop) = (Arc::clone(volume), Arc::clone(claim), stop.clone());
    let attempt = move || {
        let (room, position) = (&volume.room, claim.position());
        if settle {
            btrfs::start_cleaner(room.store.dir())?;
        }
        let look = room.look(&claim, position)?;
        if let Verdict::Short(Shortage { of: Resource::MaxSize, .. }) = look.verdict {
            room.count(&room.holders()?, || stop.is_cancelled())?;
            return Ok(room.look(&claim, position)?);
        }
        Ok(look)
    };
    blocking(attempt).await
}

/// Deletes what may go. Returns what the cleaner still has to do, and whether former snapshots are still mounted.
fn prune(volume: &Volume) -> Result<(Vec<u64>, bool), StoreError> {
    volume.tidy()?;
    Ok((btrfs::being_deleted(volume.store.dir())?, volume.is_retiring()))
}

/// For how long it makes sense to wait.
struct Wait {
    begun: Instant,
    said: Option<Instant>,
    /// When something changed last: what is being deleted, or what is taken.
    changed: Instant,
    state: (Vec<u64>, u64),
}

impl Wait {
    fn new() -> Self {
        let now = Instant::now();
        Self { begun: now, said: None, changed: now, state: Default::default() }
    }

    fn may_help(&mut self, short: Shortage, pending: &[u64], retiring: bool, space: &Space) -> bool {
        let state = (pending.to_vec(), space.data.used.saturating_add(space.metadata.used));
        if state != self.state {
            (self.state, self.changed) = (state, Instant::now());
        }
        let elapsed = self.begun.elapsed();
        let moving = self.changed.elapsed() < MAX_IDLE_WAIT && elapsed < MAX_CLEANER_WAIT;
        // What the cleaner frees are bytes of the disk, not a part of what is left to the volume.
        let cleaning = !pending.is_empty() && moving && short.of != Resource::MaxSize;
        cleaning || (retiring && elapsed < MAX_RETIRE_WAIT)
    }

    fn report(&mut self, claim: &Claim, Shortage { need, have, .. }: Shortage, deletions: usize, retiring: bool) {
        if self.said.is_none_or(|said| said.elapsed() >= REPORT_INTERVAL) {
            self.said = Some(Instant::now());
            let (volume, snapshot) = (claim.snapshot.name.volume(), &claim.snapshot);
            let seconds = self.begun.elapsed().as_secs_f64();
            tracing::info!(
                %volume, %snapshot, need, have, deletions, retiring, seconds,
                "waiting for the cleaner to free what is deleted, and for former snapshots to retire"
            );
        }
    }
}

/// Runs what blocks in a thread that may block. What cannot be read is no reason to end the conversation: the sender tries again.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refused> {
    let busy = |detail: String| Refused { why: Refusal::Busy, detail };
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| busy(chain(&error))),
        Err(_) => Err(busy("a thread of the receiver died; please report it".to_owned())),
    }
}
