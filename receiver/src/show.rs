//! `snapshots` and `prune --dry-run`: what is there and what would go, as text. Neither changes anything, neither needs the agent.

use common::{
    durable::DurableError,
    retention::{self, Reason},
    snapshot::{Snapshot, SnapshotId},
};
use jiff::Timestamp;

use crate::{
    checkpoint::Checkpoint,
    config::{Config, Volume},
    publish::{self, PublishError},
    store::{Store, StoreError},
    wishes::{Choice, Wishes},
};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// The store cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// What is published cannot be found out.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// Holds and pins cannot be read.
    #[error(transparent)]
    State(#[from] DurableError),
}

/// Prints the snapshots of every volume, with their states.
///
/// # Errors
/// See [`ShowError`].
pub fn snapshots(config: &Config) -> Result<(), ShowError> {
    for volume in &config.volumes {
        println!("volume {}", volume.name);
        let store = Store::open(&volume.store, volume.name.clone())?;
        let kept = states(volume, config, &store)?;
        let complete = store.snapshots()?;
        for found in &complete {
            let states: Vec<String> =
                kept.iter().filter(|(id, _)| *id == found.snapshot.id).map(|(_, reason)| reason.to_string()).collect();
            println!("  {:<40} {}", found.snapshot.to_string(), states.join(", "));
        }
        let wishes = Wishes::load(&config.agent.state_dir, &volume.name)?;
        for leftover in store.unfinished()? {
            println!("  {:<40} unfinished", leftover.snapshot.to_string());
        }
        if complete.is_empty() {
            println!("  none");
        }
        let is_there = |snapshot: &Snapshot| complete.iter().any(|found| found.snapshot == *snapshot);
        say_wishes(&wishes, is_there);
    }
    Ok(())
}

/// What the operator chose to publish, and holds on what is not there.
fn say_wishes(wishes: &Wishes, is_there: impl Fn(&Snapshot) -> bool) {
    match &wishes.state().choice {
        Some(Choice::Pinned(snapshot)) => {
            println!("  pinned to {snapshot}: what arrives is not published until `publish --latest`");
        }
        Some(Choice::RolledBack { to, .. }) => {
            println!("  rolled back to {to}: the next transfer is published again");
        }
        None => {}
    }
    for hold in wishes.state().holds.iter().filter(|hold| !is_there(&hold.snapshot)) {
        println!("  held, but not in the store: {} {}", hold.snapshot, hold.why);
    }
}

/// Prints what retention would delete, and the rules that keep each of the others.
///
/// # Errors
/// See [`ShowError`].
pub fn retention(config: &Config) -> Result<(), ShowError> {
    for volume in &config.volumes {
        println!("volume {}", volume.name);
        let store = Store::open(&volume.store, volume.name.clone())?;
        let snapshots: Vec<Snapshot> = store.snapshots()?.into_iter().map(|found| found.snapshot).collect();
        let plan = retention::plan(&snapshots, &volume.keep, Timestamp::now(), &states(volume, config, &store)?);
        for (snapshot, reasons) in &plan.keep {
            let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            println!("  keep    {:<40} {}", snapshot.to_string(), reasons.join(", "));
        }
        for snapshot in &plan.delete {
            println!("  delete  {snapshot}");
        }
    }
    Ok(())
}

/// What is published and what has clients still, as the mounts say; what is held; what an interrupted transfer builds on.
fn states(volume: &Volume, config: &Config, store: &Store) -> Result<Vec<(SnapshotId, Reason)>, ShowError> {
    let wishes = Wishes::load(&config.agent.state_dir, &volume.name)?;
    let base = Checkpoint::load(store).and_then(|checkpoint| checkpoint.base);
    let base = base.map(|base| (base.id, Reason::Unfinished));
    let looked = publish::look(&volume.name, &volume.publish, &config.agent.state_dir)?;
    let published = looked.published.map(|snapshot| (snapshot.id, Reason::Published));
    let retiring = looked.retiring.into_iter().map(|snapshot| (snapshot.id, Reason::Retiring));
    let mut states: Vec<_> = published.into_iter().chain(wishes.reasons()).collect();
    for state in retiring.chain(base) {
        // Clients may be inside one of them twice.
        if !states.contains(&state) {
            states.push(state);
        }
    }
    Ok(states)
}
