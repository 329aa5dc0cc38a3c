//! Apply: blocks become a subvolume. Decompress, parse, validate, digest, rewrite into segments, feed `btrfs receive`.
//!
//! All of it happens in one thread of its own that first moves into a private mount namespace (`jail`) and may block in the pipe.
//! The rest of the agent talks to it through a bounded queue and can stop it at any time. The thread leaves either a complete,
//! verified snapshot or nothing.
//!
//! Two segments make a snapshot: the first carries the whole stream under a uuid of its own, the last is empty and carries the
//! real uuid. Making a snapshot flushes its source, so when the last one exists all before it is on disk; what
//! `btrfs receive` alone reports as done is not.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use bytes::Bytes;
use common::{
    btrfs,
    snapshot::{SnapshotId, VolumeName},
    stream::{
        Canonical, Command, Expectation, FileCounter, Item, Kind, SegmentHead, SegmentWriter, StreamDigest,
        StreamError, Validator, Violation, Walker,
    },
    wire::{
        codec::{DataFrame, Encoding},
        limits::MAX_BLOCK_BYTES,
        message::{Ack, End, Offer, Stage},
    },
};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;
use zstd::bulk::Decompressor;

use crate::{
    jail::{Jail, JailError},
    receive::{Receive, ReceiveError, Stopper},
    store::{Store, StoreError, segment_name},
    verify::{self, Verified, VerifyError},
};

/// Blocks that wait to be applied.
const QUEUED_BLOCKS: usize = 4;

/// Rewritten bytes that are collected before a write to the pipe: as much as one joined WRITE may be.
const WRITE_BYTES: usize = 1 << 20;

/// What to apply, and where.
#[derive(Debug, Clone)]
pub struct Order {
    /// For messages.
    pub volume: VolumeName,
    /// What the sender said it would send; admitted.
    pub offer: Offer,
    /// Where it goes.
    pub store: Store,
    /// An empty directory of ours: where the private namespace mounts the file system.
    pub mount_point: PathBuf,
}

/// What goes to the applying thread.
#[derive(Debug)]
pub enum Feed {
    /// The next block.
    Block(DataFrame),
    /// There is no next block.
    End(End),
}

/// How far the thread has come, for acknowledgements and progress.
#[derive(Debug, Default)]
pub struct Gauge {
    received: AtomicU64,
    applied: AtomicU64,
    files: AtomicU64,
    path: Mutex<Vec<u8>>,
}

impl Gauge {
    /// As an acknowledgement. Nothing of a running transfer is durable: it begins again after a crash.
    pub fn ack(&self) -> Ack {
        let (received, applied) = (self.received.load(Ordering::Relaxed), self.applied.load(Ordering::Relaxed));
        Ack { received, applied, durable: 0 }
    }

    /// Files seen so far.
    pub fn files(&self) -> u64 {
        self.files.load(Ordering::Relaxed)
    }

    /// The file that the stream is at.
    pub fn path(&self) -> String {
        String::from_utf8_lossy(&self.path.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

/// Why a stream was not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Blocks that do not follow each other or cannot be decompressed.
    #[error("the sender broke the protocol: {0}")]
    Block(BlockFault),
    /// Bytes that are no send stream.
    #[error("the stream was refused by the rule {rule}: {0}", rule = .0.rule())]
    Stream(#[from] StreamError),
    /// A send stream that we do not let through.
    #[error("the stream was refused by the rule {rule}: {0}", rule = .0.rule())]
    Violation(#[from] Violation),
    /// The private mount namespace.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// `btrfs receive`.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The result is not what was sent.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// Whoever fed it went away: the reason is theirs to tell.
    #[error("the transfer was given up")]
    Abandoned,
    /// The thread died: a defect.
    #[error("the applying thread died; please report it")]
    Died,
}

/// What is wrong with a block.
#[derive(Debug, thiserror::Error)]
pub enum BlockFault {
    /// A gap or a repetition.
    #[error("a block for offset {came} came where {expected} was next")]
    OutOfOrder {
        /// Where it says it belongs.
        came: u64,
        /// Where the stream is.
        expected: u64,
    },
    /// Not what its header says.
    #[error("a block that does not decompress to the length it says")]
    Decompress,
}

impl ApplyError {
    /// The stage of the cycle that failed.
    pub fn stage(&self) -> Stage {
        match self {
            Self::Verify(_) => Stage::Verify,
            Self::Abandoned | Self::Block(_) => Stage::Transfer,
            _ => Stage::Apply,
        }
    }

    /// The rule that a refused stream broke.
    pub fn rule(&self) -> Option<&'static str> {
        match self {
            Self::Stream(error) => Some(error.rule()),
            Self::Violation(violation) => Some(violation.rule()),
            Self::Block(_) => Some("block"),
            Self::Verify(VerifyError::Bytes { .. } | VerifyError::Digest { .. }) => Some("digest"),
            _ => None,
        }
    }
}

/// The applying thread, as the rest of the agent sees it. Dropped, it is stopped; what it began is removed.
#[derive(Debug)]
pub struct Application {
    /// Where blocks go. Closed early, it means that nothing more comes.
    pub feed: mpsc::Sender<Feed>,
    /// How far it has come.
    pub gauge: Arc<Gauge>,
    result: oneshot::Receiver<Result<Verified, ApplyError>>,
    stopper: Stopper,
}

impl Application {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`ApplyError::Thread`].
    pub fn start(order: Order) -> Result<Self, ApplyError> {
        let (feed, fed) = mpsc::channel(QUEUED_BLOCKS);
        let (tell, result) = oneshot::channel();
        let (gauge, stopper) = (Arc::new(Gauge::default()), Stopper::default());
        let (our_gauge, our_stopper) = (Arc::clone(&gauge), stopper.clone());
        thread::Builder::new()
            .name(format!("apply-{}", order.volume))
            .spawn(move || {
                let applied = apply(&order, fed, &our_gauge, &our_stopper);
                // If nobody waits for the result any more, nobody needs it.
                let _ = tell.send(applied);
            })
            .map_err(ApplyError::Thread)?;
        Ok(Self { feed, gauge, result, stopper })
    }

    /// The result, once there is one. Safe to cancel.
    ///
    /// # Errors
    /// See [`ApplyError`]; nothing of the transfer is left then.
    pub async fn result(&mut self) -> Result<Verified, ApplyError> {
        (&mut self.result).await.unwrap_or(Err(ApplyError::Died))
    }

    /// Stops it and waits until what it began is removed.
    pub async fn abandon(mut self) {
        self.stopper.stop();
        let (nowhere, _) = mpsc::channel(1);
        self.feed = nowhere;
        let _ = (&mut self.result).await;
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        self.stopper.stop();
    }
}

/// The whole life of the thread.
fn apply(order: &Order, feed: mpsc::Receiver<Feed>, gauge: &Gauge, stopper: &Stopper) -> Result<Verified, ApplyError> {
    let applied = Jail::enter(order.store.dir(), &order.mount_point)
        .map_err(ApplyError::from)
        .and_then(|jail| Pipeline::new(order, &jail, gauge, stopper)?.run(feed));
    let cleared = match &applied {
        Ok(_) => clear_segment(order),
        Err(_) => order.store.sweep().map(drop),
    };
    if let Err(error) = cleared {
        tracing::warn!(volume = %order.volume, error = %error, "a leftover stays; it is tried again before the next transfer");
    }
    applied
}

/// The first segment has done its duty once the last one stands.
fn clear_segment(order: &Order) -> Result<(), StoreError> {
    Ok(btrfs::delete(&order.store.dir().join(segment_name(&order.offer.snapshot.name, 1)))?)
}

/// Everything between a block and the pipe.
struct Pipeline<'a> {
    order: &'a Order,
    gauge: &'a Gauge,
    walker: Walker,
    checks: Checks,
    segments: Segments<'a>,
    decompressor: Decompressor<'static>,
    plain: Vec<u8>,
}

impl<'a> Pipeline<'a> {
    fn new(order: &'a Order, jail: &Jail, gauge: &'a Gauge, stopper: &Stopper) -> Result<Self, ApplyError> {
        Ok(Self {
            order,
            gauge,
            walker: Walker::new(),
            checks: Checks::new(&order.offer),
            segments: Segments::begin(order, jail.store_path(), gauge, stopper)?,
            decompressor: Decompressor::new().map_err(ApplyError::Thread)?,
            plain: vec![0; MAX_BLOCK_BYTES],
        })
    }

    fn run(mut self, mut feed: mpsc::Receiver<Feed>) -> Result<Verified, ApplyError> {
        loop {
            match feed.blocking_recv() {
                Some(Feed::Block(block)) => self.block(&block)?,
                Some(Feed::End(end)) => return self.end(&end),
                None => return Err(ApplyError::Abandoned),
            }
        }
    }

    fn block(&mut self, block: &DataFrame) -> Result<(), ApplyError> {
        let expected = self.gauge.received.load(Ordering::Relaxed);
        if block.offset != expected {
            return Err(ApplyError::Block(BlockFault::OutOfOrder { came: block.offset, expected }));
        }
        let Self { walker, checks, segments, .. } = self;
        let bytes: &[u8] = match block.encoding {
            Encoding::Plain => &block.body,
            Encoding::Zstd => decompress(&mut self.decompressor, &block.body, block.length, &mut self.plain)?,
        };
        walker.walk(bytes, |item| match item {
            Item::Version(version) => checks.version(version),
            Item::Command { command, end } => {
                checks.command(&command)?;
                segments.push(&command, end)
            }
        })?;
        self.gauge.received.fetch_add(block.length as u64, Ordering::Relaxed);
        self.gauge.files.store(self.checks.files.files(), Ordering::Relaxed);
        let mut path = self.gauge.path.lock().unwrap_or_else(PoisonError::into_inner);
        path.clear();
        path.extend_from_slice(self.checks.files.current_path());
        Ok(())
    }

    /// The stream is over: is it whole, and what the sender says? Only then does the last segment give the result its identity.
    fn end(self, sent: &End) -> Result<Verified, ApplyError> {
        self.walker.finish()?;
        verify::compare(sent, &self.checks.finish(self.walker.position()))?;
        self.segments.finish()?;
        self.gauge.applied.store(sent.bytes, Ordering::Relaxed);
        Ok(verify::verify(&self.order.store, &self.order.offer.snapshot)?)
    }
}

/// Decompresses into `plain`, which is as long as any block may be.
fn decompress<'b>(
    decompressor: &mut Decompressor<'_>,
    body: &Bytes,
    length: usize,
    plain: &'b mut [u8],
) -> Result<&'b [u8], ApplyError> {
    let fault = || ApplyError::Block(BlockFault::Decompress);
    let came = decompressor.decompress_to_buffer(&body[..], plain).map_err(|_| fault())?;
    if came == length { Ok(&plain[..came]) } else { Err(fault()) }
}

/// What every command must pass before it goes on.
struct Checks {
    validator: Validator,
    digest: StreamDigest,
    canonical: Canonical,
    files: FileCounter,
}

impl Checks {
    fn new(offer: &Offer) -> Self {
        let expectation = Expectation {
            name: offer.snapshot.name.to_string(),
            id: offer.snapshot.id,
            base: offer.base.as_ref().map(|base| base.id),
            stream_version: offer.stream_version,
        };
        Self {
            validator: Validator::new(expectation),
            digest: StreamDigest::new(offer.digest),
            canonical: Canonical::new(),
            files: FileCounter::new(),
        }
    }

    fn version(&mut self, version: u32) -> Result<(), ApplyError> {
        Ok(self.validator.version(version)?)
    }

    fn command(&mut self, command: &Command<'_>) -> Result<(), ApplyError> {
        self.validator.check(command)?;
        self.digest.update(command);
        self.canonical.update(command)?;
        self.files.update(command)?;
        Ok(())
    }

    fn finish(self, bytes: u64) -> End {
        End { bytes, stream_digest: self.digest.finish(), canonical: self.canonical.finish() }
    }
}

/// The segments of a snapshot, one `btrfs receive` each.
struct Segments<'a> {
    order: &'a Order,
    store_path: PathBuf,
    gauge: &'a Gauge,
    stopper: Stopper,
    head: SegmentHead,
    writer: SegmentWriter,
    receive: Receive,
    out: Vec<u8>,
}

impl<'a> Segments<'a> {
    fn begin(order: &'a Order, store_path: &Path, gauge: &'a Gauge, stopper: &Stopper) -> Result<Self, ApplyError> {
        let offer = &order.offer;
        let head = SegmentHead {
            name: segment_name(&offer.snapshot.name, 1),
            uuid: Uuid::new_v4(),
            snapshot: offer.snapshot.id,
            origin: offer.base.as_ref().map(|base| base.id),
        };
        let mut out = Vec::with_capacity(2 * WRITE_BYTES);
        let writer = SegmentWriter::begin(offer.stream_version, &head, &mut out);
        let receive = Receive::start(store_path, stopper)?;
        let (store_path, stopper) = (store_path.to_owned(), stopper.clone());
        Ok(Self { order, store_path, gauge, stopper, head, writer, receive, out })
    }

    /// Passes a checked command on. `end` is the stream offset behind it.
    fn push(&mut self, command: &Command<'_>, end: u64) -> Result<(), ApplyError> {
        // The segment has a head and an END of its own.
        if matches!(command.kind(), Kind::Subvol | Kind::Snapshot | Kind::End) {
            return Ok(());
        }
        self.writer.push(command, &mut self.out)?;
        if self.out.len() >= WRITE_BYTES {
            self.receive.write(&self.out)?;
            self.out.clear();
            // Rewriting changes lengths a little; what still waits in the pipe is not applied in any case.
            let applied = end.saturating_sub(self.receive.pending());
            self.gauge.applied.fetch_max(applied, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Ends the segment under way and gives the snapshot its identity by an empty one.
    fn finish(mut self) -> Result<(), ApplyError> {
        self.writer.finish(None, &mut self.out);
        self.receive.write(&self.out)?;
        self.receive.finish()?;
        let offer = &self.order.offer;
        let last = SegmentHead {
            name: offer.snapshot.name.to_string(),
            uuid: offer.snapshot.id.uuid,
            snapshot: offer.snapshot.id,
            origin: Some(SnapshotId { uuid: self.head.uuid, ctransid: offer.snapshot.id.ctransid }),
        };
        self.out.clear();
        SegmentWriter::begin(offer.stream_version, &last, &mut self.out).finish(Some(&offer.root_times), &mut self.out);
        let mut receive = Receive::start(&self.store_path, &self.stopper)?;
        receive.write(&self.out)?;
        Ok(receive.finish()?)
    }
}
