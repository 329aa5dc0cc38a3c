//! What can be wrong with the bytes of a stream, whatever they mean.

use super::format::{Attr, Kind, MAX_COMMAND_BYTES, NEWEST_VERSION};

/// Bytes that are no send stream. Offsets are bytes from the beginning of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// It does not begin as a stream does.
    #[error("this is no btrfs send stream: it does not begin with \"btrfs-stream\"")]
    BadMagic,
    /// A version of the format that we do not know.
    #[error("version {0} of the send stream is not supported, only 1 to {NEWEST_VERSION}")]
    UnsupportedVersion(u32),
    /// A command is longer than any that the kernel writes.
    #[error("the command at byte {position} claims to be {bytes} bytes long; {MAX_COMMAND_BYTES} are the most")]
    CommandTooLong {
        /// Where the command begins.
        position: u64,
        /// Its length with its header, as it says.
        bytes: u64,
    },
    /// The bytes are not those that the kernel wrote.
    #[error("the checksum of the command at byte {position} is wrong: the data was damaged on its way")]
    BadChecksum {
        /// Where the command begins.
        position: u64,
    },
    /// A number that stands for no command.
    #[error("the command at byte {position} has the unknown number {number}")]
    UnknownCommand {
        /// Where the command begins.
        position: u64,
        /// Its number.
        number: u16,
    },
    /// The attributes do not fill the body of the command.
    #[error("the attributes of the {kind} at byte {position} do not fit into it")]
    BadAttributes {
        /// Where the command begins.
        position: u64,
        /// What it is.
        kind: Kind,
    },
    /// A command lacks an attribute.
    #[error("a {kind} has no {attr}")]
    MissingAttribute {
        /// The command.
        kind: Kind,
        /// What it lacks.
        attr: Attr,
    },
    /// An attribute is not as long as values of its type are.
    #[error("the {attr} of a {kind} has {bytes} bytes")]
    AttributeLength {
        /// The command.
        kind: Kind,
        /// The attribute.
        attr: Attr,
        /// How long it is.
        bytes: usize,
    },
    /// A range of a file ends beyond the largest file.
    #[error("the range of a {kind} ends beyond the largest file")]
    RangeOverflow {
        /// The command.
        kind: Kind,
    },
    /// Something follows END.
    #[error("the stream goes on behind its END at byte {position}")]
    AfterEnd {
        /// Where it should have been over.
        position: u64,
    },
    /// The stream is over, but END has not come.
    #[error("the stream breaks off behind byte {position}: it has no END")]
    Truncated {
        /// End of the last whole command.
        position: u64,
    },
}

impl StreamError {
    /// The name of the broken rule, for logs.
    pub const fn rule(&self) -> &'static str {
        match self {
            Self::BadMagic => "stream-magic",
            Self::UnsupportedVersion(_) => "stream-version",
            Self::CommandTooLong { .. } => "command-length",
            Self::BadChecksum { .. } => "checksum",
            Self::UnknownCommand { .. } => "unknown-command",
            Self::BadAttributes { .. } => "attribute-framing",
            Self::MissingAttribute { .. } => "missing-attribute",
            Self::AttributeLength { .. } => "attribute-length",
            Self::RangeOverflow { .. } => "range-overflow",
            Self::AfterEnd { .. } => "after-end",
            Self::Truncated { .. } => "truncated",
        }
    }
}
