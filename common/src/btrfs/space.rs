//! How much room a file system has. btrfs can be full with bytes free: metadata needs room that no chunk owns yet.
//!
//! Chunks are the large pieces that the devices are divided into, each for data or for metadata (or, on small file systems, for
//! both). A full kind of chunk takes another piece of what is unallocated; when nothing is, the kind is full, whatever the other
//! one has left.

use std::{os::fd::AsFd, path::Path};

use rustix::io::Errno;

use super::{
    BtrfsError, open_on_btrfs,
    raw::{self, SpaceInfo},
};

/// Kinds and profiles of chunks: `BTRFS_BLOCK_GROUP_...` of `include/uapi/linux/btrfs_tree.h`.
const DATA: u64 = 1;
const METADATA: u64 = 1 << 2;
const RAID1: u64 = 1 << 4;
const DUP: u64 = 1 << 5;
const RAID10: u64 = 1 << 6;
const RAID5: u64 = 1 << 7;
const RAID6: u64 = 1 << 8;
const RAID1C3: u64 = 1 << 9;
const RAID1C4: u64 = 1 << 10;
/// No chunks, but what the kernel keeps of the metadata for itself.
const GLOBAL_RESERVE: u64 = 1 << 49;

/// The longest checksum of a sector that btrfs has, for kernels that do not tell which is in use.
const MAX_CHECKSUM_BYTES: u64 = 32;

/// Room on a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Space {
    /// All of it.
    pub total: u64,
    /// What the kernel estimates can still be written, as `df` shows it.
    pub free: u64,
    /// What belongs to no chunk yet, on all devices together (raw: a mirrored chunk takes twice its size).
    pub unallocated: u64,
    /// The chunks for data; with `mixed` they hold the metadata too.
    pub data: Pool,
    /// The chunks for metadata; empty with `mixed`.
    pub metadata: Pool,
    /// What the kernel keeps of the metadata's chunks for itself: for deletions on a full file system.
    pub set_aside: u64,
    /// Data and metadata are in the same chunks, as `mkfs.btrfs --mixed` makes them.
    pub mixed: bool,
    /// Bytes of a node of a tree.
    pub node_bytes: u64,
    /// Bytes of the smallest piece of data with a place of its own.
    pub sector_bytes: u64,
    /// Bytes of the checksum of a sector.
    pub checksum_bytes: u64,
}

/// The chunks of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pool {
    /// Their bytes; a mirrored one counts once.
    pub total: u64,
    /// How many of them are taken.
    pub used: u64,
    /// What more of them take of what is unallocated.
    pub cost: Cost,
}

impl Pool {
    /// Bytes that can be written without another chunk.
    pub fn free(&self) -> u64 {
        self.total.saturating_sub(self.used)
    }
}

/// What a profile takes on the devices: `raw` bytes for every `net` bytes of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    raw: u64,
    net: u64,
}

impl Cost {
    /// `raw` bytes for every `net`; neither may be 0.
    pub const fn new(raw: u64, net: u64) -> Self {
        assert!(raw > 0 && net > 0, "a cost of nothing, or for nothing");
        Self { raw, net }
    }

    /// What chunks of so many bytes take.
    pub fn raw(self, net: u64) -> u64 {
        saturating(u128::from(net) * u128::from(self.raw), self.net, true)
    }

    /// What chunks fit into so many bytes.
    pub fn net(self, raw: u64) -> u64 {
        saturating(u128::from(raw) * u128::from(self.net), self.raw, false)
    }

    /// Of a profile on so many devices; the striped ones count as if every chunk used all devices.
    fn of(flags: u64, devices: u64) -> Self {
        let has = |profiles: u64| flags & profiles != 0;
        let parity = |lost: u64| Self { raw: devices.max(lost + 1), net: devices.saturating_sub(lost).max(1) };
        match () {
            () if has(RAID1C4) => Self { raw: 4, net: 1 },
            () if has(RAID1C3) => Self { raw: 3, net: 1 },
            () if has(RAID1 | RAID10 | DUP) => Self { raw: 2, net: 1 },
            () if has(RAID6) => parity(2),
            () if has(RAID5) => parity(1),
            () => Self { raw: 1, net: 1 },
        }
    }

    fn dearer(self, other: Self) -> Self {
        let (ours, theirs) =
            (u128::from(self.raw) * u128::from(other.net), u128::from(other.raw) * u128::from(self.net));
        if ours >= theirs { self } else { other }
    }
}

impl Default for Cost {
    /// One for one.
    fn default() -> Self {
        Self { raw: 1, net: 1 }
    }
}

fn saturating(product: u128, by: u64, up: bool) -> u64 {
    let by = u128::from(by);
    u64::try_from(if up { product.div_ceil(by) } else { product / by }).unwrap_or(u64::MAX)
}

/// The room on the file system of `path`. What was written and is not committed yet is not counted as taken.
pub fn space(path: &Path) -> Result<Space, BtrfsError> {
    let dir = open_on_btrfs(path)?;
    let figures = rustix::fs::fstatvfs(&dir).map_err(BtrfsError::call("ask for the free space of", path))?;
    let info = raw::fs_info(dir.as_fd()).map_err(BtrfsError::call("identify the file system of", path))?;
    let mut unallocated = 0_u64;
    for devid in 1..=info.max_id {
        match raw::dev_info(dir.as_fd(), devid) {
            Ok(device) => unallocated += device.total_bytes.saturating_sub(device.bytes_used),
            // Ids of devices that were removed stay unused.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => {}
            Err(error) => return Err(BtrfsError::call("look at the devices of", path)(error)),
        }
    }
    let kinds = raw::space_info(dir.as_fd()).map_err(BtrfsError::call("look at the chunks of", path))?;
    let bytes = |blocks: u64| blocks.saturating_mul(figures.f_frsize);
    Ok(Space {
        total: bytes(figures.f_blocks),
        free: bytes(figures.f_bavail),
        unallocated,
        node_bytes: info.nodesize.into(),
        sector_bytes: info.sectorsize.into(),
        checksum_bytes: Some(info.csum_size.into()).filter(|&bytes| bytes > 0).unwrap_or(MAX_CHECKSUM_BYTES),
        ..pools(&kinds, info.num_devices)
    })
}

/// Puts the kinds together; one that has several profiles, as in the middle of a conversion, gets the dearest of their costs.
fn pools(kinds: &[SpaceInfo], devices: u64) -> Space {
    let mut space = Space::default();
    for kind in kinds {
        if kind.flags & GLOBAL_RESERVE != 0 {
            space.set_aside += kind.total_bytes;
            continue;
        }
        let (is_data, is_metadata) = (kind.flags & DATA != 0, kind.flags & METADATA != 0);
        space.mixed |= is_data && is_metadata;
        let pool = match (is_data, is_metadata) {
            (true, _) => &mut space.data,
            (false, true) => &mut space.metadata,
            (false, false) => continue,
        };
        pool.total += kind.total_bytes;
        pool.used += kind.used_bytes;
        pool.cost = pool.cost.dearer(Cost::of(kind.flags, devices));
    }
    space
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(flags: u64, total_bytes: u64, used_bytes: u64) -> SpaceInfo {
        SpaceInfo { flags, total_bytes, used_bytes }
    }

    #[test]
    fn chunks_are_put_together_by_kind() {
        let system = kind(1 << 1 | DUP, 8, 1);
        let space = pools(&[kind(DATA, 100, 60), kind(METADATA | DUP, 50, 20), system, kind(GLOBAL_RESERVE, 5, 1)], 1);
        assert_eq!((space.data, space.data.free()), (Pool { total: 100, used: 60, cost: Cost::new(1, 1) }, 40));
        assert_eq!(space.metadata, Pool { total: 50, used: 20, cost: Cost::new(2, 1) });
        assert_eq!((space.set_aside, space.mixed), (5, false));
        // In the middle of a conversion.
        let space = pools(&[kind(DATA | RAID5, 10, 1), kind(DATA | RAID1C3, 20, 2), kind(DATA, 30, 3)], 5);
        assert_eq!(space.data, Pool { total: 60, used: 6, cost: Cost::new(3, 1) });
        let space = pools(&[kind(DATA | METADATA, 10, 4), kind(GLOBAL_RESERVE, 2, 0)], 1);
        assert_eq!((space.mixed, space.data.free(), space.metadata.total, space.set_aside), (true, 6, 0, 2));
    }

    #[test]
    fn what_is_mirrored_costs_more() {
        for (flags, devices, raw) in [
            (0, 1, 100),
            (DUP, 1, 200),
            (RAID1, 3, 200),
            (RAID10, 4, 200),
            (RAID1C3, 3, 300),
            (RAID1C4, 4, 400),
            (RAID5, 5, 125),
            (RAID6, 4, 200),
        ] {
            let cost = Cost::of(flags, devices);
            assert_eq!((cost.raw(100), cost.net(raw)), (raw, 100), "{flags:#x} on {devices}");
        }
        // A device is missing, or the number is nonsense: no division by zero.
        assert!(Cost::of(RAID6, 0).raw(10) >= 10);
        assert_eq!((Cost::new(4, 3).raw(u64::MAX), Cost::new(3, 4).net(u64::MAX)), (u64::MAX, u64::MAX));
        assert_eq!((Cost::new(4, 3).raw(1), Cost::new(4, 3).net(1)), (2, 0), "rounded to the safe side");
    }
}
