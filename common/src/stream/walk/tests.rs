//! Blocks that end anywhere, and bytes that are no stream.

use proptest::prelude::*;

use super::*;
use crate::stream::{format::MAX_COMMAND_BYTES, samples::Sample};

/// Bytes of a command, and its end.
type Found = (Vec<u8>, u64);

/// What a walk finds, and how it ends.
fn walk(blocks: &[&[u8]]) -> (Vec<Found>, Result<(), StreamError>) {
    let mut walker = Walker::new();
    let mut found = Vec::new();
    for block in blocks {
        let walked = walker.walk::<StreamError>(block, |item| {
            match item {
                Item::Version(_) => found.push((Vec::new(), STREAM_HEADER_BYTES as u64)),
                Item::Command { command, end } => found.push((command.bytes().to_vec(), end)),
            }
            Ok(())
        });
        if walked.is_err() {
            return (found, walked);
        }
        assert!(walker.partial.len() < MAX_COMMAND_BYTES);
    }
    (found, walker.finish())
}

fn sample() -> Sample {
    let mut sample = Sample::begun(2, None);
    sample.make(Kind::Mkfile, b"a").write(b"a", 0, &[3; 70_000]).write(b"a", 70_000, b"x").utimes(b"a").end();
    sample
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn blocks_may_end_anywhere(
        writes in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..40), 0usize..3000), 0..20),
        version in 1u32..=2,
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..60),
    ) {
        let mut sample = Sample::begun(version, None);
        for (path, length) in &writes {
            sample.write(path, 0, &vec![7; *length]).utimes(path);
        }
        sample.end();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(sample.bytes.len())).collect();
        cuts.sort_unstable();
        let mut blocks = Vec::new();
        let mut last = 0;
        for cut in cuts.into_iter().chain([sample.bytes.len()]) {
            blocks.push(&sample.bytes[last..cut]);
            last = cut;
        }
        let (found, result) = walk(&blocks);
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(&found, &walk(&[&sample.bytes]).0);
        prop_assert_eq!(found.len(), 3 + 2 * writes.len());
        prop_assert_eq!(found.last().map(|last| last.1), Some(sample.bytes.len() as u64));
        let joined: Vec<u8> = found.iter().flat_map(|(bytes, _)| bytes.iter().copied()).collect();
        prop_assert_eq!(&joined, &sample.bytes[STREAM_HEADER_BYTES..]);
    }

    #[test]
    fn any_bytes_end_in_an_error_and_not_in_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        header in any::<bool>(),
        block in 1usize..50,
    ) {
        let mut stream = if header { Sample::new(2).bytes } else { Vec::new() };
        stream.extend_from_slice(&bytes);
        prop_assert!(walk(&stream.chunks(block).collect::<Vec<_>>()).1.is_err());
    }
}

#[test]
fn every_damaged_byte_is_noticed() {
    let mut sample = Sample::begun(2, None);
    sample.write(b"a", 0, b"some data").end();
    for place in 0..sample.bytes.len() {
        for bit in 0..8 {
            let mut damaged = sample.bytes.clone();
            damaged[place] ^= 1 << bit;
            assert!(walk(&[&damaged]).1.is_err(), "bit {bit} of byte {place}");
        }
    }
}

#[test]
fn a_stream_that_breaks_off_is_truncated_wherever_it_does() {
    let bytes = sample().bytes;
    for length in (0..200).chain(bytes.len() - 200..bytes.len()) {
        let (found, result) = walk(&[&bytes[..length]]);
        let position = found.last().map_or(0, |last| last.1);
        assert_eq!(result, Err(StreamError::Truncated { position }), "after {length} bytes");
    }
    assert_eq!(walk(&[&bytes]).1, Ok(()));
}

#[test]
fn nothing_follows_the_end() {
    let bytes = sample().bytes;
    let position = bytes.len() as u64;
    assert_eq!(walk(&[&bytes, b"x"]).1, Err(StreamError::AfterEnd { position }));
    assert_eq!(walk(&[&[&bytes[..], b"x"].concat()]).1, Err(StreamError::AfterEnd { position }));
    // As `btrfs send` writes it after a signal.
    assert_eq!(walk(&[&bytes, &bytes]).1, Err(StreamError::AfterEnd { position }));
}

#[test]
fn only_known_versions_are_read() {
    for version in [0, 3, u32::MAX] {
        assert_eq!(walk(&[&Sample::new(version).bytes]).1, Err(StreamError::UnsupportedVersion(version)));
    }
    assert_eq!(walk(&[b"btrfs-strean"]).1, Err(StreamError::BadMagic));
}

#[test]
fn a_length_that_is_too_long_is_refused_before_anything_is_gathered() {
    let mut sample = Sample::new(2);
    sample.bytes.extend_from_slice(&u32::MAX.to_le_bytes());
    let refused = Err(StreamError::CommandTooLong { position: 17, bytes: u64::from(u32::MAX) + 10 });
    assert_eq!(walk(&[&sample.bytes]).1, refused);
    sample.bytes.extend_from_slice(&[0; 6]);
    assert_eq!(walk(&sample.bytes.chunks(1).collect::<Vec<_>>()).1, refused);

    let longest = MAX_COMMAND_BYTES - COMMAND_HEADER_BYTES - 5 - 12 - 2;
    for (length, fits) in [(longest, true), (longest + 1, false)] {
        let mut sample = Sample::new(2);
        sample.write(b"a", 0, &vec![0; length]).end();
        assert_eq!(walk(&sample.bytes.chunks(1000).collect::<Vec<_>>()).1.is_ok(), fits, "{length}");
    }
}

#[test]
fn a_command_inside_a_block_is_not_copied() {
    let sample = sample();
    let block = sample.bytes.as_slice();
    let walked = Walker::new().walk::<StreamError>(block, |item| {
        if let Item::Command { command, .. } = item {
            assert!(block.as_ptr_range().contains(&command.bytes().as_ptr()));
        }
        Ok(())
    });
    assert_eq!(walked, Ok(()));
}
