//! Waiting for a condition, with a deadline. Tests wait for what they need to see, never for a time to pass.

use std::{
    thread,
    time::{Duration, Instant},
};

/// How long a test waits for something that a healthy pair does within a second or two, on a machine that is busy.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// How often a condition is looked at that nobody announces.
const POLL: Duration = Duration::from_millis(20);

/// Waits until `condition` gives something; panics with `what` when [`DEADLINE`] has passed.
pub fn until<T>(what: &str, condition: impl FnMut() -> Option<T>) -> T {
    within(DEADLINE, condition).unwrap_or_else(|| panic!("waited {DEADLINE:?} in vain: {what}"))
}

/// Waits until `condition` gives something, or None when the time has passed.
pub fn within<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = condition() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::sleep(POLL);
    }
}
