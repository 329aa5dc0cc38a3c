//! What of a volume does not leave the machine: excluded by name, or by age.
//!
//! What decides is pure: times and contents come from the caller, who finds them in `files`; `remove` acts upon it. A filter says yes or no to every path of a snapshot, whatever was said to the others before, and whatever of it is gone already:
//! so it can be asked by many threads at once while others delete what it excluded.

pub mod check;
pub mod files;
pub mod guix;
mod patterns;
pub mod remove;

use std::time::Duration;

use jiff::Timestamp;
use serde::Deserialize;

use self::guix::{COMPRESSIONS, Member, Part, Suffix};
pub use self::patterns::{BadPattern, Patterns};

/// The filter of a volume, as configured.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// What is excluded by its name.
    pub exclude: Patterns,
    /// What is older is excluded; directories never are.
    pub max_age: Option<Duration>,
    /// How old a file is.
    pub max_age_by: AgeBy,
    /// Whether the volume is a cache of `guix publish`: then what belongs together goes or stays together, and a narinfo that names a
    /// nar that is not there is an error.
    pub guix_cache: bool,
}

/// Which time of a file its age is counted from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AgeBy {
    /// The last change of its content.
    #[default]
    Mtime,
    /// The last read, as far as the mount's options let it be known.
    Atime,
}

/// Why something is excluded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// The pattern of that place in `exclude`.
    Pattern(usize),
    /// `max_age`
    Age,
    /// Nothing of the item that it belongs to stays: `guix_cache`.
    Companion,
}

/// What a filter asks about other files than the one in question.
pub trait Look {
    /// Why an answer cannot be had.
    type Error;

    /// The time of a file by which its age is told, in seconds since 1970; None if it is not there.
    fn time(&self, member: Member<'_>, suffix: Suffix) -> Result<Option<i64>, Self::Error>;

    /// What `hashes/<hash>` holds; None if it is not there, or longer than a store path can be.
    fn mapping(&self, hash: &[u8]) -> Result<Option<Vec<u8>>, Self::Error>;
}

impl Filter {
    /// Whether it excludes nothing, whatever there is.
    pub fn is_idle(&self) -> bool {
        self.exclude.is_empty() && self.max_age.is_none()
    }

    /// The filter at a moment.
    pub fn at(&self, now: Timestamp) -> Rules<'_> {
        let age = |age: Duration| i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
        let oldest = self.max_age.map(|max| now.as_second().saturating_sub(age(max)));
        let excluded = COMPRESSIONS.map(|directory| self.exclude.exclude(directory.as_bytes(), true));
        Rules { filter: self, oldest, excluded }
    }
}

/// A filter at a moment.
#[derive(Debug)]
pub struct Rules<'a> {
    filter: &'a Filter,
    /// Seconds since 1970: what is from before is too old.
    oldest: Option<i64>,
    /// What excludes the directories of the compressions as a whole.
    excluded: [Option<usize>; COMPRESSIONS.len()],
}

impl<'a> Rules<'a> {
    /// The filter.
    pub fn filter(&self) -> &'a Filter {
        self.filter
    }

    /// Why a directory is excluded, with all that is in it; None if it stays.
    pub fn directory(&self, path: &[u8]) -> Option<Rule> {
        self.filter.exclude.exclude(path, true).map(Rule::Pattern)
    }

    /// Why a file (anything but a directory) in a directory that stays is excluded; None if it stays.
    ///
    /// `time` is asked for the file's own time if that matters; None means that it vanished meanwhile.
    ///
    /// # Errors
    /// Those of `time` and `look`.
    pub fn file<L: Look>(
        &self,
        path: &[u8],
        time: impl FnOnce() -> Result<Option<i64>, L::Error>,
        look: &L,
    ) -> Result<Option<Rule>, L::Error> {
        if let Some(place) = self.filter.exclude.exclude(path, false) {
            return Ok(Some(Rule::Pattern(place)));
        }
        match guix::part(path).filter(|_| self.filter.guix_cache) {
            Some(Part::Nar(member)) => self.member(member, Suffix::Nar, time, look),
            Some(Part::Narinfo(member)) => self.member(member, Suffix::Narinfo, time, look),
            Some(Part::Hash(hash)) if !self.filter.is_idle() => self.hash(hash, time, look),
            Some(Part::Hash(_)) | None => self.aged::<L>(time),
        }
    }

    /// The pattern that takes a file of the cache away, or its companion, or their directory.
    pub fn excluded_member(&self, member: Member<'_>) -> Option<usize> {
        let by_name = |suffix| self.filter.exclude.exclude(&guix::path(member, suffix), false);
        self.excluded[member.compression].or_else(|| by_name(Suffix::Nar)).or_else(|| by_name(Suffix::Narinfo))
    }

    fn is_too_old(&self, time: i64) -> bool {
        self.oldest.is_some_and(|oldest| time < oldest)
    }

    fn aged<L: Look>(&self, time: impl FnOnce() -> Result<Option<i64>, L::Error>) -> Result<Option<Rule>, L::Error> {
        if self.oldest.is_none() {
            return Ok(None);
        }
        Ok(time()?.filter(|time| self.is_too_old(*time)).map(|_| Rule::Age))
    }

    /// A nar or a narinfo. The two of a compression have the same patterns; an item is as old as the youngest of all its files that
    /// no pattern excludes.
    fn member<L: Look>(
        &self,
        member: Member<'_>,
        suffix: Suffix,
        time: impl FnOnce() -> Result<Option<i64>, L::Error>,
        look: &L,
    ) -> Result<Option<Rule>, L::Error> {
        let companion = guix::path(member, suffix.other());
        if let Some(place) = self.filter.exclude.exclude(&companion, false) {
            return Ok(Some(Rule::Pattern(place)));
        }
        if self.aged::<L>(time)?.is_none() || self.stays(member.item, look)? {
            return Ok(None);
        }
        Ok(Some(Rule::Age))
    }

    /// `hashes/<hash>` stays as long as anything of its item does.
    fn hash<L: Look>(
        &self,
        hash: &[u8],
        time: impl FnOnce() -> Result<Option<i64>, L::Error>,
        look: &L,
    ) -> Result<Option<Rule>, L::Error> {
        let content = look.mapping(hash)?;
        let Some(item) = content.as_deref().and_then(|content| guix::mapped(hash, content)) else {
            return self.aged::<L>(time);
        };
        if self.stays(item, look)? {
            return Ok(None);
        }
        Ok(Some(Rule::Companion))
    }

    /// Whether anything of an item stays: a file that is there, that no pattern excludes, and that is young enough.
    ///
    /// While others delete what this has said no to, the answer remains the same: if one file is young, none of the others goes.
    fn stays<L: Look>(&self, item: &[u8], look: &L) -> Result<bool, L::Error> {
        for compression in 0..COMPRESSIONS.len() {
            let member = Member { compression, item };
            if self.excluded_member(member).is_some() {
                continue;
            }
            for suffix in [Suffix::Nar, Suffix::Narinfo] {
                if look.time(member, suffix)?.is_some_and(|time| !self.is_too_old(time)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests;
