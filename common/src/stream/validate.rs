//! Guilty until proven innocent: judges every command of a peer's stream before `btrfs receive` sees it.
//!
//! The receiver runs with root's power. What is checked here is all that a stream can say; that no path goes through a symbolic
//! link is seen to by the kernel, on a mount with nosymfollow.

use super::{
    command::Command,
    error::StreamError,
    format::{
        Attr, Kind, MAX_ENCODED_BYTES, MAX_FILE_BYTES, MAX_NAME_BYTES, MAX_PATH_BYTES, MAX_WRITE_BYTES_V1,
        MAX_WRITE_BYTES_V2, MAX_XATTR_NAME_BYTES,
    },
    schema::{AttrSet, Shape, schema, shape},
    violation::Violation,
};
use crate::snapshot::SnapshotId;

/// What was agreed on about a stream before its first byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expectation {
    /// The name of the snapshot.
    pub name: String,
    /// Its identity.
    pub id: SnapshotId,
    /// What the stream builds on; None for a full stream.
    pub base: Option<SnapshotId>,
    /// Version of the format.
    pub stream_version: u32,
}

/// Judges a stream, command by command. The framing has been checked by the [`super::Walker`].
#[derive(Debug)]
pub struct Validator {
    expected: Expectation,
    begun: bool,
}

impl Validator {
    /// Of a stream that should be as expected.
    pub fn new(expected: Expectation) -> Self {
        Self { expected, begun: false }
    }

    /// Of the rest of a stream, whose beginning was judged before an interruption.
    pub fn resume(expected: Expectation) -> Self {
        Self { expected, begun: true }
    }

    /// Judges the stream's header.
    ///
    /// # Errors
    /// If its version was not agreed on.
    pub fn version(&self, found: u32) -> Result<(), Violation> {
        let agreed = self.expected.stream_version;
        if found == agreed { Ok(()) } else { Err(Violation::StreamVersion { agreed, found }) }
    }

    /// Judges the next command.
    ///
    /// # Errors
    /// The first rule that it breaks.
    #[inline]
    pub fn check(&mut self, command: &Command<'_>) -> Result<(), Violation> {
        self.check_place(command.kind())?;
        check_attributes(command)?;
        match command.kind() {
            Kind::Subvol | Kind::Snapshot => self.check_subvolume(command),
            Kind::Clone => self.check_clone(command),
            Kind::Write | Kind::EncodedWrite => check_write(command),
            Kind::Truncate => check_size(command),
            Kind::Fallocate => check_fallocate(command),
            Kind::Mknod | Kind::Mkfifo | Kind::Mksock => check_node(command),
            Kind::Chmod => check_chmod(command),
            Kind::Chown => check_chown(command),
            _ => Ok(()),
        }
    }

    /// The command exists in this version, and SUBVOL or SNAPSHOT is first and once.
    fn check_place(&mut self, kind: Kind) -> Result<(), Violation> {
        let version = self.expected.stream_version;
        if schema(kind).since > version || kind == Kind::UpdateExtent {
            return Err(Violation::UnknownCommand { kind, version });
        }
        let begins = matches!(kind, Kind::Subvol | Kind::Snapshot);
        if begins == self.begun {
            return Err(Violation::SubvolumeFirstAndOnce { kind });
        }
        self.begun = true;
        Ok(())
    }

    fn check_subvolume(&self, command: &Command<'_>) -> Result<(), Violation> {
        let name = command.path()?;
        if name != self.expected.name.as_bytes() {
            return Err(Violation::SubvolumeName { offered: self.expected.name.clone(), found: shown(name) });
        }
        let found = SnapshotId { uuid: command.uuid(Attr::Uuid)?, ctransid: command.u64(Attr::Ctransid)? };
        if found != self.expected.id {
            return Err(Violation::SubvolumeUuid { offered: self.expected.id, found });
        }
        let found = if command.kind() == Kind::Snapshot { Some(clone_source(command)?) } else { None };
        if found != self.expected.base {
            return Err(Violation::BaseUuid { agreed: self.expected.base, found });
        }
        Ok(())
    }

    /// Without this rule a stream could share any file of the file system into the published snapshot.
    fn check_clone(&self, command: &Command<'_>) -> Result<(), Violation> {
        let source = clone_source(command)?;
        if source != self.expected.id && Some(source) != self.expected.base {
            return Err(Violation::CloneSource { path: shown_path(command), uuid: source.uuid });
        }
        let length = command.u64(Attr::CloneLen)?;
        if length == 0 {
            // To the kernel it means: to the end of the source.
            return Err(data_length(command, 0));
        }
        check_range(command, command.u64(Attr::FileOffset)?, length)?;
        check_range(command, command.u64(Attr::CloneOffset)?, length)
    }
}

fn clone_source(command: &Command<'_>) -> Result<SnapshotId, StreamError> {
    Ok(SnapshotId { uuid: command.uuid(Attr::CloneUuid)?, ctransid: command.u64(Attr::CloneCtransid)? })
}

/// The attributes are those of the command, each once, each in shape.
fn check_attributes(command: &Command<'_>) -> Result<(), Violation> {
    let kind = command.kind();
    let schema = schema(kind);
    let mut seen = AttrSet::NONE;
    for (number, value) in command.attrs() {
        let known = Attr::from_number(number).filter(|attr| schema.required.has(*attr) || schema.optional.has(*attr));
        let attr = known.ok_or(Violation::UnknownAttribute { kind, number })?;
        if seen.has(attr) {
            return Err(Violation::DuplicateAttribute { kind, attr });
        }
        seen.add(attr);
        check_shape(command, attr, value)?;
    }
    match schema.required.first_missing_in(seen) {
        Some(attr) => Err(StreamError::MissingAttribute { kind, attr }.into()),
        None => Ok(()),
    }
}

#[inline]
fn check_shape(command: &Command<'_>, attr: Attr, value: &[u8]) -> Result<(), Violation> {
    let kind = command.kind();
    let bytes = value.len();
    match shape(attr) {
        Shape::Exactly(length) if bytes != length => Err(StreamError::AttributeLength { kind, attr, bytes }.into()),
        Shape::Path if kind == Kind::Symlink && attr == Attr::PathLink => check_symlink_text(command, value),
        Shape::Path => check_path(kind, attr, value),
        Shape::XattrName => check_xattr_name(command, value),
        Shape::Time => check_time(command, attr, value),
        Shape::Exactly(_) | Shape::Data => Ok(()),
    }
}

/// Relative, and without parts that mean something else than a name.
fn check_path(kind: Kind, attr: Attr, path: &[u8]) -> Result<(), Violation> {
    if path.is_empty() && attr == Attr::Path && may_be_root(kind) {
        return Ok(());
    }
    let mut long = path.len() > MAX_PATH_BYTES;
    let mut bad = path.contains(&0);
    for part in path.split(|byte| *byte == b'/') {
        long |= part.len() > MAX_NAME_BYTES;
        bad |= matches!(part, b"" | b"." | b"..");
    }
    if bad {
        return Err(Violation::PathRelative { kind, attr, path: shown(path) });
    }
    if long {
        return Err(Violation::PathLength { kind, attr, path: shown(path), bytes: path.len() });
    }
    Ok(())
}

/// The root directory has the empty path; these are what can be done to it.
const fn may_be_root(kind: Kind) -> bool {
    matches!(kind, Kind::Chown | Kind::Chmod | Kind::Utimes | Kind::SetXattr | Kind::RemoveXattr | Kind::Fileattr)
}

/// A link may point anywhere: it is content, and nobody here follows it.
fn check_symlink_text(command: &Command<'_>, text: &[u8]) -> Result<(), Violation> {
    if text.is_empty() || text.len() > MAX_PATH_BYTES || text.contains(&0) {
        return Err(Violation::SymlinkText { path: shown_path(command), bytes: text.len() });
    }
    Ok(())
}

fn check_xattr_name(command: &Command<'_>, name: &[u8]) -> Result<(), Violation> {
    const SPACES: [&[u8]; 5] = [b"user.", b"trusted.", b"security.", b"system.", b"btrfs."];
    let known = SPACES.iter().any(|space| name.len() > space.len() && name.starts_with(space));
    if !known || name.len() > MAX_XATTR_NAME_BYTES || name.contains(&0) {
        return Err(Violation::XattrName { path: shown_path(command), name: shown(name) });
    }
    Ok(())
}

fn check_time(command: &Command<'_>, attr: Attr, value: &[u8]) -> Result<(), Violation> {
    let [_, _, _, _, _, _, _, _, a, b, c, d] = *value else {
        return Err(StreamError::AttributeLength { kind: command.kind(), attr, bytes: value.len() }.into());
    };
    let nanoseconds = u32::from_le_bytes([a, b, c, d]);
    if nanoseconds >= 1_000_000_000 {
        return Err(Violation::Time { attr, path: shown_path(command), nanoseconds });
    }
    Ok(())
}

fn check_write(command: &Command<'_>) -> Result<(), Violation> {
    let bytes = command.attr(Attr::Data)?.len();
    let most = match (command.kind(), command.version()) {
        (Kind::EncodedWrite, _) => MAX_ENCODED_BYTES,
        (_, 1) => MAX_WRITE_BYTES_V1,
        _ => MAX_WRITE_BYTES_V2,
    };
    if bytes == 0 || bytes > most {
        return Err(data_length(command, bytes as u64));
    }
    if command.kind() == Kind::Write {
        return check_range(command, command.u64(Attr::FileOffset)?, bytes as u64);
    }
    check_encoding(command)
}

/// What an ENCODED_WRITE says of its data; `btrfs receive` sizes a buffer by it when it must decode by itself.
fn check_encoding(command: &Command<'_>) -> Result<(), Violation> {
    /// BTRFS_ENCODED_IO_COMPRESSION_TYPES of the kernel: none, zlib, zstd, lzo with five sizes of a sector.
    const COMPRESSIONS: u32 = 8;
    let (covered, whole) = (command.u64(Attr::UnencodedFileLen)?, command.u64(Attr::UnencodedLen)?);
    let skipped = command.u64(Attr::UnencodedOffset)?;
    check_range(command, command.u64(Attr::FileOffset)?, covered)?;
    let fits = skipped.checked_add(covered).is_some_and(|end| end <= whole) && whole <= MAX_ENCODED_BYTES as u64;
    let number = |attr| if command.opt_attr(attr).is_some() { command.u32(attr) } else { Ok(0) };
    if covered == 0 || !fits || number(Attr::Compression)? >= COMPRESSIONS || number(Attr::Encryption)? != 0 {
        return Err(Violation::Encoding { path: shown_path(command) });
    }
    Ok(())
}

fn check_size(command: &Command<'_>) -> Result<(), Violation> {
    check_range(command, 0, command.u64(Attr::Size)?)
}

fn check_fallocate(command: &Command<'_>) -> Result<(), Violation> {
    // Allocate, punch a hole, write zeros: each with or without a change of the file's size. Never what moves data.
    const KEEP_SIZE: u32 = 1;
    const PUNCH_HOLE: u32 = 2;
    const ZERO_RANGE: u32 = 0x10;
    let mode = command.u32(Attr::FallocateMode)?;
    if !matches!(mode & !KEEP_SIZE, 0 | ZERO_RANGE) && mode != PUNCH_HOLE | KEEP_SIZE {
        return Err(Violation::FallocateMode { path: shown_path(command), mode });
    }
    let length = command.u64(Attr::Size)?;
    if length == 0 {
        return Err(data_length(command, 0));
    }
    check_range(command, command.u64(Attr::FileOffset)?, length)
}

/// A node is of the type that its command makes, and its device number one of the kernel's 32 bits.
fn check_node(command: &Command<'_>) -> Result<(), Violation> {
    const TYPE: u64 = 0o170_000;
    const FIFO: u64 = 0o010_000;
    const CHARACTER: u64 = 0o020_000;
    const BLOCK: u64 = 0o060_000;
    const SOCKET: u64 = 0o140_000;
    let kind = command.kind();
    let (mode, device) = (command.u64(Attr::Mode)?, command.u64(Attr::Rdev)?);
    let fits = match kind {
        Kind::Mkfifo => mode & TYPE == FIFO,
        Kind::Mksock => mode & TYPE == SOCKET,
        _ => matches!(mode & TYPE, CHARACTER | BLOCK),
    };
    if !fits || mode & !(TYPE | PERMISSIONS) != 0 {
        return Err(Violation::Mode { kind, path: shown_path(command), mode });
    }
    if device > u64::from(u32::MAX) {
        return Err(Violation::Device { kind, path: shown_path(command), device });
    }
    Ok(())
}

/// Permissions, setuid, setgid and the sticky bit.
const PERMISSIONS: u64 = 0o7777;

fn check_chmod(command: &Command<'_>) -> Result<(), Violation> {
    let mode = command.u64(Attr::Mode)?;
    if mode & !PERMISSIONS != 0 {
        return Err(Violation::Mode { kind: command.kind(), path: shown_path(command), mode });
    }
    Ok(())
}

fn check_chown(command: &Command<'_>) -> Result<(), Violation> {
    let (uid, gid) = (command.u64(Attr::Uid)?, command.u64(Attr::Gid)?);
    // The highest number means 'leave it alone' to chown(2).
    if uid >= u64::from(u32::MAX) || gid >= u64::from(u32::MAX) {
        return Err(Violation::Owner { path: shown_path(command), uid, gid });
    }
    Ok(())
}

fn check_range(command: &Command<'_>, start: u64, length: u64) -> Result<(), Violation> {
    if start.checked_add(length).is_none_or(|end| end > MAX_FILE_BYTES) {
        return Err(Violation::RangeOverflow { kind: command.kind(), path: shown_path(command) });
    }
    Ok(())
}

fn data_length(command: &Command<'_>, bytes: u64) -> Violation {
    Violation::DataLength { kind: command.kind(), path: shown_path(command), bytes }
}

fn shown_path(command: &Command<'_>) -> String {
    shown(command.opt_attr(Attr::Path).unwrap_or_default())
}

/// Bytes of a peer's for a message: escaped, and cut.
fn shown(bytes: &[u8]) -> String {
    const MOST: usize = 120;
    let end = if bytes.len() > MOST { "..." } else { "" };
    format!("{}{end}", bytes[..bytes.len().min(MOST)].escape_ascii())
}

#[cfg(test)]
mod tests;
