//! The messages of the protocol and their bytes. The one file that names bincode.
//!
//! Hello and Refuse are laid out by hand and keep their bytes forever (a golden test pins them), so that any two versions can
//! tell each other why they cannot talk. Everything else is bincode 2 with a byte limit. Stream data never passes through here.
//!
//! | protocol | since | change |
//! |---|---|---|
//! | 1 | 0.1.0 | the first |

use serde::{Deserialize, Serialize};

use crate::{
    snapshot::{Snapshot, VolumeName},
    stream::{Digest, DigestScope, Mark, RootTimes, Total},
};

/// The version of the protocol that this build speaks.
pub const PROTOCOL: u32 = 1;

/// The application protocol that both sides name in the TLS handshake.
pub const ALPN: &[u8] = b"snapferry/1";

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
}

/// A transfer that was interrupted and can go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unfinished {
    /// The snapshot on its way.
    pub snapshot: Snapshot,
    /// What its stream builds on.
    pub base: Option<Snapshot>,
    /// Where it can go on.
    pub from: Start,
}

/// Where in a stream the sender shall begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// At its first byte.
    Beginning,
    /// Behind a mark of the canonical form.
    Mark(Mark),
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
    /// It would not fit.
    NoSpace,
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
