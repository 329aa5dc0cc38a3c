//! Counts what is in a volume, by directory, by age and by rule, in one walk.
//!
//! A file with several names (hard links) counts once in each top-level directory that has one of them, and once in all; an extent
//! that several files share likewise. Which were counted is remembered in [`Sparse`] sets; all else is a fixed number of counters
//! for each thread and row.

use std::{
    collections::HashMap,
    os::fd::{AsFd, BorrowedFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use common::btrfs::{self, Piece};
use rustix::fs::{FileType, Stat};

use super::sparse::Sparse;
use crate::{
    filter::{
        Rule, Rules,
        files::{self, Cache},
    },
    walk::{Entry, Options, Visit, WalkError, walk},
};

/// Ages that are told apart, in days: 1, 2, 3, 4, 6 and 12 months.
pub const AGES: [u64; 6] = [30, 60, 90, 120, 180, 365];

/// So many top-level directories have rows of their own.
const MAX_ROWS: usize = 1000;

/// The row of the files at the top, and that of the directories that have no row of their own.
const TOP_FILES: usize = 0;
const OTHERS: usize = 1;

/// Bytes of a block of a disk: extents begin at multiples of it.
const BLOCK_BYTES: u64 = 4096;

const SECONDS_A_DAY: i64 = 86_400;

/// Some files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    /// How many: everything but directories.
    pub files: u64,
    /// Their lengths.
    pub bytes: u64,
    /// What they occupy on disk, if that was asked for.
    pub on_disk: u64,
}

impl Amount {
    fn add(&mut self, other: Self) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.on_disk += other.on_disk;
    }
}

/// What is in a directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Row {
    /// All of it.
    pub all: Amount,
    /// What is not older than [`AGES`]; here not what they occupy on disk.
    pub younger: [Amount; AGES.len()],
    /// What the filter leaves; what it occupies on disk is known of all rows together only.
    pub left: Amount,
}

impl Row {
    fn add(&mut self, other: &Self) {
        self.all.add(other.all);
        self.left.add(other.left);
        for (mine, theirs) in self.younger.iter_mut().zip(other.younger) {
            mine.add(theirs);
        }
    }
}

/// What is in a volume.
#[derive(Debug, Default)]
pub struct Counts {
    /// All of it.
    pub total: Row,
    /// By top-level directory: name and content. None: the files beside them; an empty name: directories without a row.
    pub rows: Vec<(Option<Vec<u8>>, Row)>,
    /// What each rule takes away. A file of which several names go counts once, for one of their rules, even if another name stays.
    pub rules: HashMap<Rule, Amount>,
}

/// Counts a subvolume. `now` is what ages are counted to, in seconds since 1970.
///
/// # Errors
/// Of the file system.
pub fn count(
    root: BorrowedFd<'_>,
    rules: &Rules<'_>,
    now: i64,
    on_disk: bool,
    options: &Options<'_>,
    tick: impl FnMut(u64),
) -> Result<Counts, WalkError> {
    let cache = Cache::open(root, rules.filter().max_age_by)?;
    let names = Mutex::new(vec![None, Some(Vec::new())]);
    let counter = Counter { root, rules, cache, now, on_disk, names, counted: Mutex::default() };
    let top = Place { row: None, excluded: None };
    let tallies = walk(root, &counter, top, options, tick)?;
    let names = counter.names.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut counts =
        Counts { rows: names.into_iter().map(|name| (name, Row::default())).collect(), ..Counts::default() };
    for tally in tallies {
        counts.total.add(&tally.total);
        for (row, (_, sum)) in tally.rows.iter().zip(&mut counts.rows) {
            sum.add(row);
        }
        for (rule, amount) in tally.rules {
            counts.rules.entry(rule).or_default().add(amount);
        }
    }
    counts.rows.retain(|(name, row)| row.all.files > 0 || name.as_ref().is_some_and(|name| !name.is_empty()));
    Ok(counts)
}

struct Counter<'a> {
    root: BorrowedFd<'a>,
    rules: &'a Rules<'a>,
    cache: Cache,
    now: i64,
    on_disk: bool,
    /// Of the rows.
    names: Mutex<Vec<Option<Vec<u8>>>>,
    counted: Mutex<Counted>,
}

/// Where a directory belongs.
struct Place {
    /// None for the root.
    row: Option<usize>,
    excluded: Option<Rule>,
}

#[derive(Default)]
struct Tally {
    total: Row,
    rows: Vec<Row>,
    rules: HashMap<Rule, Amount>,
}

/// What of the files with several names, and of the extents, was counted already.
#[derive(Default)]
struct Counted {
    total: Seen,
    left: Seen,
    rows: Vec<Seen>,
    rows_left: Vec<Sparse>,
    gone: Sparse,
}

#[derive(Default)]
struct Seen {
    inodes: Sparse,
    extents: Sparse,
}

/// What a file adds to the sums.
#[derive(Default)]
struct Shares {
    total: Option<Amount>,
    row: Option<Amount>,
    left: Option<Amount>,
    row_left: Option<Amount>,
    gone: Option<Amount>,
}

impl Visit for Counter<'_> {
    type Directory = Place;
    type Tally = Tally;

    fn entry(&self, tally: &mut Tally, entry: &Entry<'_, Place>) -> Result<Option<Place>, WalkError> {
        let Place { row, excluded } = *entry.directory;
        if entry.kind == FileType::Directory {
            let excluded = excluded.or_else(|| self.rules.directory(entry.path));
            let row = row.unwrap_or_else(|| self.new_row(entry.path));
            return Ok(Some(Place { row: Some(row), excluded }));
        }
        let look_at = WalkError::call::<rustix::io::Errno>;
        let stat = files::stat(entry.fd, entry.name).map_err(|error| look_at("look at", entry.path)(error))?;
        let Some(stat) = stat else { return Ok(None) };
        let time = self.rules.filter().max_age_by.time(&stat);
        let rule = match excluded {
            Some(rule) => Some(rule),
            None => self.rules.file(entry.path, || Ok(Some(time)), &self.cache)?,
        };
        let row = row.unwrap_or(TOP_FILES);
        let shares = self.shares(row, rule.is_none(), &stat, entry.path)?;
        if let (Some(rule), Some(gone)) = (rule, shares.gone) {
            tally.rules.entry(rule).or_default().add(gone);
        }
        tally.add(row, &shares, self.now.saturating_sub(time));
        Ok(None)
    }
}

impl Tally {
    fn add(&mut self, row: usize, shares: &Shares, age: i64) {
        if self.rows.len() <= row {
            self.rows.resize(row + 1, Row::default());
        }
        let all = [(shares.total, shares.left, &mut self.total), (shares.row, shares.row_left, &mut self.rows[row])];
        for (share, left, sums) in all {
            if let Some(left) = left {
                sums.left.add(left);
            }
            let Some(share) = share else { continue };
            sums.all.add(share);
            for (days, younger) in AGES.into_iter().zip(&mut sums.younger) {
                if age <= days.cast_signed() * SECONDS_A_DAY {
                    younger.add(share);
                }
            }
        }
    }
}

impl Counter<'_> {
    fn new_row(&self, name: &[u8]) -> usize {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() == MAX_ROWS {
            return OTHERS;
        }
        names.push(Some(name.to_vec()));
        names.len() - 1
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of a file was not counted yet.
    fn shares(&self, row: usize, stays: bool, stat: &Stat, path: &[u8]) -> Result<Shares, WalkError> {
        let amount = Amount { files: 1, bytes: length(stat), on_disk: 0 };
        let (left, gone) = if stays { (Some(amount), None) } else { (None, Some(amount)) };
        let mut shares = Shares { total: Some(amount), row: Some(amount), left, row_left: left, gone };
        if stat.st_nlink > 1 {
            let mut counted = self.counted();
            let (inode, row) = (stat.st_ino, counted.row(row));
            shares.row = shares.row.filter(|_| counted.rows[row].inodes.insert(inode));
            shares.total = shares.total.filter(|_| counted.total.inodes.insert(inode));
            shares.left = shares.left.filter(|_| counted.left.inodes.insert(inode));
            shares.row_left = shares.row_left.filter(|_| counted.rows_left[row].insert(inode));
            shares.gone = shares.gone.filter(|_| counted.gone.insert(inode));
        }
        // A file that was counted in all of them was so with its extents.
        let is_new = shares.total.is_some() || shares.row.is_some() || shares.left.is_some();
        if self.on_disk && is_new && amount.bytes > 0 {
            self.count_extents(row, stat.st_ino, &mut shares).map_err(WalkError::call("find the extents of", path))?;
        }
        Ok(shares)
    }

    fn count_extents(&self, row: usize, inode: u64, shares: &mut Shares) -> std::io::Result<()> {
        let mut pieces = Vec::new();
        btrfs::pieces(self.root.as_fd(), inode, |piece| pieces.push(piece))?;
        let mut counted = self.counted();
        let row = counted.row(row);
        let Counted { total, left, rows, .. } = &mut *counted;
        for piece in pieces {
            let sums =
                [(&mut shares.total, &mut *total), (&mut shares.row, &mut rows[row]), (&mut shares.left, &mut *left)];
            for (share, seen) in sums {
                let Some(share) = share else { continue };
                share.on_disk += match piece {
                    Piece::Inline(bytes) => bytes,
                    Piece::Extent(extent) if seen.extents.insert(extent.address / BLOCK_BYTES) => extent.length,
                    Piece::Extent(_) => 0,
                };
            }
        }
        Ok(())
    }
}

impl Counted {
    /// Makes sure that there is such a row.
    fn row(&mut self, row: usize) -> usize {
        if self.rows.len() <= row {
            self.rows.resize_with(row + 1, Seen::default);
            self.rows_left.resize_with(row + 1, Sparse::default);
        }
        row
    }
}

/// Only regular files have a length to speak of.
fn length(stat: &Stat) -> u64 {
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile { stat.st_size.max(0).cast_unsigned() } else { 0 }
}
