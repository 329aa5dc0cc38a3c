//! Questions that only the trees of the file system can answer: what is inside a subvolume, what is deleted, are there quotas.

use std::{
    ffi::OsString,
    io,
    os::{fd::BorrowedFd, unix::ffi::OsStringExt},
    path::PathBuf,
};

use rustix::io::Errno;

use super::raw::{self, SEARCH_BUFFER_BYTES, SearchArgs, SearchKey};

/// The tree that knows the roots of all others. Numbers from `include/uapi/linux/btrfs_tree.h`.
const ROOT_TREE: u64 = 1;
/// The tree of the quota groups; it exists only while they are enabled.
const QUOTA_TREE: u64 = 8;

/// The object whose items name what is to be deleted: -5.
const ORPHANS: u64 = u64::MAX - 4;

/// Key of one of them: (orphans, ORPHAN_ITEM, tree).
const ORPHAN_ITEM: u32 = 48;
/// Key of the root of a tree.
const ROOT_ITEM: u32 = 132;
/// Key of the place of a subvolume in another: (outer tree, ROOT_REF, inner tree).
const ROOT_REF: u32 = 156;
/// Key of the state of the quota groups.
const QGROUP_STATUS: u32 = 240;

/// Length of `struct btrfs_ioctl_search_header`: transid u64, objectid u64, offset u64, type u32, length u32.
pub(super) const HEADER_BYTES: usize = 32;
/// Length of `struct btrfs_root_ref` before the name: directory u64, sequence u64, length of the name u16.
const ROOT_REF_BYTES: usize = 18;

/// The subvolumes directly inside the subvolume `tree_id`, as paths relative to it.
pub(super) fn children(fd: BorrowedFd<'_>, tree_id: u64) -> io::Result<Vec<PathBuf>> {
    let mut places = Vec::new();
    items(fd, ROOT_TREE, tree_id, ROOT_REF, |_, item| {
        places.extend(root_ref(item));
        true
    })?;
    let path = |(directory, name): (u64, Vec<u8>)| {
        let mut path = raw::ino_lookup(fd, tree_id, directory)?;
        path.extend(name);
        Ok(PathBuf::from(OsString::from_vec(path)))
    };
    places.into_iter().map(path).collect()
}

/// Whether the file system has a tree of that id, deleted or not, as long as the cleaner has not finished with it.
pub(super) fn has_root(fd: BorrowedFd<'_>, tree_id: u64) -> io::Result<bool> {
    has_item(fd, ROOT_TREE, tree_id, ROOT_ITEM)
}

/// The trees of the subvolumes that are deleted, but not gone: the cleaner has yet to free what they hold.
pub(super) fn orphans(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    let mut trees = Vec::new();
    items(fd, ROOT_TREE, ORPHANS, ORPHAN_ITEM, |header, _| {
        trees.push(header.offset);
        true
    })?;
    Ok(trees)
}

/// Whether quota groups are enabled.
pub(super) fn has_quota_tree(fd: BorrowedFd<'_>) -> io::Result<bool> {
    match has_item(fd, QUOTA_TREE, 0, QGROUP_STATUS) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOENT) => Ok(false),
        other => other,
    }
}

fn has_item(fd: BorrowedFd<'_>, tree_id: u64, objectid: u64, kind: u32) -> io::Result<bool> {
    let mut found = false;
    items(fd, tree_id, objectid, kind, |_, _| {
        found = true;
        false
    })?;
    Ok(found)
}

/// Shows `each` the items of one object and one kind in a tree, until it returns false.
fn items(
    fd: BorrowedFd<'_>,
    tree_id: u64,
    objectid: u64,
    kind: u32,
    each: impl FnMut(&Header, &[u8]) -> bool,
) -> io::Result<()> {
    items_of_at_most(SEARCH_BUFFER_BYTES, fd, tree_id, objectid, kind, each)
}

/// The same, where no item but the first is longer than `longest` bytes with its header: an answer that has room for one more is
/// the last.
pub(super) fn items_of_at_most(
    longest: usize,
    fd: BorrowedFd<'_>,
    tree_id: u64,
    objectid: u64,
    kind: u32,
    mut each: impl FnMut(&Header, &[u8]) -> bool,
) -> io::Result<()> {
    let mut from = 0;
    loop {
        let key = SearchKey {
            tree_id,
            min_objectid: objectid,
            max_objectid: objectid,
            min_offset: from,
            max_offset: u64::MAX,
            max_transid: u64::MAX,
            min_type: kind,
            max_type: kind,
            nr_items: u32::MAX,
            ..SearchKey::default()
        };
        let mut args = SearchArgs { key, items: [0; SEARCH_BUFFER_BYTES] };
        raw::tree_search(fd, &mut args)?;
        let mut rest = &args.items[..];
        let mut last = None;
        for _ in 0..args.key.nr_items {
            let (header, item);
            (header, item, rest) = split_item(rest)?;
            last = Some(header.offset);
            if !each(&header, item) {
                return Ok(());
            }
        }
        match last.and_then(|offset| offset.checked_add(1)) {
            Some(next) if rest.len() < longest => from = next,
            _ => return Ok(()),
        }
    }
}

/// The key of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) object: u64,
    pub(super) offset: u64,
    pub(super) kind: u32,
}

/// Takes one item off a result: its key, its bytes, and what follows.
pub(super) fn split_item(bytes: &[u8]) -> io::Result<(Header, &[u8], &[u8])> {
    let cut_short = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer to a tree search is cut short");
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES).ok_or_else(cut_short)?;
    let long = |at: usize| header[at..at + 8].try_into().map(u64::from_ne_bytes).map_err(|_| cut_short());
    let word = |at: usize| header[at..at + 4].try_into().map(u32::from_ne_bytes).map_err(|_| cut_short());
    let key = Header { object: long(8)?, offset: long(16)?, kind: word(24)? };
    let (item, rest) = rest.split_at_checked(word(28)? as usize).ok_or_else(cut_short)?;
    Ok((key, item, rest))
}

/// Where a subvolume is: the inode of the directory, and the name in it. None if the item is no root reference.
fn root_ref(item: &[u8]) -> Option<(u64, Vec<u8>)> {
    let (head, name) = item.split_at_checked(ROOT_REF_BYTES)?;
    let directory = u64::from_le_bytes(head[..8].try_into().ok()?);
    let length = u16::from_le_bytes(head[16..18].try_into().ok()?);
    Some((directory, name.get(..length.into())?.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_is_cut_short_is_an_error() {
        let mut answer = vec![0; HEADER_BYTES];
        answer[28] = 4;
        answer.extend([1, 2, 3]);
        assert!(split_item(&answer).is_err());
        answer.push(4);
        let header = Header { object: 0, offset: 0, kind: 0 };
        assert_eq!(split_item(&answer).unwrap(), (header, &[1, 2, 3, 4][..], &[][..]));
        assert!(split_item(&answer[..HEADER_BYTES - 1]).is_err());
        assert_eq!(root_ref(&[0; ROOT_REF_BYTES - 1]), None);
    }
}
