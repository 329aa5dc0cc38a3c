//! The messages of the protocol and their bytes. The one file that names bincode.
//!
//! Hello and Refuse are laid out by hand and keep their bytes forever (a golden test pins them), so that any two versions can
//! tell each other why they cannot talk. Everything else is bincode 2 with a byte limit. Stream data never passes through here.
//!
//! | protocol | since | change |
//! |---|---|---|
//! | 1 | 0.1.0 | the first |

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::limits;
use crate::{
    snapshot::{Snapshot, VolumeName},
    stream::{Digest, DigestScope, Mark, RootTimes, Total},
};

/// The version of the protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// The application protocol that both sides name in the TLS handshake.
pub const ALPN: &[u8] = b"snapferry/1";

/// The first frame of either side. Its bytes never change.
///
/// `u32 protocol, u8 role, u8 length, agent, u8 length, software`; what follows in later versions is ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The newest protocol that it speaks.
    pub protocol: u32,
    /// Which of the two programs it is.
    pub role: Role,
    /// `[agent] name`.
    pub agent: String,
    /// Program and version, for the other side's log.
    pub software: String,
}

/// Which of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// snapferry-sender
    Sender = 1,
    /// snapferry-receiver
    Receiver = 2,
}

/// The last frame of a side that cannot talk to the other. Its bytes never change: `u8 length, reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// For the other side's log.
    pub reason: String,
}

/// Bytes that are no message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Hello or Refuse with a wrong layout.
    #[error("a greeting that is not laid out as one")]
    Greeting,
    /// Not a message of this protocol.
    #[error("not a message of protocol {PROTOCOL}: {0}")]
    Decode(#[from] bincode::error::DecodeError),
    /// A message with something behind it.
    #[error("a message with {0} bytes behind it")]
    Trailing(usize),
    /// Our own message cannot be encoded.
    #[error("a message that cannot be encoded: {0}")]
    Encode(#[from] bincode::error::EncodeError),
    /// Our own message is larger than the other side takes.
    #[error("a message of {0} bytes is larger than {max}", max = limits::MAX_CONTROL_BYTES)]
    TooLarge(usize),
}

/// A message as the payload of a control frame.
///
/// # Errors
/// [`MessageError::TooLarge`] for an inventory of absurdly many snapshots.
pub fn encode<M: Serialize>(message: &M) -> Result<Vec<u8>, MessageError> {
    let bytes = bincode::serde::encode_to_vec(message, bincode::config::standard())?;
    if bytes.len() > limits::MAX_CONTROL_BYTES {
        return Err(MessageError::TooLarge(bytes.len()));
    }
    Ok(bytes)
}

/// The message in the payload of a control frame.
///
/// # Errors
/// Whatever is not exactly one message; no length in it makes us allocate more than the frame may carry.
pub fn decode<M: DeserializeOwned>(payload: &[u8]) -> Result<M, MessageError> {
    let config = bincode::config::standard().with_limit::<{ limits::MAX_CONTROL_BYTES }>();
    let (message, used) = bincode::serde::decode_from_slice(payload, config)?;
    match payload.len() - used {
        0 => Ok(message),
        rest => Err(MessageError::Trailing(rest)),
    }
}

impl Hello {
    /// The payload of a Hello frame; texts are cut to what fits.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.protocol.to_le_bytes().to_vec();
        bytes.push(self.role as u8);
        put_text(&mut bytes, &self.agent);
        put_text(&mut bytes, &self.software);
        bytes
    }

    /// # Errors
    /// [`MessageError::Greeting`].
    pub fn decode(payload: &[u8]) -> Result<Self, MessageError> {
        let (protocol, rest) = payload.split_first_chunk::<4>().ok_or(MessageError::Greeting)?;
        let (&role, rest) = rest.split_first().ok_or(MessageError::Greeting)?;
        let role = match role {
            1 => Role::Sender,
            2 => Role::Receiver,
            _ => return Err(MessageError::Greeting),
        };
        let (agent, rest) = take_text(rest)?;
        let (software, _) = take_text(rest)?;
        Ok(Self { protocol: u32::from_le_bytes(*protocol), role, agent, software })
    }
}

impl Refuse {
    /// The payload of a Refuse frame; the reason is cut to what fits.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_text(&mut bytes, &self.reason);
        bytes
    }

    /// # Errors
    /// [`MessageError::Greeting`].
    pub fn decode(payload: &[u8]) -> Result<Self, MessageError> {
        take_text(payload).map(|(reason, _)| Self { reason })
    }
}

/// `text`, cut at a character's border so that it has at most `max` bytes.
pub fn cut(text: &str, max: usize) -> &str {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    let text = cut(text, limits::MAX_GREETING_TEXT_BYTES);
    bytes.push(text.len() as u8);
    bytes.extend_from_slice(text.as_bytes());
}

fn take_text(bytes: &[u8]) -> Result<(String, &[u8]), MessageError> {
    let (&length, rest) = bytes.split_first().ok_or(MessageError::Greeting)?;
    let (text, rest) = rest.split_at_checked(usize::from(length)).ok_or(MessageError::Greeting)?;
    Ok((String::from_utf8_lossy(text).into_owned(), rest))
}

/// What the sender says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToReceiver {
    /// What do you have of this volume? Answered by [`ToSender::Inventory`].
    Query {
        /// The volume asked about.
        volume: VolumeName,
    },
    /// Take this snapshot. Answered by [`ToSender::Accept`], [`ToSender::Have`] or [`ToSender::Refused`].
    Offer(Offer),
    /// How much it will be, once known.
    Total(Total),
    /// The blocks that follow begin there, behind the mark of [`ToSender::Accept`]. (Bytes are counted in the stream of the
    /// moment: another send of the snapshot reaches the same mark at another byte.)
    Resume {
        /// Offset of the first byte that follows.
        offset: u64,
    },
    /// The stream is complete.
    End(End),
    /// The transfer cannot go on; what was sent so far is not a whole stream.
    Abort {
        /// For the receiver's log.
        reason: String,
    },
    /// I am alive.
    KeepAlive,
}

/// What the receiver says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToSender {
    /// What the receiver has of the volume.
    Inventory(Inventory),
    /// Send: the stream of the offered snapshot, from there on.
    Accept {
        /// Where in the stream the sender shall begin.
        from: Start,
    },
    /// The offered snapshot is here already, complete; [`ToSender::Published`] follows.
    Have,
    /// The offer is not taken; the connection stays usable.
    Refused {
        /// Why.
        why: Refusal,
        /// The same for people, with figures.
        detail: String,
    },
    /// How far the stream has come.
    Ack(Ack),
    /// The replica is complete and equals what was sent.
    Verified {
        /// Bytes of the stream as sent by the kernel.
        bytes: u64,
    },
    /// New clients see the snapshot from now on.
    Published {
        /// From the end of the stream to the exchange of the mount points, in microseconds.
        publish_us: u64,
        /// The exchange itself, in microseconds; 0 if the snapshot was the published one already.
        swap_us: u64,
    },
    /// The transfer ended without a result; the published snapshot is untouched.
    Failed {
        /// Where it failed.
        stage: Stage,
        /// Why, and what to do.
        reason: String,
    },
    /// The receiver ends the conversation, for instance because it shuts down.
    Abort {
        /// For the sender's log.
        reason: String,
    },
    /// I am alive.
    KeepAlive,
    /// In place of [`ToSender::Published`]: the snapshot is complete and stays, but new clients go on seeing the one that an
    /// operator pinned.
    Arrived {
        /// What is published.
        pinned: Snapshot,
    },
}

/// A snapshot that the receiver should take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Which one.
    pub snapshot: Snapshot,
    /// What the stream builds on: the receiver must have it. None for a full send.
    pub base: Option<Snapshot>,
    /// Version of the send stream, 1 or 2.
    pub stream_version: u32,
    /// What the stream digest covers.
    pub digest: DigestScope,
    /// The times of the snapshot's root directory, which an incremental stream does not always carry.
    pub root_times: RootTimes,
    /// How much it will be, if that is known already; else [`ToReceiver::Total`] follows.
    pub total: Option<Total>,
    /// The run of the kernel's send that the blocks are from: as long as it lives, a new connection goes on at the byte.
    pub run: [u8; 16],
    /// False: forget what there is of this snapshot, it begins from nothing.
    pub resume: bool,
}

/// What the receiver has of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// Complete snapshots, newest first.
    pub snapshots: Vec<Snapshot>,
    /// The published one of them.
    pub published: Option<Snapshot>,
    /// A transfer that can go on.
    pub unfinished: Option<Unfinished>,
    /// The newest version of the send stream that the receiver can apply.
    pub stream_version: u32,
    /// Whether an operator pinned the published one: nothing else is published, and what arrives only has to be complete.
    pub pinned: bool,
}

/// A transfer that was interrupted and can go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// The snapshot on its way.
    pub snapshot: Snapshot,
    /// What its stream builds on.
    pub base: Option<Snapshot>,
}

/// Where in a stream the sender shall begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// At its first byte.
    Beginning,
    /// Behind a mark of the canonical form: send again, discard up to there.
    Mark(Mark),
    /// At this byte of the run of the offer: everything before it is here.
    Byte(u64),
}

/// The end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Bytes of the stream as the kernel wrote it.
    pub bytes: u64,
    /// Stream digest over [`Offer::digest`].
    pub stream_digest: Digest,
    /// Canonical commands and digest of the whole.
    pub canonical: Mark,
}

/// How far the receiver is with the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Ack {
    /// Bytes of the stream that arrived.
    pub received: u64,
    /// Bytes of the stream that `btrfs receive` has read.
    pub applied: u64,
    /// Bytes of the stream that a crash of the receiver would not take away.
    pub durable: u64,
}

/// Why an offer is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The receiver has no volume of that name.
    UnknownVolume,
    /// The base is not there, or not complete.
    BaseMissing,
    /// Another subvolume is in the way.
    NameTaken,
    /// A transfer of this volume is under way.
    Busy,
    /// It does not fit, or did not.
    NoSpace {
        /// Bytes that it needs of what there is too little of.
        need: u64,
        /// Bytes that it may have.
        have: u64,
    },
    /// The offer contradicts itself or the protocol.
    BadOffer,
}

/// A stage of a cycle, as it stands in messages and in the field `stage` of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Taking the snapshot.
    Snapshot,
    /// Deciding what to send.
    Plan,
    /// Bytes on their way.
    Transfer,
    /// `btrfs receive`.
    Apply,
    /// Comparing the replica with what was sent.
    Verify,
    /// Making it the one that new clients see.
    Publish,
    /// Deleting what retention lets go.
    Prune,
}

impl Stage {
    /// As it stands in log lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Plan => "plan",
            Self::Transfer => "transfer",
            Self::Apply => "apply",
            Self::Verify => "verify",
            Self::Publish => "publish",
            Self::Prune => "prune",
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// These bytes are out in the world: a change here is a mistake, not an update.
    #[test]
    fn hello_and_refuse_keep_their_bytes_forever() {
        let hello = Hello { protocol: 1, role: Role::Sender, agent: "head".into(), software: "x 1".into() };
        let golden = b"\x01\0\0\0\x01\x04head\x03x 1";
        assert_eq!(hello.encode(), golden);
        assert_eq!(Hello::decode(golden).unwrap(), hello);
        let later = [&golden[..], b"whatever comes later"].concat();
        assert_eq!(Hello::decode(&later).unwrap(), hello, "what a later version adds is ignored");
        let refuse = Refuse { reason: "no".into() };
        assert_eq!(refuse.encode(), b"\x02no");
        assert_eq!(Refuse::decode(b"\x02no").unwrap(), refuse);
    }

    #[test]
    fn broken_greetings_are_errors() {
        for bytes in [&b""[..], b"\x01\0\0", b"\x01\0\0\0\x03\0\0", b"\x01\0\0\0\x01\x04hea", b"\x01\0\0\0\x01\x00"] {
            assert!(Hello::decode(bytes).is_err(), "{bytes:?}");
        }
        assert!(Refuse::decode(b"\x05no").is_err());
    }

    #[test]
    fn a_length_in_a_message_allocates_nothing_beyond_the_limit() {
        // ToSender::Inventory (variant 0) with a list of 2^63 snapshots.
        let hostile = [0, 253, 0, 0, 0, 0, 0, 0, 0, 128];
        assert!(matches!(decode::<ToSender>(&hostile), Err(MessageError::Decode(_))));
    }

    #[test]
    fn a_message_comes_out_as_it_went_in_and_alone() {
        let message = ToReceiver::Query { volume: "substitutes".parse().unwrap() };
        let bytes = encode(&message).unwrap();
        assert_eq!(decode::<ToReceiver>(&bytes).unwrap(), message);
        assert!(matches!(decode::<ToReceiver>(&[&bytes[..], b"x"].concat()), Err(MessageError::Trailing(1))));
        let bad_name = encode(&("\u{0}", "../x")).unwrap();
        assert!(decode::<ToReceiver>(&bad_name).is_err(), "a name that is none does not get through");
    }

    #[test]
    fn texts_are_cut_at_a_character() {
        assert_eq!(cut("aé", 2), "a");
        assert_eq!(cut("aé", 3), "aé");
    }
}
