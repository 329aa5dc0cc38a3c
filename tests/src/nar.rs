//! The cache of a build farm, as `guix publish --cache` keeps it: for each package a `.nar` (compressed, so it does not compress
//! again) with a `.narinfo` beside it, once for each compression, and `hashes/<hash>` naming the item.
//!
//! The sizes are spread as those of real packages are: mostly some hundred kB, now and then hundreds of MB.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use fastrand::Rng;

/// The compressions that are kept, and how long a nar is in each, in percent of the first.
const COMPRESSIONS: [(&str, u64); 2] = [("zstd", 100), ("lzip", 85)];

/// The alphabet of hashes in store paths: no e, o, t, u.
const BASE32: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// The natural logarithm of the median size of a nar in bytes (100 kB), and the deviation of that logarithm.
const SIZE_LOG_MEAN: f64 = 11.5;
const SIZE_LOG_DEVIATION: f64 = 1.8;
/// The largest nar in bytes.
const LARGEST: u64 = 200 << 20;

/// How much of a nar is made and written at a time.
const BLOCK_BYTES: usize = 1 << 18;

/// What [`grow`] added.
#[derive(Debug, Clone, Copy, Default)]
pub struct Grown {
    /// Packages.
    pub items: u64,
    /// Bytes of their nars.
    pub bytes: u64,
}

/// Adds packages until their nars have at least `bytes`. The same seed adds the same packages; give each call its own.
pub fn grow(cache: &Path, bytes: u64, seed: u64) -> io::Result<Grown> {
    let mut rng = Rng::with_seed(seed);
    for (compression, _) in COMPRESSIONS {
        fs::create_dir_all(cache.join(compression))?;
    }
    fs::create_dir_all(cache.join("hashes"))?;
    let mut grown = Grown::default();
    while grown.bytes < bytes {
        // The last ones must not overshoot by hundreds of megabytes.
        let size = log_normal(&mut rng).min(LARGEST).min((bytes - grown.bytes).max(1000));
        grown.bytes += add_item(cache, &mut rng, size)?;
        grown.items += 1;
    }
    Ok(grown)
}

/// Removes `percent` of the packages, as a farm does with those that nobody asked for in a while. Returns how many.
pub fn collect(cache: &Path, percent: u8, seed: u64) -> io::Result<u64> {
    let mut rng = Rng::with_seed(seed);
    let mut hashes: Vec<_> = fs::read_dir(cache.join("hashes"))?.collect::<Result<_, _>>()?;
    hashes.sort_by_key(fs::DirEntry::file_name);
    let mut removed = 0;
    for hash in hashes.iter().filter(|_| rng.u8(..100) < percent) {
        let item = fs::read_to_string(hash.path())?;
        let stem = item.trim().trim_start_matches("/gnu/store/");
        for (compression, _) in COMPRESSIONS {
            for suffix in ["nar", "narinfo"] {
                fs::remove_file(cache.join(compression).join(format!("{stem}.{suffix}")))?;
            }
        }
        fs::remove_file(hash.path())?;
        removed += 1;
    }
    Ok(removed)
}

/// The nars and narinfos of a tree that do not belong together: a narinfo whose nar is missing or has another size than the
/// narinfo says. A mirror that serves such a thing is broken; a copy of one snapshot never has any.
#[must_use]
pub fn broken(cache: &Path) -> Vec<PathBuf> {
    let mut bad = Vec::new();
    for (compression, _) in COMPRESSIONS {
        let Ok(entries) = fs::read_dir(cache.join(compression)) else { continue };
        let paths = entries.map(|entry| entry.unwrap().path());
        for narinfo in paths.filter(|path| path.extension().is_some_and(|suffix| suffix == "narinfo")) {
            let text = fs::read_to_string(&narinfo).unwrap();
            let said = text.lines().find_map(|line| line.strip_prefix("FileSize: ")?.parse::<u64>().ok());
            let there = fs::metadata(narinfo.with_extension("nar")).ok().map(|meta| meta.len());
            if said.is_none() || said != there {
                bad.push(narinfo);
            }
        }
    }
    bad
}

fn add_item(cache: &Path, rng: &mut Rng, size: u64) -> io::Result<u64> {
    let (hash, version) = (hash(rng), rng.u32(1..200));
    let stem = format!("{hash}-package-{}.{}", version / 10, version % 10);
    let references: Vec<_> = (0..rng.usize(3..20)).map(|i| format!("{}-dependency-{i}.0", self::hash(rng))).collect();
    let mut bytes = 0;
    for (compression, percent) in COMPRESSIONS {
        let file_size = size * percent / 100;
        write_nar(&cache.join(compression).join(format!("{stem}.nar")), rng, file_size)?;
        let mut text = format!("StorePath: /gnu/store/{stem}\nURL: nar/{compression}/{stem}\n");
        let _ = writeln!(text, "Compression: {compression}\nFileSize: {file_size}\nNarHash: sha256:{hash}");
        let _ = writeln!(text, "NarSize: {}\nReferences: {}", 3 * size, references.join(" "));
        let signature: String = (0..800).map(|_| char::from(BASE32[rng.usize(..32)])).collect();
        let _ = writeln!(text, "Signature: 1;farm.example.org;{signature}");
        fs::write(cache.join(compression).join(format!("{stem}.narinfo")), text)?;
        bytes += file_size;
    }
    fs::write(cache.join("hashes").join(&hash), format!("/gnu/store/{stem}\n"))?;
    Ok(bytes)
}

fn write_nar(path: &Path, rng: &mut Rng, size: u64) -> io::Result<()> {
    let (mut file, mut block, mut left) = (File::create(path)?, vec![0; BLOCK_BYTES], size);
    while left > 0 {
        let n = block.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        rng.fill(&mut block[..n]);
        file.write_all(&block[..n])?;
        left -= n as u64;
    }
    Ok(())
}

fn hash(rng: &mut Rng) -> String {
    (0..32).map(|_| char::from(BASE32[rng.usize(..32)])).collect()
}

/// A size in bytes whose logarithm is normally distributed (Box and Muller).
fn log_normal(rng: &mut Rng) -> u64 {
    let (radius, angle) = ((1.0 - rng.f64()).ln(), rng.f64() * std::f64::consts::TAU);
    let normal = (-2.0 * radius).sqrt() * angle.cos();
    // Saturates; there are no negative ones.
    (SIZE_LOG_MEAN + SIZE_LOG_DEVIATION * normal).exp() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        lab::Lab,
        manifest::{Manifest, View},
    };

    #[test]
    fn a_cache_grows_and_shrinks_and_always_fits_together() {
        let lab = Lab::new();
        let cache = lab.directory("cache");
        let grown = grow(&cache, 20_000_000, 1).unwrap();
        assert!((20_000_000..23_000_000).contains(&grown.bytes) && grown.items > 10, "{grown:?}");
        assert_eq!(broken(&cache), Vec::<PathBuf>::new());
        let removed = collect(&cache, 30, 2).unwrap();
        assert!(removed > 0 && removed < grown.items, "{removed} of {}", grown.items);
        assert_eq!(broken(&cache), Vec::<PathBuf>::new());
        let nar = fs::read_dir(cache.join("lzip")).unwrap().map(|entry| entry.unwrap().path());
        let nar = nar.into_iter().find(|path| path.extension().unwrap() == "nar").unwrap();
        fs::write(&nar, "half of it").unwrap();
        assert_eq!(broken(&cache), vec![nar.with_extension("narinfo")]);
    }

    #[test]
    fn the_same_seed_makes_the_same_cache() {
        let lab = Lab::new();
        let caches = [("one", 3), ("two", 3), ("three", 4)].map(|(name, seed)| {
            let cache = lab.directory(name);
            grow(&cache, 3_000_000, seed).unwrap();
            Manifest::of(&cache, View::Client)
        });
        let differences = |other: usize| {
            let lines = caches[0].differences(&caches[other]);
            lines.into_iter().filter(|line| !line.contains(": mtime is")).count()
        };
        assert_eq!(differences(1), 0);
        assert!(differences(2) > 20);
    }
}
