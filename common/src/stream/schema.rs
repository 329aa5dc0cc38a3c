//! Which attributes each command has, and what values of them look like.

use super::format::{Attr, Kind};

/// A set of attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AttrSet(u64);

impl AttrSet {
    pub(super) const NONE: Self = Self(0);

    const fn of(attrs: &[Attr]) -> Self {
        let mut bits = 0;
        let mut i = 0;
        while i < attrs.len() {
            bits |= 1 << attrs[i].number();
            i += 1;
        }
        Self(bits)
    }

    pub(super) const fn has(self, attr: Attr) -> bool {
        self.0 >> attr.number() & 1 == 1
    }

    pub(super) fn add(&mut self, attr: Attr) {
        self.0 |= 1 << attr.number();
    }

    /// The first that is in here and not in `other`.
    pub(super) fn first_missing_in(self, other: Self) -> Option<Attr> {
        let missing = self.0 & !other.0;
        if missing == 0 { None } else { Attr::from_number(missing.trailing_zeros() as u16) }
    }
}

/// What a command consists of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schema {
    /// It has all of these,
    pub(super) required: AttrSet,
    /// may have these,
    pub(super) optional: AttrSet,
    /// and exists since this version of the format.
    pub(super) since: u32,
}

/// The attributes of each command, as `send.c` of the kernel writes them.
pub(super) const fn schema(kind: Kind) -> Schema {
    use Attr::*;
    let mut optional = AttrSet::NONE;
    let mut since = 1;
    let required: &[Attr] = match kind {
        Kind::Subvol => &[Path, Uuid, Ctransid],
        Kind::Snapshot => &[Path, Uuid, Ctransid, CloneUuid, CloneCtransid],
        Kind::Mkfile | Kind::Mkdir => &[Path, Ino],
        Kind::Mknod | Kind::Mkfifo | Kind::Mksock => &[Path, Ino, Rdev, Mode],
        Kind::Symlink => &[Path, Ino, PathLink],
        Kind::Rename => &[Path, PathTo],
        Kind::Link => &[Path, PathLink],
        Kind::Unlink | Kind::Rmdir => &[Path],
        Kind::SetXattr => &[Path, XattrName, XattrData],
        Kind::RemoveXattr => &[Path, XattrName],
        Kind::Write => &[Path, FileOffset, Data],
        Kind::Clone => &[FileOffset, CloneLen, Path, CloneUuid, CloneCtransid, ClonePath, CloneOffset],
        Kind::Truncate => &[Path, Size],
        Kind::Chmod => &[Path, Mode],
        Kind::Chown => &[Path, Uid, Gid],
        Kind::Utimes => {
            optional = AttrSet::of(&[Otime]);
            &[Path, Atime, Mtime, Ctime]
        }
        Kind::End => &[],
        Kind::UpdateExtent => &[Path, FileOffset, Size],
        Kind::Fallocate => {
            since = 2;
            &[Path, FallocateMode, FileOffset, Size]
        }
        Kind::Fileattr => {
            since = 2;
            &[Path, Fileattr]
        }
        Kind::EncodedWrite => {
            since = 2;
            optional = AttrSet::of(&[Compression, Encryption]);
            &[Path, FileOffset, UnencodedFileLen, UnencodedLen, UnencodedOffset, Data]
        }
        Kind::EnableVerity => {
            since = 3;
            optional = AttrSet::of(&[VeritySaltData, VeritySigData]);
            &[Path, VerityAlgorithm, VerityBlockSize]
        }
    };
    Schema { required: AttrSet::of(required), optional, since }
}

/// What the value of an attribute looks like, whatever command it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// So many bytes.
    Exactly(usize),
    /// u64 seconds and u32 nanoseconds.
    Time,
    /// A path relative to the subvolume, or the text of a symbolic link.
    Path,
    /// The name of an extended attribute.
    XattrName,
    /// Any bytes; how many is bounded by the length of an attribute, or judged with the command.
    Data,
}

/// The shape of an attribute's values.
pub(super) const fn shape(attr: Attr) -> Shape {
    match attr {
        Attr::Uuid | Attr::CloneUuid => Shape::Exactly(16),
        Attr::FallocateMode | Attr::Compression | Attr::Encryption | Attr::VerityBlockSize => Shape::Exactly(4),
        Attr::VerityAlgorithm => Shape::Exactly(1),
        Attr::Atime | Attr::Mtime | Attr::Ctime | Attr::Otime => Shape::Time,
        Attr::Path | Attr::PathTo | Attr::PathLink | Attr::ClonePath => Shape::Path,
        Attr::XattrName => Shape::XattrName,
        Attr::Data | Attr::XattrData | Attr::VeritySaltData | Attr::VeritySigData => Shape::Data,
        Attr::Ctransid
        | Attr::Ino
        | Attr::Size
        | Attr::Mode
        | Attr::Uid
        | Attr::Gid
        | Attr::Rdev
        | Attr::FileOffset
        | Attr::CloneCtransid
        | Attr::CloneOffset
        | Attr::CloneLen
        | Attr::Fileattr
        | Attr::UnencodedFileLen
        | Attr::UnencodedLen
        | Attr::UnencodedOffset => Shape::Exactly(8),
    }
}
