//! Brings a volume's publication back to a valid state: after a crash in any step, after a reboot, after somebody's `umount`.

use common::{btrfs::Found, snapshot::Snapshot};
use jiff::Timestamp;

use super::{
    PublishError, Publisher, Retiring,
    layout::Occupant,
    state::{Intent, State},
};
use crate::mount;

/// A publisher whose state file has been read, but not yet compared with the mounts. It cannot publish.
#[derive(Debug)]
pub struct Unrecovered(pub(super) Publisher);

/// What a recovery had to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// Nothing was ever published.
    Nothing,
    /// `live/tree` shows a complete snapshot; nothing was touched there.
    Kept,
    /// A publication that had begun was completed.
    Completed,
    /// Nothing valid was mounted at `live/tree`: mounted again.
    Restored,
    /// What should be published is not in the store any more. Nothing is, until the next publication.
    Lost(Vec<Snapshot>),
}

/// What shall be done.
#[derive(Debug, PartialEq, Eq)]
enum Plan<'a> {
    /// It is the published one.
    Keep(&'a Snapshot),
    /// Publish the first of these that the store has.
    Publish(Vec<&'a Snapshot>),
}

impl Unrecovered {
    /// Makes `live/tree` show the snapshot that it should, sweeps what is stale, and opens the way to [`Publisher::publish`].
    ///
    /// `complete` are the complete snapshots of the store. Nobody is disturbed: a generation that still has clients stays on
    /// the list of the retiring.
    pub fn recover(self, complete: &[Found]) -> Result<(Publisher, Recovery), PublishError> {
        let Self(mut publisher) = self;
        let how = publisher.restore_live(complete)?;
        publisher.sweep()?;
        if publisher.file.load()? != publisher.state {
            publisher.file.store(&publisher.state)?;
        }
        let volume = publisher.layout.volume();
        match (&publisher.state.published, &how) {
            (Some(snapshot), Recovery::Kept) => tracing::info!(%volume, %snapshot, "still published"),
            (None, Recovery::Lost(lost)) => {
                let snapshot = lost.first().map(Snapshot::to_string);
                tracing::warn!(
                    %volume, snapshot,
                    "the published snapshot is not in the store any more: nothing is published until the next transfer"
                );
            }
            _ => {}
        }
        Ok((publisher, how))
    }
}

impl Publisher {
    fn restore_live(&mut self, complete: &[Found]) -> Result<Recovery, PublishError> {
        let live = self.layout.look_at_live()?;
        let state = self.state.clone();
        let staged = state.intent.as_ref().and_then(|intent| self.staged(intent));
        let shown = live.as_ref().and_then(Occupant::as_snapshot).cloned();
        let wanted = match decide(&state, shown.as_ref(), staged.as_ref()) {
            Plan::Keep(snapshot) => return self.keep(snapshot.clone(), &state),
            Plan::Publish(wanted) => wanted,
        };
        let available = |snapshot: &&Snapshot| complete.iter().find(|found| found.snapshot == **snapshot);
        if let Some(found) = wanted.iter().find_map(available) {
            self.put_live(&found.snapshot, &found.path, live)?;
            return Ok(if shown.is_some() { Recovery::Completed } else { Recovery::Restored });
        }
        if let Some(former) = &shown {
            return self.keep(former.clone(), &state);
        }
        self.state = State { published: None, intent: None, ..state.clone() };
        let lost: Vec<Snapshot> = wanted.into_iter().cloned().collect();
        Ok(if lost.is_empty() { Recovery::Nothing } else { Recovery::Lost(lost) })
    }

    /// What is mounted, ready, at the generation of an intent.
    fn staged(&self, intent: &Intent) -> Option<Snapshot> {
        self.layout.look_at(&self.layout.generation(intent.generation)).ok()?.as_snapshot().cloned()
    }

    fn keep(&mut self, snapshot: Snapshot, before: &State) -> Result<Recovery, PublishError> {
        let tree = self.layout.live_tree();
        // Only somebody else's mount can be without the options: ours gets them before it goes live.
        if mount::at(&tree)?.is_some_and(|mount| !mount.is_protected()) {
            mount::protect(&tree)?;
        }
        let completed = before.intent.as_ref().is_some_and(|intent| intent.snapshot == snapshot);
        self.state.published = Some(snapshot);
        self.state.intent = None;
        Ok(if completed { Recovery::Completed } else { Recovery::Kept })
    }

    /// Removes generations at which nothing is mounted, and lists the others as retiring.
    fn sweep(&mut self) -> Result<(), PublishError> {
        let known = std::mem::take(&mut self.state.retiring);
        let volume = self.layout.volume();
        for generation in self.layout.generations()? {
            let since = known.iter().find(|retiring| retiring.generation == generation).map(|retiring| retiring.since);
            let since = since.unwrap_or_else(Timestamp::now);
            let left_alone = |reason: &dyn std::fmt::Display| {
                tracing::warn!(%volume, generation, %reason, "a generation that is not ours is left alone");
            };
            match self.layout.look_at(&self.layout.generation(generation)) {
                Ok(Occupant::Nobody) => self.layout.remove(generation)?,
                Ok(Occupant::Snapshot(snapshot)) => {
                    self.state.retiring.push(Retiring { generation, snapshot: Some(snapshot), since });
                }
                Ok(Occupant::Spoiled(_)) => self.state.retiring.push(Retiring { generation, snapshot: None, since }),
                Ok(Occupant::Foreign(what)) => left_alone(&what),
                Err(error) => left_alone(&error),
            }
        }
        Ok(())
    }
}

/// What should be published, given what was remembered, what `live/tree` shows and what is mounted at the intent's generation.
///
/// | live/tree | remembered | |
/// |---|---|---|
/// | a complete snapshot | an intent to replace just that, its snapshot staged | go on: clients have seen the former one only, the new one is verified |
/// | a complete snapshot | anything else | keep it: the mounts know better than a file that may be older |
/// | nothing, or a deleted snapshot | an intent | its snapshot, for clients may have seen it; else the former one |
/// | nothing, or a deleted snapshot | a result | that |
fn decide<'a>(state: &'a State, live: Option<&'a Snapshot>, staged: Option<&Snapshot>) -> Plan<'a> {
    let intent = state.intent.as_ref();
    if let Some(live) = live {
        let fresh = |intent: &&Intent| intent.replaces.as_ref() == Some(live) && staged == Some(&intent.snapshot);
        return intent.filter(fresh).map_or(Plan::Keep(live), |intent| Plan::Publish(vec![&intent.snapshot]));
    }
    Plan::Publish(intent.map(|intent| &intent.snapshot).into_iter().chain(&state.published).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use common::snapshot::SnapshotId;
    use uuid::Uuid;

    use super::*;

    fn snapshot(n: u8) -> Snapshot {
        let id = SnapshotId { uuid: Uuid::from_bytes([n; 16]), ctransid: u64::from(n) };
        Snapshot { name: format!("v.2026112{n}T070000Z").parse().unwrap(), id }
    }

    fn state(published: Option<Snapshot>, intent: Option<(Snapshot, Option<Snapshot>)>) -> State {
        let intent = intent.map(|(snapshot, replaces)| Intent { generation: 7, snapshot, replaces });
        State { generation: 7, published, intent, retiring: Vec::new() }
    }

    #[test]
    fn every_combination_has_a_decision() {
        let (old, new, other) = (snapshot(1), snapshot(2), snapshot(3));
        let begun = state(Some(old.clone()), Some((new.clone(), Some(old.clone()))));
        let first = state(None, Some((new.clone(), None)));
        let done = state(Some(new.clone()), None);
        let never = State::default();

        // Mounts alive: before and behind the exchange.
        assert_eq!(decide(&begun, Some(&old), Some(&new)), Plan::Publish(vec![&new]));
        assert_eq!(decide(&begun, Some(&new), Some(&old)), Plan::Keep(&new));
        assert_eq!(decide(&first, Some(&new), None), Plan::Keep(&new));
        assert_eq!(decide(&done, Some(&new), None), Plan::Keep(&new));
        // The intent is not that of the mounts: the file is older.
        assert_eq!(decide(&begun, Some(&old), None), Plan::Keep(&old));
        assert_eq!(decide(&begun, Some(&old), Some(&other)), Plan::Keep(&old));
        assert_eq!(decide(&begun, Some(&other), Some(&new)), Plan::Keep(&other));
        assert_eq!(decide(&first, Some(&other), Some(&new)), Plan::Keep(&other));
        assert_eq!(decide(&done, Some(&other), None), Plan::Keep(&other));
        assert_eq!(decide(&never, Some(&other), None), Plan::Keep(&other));
        // No mounts.
        assert_eq!(decide(&begun, None, None), Plan::Publish(vec![&new, &old]));
        assert_eq!(decide(&first, None, None), Plan::Publish(vec![&new]));
        assert_eq!(decide(&first, None, Some(&new)), Plan::Publish(vec![&new]));
        assert_eq!(decide(&done, None, None), Plan::Publish(vec![&new]));
        assert_eq!(decide(&never, None, None), Plan::Publish(vec![]));
    }
}
