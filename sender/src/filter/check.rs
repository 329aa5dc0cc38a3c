//! `guix_cache`: a narinfo that names a nar that is not there is an error, not something to publish.
//!
//! A narinfo is broken if it names a nar that is neither there nor taken away by `exclude`, or if none of those that it names is
//! there. (It may name nars in several compressions; to publish only some of them is what `exclude = ["lzip/"]` asks for.)
//!
//! Reading tens of millions of narinfos in every cycle would take longer than all the rest. So it is remembered which snapshot was
//! found good, and under which patterns. Against that one the kernel says what changed (a send without file data: it compares only
//! the parts of the trees that are not shared), and only items of which a nar or narinfo was made, replaced, written or removed
//! are looked at again. Everything is read if there is no such snapshot, if the patterns are others, if a directory of the cache
//! was itself made or renamed, or if more than [`MAX_CHANGED_ITEMS`] items changed; then on several threads.

use std::{
    collections::HashSet,
    fmt,
    io::Read,
    os::fd::BorrowedFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use common::{
    btrfs,
    stream::{Attr, Command, Item, Kind, Walker},
};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{FileType, Timespec},
    io::Errno,
};

use super::{
    Rules,
    files::{self, Cache},
    guix::{self, COMPRESSIONS, Member, Part, Suffix},
};
use crate::{
    send::{SendError, Source, Stream},
    walk::{self, Entry, Options, Visit, WalkError},
};

/// With more, reading all on several threads is as quick, and takes no memory.
const MAX_CHANGED_ITEMS: usize = 100_000;

/// The longest narinfo that is believed in: one of a thousand references has some 60 kB.
const MAX_NARINFO_BYTES: usize = 4 << 20;

/// So many broken ones are named.
const NAMED: usize = 3;

/// So many broken ones of a live cache are looked at a second time.
const MAX_CONFIRMED: usize = 10_000;

/// How much of a stream is read at once.
const BLOCK_BYTES: usize = 256 << 10;

/// How long it may take until a wish to stop is seen.
const STOP_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Why a cache is not taken for good.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is not.
    #[error("{0}")]
    Broken(Broken),
    /// It cannot be read, or reading was stopped.
    #[error("cannot check the narinfos: {0}")]
    Walk(#[from] WalkError),
    /// The kernel does not say what changed.
    #[error("cannot find the narinfos that changed: {0}")]
    Send(#[from] SendError),
}

impl From<common::stream::StreamError> for CheckError {
    fn from(error: common::stream::StreamError) -> Self {
        Self::Send(error.into())
    }
}

/// Narinfos that must not be published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// How many.
    pub count: u64,
    /// The first of them by their paths.
    pub first: Vec<Fault>,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (s, verb) = if self.count == 1 { ("", "does") } else { ("s", "do") };
        write!(f, "{} narinfo{s} {verb} not fit the nars: ", self.count)?;
        for (place, fault) in self.first.iter().enumerate() {
            write!(f, "{}{fault}", if place == 0 { "" } else { ", " })?;
        }
        if self.count > self.first.len() as u64 {
            f.write_str(", ...")?;
        }
        f.write_str("; remove or bake them again, or set guix_cache = false to publish them as they are")
    }
}

/// A broken narinfo.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fault {
    narinfo: Vec<u8>,
    /// What it names and is not there; empty if it names nothing, or nothing that stays.
    names: Vec<u8>,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let narinfo = String::from_utf8_lossy(&self.narinfo);
        if self.names.is_empty() {
            write!(f, "{narinfo} (names no nar that is there)")
        } else {
            write!(f, "{narinfo} (names {}, which is not there)", String::from_utf8_lossy(&self.names))
        }
    }
}

/// What a check of a good cache found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Good {
    /// Narinfos that were read.
    pub narinfos: u64,
    /// Those of them that also name nars that a pattern takes away.
    pub partly_excluded: u64,
}

/// Reads every narinfo that the filter leaves, of a snapshot or of a source that changes meanwhile.
///
/// # Errors
/// [`CheckError::Broken`] above all.
pub fn everything(
    root: BorrowedFd<'_>,
    rules: &Rules<'_>,
    options: &Options<'_>,
    tick: impl FnMut(u64),
) -> Result<Good, CheckError> {
    let judge = Judge { cache: Cache::open(root, rules.filter().max_age_by)?, rules };
    let tallies = walk::walk(root, &judge, (), options, tick)?;
    let mut all = Tally::default();
    for tally in tallies {
        all.good.narinfos += tally.good.narinfos;
        all.good.partly_excluded += tally.good.partly_excluded;
        all.faults += tally.faults;
        all.noted.extend(tally.noted);
    }
    if all.faults <= all.noted.len() as u64 {
        // The farm may have been about to remove an item. What was broken for that moment only is not.
        let mut confirmed = Tally { good: all.good, ..Tally::default() };
        for fault in all.noted {
            if let Some(Part::Narinfo(member)) = guix::part(&fault.narinfo) {
                confirmed.good.narinfos -= 1;
                judge.narinfo(member, &mut confirmed)?;
            }
        }
        all = confirmed;
    }
    all.verdict()
}

/// Reads the narinfos of the items that changed from a snapshot that was found good, under the same patterns, to another one. Both
/// are open in `source`. None if that is not the way: [`everything`] is.
///
/// # Errors
/// [`CheckError::Broken`] above all.
pub fn changes(
    root: BorrowedFd<'_>,
    source: &Source,
    rules: &Rules<'_>,
    options: &Options<'_>,
) -> Result<Option<Good>, CheckError> {
    let version = btrfs::stream_version().map_err(SendError::from)?;
    let mut stream = source.changes(version)?;
    let (mut walker, mut changed, mut block) = (Walker::new(), Changed::default(), vec![0; BLOCK_BYTES]);
    loop {
        let bytes = match read(&mut stream, &mut block, options.stop)? {
            0 => break,
            bytes => &block[..bytes],
        };
        walker.walk(bytes, |item| match item {
            Item::Version(_) => Ok::<(), CheckError>(()),
            Item::Command { command, .. } => {
                changed.note(&command);
                Ok(())
            }
        })?;
        if changed.is_too_much {
            return Ok(None);
        }
    }
    stream.finish()?;
    walker.finish()?;
    let judge = Judge { cache: Cache::open(root, rules.filter().max_age_by)?, rules };
    let mut tally = Tally::default();
    for item in &changed.items {
        for compression in 0..COMPRESSIONS.len() {
            judge.narinfo(Member { compression, item }, &mut tally)?;
        }
    }
    tally.verdict().map(Some)
}

/// Some bytes of a stream, 0 at its end. The kernel may have nothing to say for a while.
fn read(stream: &mut Stream, block: &mut [u8], stop: &AtomicBool) -> Result<usize, CheckError> {
    let set_up = |path: &Path, source| SendError::SetUp { path: path.to_owned(), source };
    loop {
        if stop.load(Ordering::Relaxed) {
            return Err(WalkError::Stopped.into());
        }
        let mut pipe = [PollFd::new(&*stream, PollFlags::IN)];
        match poll(&mut pipe, Some(&STOP_INTERVAL)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(stream.read(block).map_err(|source| set_up(stream.path(), source))?),
            Err(error) => return Err(set_up(stream.path(), error.into()).into()),
        }
    }
}

/// The items that commands of a stream are about.
#[derive(Default)]
struct Changed {
    items: HashSet<Vec<u8>>,
    is_too_much: bool,
}

impl Changed {
    fn note(&mut self, command: &Command<'_>) {
        if matches!(
            command.kind(),
            Kind::Utimes | Kind::Chmod | Kind::Chown | Kind::SetXattr | Kind::RemoveXattr | Kind::End
        ) {
            return;
        }
        for path in [Attr::Path, Attr::PathTo].into_iter().filter_map(|attr| command.opt_attr(attr)) {
            if COMPRESSIONS.iter().any(|directory| directory.as_bytes() == path) {
                self.is_too_much = true;
            }
            if let Some(Part::Nar(member) | Part::Narinfo(member)) = guix::part(path)
                && !self.items.contains(member.item)
            {
                self.items.insert(member.item.to_vec());
                self.is_too_much |= self.items.len() > MAX_CHANGED_ITEMS;
            }
        }
    }
}

/// Reads narinfos.
struct Judge<'a> {
    cache: Cache,
    rules: &'a Rules<'a>,
}

#[derive(Default)]
struct Tally {
    good: Good,
    faults: u64,
    noted: Vec<Fault>,
}

impl Tally {
    fn verdict(mut self) -> Result<Good, CheckError> {
        if self.faults == 0 {
            return Ok(self.good);
        }
        self.noted.sort();
        self.noted.truncate(NAMED);
        Err(CheckError::Broken(Broken { count: self.faults, first: self.noted }))
    }
}

impl Judge<'_> {
    /// Judges a narinfo that stays, if it is there.
    fn narinfo(&self, member: Member<'_>, tally: &mut Tally) -> Result<(), WalkError> {
        let Some(content) = self.cache.narinfo(member, MAX_NARINFO_BYTES)? else { return Ok(()) };
        tally.good.narinfos += 1;
        let (mut there, mut excluded, mut missing) = (0, 0, None);
        for named in guix::named(&content) {
            match named {
                Ok(nar) if self.rules.excluded_member(nar.member()).is_some() => excluded += 1,
                Ok(nar) if self.cache.stat(nar.member(), Suffix::Nar)?.is_some() => there += 1,
                Ok(nar) => missing = missing.or_else(|| Some(guix::path(nar.member(), Suffix::Nar))),
                Err(url) => missing = missing.or(Some(url)),
            }
        }
        if missing.is_none() && there == 0 {
            missing = Some(Vec::new());
        }
        match missing {
            None => tally.good.partly_excluded += u64::from(excluded > 0),
            Some(names) => {
                tally.faults += 1;
                if tally.noted.len() < MAX_CONFIRMED {
                    tally.noted.push(Fault { narinfo: guix::path(member, Suffix::Narinfo), names });
                }
            }
        }
        Ok(())
    }
}

impl Visit for Judge<'_> {
    type Directory = ();
    type Tally = Tally;

    fn entry(&self, tally: &mut Tally, entry: &Entry<'_, ()>) -> Result<Option<()>, WalkError> {
        if entry.kind == FileType::Directory {
            let is_cache = COMPRESSIONS.iter().any(|directory| directory.as_bytes() == entry.path);
            return Ok((is_cache && self.rules.directory(entry.path).is_none()).then_some(()));
        }
        let Some(Part::Narinfo(member)) = guix::part(entry.path) else { return Ok(None) };
        let time = || {
            let stat = files::stat(entry.fd, entry.name).map_err(WalkError::call("look at", entry.path))?;
            Ok(stat.map(|stat| self.rules.filter().max_age_by.time(&stat)))
        };
        if entry.kind == FileType::RegularFile && self.rules.file(entry.path, time, &self.cache)?.is_none() {
            self.narinfo(member, tally)?;
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests;
