//! The btrfs send stream: read it, check it, digest it, rewrite it into segments. Pure: bytes in, bytes out.
//!
//! Source of the format: `fs/btrfs/send.h` and `send.c` of Linux; `common/send-stream.c` of btrfs-progs is its other reader.

mod canonical;
mod command;
mod digest;
mod encode;
mod error;
pub mod format;
#[cfg(test)]
mod samples;
mod schema;
mod segment;
mod total;
mod validate;
mod violation;
mod walk;

use serde::{Deserialize, Serialize};

pub use self::{
    canonical::{Canonical, CanonicalState},
    command::{Attrs, Command, DataRange},
    digest::StreamDigest,
    encode::{encode, encode_header},
    error::StreamError,
    format::{Attr, Kind},
    segment::{SegmentHead, SegmentWriter},
    total::{FileCounter, TotalCounter},
    validate::{Expectation, Validator},
    violation::Violation,
    walk::{Item, Walker},
};

/// What btrfs has in its trees rather than in an extent: `max_inline`, unless a mount option says otherwise.
pub const MAX_SMALL_BYTES: u64 = 2048;

/// The smallest piece of data that has a place of its own on disk. (Old file systems on machines with large pages have larger ones.)
pub const SECTOR_BYTES: u64 = 4096;

/// A SHA-256 value.
pub type Digest = [u8; 32];

/// A place behind a UTIMES command, where a stream may be cut: the same in every send of a snapshot, whatever its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// Canonical commands so far.
    pub count: u64,
    /// Canonical digest so far.
    pub digest: Digest,
}

/// What the stream digest covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum DigestScope {
    /// The header of every command (length, command, CRC32C) and the bodies of those that carry no file data.
    #[default]
    Structure,
    /// Every byte.
    Full,
}

/// Times of a directory: seconds since 1970 and nanoseconds, as the send stream spells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootTimes {
    /// Last access.
    pub atime: (u64, u32),
    /// Last change of the content.
    pub mtime: (u64, u32),
    /// Last change of the inode.
    pub ctime: (u64, u32),
}

/// How much a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Total {
    /// Bytes of the stream.
    pub bytes: u64,
    /// File data in it, in bytes: what it needs on disk, less what compression saves there.
    pub data_bytes: u64,
    /// Files that it creates or whose content it changes.
    pub files: u64,
    /// How much of the data is whole files of up to [`MAX_SMALL_BYTES`]: btrfs has those in its trees.
    pub small_bytes: u64,
    /// The rest of the data in whole sectors of [`SECTOR_BYTES`], as it is on disk.
    pub extent_bytes: u64,
    /// Places in the trees of a base that it changes, at most: each in a node of its own if chance will have it.
    pub touched: u64,
}
