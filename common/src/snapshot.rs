//! Names, identities and order of snapshots. Pure.
//!
//! A snapshot is *identified* by what a send of it puts into its stream: (uuid, ctransid). Its *name* says which volume it
//! belongs to and when it was taken, for people and for retention. Its *order* among the snapshots of its volume is its
//! ctransid, the transaction of the source file system that changed the source last: that number never runs backwards, clocks do.
//! Two snapshots between which nothing changed have the same ctransid; then, and only then, the time in the name decides.

use std::{fmt, str::FromStr};

use jiff::{Timestamp, civil::DateTime, tz::TimeZone};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest name of a volume in bytes: with `.<UTC>` and the suffix of a segment it stays below the 255 bytes of a file name.
pub const MAX_VOLUME_NAME_BYTES: usize = 64;

/// How a snapshot's name spells its moment: `20261122T070000Z`.
const TIME_FORMAT: &str = "%Y%m%dT%H%M%SZ";

/// The name of a volume: 1 to [`MAX_VOLUME_NAME_BYTES`] of `A-Z a-z 0-9 _ -`, not beginning with `-`.
///
/// It becomes part of file names, of an rsync module and of log lines; hence no dot, no slash, no space.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Why a text is no [`VolumeName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "a volume's name is 1 to {MAX_VOLUME_NAME_BYTES} of the characters A-Z a-z 0-9 _ - and begins with a letter or a digit, not {0:?}"
)]
pub struct BadVolumeName(String);

impl VolumeName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = BadVolumeName;

    fn from_str(text: &str) -> Result<Self, BadVolumeName> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
        let starts_well = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
        if starts_well && text.len() <= MAX_VOLUME_NAME_BYTES && text.bytes().all(allowed) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadVolumeName(text.chars().take(80).collect()))
        }
    }
}

impl TryFrom<String> for VolumeName {
    type Error = BadVolumeName;

    fn try_from(text: String) -> Result<Self, BadVolumeName> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a snapshot: `<volume>.<UTC>`, for instance `substitutes.20261122T070000Z`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotName {
    volume: VolumeName,
    taken: Timestamp,
}

/// Why a text is no [`SnapshotName`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a snapshot's name is <volume>.<UTC> as in substitutes.20261122T070000Z, not {0:?}")]
pub struct BadSnapshotName(String);

impl SnapshotName {
    /// The name of a snapshot of `volume` taken at `taken`; what is below a second is dropped.
    pub fn new(volume: VolumeName, taken: Timestamp) -> Self {
        let whole = Timestamp::from_second(taken.as_second()).unwrap_or(taken);
        Self { volume, taken: whole }
    }

    /// The volume that it is a snapshot of.
    pub fn volume(&self) -> &VolumeName {
        &self.volume
    }

    /// When it was taken, by the clock of the sender, in whole seconds.
    pub fn taken(&self) -> Timestamp {
        self.taken
    }
}

impl FromStr for SnapshotName {
    type Err = BadSnapshotName;

    fn from_str(text: &str) -> Result<Self, BadSnapshotName> {
        let bad = || BadSnapshotName(text.chars().take(120).collect());
        let (volume, time) = text.split_once('.').ok_or_else(bad)?;
        let volume = volume.parse().map_err(|_| bad())?;
        let civil = DateTime::strptime(TIME_FORMAT, time).map_err(|_| bad())?;
        let taken = civil.to_zoned(TimeZone::UTC).map_err(|_| bad())?.timestamp();
        let name = Self { volume, taken };
        // strptime is lenient about digits; a name has exactly one spelling.
        if name.to_string() == text { Ok(name) } else { Err(bad()) }
    }
}

impl TryFrom<String> for SnapshotName {
    type Error = BadSnapshotName;

    fn try_from(text: String) -> Result<Self, BadSnapshotName> {
        text.parse()
    }
}

impl From<SnapshotName> for String {
    fn from(name: SnapshotName) -> String {
        name.to_string()
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.volume, self.taken.strftime(TIME_FORMAT))
    }
}

/// What identifies a snapshot wherever a copy of it is: the uuid and the ctransid that a send of it puts into its stream.
///
/// On the sender the uuid is the subvolume's own (or its received_uuid, if it was itself received); on the receiver it is
/// received_uuid, and the ctransid is stransid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SnapshotId {
    /// As in the stream's SUBVOL or SNAPSHOT command, in RFC 4122 byte order.
    #[serde(with = "uuid_bytes")]
    pub uuid: Uuid,
    /// The transaction of the source file system that changed the source last; it orders the snapshots of a volume.
    pub ctransid: u64,
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.uuid, self.ctransid)
    }
}

/// A snapshot by name and identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name, the same on both sides.
    pub name: SnapshotName,
    /// What it is, the same on both sides.
    pub id: SnapshotId,
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

/// Sixteen bytes on the wire, text in state files that people read.
mod uuid_bytes {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
    use uuid::Uuid;

    pub(super) fn serialize<S: Serializer>(uuid: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            uuid.to_string().serialize(serializer)
        } else {
            uuid.as_bytes().serialize(serializer)
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            Uuid::parse_str(&text).map_err(D::Error::custom)
        } else {
            Ok(Uuid::from_bytes(<[u8; 16]>::deserialize(deserializer)?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_name_has_exactly_one_spelling() {
        let name: SnapshotName = "substitutes.20261122T070000Z".parse().unwrap();
        assert_eq!(name.to_string(), "substitutes.20261122T070000Z");
        assert_eq!(name.volume().as_str(), "substitutes");
        assert_eq!(name.taken().as_second(), 1_795_330_800);
        for bad in [
            "substitutes",
            "substitutes.",
            ".20261122T070000Z",
            "substitutes.20261122T070000",
            "substitutes.20261122T070000Z.segment-1",
            "substitutes.20261332T070000Z",
            "substitutes.2026112T0070000Z",
            "sub/stitutes.20261122T070000Z",
            "../x.20261122T070000Z",
        ] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad:?} was taken for a snapshot's name");
        }
    }

    #[test]
    fn a_volume_name_is_safe_in_paths_modules_and_log_lines() {
        for good in ["substitutes", "a", "0", "A-b_9", &"x".repeat(64)] {
            assert!(good.parse::<VolumeName>().is_ok(), "{good:?}");
        }
        for bad in ["", "-x", "_x", "a.b", "a/b", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn fractions_of_a_second_do_not_reach_the_name() {
        let taken = Timestamp::new(1_795_330_800, 999_999_999).unwrap();
        let name = SnapshotName::new("v".parse().unwrap(), taken);
        assert_eq!(name.to_string().parse::<SnapshotName>().unwrap(), name);
    }
}
