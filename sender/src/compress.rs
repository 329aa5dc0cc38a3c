//! Compression of a block where it pays: nars are compressed already, narinfos and the stream's own commands are not.

use std::io;

use zstd::bulk::Compressor;

/// The fastest ordinary level: the head node has better things to do.
const LEVEL: i32 = 1;

/// A block is compressed as a whole only if one of its samples shrinks: a sample costs a fraction of what the block would.
const SAMPLE_BYTES: usize = 4 << 10;
const SAMPLES: usize = 4;

/// Less than an eighth saved is not worth the receiver's work.
const fn pays(before: usize, after: usize) -> bool {
    after <= before - before / 8
}

/// Compresses blocks where it pays.
pub struct Shrinker {
    compressor: Compressor<'static>,
    sample: Vec<u8>,
}

impl Shrinker {
    /// # Errors
    /// No memory for the compressor.
    pub fn new() -> io::Result<Self> {
        let compressor = Compressor::new(LEVEL)?;
        Ok(Self { compressor, sample: vec![0; zstd::zstd_safe::compress_bound(SAMPLE_BYTES)] })
    }

    /// Appends `block` to `out` as one zstd frame and answers true, or leaves `out` as it is and answers false.
    ///
    /// # Errors
    /// From zstd; the block can then still be sent plain.
    pub fn shrink(&mut self, block: &[u8], out: &mut Vec<u8>) -> io::Result<bool> {
        if !self.looks_compressible(block)? {
            return Ok(false);
        }
        let before = out.len();
        out.resize(before + zstd::zstd_safe::compress_bound(block.len()), 0);
        let length = self.compressor.compress_to_buffer(block, &mut out[before..])?;
        let shrunk = pays(block.len(), length);
        out.truncate(before + if shrunk { length } else { 0 });
        Ok(shrunk)
    }

    fn looks_compressible(&mut self, block: &[u8]) -> io::Result<bool> {
        if block.len() <= SAMPLES * SAMPLE_BYTES {
            return Ok(true);
        }
        for sample in 0..SAMPLES {
            let start = (block.len() - SAMPLE_BYTES) / (SAMPLES - 1) * sample;
            let piece = &block[start..start + SAMPLE_BYTES];
            if pays(SAMPLE_BYTES, self.compressor.compress_to_buffer(piece, &mut self.sample[..])?) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(7);
        (0..length).map(|_| random.u8(..)).collect()
    }

    #[test]
    fn text_shrinks_noise_is_left_alone_and_mixed_blocks_are_found() {
        let mut shrinker = Shrinker::new().unwrap();
        let text = b"StorePath: /gnu/store/abc\n".repeat(10_000);
        let mut out = b"prefix".to_vec();
        assert!(shrinker.shrink(&text, &mut out).unwrap());
        assert!(out.starts_with(b"prefix") && out.len() < text.len() / 10);
        assert_eq!(zstd::bulk::decompress(&out[6..], text.len()).unwrap(), text);

        let mut out = b"prefix".to_vec();
        assert!(!shrinker.shrink(&noise(1 << 18), &mut out).unwrap());
        assert!(!shrinker.shrink(&noise(100), &mut out).unwrap());
        assert_eq!(out, b"prefix", "nothing is left behind by a block that does not shrink");

        let mut mixed = noise(1 << 18);
        mixed[..1 << 17].fill(b'a');
        assert!(shrinker.shrink(&mixed, &mut out).unwrap());
    }
}
