//! Notices that nothing moves. Pure: judged by bytes, whoever asks brings the clock.
//!
//! A slow transfer is not a stall, and a transfer that has sent everything and waits for the other side to apply it is not one as
//! long as that goes on: what counts is whether the number of bytes changes.

use std::time::{Duration, Instant};

/// Without a byte for so long it is a stall, and said; then again after each further such time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Watches a number.
#[derive(Debug, Clone)]
pub struct Stall {
    bytes: u64,
    since: Instant,
    said: Instant,
}

impl Stall {
    /// Everything moves at `now`.
    pub fn new(now: Instant) -> Self {
        Self { bytes: 0, since: now, said: now }
    }

    /// How long nothing has moved, whenever that should be said.
    pub fn look(&mut self, now: Instant, bytes: u64) -> Option<Duration> {
        if bytes != self.bytes {
            *self = Self { bytes, since: now, said: now };
            return None;
        }
        if now.saturating_duration_since(self.said) < PATIENCE {
            return None;
        }
        self.said = now;
        Some(now.saturating_duration_since(self.since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_is_said_now_and_then_and_ends_with_a_byte() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::new(start);
        assert_eq!(stall.look(at(29), 0), None);
        assert_eq!(stall.look(at(31), 0), Some(Duration::from_secs(31)));
        assert_eq!(stall.look(at(40), 0), None, "not every time");
        assert_eq!(stall.look(at(62), 0), Some(Duration::from_secs(62)));
        assert_eq!(stall.look(at(100), 1), None, "it moved");
        assert_eq!(stall.look(at(129), 1), None);
        assert_eq!(stall.look(at(131), 1), Some(Duration::from_secs(31)));
    }

    #[test]
    fn slow_is_not_stalled() {
        let start = Instant::now();
        let mut stall = Stall::new(start);
        for second in 1..1000 {
            assert_eq!(stall.look(start + Duration::from_secs(second), second / 20 + 1), None);
        }
    }
}
