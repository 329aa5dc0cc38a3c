//! Pauses between attempts: doubling, bounded, and never in step with other volumes or senders.

use std::time::Duration;

/// At most this; a mirror that comes back is noticed within a minute.
const LONGEST: Duration = Duration::from_secs(60);

/// The pauses of a row of failures.
#[derive(Debug, Clone)]
pub struct Retry {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Retry {
    /// Between cycles: from a second on.
    pub fn new() -> Self {
        Self { first: Duration::from_secs(1), longest: LONGEST, failures: 0 }
    }

    /// Between connections of a transfer that waits for one: from a tenth of a second on, and never long.
    pub fn quick() -> Self {
        Self { first: Duration::from_millis(100), longest: Duration::from_secs(5), failures: 0 }
    }

    /// The next pause, give or take a quarter.
    pub fn next(&mut self) -> Duration {
        let doubled = self.first.saturating_mul(1 << self.failures.min(16));
        self.failures += 1;
        jittered(doubled.min(self.longest))
    }

    /// The longest pause, give or take a quarter: for what does not mend itself in a second.
    pub fn longest(&self) -> Duration {
        jittered(self.longest)
    }
}

fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.75 + fastrand::f64() / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_jittered() {
        let mut retry = Retry::new();
        let pauses: Vec<Duration> = (0..100).map(|_| retry.next()).collect();
        let second = Duration::from_secs(1);
        assert!(pauses[0] <= second.mul_f64(1.25) && pauses[0] >= second.mul_f64(0.75), "{:?}", pauses[0]);
        assert!(pauses[5] > pauses[0] * 8, "{:?}", pauses[5]);
        assert!(pauses.iter().all(|pause| *pause <= LONGEST.mul_f64(1.25)));
        assert!(pauses[50..].iter().any(|pause| *pause != pauses[99]), "no jitter");
    }
}
