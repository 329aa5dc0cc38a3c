//! Broken caches are found, by a look at everything and by a look at what changed.

use std::{
    fs,
    os::{fd::AsFd, unix::fs::symlink},
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
    time::Duration,
};

use common::{
    btrfs::Found,
    snapshot::VolumeName,
    testing::{SMALL, TestFs},
};
use jiff::Timestamp;

use super::*;
use crate::{
    create::{CreateError, Order, Site},
    filter::{Filter, Patterns},
};

static NEVER: AtomicBool = AtomicBool::new(false);

/// A cache with an item in the given compressions, as `guix publish` makes it: one narinfo under several names.
fn add(cache: &Path, item: &str, compressions: &[&str]) {
    let urls: String = compressions.iter().map(|c| format!("URL: nar/{c}/{item}\nFileSize: 3\n")).collect();
    let hash = item.split('-').next().unwrap();
    fs::create_dir_all(cache.join("hashes")).unwrap();
    fs::write(cache.join("hashes").join(hash), format!("/gnu/store/{item}")).unwrap();
    let mut first: Option<PathBuf> = None;
    for compression in compressions {
        let dir = cache.join(compression);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(format!("{item}.nar")), "nar").unwrap();
        let narinfo = dir.join(format!("{item}.narinfo"));
        match &first {
            Some(first) => fs::hard_link(first, &narinfo).unwrap(),
            None => fs::write(&narinfo, format!("StorePath: /gnu/store/{item}\n{urls}")).unwrap(),
        }
        first = Some(narinfo);
    }
}

fn filter(exclude: &[&str]) -> Filter {
    Filter { exclude: Patterns::new(exclude).unwrap(), guix_cache: true, ..Filter::default() }
}

fn look(cache: &Path, filter: &Filter) -> Result<Good, String> {
    let options = Options { threads: 2, stop: &NEVER, tick_interval: Duration::from_secs(1) };
    let rules = filter.at(Timestamp::UNIX_EPOCH);
    let root = fs::File::open(cache).unwrap();
    everything(root.as_fd(), &rules, &options, |_| {}).map_err(|error| error.to_string())
}

#[test]
fn a_narinfo_without_its_nars_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path();
    for i in 0..3000 {
        add(cache, &format!("h{i}-x"), &["lzip", "zstd"]);
    }
    add(cache, "none-x", &["zstd"]);
    assert_eq!(look(cache, &filter(&[])), Ok(Good { narinfos: 6001, partly_excluded: 0 }));
    assert_eq!(look(cache, &filter(&["lzip/"])), Ok(Good { narinfos: 3001, partly_excluded: 3000 }));
    fs::remove_file(cache.join("lzip/h7-x.nar")).unwrap();
    assert_eq!(look(cache, &filter(&["lzip/"])), Ok(Good { narinfos: 3001, partly_excluded: 3000 }));
    let said = look(cache, &filter(&[])).unwrap_err();
    assert!(said.starts_with("2 narinfos do not fit the nars: lzip/h7-x.narinfo (names lzip/h7-x.nar, which is not there), zstd/h7-x.narinfo (names lzip"), "{said}");
    assert!(!said.contains(", ...") && said.contains("guix_cache = false"), "{said}");
    // The only one that it names, in another directory.
    fs::remove_file(cache.join("zstd/none-x.nar")).unwrap();
    let said = look(cache, &filter(&["lzip/"])).unwrap_err();
    assert!(said.starts_with("1 narinfo does not fit the nars: zstd/none-x.narinfo (names zstd/none-x.nar"), "{said}");
    for i in 0..5 {
        fs::write(cache.join(format!("zstd/a{i}.narinfo")), "URL: nar/%zz\n").unwrap();
    }
    fs::write(cache.join("zstd/0.narinfo"), "").unwrap();
    let said = look(cache, &filter(&["lzip/"])).unwrap_err();
    assert!(said.starts_with("7 narinfos do not fit the nars: zstd/0.narinfo (names no nar that is there), zstd/a0.narinfo (names nar/%zz, which"), "{said}");
    assert!(said.contains("zstd/a1.narinfo") && !said.contains("zstd/a2") && said.contains(", ...; "), "{said}");
}

#[test]
fn all_nars_of_a_narinfo_must_not_be_excluded() {
    let dir = tempfile::tempdir().unwrap();
    add(dir.path(), "h-x", &["lzip"]);
    // A narinfo where it does not belong, kept although its only nar goes.
    fs::create_dir(dir.path().join("zstd")).unwrap();
    fs::hard_link(dir.path().join("lzip/h-x.narinfo"), dir.path().join("zstd/h-x.narinfo")).unwrap();
    assert!(look(dir.path(), &filter(&[])).is_ok());
    // A source is judged as the snapshot will be.
    let said = look(dir.path(), &filter(&["lzip/"])).unwrap_err();
    assert!(said.contains("zstd/h-x.narinfo (names no nar that is there)"), "{said}");
}

#[test]
fn what_is_no_narinfo_of_the_cache_is_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path();
    fs::create_dir_all(cache.join("zstd/sub")).unwrap();
    fs::create_dir_all(cache.join("other")).unwrap();
    for path in ["zstd/sub/x.narinfo", "other/x.narinfo", "x.narinfo", "zstd/x.narinfo.tmp"] {
        fs::write(cache.join(path), "URL: nar/zstd/nothing").unwrap();
    }
    fs::create_dir(cache.join("zstd/directory.narinfo")).unwrap();
    symlink("nothing", cache.join("zstd/link.narinfo")).unwrap();
    assert_eq!(look(cache, &filter(&[])), Ok(Good::default()));
}

/// A volume whose snapshots are checked.
struct Lab {
    site: Site,
    fs: TestFs,
    volume: VolumeName,
}

impl Lab {
    fn new() -> Self {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        fs::create_dir(fs.path().join("snapshots")).unwrap();
        let site = Site::open(&source, &fs.path().join("snapshots")).unwrap();
        Self { site, fs, volume: "v".parse().unwrap() }
    }

    fn cache(&self) -> PathBuf {
        self.fs.path().join("source")
    }

    fn take(&self, filter: &Filter) -> Result<Found, CreateError> {
        let checked_file = self.fs.path().join("v.guix.toml");
        let (now, progress_interval) = (Timestamp::from_second(1_795_330_800).unwrap(), Duration::from_secs(1));
        let volume = &self.volume;
        self.site.take(&Order { volume, now, filter, stop: &NEVER, progress_interval, checked_file: &checked_file })
    }

    /// Takes one that must fail; what it says.
    #[track_caller]
    fn refused(&self, filter: &Filter) -> String {
        let before = fs::read_dir(self.fs.path().join("snapshots")).unwrap().count();
        let said = self.take(filter).unwrap_err().to_string();
        let after = fs::read_dir(self.fs.path().join("snapshots")).unwrap().count();
        assert_eq!(after, before, "the snapshot is removed again");
        said
    }

    /// What a check of the changes alone finds, between two snapshots.
    fn changes(&self, from: &Found, to: &Found, filter: &Filter) -> Option<Good> {
        let options = Options { threads: 2, stop: &NEVER, tick_interval: Duration::from_secs(1) };
        let source = Source::open(to, Some(from)).unwrap();
        let root = fs::File::open(&to.path).unwrap();
        changes(root.as_fd(), &source, &filter.at(Timestamp::UNIX_EPOCH), &options).unwrap()
    }
}

#[test]
fn only_what_changed_is_read_again() {
    let lab = Lab::new();
    let (cache, filter) = (lab.cache(), filter(&["*.tmp"]));
    for i in 0..500 {
        add(&cache, &format!("h{i}-x"), &["lzip", "zstd"]);
    }
    let first = lab.take(&filter).unwrap();
    add(&cache, "new-x", &["lzip", "zstd"]);
    fs::remove_file(cache.join("zstd/h3-x.narinfo")).unwrap();
    fs::File::open(cache.join("zstd/h4-x.narinfo")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    fs::rename(cache.join("zstd/h5-x.nar"), cache.join("zstd/h5-x.nar.tmp")).unwrap();
    fs::write(cache.join("zstd/h5-x.nar"), "again").unwrap();
    let second = lab.take(&filter).unwrap();
    // new-x twice, what is left of h3-x, h5-x twice.
    assert_eq!(lab.changes(&first, &second, &filter), Some(Good { narinfos: 5, partly_excluded: 0 }));
    let third = lab.take(&filter).unwrap();
    assert_eq!(lab.changes(&second, &third, &filter), Some(Good::default()));
    fs::rename(cache.join("zstd"), cache.join("gzip")).unwrap();
    fs::create_dir(cache.join("zstd")).unwrap();
    let said = lab.refused(&filter);
    assert!(said.contains("999 narinfos") || said.contains("1001 narinfos"), "{said}");
}

#[test]
fn a_snapshot_that_is_broken_by_a_change_is_refused_and_removed() {
    let lab = Lab::new();
    let cache = lab.cache();
    for i in 0..20 {
        add(&cache, &format!("h{i}-x"), &["lzip", "zstd"]);
    }
    for filter in [filter(&[]), filter(&["*.tmp"])] {
        lab.take(&filter).unwrap();
        // A nar goes, its narinfo does not change.
        for (nar, other) in [("zstd/h1-x.nar", "away.tmp"), ("lzip/h2-x.nar", "zstd/h2-x.nar.old")] {
            fs::rename(cache.join(nar), cache.join(other)).unwrap();
            let said = lab.refused(&filter);
            assert!(said.contains("2 narinfos do not fit the nars") && said.contains(nar), "{said}");
            fs::rename(cache.join(other), cache.join(nar)).unwrap();
            lab.take(&filter).unwrap();
        }
        // A narinfo comes without a nar, is replaced, or written to.
        let narinfo = cache.join("zstd/h3-x.narinfo");
        let good = fs::read(&narinfo).unwrap();
        for bad in ["URL: nar/zstd/else-x\n", ""] {
            fs::write(&narinfo, bad).unwrap();
            assert!(lab.refused(&filter).contains("zstd/h3-x.narinfo"));
            fs::write(&narinfo, &good).unwrap();
            lab.take(&filter).unwrap();
        }
        fs::rename(cache.join("lzip/h4-x.nar"), cache.join("lzip/h5-x.nar")).unwrap();
        let said = lab.refused(&filter);
        assert!(said.contains("h4-x.narinfo") && !said.contains("h5-x"), "{said}");
        fs::copy(cache.join("lzip/h5-x.nar"), cache.join("lzip/h4-x.nar")).unwrap();
        lab.take(&filter).unwrap();
    }
}

#[test]
fn what_a_pattern_excused_is_looked_at_again_when_it_goes() {
    let lab = Lab::new();
    let cache = lab.cache();
    (0..20).for_each(|i| add(&cache, &format!("h{i}-x"), &["lzip", "zstd"]));
    fs::remove_file(cache.join("lzip/h1-x.nar")).unwrap();
    let taken = lab.take(&filter(&["lzip/"])).unwrap();
    assert!(!taken.path.join("lzip").exists() && taken.path.join("hashes/h1").exists());
    let said = lab.refused(&filter(&[]));
    assert!(said.contains("names lzip/h1-x.nar, which is not there"), "{said}");
    let relaxed = Filter { guix_cache: false, ..filter(&[]) };
    lab.take(&relaxed).unwrap();
    // What was not checked is not taken for good.
    assert!(lab.refused(&filter(&[])).contains("lzip/h1-x.nar"));
    fs::write(cache.join("lzip/h1-x.nar"), "").unwrap();
    lab.take(&filter(&[])).unwrap();
    fs::write(lab.fs.path().join("v.guix.toml"), "no toml").unwrap();
    lab.take(&filter(&[])).unwrap();
}
