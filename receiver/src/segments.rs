//! The segments of a snapshot under way: written, ended at marks, made checkpoints of.
//!
//! See `checkpoint` for the steps and what a crash behind each leaves.

use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
    thread::{self, JoinHandle},
    time::Instant,
};

use common::{
    crash,
    exit::chain,
    snapshot::{SnapshotId, VolumeName},
    stream::{Canonical, Command, SegmentHead, SegmentWriter},
};
use uuid::Uuid;

use crate::{
    apply::{ApplyError, Gauge, Order},
    checkpoint::Checkpoint,
    receive::{PIPE_BYTES, Receive, Stopper},
    store::{discard, segment_name},
};

/// Rewritten bytes that are collected before the child is fed: as much as the pipe holds, for then they need not be copied into it.
const FEED_BYTES: usize = PIPE_BYTES;

/// Takes checked commands and makes subvolumes of them.
pub struct Segments<'a> {
    order: &'a Order,
    gauge: &'a Gauge,
    store_path: PathBuf,
    stopper: Stopper,
    out: Vec<u8>,
    current: Segment,
    /// Ended, but not known to be on disk yet.
    settling: Option<Checkpoint>,
    /// The segment of the checkpoint that stands.
    standing: Option<u32>,
    discarding: Discarding,
}

/// The segment under way.
struct Segment {
    number: u32,
    head: SegmentHead,
    writer: SegmentWriter,
    /// Started with the first bytes, not before: a sender that fast-forwards may need hours to have some.
    receive: Option<Receive>,
    bytes: u64,
    begun: Instant,
}

impl Segment {
    fn begin(order: &Order, number: u32, origin: Option<SnapshotId>, out: &mut Vec<u8>) -> Self {
        let snapshot = &order.offer.snapshot;
        let head = SegmentHead {
            name: segment_name(&snapshot.name, number),
            // Not the real uuid: whatever has that is complete.
            uuid: Uuid::new_v4(),
            snapshot: snapshot.id,
            origin,
        };
        let writer = SegmentWriter::begin(order.offer.stream_version, &head, out);
        Self { number, head, writer, receive: None, bytes: 0, begun: Instant::now() }
    }

    /// What it is once it is finished.
    fn id(&self) -> SnapshotId {
        SnapshotId { uuid: self.head.uuid, ctransid: self.head.snapshot.ctransid }
    }
}

impl<'a> Segments<'a> {
    /// The first segment of a stream, or the one behind the order's checkpoint.
    pub fn new(order: &'a Order, store_path: &Path, gauge: &'a Gauge, stopper: &Stopper) -> Self {
        let mut out = Vec::with_capacity(2 * FEED_BYTES);
        let (number, origin) = match &order.checkpoint {
            Some(checkpoint) => (checkpoint.segment + 1, Some(checkpoint.id)),
            None => (1, order.offer.base.as_ref().map(|base| base.id)),
        };
        let current = Segment::begin(order, number, origin, &mut out);
        let standing = order.checkpoint.as_ref().map(|checkpoint| checkpoint.segment);
        Self {
            order,
            gauge,
            store_path: store_path.to_owned(),
            stopper: stopper.clone(),
            out,
            current,
            settling: None,
            standing,
            discarding: Discarding::default(),
        }
    }

    /// Passes a checked command on. `end` is the stream offset behind it.
    ///
    /// # Errors
    /// From `btrfs receive`, or a checkpoint that cannot be written down.
    pub fn push(&mut self, command: &Command<'_>, end: u64) -> Result<(), ApplyError> {
        self.current.writer.push(command, &mut self.out)?;
        self.current.bytes += command.bytes().len() as u64;
        if self.out.len() >= FEED_BYTES {
            self.flush()?;
            // Rewriting changes lengths a little; what still waits in the pipe is not applied in any case.
            let pending = self.current.receive.as_ref().map_or(0, Receive::pending);
            self.gauge.applied.fetch_max(end.saturating_sub(pending), Ordering::Relaxed);
            self.settle()?;
        }
        Ok(())
    }

    /// Whether the segment should end at the next mark.
    pub fn is_due(&self) -> bool {
        let rhythm = self.order.rhythm;
        self.current.bytes >= rhythm.bytes || self.current.begun.elapsed() >= rhythm.time
    }

    /// Ends the segment at a mark, which `canonical` is at, and begins the next. `end` is the stream offset of the mark.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn cut(&mut self, canonical: &Canonical, end: u64) -> Result<(), ApplyError> {
        let finished = self.begin_next()?;
        // The one before it has had a successor for long.
        self.settle_now()?;
        crash::point("checkpoint", 1);
        let offer = &self.order.offer;
        self.settling = Some(Checkpoint {
            segment: finished.0,
            stream_version: offer.stream_version,
            position: end,
            id: finished.1,
            snapshot: offer.snapshot.clone(),
            base: offer.base.clone(),
            mark: canonical.mark(),
            canonical: canonical.state(),
        });
        // With its first bytes the next segment begins, which puts this one on disk.
        self.flush()
    }

    /// Ends the segment under way and gives the snapshot its identity by an empty one.
    ///
    /// # Errors
    /// From `btrfs receive`.
    pub fn finish(mut self) -> Result<(), ApplyError> {
        let (_, id) = self.begin_next()?;
        self.out.clear();
        let offer = &self.order.offer;
        let last = SegmentHead {
            name: offer.snapshot.name.to_string(),
            uuid: offer.snapshot.id.uuid,
            snapshot: offer.snapshot.id,
            origin: Some(id),
        };
        SegmentWriter::begin(offer.stream_version, &last, &mut self.out).finish(Some(&offer.root_times), &mut self.out);
        self.flush()?;
        if let Some(receive) = self.current.receive.take() {
            receive.finish()?;
        }
        crash::point("checkpoint", 4);
        Ok(())
    }

    /// Finishes the segment under way, whose number and identity it returns; the next one is begun, but not fed yet.
    fn begin_next(&mut self) -> Result<(u32, SnapshotId), ApplyError> {
        let (number, id) = (self.current.number, self.current.id());
        // The next one's head must come behind this one's end: they go to different processes.
        let mut head = Vec::with_capacity(2 * FEED_BYTES);
        let next = Segment::begin(self.order, number + 1, Some(id), &mut head);
        let Segment { writer, receive, .. } = std::mem::replace(&mut self.current, next);
        let mut receive = match receive {
            Some(receive) => receive,
            None => Receive::start(&self.store_path, &self.stopper)?,
        };
        writer.finish(None, &mut self.out);
        receive.feed(&mut self.out)?;
        receive.finish()?;
        self.out = head;
        Ok((number, id))
    }

    fn flush(&mut self) -> Result<(), ApplyError> {
        let receive = match &mut self.current.receive {
            Some(receive) => receive,
            none => none.insert(Receive::start(&self.store_path, &self.stopper)?),
        };
        Ok(receive.feed(&mut self.out)?)
    }

    /// Makes the ended segment the checkpoint as soon as its successor exists: then it is on disk.
    fn settle(&mut self) -> Result<(), ApplyError> {
        let successor = self.order.store.dir().join(&self.current.head.name);
        if self.settling.is_some() && successor.symlink_metadata().is_ok() {
            self.settle_now()?;
        }
        Ok(())
    }

    fn settle_now(&mut self) -> Result<(), ApplyError> {
        let Some(checkpoint) = self.settling.take() else { return Ok(()) };
        let (volume, snapshot) = (&self.order.volume, &checkpoint.snapshot);
        checkpoint.keep(&self.order.store)?;
        crash::point("checkpoint", 2);
        self.gauge.durable.store(checkpoint.position, Ordering::Relaxed);
        tracing::debug!(%volume, %snapshot, segment = checkpoint.segment, bytes = checkpoint.position, "checkpoint");
        if let Some(older) = self.standing.replace(checkpoint.segment) {
            let path = self.order.store.dir().join(segment_name(&checkpoint.snapshot.name, older));
            self.discarding.start(volume, path);
        }
        Ok(())
    }
}

/// The older segment on its way out, in a thread of its own: the next one need not wait for it.
#[derive(Debug, Default)]
struct Discarding(Option<JoinHandle<()>>);

impl Discarding {
    /// Waits for the one before, if that has not ended long ago.
    fn start(&mut self, volume: &VolumeName, path: PathBuf) {
        self.wait();
        let ours = volume.clone();
        let discard = move || {
            if let Err(error) = discard(&path) {
                stays(&ours, &error);
            }
            crash::point("checkpoint", 3);
        };
        match thread::Builder::new().name(format!("discard-{volume}")).spawn(discard) {
            Ok(thread) => self.0 = Some(thread),
            Err(error) => stays(volume, &error),
        }
    }

    fn wait(&mut self) {
        // A thread that panicked has left a segment, no more.
        let _ = self.0.take().map(JoinHandle::join);
    }
}

impl Drop for Discarding {
    /// Whoever sweeps what is left must be alone.
    fn drop(&mut self) {
        self.wait();
    }
}

fn stays(volume: &VolumeName, error: &dyn std::error::Error) {
    tracing::warn!(%volume, error = %chain(error), "a spent segment stays; it is tried again behind the transfer");
}
