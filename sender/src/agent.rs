//! The agent: a loop of cycles for every volume, until it is told to stop.

use std::{
    panic::resume_unwind,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use common::{lock::Lock, signals, snapshot::Snapshot};
use jiff::Timestamp;
use tokio::{
    task::{JoinSet, spawn_blocking},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    create,
    cycle::{CycleError, Volume},
    report::{self, Reporter},
    retry::Retry,
    setup::{self, SetupError},
};

/// The pause after a cycle that found no room is not shorter, however often snapshots are taken.
const LEAST_PAUSE: Duration = Duration::from_secs(1);

/// Runs cycles until a signal says stop.
///
/// # Errors
/// The machine is not as the configuration says, or another agent holds a volume.
pub async fn run(config: &Config) -> Result<(), SetupError> {
    let volumes = setup::volumes(config)?;
    let _locks = volumes.iter().map(setup::hold).collect::<Result<Vec<Lock>, _>>()?;
    let shutdown = signals::shutdown_token()?;
    tracing::info!(volumes = volumes.len(), receiver = config.receiver.address, "sender started");
    let mut loops = JoinSet::new();
    for volume in volumes {
        loops.spawn(cycles(Arc::new(volume), shutdown.clone()));
    }
    while loops.join_next().await.is_some() {}
    tracing::info!("stopped");
    Ok(())
}

/// One cycle of every volume, one after the other. All are tried; the last error counts.
///
/// # Errors
/// As [`run`], or a cycle's.
pub async fn run_once(config: &Config, reporters: report::Style) -> Result<(), OnceError> {
    let volumes = setup::volumes(config)?;
    let _locks = volumes.iter().map(setup::hold).collect::<Result<Vec<Lock>, SetupError>>()?;
    let shutdown = signals::shutdown_token().map_err(SetupError::Signals)?;
    let mut failed = None;
    for volume in volumes {
        let name = volume.config.name.clone();
        // On a worker of the runtime, as the cycles of `run` are: its parts wake each other for every block, and between a worker
        // and this thread each time would be a switch of threads.
        let cycle = tokio::spawn(single_cycle(volume, reporters, shutdown.clone()));
        if let Err(error) = cycle.await.unwrap_or_else(|panicked| resume_unwind(panicked.into_panic())) {
            report::cycle_failed(&name, &error, None);
            failed = Some(error);
        }
    }
    failed.map_or(Ok(()), |error| Err(OnceError::Cycle(error)))
}

async fn single_cycle(volume: Volume, reporters: report::Style, shutdown: CancellationToken) -> Result<(), CycleError> {
    let mut reporter = Reporter::new(&volume.config.name, reporters);
    volume.take_snapshot(&shutdown).await?;
    volume.ferry(&mut reporter, &shutdown).await?;
    volume.prune().await
}

/// Why `run --once` failed.
#[derive(Debug, thiserror::Error)]
pub enum OnceError {
    /// Before any cycle.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A cycle; it stands in the log already.
    #[error(transparent)]
    Cycle(CycleError),
}

/// The cycles of a volume, until the shutdown.
async fn cycles(volume: Arc<Volume>, shutdown: CancellationToken) {
    volume.sweep().await;
    let (mut retry, mut resumed_at) = (Retry::new(), 0);
    let mut taken = None;
    while !shutdown.is_cancelled() {
        let pause = match cycle(&volume, &shutdown, &mut taken).await {
            Ok(()) => {
                retry = Retry::new();
                until_due(&volume, taken).await
            }
            Err(error) if error.is_shutdown() => return,
            Err(error) => {
                // Farther on than the one before: not a row of failures, but a transfer that gets ahead in spite of them.
                let before = std::mem::replace(&mut resumed_at, volume.resumed_at.load(Ordering::Relaxed));
                if resumed_at > before {
                    retry = Retry::new();
                }
                let pause = match error.no_room() {
                    // Room appears when somebody makes some: with the next snapshot, or in a minute, is soon enough.
                    Some(_) => retry.longest().min(until_due(&volume, taken).await.max(LEAST_PAUSE)),
                    None => retry.next(),
                };
                report::cycle_failed(&volume.config.name, &error, Some(pause));
                pause
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = shutdown.cancelled() => {}
        }
    }
}

/// Snapshot if one is due, ferry, prune. Pruning is done after a failure too: snapshots must not pile up while the receiver is away.
async fn cycle(
    volume: &Arc<Volume>,
    shutdown: &CancellationToken,
    taken: &mut Option<Instant>,
) -> Result<(), CycleError> {
    if until_due(volume, *taken).await.is_zero() {
        volume.take_snapshot(shutdown).await?;
        *taken = Some(Instant::now());
    }
    let mut reporter = Reporter::new(&volume.config.name, report::Style::Log);
    let ferried = volume.ferry(&mut reporter, shutdown).await;
    let pruned = volume.prune().await;
    ferried?;
    pruned
}

/// How long until the next snapshot is due; zero if it is, or if nobody knows.
///
/// `taken` is when this process took the last one. The names of snapshots say when they are due across restarts, but a clock that was set
/// back makes the newest one of the future: by the names alone one snapshot would follow the other without a pause.
async fn until_due(volume: &Arc<Volume>, taken: Option<Instant>) -> Duration {
    let asked = Arc::clone(volume);
    let found = spawn_blocking(move || asked.snapshots()).await;
    let newest: Option<Snapshot> = match found {
        Ok(Ok(found)) => found.into_iter().next().map(|found| found.snapshot),
        // Taking a snapshot will meet the same trouble and say so.
        Ok(Err(_)) | Err(_) => None,
    };
    let interval = volume.config.interval;
    let by_name = create::due_in(newest.as_ref().map(|newest| &newest.name), Timestamp::now(), interval);
    taken.map_or(by_name, |taken| by_name.max(interval.saturating_sub(taken.elapsed())))
}
