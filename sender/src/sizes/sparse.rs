//! A set of numbers for inodes and extents that were counted already: hundreds of millions of them, in bounded memory. Pure.
//!
//! Numbers that share all but their lowest 16 bits share a container: a sorted list of 2 bytes each, or, when that would be longer,
//! a bitmap of 8 KiB. So a set takes some 2 bytes a member, and never more than 1 bit for every number that there could be: for
//! the extents of a disk, counted in blocks of 4 KiB, 32 MiB for each TiB of it. (The layout is that of Roaring bitmaps.)

use std::collections::HashMap;

/// A list of more members than this is longer than a bitmap.
const MAX_LISTED: usize = 4096;

/// Words of a bitmap.
const WORDS: usize = 1 << 10;

/// The set.
#[derive(Debug, Default)]
pub struct Sparse {
    containers: HashMap<u64, Container>,
}

#[derive(Debug)]
enum Container {
    List(Vec<u16>),
    Bits(Box<[u64; WORDS]>),
}

impl Sparse {
    /// Adds a number. Whether it was not there.
    pub fn insert(&mut self, number: u64) -> bool {
        let low = (number & 0xffff) as u16;
        self.containers.entry(number >> 16).or_insert(Container::List(Vec::new())).insert(low)
    }
}

impl Container {
    fn insert(&mut self, low: u16) -> bool {
        let list = match self {
            Self::Bits(bits) => return set(bits, low),
            Self::List(list) => list,
        };
        // Numbers often come in their order.
        let place = match list.last() {
            Some(last) if *last < low => list.len(),
            _ => match list.binary_search(&low) {
                Ok(_) => return false,
                Err(place) => place,
            },
        };
        if list.len() < MAX_LISTED {
            list.insert(place, low);
            return true;
        }
        let mut bits = Box::new([0; WORDS]);
        for &member in list.iter().chain([&low]) {
            set(&mut bits, member);
        }
        *self = Self::Bits(bits);
        true
    }
}

fn set(bits: &mut [u64; WORDS], low: u16) -> bool {
    let (word, bit) = (&mut bits[usize::from(low >> 6)], 1 << (low & 63));
    let is_new = *word & bit == 0;
    *word |= bit;
    is_new
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn it_is_a_set_in_lists_and_in_bitmaps() {
        let mut rng = fastrand::Rng::with_seed(1);
        let (mut sparse, mut plain) = (Sparse::default(), BTreeSet::new());
        for step in 0..200_000_u64 {
            let number = match step % 4 {
                0 => rng.u64(..20_000),
                1 => (1 << 40) + rng.u64(..70_000),
                2 => rng.u64(..),
                _ => u64::MAX - rng.u64(..100),
            };
            assert_eq!(sparse.insert(number), plain.insert(number), "{number}");
        }
        let bitmaps = sparse.containers.values().filter(|container| matches!(container, Container::Bits(_))).count();
        assert!(bitmaps >= 2, "{bitmaps}");
        assert!(plain.iter().all(|&number| !sparse.insert(number)));
    }

    #[test]
    fn a_list_becomes_a_bitmap_just_when_that_is_shorter() {
        let mut sparse = Sparse::default();
        for number in 0..=4096 {
            assert!(matches!(sparse.containers.get(&0), None | Some(Container::List(_))));
            assert!(sparse.insert(number * 2));
        }
        assert!(matches!(sparse.containers[&0], Container::Bits(_)));
        assert!(
            (0..=4096).all(|number| !sparse.insert(number * 2) && (number == 4096 || sparse.insert(number * 2 + 1)))
        );
    }
}
