//! `snapshots` and `prune --dry-run`: what is there and what would go, as text. Neither changes anything, neither needs the agent.

use common::{
    retention::{self, Reason},
    snapshot::{Snapshot, SnapshotId},
};
use jiff::Timestamp;

use crate::{
    config::{Config, Volume},
    publish::{self, PublishError},
    store::{Store, StoreError},
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
}

/// Prints the snapshots of every volume, with their states.
///
/// # Errors
/// See [`ShowError`].
pub fn snapshots(config: &Config) -> Result<(), ShowError> {
    for volume in &config.volumes {
        println!("volume {}", volume.name);
        let store = Store::open(&volume.store, volume.name.clone())?;
        let kept = states(volume, config)?;
        let complete = store.snapshots()?;
        for found in &complete {
            let states: Vec<String> =
                kept.iter().filter(|(id, _)| *id == found.snapshot.id).map(|(_, reason)| reason.to_string()).collect();
            println!("  {:<40} {}", found.snapshot.to_string(), states.join(", "));
        }
        for leftover in store.leftovers()? {
            println!("  {:<40} unfinished", leftover.snapshot.to_string());
        }
        if complete.is_empty() {
            println!("  none");
        }
    }
    Ok(())
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
        let plan = retention::plan(&snapshots, &volume.keep, Timestamp::now(), &states(volume, config)?);
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

/// What is published and what has clients still, as the mounts say.
fn states(volume: &Volume, config: &Config) -> Result<Vec<(SnapshotId, Reason)>, PublishError> {
    let looked = publish::look(&volume.name, &volume.publish, &config.agent.state_dir)?;
    let published = looked.published.map(|snapshot| (snapshot.id, Reason::Published));
    let retiring = looked.retiring.into_iter().map(|snapshot| (snapshot.id, Reason::Retiring));
    Ok(published.into_iter().chain(retiring).collect())
}
