//! One transfer: offer, blocks, acknowledgements, end, and what the receiver made of it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use common::{
    link::{Incoming, LinkError, Outbox},
    progress::Progress,
    snapshot::Snapshot,
    stream::Total,
    wire::message::{Ack, End, Offer, Refusal, Stage, Start, ToReceiver, ToSender},
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    connect::ReceiverLink,
    pack::{self, Block, Meter, PackError, pack},
    report::Reporter,
    send::{SendError, Source, Stream},
};

/// Packed blocks that wait for the network: what the packing thread may be ahead.
const QUEUED_BLOCKS: usize = 4;

/// What a transfer was.
#[derive(Debug, Clone, Copy)]
pub struct Outcome {
    /// Bytes of the stream; 0 if the receiver had the snapshot already.
    pub bytes: u64,
    /// Bytes of blocks that went over the network.
    pub sent: u64,
    /// Files created or changed.
    pub files: u64,
    /// From the end of the stream to the exchange, in microseconds.
    pub publish_us: u64,
    /// The exchange itself, in microseconds.
    pub swap_us: u64,
}

/// Why a transfer did not end with a published snapshot.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The connection.
    #[error(transparent)]
    Link(#[from] LinkError),
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

/// What to transfer, and how.
pub struct Transfer<'a> {
    /// The snapshot and its base, opened.
    pub source: &'a Source,
    /// The offer that describes them.
    pub offer: Offer,
    /// Packing.
    pub options: pack::Options,
    /// Ends the transfer in good order.
    pub shutdown: &'a CancellationToken,
    /// How often progress is reported.
    pub progress_interval: Duration,
    /// The total, from the pass without file data, when it is not in the offer.
    pub total: Option<mpsc::Receiver<Total>>,
}

impl Transfer<'_> {
    /// Offers the snapshot and sends it.
    ///
    /// # Errors
    /// See [`PushError`]. The receiver is told when the fault is on this side, so that it never takes a part for a whole.
    pub async fn push(mut self, link: &mut ReceiverLink, reporter: &mut Reporter) -> Result<Outcome, PushError> {
        let pushed = self.dialogue(link, reporter).await;
        if let Err(error) = &pushed
            && !matches!(error, PushError::Link(_) | PushError::Refused { .. } | PushError::Failed { .. })
        {
            // Whether it can still hear this or not, the connection ends next.
            let _ = link.outbox().say(&ToReceiver::Abort { reason: error.to_string() }).await;
        }
        pushed
    }

    async fn dialogue(&mut self, link: &mut ReceiverLink, reporter: &mut Reporter) -> Result<Outcome, PushError> {
        say(link, &ToReceiver::Offer(self.offer.clone())).await;
        let mut outcome = Outcome { bytes: 0, sent: 0, files: 0, publish_us: 0, swap_us: 0 };
        match self.answer(link).await? {
            Answer::Have => {}
            Answer::Accept(Start::Beginning) => self.stream(link, reporter, &mut outcome).await?,
            Answer::Accept(Start::Mark(_)) => return Err(LinkError::OutOfTurn.into()),
        }
        loop {
            match self.answer_or_shutdown(link).await? {
                ToSender::Verified { .. } | ToSender::Ack(_) => {}
                ToSender::Published { publish_us, swap_us } => return Ok(Outcome { publish_us, swap_us, ..outcome }),
                other => return Err(self.unexpected(other)),
            }
        }
    }

    async fn answer(&self, link: &mut ReceiverLink) -> Result<Answer, PushError> {
        match self.answer_or_shutdown(link).await? {
            ToSender::Have => Ok(Answer::Have),
            ToSender::Accept { from } => Ok(Answer::Accept(from)),
            other => Err(self.unexpected(other)),
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

    /// Sends the stream and its end.
    async fn stream(
        &mut self,
        link: &mut ReceiverLink,
        reporter: &mut Reporter,
        outcome: &mut Outcome,
    ) -> Result<(), PushError> {
        let meter = Arc::new(Meter::default());
        let (mut blocks, packing) = self.start_packing(&meter)?;
        let mut progress = Progress::new(Instant::now(), self.offer.total.map(|total| total.bytes));
        let mut ticks = interval(self.progress_interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        ticks.reset();
        let outbox = link.outbox().clone();
        let mut waiting: Option<Block> = None;
        let mut ack = Ack::default();
        loop {
            tokio::select! {
                incoming = link.next() => match message(incoming?)? {
                    ToSender::Ack(new) => ack = new,
                    other => return Err(self.unexpected(other)),
                },
                block = blocks.recv(), if waiting.is_none() => match block {
                    Some(block) => waiting = Some(block),
                    None => break,
                },
                sent = send(&outbox, waiting.as_ref().map(|block| block.frame.clone())), if waiting.is_some() => {
                    // If the connection is gone, `next` knows the reason; until it says so there is nothing to send to.
                    if sent && let Some(block) = waiting.take() {
                        outcome.sent += block.frame.len() as u64;
                    }
                }
                Some(total) = next_total(&mut self.total) => {
                    self.total = None;
                    progress.set_total(total.bytes);
                    say(link, &ToReceiver::Total(total)).await;
                }
                _ = ticks.tick() => {
                    progress.update(Instant::now(), ack.applied);
                    reporter.progress(&progress.report(Instant::now()), &meter);
                }
                () = self.shutdown.cancelled() => return Err(PushError::Shutdown),
            }
        }
        let end = packing.await.map_err(|_| PushError::Died)??;
        outcome.bytes = end.bytes;
        outcome.files = meter.files.load(Ordering::Relaxed);
        say(link, &ToReceiver::End(end)).await;
        reporter.sent(&meter);
        Ok(())
    }

    /// Starts the kernel's send and the thread that packs it. Dropping the blocks ends both.
    fn start_packing(&self, meter: &Arc<Meter>) -> Result<Packing, PushError> {
        let stream = self.source.stream(self.offer.stream_version)?;
        let (into, blocks) = mpsc::channel(QUEUED_BLOCKS);
        let (options, meter) = (self.options, Arc::clone(meter));
        let packing = tokio::task::spawn_blocking(move || whole(stream, options, &meter, &into));
        Ok((blocks, packing))
    }
}

type Packing = (mpsc::Receiver<Block>, JoinHandle<Result<End, PushError>>);

/// What the receiver makes of an offer.
enum Answer {
    Have,
    Accept(Start),
}

/// Packs a stream to its end. If the kernel's send failed, that is the error, not the broken stream that it left.
fn whole(stream: Stream, options: pack::Options, meter: &Meter, into: &mpsc::Sender<Block>) -> Result<End, PushError> {
    let packed = pack(&stream, options, meter, into);
    if let Err(PackError::Gone) = packed {
        return Err(PackError::Gone.into());
    }
    match (packed, stream.finish()) {
        (Ok(end), Ok(())) => Ok(end),
        (_, Err(send)) => Err(send.into()),
        (Err(error), Ok(())) => Err(error.into()),
    }
}

/// Queues a message. If the connection is gone, whoever reads next from the link learns why.
async fn say(link: &ReceiverLink, message: &ToReceiver) {
    let _ = link.outbox().say(message).await;
}

/// True once the frame is queued; never returns when the connection is gone.
async fn send(outbox: &Outbox<ToReceiver>, frame: Option<Bytes>) -> bool {
    let Some(frame) = frame else { return false };
    if outbox.data(frame).await.is_err() {
        std::future::pending::<()>().await;
    }
    true
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
