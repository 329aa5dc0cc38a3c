//! A connection that speaks frames: one task reads, one writes, both with bounded queues, and the silence of the other side is noticed.
//!
//! The tasks make the rest simple: whoever waits for a message can be cancelled without losing bytes, a blocking thread can send
//! blocks, and keep-alives flow also while a peer is slow. Silence is measured only while the reading task really waits for the
//! network: a receiver that is busy applying is no reason to give the sender up.

use std::{io, marker::PhantomData, time::Duration};

use bytes::{Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, WriteHalf},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_util::codec::Decoder;

use crate::wire::{
    codec::{DataFrame, Frame, FrameDecoder, FrameError, Kind, encode_frame},
    limits::{KEEP_ALIVE, MAX_BLOCK_BYTES, MAX_GREETING_TIME, MAX_SILENCE},
    message::{self, Hello, MessageError, PROTOCOL, Refuse, Role, ToReceiver, ToSender},
};

/// Frames that wait in a queue, each way: enough to keep both sides busy, little enough to forget about (a block each).
const QUEUED_FRAMES: usize = 6;

/// How long an orderly end of a connection may take before it is cut.
const MAX_CLOSING_TIME: Duration = Duration::from_secs(2);

/// What a side says, as the link needs to know it.
pub trait Message: Serialize + DeserializeOwned + PartialEq + Send + 'static {
    /// The message that only says: I am alive.
    const KEEP_ALIVE: Self;
}

impl Message for ToReceiver {
    const KEEP_ALIVE: Self = Self::KeepAlive;
}

impl Message for ToSender {
    const KEEP_ALIVE: Self = Self::KeepAlive;
}

/// What came from the other side.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<M> {
    /// A message.
    Message(M),
    /// A block of the stream.
    Data(DataFrame),
}

/// Why a connection is no use any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The network, or TLS on it.
    #[error("the connection broke: {0}")]
    Io(#[source] io::Error),
    /// It ended without a word.
    #[error("the other side closed the connection")]
    Closed,
    /// It is there no more.
    #[error("nothing came from the other side for {} s", MAX_SILENCE.as_secs())]
    Silent,
    /// The other side does not keep to the frames.
    #[error("the other side broke the protocol: {0}")]
    Frame(#[source] FrameError),
    /// The other side does not keep to the messages.
    #[error("the other side broke the protocol: {0}")]
    Message(#[from] MessageError),
    /// The other side does not begin with Hello.
    #[error("the other side did not begin with a greeting within {} s; is it a snapferry agent?", MAX_GREETING_TIME.as_secs())]
    NoGreeting,
    /// Both are senders, or both receivers.
    #[error("the other side is a {0:?} as well; a sender talks to a receiver")]
    SameRole(Role),
    /// A message that has no place here.
    #[error("the other side broke the protocol: a message out of turn")]
    OutOfTurn,
    /// The other side cannot talk to us.
    #[error("the other side refused: {0}")]
    Refused(String),
}

impl From<FrameError> for LinkError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => Self::Io(error),
            FrameError::Truncated => Self::Closed,
            other => Self::Frame(other),
        }
    }
}

/// An established conversation; `In` is what comes, `Out` is what goes.
#[derive(Debug)]
pub struct Link<In, Out> {
    /// What the other side said of itself.
    pub peer: Hello,
    incoming: mpsc::Receiver<Result<Incoming<In>, LinkError>>,
    outbox: Outbox<Out>,
    reading: JoinHandle<()>,
    writing: JoinHandle<()>,
}

/// Where messages and blocks are put that shall go to the other side. Clones share one queue.
#[derive(Debug)]
pub struct Outbox<Out> {
    queue: mpsc::Sender<Bytes>,
    says: PhantomData<fn(Out)>,
}

/// The connection is gone; [`Link::next`] says why.
#[derive(Debug, thiserror::Error)]
#[error("the connection is gone")]
pub struct Gone;

impl<In: Message, Out: Message> Link<In, Out> {
    /// Greets the other side and starts the conversation.
    ///
    /// # Errors
    /// Whoever does not greet in time, speaks another protocol or has our own role is told so and left.
    pub async fn greet<S>(stream: S, ours: &Hello) -> Result<Self, LinkError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, mut writer) = tokio::io::split(stream);
        let mut frames = Frames { reader, buffer: BytesMut::with_capacity(2 * MAX_BLOCK_BYTES) };
        write(&mut writer, &encode_frame(Kind::Hello, &ours.encode())).await?;
        let peer = match read_greeting(&mut frames, ours.role).await {
            Ok(peer) => peer,
            Err(error) => {
                // It would be polite to say why, but whoever left cannot hear it: a failure here changes nothing.
                let refuse = Refuse { reason: error.to_string() };
                let _ = write(&mut writer, &encode_frame(Kind::Refuse, &refuse.encode())).await;
                let _ = timeout(MAX_CLOSING_TIME, writer.shutdown()).await;
                return Err(error);
            }
        };
        let (queue, outgoing) = mpsc::channel(QUEUED_FRAMES);
        let (delivered, incoming) = mpsc::channel(QUEUED_FRAMES);
        let reading = tokio::spawn(read_all(frames, delivered.clone()));
        let writing = tokio::spawn(write_all::<_, Out, In>(writer, outgoing, delivered));
        Ok(Self { peer, incoming, outbox: Outbox { queue, says: PhantomData }, reading, writing })
    }

    /// What the other side says next. Safe to cancel.
    ///
    /// # Errors
    /// Once the conversation is over; [`LinkError::Closed`] if it ended in good order.
    pub async fn next(&mut self) -> Result<Incoming<In>, LinkError> {
        self.incoming.recv().await.unwrap_or(Err(LinkError::Closed))
    }

    /// Where to put what shall go to the other side.
    pub fn outbox(&self) -> &Outbox<Out> {
        &self.outbox
    }

    /// Sends what is queued and ends the conversation in good order, within a bounded time.
    pub async fn close(mut self) {
        let (nowhere, _) = mpsc::channel(1);
        drop(std::mem::replace(&mut self.outbox.queue, nowhere));
        let farewell = async {
            let _ = (&mut self.writing).await;
            // Until the other side has closed too: a socket that is closed with something unread in it sends a reset, and that can
            // overtake our last words.
            while let Some(Ok(_)) = self.incoming.recv().await {}
        };
        let _ = timeout(MAX_CLOSING_TIME, farewell).await;
    }
}

impl<In, Out> Drop for Link<In, Out> {
    fn drop(&mut self) {
        self.reading.abort();
        self.writing.abort();
    }
}

impl<Out> Clone for Outbox<Out> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), says: PhantomData }
    }
}

impl<Out: Message> Outbox<Out> {
    /// Queues a message; waits while the queue is full.
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn say(&self, message: &Out) -> Result<(), Gone> {
        // Our own messages are far below the limit; one that is not ends the conversation rather than the agent.
        let payload = message::encode(message).map_err(|_| Gone)?;
        self.queue.send(encode_frame(Kind::Control, &payload)).await.map_err(|_| Gone)
    }

    /// Queues a data frame; waits while the queue is full. See [`crate::wire::codec::write_data_prefix`].
    ///
    /// # Errors
    /// [`Gone`].
    pub async fn data(&self, frame: Bytes) -> Result<(), Gone> {
        self.queue.send(frame).await.map_err(|_| Gone)
    }
}

/// The frames of a connection, one after the other.
struct Frames<R> {
    reader: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Frames<R> {
    /// None at an end between two frames.
    async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = FrameDecoder.decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(MAX_BLOCK_BYTES / 4);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return FrameDecoder.decode_eof(&mut self.buffer);
            }
        }
    }
}

async fn read_greeting<R: AsyncRead + Unpin>(frames: &mut Frames<R>, our_role: Role) -> Result<Hello, LinkError> {
    match timeout(MAX_GREETING_TIME, frames.next()).await {
        Err(_) => Err(LinkError::NoGreeting),
        Ok(Err(error)) => Err(error.into()),
        Ok(Ok(None)) => Err(LinkError::Closed),
        Ok(Ok(Some(Frame::Hello(payload)))) => judge(Hello::decode(&payload)?, our_role),
        Ok(Ok(Some(Frame::Refuse(payload)))) => Err(LinkError::Refused(Refuse::decode(&payload)?.reason)),
        Ok(Ok(Some(_))) => Err(LinkError::NoGreeting),
    }
}

/// Whether we can talk to who greets like this. A newer protocol is fine: whoever is newer speaks the older one's.
fn judge(hello: Hello, our_role: Role) -> Result<Hello, LinkError> {
    if hello.role == our_role {
        return Err(LinkError::SameRole(our_role));
    }
    if hello.protocol < PROTOCOL {
        let reason = format!("it speaks protocol {}, this side {PROTOCOL}: upgrade the older one", hello.protocol);
        return Err(LinkError::Refused(reason));
    }
    Ok(hello)
}

async fn read_all<R: AsyncRead + Unpin, In: Message>(
    mut frames: Frames<R>,
    delivered: mpsc::Sender<Result<Incoming<In>, LinkError>>,
) {
    loop {
        let incoming = match timeout(MAX_SILENCE, frames.next()).await {
            Err(_) => Err(LinkError::Silent),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(None)) => Err(LinkError::Closed),
            Ok(Ok(Some(frame))) => understand(frame),
        };
        if matches!(&incoming, Ok(Incoming::Message(message)) if *message == In::KEEP_ALIVE) {
            continue;
        }
        let over = incoming.is_err();
        if delivered.send(incoming).await.is_err() || over {
            return;
        }
    }
}

fn understand<In: Message>(frame: Frame) -> Result<Incoming<In>, LinkError> {
    match frame {
        Frame::Data(data) => Ok(Incoming::Data(data)),
        Frame::Control(payload) => Ok(Incoming::Message(message::decode(&payload)?)),
        Frame::Refuse(payload) => Err(LinkError::Refused(Refuse::decode(&payload)?.reason)),
        Frame::Hello(_) => Err(MessageError::Greeting.into()),
    }
}

async fn write_all<W, Out, In>(
    mut writer: WriteHalf<W>,
    mut outgoing: mpsc::Receiver<Bytes>,
    delivered: mpsc::Sender<Result<Incoming<In>, LinkError>>,
) where
    W: AsyncRead + AsyncWrite,
    Out: Message,
    In: Message,
{
    // A message of ours that cannot be encoded would be a defect; without keep-alives the other side would end this anyway.
    let Ok(payload) = message::encode(&Out::KEEP_ALIVE) else { return };
    let keep_alive = encode_frame(Kind::Control, &payload);
    loop {
        let written = match timeout(KEEP_ALIVE, outgoing.recv()).await {
            Err(_) => write(&mut writer, &keep_alive).await,
            Ok(Some(frame)) => write(&mut writer, &frame).await,
            Ok(None) => break,
        };
        if let Err(error) = written {
            // The other side may have said why it left: what the reading task finds in the next moment is the better reason.
            tokio::time::sleep(MAX_CLOSING_TIME / 4).await;
            let _ = delivered.send(Err(error)).await;
            return;
        }
    }
    let _ = writer.shutdown().await;
}

async fn write<W: AsyncWrite + Unpin>(writer: &mut W, frame: &[u8]) -> Result<(), LinkError> {
    writer.write_all(frame).await.map_err(LinkError::Io)?;
    writer.flush().await.map_err(LinkError::Io)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::DuplexStream;

    use super::*;
    use crate::wire::codec::{DATA_PREFIX_BYTES, Encoding, write_data_prefix};

    fn hello(role: Role) -> Hello {
        Hello { protocol: PROTOCOL, role, agent: "test".into(), software: "test".into() }
    }

    async fn pair() -> (Link<ToSender, ToReceiver>, Link<ToReceiver, ToSender>) {
        let (a, b) = tokio::io::duplex(1 << 16);
        let (sender, receiver) = (hello(Role::Sender), hello(Role::Receiver));
        let (sender, receiver) = tokio::join!(Link::greet(a, &sender), Link::greet(b, &receiver));
        (sender.unwrap(), receiver.unwrap())
    }

    async fn raw() -> (DuplexStream, JoinHandle<Result<Link<ToReceiver, ToSender>, LinkError>>) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        (ours, tokio::spawn(async move { Link::greet(theirs, &hello(Role::Receiver)).await }))
    }

    #[tokio::test]
    async fn messages_and_blocks_arrive_in_their_order_and_the_end_is_in_good_order() {
        let (sender, mut receiver) = pair().await;
        let mut frame = vec![0; DATA_PREFIX_BYTES];
        frame.extend_from_slice(b"abc");
        write_data_prefix(&mut frame, 5, 3, Encoding::Plain);
        let query = ToReceiver::Query { volume: "v".parse().unwrap() };
        sender.outbox().data(frame.into()).await.unwrap();
        sender.outbox().say(&query).await.unwrap();
        sender.close().await;
        let block = DataFrame { offset: 5, length: 3, encoding: Encoding::Plain, body: Bytes::from_static(b"abc") };
        assert_eq!(receiver.next().await.unwrap(), Incoming::Data(block));
        assert_eq!(receiver.next().await.unwrap(), Incoming::Message(query));
        assert!(matches!(receiver.next().await, Err(LinkError::Closed)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_quiet_peer_is_kept_and_a_silent_one_is_given_up_in_time() {
        let (mut sender, receiver) = pair().await;
        let kept = timeout(Duration::from_secs(300), sender.next()).await;
        assert!(kept.is_err(), "five quiet minutes ended a conversation: {kept:?}");
        receiver.writing.abort();
        let start = tokio::time::Instant::now();
        let given_up = sender.next().await;
        assert!(matches!(given_up, Err(LinkError::Silent)), "{given_up:?}");
        assert!(start.elapsed() <= Duration::from_secs(30), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn strangers_and_twins_are_told_why_and_left() {
        let (mut stranger, link) = raw().await;
        stranger.write_all(b"GET / HTTP/1.1\r\nHost: mirror\r\n\r\n").await.unwrap();
        assert!(matches!(link.await.unwrap(), Err(LinkError::Frame(_))));

        let (_mute, link) = raw().await;
        assert!(matches!(link.await.unwrap(), Err(LinkError::NoGreeting)));

        let (mut twin, link) = raw().await;
        twin.write_all(&encode_frame(Kind::Hello, &hello(Role::Receiver).encode())).await.unwrap();
        assert!(matches!(link.await.unwrap(), Err(LinkError::SameRole(Role::Receiver))));
        let mut answer = Vec::new();
        twin.read_to_end(&mut answer).await.unwrap();
        assert!(String::from_utf8_lossy(&answer).contains("a sender talks to a receiver"), "{answer:?}");
    }

    #[tokio::test]
    async fn an_older_protocol_is_refused_with_both_numbers() {
        let (mut old, link) = raw().await;
        let hello = Hello { protocol: 0, ..hello(Role::Sender) };
        old.write_all(&encode_frame(Kind::Hello, &hello.encode())).await.unwrap();
        let error = link.await.unwrap().err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("protocol 0") && error.contains(&PROTOCOL.to_string()), "{error}");
    }

    #[tokio::test]
    async fn closing_towards_a_peer_that_reads_nothing_takes_a_bounded_time() {
        let (sender, _receiver) = pair().await;
        let outbox = sender.outbox().clone();
        let stuffing = tokio::spawn(async move {
            let mut frame = vec![7; DATA_PREFIX_BYTES + MAX_BLOCK_BYTES];
            write_data_prefix(&mut frame, 0, MAX_BLOCK_BYTES, Encoding::Plain);
            let frame = Bytes::from(frame);
            while outbox.data(frame.clone()).await.is_ok() {}
        });
        let start = Instant::now();
        sender.close().await;
        assert!(start.elapsed() < MAX_CLOSING_TIME + Duration::from_secs(1));
        stuffing.await.unwrap();
    }
}
