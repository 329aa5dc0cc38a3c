//! Whether a transfer fits: pure arithmetic over what the sender will send and what the file system has.
//!
//! A need is an upper bound: what is admitted must not run out of room by our own doing. What is measured is a moment's truth; what
//! others write meanwhile is what `reserve` is for.
//!
//! `room` measures, `make` prunes and waits until there is enough, `beside` does so while a transfer runs; `holdings` says which
//! snapshots hold how much, and `refusal` what would help.

mod beside;
mod claim;
mod holdings;
mod make;
mod refusal;
mod room;

#[cfg(test)]
mod tests;

use std::fmt;

use common::{
    btrfs::{Pool, Space},
    size::human_bytes,
    stream::{SECTOR_BYTES, Total},
};

pub use self::{
    beside::Beside,
    claim::Claim,
    make::make,
    refusal::{is_no_room, ran_out},
    room::Room,
};

/// Every command about a file takes at least so many bytes of the stream: a header, a path, an attribute.
const LEAST_COMMAND_BYTES: u64 = 32;

/// What the trees of extents and checksums take for a file, beside the checksums themselves; nodes half full.
const PLACE_BYTES: u64 = 256;

/// Nodes of trees that any transfer may rewrite on its way, however short it is: paths down the trees, and some for each commit.
const WORKING_NODES: u64 = 128;

/// A chunk of data is at most so long, and one of metadata on a file system of more than [`LARGE_BYTES`], else [`SMALL_CHUNK_BYTES`].
const CHUNK_BYTES: u64 = 1 << 30;
/// See [`CHUNK_BYTES`].
const SMALL_CHUNK_BYTES: u64 = 256 << 20;
/// See [`CHUNK_BYTES`].
const LARGE_BYTES: u64 = 50 << 30;

/// How full the chunks of metadata get before the kernel takes another one, room in them or not: four parts of five.
const METADATA_FILL: (u128, u128) = (4, 5);

/// What a transfer, or what is left of one, takes on disk at most, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Need {
    /// File data, in whole sectors. What the receiver's own compression would save is not taken off.
    pub data: u64,
    /// Trees: names, attributes, places of data, checksums.
    pub metadata: u64,
}

impl Need {
    /// Of the rest of a stream behind `position`. `incremental`: it builds on a snapshot that stays, so what it changes is there twice.
    pub fn of(total: &Total, position: u64, incremental: bool, space: &Space) -> Self {
        let rest = total.bytes.saturating_sub(position);
        let commands = total.bytes.saturating_sub(total.data_bytes).min(rest);
        let files = total.files.min(rest / LEAST_COMMAND_BYTES);
        let sector = space.sector_bytes.max(1);
        let rounding = if sector > SECTOR_BYTES { files.saturating_mul(sector) } else { 0 };
        let ends = files.saturating_mul(SECTOR_BYTES);
        let data = total.extent_bytes.min(rest.saturating_add(ends)).saturating_add(rounding);
        // Nodes are between half and wholly full. Behind the commands stand the places of a file's data and of its checksums.
        let items = commands.saturating_mul(2).saturating_add(files.saturating_mul(PLACE_BYTES));
        let small = total.small_bytes.min(rest).saturating_add(total.small_bytes.min(rest) / 2);
        let sums = (data / sector).saturating_mul(space.checksum_bytes).saturating_mul(2);
        // What it changes stands in nodes that it shares with the base until then: they are copied, and whatever they refer to
        // gets another reference. But no more of them than there are.
        let copied = if incremental { total.touched.saturating_mul(space.node_bytes / 4 * 5) } else { 0 };
        let trees = if space.mixed { space.data.used } else { space.metadata.used };
        let metadata = [items, small, sums, copied.min(trees), WORKING_NODES * space.node_bytes];
        Self { data, metadata: metadata.into_iter().fold(0, u64::saturating_add) }
    }

    /// Of a transfer whose total nobody knows yet: hardly anything, so that it is refused only where nothing fits any more.
    pub fn unknown(space: &Space) -> Self {
        Self { data: space.sector_bytes.max(1), metadata: WORKING_NODES * space.node_bytes }
    }

    /// Both together.
    pub fn plus(self, other: Self) -> Self {
        Self { data: self.data.saturating_add(other.data), metadata: self.metadata.saturating_add(other.metadata) }
    }
}

/// What an operator leaves to a volume, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// So much stays free for others.
    pub reserve: u64,
    /// The data of all snapshots of the volume together takes no more.
    pub max_size: Option<u64>,
}

/// What there is too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Room for file data.
    Data,
    /// Room for metadata.
    Metadata,
    /// What the operator leaves to the volume.
    MaxSize,
}

/// Whether a transfer fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Fits,
    /// It does not.
    Short(Shortage),
}

/// Too little of something, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// Of what.
    pub of: Resource,
    /// What the transfer needs of it.
    pub need: u64,
    /// What it may have: less than it needs.
    pub have: u64,
}

/// The volume's part of the file system, in bytes of data. It counts only with a `max_size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// What its complete snapshots take.
    pub takes: u64,
    /// What the transfer adds to that, from its beginning on.
    pub adds: u64,
}

/// Judges whether `need` fits. `others` is what has been promised to other transfers on the same file system and is not written yet.
///
/// Data and metadata compete for what is unallocated, a chunk at a time, and nobody knows which comes first: it fits if it fits in
/// both orders.
pub fn judge(need: Need, others: Need, space: &Space, limits: Limits, share: Share) -> Verdict {
    let all = need.plus(others);
    let sides = if space.mixed { mixed(need, others, space) } else { apart(all, space) };
    let of_data = sides.data.saturating_sub(limits.reserve).saturating_sub(others.data);
    let of_limit = limits.max_size.map_or(u64::MAX, |max| max.saturating_sub(share.takes));
    let candidates = [
        (Resource::MaxSize, share.adds, of_limit),
        // Before data: with no room for metadata at all btrfs says that nothing is free.
        (Resource::Metadata, need.metadata, sides.metadata_at_best.saturating_sub(others.metadata)),
        (Resource::Data, need.data, of_data),
        (Resource::Metadata, need.metadata, sides.metadata_at_worst.saturating_sub(others.metadata)),
    ];
    let short = candidates.into_iter().find(|(_, need, have)| need > have);
    short.map_or(Verdict::Fits, |(of, need, have)| Verdict::Short(Shortage { of, need, have }))
}

/// The most of one resource that a transfer may need on a file system that has `space`; with a `max_size`, before anything is taken.
pub fn most(of: Resource, space: &Space, limits: Limits) -> u64 {
    let (nothing, mut low, mut high) = (Need::default(), 0, space.total);
    while low < high {
        // Rounded up, so that it comes to an end.
        let half = low + (high - low).div_ceil(2);
        let need = match of {
            Resource::Metadata => Need { metadata: half, ..nothing },
            Resource::Data | Resource::MaxSize => Need { data: half, ..nothing },
        };
        let share = Share { takes: 0, adds: need.data };
        if judge(need, nothing, space, limits, share) == Verdict::Fits { low = half } else { high = half - 1 }
    }
    low
}

/// Room for either side, in bytes.
struct Sides {
    data: u64,
    metadata_at_best: u64,
    metadata_at_worst: u64,
}

/// With chunks for each.
fn apart(all: Need, space: &Space) -> Sides {
    let Space { data, metadata, unallocated, .. } = space;
    let chunk = chunk(space);
    // Metadata first: it takes another chunk before its own are full.
    let filled = u128::from(metadata.total) * METADATA_FILL.0 / METADATA_FILL.1;
    let wanted = u128::from(metadata.used) + u128::from(space.set_aside) + u128::from(all.metadata);
    let more = u64::try_from(wanted.saturating_sub(filled)).unwrap_or(u64::MAX);
    let taken = metadata.cost.raw(whole(more, chunk.metadata)).min(*unallocated);
    let for_data = data.free().saturating_add(data.cost.net(unallocated - taken)).min(space.free);
    // Data first.
    let more = all.data.saturating_sub(data.free());
    let taken = data.cost.raw(whole(more, chunk.data)).min(*unallocated);
    let own = metadata.free().saturating_sub(space.set_aside);
    let with = |unallocated: u64| own.saturating_add(metadata.cost.net(unallocated));
    Sides { data: for_data, metadata_at_best: with(*unallocated), metadata_at_worst: with(unallocated - taken) }
}

/// With chunks for both.
fn mixed(need: Need, others: Need, space: &Space) -> Sides {
    let pool: &Pool = &space.data;
    let all = pool.free().saturating_sub(space.set_aside).saturating_add(pool.cost.net(space.unallocated));
    let metadata = all.saturating_sub(need.data).saturating_sub(others.data);
    Sides {
        data: all.min(space.free).saturating_sub(need.metadata).saturating_sub(others.metadata),
        metadata_at_best: all,
        metadata_at_worst: metadata,
    }
}

/// Bytes of the chunks that the kernel allocates at a time: not more than a tenth of the file system.
fn chunk(space: &Space) -> Need {
    let tenth = (space.total / 10).max(1 << 20);
    let metadata = if space.total > LARGE_BYTES { CHUNK_BYTES } else { SMALL_CHUNK_BYTES };
    Need { data: CHUNK_BYTES.min(tenth), metadata: metadata.min(tenth) }
}

fn whole(bytes: u64, chunk: u64) -> u64 {
    bytes.div_ceil(chunk).saturating_mul(chunk)
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Data => "data",
            Self::Metadata => "metadata",
            Self::MaxSize => "data",
        })
    }
}

impl Shortage {
    /// What is short and what an operator can do about it; `limits` and `space` are those that it was judged by.
    pub fn explain(&self, space: &Space, limits: Limits, others: Need) -> String {
        let Self { of, need, have } = *self;
        let bytes = human_bytes;
        let promised =
            |sum: u64| if sum > 0 { format!(", {} promised to other transfers", bytes(sum)) } else { String::new() };
        let head = format!("needs {} for {of} and has {}", bytes(need), bytes(have));
        match of {
            Resource::Data => {
                let set_apart =
                    space.free.saturating_sub(have).saturating_sub(limits.reserve).saturating_sub(others.data);
                format!(
                    "{head}: {} free, {} kept in reserve{}, {} set apart for metadata",
                    bytes(space.free),
                    bytes(limits.reserve),
                    promised(others.data),
                    bytes(set_apart)
                )
            }
            Resource::Metadata => format!(
                "{head}: {} of {} taken, {} unallocated{}; if data is spread thin over its chunks, \
                 `btrfs balance start -dusage=50` makes more unallocated",
                bytes(space.metadata.used.saturating_add(space.set_aside)),
                bytes(space.metadata.total),
                bytes(space.unallocated),
                promised(others.metadata)
            ),
            Resource::MaxSize => {
                format!("{head} of max_size = {}", limits.max_size.map_or_else(String::new, bytes))
            }
        }
    }
}
