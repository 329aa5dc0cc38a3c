//! BTRFS_IOC_SEND, and what the kernel can send.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
};

use super::{BtrfsError, raw};

/// Flags of `struct btrfs_ioctl_send_args`.
const NO_FILE_DATA: u64 = 1;
const VERSION: u64 = 8;

/// The newest version of the send stream that we know.
const NEWEST_VERSION: u32 = 2;

/// What a stream carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sending {
    /// Everything.
    All,
    /// The same commands with UPDATE_EXTENT in place of file data: how much it would be, without reading it.
    NoFileData,
}

/// What to send.
#[derive(Debug, Clone, Copy)]
pub struct SendOptions {
    /// The tree id of the base; None for a full send.
    pub base: Option<u64>,
    /// Version of the stream: 1, or 2 if [`stream_version`] says so.
    pub version: u32,
    /// What the stream carries.
    pub sending: Sending,
}

/// Writes the stream of a read-only subvolume into `output`. Blocks until it is written or the reader is gone (EPIPE).
///
/// Call it on a thread for which [`crate::thread::block_signals`] holds: a signal makes the kernel give up in the middle, and one
/// whose handler restarts calls (SA_RESTART) makes it *begin again*, behind the part that is written already.
///
/// The base is given as the parent and as a clone source: without the latter the kernel would not clone from it.
/// While it runs neither subvolume can be deleted. Errors: EPERM if one of them is writable, EPROTO for a version that the kernel
/// does not know, EPIPE, EIO and what else reading may give.
pub fn send(subvolume: BorrowedFd<'_>, output: impl AsFd, options: SendOptions) -> io::Result<()> {
    let mut flags = match options.sending {
        Sending::All => 0,
        Sending::NoFileData => NO_FILE_DATA,
    };
    if options.version > 1 {
        // Kernels before 6.0 know neither the flag nor any version but the first.
        flags |= VERSION;
    }
    raw::send(subvolume, output.as_fd(), options.base.unwrap_or(0), options.base.as_slice(), flags, options.version)
}

/// The newest version of the stream that both this kernel and we know: 1 or 2.
pub fn stream_version() -> Result<u32, BtrfsError> {
    let features = Path::new("/sys/fs/btrfs/features");
    let no_feature = |path: &Path, source| BtrfsError::NoFeature { path: path.to_owned(), source };
    std::fs::metadata(features).map_err(|source| no_feature(features, source))?;
    let path = features.join("send_stream_version");
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(text.trim().parse().unwrap_or(1).clamp(1, NEWEST_VERSION)),
        // The file came with version 2, in Linux 6.0.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(1),
        Err(error) => Err(no_feature(&path, error)),
    }
}
