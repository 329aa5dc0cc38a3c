//! Dies on demand behind a numbered durable step, so that tests can show that a restart mends what a crash leaves behind.
//!
//! Every sequence of durable steps (publishing, retiring, ...) calls [`point`] behind each of them. Only builds with debug
//! assertions look at the environment; in a release build nothing is left of it.

/// The variable that names the step to die behind: `<sequence>:<step>`, for instance `publish:4`.
pub const VARIABLE: &str = "SNAPFERRY_CRASH";

/// Aborts the process, without unwinding and without running any destructor, if [`VARIABLE`] names this step.
pub fn point(sequence: &str, step: u32) {
    if cfg!(debug_assertions) && std::env::var(VARIABLE).is_ok_and(|wanted| names(&wanted, sequence, step)) {
        std::process::abort();
    }
}

fn names(wanted: &str, sequence: &str, step: u32) -> bool {
    wanted.split_once(':').is_some_and(|(s, n)| s == sequence && n.parse() == Ok(step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_step_of_the_named_sequence_dies() {
        assert!(names("publish:4", "publish", 4));
        for other in ["publish:5", "publish:41", "retire:4", "publish", "publish:", "publish:x", ""] {
            assert!(!names(other, "publish", 4), "{other:?}");
        }
    }

    #[test]
    fn without_the_variable_nothing_happens() {
        point("publish", 4);
    }
}
