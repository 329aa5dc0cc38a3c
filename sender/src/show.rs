//! `plan` and `snapshots`: what would be done, and what is there, as text. Neither changes anything.

use common::{
    btrfs::{self, Found},
    retention,
    size::{human_bytes, human_duration},
    snapshot::Snapshot,
    stream::Total,
    wire::message::Inventory,
};
use jiff::Timestamp;

use crate::{
    config::Config,
    connect::connect,
    create,
    cycle::{self, CycleError, Volume, Waiting},
    plan::{self, Base, Plan},
    setup::{self, SetupError},
};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// The configuration does not fit the machine.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// As in a cycle.
    #[error(transparent)]
    Cycle(#[from] CycleError),
}

/// Prints what the next cycle would do, and why.
///
/// # Errors
/// The receiver must be reachable: the base depends on what it has.
pub async fn plan(config: &Config) -> Result<(), ShowError> {
    for volume in setup::volumes(config)? {
        println!("volume {}", volume.config.name);
        let inventory = inventory(&volume).await?;
        let found = volume.snapshots()?;
        say_snapshot(&volume, &found);
        say_transfer(&volume, &found, &inventory).await?;
        say_pruning(&volume.retention(&found, Timestamp::now())?);
    }
    Ok(())
}

/// Prints our snapshots and which of them the receiver has.
///
/// # Errors
/// As [`plan()`]; but what is here is printed also if the receiver cannot be reached.
pub async fn snapshots(config: &Config) -> Result<(), ShowError> {
    let mut unreachable = None;
    for volume in setup::volumes(config)? {
        println!("volume {}", volume.config.name);
        let inventory = match inventory(&volume).await {
            Ok(inventory) => Some(inventory),
            // What is here is worth knowing just then.
            Err(error @ CycleError::Connect(_)) => {
                unreachable = Some(error);
                None
            }
            Err(error) => return Err(error.into()),
        };
        let (found, now) = (volume.snapshots()?, Timestamp::now());
        let kept = volume.retention(&found, now)?.keep;
        for found in &found {
            let there = inventory.as_ref().map_or("?", |inventory| receiver_has(inventory, &found.snapshot));
            let why = kept.iter().find(|(kept, _)| *kept == found.snapshot).map_or(String::new(), |(_, reasons)| {
                let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
                format!("kept: {}", reasons.join(", "))
            });
            println!("  {:<40} {:<22} {why}", found.snapshot.to_string(), there);
        }
        if found.is_empty() {
            println!("  none");
        }
        if let Some(Inventory { published: Some(published), pinned: true, .. }) = &inventory {
            println!("  the receiver publishes {published}, pinned there: what arrives is not published");
        }
        let theirs = |found: &&Found| {
            inventory.iter().flat_map(|theirs| &theirs.snapshots).any(|one| one.id == found.snapshot.id)
        };
        let base = found.iter().find(theirs).map(|found| found.snapshot.clone()).or(volume.confirmed()?);
        if let Some(waiting) = volume.waiting(&found, base, now) {
            say_waiting(&waiting);
        }
    }
    unreachable.map_or(Ok(()), |error| Err(error.into()))
}

fn say_waiting(Waiting { count, base, age, free }: &Waiting) {
    let (age, free) = (human_duration(*age), free.map_or_else(|| "?".to_owned(), human_bytes));
    match base {
        Some(base) => println!(
            "  {count} not on the receiver yet; with their base {base} they keep what was deleted from the source in the last {age}; {free} are free"
        ),
        None => println!(
            "  {count} not on the receiver yet, which has no other; they keep what was deleted from the source in the last {age}; {free} are free"
        ),
    }
}

async fn inventory(volume: &Volume) -> Result<Inventory, CycleError> {
    let (link, inventory) = connect(&volume.route, &volume.config.name).await?;
    link.close().await;
    Ok(inventory)
}

fn receiver_has(inventory: &Inventory, snapshot: &Snapshot) -> &'static str {
    if inventory.published.as_ref().is_some_and(|published| published.id == snapshot.id) {
        if inventory.pinned { "published, pinned" } else { "published" }
    } else if inventory.snapshots.iter().any(|theirs| theirs.id == snapshot.id) {
        "on the receiver"
    } else {
        "only here"
    }
}

fn say_snapshot(volume: &Volume, found: &[Found]) {
    let newest = found.first().map(|found| &found.snapshot);
    let due = create::due_in(newest.map(|newest| &newest.name), Timestamp::now(), volume.config.interval);
    match newest {
        None => println!("  snapshot  is taken at once: there is none yet"),
        Some(newest) if due.is_zero() => println!(
            "  snapshot  is taken at once: {newest} is older than {}; the figures below are those of {newest}",
            human_duration(volume.config.interval)
        ),
        Some(newest) => println!("  snapshot  {newest}; the next is due in {}", human_duration(due)),
    }
}

async fn say_transfer(volume: &Volume, found: &[Found], inventory: &Inventory) -> Result<(), CycleError> {
    let ours: Vec<Snapshot> = found.iter().map(|found| found.snapshot.clone()).collect();
    match plan::plan(&ours, inventory, volume.which()) {
        Plan::NoSnapshot => println!("  transfer  the first snapshot, in full"),
        Plan::UpToDate(snapshot) if inventory.published.as_ref() != Some(&snapshot) => {
            println!("  transfer  nothing: {snapshot} is on the receiver, where another is pinned");
        }
        Plan::UpToDate(snapshot) => println!("  transfer  nothing: {snapshot} is published"),
        Plan::Send { snapshot, base, resumed } => {
            let total = total(found, &snapshot, &base, inventory).await?;
            println!("  transfer  {snapshot}{}", if resumed { ", which was interrupted and goes on" } else { "" });
            println!("  base      {base}");
            println!(
                "  size      {} in {} files ({} of file data)",
                human_bytes(total.bytes),
                total.files,
                human_bytes(total.data_bytes)
            );
        }
    }
    Ok(())
}

async fn total(found: &[Found], snapshot: &Snapshot, base: &Base, inventory: &Inventory) -> Result<Total, CycleError> {
    let version = inventory.stream_version.min(btrfs::stream_version()?);
    let source = cycle::open(found, snapshot, base)?;
    let mut pass = source.total(version)?;
    Ok(pass.finish().await?)
}

fn say_pruning(plan: &retention::Plan) {
    for (snapshot, reasons) in &plan.keep {
        let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
        println!("  keep      {:<40} {}", snapshot.to_string(), reasons.join(", "));
    }
    if plan.delete.is_empty() {
        println!("  prune     nothing");
    }
    for snapshot in &plan.delete {
        println!("  prune     {snapshot}");
    }
}
