//! Sizes against what was put there.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, symlink},
    time::UNIX_EPOCH,
};

use common::testing::{SMALL, TestFs};

use super::{
    count::{Amount, Counts, Row},
    report::Sized,
    *,
};
use crate::filter::{AgeBy, Rule};

const NOW: u64 = 1_795_330_800;
const MIB: u64 = 1 << 20;

fn filter(exclude: &[&str], max_age_days: Option<u64>, guix_cache: bool) -> Filter {
    Filter {
        exclude: Patterns::new(exclude).unwrap(),
        max_age: max_age_days.map(|days| Duration::from_secs(days * 86_400)),
        max_age_by: AgeBy::Mtime,
        guix_cache,
    }
}

fn counts(root: &Path, filter: &Filter, on_disk: bool) -> Counts {
    let stop = AtomicBool::new(false);
    let options = Options { threads: 3, stop: &stop, tick_interval: TICK };
    let now = Timestamp::from_second(NOW.cast_signed()).unwrap();
    count(File::open(root).unwrap().as_fd(), &filter.at(now), now.as_second(), on_disk, &options, |_| {}).unwrap()
}

/// The row of a directory; an empty name is that of the files beside the directories.
fn row(counts: &Counts, name: &str) -> Row {
    let wanted = (!name.is_empty()).then(|| name.as_bytes().to_vec());
    counts.rows.iter().find(|(name, _)| *name == wanted).map(|(_, row)| *row).unwrap_or_default()
}

fn amount(files: u64, bytes: u64) -> Amount {
    Amount { files, bytes, on_disk: 0 }
}

fn put(path: &Path, bytes: usize, age_days: u64) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, vec![7; bytes]).unwrap();
    File::open(path).unwrap().set_modified(UNIX_EPOCH + Duration::from_secs(NOW - age_days * 86_400)).unwrap();
}

#[test]
fn directories_ages_and_rules_add_up_and_hard_links_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(&root.join("top"), 1, 0);
    put(&root.join("lzip/deep/er/a"), 10, 30);
    put(&root.join("lzip/b.tmp"), 100, 31);
    put(&root.join("zstd/c"), 1000, 100);
    put(&root.join("zstd/d.tmp"), 10_000, 400);
    symlink("nowhere", root.join("zstd/link")).unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    for name in ["zstd/again", "zstd/and-again", "lzip/too", "top-too.tmp"] {
        fs::hard_link(root.join("zstd/c"), root.join(name)).unwrap();
    }
    let counted = counts(root, &filter(&["*.tmp"], None, false), false);
    assert_eq!(counted.total.all, amount(6, 11_111));
    assert_eq!(counted.total.left, amount(4, 1011));
    assert_eq!(row(&counted, "lzip").all, amount(3, 1110));
    assert_eq!(row(&counted, "lzip").left, amount(2, 1010));
    assert_eq!(row(&counted, "zstd").all, amount(3, 11_000));
    assert_eq!(row(&counted, "").all, amount(2, 1001));
    assert_eq!(row(&counted, "").left, amount(1, 1));
    assert_eq!(row(&counted, "empty"), Row::default());
    assert_eq!(counted.rows.len(), 4);
    // The symlink is of today, and the clock of the test is not.
    let bytes = |row: &Row| row.younger.map(|younger| younger.bytes);
    assert_eq!(bytes(&counted.total), [11, 111, 111, 1111, 1111, 1111]);
    assert_eq!(bytes(&row(&counted, "zstd")), [0, 0, 0, 1000, 1000, 1000]);
    let counted = counts(root, &filter(&["lzip/", "*.tmp"], Some(50), false), false);
    assert_eq!(counted.total.left.bytes, 1);
    let gone = counted.rules.values().map(|amount| amount.bytes).sum::<u64>();
    assert_eq!(gone, 11_110, "each once, whichever rule takes the file with many names");
    assert!(counted.rules[&Rule::Pattern(0)].bytes >= 110 && counted.rules[&Rule::Pattern(1)].bytes >= 10_000);
}

#[test]
fn what_is_on_disk_is_counted_compressed_and_shared_extents_once() {
    for (options, of_zeros) in [("noatime", MIB), ("noatime,compress-force=zstd", 8 * 4096)] {
        let fs = TestFs::with_options(SMALL, &[], options);
        let root = fs.subvolume("root");
        put(&root.join("a/zeros"), MIB as usize, 0);
        put(&root.join("b/inline"), 100, 0);
        let sparse = File::create(root.join("b/sparse")).unwrap();
        sparse.set_len(1 << 40).unwrap();
        rustix::fs::syncfs(&sparse).unwrap();
        for copy in ["a/copy", "b/copy.tmp"] {
            rustix::fs::ioctl_ficlone(
                File::create(root.join(copy)).unwrap(),
                File::open(root.join("a/zeros")).unwrap(),
            )
            .unwrap();
        }
        fs::hard_link(root.join("b/inline"), root.join("a/inline")).unwrap();
        let counted = counts(&root, &filter(&["*.tmp", "a/zeros", "a/copy"], None, false), true);
        let (inline, on_disk) = (counted.total.all.on_disk - of_zeros, |name| row(&counted, name).all.on_disk);
        assert!((10..=100).contains(&inline), "{inline} bytes inline");
        assert_eq!((on_disk("a"), on_disk("b")), (of_zeros + inline, of_zeros + inline));
        assert_eq!(counted.total.left.on_disk, inline);
        assert_eq!(counted.total.all.bytes, 3 * MIB + 100 + (1 << 40));
        // An extent stays as long as any file uses a part of it.
        File::options().write(true).open(root.join("a/copy")).unwrap().write_all_at(&[1; 4096], 0).unwrap();
        rustix::fs::syncfs(&sparse).unwrap();
        let grown = counts(&root, &Filter::default(), true).total.all.on_disk - counted.total.all.on_disk;
        assert!((1..=4096).contains(&grown), "{grown}");
    }
}

#[test]
fn a_file_of_many_extents_is_counted_whole() {
    let fs = TestFs::new(SMALL);
    let root = fs.subvolume("root");
    let file = File::create(root.join("many")).unwrap();
    for i in 0..500 {
        file.write_all_at(&[1; 4096], i * 8192).unwrap();
        rustix::fs::fsync(&file).unwrap();
    }
    let counted = counts(&root, &Filter::default(), true);
    assert_eq!((counted.total.all.on_disk, counted.total.left.on_disk), (500 * 4096, 500 * 4096));
}

#[test]
fn a_cache_is_counted_by_its_items() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    for (item, age) in [("old", 100), ("new", 1)] {
        for (path, bytes) in
            [("lzip/*-x.nar", 1000), ("lzip/*-x.narinfo", 10), ("zstd/*-x.nar", 2000), ("zstd/*-x.narinfo", 20)]
        {
            put(&root.join(path.replace('*', item)), bytes, age);
        }
        fs::create_dir_all(root.join("hashes")).unwrap();
        fs::write(root.join("hashes").join(item), format!("/gnu/store/{item}-x")).unwrap();
    }
    let filter = filter(&["lzip/*.nar"], Some(30), true);
    let counted = counts(root, &filter, false);
    assert_eq!(counted.total.left, amount(3, 2020 + 16));
    assert_eq!(counted.rules[&Rule::Pattern(0)], amount(4, 2020));
    assert_eq!(counted.rules[&Rule::Age], amount(2, 2020));
    assert_eq!(counted.rules[&Rule::Companion], amount(1, 16));
}

#[test]
fn the_report_says_it_to_people_and_to_programs() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    (0..40).for_each(|i| put(&root.join(format!("d{i:02}\n/file")), 1 << i.min(12), i * 10));
    let filter = filter(&["d0*", "nothing"], Some(120), false);
    let text = include_str!("../../../deploy/sender.example.toml");
    let file = dir.path().join("sender.toml");
    fs::write(&file, text).unwrap();
    let config = Config::load(&file).unwrap();
    fs::remove_file(&file).unwrap();
    let sized = Sized::new(&config.volumes[0], &filter, true, &counts(root, &filter, false));
    let said = sized.to_string();
    assert!(said.lines().all(|line| !line.contains('\r') && line.chars().count() < 140), "{said}");
    for part in [
        "volume substitutes: ",
        "<= 120d",
        "exclude \"d0*\"",
        "max_age \"120d\"",
        "on disk",
        "15 more directories",
        r"d12\n",
        "left",
    ] {
        assert!(said.contains(part), "{part:?} is missing in\n{said}");
    }
    let json = serde_json::to_value(&sized).unwrap();
    assert_eq!(json["directories"].as_array().unwrap().len(), 40);
    assert_eq!(json["files"], 40);
    assert_eq!(json["younger"][0]["days"], 30);
    assert_eq!(json["younger"][0]["files"], 4);
    assert_eq!(json["filters"][2]["filter"], "max_age \"120d\"");
    assert_eq!(json["left"]["files"], 3);
    assert_eq!(json["filters"][0]["files"], 10);
}
