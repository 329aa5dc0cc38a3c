//! One transfer: offer, blocks, acknowledgements, end, and what the receiver made of it.
//!
//! A broken connection does not end it. The kernel's send and the packing go on waiting, what the receiver has not acknowledged
//! is kept (a bounded window), and a new connection goes on at the byte that the receiver names. Only when that takes longer than
//! `reconnect_grace`, or when the receiver has forgotten the run, it is over; the next one goes on from the receiver's checkpoint.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::{
    exit::chain,
    link::{Incoming, LinkError, Outbox},
    progress::Progress,
    snapshot::Snapshot,
    stall::Stall,
    stream::{Mark, Total},
    wire::message::{Ack, End, Offer, Refusal, Stage, Start, ToReceiver, ToSender},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{Interval, MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connect::{ConnectError, ReceiverLink, Route, connect},
    pack::{self, Block, Meter, PackError, pack},
    report::Reporter,
    retry::Retry,
    send::{SendError, Source, Stream},
};

/// Packed blocks that wait for the network: what the packing thread may be ahead.
const QUEUED_BLOCKS: usize = 4;

/// What a transfer was.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Bytes of the stream; 0 if the receiver had the snapshot already.
    pub bytes: u64,
    /// Bytes of blocks that went over the network, those that went again included.
    pub sent: u64,
    /// Files created or changed.
    pub files: u64,
    /// From the end of the stream to the exchange, in microseconds.
    pub publish_us: u64,
    /// The exchange itself, in microseconds.
    pub swap_us: u64,
    /// It is there, but not published: this is, by the word of an operator.
    pub pinned: Option<Snapshot>,
}

/// Why a transfer did not end with a published snapshot.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The connection, and no other came within the grace.
    #[error("the connection broke and did not come back within {} s: {source}", .within.as_secs())]
    Cut {
        /// As configured.
        within: Duration,
        /// Why the last attempt failed.
        source: Box<ConnectError>,
    },
    /// The receiver does not take the offer.
    #[error("the receiver refused {snapshot}: {detail}")]
    Refused {
        /// What was offered.
        snapshot: Snapshot,
        /// Why.
        why: Refusal,
        /// The receiver's words.
        detail: String,
    },
    /// The receiver could not finish.
    #[error("the receiver failed: {reason}")]
    Failed {
        /// Where.
        stage: Stage,
        /// The receiver's words.
        reason: String,
    },
    /// This machine could not read the snapshot.
    #[error("cannot read the snapshot: {0}")]
    Send(#[from] SendError),
    /// The stream is not as it should be.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A thread of ours died: a defect.
    #[error("the packing thread died; please report it")]
    Died,
    /// We were told to stop.
    #[error("interrupted by a shutdown")]
    Shutdown,
}

impl PushError {
    /// Whether the checkpoint is of another stream, so that only a start from nothing helps.
    pub fn is_other_stream(&self) -> bool {
        matches!(self, Self::Pack(PackError::OtherStream(_)))
    }
}

/// What to transfer, and how.
pub struct Transfer<'a> {
    /// The snapshot and its base, opened.
    pub source: &'a Source,
    /// The offer that describes them.
    pub offer: Offer,
    /// Packing; where to skip to is the receiver's to say.
    pub options: pack::Options,
    /// Ends the transfer in good order.
    pub shutdown: &'a CancellationToken,
    /// How often progress is reported.
    pub progress_interval: Duration,
    /// The total, from the pass without file data, when it is not in the offer.
    pub total: Option<mpsc::Receiver<Total>>,
    /// For another connection when this one breaks.
    pub route: &'a Route,
    /// Told where the receiver's checkpoint is.
    pub resumed_at: &'a AtomicU64,
}

/// A run of the kernel's send: what outlives a connection.
struct Run {
    blocks: mpsc::Receiver<Block>,
    packing: Option<JoinHandle<Result<End, PushError>>>,
    meter: Arc<Meter>,
    /// Sent or about to be, and not acknowledged.
    window: VecDeque<Block>,
    window_bytes: u64,
    /// The first of the window that this connection has not sent.
    next: usize,
    /// The mark that it fast-forwards to first.
    skip_to: Option<Mark>,
    /// Whether the receiver knows where the blocks behind the mark begin.
    announced: bool,
    /// Whether progress is that of the fast-forward.
    forwarding: bool,
    begun: Instant,
    end: Option<End>,
    progress: Progress,
    stall: Stall,
    ack: Ack,
    sent: u64,
}

impl Transfer<'_> {
    /// Offers the snapshot and sends it, over as many connections as it takes.
    ///
    /// # Errors
    /// See [`PushError`]. The receiver is told when the fault is on this side, so that it never takes a part for a whole.
    pub async fn push(&mut self, link: &mut ReceiverLink, reporter: &mut Reporter) -> Result<Outcome, PushError> {
        let mut run = None;
        loop {
            let error = match self.dialogue(link, &mut run, reporter).await {
                Ok(outcome) => return Ok(outcome),
                Err(PushError::Link(error)) if run.is_some() && !matches!(error, LinkError::OutOfTurn) => error,
                Err(error) => {
                    if !matches!(error, PushError::Link(_) | PushError::Refused { .. } | PushError::Failed { .. }) {
                        // Whether it can still hear this or not, the connection ends next.
                        let _ = link.outbox().say(&ToReceiver::Abort { reason: error.to_string() }).await;
                    }
                    return Err(error);
                }
            };
            let volume = self.offer.snapshot.name.volume();
            let (snapshot, error) = (&self.offer.snapshot, chain(&error));
            tracing::warn!(%volume, %snapshot, stage = "transfer", error, "connection lost, connecting again");
            *link = self.reconnect().await?;
        }
    }

    /// Another connection, if one comes within the grace.
    async fn reconnect(&self) -> Result<ReceiverLink, PushError> {
        let (within, volume) = (self.route.reconnect_grace, self.offer.snapshot.name.volume());
        let given_up = Instant::now() + within;
        let mut retry = Retry::quick();
        loop {
            let attempt = async {
                let connected = connect(self.route, volume).await;
                if connected.is_err() {
                    sleep(retry.next()).await;
                }
                connected
            };
            let connected = tokio::select! {
                connected = attempt => connected,
                () = self.shutdown.cancelled() => return Err(PushError::Shutdown),
            };
            match connected {
                Ok((link, _)) => return Ok(link),
                Err(source) if Instant::now() >= given_up => {
                    return Err(PushError::Cut { within, source: Box::new(source) });
                }
                Err(_) => {}
            }
        }
    }

    /// The transfer over one connection.
    async fn dialogue(
        &mut self,
        link: &mut ReceiverLink,
        run: &mut Option<Run>,
        reporter: &mut Reporter,
    ) -> Result<Outcome, PushError> {
        say(link, &ToReceiver::Offer(self.offer.clone())).await;
        let mut outcome = Outcome::default();
        match self.answer_or_shutdown(link).await? {
            ToSender::Have => {}
            ToSender::Accept { from } => {
                let run = self.run_from(run, from)?;
                self.stream(link, reporter, run).await?;
                outcome.sent = run.sent;
                outcome.files = run.meter.files.load(Ordering::Relaxed);
            }
            other => return Err(self.unexpected(other)),
        }
        if let Some(run) = run {
            outcome.bytes = run.end.map_or(0, |end| end.bytes);
        }
        loop {
            match self.answer_or_shutdown(link).await? {
                ToSender::Verified { .. } => {}
                ToSender::Ack(ack) => self.still_applying(reporter, run, ack),
                ToSender::Published { publish_us, swap_us } => return Ok(Outcome { publish_us, swap_us, ..outcome }),
                ToSender::Arrived { pinned } => return Ok(Outcome { pinned: Some(pinned), ..outcome }),
                other => return Err(self.unexpected(other)),
            }
        }
    }

    /// The run that the receiver wants: the one that there is, from a byte on, or a new one.
    fn run_from<'r>(&self, run: &'r mut Option<Run>, from: Start) -> Result<&'r mut Run, PushError> {
        match from {
            Start::Mark(mark) => self.resumed_at.store(mark.count, Ordering::Relaxed),
            Start::Beginning => self.resumed_at.store(0, Ordering::Relaxed),
            Start::Byte(_) => {}
        }
        match (from, run.as_mut()) {
            (Start::Byte(offset), Some(run)) => {
                run.acknowledge(offset);
                run.next = 0;
                run.announced = true;
                let first = run.window.front().map(|block| block.offset);
                if first.is_some_and(|first| first != offset) {
                    return Err(LinkError::OutOfTurn.into());
                }
            }
            (Start::Byte(_), None) => return Err(LinkError::OutOfTurn.into()),
            // Cut off before the first block behind the mark: the fast-forward need not be done again.
            (Start::Mark(mark), Some(run)) if run.skip_to == Some(mark) && run.ack.received == 0 => {
                run.next = 0;
                run.announced = false;
            }
            (Start::Mark(mark), _) => *run = Some(self.begin(Some(mark))?),
            (Start::Beginning, _) => *run = Some(self.begin(None)?),
        }
        run.as_mut().ok_or(PushError::Died)
    }

    /// Starts the kernel's send and the thread that packs it. Dropping the blocks ends both.
    fn begin(&self, skip_to: Option<Mark>) -> Result<Run, PushError> {
        let stream = self.source.stream(self.offer.stream_version)?;
        let (into, blocks) = mpsc::channel(QUEUED_BLOCKS);
        let meter = Arc::new(Meter::default());
        let (options, ours) = (pack::Options { skip_to, ..self.options }, Arc::clone(&meter));
        let packing = tokio::task::spawn_blocking(move || whole(stream, options, &ours, &into));
        Ok(Run {
            blocks,
            packing: Some(packing),
            meter,
            window: VecDeque::new(),
            window_bytes: 0,
            next: 0,
            skip_to,
            announced: skip_to.is_none(),
            forwarding: skip_to.is_some(),
            begun: Instant::now(),
            end: None,
            progress: Progress::new(Instant::now(), None),
            stall: Stall::new(Instant::now()),
            ack: Ack::default(),
            sent: 0,
        })
    }

    /// Sends what is left of the stream, and its end.
    async fn stream(
        &mut self,
        link: &mut ReceiverLink,
        reporter: &mut Reporter,
        run: &mut Run,
    ) -> Result<(), PushError> {
        let mut ticks = ticks(self.progress_interval);
        let outbox = link.outbox().clone();
        loop {
            if let Some(offset) = run.announce(link).await {
                reporter.caught_up(&self.offer.snapshot, offset, run.begun.elapsed());
            }
            let has_room = run.window_bytes < self.route.window;
            let waiting = run.window.get(run.next).map(|block| block.frame.clone());
            tokio::select! {
                incoming = link.next() => match message(incoming?)? {
                    ToSender::Ack(ack) => run.acknowledged(ack),
                    other => return Err(self.unexpected(other)),
                },
                block = run.blocks.recv(), if has_room && waiting.is_none() => match block {
                    Some(block) => {
                        run.window_bytes += block.length as u64;
                        run.window.push_back(block);
                    }
                    None => break,
                },
                sent = send(&outbox, waiting.clone()), if waiting.is_some() => {
                    run.next += 1;
                    run.sent += sent;
                }
                Some(total) = next_total(&mut self.total) => {
                    self.total = None;
                    self.offer.total = Some(total);
                    say(link, &ToReceiver::Total(total)).await;
                }
                _ = ticks.tick() => self.report(reporter, run),
                () = self.shutdown.cancelled() => return Err(PushError::Shutdown),
            }
        }
        let end = match run.packing.take() {
            Some(packing) => *run.end.insert(packing.await.map_err(|_| PushError::Died)??),
            None => run.end.ok_or(PushError::Died)?,
        };
        say(link, &ToReceiver::End(end)).await;
        reporter.sent(&run.meter);
        Ok(())
    }

    /// A line or the bar, and a word if nothing moves.
    fn report(&self, reporter: &Reporter, run: &mut Run) {
        let now = Instant::now();
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let (read, skipped) = (load(&run.meter.read), load(&run.meter.skipped));
        if run.forwarding && read > skipped {
            run.forwarding = false;
            run.progress = Progress::resume(now, skipped, None);
        }
        if let Some(total) = self.offer.total {
            run.progress.set_total(total.bytes);
        }
        run.progress.update(now, if run.forwarding { read } else { run.ack.applied });
        let stage = if run.forwarding { "fast-forward" } else { "transfer" };
        reporter.progress(&run.progress.report(now), &run.meter, stage);
        if let Some(stalled) = run.stall.look(now, read.wrapping_add(run.ack.applied).wrapping_add(run.ack.received)) {
            reporter.stalled(stalled, run.window_bytes, run.ack);
        }
    }

    /// Everything is sent; acknowledgements say how far the receiver is.
    fn still_applying(&self, reporter: &Reporter, run: &mut Option<Run>, ack: Ack) {
        if let Some(run) = run {
            run.acknowledged(ack);
            if reporter.draws() {
                self.report(reporter, run);
            }
        }
    }

    async fn answer_or_shutdown(&self, link: &mut ReceiverLink) -> Result<ToSender, PushError> {
        tokio::select! {
            incoming = link.next() => message(incoming?),
            () = self.shutdown.cancelled() => Err(PushError::Shutdown),
        }
    }

    /// What ends a transfer at any time.
    fn unexpected(&self, message: ToSender) -> PushError {
        match message {
            ToSender::Refused { why, detail } => {
                PushError::Refused { snapshot: self.offer.snapshot.clone(), why, detail }
            }
            ToSender::Failed { stage, reason } => PushError::Failed { stage, reason },
            ToSender::Abort { reason } => LinkError::Refused(reason).into(),
            _ => LinkError::OutOfTurn.into(),
        }
    }
}

impl Run {
    fn acknowledged(&mut self, ack: Ack) {
        self.ack = ack;
        self.acknowledge(ack.received);
    }

    /// Forgets the blocks that end at or before `received`.
    fn acknowledge(&mut self, received: u64) {
        while let Some(block) = self.window.front() {
            if block.offset + block.length as u64 > received {
                break;
            }
            self.window_bytes -= block.length as u64;
            self.window.pop_front();
            self.next = self.next.saturating_sub(1);
        }
    }

    /// Says where the blocks begin that follow a fast-forward, as soon as there is one. Answers with it when it has been said.
    async fn announce(&mut self, link: &ReceiverLink) -> Option<u64> {
        let offset = self.window.front().filter(|_| !self.announced)?.offset;
        say(link, &ToReceiver::Resume { offset }).await;
        self.announced = true;
        Some(offset)
    }
}

/// Packs a stream to its end. If the kernel's send failed, that is the error, not the broken stream that it left.
fn whole(stream: Stream, options: pack::Options, meter: &Meter, into: &mpsc::Sender<Block>) -> Result<End, PushError> {
    match pack(&stream, options, meter, into) {
        Ok(end) => stream.finish().map(|()| end).map_err(PushError::from),
        // Then the kernel has not ended, but is about to be ended by us.
        Err(error @ (PackError::Gone | PackError::OtherStream(_))) => Err(error.into()),
        Err(error) => match stream.finish() {
            Ok(()) | Err(SendError::Ended(_)) => Err(error.into()),
            Err(send) => Err(send.into()),
        },
    }
}

fn ticks(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.reset();
    ticks
}

/// Queues a message. If the connection is gone, whoever reads next from the link learns why.
async fn say(link: &ReceiverLink, message: &ToReceiver) {
    let _ = link.outbox().say(message).await;
}

/// The length of the frame once it is queued; never returns when the connection is gone, for `next` knows the reason.
async fn send(outbox: &Outbox<ToReceiver>, frame: Option<Bytes>) -> u64 {
    let Some(frame) = frame else { return 0 };
    let length = frame.len() as u64;
    if outbox.data(frame).await.is_err() {
        std::future::pending::<()>().await;
    }
    length
}

async fn next_total(total: &mut Option<mpsc::Receiver<Total>>) -> Option<Total> {
    match total {
        Some(total) => total.recv().await,
        None => std::future::pending().await,
    }
}

fn message(incoming: Incoming<ToSender>) -> Result<ToSender, PushError> {
    match incoming {
        Incoming::Message(message) => Ok(message),
        Incoming::Data(_) => Err(LinkError::OutOfTurn.into()),
    }
}
