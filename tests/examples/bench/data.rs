//! The data sets. The same sizes give the same bytes.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use fastrand::Rng;
use snapferry_tests::nar;

const SEED: u64 = 1;

/// Files of one directory among the small ones.
const FILES_IN_A_DIRECTORY: u64 = 1000;

/// Bytes of a small file: those of a narinfo.
pub const SMALL_BYTES: u64 = 1500;

/// How much there is of something.
#[derive(Debug, Clone, Copy, Default)]
pub struct Amount {
    /// Regular files.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// The cache of a build farm: archives that no compressor shrinks, and small texts that describe them.
pub fn nar_like(root: &Path, bytes: u64) -> Amount {
    nar::grow(root, bytes, SEED).unwrap();
    measure(root)
}

/// Texts of `bytes` each, a thousand to a directory. Part of each shrinks, as in a narinfo.
pub fn texts(root: &Path, files: u64, bytes: u64) -> Amount {
    let mut rng = Rng::with_seed(SEED);
    for number in 0..files {
        let path = root.join(file_name(number));
        if number % FILES_IN_A_DIRECTORY == 0 {
            fs::create_dir(path.parent().unwrap()).unwrap();
        }
        fs::write(path, text(&mut rng, bytes)).unwrap();
    }
    Amount { files, bytes: files * bytes }
}

/// Gives `changes` of the small texts, spread over the tree, new content, and returns which. Each round changes others.
pub fn change(root: &Path, files: u64, changes: u64, round: u64) -> Vec<String> {
    let mut rng = Rng::with_seed(SEED + round);
    let mut number = |index| index * files / changes + rng.u64(..files / changes);
    let changed: Vec<String> = (0..changes).map(|index| file_name(number(index))).collect();
    for file in &changed {
        fs::write(root.join(file), text(&mut rng, SMALL_BYTES)).unwrap();
    }
    changed
}

/// Any file of a tree, by its path there.
pub fn a_file(root: &Path) -> PathBuf {
    let mut path = root.to_owned();
    while path.is_dir() {
        path = fs::read_dir(&path).unwrap().next().unwrap().unwrap().path();
    }
    path.strip_prefix(root).unwrap().to_owned()
}

fn file_name(number: u64) -> String {
    format!("{:04}/{number:07}.narinfo", number / FILES_IN_A_DIRECTORY)
}

fn text(rng: &mut Rng, bytes: u64) -> String {
    let bytes = usize::try_from(bytes).unwrap();
    let mut text = format!("StorePath: /gnu/store/{}-package\nReferences:", word(rng, 32));
    while text.len() < bytes / 2 {
        let _ = write!(text, " {}-dependency", word(rng, 32));
    }
    let signature = bytes - text.len();
    let _ = write!(text, "\nSignature: 1;{}", word(rng, signature));
    text.truncate(bytes);
    text
}

fn word(rng: &mut Rng, length: usize) -> String {
    (0..length).map(|_| char::from(b"0123456789abcdfghijklmnpqrsvwxyz"[rng.usize(..32)])).collect()
}

/// What there is below `root`.
pub fn measure(root: &Path) -> Amount {
    let mut amount = Amount::default();
    for entry in fs::read_dir(root).unwrap().map(Result::unwrap) {
        let meta = entry.metadata().unwrap();
        let of_entry = if meta.is_dir() { measure(&entry.path()) } else { Amount { files: 1, bytes: meta.len() } };
        amount.files += of_entry.files;
        amount.bytes += of_entry.bytes;
    }
    amount
}
