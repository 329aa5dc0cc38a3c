//! One sender's conversation: questions answered, offers admitted, transfers driven from the first block to `Published`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use common::{
    exit::chain,
    link::{Incoming, Link, LinkError},
    progress::Progress,
    snapshot::{Snapshot, VolumeName},
    stall::Stall,
    wire::{
        codec::DataFrame,
        limits::MAX_REASON_BYTES,
        message::{Ack, Offer, Refusal, Stage, Start, ToReceiver, ToSender, cut},
    },
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_util::sync::CancellationToken;

use crate::{
    apply::{Application, ApplyError, Feed, Order},
    publish::PublishError,
    space::{self, Beside, Claim},
    verify::Verified,
    volume::{Admitted, Parked, Publication, Refused, Turn, Volume},
};

/// How often the sender hears how far we are: often enough for a progress bar.
const ACK_INTERVAL: Duration = Duration::from_millis(200);

/// And at least after so many: the sender keeps what is not acknowledged.
const ACK_BYTES: u64 = 1 << 20;

/// The conversation as the receiver has it.
pub type SenderLink = Link<ToReceiver, ToSender>;

/// What a conversation needs of the agent.
pub struct Host {
    /// All volumes.
    pub volumes: Vec<Arc<Volume>>,
    /// The newest send stream that this machine can apply.
    pub stream_version: u32,
    /// How often a running transfer is reported.
    pub progress_interval: Duration,
    /// How long a transfer waits for its sender when the connection broke.
    pub reconnect_grace: Duration,
    /// How many times that happened.
    pub parkings: AtomicU64,
    /// Ends conversations in good order.
    pub shutdown: CancellationToken,
    /// Told after every publication, so that the former snapshot is retired and what is too old pruned.
    pub tidy: tokio::sync::Notify,
}

/// Why a transfer, and with it the conversation, ended.
#[derive(Debug, thiserror::Error)]
enum TransferError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
    #[error(transparent)]
    Publish(#[from] PublishError),
    #[error("the sender gave up: {0}")]
    SenderAborted(String),
    #[error("interrupted by a shutdown")]
    Shutdown,
    #[error("the sender has connected again")]
    TakenOver,
    #[error("a block for offset {came} came where {expected:?} was next")]
    OutOfOrder { came: u64, expected: Option<u64> },
    #[error("{}", .0.detail)]
    NoRoom(Refused),
    #[error("a thread of the transfer died; please report it")]
    Died,
}

impl TransferError {
    fn stage(&self) -> Stage {
        match self {
            Self::Apply(error) => error.stage(),
            Self::NoRoom(_) => Stage::Apply,
            Self::Publish(_) => Stage::Publish,
            _ => Stage::Transfer,
        }
    }

    fn rule(&self) -> Option<&'static str> {
        match self {
            Self::Apply(error) => error.rule(),
            _ => None,
        }
    }

    /// What was needed and what there was, in bytes.
    fn no_room(&self) -> Option<(u64, u64)> {
        match self {
            Self::NoRoom(refused) => refused.no_room(),
            _ => None,
        }
    }

    /// Whether only the connection is gone, and the rest of the transfer alive.
    fn is_of_the_connection(&self) -> bool {
        match self {
            // Whoever breaks the protocol does not get another chance to.
            Self::Link(LinkError::Io(_) | LinkError::Closed | LinkError::Silent) | Self::TakenOver => true,
            _ => false,
        }
    }

    fn log(&self, snapshot: &Snapshot) {
        let (volume, stage, rule, error) = (snapshot.name.volume(), self.stage().as_str(), self.rule(), chain(self));
        let (need, have) = self.no_room().unzip();
        if self.is_of_the_connection() {
            tracing::warn!(%volume, %snapshot, stage, error, "connection lost");
        } else {
            tracing::warn!(%volume, %snapshot, stage, rule, need, have, error, "transfer failed");
        }
    }

    /// What the sender should hear: `Failed` for what went wrong here, `Abort` for what is no failure of the transfer.
    fn message(&self) -> Option<ToSender> {
        let reason = || cut(&chain(self), MAX_REASON_BYTES).to_owned();
        match self {
            Self::Link(_) | Self::SenderAborted(_) => None,
            Self::Shutdown | Self::TakenOver => Some(ToSender::Abort { reason: reason() }),
            Self::NoRoom(refused) => Some(ToSender::Refused { why: refused.why, detail: reason() }),
            _ => Some(ToSender::Failed { stage: self.stage(), reason: reason() }),
        }
    }
}

/// Talks with a sender until one of them leaves.
pub async fn serve(mut link: SenderLink, host: &Arc<Host>) {
    let agent = link.peer.agent.clone();
    let mut tidying = TidyingDue { host, is_due: false };
    let ended = converse(&mut link, host, &mut tidying).await;
    match &ended {
        Ok(()) | Err(LinkError::Closed) => tracing::debug!(peer = agent, "peer left"),
        Err(error) => tracing::warn!(peer = agent, error = %error, "conversation ended"),
    }
    link.close().await;
}

/// Tidying behind a transfer, begun when the sender has had the answer to its next question, or has left: deletions keep the store's
/// directory to themselves, and the answer would have to wait for their end.
struct TidyingDue<'a> {
    host: &'a Host,
    is_due: bool,
}

impl TidyingDue<'_> {
    fn begin(&mut self) {
        if std::mem::take(&mut self.is_due) {
            self.host.tidy.notify_one();
        }
    }
}

impl Drop for TidyingDue<'_> {
    fn drop(&mut self) {
        self.begin();
    }
}

async fn converse(link: &mut SenderLink, host: &Arc<Host>, tidying: &mut TidyingDue<'_>) -> Result<(), LinkError> {
    loop {
        let incoming = tokio::select! {
            incoming = link.next() => incoming?,
            () = host.shutdown.cancelled() => {
                say(link, &ToSender::Abort { reason: "the receiver shuts down".to_owned() }).await;
                return Ok(());
            }
        };
        match incoming {
            Incoming::Message(ToReceiver::Query { volume }) => {
                query(link, host, &volume).await;
                tidying.begin();
            }
            Incoming::Message(ToReceiver::Offer(offer)) => {
                tidying.is_due = true;
                if !take(link, host, offer).await {
                    return Ok(());
                }
            }
            Incoming::Message(ToReceiver::Abort { .. }) => return Ok(()),
            Incoming::Message(_) | Incoming::Data(_) => return Err(LinkError::OutOfTurn),
        }
    }
}

async fn query(link: &SenderLink, host: &Host, name: &VolumeName) {
    let Some(volume) = find(host, name) else {
        let Refused { why, detail } = unknown(name);
        return say(link, &ToSender::Refused { why, detail }).await;
    };
    let version = host.stream_version;
    let answer = match spawn_blocking(move || volume.inventory(version)).await {
        Ok(Ok(inventory)) => ToSender::Inventory(inventory),
        Ok(Err(error)) => ToSender::Failed { stage: Stage::Plan, reason: chain(&error) },
        Err(_) => ToSender::Failed { stage: Stage::Plan, reason: TransferError::Died.to_string() },
    };
    say(link, &answer).await;
}

/// Takes a snapshot, if it is admitted. False when the conversation is over.
async fn take(link: &mut SenderLink, host: &Arc<Host>, offer: Offer) -> bool {
    let snapshot = offer.snapshot.clone();
    let name = snapshot.name.volume().clone();
    let Some(volume) = find(host, &name) else {
        refuse(link, &snapshot, unknown(&name)).await;
        return true;
    };
    let turn = match volume.take_turn().await {
        Ok(turn) => turn,
        Err(refused) => {
            refuse(link, &snapshot, refused).await;
            return true;
        }
    };
    let mut transfer = Transfer { host, volume: &volume, offer, turn };
    let transferred = match transfer.admit().await {
        Ok(Ok(Admission::Complete(verified))) => {
            say(link, &ToSender::Have).await;
            publish(Some(link), &volume, verified, Instant::now()).await
        }
        Ok(Ok(Admission::Run(under_way))) => transfer.run(link, under_way).await,
        Ok(Err(refused)) => {
            refuse(link, &snapshot, refused).await;
            return true;
        }
        Err(error) => Err(error),
    };
    let Err(error) = transferred else { return true };
    error.log(&snapshot);
    if let Some(message) = error.message() {
        say(link, &message).await;
    }
    false
}

/// A transfer, as long as this conversation has the turn for it.
struct Transfer<'a> {
    host: &'a Arc<Host>,
    volume: &'a Arc<Volume>,
    offer: Offer,
    turn: Turn,
}

/// What admission makes of an offer.
enum Admission {
    /// It is here already.
    Complete(Verified),
    /// It can be applied, or goes on.
    Run(UnderWay),
}

/// What must survive a broken connection.
struct UnderWay {
    application: Application,
    from: Start,
    /// Where the next block belongs; None before the sender has found the mark of the checkpoint.
    fed: Option<u64>,
    /// What has come, and counts in `fed`, while the application had no room for it.
    waiting: Option<Feed>,
    /// When the end of the stream came.
    ended: Option<Instant>,
}

impl Transfer<'_> {
    async fn admit(&mut self) -> Result<Result<Admission, Refused>, TransferError> {
        if let Some(parked) = self.turn.parked.take() {
            if parked.offer.run == self.offer.run && parked.offer.snapshot == self.offer.snapshot {
                return Ok(Ok(Admission::Run(self.go_on(parked))));
            }
            parked.application.abandon().await;
        }
        let (volume, version, wanted) = (Arc::clone(self.volume), self.host.stream_version, self.offer.clone());
        let admitted = spawn_blocking(move || volume.admit(&wanted, version)).await.map_err(|_| TransferError::Died)?;
        match admitted {
            Ok(Admitted::Complete(verified)) => Ok(Ok(Admission::Complete(verified))),
            Ok(Admitted::Order(order)) => match self.make_room(&order.claim).await? {
                Ok(()) => self.begin(*order).map(|under_way| Ok(Admission::Run(under_way))),
                Err(refused) => Ok(Err(refused)),
            },
            Err(refused) => Ok(Err(refused)),
        }
    }

    /// Makes sure that the transfer fits, as far as is known. That can take a while.
    async fn make_room(&self, claim: &Arc<Claim>) -> Result<Result<(), Refused>, TransferError> {
        tokio::select! {
            made = space::make(self.volume, claim, false) => Ok(made),
            () = self.turn.taken_over.cancelled() => Err(TransferError::TakenOver),
            () = self.host.shutdown.cancelled() => Err(TransferError::Shutdown),
        }
    }

    /// The connection broke, and here is the next one of the same run.
    fn go_on(&self, parked: Parked) -> UnderWay {
        let Parked { application, fed, waiting, ended, .. } = parked;
        let from = match (fed, application.start) {
            (Some(fed), _) => Start::Byte(fed),
            (None, start) => start,
        };
        let (volume, snapshot) = (&self.volume.config.name, &self.offer.snapshot);
        tracing::info!(%volume, %snapshot, bytes = fed, stage = "transfer", "transfer goes on");
        UnderWay { application, from, fed, waiting, ended }
    }

    fn begin(&self, order: Order) -> Result<UnderWay, TransferError> {
        let resumed = order.checkpoint.as_ref().map(|checkpoint| checkpoint.position);
        let application = Application::start(order)?;
        let base = self.offer.base.as_ref().map_or("none".to_owned(), Snapshot::to_string);
        let total = self.offer.total.map(|total| total.bytes);
        let (volume, snapshot) = (&self.volume.config.name, &self.offer.snapshot);
        tracing::info!(%volume, %snapshot, base, total, durable = resumed, stage = "transfer", "transfer started");
        let from = application.start;
        let fed = (from == Start::Beginning).then_some(0);
        Ok(UnderWay { application, from, fed, waiting: None, ended: None })
    }

    async fn run(mut self, link: &mut SenderLink, mut under_way: UnderWay) -> Result<(), TransferError> {
        say(link, &ToSender::Accept { from: under_way.from }).await;
        match self.drive(link, &mut under_way).await {
            Ok(verified) => {
                let bytes = under_way.application.gauge.ack().applied;
                tracing::info!(volume = %self.volume.config.name, snapshot = %self.offer.snapshot, bytes, stage = "verify", "verified");
                say(link, &ToSender::Verified { bytes }).await;
                let ended = under_way.ended.unwrap_or_else(Instant::now);
                publish(Some(link), self.volume, verified, ended).await
            }
            Err(error) if error.is_of_the_connection() && !self.host.reconnect_grace.is_zero() => {
                self.park(under_way);
                Err(error)
            }
            Err(error) => {
                // The turn is kept until nothing of this transfer is left but its checkpoint.
                let claim = Arc::clone(&under_way.application.claim);
                under_way.application.abandon().await;
                match error {
                    TransferError::Apply(error) if space::is_no_room(&error) => {
                        Err(TransferError::NoRoom(space::ran_out(self.volume, &claim, &self.offer, &error).await))
                    }
                    error => Err(error),
                }
            }
        }
    }

    /// Lets everything but the connection live on, for a while.
    fn park(&mut self, under_way: UnderWay) {
        let serial = self.host.parkings.fetch_add(1, Ordering::Relaxed);
        let finished = under_way.application.finished.clone();
        let UnderWay { application, fed, waiting, ended, .. } = under_way;
        Volume::park(&mut self.turn, Parked { serial, offer: self.offer.clone(), application, fed, waiting, ended });
        tokio::spawn(watch_over(Arc::clone(self.host), Arc::clone(self.volume), serial, finished));
    }

    /// Feeds the application until it has a result.
    async fn drive(&self, link: &mut SenderLink, under_way: &mut UnderWay) -> Result<Verified, TransferError> {
        let UnderWay { application, fed, waiting, ended, .. } = under_way;
        let mut acks = ticks(ACK_INTERVAL);
        let mut reports = ticks(self.host.progress_interval);
        let now = Instant::now();
        let mut progress =
            Progress::resume(now, application.gauge.ack().applied, self.offer.total.map(|total| total.bytes));
        let mut stall = Stall::new(now);
        let mut said = Ack::default();
        let feed = application.feed.clone();
        let mut room = Beside::default();
        room.look(self.volume, &application.claim, self.offer.total);
        loop {
            let ack = Ack { received: fed.unwrap_or(0), ..application.gauge.ack() };
            application.claim.advance(ack.applied);
            if ack.received >= said.received + ACK_BYTES {
                said = ack;
                say(link, &ToSender::Ack(ack)).await;
            }
            tokio::select! {
                incoming = link.next(), if waiting.is_none() => match (incoming?, *ended) {
                    (Incoming::Data(block), None) => {
                        *fed = Some(next_offset(&block, *fed)?);
                        *waiting = Some(Feed::Block(block));
                    }
                    (Incoming::Message(ToReceiver::Resume { offset }), None) if fed.is_none() => {
                        *fed = Some(offset);
                        progress = Progress::resume(Instant::now(), offset, progress.total());
                        *waiting = Some(Feed::Resume(offset));
                    }
                    (Incoming::Message(ToReceiver::End(end)), None) => {
                        *waiting = Some(Feed::End(end));
                        *ended = Some(Instant::now());
                        room.look_at_end(self.volume, &application.claim, end.bytes);
                    }
                    // Said again on another connection.
                    (Incoming::Message(ToReceiver::End(_)), Some(_)) => {}
                    (Incoming::Message(ToReceiver::Total(total)), _) => {
                        progress.set_total(total.bytes);
                        room.look(self.volume, &application.claim, Some(total));
                    }
                    (Incoming::Message(ToReceiver::Abort { reason }), _) => {
                        return Err(TransferError::SenderAborted(reason));
                    }
                    (Incoming::Message(_) | Incoming::Data(_), _) => return Err(LinkError::OutOfTurn.into()),
                },
                // A closed queue means that the thread has a result, which is the next to arrive.
                Ok(permit) = feed.reserve(), if waiting.is_some() && !(ended.is_some() && room.is_looking()) => if let Some(feed) = waiting.take() {
                    permit.send(feed);
                },
                verified = application.result() => return Ok(verified?),
                found = room.found() => found.map_err(TransferError::NoRoom)?,
                _ = acks.tick() => if ack != said {
                    said = ack;
                    say(link, &ToSender::Ack(ack)).await;
                },
                _ = reports.tick() => {
                    self.report(&mut progress, application);
                    if let Some(stalled) = stall.look(Instant::now(), ack.received.wrapping_add(ack.applied)) {
                        self.stalled(stalled, waiting.is_some() || ended.is_some(), application);
                    }
                }
                () = self.turn.taken_over.cancelled() => return Err(TransferError::TakenOver),
                () = self.host.shutdown.cancelled() => return Err(TransferError::Shutdown),
            }
        }
    }

    /// Nothing moves: says who is waited for.
    fn stalled(&self, stalled: Duration, for_us: bool, application: &Application) {
        let waits_for = if for_us { application.receive_state() } else { "the sender".to_owned() };
        let (volume, snapshot) = (&self.volume.config.name, &self.offer.snapshot);
        let seconds = stalled.as_secs_f64();
        tracing::warn!(%volume, %snapshot, stage = "transfer", seconds, waits_for, "nothing moves");
    }

    fn report(&self, progress: &mut Progress, application: &Application) {
        let ack = application.gauge.ack();
        let now = Instant::now();
        progress.update(now, ack.applied);
        let report = progress.report(now);
        tracing::info!(
            volume = %self.volume.config.name,
            snapshot = %self.offer.snapshot,
            stage = "transfer",
            percent = report.percent,
            bytes = report.bytes,
            total = report.total,
            received = ack.received,
            rate = report.rate,
            average_rate = report.average_rate,
            eta = report.eta.map(|eta| eta.as_secs_f64()),
            files = application.gauge.files(),
            file = application.gauge.path(),
            "transfer progress"
        );
    }
}

/// A parked transfer ends by itself, when its sender does not come back in time, or with the shutdown; unless its sender takes it up.
async fn watch_over(host: Arc<Host>, volume: Arc<Volume>, serial: u64, finished: CancellationToken) {
    tokio::select! {
        () = finished.cancelled() => {}
        () = sleep(host.reconnect_grace) => {}
        () = host.shutdown.cancelled() => {}
    }
    // The turn is kept until nothing of the transfer is left but its checkpoint, or its snapshot is published.
    let Some((_turn, mut parked)) = volume.unpark(serial).await else { return };
    let (name, snapshot) = (volume.config.name.clone(), parked.offer.snapshot.clone());
    if !finished.is_cancelled() {
        let seconds = host.reconnect_grace.as_secs_f64();
        tracing::warn!(volume = %name, %snapshot, seconds, stage = "transfer", "the sender did not come back; falling back to the checkpoint");
        return parked.application.abandon().await;
    }
    let outcome = match parked.application.result().await {
        Ok(verified) => {
            tracing::info!(volume = %name, %snapshot, stage = "verify", "verified");
            publish(None, &volume, verified, parked.ended.unwrap_or_else(Instant::now)).await
        }
        Err(error) => Err(error.into()),
    };
    host.tidy.notify_one();
    if let Err(error) = outcome {
        error.log(&snapshot);
    }
}

/// Publishes and tells the sender, if there is a connection. `ended` is when the stream was complete.
async fn publish(
    link: Option<&SenderLink>,
    volume: &Arc<Volume>,
    verified: Verified,
    ended: Instant,
) -> Result<(), TransferError> {
    let ours = Arc::clone(volume);
    let publication = spawn_blocking(move || ours.publish(verified)).await.map_err(|_| TransferError::Died)??;
    let publish_us = ended.elapsed().as_micros() as u64;
    if let Some(link) = link {
        let message = match publication {
            Publication::Done(published) => {
                ToSender::Published { publish_us, swap_us: published.swap.as_micros() as u64 }
            }
            Publication::Pinned(pinned) => ToSender::Arrived { pinned },
        };
        say(link, &message).await;
    }
    Ok(())
}

/// Where the block behind this one belongs.
fn next_offset(block: &DataFrame, expected: Option<u64>) -> Result<u64, TransferError> {
    if expected != Some(block.offset) {
        return Err(TransferError::OutOfOrder { came: block.offset, expected });
    }
    // The codec has seen to it that this does not overflow.
    Ok(block.offset + block.length as u64)
}

fn ticks(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks.reset();
    ticks
}

fn find(host: &Host, name: &VolumeName) -> Option<Arc<Volume>> {
    host.volumes.iter().find(|volume| volume.config.name == *name).cloned()
}

fn unknown(name: &VolumeName) -> Refused {
    Refused { why: Refusal::UnknownVolume, detail: format!("no [[volume]] of receiver.toml has the name {name}") }
}

async fn refuse(link: &SenderLink, snapshot: &Snapshot, refused: Refused) {
    let (need, have) = refused.no_room().unzip();
    let Refused { why, detail } = refused;
    let detail = cut(&detail, MAX_REASON_BYTES).to_owned();
    tracing::warn!(volume = %snapshot.name.volume(), %snapshot, need, have, error = detail, "offer refused");
    say(link, &ToSender::Refused { why, detail }).await;
}

/// Queues a message. If the connection is gone, whoever reads next from the link learns why.
async fn say(link: &SenderLink, message: &ToSender) {
    let _ = link.outbox().say(message).await;
}
