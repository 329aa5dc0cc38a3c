//! Subvolumes and snapshots, through the `btrfs` program: tests judge the agents by tools that are not theirs.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::lab::run;

/// Makes a subvolume.
pub fn create(path: &Path) {
    run(btrfs(&["subvolume", "create"]).arg(path));
}

/// Makes a read-only snapshot.
pub fn snapshot(source: &Path, at: &Path) {
    run(btrfs(&["subvolume", "snapshot", "-r"]).arg(source).arg(at));
}

/// Deletes a subvolume and waits until the deletion is on disk.
pub fn delete(path: &Path) {
    run(btrfs(&["subvolume", "delete", "-c"]).arg(path));
}

/// What `btrfs subvolume show` tells of a subvolume: `UUID`, `Received UUID`, `Flags`, ...
#[must_use]
pub fn show(path: &Path) -> BTreeMap<String, String> {
    let text = run(btrfs(&["subvolume", "show"]).arg(path));
    let pair = |line: &str| line.split_once(':').map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()));
    text.lines().filter_map(pair).collect()
}

/// The subvolumes directly in a directory, sorted by name.
#[must_use]
pub fn subvolumes(dir: &Path) -> Vec<PathBuf> {
    let is_subvolume = |path: &PathBuf| fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.ino() == 256);
    let mut found: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).filter(is_subvolume).collect();
    found.sort();
    found
}

/// How much of a tree's data is in extents of its own.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    /// Bytes of all files.
    pub total: u64,
    /// Bytes that they take on disk, each shared extent counted once.
    pub unique: u64,
}

/// Measures how much of a tree's data is shared among its own files: what reflinks spare.
#[must_use]
pub fn usage(tree: &Path) -> Usage {
    // What is not written yet takes no extent yet.
    sync(tree);
    let text = run(btrfs(&["filesystem", "du", "-s", "--raw"]).arg(tree));
    let words = text.lines().nth(1).unwrap().split_whitespace().take(3);
    let figures: Vec<u64> = words.map(|word| word.parse().unwrap()).collect();
    Usage { total: figures[0], unique: figures[1] + figures[2] }
}

/// Writes everything to disk.
pub fn sync(path: &Path) {
    run(btrfs(&["filesystem", "sync"]).arg(path));
}

fn btrfs(words: &[&str]) -> Command {
    let mut command = Command::new("btrfs");
    command.args(words);
    command
}
