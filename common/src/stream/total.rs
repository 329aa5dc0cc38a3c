//! How much a stream is: exactly, from its metadata alone.
//!
//! A send with NO_FILE_DATA writes UPDATE_EXTENT where a send with data writes WRITEs, each of as much data as its buffer holds;
//! all other commands are the same. So the size of the stream with data follows to the byte.

use super::{
    MAX_SMALL_BYTES, SECTOR_BYTES, Total,
    command::Command,
    error::StreamError,
    format::{Attr, COMMAND_HEADER_BYTES, Kind, MAX_WRITE_BYTES_V1, STREAM_HEADER_BYTES},
};

/// Data of a whole WRITE in version 2, where a page has no more than 16 KiB; with larger pages the total is a few headers too high.
const WRITE_BYTES_V2: u64 = 128 * 1024;

/// Counts a stream: one without file data as what the stream with data will be, one with data as it is.
#[derive(Debug, Clone, Default)]
pub struct TotalCounter {
    bytes: u64,
    data_bytes: u64,
    small_bytes: u64,
    extent_bytes: u64,
    touched: Touched,
    files: FileCounter,
}

impl TotalCounter {
    /// Of no command yet.
    pub fn new() -> Self {
        Self { bytes: STREAM_HEADER_BYTES as u64, ..Self::default() }
    }

    /// Takes in the next command.
    ///
    /// # Errors
    /// If the command is about data and its range cannot be told.
    pub fn update(&mut self, command: &Command<'_>) -> Result<(), StreamError> {
        self.files.update(command)?;
        self.touched.update(command.kind());
        let range = command.data_range()?;
        let length = range.map_or(0, |range| range.end - range.start);
        if let (Kind::UpdateExtent | Kind::Write | Kind::EncodedWrite, Some(range)) = (command.kind(), &range) {
            // Extents of larger files begin and end with sectors, but for the end of the file.
            if range.start == 0 && length <= MAX_SMALL_BYTES {
                self.small_bytes = self.small_bytes.saturating_add(length);
            } else {
                let sectors = range.end.div_ceil(SECTOR_BYTES) - range.start / SECTOR_BYTES;
                self.extent_bytes = self.extent_bytes.saturating_add(sectors.saturating_mul(SECTOR_BYTES));
            }
        }
        match (command.kind(), range) {
            (Kind::UpdateExtent, Some(range)) => {
                self.bytes = self.bytes.saturating_add(written_bytes(range.path.len(), length, command.version()));
                self.data_bytes = self.data_bytes.saturating_add(length);
                return Ok(());
            }
            (Kind::Write | Kind::EncodedWrite, _) => self.data_bytes = self.data_bytes.saturating_add(length),
            _ => {}
        }
        self.bytes = self.bytes.saturating_add(command.bytes().len() as u64);
        Ok(())
    }

    /// The total of all commands so far.
    pub fn finish(&self) -> Total {
        Total {
            bytes: self.bytes,
            data_bytes: self.data_bytes,
            files: self.files.files(),
            small_bytes: self.small_bytes,
            extent_bytes: self.extent_bytes,
            touched: self.touched.places(),
        }
    }
}

/// Commands that change what a base has, by what they change.
///
/// What is new in a tree stands together, in the order of inode numbers. What was there before is scattered: an inode, and the
/// two entries of its name, one by its hash and one by its number.
#[derive(Debug, Clone, Default)]
struct Touched {
    made: u64,
    renamed: u64,
    linked: u64,
    removed: u64,
    /// Every inode that changes gets new times in the end; new ones too.
    changed: u64,
}

impl Touched {
    fn update(&mut self, kind: Kind) {
        match kind {
            Kind::Mkfile | Kind::Mkdir | Kind::Mknod | Kind::Mkfifo | Kind::Mksock | Kind::Symlink => self.made += 1,
            Kind::Rename => self.renamed += 1,
            Kind::Link => self.linked += 1,
            Kind::Unlink | Kind::Rmdir => self.removed += 1,
            Kind::Utimes => self.changed += 1,
            _ => {}
        }
    }

    fn places(&self) -> u64 {
        // A new inode is renamed once, from the kernel's name to its own: of that only the entry by hash is among older ones.
        let renamed = self.renamed.saturating_sub(self.made);
        let changed = self.changed.saturating_sub(self.made);
        self.made + 5 * renamed + 2 * self.linked + 3 * self.removed + changed
    }
}

/// Bytes of the WRITEs that carry `length` bytes of data of the file at a path of `path` bytes.
fn written_bytes(path: usize, length: u64, version: u32) -> u64 {
    // Type and length of PATH, its value; FILE_OFFSET whole; type of DATA and, in version 1, its length.
    let frame = (COMMAND_HEADER_BYTES + 4 + path + 12) as u64;
    let (chunk, data_frame) = if version < 2 { (MAX_WRITE_BYTES_V1 as u64, 4) } else { (WRITE_BYTES_V2, 2) };
    let writes = length.div_ceil(chunk);
    length.saturating_add(writes.saturating_mul(frame + data_frame))
}

/// Counts the regular files that a stream creates or fills, and knows at which one it is.
///
/// A file that only became shorter is not counted: its TRUNCATE is the same as that of a file of which only the times changed.
#[derive(Debug, Clone, Default)]
pub struct FileCounter {
    files: u64,
    current: Vec<u8>,
}

impl FileCounter {
    /// Of no command yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes in the next command.
    ///
    /// # Errors
    /// If the command is about data or a file's name and lacks an attribute.
    #[inline]
    pub fn update(&mut self, command: &Command<'_>) -> Result<(), StreamError> {
        match command.kind() {
            Kind::Mkfile => self.enter(command.path()?),
            // A new file has a name of the kernel's until it is renamed to its own.
            Kind::Rename if command.path()? == self.current => {
                self.current.clear();
                self.current.extend_from_slice(command.attr(Attr::PathTo)?);
            }
            // The kernel is done with one inode before it comes to the next.
            Kind::Write | Kind::Clone | Kind::EncodedWrite | Kind::UpdateExtent | Kind::Fallocate => {
                let path = command.path()?;
                if path != self.current {
                    self.enter(path);
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Files so far, with the one that it is at.
    pub fn files(&self) -> u64 {
        self.files
    }

    /// The file that it is at, relative to the subvolume; empty before the first.
    pub fn current_path(&self) -> &[u8] {
        &self.current
    }

    fn enter(&mut self, path: &[u8]) {
        self.files += 1;
        self.current.clear();
        self.current.extend_from_slice(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{samples::Sample, walk::Item};

    fn total(sample: &Sample) -> (Total, Vec<u8>) {
        let mut counter = TotalCounter::new();
        let walked = sample.walk::<StreamError>(1 << 20, |item| match item {
            Item::Command { command, .. } => counter.update(&command),
            Item::Version(_) => Ok(()),
        });
        assert_eq!(walked, Ok(()));
        (counter.finish(), counter.files.current_path().to_vec())
    }

    #[test]
    fn a_stream_without_data_tells_the_size_of_the_one_with_data() {
        for (version, chunk) in [(1, MAX_WRITE_BYTES_V1), (2, 128 * 1024)] {
            for length in [1, 4096, chunk - 1, chunk, chunk + 1, 3 * chunk, 3 * chunk + 7] {
                let mut with = Sample::begun(version, None);
                with.make(Kind::Mkfile, b"o1").rename(b"o1", b"some/path");
                let mut without = with.clone();
                let data = vec![1; length];
                for (n, data) in data.chunks(chunk).enumerate() {
                    with.write(b"some/path", 100 + (n * chunk) as u64, data);
                }
                without.update_extent(b"some/path", 100, length as u64);
                with.utimes(b"").end();
                without.utimes(b"").end();
                let expected = Total {
                    bytes: with.bytes.len() as u64,
                    data_bytes: length as u64,
                    files: 1,
                    small_bytes: 0,
                    extent_bytes: (100 + length as u64).next_multiple_of(4096),
                    touched: 1,
                };
                assert_eq!(total(&without).0, expected, "version {version}, {length} bytes");
                // Its WRITEs do not begin with sectors here, as the kernel's do.
                let expected = Total { extent_bytes: total(&with).0.extent_bytes, ..expected };
                assert_eq!(total(&with).0, expected, "version {version}, {length} bytes");
            }
        }
    }

    #[test]
    fn what_is_small_and_what_is_changed_is_told() {
        let figures = |sample: &Sample| {
            let total = total(sample.clone().end()).0;
            (total.small_bytes, total.extent_bytes, total.touched)
        };
        let mut sample = Sample::begun(2, None);
        sample.make(Kind::Mkfile, b"o1").rename(b"o1", b"new").write(b"new", 0, &[1; 2048]).utimes(b"new");
        assert_eq!(figures(&sample), (2048, 0, 1));
        sample.write(b"old", 0, &[1; 2049]).utimes(b"old").write(b"older", 1, b"x").utimes(b"older").utimes(b"");
        assert_eq!(figures(&sample), (2048, 8192, 4));
        sample.rename(b"a", b"b");
        assert_eq!(figures(&sample), (2048, 8192, 9));
    }

    #[test]
    fn files_are_counted_once_by_any_name() {
        let mut sample = Sample::begun(2, None);
        sample.make(Kind::Mkfile, b"o1").rename(b"o1", b"new").write(b"new", 0, b"x").write(b"new", 9, b"x");
        sample.make(Kind::Mkfile, b"o2").rename(b"o2", b"empty").make(Kind::Mkdir, b"dir").utimes(b"new");
        sample.write(b"changed", 0, b"x").write(b"changed", 1, b"x").truncate(b"touched", 5).utimes(b"");
        assert_eq!(total(sample.end()).0.files, 3);
        assert_eq!(total(&sample).1, b"changed");
    }

    #[test]
    fn a_total_beyond_all_numbers_is_the_highest_number() {
        let mut sample = Sample::begun(2, None);
        for _ in 0..3 {
            sample.update_extent(b"a", 0, i64::MAX as u64);
        }
        assert_eq!(total(sample.end()).0.bytes, u64::MAX);
    }
}
