//! How much the snapshots of a volume take together, and how much would come free with each: read from their trees.
//!
//! btrfs does not know it (unless quota groups count all the time, which makes deletions slow). So the trees are read when the answer
//! decides something, not before: a minute or so for ten million files in three snapshots, less when they are cached.
//!
//! An extent that several files or snapshots share counts once. To know that of all extents at a time would take memory that grows
//! with the volume; so they are counted in rounds, each for a part of the addresses that fits into a fixed number of entries.

use std::ops::ControlFlow;

use common::btrfs::{self, BtrfsError, Extent, Subvolume};

/// Extents of a round. While one is counted there are at most three times as many entries of 16 bytes.
const ROUND_EXTENTS: usize = 1 << 20;

/// What holders take, in bytes of data on disk. Small files, which have their data in metadata, do not count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Holdings {
    /// All together.
    pub total: u64,
    /// Each alone: what would come free if all of its subvolumes were deleted. In the order in which they were given.
    pub alone: Vec<u64>,
}

/// Reads the trees of holders, of which each has some subvolumes. None if `stop` said so before the end.
///
/// # Errors
/// A tree cannot be read.
pub fn measure(holders: &[Vec<&Subvolume>], stop: impl Fn() -> bool) -> Result<Option<Holdings>, BtrfsError> {
    let mut holdings = Holdings { total: 0, alone: vec![0; holders.len()] };
    let mut from = 0;
    loop {
        let mut round = Round::new(from, ROUND_EXTENTS);
        let each = (0..).zip(holders).flat_map(|(owner, subvolumes)| subvolumes.iter().map(move |one| (owner, one)));
        for (owner, subvolume) in each {
            let mut seen = 0_u32;
            let add = |extent: Extent| {
                round.add(extent, owner);
                seen = seen.wrapping_add(1);
                if seen.is_multiple_of(1 << 12) && stop() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            if btrfs::extents(subvolume, add)?.is_break() || stop() {
                return Ok(None);
            }
        }
        match round.finish(&mut holdings) {
            Some(next) => from = next,
            None => return Ok(Some(holdings)),
        }
    }
}

/// A holder by its number, or [`MANY`].
type Owner = u32;
/// Several of them.
const MANY: Owner = u32::MAX;

/// An extent with whoever has it. An extent has at most 128 MiB.
#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    length: u32,
    owner: Owner,
}

/// The extents with the lowest addresses from a certain one on, a bounded number of them.
struct Round {
    from: u64,
    /// Extents beyond are for another round.
    last: u64,
    most: usize,
    entries: Vec<Entry>,
}

impl Round {
    fn new(from: u64, most: usize) -> Self {
        Self { from, last: u64::MAX, most, entries: Vec::new() }
    }

    fn add(&mut self, extent: Extent, owner: Owner) {
        if (self.from..=self.last).contains(&extent.address) {
            let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
            self.entries.push(Entry { address: extent.address, length, owner });
            if self.entries.len() >= 3 * self.most {
                self.compact();
            }
        }
    }

    /// One entry an address, and not more of them than are allowed.
    fn compact(&mut self) {
        self.entries.sort_unstable_by_key(|entry| entry.address);
        self.entries.dedup_by(|one, kept| {
            let is_same = one.address == kept.address;
            if is_same && one.owner != kept.owner {
                kept.owner = MANY;
            }
            is_same
        });
        if self.entries.len() > self.most {
            self.entries.truncate(self.most);
            self.last = self.entries.last().map_or(self.last, |entry| entry.address);
        }
    }

    /// Adds what was found; returns where the next round begins, if there is one.
    fn finish(mut self, holdings: &mut Holdings) -> Option<u64> {
        self.compact();
        for entry in &self.entries {
            let length = u64::from(entry.length);
            holdings.total = holdings.total.saturating_add(length);
            if let Some(alone) = holdings.alone.get_mut(entry.owner as usize) {
                *alone = alone.saturating_add(length);
            }
        }
        if self.last == u64::MAX { None } else { Some(self.last + 1) }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs, process::Command};

    use common::{
        btrfs::Access,
        testing::{SMALL, TestFs, run},
    };
    use proptest::prelude::*;

    use super::*;

    fn in_rounds(extents: &[(u64, u32)], most: usize) -> Holdings {
        let mut holdings = Holdings { total: 0, alone: vec![0; 3] };
        let mut from = Some(0);
        while let Some(begin) = from {
            let mut round = Round::new(begin, most);
            for &(address, owner) in extents {
                round.add(Extent { address, length: address + 1 }, owner);
                assert!(round.entries.len() <= 3 * most);
            }
            from = round.finish(&mut holdings);
        }
        holdings
    }

    proptest! {
        #[test]
        fn rounds_count_every_extent_once(
            extents in prop::collection::vec((0..60_u64, 0..3_u32), 0..200),
            most in 1..20_usize,
        ) {
            let mut owners: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
            for &(address, owner) in &extents {
                owners.entry(address).or_default().push(owner);
            }
            let mut expected = Holdings { total: 0, alone: vec![0; 3] };
            for (address, mut owners) in owners {
                expected.total += address + 1;
                owners.dedup();
                owners.sort();
                owners.dedup();
                if let [owner] = owners[..] {
                    expected.alone[owner as usize] += address + 1;
                }
            }
            prop_assert_eq!(in_rounds(&extents, most), expected);
        }
    }

    #[test]
    fn what_would_come_free_is_what_comes_free() {
        let fs = TestFs::new(SMALL);
        let live = fs.subvolume("live");
        let write = |name: &str, mib: usize| fs::write(live.join(name), vec![1; mib << 20]).unwrap();
        let take = |name: &str| {
            btrfs::sync(fs.path()).unwrap();
            let at = fs.path().join(name);
            btrfs::snapshot(&Subvolume::open(&live).unwrap(), &at, Access::ReadOnly).unwrap();
            Subvolume::open(&at).unwrap()
        };
        write("in both", 8);
        write("in the first", 4);
        let clone = ["in both", "clone"].map(|name| live.join(name));
        run(Command::new("cp").arg("--reflink=always").args(clone));
        let first = take("s1");
        fs::remove_file(live.join("in the first")).unwrap();
        write("in the second", 2);
        let second = take("s2");
        btrfs::delete(&live).unwrap();

        let held = measure(&[vec![&first], vec![&second]], || false).unwrap().unwrap();
        assert_eq!(held, Holdings { total: 14 << 20, alone: vec![4 << 20, 2 << 20] });
        let together = measure(&[vec![], vec![&first, &second]], || false).unwrap().unwrap();
        assert_eq!(together, Holdings { total: 14 << 20, alone: vec![0, 14 << 20] });
        assert_eq!(btrfs::space(fs.path()).unwrap().data.used, held.total);
        assert_eq!(measure(&[vec![&second]], || true).unwrap(), None);
    }
}
