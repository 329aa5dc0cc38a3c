//! One sender's conversation: questions answered, offers admitted, transfers driven from the first block to `Published`.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::{
    exit::chain,
    link::{Incoming, Link, LinkError},
    progress::Progress,
    snapshot::{Snapshot, VolumeName},
    wire::{
        limits::MAX_REASON_BYTES,
        message::{Ack, Offer, Refusal, Stage, Start, ToReceiver, ToSender, cut},
    },
};
use tokio::{
    task::spawn_blocking,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    apply::{Application, ApplyError, Feed, Order},
    publish::PublishError,
    verify::Verified,
    volume::{Admitted, Refused, Volume},
};

/// How often the sender hears how far we are: often enough for a progress bar.
const ACK_INTERVAL: Duration = Duration::from_millis(200);

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
    #[error("a thread of the transfer died; please report it")]
    Died,
}

impl TransferError {
    fn stage(&self) -> Stage {
        match self {
            Self::Apply(error) => error.stage(),
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

    /// What the sender should hear: `Failed` for what went wrong here, `Abort` for what is no failure of the transfer.
    fn message(&self) -> Option<ToSender> {
        let reason = || cut(&chain(self), MAX_REASON_BYTES).to_owned();
        match self {
            Self::Link(_) | Self::SenderAborted(_) => None,
            Self::Shutdown | Self::TakenOver => Some(ToSender::Abort { reason: reason() }),
            _ => Some(ToSender::Failed { stage: self.stage(), reason: reason() }),
        }
    }
}

/// Talks with a sender until one of them leaves.
pub async fn serve(mut link: SenderLink, host: &Host) {
    let agent = link.peer.agent.clone();
    let ended = converse(&mut link, host).await;
    match &ended {
        Ok(()) | Err(LinkError::Closed) => tracing::debug!(peer = agent, "peer left"),
        Err(error) => tracing::warn!(peer = agent, error = %error, "conversation ended"),
    }
    link.close().await;
}

async fn converse(link: &mut SenderLink, host: &Host) -> Result<(), LinkError> {
    loop {
        let incoming = tokio::select! {
            incoming = link.next() => incoming?,
            () = host.shutdown.cancelled() => {
                say(link, &ToSender::Abort { reason: "the receiver shuts down".to_owned() }).await;
                return Ok(());
            }
        };
        match incoming {
            Incoming::Message(ToReceiver::Query { volume }) => query(link, host, &volume).await,
            Incoming::Message(ToReceiver::Offer(offer)) => {
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
async fn take(link: &mut SenderLink, host: &Host, offer: Offer) -> bool {
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
    let (ours, version, wanted) = (Arc::clone(&volume), host.stream_version, offer.clone());
    let admitted = spawn_blocking(move || ours.admit(&wanted, version)).await;
    let transferred = match admitted {
        Ok(Ok(Admitted::Complete(verified))) => {
            say(link, &ToSender::Have).await;
            publish(link, host, &volume, verified, Instant::now()).await
        }
        Ok(Ok(Admitted::Order(order))) => {
            Transfer { host, volume: &volume, offer: &offer, taken_over: &turn.taken_over }.run(link, *order).await
        }
        Ok(Err(refused)) => {
            refuse(link, &snapshot, refused).await;
            return true;
        }
        Err(_) => Err(TransferError::Died),
    };
    let Err(error) = transferred else { return true };
    tracing::warn!(
        volume = %name, snapshot = %snapshot, stage = error.stage().as_str(), rule = error.rule(), error = chain(&error),
        "transfer failed"
    );
    if let Some(message) = error.message() {
        say(link, &message).await;
    }
    false
}

/// A transfer under way.
struct Transfer<'a> {
    host: &'a Host,
    volume: &'a Arc<Volume>,
    offer: &'a Offer,
    taken_over: &'a CancellationToken,
}

impl Transfer<'_> {
    async fn run(&self, link: &mut SenderLink, order: Order) -> Result<(), TransferError> {
        let mut application = Application::start(order)?;
        let base = self.offer.base.as_ref().map_or("none".to_owned(), Snapshot::to_string);
        let total = self.offer.total.map(|total| total.bytes);
        tracing::info!(
            volume = %self.volume.config.name, snapshot = %self.offer.snapshot, base, total, stage = "transfer", "transfer started"
        );
        say(link, &ToSender::Accept { from: Start::Beginning }).await;
        match self.drive(link, &mut application).await {
            Ok((verified, ended)) => {
                let bytes = application.gauge.ack().received;
                tracing::info!(volume = %self.volume.config.name, snapshot = %self.offer.snapshot, bytes, stage = "verify", "verified");
                say(link, &ToSender::Verified { bytes }).await;
                publish(link, self.host, self.volume, verified, ended).await
            }
            Err(error) => {
                // The turn is kept until nothing of this transfer is left.
                application.abandon().await;
                Err(error)
            }
        }
    }

    /// Feeds the application until it has a result. Answers with when the end of the stream came.
    async fn drive(
        &self,
        link: &mut SenderLink,
        application: &mut Application,
    ) -> Result<(Verified, Instant), TransferError> {
        let mut acks = ticks(ACK_INTERVAL);
        let mut reports = ticks(self.host.progress_interval);
        let mut progress = Progress::new(Instant::now(), self.offer.total.map(|total| total.bytes));
        let (mut said, mut waiting, mut ended) = (Ack::default(), None, None);
        let feed = application.feed.clone();
        loop {
            tokio::select! {
                incoming = link.next(), if waiting.is_none() => match (incoming?, ended) {
                    (Incoming::Data(block), None) => waiting = Some(Feed::Block(block)),
                    (Incoming::Message(ToReceiver::End(end)), None) => {
                        waiting = Some(Feed::End(end));
                        ended = Some(Instant::now());
                    }
                    (Incoming::Message(ToReceiver::Total(total)), _) => progress.set_total(total.bytes),
                    (Incoming::Message(ToReceiver::Abort { reason }), _) => {
                        return Err(TransferError::SenderAborted(reason));
                    }
                    (Incoming::Message(_) | Incoming::Data(_), _) => return Err(LinkError::OutOfTurn.into()),
                },
                // A closed queue means that the thread has a result, which is the next to arrive.
                Ok(permit) = feed.reserve(), if waiting.is_some() => if let Some(feed) = waiting.take() {
                    permit.send(feed);
                },
                verified = application.result() => {
                    return Ok((verified?, ended.unwrap_or_else(Instant::now)));
                }
                _ = acks.tick() => {
                    let ack = application.gauge.ack();
                    if ack != said {
                        said = ack;
                        say(link, &ToSender::Ack(ack)).await;
                    }
                }
                _ = reports.tick() => self.report(&mut progress, application),
                () = self.taken_over.cancelled() => return Err(TransferError::TakenOver),
                () = self.host.shutdown.cancelled() => return Err(TransferError::Shutdown),
            }
        }
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

/// Publishes and tells the sender. `ended` is when the stream was complete.
async fn publish(
    link: &SenderLink,
    host: &Host,
    volume: &Arc<Volume>,
    verified: Verified,
    ended: Instant,
) -> Result<(), TransferError> {
    let ours = Arc::clone(volume);
    let published = spawn_blocking(move || ours.publish(verified)).await.map_err(|_| TransferError::Died)??;
    host.tidy.notify_one();
    let publish_us = ended.elapsed().as_micros() as u64;
    let swap_us = published.swap.as_micros() as u64;
    say(link, &ToSender::Published { publish_us, swap_us }).await;
    Ok(())
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

async fn refuse(link: &SenderLink, snapshot: &Snapshot, Refused { why, detail }: Refused) {
    let detail = cut(&detail, MAX_REASON_BYTES).to_owned();
    tracing::warn!(volume = %snapshot.name.volume(), snapshot = %snapshot, error = detail, "offer refused");
    say(link, &ToSender::Refused { why, detail }).await;
}

/// Queues a message. If the connection is gone, whoever reads next from the link learns why.
async fn say(link: &SenderLink, message: &ToSender) {
    let _ = link.outbox().say(message).await;
}
