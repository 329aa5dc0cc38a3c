//! What an operator wants of a volume beyond its configuration: snapshots that are held, and one that is published by name.
//!
//! Unlike all other state this cannot be found out again by looking. So it is written durably before anything is done about it, and
//! a file that cannot be read is an error, never an absent one: pruning goes by it.

use std::path::{Path, PathBuf};

use common::{
    durable::{self, DurableError},
    retention::{Reason, newest_first},
    snapshot::{Snapshot, SnapshotId, VolumeName},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// An operator's 'never delete this snapshot'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// Why; may be empty.
    pub why: String,
    /// Since when.
    pub since: Timestamp,
    /// Which.
    pub snapshot: Snapshot,
}

/// Which snapshot an operator published by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Choice {
    /// It stays published, whatever arrives.
    Pinned(Snapshot),
    /// It is published until the next transfer ends.
    RolledBack {
        /// What is published.
        to: Snapshot,
        /// The newest that was complete then: what is newer is published again.
        over: Snapshot,
    },
}

impl Choice {
    /// What is, or shall be, published.
    pub fn snapshot(&self) -> &Snapshot {
        match self {
            Self::Pinned(snapshot) | Self::RolledBack { to: snapshot, .. } => snapshot,
        }
    }
}

/// The content of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// None: the newest is published.
    pub choice: Option<Choice>,
    /// In the order in which they were made.
    #[serde(default, rename = "hold")]
    pub holds: Vec<Hold>,
}

/// The wishes for one volume.
#[derive(Debug)]
pub struct Wishes {
    file: PathBuf,
    state: State,
}

impl Wishes {
    /// What was wished for so far.
    ///
    /// # Errors
    /// The file cannot be read, or makes no sense.
    pub fn load(state_dir: &Path, volume: &VolumeName) -> Result<Self, DurableError> {
        let file = state_dir.join(format!("{volume}.wishes.toml"));
        let state = durable::load(&file)?.unwrap_or_default();
        Ok(Self { file, state })
    }

    /// As it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Makes a change, durably: it holds on return, or there was none.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn change(&mut self, change: impl FnOnce(&mut State)) -> Result<(), DurableError> {
        let mut state = self.state.clone();
        change(&mut state);
        if state != self.state {
            durable::store(&self.file, &state)?;
            self.state = state;
        }
        Ok(())
    }

    /// What stays published, whatever arrives.
    pub fn pinned(&self) -> Option<&Snapshot> {
        match &self.state.choice {
            Some(Choice::Pinned(snapshot)) => Some(snapshot),
            Some(Choice::RolledBack { .. }) | None => None,
        }
    }

    /// Which snapshots must stay because of a wish.
    pub fn reasons(&self) -> impl Iterator<Item = (SnapshotId, Reason)> + '_ {
        let pinned = self.pinned().map(|snapshot| (snapshot.id, Reason::Pinned));
        let held = |hold: &Hold| (hold.snapshot.id, Reason::Held { why: hold.why.clone() });
        pinned.into_iter().chain(self.state.holds.iter().map(held))
    }

    /// What a start has to publish: what was complete, and so verified, when the agent ended, but not published yet. None if all is
    /// as it should be. `complete` is what the store has, the newest first.
    pub fn to_publish<'a>(&self, published: Option<&Snapshot>, complete: &'a [Snapshot]) -> Option<&'a Snapshot> {
        let is_newer = |one: &Snapshot, than: &Snapshot| newest_first(one) < newest_first(than);
        let newest = complete.first()?;
        let chosen = |wanted: &Snapshot| complete.iter().find(|snapshot| *snapshot == wanted);
        let wanted = match &self.state.choice {
            Some(Choice::Pinned(snapshot)) => chosen(snapshot)?,
            Some(Choice::RolledBack { to, over }) if !is_newer(newest, over) => chosen(to)?,
            // What is published is never replaced by something older without an operator's word.
            Some(Choice::RolledBack { .. }) | None if published.is_some_and(|old| !is_newer(newest, old)) => {
                return None;
            }
            Some(Choice::RolledBack { .. }) | None => newest,
        };
        (published != Some(wanted)).then_some(wanted)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn snapshot(n: u8) -> Snapshot {
        let id = SnapshotId { uuid: Uuid::from_bytes([n; 16]), ctransid: u64::from(n) };
        Snapshot { name: format!("v.2026112{n}T070000Z").parse().unwrap(), id }
    }

    fn wishes(choice: Option<Choice>) -> Wishes {
        Wishes { file: PathBuf::from("/nowhere"), state: State { choice, holds: Vec::new() } }
    }

    #[test]
    fn wishes_survive_and_are_gone_only_when_taken_back() {
        let dir = tempfile::tempdir().unwrap();
        let volume: VolumeName = "v".parse().unwrap();
        let mut wishes = Wishes::load(dir.path(), &volume).unwrap();
        assert_eq!(wishes.state(), &State::default());
        let hold = |n: u8, why: &str| Hold { why: why.into(), since: Timestamp::UNIX_EPOCH, snapshot: snapshot(n) };
        let choice = Choice::RolledBack { to: snapshot(1), over: snapshot(3) };
        let state = State { choice: Some(choice), holds: vec![hold(2, "release \"1.4\"\t"), hold(1, "")] };
        wishes.change(|now| *now = state.clone()).unwrap();
        let mut again = Wishes::load(dir.path(), &volume).unwrap();
        assert_eq!(again.state(), &state);
        let why = Reason::Held { why: "release \"1.4\"\t".to_owned() };
        let held = [(snapshot(2).id, why), (snapshot(1).id, Reason::Held { why: String::new() })];
        assert_eq!(again.reasons().collect::<Vec<_>>(), held);
        again.change(|now| now.choice = Some(Choice::Pinned(snapshot(1)))).unwrap();
        let again = Wishes::load(dir.path(), &volume).unwrap();
        assert_eq!(again.pinned(), Some(&snapshot(1)));
        assert_eq!(again.reasons().next(), Some((snapshot(1).id, Reason::Pinned)));
    }

    #[test]
    fn a_broken_file_is_an_error_and_a_failed_change_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let volume: VolumeName = "v".parse().unwrap();
        std::fs::write(dir.path().join("v.wishes.toml"), "[[hold]]\nwhy = 1").unwrap();
        assert!(Wishes::load(dir.path(), &volume).is_err());
        let mut nowhere = wishes(None);
        nowhere.file = dir.path().join("missing/v.wishes.toml");
        assert!(nowhere.change(|state| state.choice = Some(Choice::Pinned(snapshot(1)))).is_err());
        assert_eq!(nowhere.state(), &State::default());
    }

    #[test]
    fn a_start_publishes_what_was_left_undone_and_respects_what_was_chosen() {
        let (s1, s2, s3) = (snapshot(1), snapshot(2), snapshot(3));
        let complete = [s3.clone(), s2.clone(), s1.clone()];
        let publishes = |choice: Option<Choice>, published: Option<&Snapshot>, complete: &[Snapshot]| {
            wishes(choice).to_publish(published, complete).cloned()
        };
        // As long as nobody chose.
        assert_eq!(publishes(None, Some(&s3), &complete), None);
        assert_eq!(publishes(None, Some(&s2), &complete), Some(s3.clone()), "complete, not yet published");
        assert_eq!(publishes(None, None, &complete), Some(s3.clone()));
        assert_eq!(publishes(None, Some(&s3), &complete[1..]), None, "never back by itself");
        assert_eq!(publishes(None, None, &[]), None);
        // Rolled back to 1 when 2 or 3 was the newest.
        let back = |over: &Snapshot| Some(Choice::RolledBack { to: s1.clone(), over: over.clone() });
        assert_eq!(publishes(back(&s3), Some(&s1), &complete), None);
        assert_eq!(publishes(back(&s3), Some(&s3), &complete), Some(s1.clone()), "a crash came in between");
        assert_eq!(publishes(back(&s2), Some(&s1), &complete), Some(s3.clone()), "the next one has arrived");
        assert_eq!(publishes(back(&s2), Some(&s3), &complete), None);
        // Pinned.
        let pinned = || Some(Choice::Pinned(s2.clone()));
        assert_eq!(publishes(pinned(), Some(&s2), &complete), None);
        assert_eq!(publishes(pinned(), Some(&s1), &complete), Some(s2.clone()));
        assert_eq!(publishes(pinned(), None, &complete), Some(s2.clone()));
        assert_eq!(publishes(pinned(), Some(&s1), &[s3, s1.clone()]), None, "what is gone cannot be published");
    }
}
