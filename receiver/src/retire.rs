//! Lets go of former snapshots once their last client has left.
//!
//! A plain unmount answers EBUSY as long as anyone, in any namespace, is inside: that *is* the test for 'no clients left'.
//!
//! | step | what is durable behind it | after a crash there |
//! |---|---|---|
//! | 1 | nothing is mounted at `gen-N/tree` | the recovery removes the directories |
//! | 2 | the directories are gone | the recovery takes it off the list |
//! | 3 | it is off the list in the state file | nothing to do |

use std::time::Duration;

use common::exit::chain;
use jiff::Timestamp;

use crate::{
    mount::Unmounted,
    publish::{Publisher, Retiring},
};

/// How long a generation is left mounted in any case. A client whose lookup of `live/tree` was half done when the mounts
/// changed places is not yet inside, and would find an empty directory.
const GRACE: Duration = Duration::from_secs(1);

impl Publisher {
    /// Tries every retiring generation; returns those that nobody is inside any more: they are unmounted.
    ///
    /// To be called every few seconds while there are any. What cannot be unmounted for another reason than clients is logged
    /// and tried again the next time.
    pub fn retire(&mut self) -> Vec<Retiring> {
        self.retire_at(Timestamp::now())
    }

    /// The same at a given time.
    pub(crate) fn retire_at(&mut self, now: Timestamp) -> Vec<Retiring> {
        let mut left = Vec::new();
        for retiring in self.retiring().to_vec() {
            // Negative if the clock was set back meanwhile: then the time has no meaning, and is not waited for.
            let age = now.duration_since(retiring.since);
            if !age.is_negative() && age.unsigned_abs() < GRACE {
                continue;
            }
            let (volume, generation) = (self.volume().clone(), retiring.generation);
            let snapshot = retiring.snapshot.as_ref().map(ToString::to_string);
            match self.let_go(generation) {
                Ok(Unmounted::Busy) => {}
                Ok(Unmounted::Done) => {
                    let seconds = age.as_secs_f64().max(0.0);
                    tracing::info!(%volume, snapshot, generation, seconds, "last client has left");
                    left.push(retiring);
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(%volume, snapshot, generation, error, "a former snapshot cannot be unmounted yet");
                }
            }
        }
        left
    }
}
