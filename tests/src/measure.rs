//! Data for transfers, and how much of it there is.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Command,
};

use fastrand::Rng;

use crate::{btrfs, lab};

/// The names in a directory, sorted.
#[must_use]
pub fn entries(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

/// How long the stream of a snapshot is, as `btrfs send` says.
#[must_use]
pub fn stream_bytes(snapshot: &Path, base: Option<&Path>) -> u64 {
    stream_of(snapshot, base, "wc -c").parse().unwrap()
}

/// The digest of the stream of a snapshot.
#[must_use]
pub fn stream_digest(snapshot: &Path, base: Option<&Path>) -> String {
    stream_of(snapshot, base, "sha256sum")
}

fn stream_of(snapshot: &Path, base: Option<&Path>, measure: &str) -> String {
    let base = base.map(|base| format!("-p {}", base.display())).unwrap_or_default();
    let script = format!("set -o pipefail; btrfs -q send --proto 2 {base} {} | {measure}", snapshot.display());
    lab::run(Command::new("bash").args(["-ec", &script])).trim().to_owned()
}

/// The most that a file below a directory takes on disk, in bytes; holes are not sent.
#[must_use]
pub fn largest_file(dir: &Path) -> u64 {
    let below = |entry: fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => largest_file(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    };
    fs::read_dir(dir).unwrap().flatten().map(below).max().unwrap_or(0)
}

/// Adds so many bytes in files of at most half a megabyte, in a directory of their own. The same seed adds the same.
pub fn grow(source: &Path, seed: u64, bytes: u64) {
    let mut rng = Rng::with_seed(seed);
    let dir = source.join(format!("bulk-{seed:016x}"));
    let mut grown = 0;
    for number in 0.. {
        let part: PathBuf = dir.join((number / 50).to_string());
        fs::create_dir_all(&part).unwrap();
        let mut data = vec![0; rng.usize(..500_000)];
        rng.fill(&mut data);
        fs::write(part.join(number.to_string()), &data).unwrap();
        grown += data.len() as u64;
        if grown >= bytes {
            break;
        }
    }
    btrfs::sync(source);
}
