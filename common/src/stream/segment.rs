//! Writes segments: pieces of a stream, each of which stock `btrfs receive` takes as a whole stream.
//!
//! On the way it makes the receiver's work lighter, without a change to the result:
//! * The kernel creates every inode under a name of its own in the root directory and renames it at once. Both become one
//!   command. It also leaves the times of the root directory alone.
//! * WRITEs of one file that touch are joined, in version 2.

use uuid::Uuid;

use super::{
    RootTimes,
    command::Command,
    encode::{Encoder, encode, encode_header},
    error::StreamError,
    format::{Attr, Kind, checksum, crc32c_shift, seal, stored_checksum},
};
use crate::snapshot::SnapshotId;

/// The most data of joined WRITEs. Larger ones gain nothing more, and `btrfs receive` keeps a buffer of this size.
const MAX_JOINED_BYTES: usize = 1024 * 1024;

/// What a segment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHead {
    /// The name of the subvolume that it becomes.
    pub name: String,
    /// Its received_uuid: that of the snapshot for the last segment, else one of its own.
    pub uuid: Uuid,
    /// The snapshot that the stream is of.
    pub snapshot: SnapshotId,
    /// What it builds on: the base, or the segment before it. None: it is the first of a full stream.
    pub origin: Option<SnapshotId>,
}

/// Writes one segment. What it appends to `out` are always whole commands, and `out` may be taken away between any two calls;
/// as long as it is left alone, the next WRITE may still be joined to the last one in it.
#[derive(Debug)]
pub struct SegmentWriter {
    version: u32,
    uuid: Uuid,
    snapshot: SnapshotId,
    created: Vec<u8>,
    open: Option<OpenWrite>,
    open_path: Vec<u8>,
}

/// The WRITE at the end of `out`. Its path is `open_path`.
#[derive(Debug, Clone, Copy)]
struct OpenWrite {
    /// Where in `out` it begins,
    start: usize,
    /// where its data does,
    data: usize,
    /// and where `out` ended when it was written.
    out_end: usize,
    /// Offset in the file behind its data.
    file_end: u64,
    /// Checksum of its data alone.
    data_crc: u32,
}

impl SegmentWriter {
    /// Begins a segment: writes the header of a stream of that version, and SUBVOL or SNAPSHOT.
    pub fn begin(version: u32, head: &SegmentHead, out: &mut Vec<u8>) -> Self {
        encode_header(version, out);
        let kind = if head.origin.is_some() { Kind::Snapshot } else { Kind::Subvol };
        let mut encoder = Encoder::begin(kind.number(), version, out);
        encoder.attr(Attr::Path.number(), head.name.as_bytes());
        encoder.attr(Attr::Uuid.number(), head.uuid.as_bytes());
        encoder.attr(Attr::Ctransid.number(), &head.snapshot.ctransid.to_le_bytes());
        if let Some(origin) = &head.origin {
            encoder.attr(Attr::CloneUuid.number(), origin.uuid.as_bytes());
            encoder.attr(Attr::CloneCtransid.number(), &origin.ctransid.to_le_bytes());
        }
        encoder.end();
        let (uuid, snapshot) = (head.uuid, head.snapshot);
        Self { version, uuid, snapshot, created: Vec::new(), open: None, open_path: Vec::new() }
    }

    /// Appends a command of the stream. Its SUBVOL or SNAPSHOT and its END are passed over: a segment has its own.
    ///
    /// # Errors
    /// If the command lacks what must be read to rewrite it.
    #[inline]
    pub fn push(&mut self, command: &Command<'_>, out: &mut Vec<u8>) -> Result<(), StreamError> {
        debug_assert_eq!(command.version(), self.version, "a segment has the version of its stream");
        if !self.created.is_empty() {
            if self.fuse(command, out)? {
                return Ok(());
            }
            self.release_created(out);
        }
        match command.kind() {
            Kind::Write if self.version >= 2 => return self.push_write(command, out),
            Kind::Subvol | Kind::Snapshot | Kind::End => {}
            Kind::Clone => self.push_clone(command, out)?,
            kind if kind.creates() => self.created.extend_from_slice(command.bytes()),
            _ => out.extend_from_slice(command.bytes()),
        }
        self.open = None;
        Ok(())
    }

    /// Ends the segment: UTIMES of the root directory if its times are given, and END.
    pub fn finish(mut self, root_times: Option<&RootTimes>, out: &mut Vec<u8>) {
        self.release_created(out);
        if let Some(times) = root_times {
            self.push_root_times(times, out);
        }
        encode(Kind::End.number(), &[], self.version, out);
    }

    /// If `command` renames what the command before it has created, writes both as one.
    fn fuse(&mut self, command: &Command<'_>, out: &mut Vec<u8>) -> Result<bool, StreamError> {
        if command.kind() != Kind::Rename {
            return Ok(false);
        }
        let Some(created) = Command::first(&self.created, self.version, 0)? else { return Ok(false) };
        if created.path()? != command.path()? {
            return Ok(false);
        }
        let name = command.attr(Attr::PathTo)?;
        let mut encoder = Encoder::begin(created.kind().number(), self.version, out);
        for (number, value) in created.attrs() {
            encoder.attr(number, if number == Attr::Path.number() { name } else { value });
        }
        encoder.end();
        self.created.clear();
        Ok(true)
    }

    fn release_created(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.created);
        self.created.clear();
    }

    /// A CLONE from the snapshot itself must name the segment: under the snapshot's uuid there is nothing yet.
    fn push_clone(&self, command: &Command<'_>, out: &mut Vec<u8>) -> Result<(), StreamError> {
        if self.uuid == self.snapshot.uuid || command.uuid(Attr::CloneUuid)? != self.snapshot.uuid {
            out.extend_from_slice(command.bytes());
            return Ok(());
        }
        let mut encoder = Encoder::begin(Kind::Clone.number(), self.version, out);
        for (number, value) in command.attrs() {
            let own = number == Attr::CloneUuid.number();
            encoder.attr(number, if own { self.uuid.as_bytes() } else { value });
        }
        encoder.end();
        Ok(())
    }

    /// Joins a WRITE of version 2 to the one before it, or begins another.
    fn push_write(&mut self, command: &Command<'_>, out: &mut Vec<u8>) -> Result<(), StreamError> {
        let (path, data, offset) = (command.path()?, command.attr(Attr::Data)?, command.u64(Attr::FileOffset)?);
        let bytes = command.bytes();
        let prefix = bytes.len() - data.len();
        let data_crc = stored_checksum(bytes) ^ crc32c_shift(checksum(&bytes[..prefix]), data.len());
        let file_end = offset.wrapping_add(data.len() as u64);

        if let Some(open) = self.open.as_mut().filter(|open| {
            open.out_end == out.len()
                && open.file_end == offset
                && out.len() - open.data + data.len() <= MAX_JOINED_BYTES
                && self.open_path == path
        }) {
            out.extend_from_slice(data);
            open.out_end = out.len();
            open.file_end = file_end;
            open.data_crc = crc32c_shift(open.data_crc, data.len()) ^ data_crc;
            let (prefix, joined, crc) = (open.data - open.start, out.len() - open.data, open.data_crc);
            seal(&mut out[open.start..], |write| crc32c_shift(checksum(&write[..prefix]), joined) ^ crc);
            return Ok(());
        }
        let start = out.len();
        out.extend_from_slice(bytes);
        self.open = Some(OpenWrite { start, data: start + prefix, out_end: out.len(), file_end, data_crc });
        self.open_path.clear();
        self.open_path.extend_from_slice(path);
        Ok(())
    }

    fn push_root_times(&self, times: &RootTimes, out: &mut Vec<u8>) {
        let spell = |(seconds, nanoseconds): (u64, u32)| {
            let mut value = [0; 12];
            value[..8].copy_from_slice(&seconds.to_le_bytes());
            value[8..].copy_from_slice(&nanoseconds.to_le_bytes());
            value
        };
        let mut encoder = Encoder::begin(Kind::Utimes.number(), self.version, out);
        encoder.attr(Attr::Path.number(), b"");
        encoder.attr(Attr::Atime.number(), &spell(times.atime));
        encoder.attr(Attr::Mtime.number(), &spell(times.mtime));
        encoder.attr(Attr::Ctime.number(), &spell(times.ctime));
        if self.version >= 2 {
            // The birth must be there, but nobody can set it: readers pass over it.
            encoder.attr(Attr::Otime.number(), &spell(times.ctime));
        }
        encoder.end();
    }
}

#[cfg(test)]
mod tests;
