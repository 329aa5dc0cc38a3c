//! What is remembered of a volume's publication across a crash. The mounts themselves, as long as they live, know better.

use std::path::PathBuf;

use common::{
    durable::{self, DurableError},
    snapshot::{Snapshot, VolumeName},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A former snapshot that clients may still be inside.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Retiring {
    /// It is mounted at `gen-<generation>/tree`.
    pub generation: u64,
    /// Which snapshot; None if it is no complete snapshot any more, for instance deleted by an operator in the meantime.
    pub snapshot: Option<Snapshot>,
    /// Since when new clients no longer see it.
    pub since: Timestamp,
}

/// A publication that has begun.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Intent {
    /// It is mounted at `gen-<generation>/tree`, to change places with `live/tree`.
    pub generation: u64,
    /// What shall be published. Verified: nothing else comes this far.
    pub snapshot: Snapshot,
    /// What was published before.
    pub replaces: Option<Snapshot>,
}

/// The content of the state file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// The last number that a generation was given.
    #[serde(default)]
    pub generation: u64,
    /// What `live/tree` shows.
    pub published: Option<Snapshot>,
    /// Present between the fourth and the last step of a publication.
    pub intent: Option<Intent>,
    /// In the order in which they were replaced.
    #[serde(default)]
    pub retiring: Vec<Retiring>,
}

/// Where the state of a volume is kept.
#[derive(Debug)]
pub(super) struct StateFile(PathBuf);

impl StateFile {
    pub fn new(state_dir: &std::path::Path, volume: &VolumeName) -> Self {
        Self(state_dir.join(format!("{volume}.publish.toml")))
    }

    /// The state; the initial one if there is no file yet.
    pub fn load(&self) -> Result<State, DurableError> {
        Ok(durable::load(&self.0)?.unwrap_or_default())
    }

    pub fn store(&self, state: &State) -> Result<(), DurableError> {
        durable::store(&self.0, state)
    }
}
