//! Apply: blocks become a subvolume. Decompress, parse, validate, digest, rewrite into segments, feed `btrfs receive`.
//!
//! All of it happens in one thread of its own that first moves into a private mount namespace (`jail`) and may block in the pipe.
//! The rest of the agent talks to it through a bounded queue and can stop it at any time. The thread leaves either a complete,
//! verified snapshot or nothing.
//!
//! The stream is cut into segments, one `btrfs receive` each, and each a subvolume that builds on the one before. Every so often a
//! segment is ended at a mark: once the next one has begun it is on disk (making a snapshot flushes its source), and becomes the
//! checkpoint from which the transfer can go on after any crash. The last segment is empty and carries the real uuid: when it exists,
//! all before it is on disk; what `btrfs receive` alone reports as done is not.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use common::{
    durable::DurableError,
    exit::chain,
    snapshot::VolumeName,
    stream::{
        Canonical, Command, Expectation, FileCounter, Item, StreamDigest, StreamError, Validator, Violation, Walker,
    },
    wire::{
        codec::{DataFrame, Encoding},
        limits::MAX_BLOCK_BYTES,
        message::{Ack, End, Offer, Stage, Start},
    },
};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use zstd::bulk::Decompressor;

use crate::{
    checkpoint::Checkpoint,
    jail::{Jail, JailError},
    receive::{ReceiveError, Stopper},
    segments::Segments,
    space::Claim,
    store::{Store, StoreError},
    verify::{self, Verified, VerifyError},
};

/// Blocks that wait to be applied.
const QUEUED_BLOCKS: usize = 4;

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
    /// Where it goes on, if it does not begin.
    pub checkpoint: Option<Checkpoint>,
    /// How often a checkpoint is made.
    pub rhythm: Rhythm,
    /// The room that it needs: kept for it as long as it lives.
    pub claim: Arc<Claim>,
}

/// How often a checkpoint is made: at the first mark behind either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rhythm {
    /// Bytes of the stream.
    pub bytes: u64,
    /// Time.
    pub time: Duration,
}

/// What goes to the applying thread.
#[derive(Debug)]
pub enum Feed {
    /// The blocks that follow begin there: first, and only if the order has a checkpoint.
    Resume(u64),
    /// The next block.
    Block(DataFrame),
    /// There is no next block.
    End(End),
}

/// How far the thread has come, for acknowledgements and progress.
#[derive(Debug, Default)]
pub struct Gauge {
    received: AtomicU64,
    pub(crate) applied: AtomicU64,
    pub(crate) durable: AtomicU64,
    files: AtomicU64,
    path: Mutex<Vec<u8>>,
}

impl Gauge {
    /// As an acknowledgement.
    pub fn ack(&self) -> Ack {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Ack { received: load(&self.received), applied: load(&self.applied), durable: load(&self.durable) }
    }

    /// The stream goes on at `offset`.
    fn start_at(&self, offset: u64) {
        for number in [&self.received, &self.applied, &self.durable] {
            number.store(offset, Ordering::Relaxed);
        }
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
    /// A checkpoint cannot be written down.
    #[error(transparent)]
    Checkpoint(#[from] DurableError),
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
    /// The sender goes on where it should begin, or the other way round.
    #[error("the blocks do not begin where the checkpoint ends")]
    UnexpectedResume,
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

    /// Whether what came so far cannot be trusted: then no checkpoint of it is kept.
    fn is_suspect(&self) -> bool {
        matches!(self, Self::Block(_) | Self::Stream(_) | Self::Violation(_) | Self::Verify(_))
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
    /// Where it wants the sender to begin.
    pub start: Start,
    /// Cancelled when there is a result.
    pub finished: CancellationToken,
    /// The room that it still needs.
    pub claim: Arc<Claim>,
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
        let start = order.checkpoint.as_ref().map_or(Start::Beginning, |checkpoint| Start::Mark(checkpoint.mark));
        let (finished, claim) = (CancellationToken::new(), Arc::clone(&order.claim));
        // Also when the thread panics.
        let finish = finished.clone().drop_guard();
        thread::Builder::new()
            .name(format!("apply-{}", order.volume))
            .spawn(move || {
                let applied = apply(&order, fed, &our_gauge, &our_stopper);
                // If nobody waits for the result any more, nobody needs it.
                let _ = tell.send(applied);
                drop(finish);
            })
            .map_err(ApplyError::Thread)?;
        Ok(Self { feed, gauge, start, finished, claim, result, stopper })
    }

    /// The result, once there is one. Safe to cancel.
    ///
    /// # Errors
    /// See [`ApplyError`]; nothing of the transfer is left then.
    pub async fn result(&mut self) -> Result<Verified, ApplyError> {
        (&mut self.result).await.unwrap_or(Err(ApplyError::Died))
    }

    /// What `btrfs receive` is doing, for whoever waits for it.
    pub fn receive_state(&self) -> String {
        self.stopper.child_state().unwrap_or_else(|| "the start of btrfs receive".to_owned())
    }

    /// Stops it and waits until what it began is removed.
    pub async fn abandon(mut self) {
        self.stopper.stop();
        let (nowhere, _) = mpsc::channel(1);
        self.feed = nowhere;
        // Whoever has the result already must not ask for it again.
        if !self.result.is_terminated() {
            let _ = (&mut self.result).await;
        }
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
        // Its segments are pruned behind its publication.
        Ok(_) => forget(&order.store),
        Err(error) if error.is_suspect() => forget(&order.store).and_then(|()| order.store.sweep(None).map(drop)),
        Err(_) => order.store.sweep(Checkpoint::load(&order.store).as_ref()).map(drop),
    };
    if let Err(error) = cleared {
        let error = chain(&error);
        tracing::warn!(volume = %order.volume, error, "a leftover stays; it is tried again before the next transfer");
    }
    applied
}

fn forget(store: &Store) -> Result<(), StoreError> {
    Checkpoint::forget(store).map_err(StoreError::Record)
}

/// Everything between a block and the pipe.
struct Pipeline<'a> {
    order: &'a Order,
    gauge: &'a Gauge,
    walker: Option<Walker>,
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
            walker: order.checkpoint.is_none().then(Walker::new),
            checks: Checks::new(order),
            segments: Segments::new(order, jail.store_path(), gauge, stopper),
            decompressor: Decompressor::new().map_err(ApplyError::Thread)?,
            plain: vec![0; MAX_BLOCK_BYTES],
        })
    }

    fn run(mut self, mut feed: mpsc::Receiver<Feed>) -> Result<Verified, ApplyError> {
        loop {
            match feed.blocking_recv() {
                Some(Feed::Resume(offset)) => self.resume(offset)?,
                Some(Feed::Block(block)) => self.block(&block)?,
                Some(Feed::End(end)) => return self.end(&end),
                None => return Err(ApplyError::Abandoned),
            }
        }
    }

    /// The sender has found the mark of the checkpoint; what follows begins at `offset` of its stream.
    fn resume(&mut self, offset: u64) -> Result<(), ApplyError> {
        if self.walker.is_some() {
            return Err(ApplyError::Block(BlockFault::UnexpectedResume));
        }
        self.walker = Some(Walker::resume(self.order.offer.stream_version, offset));
        self.gauge.start_at(offset);
        Ok(())
    }

    fn block(&mut self, block: &DataFrame) -> Result<(), ApplyError> {
        let expected = self.gauge.received.load(Ordering::Relaxed);
        let Self { walker: Some(walker), checks, segments, .. } = self else {
            return Err(ApplyError::Block(BlockFault::UnexpectedResume));
        };
        if block.offset != expected {
            return Err(ApplyError::Block(BlockFault::OutOfOrder { came: block.offset, expected }));
        }
        let bytes: &[u8] = match block.encoding {
            Encoding::Plain => &block.body,
            Encoding::Zstd => decompress(&mut self.decompressor, &block.body, block.length, &mut self.plain)?,
        };
        walker.walk(bytes, |item| match item {
            Item::Version(version) => checks.version(version),
            Item::Command { command, end } => {
                let at_mark = checks.command(&command)?;
                segments.push(&command, end)?;
                if at_mark && segments.is_due() {
                    segments.cut(&checks.canonical, end)?;
                }
                Ok(())
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
        let walker = self.walker.ok_or(ApplyError::Block(BlockFault::UnexpectedResume))?;
        walker.finish()?;
        verify::compare(sent, &self.checks.finish(walker.position()))?;
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
    fn new(order: &Order) -> Self {
        let offer = &order.offer;
        let expectation = Expectation {
            name: offer.snapshot.name.to_string(),
            id: offer.snapshot.id,
            base: offer.base.as_ref().map(|base| base.id),
            stream_version: offer.stream_version,
        };
        let resumed = order.checkpoint.as_ref().and_then(|checkpoint| Canonical::resume(&checkpoint.canonical));
        Self {
            validator: if resumed.is_some() { Validator::resume(expectation) } else { Validator::new(expectation) },
            // Of what comes now: the sender's digest begins behind the mark too.
            digest: StreamDigest::new(offer.digest),
            canonical: resumed.unwrap_or_default(),
            files: FileCounter::new(),
        }
    }

    fn version(&mut self, version: u32) -> Result<(), ApplyError> {
        Ok(self.validator.version(version)?)
    }

    /// True at a mark.
    fn command(&mut self, command: &Command<'_>) -> Result<bool, ApplyError> {
        self.validator.check(command)?;
        self.digest.update(command);
        self.files.update(command)?;
        Ok(self.canonical.update(command)?)
    }

    fn finish(self, bytes: u64) -> End {
        End { bytes, stream_digest: self.digest.finish(), canonical: self.canonical.finish() }
    }
}
