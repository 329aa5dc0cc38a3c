//! What an operator sees of a cycle: log lines, or a progress bar on a terminal.

use std::{sync::atomic::Ordering, time::Duration};

use common::{
    exit::chain,
    progress::Report,
    snapshot::{Snapshot, VolumeName},
    stream::Total,
    wire::message::Ack,
};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{cycle::CycleError, pack::Meter, plan::Base, push::Outcome};

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Style {
    /// A log line every `progress_interval`.
    Log,
    /// A bar.
    Bar,
}

/// Reports the transfers of a volume.
pub struct Reporter {
    volume: VolumeName,
    snapshot: Option<Snapshot>,
    bar: Option<ProgressBar>,
}

impl Reporter {
    /// A reporter that has nothing to say yet.
    pub fn new(volume: &VolumeName, style: Style) -> Self {
        let bar = (style == Style::Bar).then(|| {
            let bar = ProgressBar::no_length().with_style(bar_style());
            bar.set_prefix(volume.to_string());
            bar
        });
        Self { volume: volume.clone(), snapshot: None, bar }
    }

    /// Whether a bar is drawn, and progress should come often.
    pub fn draws(&self) -> bool {
        self.bar.is_some()
    }

    /// A transfer begins.
    pub fn started(&mut self, snapshot: &Snapshot, base: &Base, resumed: bool, total: Option<Total>) {
        self.snapshot = Some(snapshot.clone());
        if let Base::NoneInCommon { theirs } = base {
            tracing::warn!(
                volume = %self.volume, snapshot = %snapshot, theirs,
                "no base in common: a full send, the whole volume goes over the network again; the published snapshot stays"
            );
        }
        let base = base.snapshot().map_or("none".to_owned(), Snapshot::to_string);
        let (total, files) = (total.map(|total| total.bytes), total.map(|total| total.files));
        tracing::info!(volume = %self.volume, snapshot = %snapshot, base, resumed, total, files, stage = "transfer", "transfer started");
    }

    /// A transfer goes on. Rates and percent are of what the receiver has applied.
    pub fn progress(&self, report: &Report, meter: &Meter, stage: &'static str) {
        let (read, packed) = (meter.read.load(Ordering::Relaxed), meter.packed.load(Ordering::Relaxed));
        let file = meter.path();
        if let Some(bar) = &self.bar {
            if let Some(total) = report.total {
                bar.set_length(total);
            }
            bar.set_position(report.bytes);
            bar.set_message(file);
            return;
        }
        let ratio = if packed == 0 { 1.0 } else { read as f64 / packed as f64 };
        tracing::info!(
            volume = %self.volume,
            snapshot = self.snapshot.as_ref().map(tracing::field::display),
            stage,
            percent = report.percent,
            bytes = report.bytes,
            total = report.total,
            sent = read,
            rate = report.rate,
            average_rate = report.average_rate,
            eta = report.eta.map(|eta| eta.as_secs_f64()),
            ratio,
            files = meter.files.load(Ordering::Relaxed),
            file,
            "transfer progress"
        );
    }

    /// Nothing moves.
    pub fn stalled(&self, stalled: Duration, window: u64, ack: Ack) {
        let waits_for = if window > 0 { "the network or the receiver" } else { "the kernel's send" };
        let snapshot = self.snapshot.as_ref().map(tracing::field::display);
        tracing::warn!(
            volume = %self.volume, snapshot, stage = "transfer", seconds = stalled.as_secs_f64(),
            received = ack.received, applied = ack.applied, waits_for, "nothing moves"
        );
    }

    /// Everything is sent; the receiver is still applying, verifying and publishing.
    pub fn sent(&self, meter: &Meter) {
        let bytes = meter.read.load(Ordering::Relaxed);
        if let Some(bar) = &self.bar {
            bar.set_message("sent, still applying");
        } else {
            tracing::debug!(volume = %self.volume, bytes, "sent, still applying");
        }
    }

    /// The fast-forward is at the receiver's checkpoint: from `bytes` on the stream is sent.
    pub fn caught_up(&self, snapshot: &Snapshot, bytes: u64, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let average_rate = bytes as f64 / seconds.max(f64::EPSILON);
        tracing::info!(volume = %self.volume, %snapshot, stage = "fast-forward", bytes, seconds, average_rate, "at the checkpoint");
    }

    /// A cycle's summary.
    pub fn finished(&self, snapshot: &Snapshot, base: &Base, outcome: &Outcome, elapsed: Duration) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = elapsed.as_secs_f64();
        if let Some(pinned) = &outcome.pinned {
            tracing::warn!(volume = %self.volume, %snapshot, %pinned, "arrived; publication is pinned to {pinned}");
        }
        let is_published = outcome.pinned.is_none();
        tracing::info!(
            volume = %self.volume,
            snapshot = %snapshot,
            base = base.snapshot().map_or("none".to_owned(), Snapshot::to_string),
            bytes = outcome.bytes,
            sent = outcome.sent,
            files = outcome.files,
            seconds,
            average_rate = outcome.bytes as f64 / seconds.max(f64::EPSILON),
            publish_us = is_published.then_some(outcome.publish_us),
            swap_us = is_published.then_some(outcome.swap_us),
            "cycle finished"
        );
    }
}

impl Drop for Reporter {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar_style() -> ProgressStyle {
    ProgressStyle::with_template(
        "{prefix} {bar:30} {percent:>3}% {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta} {wide_msg}",
    )
    .unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A cycle ended early; `retry` says when the next attempt comes, if one comes.
pub fn cycle_failed(volume: &VolumeName, error: &CycleError, retry: Option<Duration>) {
    let retry = retry.map(|pause| pause.as_secs_f64());
    let (need, have) = error.no_room().unzip();
    let message = match error {
        CycleError::Connect(_) => "receiver cannot be reached",
        _ if need.is_some() => "no room on the receiver",
        _ => "cycle failed",
    };
    tracing::warn!(volume = %volume, stage = error.stage().as_str(), need, have, error = chain(error), retry, "{message}");
}
