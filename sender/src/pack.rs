//! From the kernel's stream to data frames: read big blocks, walk every command, digest, compress what shrinks.
//!
//! To go on from a checkpoint the beginning of the stream is walked and thrown away: at the mark its canonical digest must be the
//! one that the receiver has, for then what follows fits behind it, whatever the bytes before it were this time.
//!
//! Runs in a thread that may block. A block is as long as the pipe fills it, without regard to commands; it is checked before it
//! leaves, so that a defect of this machine never travels.

use std::{
    os::fd::AsFd,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use common::{
    stream::{Canonical, DigestScope, FileCounter, Item, Mark, StreamDigest, StreamError, Walker},
    wire::{
        codec::{DATA_PREFIX_BYTES, Encoding, write_data_prefix},
        limits::MAX_BLOCK_BYTES,
        message::End,
    },
};
use tokio::sync::mpsc;

use crate::compress::Shrinker;

/// A piece of the stream, ready for the wire.
#[derive(Debug, Clone)]
pub struct Block {
    /// The whole data frame.
    pub frame: Bytes,
    /// Where in the stream its first byte belongs.
    pub offset: u64,
    /// Stream bytes in it.
    pub length: usize,
}

/// How to pack.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What the stream digest covers.
    pub digest: DigestScope,
    /// Whether to try compression.
    pub compress: bool,
    /// The mark behind which blocks are wanted; None from the beginning.
    pub skip_to: Option<Mark>,
}

/// How far packing has come, for whoever reports it.
#[derive(Debug, Default)]
pub struct Meter {
    /// Bytes of the stream that were read.
    pub read: AtomicU64,
    /// Bytes of them that were thrown away on the way to a mark.
    pub skipped: AtomicU64,
    /// Bytes that they became on the wire.
    pub packed: AtomicU64,
    /// Files seen so far.
    pub files: AtomicU64,
    path: Mutex<Vec<u8>>,
}

impl Meter {
    /// The file that the stream was at when the last block was read.
    pub fn path(&self) -> String {
        let path = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&path).into_owned()
    }

    fn set_path(&self, path: &[u8]) {
        let mut ours = self.path.lock().unwrap_or_else(PoisonError::into_inner);
        ours.clear();
        ours.extend_from_slice(path);
    }
}

/// Why a stream cannot be packed.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The pipe failed.
    #[error("cannot read the send stream")]
    Read(#[source] std::io::Error),
    /// zstd failed.
    #[error("cannot compress")]
    Compress(#[source] std::io::Error),
    /// The kernel's stream is not one. If the send failed, its error is the cause and this only the effect. And a send that is interrupted
    /// by what no thread can block, a SIGSTOP or the freezer, begins again from its start in the middle of the stream.
    #[error("the send stream of this machine's kernel is broken (was this process stopped meanwhile?)")]
    Stream(#[from] StreamError),
    /// The checkpoint is of another stream.
    #[error("the stream is not the one that the receiver has a checkpoint of: {0}")]
    OtherStream(&'static str),
    /// Nobody wants the blocks any more.
    #[error("the transfer was given up")]
    Gone,
}

/// Packs the stream that comes out of `pipe` until it ends, and says what it was.
///
/// # Errors
/// See [`PackError`]. Nothing of a block that fails a check goes out.
pub fn pack(pipe: impl AsFd, options: Options, meter: &Meter, out: &mpsc::Sender<Block>) -> Result<End, PackError> {
    let mut packer = Packer::new(options).map_err(PackError::Compress)?;
    loop {
        let mut frame = vec![0; DATA_PREFIX_BYTES];
        frame.reserve_exact(MAX_BLOCK_BYTES);
        fill(&pipe, &mut frame).map_err(PackError::Read)?;
        if frame.len() == DATA_PREFIX_BYTES {
            return packer.finish();
        }
        let offset = meter.read.load(Ordering::Relaxed);
        let end = offset + (frame.len() - DATA_PREFIX_BYTES) as u64;
        let wanted = packer.check(&frame[DATA_PREFIX_BYTES..])?.map(|from| from.max(offset));
        meter.read.store(end, Ordering::Relaxed);
        meter.skipped.fetch_add(wanted.unwrap_or(end) - offset, Ordering::Relaxed);
        meter.files.store(packer.files.files(), Ordering::Relaxed);
        meter.set_path(packer.files.current_path());
        if let Some(from) = wanted.filter(|from| *from < end) {
            frame.drain(DATA_PREFIX_BYTES..DATA_PREFIX_BYTES + (from - offset) as usize);
            let block = packer.encode(frame, from)?;
            meter.packed.fetch_add(block.frame.len() as u64, Ordering::Relaxed);
            out.blocking_send(block).map_err(|_| PackError::Gone)?;
        } else if out.is_closed() {
            return Err(PackError::Gone);
        }
    }
}

/// Reads until `buffer` has no room left or the pipe ends.
fn fill(pipe: &impl AsFd, buffer: &mut Vec<u8>) -> std::io::Result<()> {
    while buffer.len() < buffer.capacity() {
        match rustix::io::read(pipe, rustix::buffer::spare_capacity(buffer)) {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

struct Packer {
    skip_to: Option<Mark>,
    wanted_from: Option<u64>,
    walker: Walker,
    digest: StreamDigest,
    canonical: Canonical,
    files: FileCounter,
    shrinker: Option<Shrinker>,
}

impl Packer {
    fn new(options: Options) -> std::io::Result<Self> {
        Ok(Self {
            skip_to: options.skip_to,
            wanted_from: options.skip_to.is_none().then_some(0),
            walker: Walker::new(),
            digest: StreamDigest::new(options.digest),
            canonical: Canonical::new(),
            files: FileCounter::new(),
            shrinker: options.compress.then(Shrinker::new).transpose()?,
        })
    }

    /// Checks and counts a block. Answers with the offset in the stream from which on blocks are wanted, once that is known.
    fn check(&mut self, block: &[u8]) -> Result<Option<u64>, PackError> {
        let Self { skip_to, wanted_from, walker, digest, canonical, files, .. } = self;
        walker.walk(block, |item| {
            let Item::Command { command, end } = item else { return Ok(()) };
            let at_mark = canonical.update(&command)?;
            files.update(&command)?;
            if wanted_from.is_some() {
                digest.update(&command);
            } else if let Some(mark) = skip_to.filter(|mark| at_mark && canonical.count() == mark.count) {
                if canonical.mark() != mark {
                    return Err(PackError::OtherStream("its canonical digest differs at the mark"));
                }
                *wanted_from = Some(end);
            }
            Ok(())
        })?;
        Ok(*wanted_from)
    }

    fn encode(&mut self, mut plain: Vec<u8>, offset: u64) -> Result<Block, PackError> {
        let length = plain.len() - DATA_PREFIX_BYTES;
        if let Some(shrinker) = &mut self.shrinker {
            let mut shrunk = vec![0; DATA_PREFIX_BYTES];
            if shrinker.shrink(&plain[DATA_PREFIX_BYTES..], &mut shrunk).map_err(PackError::Compress)? {
                write_data_prefix(&mut shrunk, offset, length, Encoding::Zstd);
                return Ok(Block { frame: shrunk.into(), offset, length });
            }
        }
        write_data_prefix(&mut plain, offset, length, Encoding::Plain);
        Ok(Block { frame: plain.into(), offset, length })
    }

    fn finish(self) -> Result<End, PackError> {
        self.walker.finish()?;
        if self.wanted_from.is_none() {
            return Err(PackError::OtherStream("it ends before the mark"));
        }
        let bytes = self.walker.position();
        let canonical: Mark = self.canonical.finish();
        Ok(End { bytes, stream_digest: self.digest.finish(), canonical })
    }
}
