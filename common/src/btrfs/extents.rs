//! Where the data of subvolumes is on disk: what shows how much several of them take together, and each alone.

use std::{
    io,
    ops::ControlFlow,
    os::fd::{AsFd, BorrowedFd},
};

use super::{
    BtrfsError, Subvolume,
    raw::{self, LongSearchArgs, SearchKey},
    search::{HEADER_BYTES, items_of_at_most, split_item},
};

/// Key of the place of a piece of a file.
const EXTENT_DATA: u32 = 108;
/// Files have the numbers between these; what is beside them are the kernel's own items.
const FIRST_OBJECT: u64 = 256;
const LAST_OBJECT: u64 = u64::MAX - 255;

/// Kinds of `struct btrfs_file_extent_item`: data within the item itself has no place of its own.
const INLINE: u8 = 0;
/// Where in that structure its kind stands, and behind it address and length on disk.
const KIND: usize = 20;
const ADDRESS: usize = 21;
const LENGTH: usize = 29;
/// The length of that structure, unless it holds data.
const ITEM_BYTES: usize = 53;

/// A piece of data on disk. Two files that share it show the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    /// Where it is, in the file system's own addresses.
    pub address: u64,
    /// Bytes that it takes, compressed if it is; mirrors count once.
    pub length: u64,
}

/// Where a piece of a file's data is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// In the tree itself: bytes that it takes there, compressed if it is.
    Inline(u64),
    /// In an extent, of which the file may use a part.
    Extent(Extent),
}

/// Shows `each` where the data of one file is, holes left out. It is named by its inode number in the subvolume that `fd` is in.
///
/// # Errors
/// EPERM for others than root; what else reading the tree may give.
pub fn pieces(fd: BorrowedFd<'_>, inode: u64, mut each: impl FnMut(Piece)) -> io::Result<()> {
    // Only the first piece of a file can be inline, and long.
    items_of_at_most(HEADER_BYTES + ITEM_BYTES, fd, 0, inode, EXTENT_DATA, |_, item| {
        if item.get(KIND) == Some(&INLINE) {
            each(Piece::Inline((item.len() - ADDRESS) as u64));
        } else if let Some(extent) = extent(item) {
            each(Piece::Extent(extent));
        }
        true
    })
}

/// Shows `each` the extents that the files of a subvolume use, as often as they use them, until it breaks.
///
/// Reads the subvolume's tree from end to end: about a million files a second when it is cached. Small files, whose data is in the
/// tree itself, have no extents.
pub fn extents<B>(
    subvolume: &Subvolume,
    mut each: impl FnMut(Extent) -> ControlFlow<B>,
) -> Result<ControlFlow<B>, BtrfsError> {
    walk(subvolume.as_fd(), &mut each).map_err(BtrfsError::call("search the extents of", subvolume.path()))
}

fn walk<B>(fd: BorrowedFd<'_>, each: &mut impl FnMut(Extent) -> ControlFlow<B>) -> io::Result<ControlFlow<B>> {
    let mut args = LongSearchArgs::new(SearchKey::default());
    let (mut object, mut kind, mut offset) = (FIRST_OBJECT, 0, 0);
    loop {
        args.key = SearchKey {
            // The tree that the file is in.
            tree_id: 0,
            min_objectid: object,
            min_type: kind,
            min_offset: offset,
            max_objectid: LAST_OBJECT,
            max_type: u32::MAX,
            max_offset: u64::MAX,
            max_transid: u64::MAX,
            nr_items: u32::MAX,
            ..SearchKey::default()
        };
        raw::tree_search_long(fd, &mut args)?;
        if args.key.nr_items == 0 {
            return Ok(ControlFlow::Continue(()));
        }
        let mut rest = &args.items[..];
        let mut last = (object, kind, offset);
        for _ in 0..args.key.nr_items {
            let (header, item);
            (header, item, rest) = split_item(rest)?;
            last = (header.object, header.kind, header.offset);
            if header.kind == EXTENT_DATA
                && let Some(extent) = extent(item)
                && let ControlFlow::Break(value) = each(extent)
            {
                return Ok(ControlFlow::Break(value));
            }
        }
        // The key behind the last one: only the end of all numbers carries over.
        let Some(next) = behind(last) else { return Ok(ControlFlow::Continue(())) };
        (object, kind, offset) = next;
    }
}

fn behind((object, kind, offset): (u64, u32, u64)) -> Option<(u64, u32, u64)> {
    match (offset.checked_add(1), kind.checked_add(1)) {
        (Some(offset), _) => Some((object, kind, offset)),
        (None, Some(kind)) => Some((object, kind, 0)),
        (None, None) => Some((object.checked_add(1)?, 0, 0)),
    }
}

/// None for a hole, and for data within the item.
fn extent(item: &[u8]) -> Option<Extent> {
    if *item.get(KIND)? == INLINE {
        return None;
    }
    let number = |at: usize| Some(u64::from_le_bytes(item.get(at..at + 8)?.try_into().ok()?));
    let (address, length) = (number(ADDRESS)?, number(LENGTH)?);
    (address > 0).then_some(Extent { address, length })
}
