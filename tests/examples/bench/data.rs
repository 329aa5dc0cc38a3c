//! The data sets. The same seed gives the same bytes.

use std::{
    f64::consts::TAU,
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::Path,
};

use fastrand::Rng;

const SEED: u64 = 1;

/// Small enough that the benchmark itself holds little memory: see [`crate::child::Cost::peak`].
const BLOCK: usize = 64 << 10;

/// Files of one directory among the small ones.
const FILES_IN_A_DIRECTORY: u64 = 1000;

/// Bytes of each small file: those of a narinfo.
pub const SMALL_FILE: usize = 1500;

/// How much there is of something.
#[derive(Debug, Clone, Copy, Default)]
pub struct Amount {
    /// Regular files.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
}

/// What the cache of a build farm looks like: of each item two compressed archives of random size (log-normal, half of them below
/// 100 KB, few beyond 10 MB) that no compressor shrinks any more, and a short text that describes them.
pub fn nar_like(root: &Path, bytes: u64) -> Amount {
    let mut rng = Rng::with_seed(SEED);
    for compression in COMPRESSIONS {
        fs::create_dir_all(root.join("nar").join(compression.0)).unwrap();
    }
    let mut made = Amount::default();
    while made.bytes < bytes {
        let name = format!("{}-pkg-{}", word(&mut rng, 32), made.files / 3);
        let size = log_normal(&mut rng, 11.5, 1.8).min(200e6);
        let mut text = format!("StorePath: /gnu/store/{name}\n");
        for (compression, factor) in COMPRESSIONS {
            let size = (size * factor) as u64;
            let url = format!("nar/{compression}/{name}");
            let _ = write!(text, "URL: {url}\nCompression: {compression}\nFileSize: {size}\n");
            random_file(&root.join(url), size, &mut rng);
            made.files += 1;
            made.bytes += size;
        }
        describe(&mut text, size as u64 * 3, &mut rng);
        fs::write(root.join(format!("{}.narinfo", &name[..32])), &text).unwrap();
        made.files += 1;
        made.bytes += text.len() as u64;
    }
    made
}

/// Compressions of an archive, and how large it is in each.
const COMPRESSIONS: [(&str, f64); 2] = [("zstd", 1.0), ("lzip", 0.85)];

/// Small files of [`SMALL_FILE`] bytes each, a thousand to a directory.
pub fn small_files(root: &Path, files: u64) -> Amount {
    let mut rng = Rng::with_seed(SEED);
    for number in 0..files {
        let path = small_file(number);
        if number % FILES_IN_A_DIRECTORY == 0 {
            fs::create_dir(root.join(Path::new(&path).parent().unwrap())).unwrap();
        }
        fs::write(root.join(path), small_text(&mut rng)).unwrap();
    }
    Amount { files, bytes: files * SMALL_FILE as u64 }
}

/// Gives `changes` of the small files, spread over the tree, new content.
pub fn change(root: &Path, files: u64, changes: u64, round: u64) {
    let mut rng = Rng::with_seed(SEED + 1 + round);
    for index in 0..changes {
        let number = index * files / changes + rng.u64(..files / changes);
        fs::write(root.join(small_file(number)), small_text(&mut rng)).unwrap();
    }
}

fn small_file(number: u64) -> String {
    format!("{:04}/{number:07}.narinfo", number / FILES_IN_A_DIRECTORY)
}

fn small_text(rng: &mut Rng) -> String {
    let mut text = format!("StorePath: /gnu/store/{}-pkg\n", word(rng, 32));
    describe(&mut text, rng.u64(..1 << 30), rng);
    while text.len() < SMALL_FILE {
        let _ = write!(text, "{} ", word(rng, 32));
    }
    text.truncate(SMALL_FILE);
    text
}

/// The rest of a narinfo: some of it repeats, some does not.
fn describe(text: &mut String, nar_size: u64, rng: &mut Rng) {
    let _ = write!(text, "NarHash: sha256:{}\nNarSize: {nar_size}\nReferences:", word(rng, 52));
    for _ in 0..rng.u32(3..20) {
        let _ = write!(text, " {}-dep", word(rng, 32));
    }
    let _ = writeln!(text, "\nSignature: 1;{}", word(rng, 700));
}

fn random_file(path: &Path, size: u64, rng: &mut Rng) {
    let mut file = File::create(path).unwrap();
    let mut block = [0; BLOCK];
    let mut left = size;
    while left > 0 {
        let part = &mut block[..left.min(BLOCK as u64) as usize];
        rng.fill(part);
        file.write_all(part).unwrap();
        left -= part.len() as u64;
    }
}

fn word(rng: &mut Rng, length: usize) -> String {
    (0..length).map(|_| char::from(b"0123456789abcdfghijklmnpqrsvwxyz"[rng.usize(..32)])).collect()
}

/// Box and Muller.
fn log_normal(rng: &mut Rng, mu: f64, sigma: f64) -> f64 {
    let normal = (-2.0 * (1.0 - rng.f64()).ln()).sqrt() * (TAU * rng.f64()).cos();
    (mu + sigma * normal).exp()
}
