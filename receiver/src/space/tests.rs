//! The judgement on made-up file systems; the need against real ones: never below what a transfer takes.

use std::{
    fs::{self, File},
    io::Read as _,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Command,
};

use common::{
    btrfs::{self, Access, Cost, SendOptions, Sending, Subvolume},
    stream::{Item, StreamError, TotalCounter, Walker},
    testing::{TestFs, run},
};
use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// 100 GiB in single data chunks and mirrored metadata chunks, with 40 GiB unallocated.
fn space() -> Space {
    let pool = |total: u64, used: u64, raw: u64| Pool { total: total * MIB, used: used * MIB, cost: Cost::new(raw, 1) };
    Space {
        total: 100 * GIB,
        free: 50 * GIB,
        unallocated: 40 * GIB,
        data: pool(56 << 10, 46 << 10, 1),
        metadata: pool(2 << 10, 1 << 10, 2),
        set_aside: 100 * MIB,
        mixed: false,
        node_bytes: 16_384,
        sector_bytes: 4096,
        checksum_bytes: 4,
    }
}

fn data(bytes: u64) -> Need {
    Need { data: bytes, metadata: 0 }
}

fn metadata(bytes: u64) -> Need {
    Need { data: 0, metadata: bytes }
}

fn short(of: Resource, need: u64, have: u64) -> Verdict {
    Verdict::Short(Shortage { of, need, have })
}

fn share(takes: u64, need: Need) -> Share {
    Share { takes, adds: need.data }
}

fn fits(need: Need, space: &Space, limits: Limits) -> bool {
    judge(need, Need::default(), space, limits, share(0, need)) == Verdict::Fits
}

#[test]
fn data_may_take_what_is_free_but_the_reserve() {
    let limits = Limits { reserve: 10 * GIB, max_size: None };
    let judge = |need, others| judge(need, others, &space(), limits, Share::default());
    assert_eq!(judge(data(40 * GIB), Need::default()), Verdict::Fits);
    assert_eq!(judge(data(40 * GIB + 1), Need::default()), short(Resource::Data, 40 * GIB + 1, 40 * GIB));
    // What is promised to others is not ours.
    assert_eq!(judge(data(38 * GIB), data(2 * GIB)), Verdict::Fits);
    assert_eq!(judge(data(40 * GIB), data(GIB)), short(Resource::Data, 40 * GIB, 39 * GIB));
    // Metadata takes whole chunks of what is unallocated, mirrored.
    let both = Need { data: 40 * GIB, metadata: GIB };
    assert_eq!(judge(both, Need::default()), short(Resource::Data, 40 * GIB, 38 * GIB));
}

#[test]
fn metadata_needs_what_is_unallocated() {
    let none = Limits::default();
    let mut full = space();
    assert!(fits(metadata(20 * GIB), &full, none));
    (full.unallocated, full.free) = (0, 10 * GIB);
    // A gigabyte of the chunks is free, of which the kernel keeps some.
    assert!(fits(metadata(924 * MIB), &full, none));
    let verdict = judge(metadata(GIB), Need::default(), &full, none, Share::default());
    assert_eq!(verdict, short(Resource::Metadata, GIB, 924 * MIB));
    assert!(fits(Need { data: 10 * GIB, metadata: MIB }, &full, none), "bytes in chunks of data");
    // Data would leave nothing unallocated for metadata.
    let mut tight = space();
    (tight.unallocated, tight.free) = (2 * GIB, 12 * GIB);
    assert!(fits(Need { data: 10 * GIB, metadata: 100 * MIB }, &tight, none));
    assert!(fits(Need { data: 0, metadata: 1900 * MIB }, &tight, none));
    let both = Need { data: 10 * GIB + 1, metadata: 1900 * MIB };
    assert!(!fits(both, &tight, none));
}

#[test]
fn max_size_counts_what_the_snapshots_take() {
    let limits = Limits { reserve: 0, max_size: Some(5 * GIB) };
    let judge = |need, takes| judge(need, Need::default(), &space(), limits, share(takes, need));
    assert_eq!(judge(data(5 * GIB), 0), Verdict::Fits);
    assert_eq!(judge(data(2 * GIB), 4 * GIB), short(Resource::MaxSize, 2 * GIB, GIB));
    assert_eq!(judge(data(1), 6 * GIB), short(Resource::MaxSize, 1, 0));
    assert_eq!(judge(metadata(MIB), 6 * GIB), Verdict::Fits, "what brings no data");
}

#[test]
fn what_frees_room_fits_where_nothing_else_does() {
    let limits = Limits { reserve: 60 * GIB, max_size: Some(MIB) };
    assert!(fits(metadata(10 * MIB), &space(), limits), "an increment that deletes");
    assert!(!fits(Need::unknown(&space()), &space(), limits), "nobody knows what it brings");
    assert!(fits(Need::unknown(&space()), &space(), Limits::default()));
}

#[test]
fn in_mixed_chunks_all_is_one() {
    let mixed = Space { mixed: true, metadata: Pool::default(), ..space() };
    let none = Limits::default();
    assert!(fits(Need { data: 49 * GIB, metadata: 900 * MIB }, &mixed, none));
    assert!(!fits(Need { data: 49 * GIB, metadata: 1025 * MIB }, &mixed, none));
}

#[test]
fn the_rest_of_a_transfer_needs_less() {
    let total = Total {
        bytes: 100 * MIB,
        data_bytes: 90 * MIB,
        files: 1000,
        small_bytes: MIB,
        extent_bytes: 91 * MIB,
        touched: 2000,
    };
    let need = |position| Need::of(&total, position, true, &space());
    assert_eq!(need(0).data, 91 * MIB);
    assert_eq!(need(60 * MIB).data, 40 * MIB + 1000 * 4096);
    assert_eq!(need(100 * MIB), Need { data: 0, metadata: need(100 * MIB).metadata });
    assert_eq!(need(u64::MAX), need(100 * MIB), "a stream that became longer");
    // A peer that says anything at all.
    const MANY: u64 = u64::MAX;
    let absurd =
        Total { bytes: 5, data_bytes: MANY, files: MANY, small_bytes: MANY, extent_bytes: MANY, touched: MANY };
    let _ = (Need::of(&absurd, 0, true, &space()), Need::of(&absurd, u64::MAX, false, &Space::default()));
    let all = Need { data: MANY, metadata: MANY };
    let verdict = judge(all, all, &space(), Limits { reserve: MANY, max_size: Some(0) }, share(MANY, all));
    assert!(matches!(verdict, Verdict::Short(_)));
}

#[test]
fn a_shortage_says_what_would_help() {
    let limits = Limits { reserve: 10 * GIB, max_size: Some(20 * GIB) };
    let text = |of| Shortage { of, need: 3 * GIB, have: GIB }.explain(&space(), limits, data(GIB));
    let said = text(Resource::Data);
    assert!(
        said.contains("needs 3.00 GiB for data and has 1.00 GiB") && said.contains("10.0 GiB kept in reserve"),
        "{said}"
    );
    assert!(said.contains("1.00 GiB promised"), "{said}");
    assert!(text(Resource::Metadata).contains("btrfs balance"));
    assert!(text(Resource::MaxSize).contains("max_size = 20.0 GiB"));
}

fn any_space() -> impl Strategy<Value = Space> {
    let pool = |raw: std::ops::Range<u64>| {
        (0..1_u64 << 40, 0..1_u64 << 40, raw).prop_map(|(total, used, raw)| Pool {
            total,
            used,
            cost: Cost::new(raw, 1),
        })
    };
    let rest = (0..1_u64 << 42, 0..1_u64 << 42, 0..1_u64 << 42, 0..1_u64 << 30, any::<bool>());
    (pool(1..4), pool(1..5), rest).prop_map(|(data, metadata, (total, free, unallocated, set_aside, mixed))| Space {
        total,
        free,
        unallocated,
        data,
        metadata,
        set_aside,
        mixed,
        ..space()
    })
}

fn any_need() -> impl Strategy<Value = Need> {
    (0..1_u64 << 41, 0..1_u64 << 38).prop_map(|(data, metadata)| Need { data, metadata })
}

proptest! {
    #[test]
    fn less_is_never_harder_to_fit(
        space in any_space(),
        (need, others) in (any_need(), any_need()),
        (reserve, max, takes) in (0..1_u64 << 40, prop::option::of(0..1_u64 << 42), 0..1_u64 << 42),
        less in any_need(),
    ) {
        let limits = Limits { reserve, max_size: max };
        let verdict = judge(need, others, &space, limits, share(takes, need));
        if let Verdict::Short(Shortage { need, have, .. }) = verdict {
            prop_assert!(need > have);
            return Ok(());
        }
        // What fits leaves the reserve, and does not go beyond what there is.
        prop_assert!(need.data == 0 || need.data + reserve + others.data <= space.free);
        prop_assert!(max.is_none_or(|max| need.data == 0 || need.data + takes <= max));
        let net = |pool: Pool, bytes| pool.cost.net(bytes);
        let pools = if space.mixed { [space.data; 2] } else { [space.data, space.metadata] };
        prop_assert!(need.data <= pools[0].free() + net(pools[0], space.unallocated));
        prop_assert!(need.metadata <= pools[1].free() + net(pools[1], space.unallocated));
        // Less of anything that stands against it keeps it fitting.
        let smaller = Need { data: need.data.min(less.data), metadata: need.metadata.min(less.metadata) };
        prop_assert_eq!(judge(smaller, others, &space, limits, share(takes, smaller)), Verdict::Fits);
        let fewer = Need { data: others.data.min(less.data), metadata: others.metadata.min(less.metadata) };
        prop_assert_eq!(judge(need, fewer, &space, limits, share(takes, need)), Verdict::Fits);
        let wider = Limits { reserve: reserve.min(less.data), max_size: max.map(|max| max.saturating_add(less.data)) };
        prop_assert_eq!(judge(need, others, &space, wider, share(takes.min(less.data), need)), Verdict::Fits);
        let raw = less.data;
        let roomier = Space { unallocated: space.unallocated + raw, free: space.free.saturating_add(raw), ..space };
        prop_assert_eq!(judge(need, others, &roomier, limits, share(takes, need)), Verdict::Fits);
    }

    #[test]
    fn the_most_fits_and_more_does_not(space in any_space(), reserve in 0..1_u64 << 40, max in prop::option::of(0..1_u64 << 42)) {
        let limits = Limits { reserve, max_size: max };
        for of in [Resource::Data, Resource::Metadata] {
            let need = |bytes| if of == Resource::Data { data(bytes) } else { metadata(bytes) };
            let most = most(of, &space, limits);
            prop_assert!(most == 0 || fits(need(most), &space, limits));
            prop_assert!(most == space.total || !fits(need(most + 1), &space, limits));
        }
    }
}

/// Two file systems, and the snapshots that go from one to the other.
struct Ferry {
    from: TestFs,
    to: TestFs,
    sent: u32,
}

impl Ferry {
    fn new() -> Self {
        let (from, to) = (TestFs::new(2 * GIB), TestFs::new(2 * GIB));
        let _ = from.subvolume("live");
        Self { from, to, sent: 0 }
    }

    fn live(&self) -> PathBuf {
        self.from.path().join("live")
    }

    /// Sends the source as it is, and compares what that was foreseen to take with what it takes.
    fn send(&mut self, what: &str) {
        let at = |n: u32| self.from.path().join(format!("s{n}"));
        let (snapshot, base) = (at(self.sent), self.sent.checked_sub(1).map(at));
        self.sent += 1;
        btrfs::sync(self.from.path()).unwrap();
        btrfs::snapshot(&Subvolume::open(&self.live()).unwrap(), &snapshot, Access::ReadOnly).unwrap();
        let before = settled(self.to.path());
        let need = Need::of(&total(&snapshot, base.as_deref()), 0, base.is_some(), &before);
        let base = base.map_or_else(String::new, |base| format!("-p {}", base.display()));
        let (from, to) = (snapshot.display(), self.to.path().display());
        let script = format!("set -o pipefail; btrfs send -q --proto 2 {base} {from} | btrfs receive -q {to}");
        run(Command::new("bash").args(["-ec", &script]));
        let after = settled(self.to.path());
        let took = Need {
            data: after.data.used.saturating_sub(before.data.used),
            metadata: after.metadata.used.saturating_sub(before.metadata.used),
        };
        println!("{what}: needs {need:?}, took {took:?}");
        assert!(need.data >= took.data && need.metadata >= took.metadata, "{what}: needs {need:?}, took {took:?}");
        // Not absurd either: twice the data with a sector for each file, a few times the metadata of anything but trifles.
        assert!(need.metadata <= 8 * took.metadata + 8 * MIB, "{what}: needs {need:?}, took {took:?}");
    }
}

/// What the stream will be, as the sender counts it.
fn total(snapshot: &Path, base: Option<&Path>) -> Total {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let subvolume = Subvolume::open(snapshot).unwrap();
    let base = base.map(|base| Subvolume::open(base).unwrap().info().unwrap().tree_id);
    let sender = std::thread::spawn(move || {
        btrfs::send(subvolume.as_fd(), writer, SendOptions { base, version: 2, sending: Sending::NoFileData })
    });
    let mut stream = Vec::new();
    File::from(reader).read_to_end(&mut stream).unwrap();
    sender.join().unwrap().unwrap();
    let mut counter = TotalCounter::new();
    let walked: Result<(), StreamError> = Walker::new().walk(&stream, |item| match item {
        Item::Command { command, .. } => counter.update(&command),
        Item::Version(_) => Ok(()),
    });
    walked.unwrap();
    counter.finish()
}

fn settled(path: &Path) -> Space {
    btrfs::sync(path).unwrap();
    btrfs::start_cleaner(path).unwrap();
    btrfs::space(path).unwrap()
}

#[test]
fn a_transfer_never_takes_more_than_was_foreseen() {
    let mut rng = fastrand::Rng::with_seed(7);
    for (files, size, name) in
        [(8000, 1500, 8), (8000, 5000, 100), (8000, 0, 30), (500, 200_000, 40), (2, 100_000_000, 8)]
    {
        let mut ferry = Ferry::new();
        let dir = ferry.live().join("dir");
        fs::create_dir(&dir).unwrap();
        let path = |i: usize| dir.join(format!("{i:0name$}"));
        let mut data = vec![0; size];
        let mut write = |i: usize| {
            rng.fill(&mut data);
            fs::write(path(i), &data).unwrap();
        };
        let what = |done: &str| format!("{files} files of {size} bytes, {done}");
        (0..files).for_each(&mut write);
        ferry.send(&what("all"));
        (0..files).step_by(37).for_each(&mut write);
        ferry.send(&what("some rewritten"));
        (0..files).step_by(41).for_each(|i| fs::remove_file(path(i)).unwrap());
        ferry.send(&what("some removed"));
        (0..files / 50).for_each(|i| write(i * 1_000_003 + 77));
        ferry.send(&what("some added"));
        run(Command::new("chmod").args(["-R", "u+x"]).arg(&dir));
        ferry.send(&what("all with another mode"));
        for i in (1..files).step_by(43).filter(|i| i % 41 > 0) {
            fs::rename(path(i), dir.join(format!("renamed{i}"))).unwrap();
        }
        ferry.send(&what("some renamed"));
    }
}
