//! Rates, percent and time to go. Pure: whoever asks brings the clock.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// "Now" is the average over this time: long enough to be readable, short enough to show a stall.
const WINDOW: Duration = Duration::from_secs(10);

/// Measurements in the window are at least this far apart, so that their number is bounded.
const SPACING: Duration = Duration::from_millis(250);

/// How far a transfer has come.
#[derive(Debug, Clone)]
pub struct Progress {
    started: Instant,
    first: u64,
    total: Option<u64>,
    window: VecDeque<(Instant, u64)>,
    bytes: u64,
}

/// What there is to say of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Bytes so far.
    pub bytes: u64,
    /// Bytes in all, once known.
    pub total: Option<u64>,
    /// Percent of the total, 0 to 100, in tenths.
    pub percent: Option<f64>,
    /// Bytes a second of late.
    pub rate: f64,
    /// Bytes a second since the start.
    pub average_rate: f64,
    /// Time to go at the average of both rates; None while nothing moves or the total is unknown.
    pub eta: Option<Duration>,
}

impl Progress {
    /// A transfer that starts at byte 0.
    pub fn new(now: Instant, total: Option<u64>) -> Self {
        Self::resume(now, 0, total)
    }

    /// A transfer that goes on at byte `first`: what was done before does not count for the rates.
    pub fn resume(now: Instant, first: u64, total: Option<u64>) -> Self {
        Self { started: now, first, total, window: VecDeque::from([(now, first)]), bytes: first }
    }

    /// Bytes in all, once known.
    pub fn total(&self) -> Option<u64> {
        self.total
    }

    /// The total is known now.
    pub fn set_total(&mut self, total: u64) {
        self.total = Some(total);
    }

    /// `bytes` are done at `now`. Going back is ignored.
    pub fn update(&mut self, now: Instant, bytes: u64) {
        self.bytes = self.bytes.max(bytes);
        let many = self.window.len() > 1;
        match self.window.back_mut() {
            Some(last) if many && now.saturating_duration_since(last.0) < SPACING => last.1 = self.bytes,
            _ => self.window.push_back((now, self.bytes)),
        }
        while self.window.len() > 2 && now.saturating_duration_since(self.window[1].0) >= WINDOW {
            self.window.pop_front();
        }
    }

    /// What there is to say at `now`.
    pub fn report(&self, now: Instant) -> Report {
        let (since, then) = self.window.front().copied().unwrap_or((self.started, self.first));
        let rate = per_second(self.bytes - then, now.saturating_duration_since(since));
        let average_rate = per_second(self.bytes - self.first, now.saturating_duration_since(self.started));
        Report {
            bytes: self.bytes,
            total: self.total,
            percent: self.total.map(|total| percent(self.bytes, total)),
            rate,
            average_rate,
            eta: self.total.and_then(|total| eta(total.saturating_sub(self.bytes), rate, average_rate)),
        }
    }
}

fn per_second(bytes: u64, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { bytes as f64 / time.as_secs_f64() }
}

/// Rounded down to tenths: 100 means all of it. A total that was measured before the snapshot's extents changed hands may be a
/// little small; nothing is more than all.
fn percent(bytes: u64, total: u64) -> f64 {
    if bytes >= total {
        return 100.0;
    }
    let tenths = u128::from(bytes) * 1000 / u128::from(total);
    tenths as f64 / 10.0
}

fn eta(left: u64, rate: f64, average_rate: f64) -> Option<Duration> {
    let rate = f64::midpoint(rate, average_rate);
    if left == 0 {
        return Some(Duration::ZERO);
    }
    // A stall has no end in sight, and nobody reads an ETA of years.
    Duration::try_from_secs_f64(left as f64 / rate).ok().filter(|eta| *eta < Duration::from_secs(366 * 86_400))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    #[test]
    fn a_steady_transfer_says_what_one_expects() {
        let start = Instant::now();
        let mut progress = Progress::new(start, Some(100 * MIB));
        for second in 1..=25 {
            progress.update(at(start, second), second * MIB);
        }
        let report = progress.report(at(start, 25));
        assert_eq!(report.percent, Some(25.0));
        assert!((report.rate - MIB as f64).abs() < 1.0, "{report:?}");
        assert_eq!(report.eta, Some(Duration::from_secs(75)));
    }

    #[test]
    fn the_rate_of_late_forgets_and_the_average_does_not() {
        let start = Instant::now();
        let mut progress = Progress::new(start, None);
        for second in 1..=100 {
            progress.update(at(start, second), second.min(50) * MIB);
        }
        let report = progress.report(at(start, 100));
        assert_eq!(report.rate, 0.0);
        assert!((report.average_rate - MIB as f64 / 2.0).abs() < 1.0);
        assert_eq!((report.percent, report.eta), (None, None));
    }

    #[test]
    fn a_stall_has_no_eta_and_nothing_is_more_than_all() {
        let start = Instant::now();
        let mut progress = Progress::new(start, Some(10));
        assert_eq!(progress.report(start).eta, None);
        progress.update(at(start, 1), 12);
        let report = progress.report(at(start, 1));
        assert_eq!((report.percent, report.eta), (Some(100.0), Some(Duration::ZERO)));
        let almost = Progress { bytes: 9_999, ..Progress::new(start, Some(10_000)) };
        assert_eq!(almost.report(start).percent, Some(99.9), "100 is said only of all");
    }

    #[test]
    fn memory_does_not_grow_with_updates() {
        let start = Instant::now();
        let mut progress = Progress::new(start, None);
        for step in 0..100_000 {
            progress.update(start + Duration::from_millis(step), step);
        }
        assert!(progress.window.len() <= 45, "{}", progress.window.len());
    }
}
