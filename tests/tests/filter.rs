//! Filters: what they exclude never reaches the mirror box, they may change between cycles, and an interrupted one leaves nothing.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    time::Duration,
};

use snapferry_tests::{
    agent::Agent,
    btrfs, change,
    manifest::{Manifest, View},
    nar,
    pair::{Pair, name},
    programs::{self, SENDER},
};

/// Agents that are told to stop have stopped within this time.
const MAX_SHUTDOWN: Duration = Duration::from_secs(5);

/// Gives the sender's volume more keys, in place of those that the last call gave it.
fn configure(pair: &Pair, keys: &str) {
    const OURS: &str = "\n# the filter\n";
    let text = fs::read_to_string(pair.sender_config()).unwrap();
    let before = text.split(OURS).next().unwrap();
    fs::write(pair.sender_config(), format!("{before}{OURS}{keys}\n")).unwrap();
}

/// A filter, and whether it excludes a path by itself: its bytes, whether it is a directory, its mtime.
type Case = (&'static str, fn(&[u8], bool, f64) -> bool);

const CASES: [Case; 6] = [
    ("", |_, _, _| false),
    ("exclude = [\"*3\"]", |path, _, _| path.ends_with(b"3")),
    ("exclude = [\"*[05]\", \"/new-*1\"]", |path, _, _| {
        path.ends_with(b"0") || path.ends_with(b"5") || !path.contains(&b'/') && path.ends_with(b"1")
    }),
    ("exclude = [\"*3/\"]", |path, is_dir, _| is_dir && path.ends_with(b"3")),
    ("max_age = \"3650d\"", |_, is_dir, mtime| !is_dir && mtime < 1e9),
    ("exclude = [\"*\", \"!*2\"]", |path, _, _| !path.ends_with(b"2")),
];

/// The paths of a tree that a case leaves.
fn left(tree: &Manifest, (_, excludes): Case) -> Vec<Vec<u8>> {
    let mut gone: Vec<Vec<u8>> = Vec::new();
    let mut left = Vec::new();
    // Sorted, so a directory comes before what is in it; but not at once before it.
    for path in tree.paths() {
        let is_dir = tree.attribute(path, "type") == Some("directory");
        let mtime = tree.attribute(path, "mtime").unwrap_or("2e9").parse().unwrap();
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
        let mut above = slashes.map(|(end, _)| path[..end].to_vec());
        if above.any(|above| gone.contains(&above)) || !path.is_empty() && excludes(path, is_dir, mtime) {
            gone.push(path.to_vec());
        } else {
            left.push(path.to_vec());
        }
    }
    left
}

#[test]
fn twenty_cycles_with_changing_filters_arrive_as_ordinary_increments() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    change::randomly(source, seed, 150);
    for round in 0..20_u64 {
        let case = CASES[usize::try_from(seed.wrapping_add(round * 5) % 6).unwrap()];
        configure(&pair, case.0);
        let base = pair.snapshots().last().map(|newest| name(newest));
        let cycle = pair.ferry();
        let what = format!("seed {seed}, round {round}, {:?}", case.0);
        assert!(base.is_none_or(|base| cycle.text("base").starts_with(&base)), "{what}: {cycle:?}");
        pair.assert_arrived();
        let (ours, theirs) = (Manifest::of(source, View::Client), Manifest::of(&pair.live(), View::Client));
        let expected = left(&ours, case);
        assert_eq!(theirs.paths().map(<[u8]>::to_vec).collect::<Vec<_>>(), expected, "{what}");
        let other: Vec<String> = ours.differences(&theirs);
        let other: Vec<&String> = other.iter().filter(|line| !line.ends_with(": missing")).collect();
        assert!(other.is_empty(), "{what}: {other:#?}");
        change::randomly(source, seed ^ (round + 1), 40);
    }
    pair.assert_no_leftovers();
}

/// How often `part` stands in a file.
fn count(file: &Path, part: &[u8]) -> usize {
    let (mut file, mut kept, mut block, mut count) = (File::open(file).unwrap(), Vec::new(), vec![0; 1 << 20], 0);
    loop {
        let n = file.read(&mut block).unwrap();
        if n == 0 {
            return count;
        }
        kept.extend_from_slice(&block[..n]);
        // Most of an image is holes.
        if kept.iter().any(|&b| b != 0) {
            count += kept.windows(part.len()).filter(|window| *window == part).count();
        }
        kept.drain(..kept.len() - (part.len() - 1));
    }
}

#[test]
fn the_mirror_box_never_sees_what_is_excluded() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    configure(&pair, "exclude = [\"/hidden-directory/\", \"*.hidden-name\"]\nmax_age = \"365d\"");
    let source = &pair.places.source;
    fs::create_dir_all(source.join("hidden-directory/below")).unwrap();
    for round in 0..3 {
        fs::write(source.join(format!("hidden-directory/below/{round}")), b"INVISIBLE BYTES").unwrap();
        fs::write(source.join(format!("{round}.hidden-name")), b"INVISIBLE BYTES too").unwrap();
        let old = File::create(source.join(format!("hidden-because-old-{round}"))).unwrap();
        old.set_modified(std::time::UNIX_EPOCH).unwrap();
        fs::write(source.join(format!("open-{round}")), b"VISIBLE TO EVERYBODY").unwrap();
        pair.ferry();
    }
    pair.assert_arrived();
    btrfs::sync(&pair.places.store);
    let image = pair.lab.image("mirror");
    assert!(count(&image, b"VISIBLE TO EVERYBODY") >= 3 && count(&image, b"open-2") >= 1);
    for part in [&b"INVISIBLE"[..], b"hidden-"] {
        assert_eq!(count(&image, part), 0, "{}", part.escape_ascii());
    }
}

/// A pair whose next snapshot takes seconds to filter.
fn slow_to_filter() -> Pair {
    let pair = Pair::new();
    configure(&pair, "exclude = [\"/many/\"]");
    fs::create_dir(pair.places.source.join("many")).unwrap();
    for i in 0..60_000 {
        File::create(pair.places.source.join(format!("many/{i}"))).unwrap();
    }
    fs::write(pair.places.source.join("few"), "").unwrap();
    pair
}

#[test]
fn a_filter_run_that_is_told_to_stop_leaves_nothing() {
    let pair = slow_to_filter();
    let _receiver = pair.start_receiver();
    let sender = pair.sender(&["run"]);
    let progress = sender.wait_for("filter progress");
    assert_eq!((progress.text("stage"), progress.text("volume")), ("filter", "substitutes"));
    assert!(progress.count("removed") <= progress.count("files"));
    let (ended, took) = sender.stop();
    assert!(took < MAX_SHUTDOWN, "{took:?}");
    ended.expect(0);
    assert!(btrfs::subvolumes(&pair.places.snapshot_dir).is_empty());
    pair.ferry();
    pair.assert_arrived();
    assert_eq!(fs::read_dir(pair.live()).unwrap().count(), 1);
}

#[test]
fn what_a_killed_filter_run_left_is_swept() {
    let pair = slow_to_filter();
    let _receiver = pair.start_receiver();
    let sender = pair.sender(&["run"]);
    sender.wait_for("filter progress");
    sender.kill();
    assert_eq!(pair.snapshots().iter().map(|left| name(left)).collect::<Vec<_>>(), ["substitutes.filtering"]);
    let ended = pair.run_once().expect(0);
    assert_eq!(ended.log.all("leftover removed").len(), 1);
    assert_eq!(ended.log.only("filtered").count("removed"), 60_001);
    pair.assert_arrived();
    assert_eq!(pair.snapshots().len(), 1);
}

#[test]
fn a_crash_behind_any_step_of_a_filter_run_is_mended() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    configure(&pair, "exclude = [\"*.lz\"]");
    for step in 1..=4 {
        fs::write(pair.places.source.join(format!("{step}.lz")), "").unwrap();
        fs::write(pair.places.source.join(format!("{step}")), "").unwrap();
        let before = pair.snapshots();
        let mut command = pair.head.command(programs::path(SENDER));
        command.env("SNAPFERRY_CRASH", format!("filter:{step}")).arg("--config").arg(pair.sender_config());
        assert!(!Agent::start(command, ["run", "--once"]).wait().status.success());
        assert_eq!(pair.snapshots().len(), before.len() + 1, "step {step}");
        pair.ferry();
        pair.assert_arrived();
        assert!(pair.snapshots().iter().all(|snapshot| !name(snapshot).ends_with(".filtering")));
        assert_eq!(fs::read_dir(pair.live()).unwrap().count(), step);
    }
}

#[test]
fn a_narinfo_without_its_nar_is_not_published() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    nar::grow(source, 3_000_000, 1).unwrap();
    configure(&pair, "exclude = [\"lzip/\"]\nguix_cache = true");
    pair.ferry();
    pair.assert_arrived();
    assert_eq!(nar::broken(&pair.live()), Vec::<std::path::PathBuf>::new());
    assert!(!pair.live().join("lzip").exists() && pair.live().join("hashes").exists());
    let published = pair.published();

    let of_zstd = fs::read_dir(source.join("zstd")).unwrap().map(|entry| entry.unwrap().path());
    let nar = of_zstd.into_iter().find(|path| path.extension().unwrap() == "nar").unwrap();
    let (narinfo, aside) = (nar.with_extension("narinfo"), source.join("aside"));
    fs::rename(&nar, &aside).unwrap();
    let snapshots = pair.snapshots();
    let said = pair.run_once().expect(1).log.only("cycle failed").text("error").to_owned();
    assert!(said.contains("1 narinfo ") && said.contains(&name(&narinfo)), "{said}");
    assert_eq!((pair.snapshots(), pair.published()), (snapshots, published));
    pair.sender(&["check"]).wait().expect(1).expect_said(&name(&narinfo));
    fs::rename(&aside, &nar).unwrap();
    pair.sender(&["check"]).wait().expect(0).expect_said("narinfos name nars that are there");
    pair.ferry();
    pair.assert_arrived();
}

#[test]
fn an_item_goes_by_age_as_a_whole() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    nar::grow(source, 3_000_000, 2).unwrap();
    configure(&pair, "max_age = \"30d\"\nguix_cache = true");
    pair.ferry();
    let all = Manifest::of(&pair.live(), View::Client).len();
    // Two items become old, one of them but for one file.
    let stems: Vec<String> = fs::read_dir(source.join("hashes"))
        .unwrap()
        .map(|hash| name(Path::new(fs::read_to_string(hash.unwrap().path()).unwrap().trim())))
        .take(2)
        .collect();
    for stem in &stems {
        for file in ["zstd/nar", "zstd/narinfo", "lzip/nar", "lzip/narinfo"] {
            let (dir, suffix) = file.split_once('/').unwrap();
            if *stem == stems[0] || file != "lzip/nar" {
                let file = File::open(source.join(dir).join(format!("{stem}.{suffix}"))).unwrap();
                file.set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        }
    }
    pair.ferry();
    pair.assert_arrived();
    let live = Manifest::of(&pair.live(), View::Client);
    assert_eq!(live.len(), all - 5);
    assert!(live.paths().all(|path| !path.windows(32).any(|part| part == &stems[0].as_bytes()[..32])));
    assert_eq!(nar::broken(&pair.live()), Vec::<std::path::PathBuf>::new());
}

#[test]
fn sizes_says_before_what_arrives_afterwards() {
    let pair = Pair::new();
    let _receiver = pair.start_receiver();
    let source = &pair.places.source;
    nar::grow(source, 5_000_000, 3).unwrap();
    let files = |tree: &Path| {
        let tree = Manifest::of(tree, View::Client);
        let sizes =
            tree.paths().filter_map(|path| tree.attribute(path, "size")).map(|size| size.parse::<u64>().unwrap());
        sizes.fold((0, 0), |(files, bytes), size| (files + 1, bytes + size))
    };
    let sizes = |arguments: &[&str]| {
        let ended = pair.sender(&[&["sizes", "--json"], arguments].concat()).wait().expect(0);
        let value: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
        value["volumes"][0].clone()
    };
    let sum = |value: &serde_json::Value| (value["files"].as_u64().unwrap(), value["bytes"].as_u64().unwrap());
    let tried = sizes(&["substitutes", "--exclude", "lzip/", "--exclude", "*.narinfo"]);
    assert_eq!(sum(&tried), files(source));
    assert!(pair.snapshots().is_empty());
    configure(&pair, "exclude = [\"lzip/\", \"*.narinfo\"]");
    let configured = sizes(&[]);
    assert_eq!(tried, configured);
    pair.ferry();
    assert_eq!(sum(&configured["left"]), files(&pair.live()));
    // What is on disk is what the mirror box will have, too: nars do not compress.
    btrfs::sync(source);
    let on_disk = sizes(&["--on-disk"])["left"]["on_disk"].as_u64().unwrap();
    let replica = btrfs::usage(&pair.replicas()[0]).unique;
    assert!(on_disk.abs_diff(replica) < replica / 10, "{on_disk} {replica}");
    pair.sender(&["sizes"]).wait().expect(0).expect_said("exclude \"lzip/\"").expect_said("left");
    pair.sender(&["sizes", "others"]).wait().expect(2).expect_said("substitutes");
    pair.sender(&["sizes", "--exclude", "[a"]).wait().expect(2).expect_said("unclosed");
}
