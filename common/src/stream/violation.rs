//! The rules of the validator, by what breaks them.

use uuid::Uuid;

use super::{
    error::StreamError,
    format::{
        Attr, Kind, MAX_ENCODED_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_WRITE_BYTES_V1, MAX_WRITE_BYTES_V2,
        MAX_XATTR_NAME_BYTES,
    },
};
use crate::snapshot::SnapshotId;

/// Why a stream is not applied. Paths and names in it are escaped and cut: they are the peer's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The format has another version than was agreed on.
    #[error("the stream has version {found}, agreed was {agreed}")]
    StreamVersion {
        /// What was agreed on.
        agreed: u32,
        /// What came.
        found: u32,
    },
    /// SUBVOL or SNAPSHOT is not the first command, or not the only one.
    #[error("a {kind} is out of place: a stream begins with one SUBVOL or SNAPSHOT and has no other")]
    SubvolumeFirstAndOnce {
        /// The command.
        kind: Kind,
    },
    /// The subvolume does not have the name that was offered.
    #[error("the stream makes a subvolume \"{found}\", offered was \"{offered}\"")]
    SubvolumeName {
        /// What was offered.
        offered: String,
        /// What came.
        found: String,
    },
    /// The stream is of another snapshot than was offered.
    #[error("the stream is of the snapshot {found}, offered was {offered}")]
    SubvolumeUuid {
        /// What was offered.
        offered: SnapshotId,
        /// What came.
        found: SnapshotId,
    },
    /// The stream builds on something else than was agreed on.
    #[error("the stream builds on {}, agreed was {}", base(.found), base(.agreed))]
    BaseUuid {
        /// What was agreed on: None for a full stream.
        agreed: Option<SnapshotId>,
        /// What came.
        found: Option<SnapshotId>,
    },
    /// A command that has no business in a stream of the agreed version.
    #[error("a {kind} does not belong into a stream with data of version {version}")]
    UnknownCommand {
        /// The command.
        kind: Kind,
        /// The agreed version.
        version: u32,
    },
    /// An attribute that does not belong to its command.
    #[error("a {kind} has an attribute with the number {number}, which does not belong to it")]
    UnknownAttribute {
        /// The command.
        kind: Kind,
        /// The attribute's number.
        number: u16,
    },
    /// An attribute stands in its command twice.
    #[error("a {kind} has its {attr} twice")]
    DuplicateAttribute {
        /// The command.
        kind: Kind,
        /// The attribute.
        attr: Attr,
    },
    /// A path could leave the subvolume, or is none.
    #[error(
        "the {attr} of a {kind} is \"{path}\": paths are relative and have no empty, \".\" or \"..\" parts and no NUL"
    )]
    PathRelative {
        /// The command.
        kind: Kind,
        /// The attribute.
        attr: Attr,
        /// The path.
        path: String,
    },
    /// A path or a part of it is longer than the system allows.
    #[error(
        "the {attr} of a {kind} is \"{path}\", {bytes} bytes; paths have at most {MAX_PATH_BYTES}, their parts {MAX_NAME_BYTES}"
    )]
    PathLength {
        /// The command.
        kind: Kind,
        /// The attribute.
        attr: Attr,
        /// The beginning of the path.
        path: String,
        /// Its length.
        bytes: usize,
    },
    /// The text of a symbolic link is empty, too long or has a NUL.
    #[error(
        "the symbolic link \"{path}\" has a text of {bytes} bytes; it must have 1 to {MAX_PATH_BYTES} and no NUL among them"
    )]
    SymlinkText {
        /// The link.
        path: String,
        /// Length of its text.
        bytes: usize,
    },
    /// A CLONE from something that was not agreed on.
    #[error("\"{path}\" is cloned from the subvolume {uuid}, which is neither this snapshot nor its base")]
    CloneSource {
        /// The file that is filled.
        path: String,
        /// What it should be filled from.
        uuid: Uuid,
    },
    /// No data, or more than a command may have.
    #[error(
        "a {kind} of \"{path}\" has {bytes} bytes; 1 to {MAX_WRITE_BYTES_V1} may come with a WRITE of version 1, \
         {MAX_WRITE_BYTES_V2} with one of version 2, {MAX_ENCODED_BYTES} with an ENCODED_WRITE"
    )]
    DataLength {
        /// The command.
        kind: Kind,
        /// The file.
        path: String,
        /// How much there is.
        bytes: u64,
    },
    /// A size or a range that no file can have.
    #[error("the range or size of a {kind} of \"{path}\" is beyond the largest file")]
    RangeOverflow {
        /// The command.
        kind: Kind,
        /// The file.
        path: String,
    },
    /// A mode that does not belong to its command.
    #[error("a {kind} of \"{path}\" has the mode {mode:#o}, which is none for it")]
    Mode {
        /// The command.
        kind: Kind,
        /// The file.
        path: String,
        /// Its mode.
        mode: u64,
    },
    /// A device number that the kernel cannot have.
    #[error("a {kind} of \"{path}\" has the impossible device number {device:#x}")]
    Device {
        /// The command.
        kind: Kind,
        /// The node.
        path: String,
        /// Its device number.
        device: u64,
    },
    /// An owner that the kernel cannot have.
    #[error("\"{path}\" is given to the impossible owner {uid}:{gid}")]
    Owner {
        /// The file.
        path: String,
        /// Its owner.
        uid: u64,
        /// Its group.
        gid: u64,
    },
    /// Nanoseconds that are a second or more: utimensat(2) would take some of them for commands.
    #[error("the {attr} of \"{path}\" has {nanoseconds} nanoseconds")]
    Time {
        /// The attribute.
        attr: Attr,
        /// The file.
        path: String,
        /// Its nanoseconds.
        nanoseconds: u32,
    },
    /// The name of an extended attribute is not one that btrfs has.
    #[error(
        "\"{path}\" has an extended attribute \"{name}\"; names have at most {MAX_XATTR_NAME_BYTES} bytes, no NUL, and begin with \
         \"user.\", \"trusted.\", \"security.\", \"system.\" or \"btrfs.\""
    )]
    XattrName {
        /// The file.
        path: String,
        /// The name.
        name: String,
    },
    /// A mode of fallocate(2) that moves data, or that does not exist.
    #[error("a FALLOCATE of \"{path}\" has the mode {mode:#x}, which no send writes")]
    FallocateMode {
        /// The file.
        path: String,
        /// The mode.
        mode: u32,
    },
    /// Encoded data that contradicts itself, or that nobody can decode.
    #[error("an ENCODED_WRITE of \"{path}\" describes its data in a way that cannot be")]
    Encoding {
        /// The file.
        path: String,
    },
    /// An attribute is missing, or has not the length of its type.
    #[error(transparent)]
    Malformed(#[from] StreamError),
}

impl Violation {
    /// The name of the broken rule, for logs.
    pub const fn rule(&self) -> &'static str {
        match self {
            Self::StreamVersion { .. } => "stream-version",
            Self::SubvolumeFirstAndOnce { .. } => "subvolume-first-and-once",
            Self::SubvolumeName { .. } => "subvolume-name",
            Self::SubvolumeUuid { .. } => "subvolume-uuid",
            Self::BaseUuid { .. } => "base-uuid",
            Self::UnknownCommand { .. } => "unknown-command",
            Self::UnknownAttribute { .. } => "unknown-attribute",
            Self::DuplicateAttribute { .. } => "duplicate-attribute",
            Self::PathRelative { .. } => "path-relative",
            Self::PathLength { .. } => "path-length",
            Self::SymlinkText { .. } => "symlink-text",
            Self::CloneSource { .. } => "clone-source",
            Self::DataLength { .. } => "data-length",
            Self::RangeOverflow { .. } => "range-overflow",
            Self::Mode { .. } => "mode",
            Self::Device { .. } => "device",
            Self::Owner { .. } => "owner",
            Self::Time { .. } => "time",
            Self::XattrName { .. } => "xattr-name",
            Self::FallocateMode { .. } => "fallocate-mode",
            Self::Encoding { .. } => "encoding",
            Self::Malformed(error) => error.rule(),
        }
    }
}

fn base(base: &Option<SnapshotId>) -> String {
    base.map_or_else(|| "nothing (a full stream)".to_owned(), |id| id.to_string())
}
