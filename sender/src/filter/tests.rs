//! What goes and what stays, by rule.

use std::{cell::RefCell, collections::BTreeMap, convert::Infallible};

use super::*;

const NOW: i64 = 1_000_000_000;
const DAY: i64 = 86_400;

/// A tree of files by their paths.
#[derive(Default)]
struct Tree {
    files: RefCell<BTreeMap<Vec<u8>, File>>,
}

struct File {
    time: i64,
    content: Vec<u8>,
}

impl Tree {
    fn of(files: &[(&str, i64)]) -> Self {
        let tree = Self::default();
        for (path, days) in files {
            let hash = path.strip_prefix("hashes/");
            let content = hash.map_or(String::new(), |hash| format!("/gnu/store/{hash}-x"));
            let file = File { time: NOW - days * DAY, content: content.into_bytes() };
            tree.files.borrow_mut().insert(path.as_bytes().to_vec(), file);
        }
        tree
    }

    /// Removes what goes, file by file, so that the later ones are judged when the earlier ones are gone already.
    fn filter(&self, filter: &Filter, backwards: bool) -> Vec<String> {
        let rules = filter.at(Timestamp::from_second(NOW).unwrap());
        let mut paths: Vec<Vec<u8>> = self.files.borrow().keys().cloned().collect();
        if backwards {
            paths.reverse();
        }
        let mut gone = Vec::new();
        for path in paths {
            let parts = path.iter().enumerate().filter(|(_, byte)| **byte == b'/');
            let above = parts.map(|(end, _)| &path[..end]).any(|above| rules.directory(above).is_some());
            let own = self.files.borrow()[&path].time;
            let Ok(rule) = rules.file(&path, || Ok(Some(own)), self);
            if above || rule.is_some() {
                self.files.borrow_mut().remove(&path);
                gone.push(String::from_utf8(path).unwrap());
            }
        }
        gone.sort();
        gone
    }
}

impl Look for Tree {
    type Error = Infallible;

    fn time(&self, member: Member<'_>, suffix: Suffix) -> Result<Option<i64>, Infallible> {
        Ok(self.files.borrow().get(&guix::path(member, suffix)).map(|file| file.time))
    }

    fn mapping(&self, hash: &[u8]) -> Result<Option<Vec<u8>>, Infallible> {
        let path = [b"hashes/", hash].concat();
        Ok(self.files.borrow().get(&path).map(|file| file.content.clone()))
    }
}

fn filter(exclude: &[&str], days: Option<u64>, guix_cache: bool) -> Filter {
    Filter {
        exclude: Patterns::new(exclude).unwrap(),
        max_age: days.map(|days| Duration::from_secs(days * 86_400)),
        max_age_by: AgeBy::Mtime,
        guix_cache,
    }
}

/// What goes of such files; the order in which they are looked at must not matter.
fn gone(filter: &Filter, files: &[(&str, i64)]) -> Vec<String> {
    let [forwards, backwards] = [false, true].map(|backwards| Tree::of(files).filter(filter, backwards));
    assert_eq!(forwards, backwards, "the order matters");
    forwards
}

#[test]
fn files_go_by_name_or_by_age() {
    let files = [("a.lz", 1), ("b", 10), ("d/old.lz", 20), ("d/old", 10), ("lzip/x", 1), ("edge", 5)];
    assert_eq!(gone(&filter(&["*.lz", "lzip/"], None, false), &files), ["a.lz", "d/old.lz", "lzip/x"]);
    assert_eq!(gone(&filter(&[], Some(5), false), &files), ["b", "d/old", "d/old.lz"]);
    assert_eq!(gone(&filter(&["*.lz"], Some(5), false), &files), ["a.lz", "b", "d/old", "d/old.lz"]);
    assert!(gone(&filter(&[], None, true), &files).is_empty());
    assert!(filter(&[], None, true).is_idle() && !filter(&[], Some(1), false).is_idle());
}

#[test]
fn the_rule_is_named_and_a_file_that_vanished_stays() {
    let (tree, filter) = (Tree::default(), filter(&["*.a", "b*"], Some(5), false));
    let rules = filter.at(Timestamp::from_second(NOW).unwrap());
    let rule = |path: &[u8], time| rules.file(path, || Ok(time), &tree).unwrap();
    assert_eq!(rule(b"x.a", Some(NOW)), Some(Rule::Pattern(0)));
    assert_eq!(rule(b"b.a", Some(0)), Some(Rule::Pattern(1)));
    assert_eq!(rule(b"x", Some(0)), Some(Rule::Age));
    assert_eq!(rule(b"x", Some(NOW + 1)), None, "from the future");
    assert_eq!(rule(b"x", None), None);
}

#[test]
fn a_nar_and_its_narinfo_go_together_and_the_hash_with_the_last_of_them() {
    let files = [
        ("hashes/h", 90),
        ("lzip/h-x.nar", 1),
        ("lzip/h-x.narinfo", 1),
        ("zstd/h-x.nar", 1),
        ("zstd/h-x.narinfo", 1),
        ("zstd/h-y.nar", 1),
    ];
    for one_of_them in ["lzip/*.nar", "lzip/*.narinfo", "lzip/"] {
        assert_eq!(gone(&filter(&[one_of_them], None, true), &files), ["lzip/h-x.nar", "lzip/h-x.narinfo"]);
    }
    let all: Vec<&str> = files[..5].iter().map(|(path, _)| *path).collect();
    assert_eq!(gone(&filter(&["h-x.nar"], None, true), &files), all);
    assert_eq!(gone(&filter(&["h-x.nar"], None, false), &files), ["lzip/h-x.nar", "zstd/h-x.nar"]);
    assert_eq!(gone(&filter(&["hashes/"], None, true), &files), ["hashes/h"]);
}

#[test]
fn an_item_is_as_old_as_its_youngest_file() {
    let files = |age: i64| {
        [
            ("hashes/h", 90),
            ("lzip/h-x.nar", 90),
            ("lzip/h-x.narinfo", 90),
            ("zstd/h-x.nar", 90),
            ("zstd/h-x.narinfo", age),
        ]
    };
    let old: Vec<&str> = files(0).iter().map(|(path, _)| *path).collect();
    assert!(gone(&filter(&[], Some(30), true), &files(29)).is_empty());
    assert_eq!(gone(&filter(&[], Some(30), true), &files(31)), old);
    // What a pattern excludes keeps nothing young.
    assert_eq!(gone(&filter(&["zstd/"], Some(30), true), &files(29)), old);
    assert_eq!(gone(&filter(&["lzip/"], Some(30), true), &files(29)), ["lzip/h-x.nar", "lzip/h-x.narinfo"]);
    assert_eq!(gone(&filter(&[], Some(30), false), &files(29)), old[..4]);
}

#[test]
fn a_hash_that_maps_to_nothing_goes_only_if_anything_may_go() {
    let files = [("hashes/h", 1), ("hashes/other", 1)];
    assert!(gone(&filter(&[], None, true), &files).is_empty());
    assert_eq!(gone(&filter(&["nothing"], None, true), &files), ["hashes/h", "hashes/other"]);
    let tree = Tree::of(&files);
    tree.files.borrow_mut().insert(b"hashes/h".to_vec(), File { time: 0, content: b"no store path".to_vec() });
    assert_eq!(tree.filter(&filter(&["nothing"], None, true), false), ["hashes/other"], "it is a file like any other");
}
