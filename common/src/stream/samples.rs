//! Streams for tests: good ones, and the hostile ones that a validator must refuse.

use uuid::Uuid;

use super::{
    encode::{encode, encode_header},
    error::StreamError,
    format::{Attr, Kind},
    walk::{Item, Walker},
};
use crate::snapshot::SnapshotId;

pub(super) const NAME: &str = "volume.20261122T070000Z";
pub(super) const ID: SnapshotId = SnapshotId { uuid: Uuid::from_bytes([7; 16]), ctransid: 70 };
pub(super) const BASE: SnapshotId = SnapshotId { uuid: Uuid::from_bytes([5; 16]), ctransid: 50 };
pub(super) const OTHER: SnapshotId = SnapshotId { uuid: Uuid::from_bytes([9; 16]), ctransid: 90 };

/// A stream in the making.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) version: u32,
    pub(super) bytes: Vec<u8>,
}

impl Sample {
    /// Only a header.
    pub(super) fn new(version: u32) -> Self {
        let mut bytes = Vec::new();
        encode_header(version, &mut bytes);
        Self { version, bytes }
    }

    /// Begins as the stream of the snapshot [`ID`] does.
    pub(super) fn begun(version: u32, base: Option<SnapshotId>) -> Self {
        let mut sample = Self::new(version);
        sample.begin(NAME, ID, base);
        sample
    }

    pub(super) fn begin(&mut self, name: &str, id: SnapshotId, base: Option<SnapshotId>) -> &mut Self {
        let ctransid = id.ctransid.to_le_bytes();
        let attrs = [(Attr::Path, name.as_bytes()), (Attr::Uuid, id.uuid.as_bytes()), (Attr::Ctransid, &ctransid)];
        let Some(base) = base else { return self.push(Kind::Subvol, &attrs) };
        let ctransid = base.ctransid.to_le_bytes();
        let base = [(Attr::CloneUuid, &base.uuid.as_bytes()[..]), (Attr::CloneCtransid, &ctransid)];
        self.push(Kind::Snapshot, &[&attrs[..], &base].concat())
    }

    pub(super) fn push(&mut self, kind: Kind, attrs: &[(Attr, &[u8])]) -> &mut Self {
        let attrs: Vec<_> = attrs.iter().map(|(attr, value)| (attr.number(), *value)).collect();
        encode(kind.number(), &attrs, self.version, &mut self.bytes);
        self
    }

    pub(super) fn make(&mut self, kind: Kind, path: &[u8]) -> &mut Self {
        self.push(kind, &[(Attr::Path, path), (Attr::Ino, &n(257))])
    }

    pub(super) fn rename(&mut self, from: &[u8], to: &[u8]) -> &mut Self {
        self.push(Kind::Rename, &[(Attr::Path, from), (Attr::PathTo, to)])
    }

    pub(super) fn write(&mut self, path: &[u8], offset: u64, data: &[u8]) -> &mut Self {
        self.push(Kind::Write, &[(Attr::Path, path), (Attr::FileOffset, &n(offset)), (Attr::Data, data)])
    }

    pub(super) fn clone_from(&mut self, source: SnapshotId, path: &[u8], from: &[u8], length: u64) -> &mut Self {
        self.clone_to(0, source, path, from, length)
    }

    pub(super) fn clone_to(
        &mut self,
        offset: u64,
        source: SnapshotId,
        path: &[u8],
        from: &[u8],
        length: u64,
    ) -> &mut Self {
        self.push(
            Kind::Clone,
            &[
                (Attr::FileOffset, &n(offset)),
                (Attr::CloneLen, &n(length)),
                (Attr::Path, path),
                (Attr::CloneUuid, source.uuid.as_bytes()),
                (Attr::CloneCtransid, &n(source.ctransid)),
                (Attr::ClonePath, from),
                (Attr::CloneOffset, &n(0)),
            ],
        )
    }

    pub(super) fn update_extent(&mut self, path: &[u8], offset: u64, length: u64) -> &mut Self {
        self.push(Kind::UpdateExtent, &[(Attr::Path, path), (Attr::FileOffset, &n(offset)), (Attr::Size, &n(length))])
    }

    pub(super) fn truncate(&mut self, path: &[u8], size: u64) -> &mut Self {
        self.push(Kind::Truncate, &[(Attr::Path, path), (Attr::Size, &n(size))])
    }

    pub(super) fn utimes(&mut self, path: &[u8]) -> &mut Self {
        let t = &time(1_000_000_000, 5)[..];
        let attrs = [(Attr::Path, path), (Attr::Atime, t), (Attr::Mtime, t), (Attr::Ctime, t), (Attr::Otime, t)];
        let count = if self.version == 1 { 4 } else { 5 };
        self.push(Kind::Utimes, &attrs[..count])
    }

    pub(super) fn end(&mut self) -> &mut Self {
        self.push(Kind::End, &[])
    }

    /// Calls `each` with what a walk in blocks of `block` bytes finds, up to the end of the stream.
    pub(super) fn walk<E: From<StreamError>>(
        &self,
        block: usize,
        mut each: impl FnMut(Item<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut walker = Walker::new();
        for block in self.bytes.chunks(block) {
            walker.walk(block, &mut each)?;
        }
        Ok(walker.finish()?)
    }
}

/// A number as it stands in a stream.
pub(super) fn n(number: u64) -> [u8; 8] {
    number.to_le_bytes()
}

/// A time as it stands in a stream.
pub(super) fn time(seconds: u64, nanoseconds: u32) -> [u8; 12] {
    let mut value = [0; 12];
    value[..8].copy_from_slice(&seconds.to_le_bytes());
    value[8..].copy_from_slice(&nanoseconds.to_le_bytes());
    value
}
