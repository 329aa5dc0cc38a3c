//! The ioctls of btrfs as the kernel defines them: structures, numbers, and one thin call each. The only unsafe file about btrfs.
//!
//! Source: `include/uapi/linux/btrfs.h` of Linux. Every structure's size is asserted, as the number of an ioctl contains it.

use std::{
    io,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd},
};

use rustix::ioctl::{Getter, NoArg, Opcode, Setter, Updater, ioctl, opcode};

const MAGIC: u8 = 0x94;

const SYNC: Opcode = opcode::none(MAGIC, 8);
const SUBVOL_CREATE: Opcode = opcode::write::<VolArgs>(MAGIC, 14);
const SNAP_DESTROY: Opcode = opcode::write::<VolArgs>(MAGIC, 15);
const TREE_SEARCH: Opcode = opcode::read_write::<SearchArgs>(MAGIC, 17);
const TREE_SEARCH_V2: Opcode = opcode::read_write::<SearchHeadV2>(MAGIC, 17);
const INO_LOOKUP: Opcode = opcode::read_write::<InoLookupArgs>(MAGIC, 18);
const SPACE_INFO: Opcode = opcode::read_write::<SpaceHead>(MAGIC, 20);
const WAIT_SYNC: Opcode = opcode::write::<u64>(MAGIC, 22);
const SNAP_CREATE_V2: Opcode = opcode::write::<VolArgsV2>(MAGIC, 23);
const START_SYNC: Opcode = opcode::read::<u64>(MAGIC, 24);
const SUBVOL_GETFLAGS: Opcode = opcode::read::<u64>(MAGIC, 25);
const SUBVOL_SETFLAGS: Opcode = opcode::write::<u64>(MAGIC, 26);
const DEV_INFO: Opcode = opcode::read_write::<DevInfoArgs>(MAGIC, 30);
const FS_INFO: Opcode = opcode::read::<FsInfoArgs>(MAGIC, 31);
#[cfg(any(test, feature = "testing"))]
const SET_RECEIVED_SUBVOL: Opcode = opcode::read_write::<ReceivedSubvolArgs>(MAGIC, 37);
const SEND: Opcode = opcode::write::<SendArgs>(MAGIC, 38);
const GET_SUBVOL_INFO: Opcode = opcode::read::<SubvolInfoArgs>(MAGIC, 60);

/// Flag of a subvolume in SUBVOL_GETFLAGS, SUBVOL_SETFLAGS and SNAP_CREATE_V2: read-only.
pub(super) const SUBVOL_RDONLY: u64 = 1 << 1;
/// The same in the flags of GET_SUBVOL_INFO, which are those of the root item.
pub(super) const ROOT_SUBVOL_RDONLY: u64 = 1;

/// Longest name in [`VolArgs`], without its NUL.
const VOL_NAME_MAX_BYTES: usize = 4087;
/// Longest name in [`VolArgsV2`], without its NUL.
const SUBVOL_NAME_MAX_BYTES: usize = 4039;

#[repr(C)]
struct VolArgs {
    fd: i64,
    name: [u8; VOL_NAME_MAX_BYTES + 1],
}
const _: () = assert!(size_of::<VolArgs>() == 4096);

#[repr(C)]
struct VolArgsV2 {
    fd: i64,
    transid: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; SUBVOL_NAME_MAX_BYTES + 1],
}
const _: () = assert!(size_of::<VolArgsV2>() == 4096);

/// `struct btrfs_ioctl_search_key`: which items of which tree.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct SearchKey {
    pub(super) tree_id: u64,
    pub(super) min_objectid: u64,
    pub(super) max_objectid: u64,
    pub(super) min_offset: u64,
    pub(super) max_offset: u64,
    pub(super) min_transid: u64,
    pub(super) max_transid: u64,
    pub(super) min_type: u32,
    pub(super) max_type: u32,
    /// In: at most so many items; out: so many there are.
    pub(super) nr_items: u32,
    pub(super) unused: u32,
    pub(super) unused1: [u64; 4],
}
const _: () = assert!(size_of::<SearchKey>() == 104);

/// Bytes for the items that a search finds.
pub(super) const SEARCH_BUFFER_BYTES: usize = 4096 - size_of::<SearchKey>();

/// `struct btrfs_ioctl_search_args`.
#[repr(C)]
pub(super) struct SearchArgs {
    pub(super) key: SearchKey,
    pub(super) items: [u8; SEARCH_BUFFER_BYTES],
}
const _: () = assert!(size_of::<SearchArgs>() == 4096);

/// Bytes for the items that a search of the second kind finds: a thousand or so, instead of some forty, with one descent of the tree.
pub(super) const LONG_SEARCH_BUFFER_BYTES: usize = 1 << 16;

/// `struct btrfs_ioctl_search_args_v2` without its buffer, as the number of the ioctl has it.
#[repr(C)]
struct SearchHeadV2 {
    key: SearchKey,
    buf_size: u64,
}
const _: () = assert!(size_of::<SearchHeadV2>() == 112);

/// `struct btrfs_ioctl_search_args_v2` with a buffer of [`LONG_SEARCH_BUFFER_BYTES`].
#[repr(C)]
pub(super) struct LongSearchArgs {
    pub(super) key: SearchKey,
    buf_size: u64,
    pub(super) items: [u8; LONG_SEARCH_BUFFER_BYTES],
}

impl LongSearchArgs {
    /// On the heap: it is too large for a stack that others need too.
    pub(super) fn new(key: SearchKey) -> Box<Self> {
        Box::new(Self { key, buf_size: LONG_SEARCH_BUFFER_BYTES as u64, items: [0; LONG_SEARCH_BUFFER_BYTES] })
    }
}

/// Kinds of chunks that are asked about at a time: each of data, metadata and system in a few profiles.
const SPACE_SLOTS: usize = 32;

/// `struct btrfs_ioctl_space_args` without its slots, as the number of the ioctl has it.
#[repr(C)]
struct SpaceHead {
    space_slots: u64,
    total_spaces: u64,
}
const _: () = assert!(size_of::<SpaceHead>() == 16);

/// `struct btrfs_ioctl_space_info`: all chunks of one kind and profile.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct SpaceInfo {
    /// Kind and profile, `BLOCK_GROUP_...`.
    pub(super) flags: u64,
    /// Bytes of the chunks, a mirrored one counted once.
    pub(super) total_bytes: u64,
    /// Bytes of them that are taken.
    pub(super) used_bytes: u64,
}

#[repr(C)]
struct SpaceArgs {
    head: SpaceHead,
    slots: [SpaceInfo; SPACE_SLOTS],
}
const _: () = assert!(size_of::<SpaceArgs>() == 16 + 24 * SPACE_SLOTS);

#[repr(C)]
struct InoLookupArgs {
    treeid: u64,
    objectid: u64,
    name: [u8; 4080],
}
const _: () = assert!(size_of::<InoLookupArgs>() == 4096);

/// `struct btrfs_ioctl_dev_info_args`: one device of a file system.
#[repr(C)]
pub(super) struct DevInfoArgs {
    devid: u64,
    uuid: [u8; 16],
    /// Bytes of the device that belong to a chunk.
    pub(super) bytes_used: u64,
    /// Bytes of the device.
    pub(super) total_bytes: u64,
    unused: [u64; 379],
    path: [u8; 1024],
}
const _: () = assert!(size_of::<DevInfoArgs>() == 4096);

/// `struct btrfs_ioctl_fs_info_args`, as far as it is used.
#[repr(C)]
pub(super) struct FsInfoArgs {
    /// The highest device id in use.
    pub(super) max_id: u64,
    pub(super) num_devices: u64,
    pub(super) fsid: [u8; 16],
    /// Bytes of a node of a tree.
    pub(super) nodesize: u32,
    /// Bytes of the smallest piece of data that has a place of its own.
    pub(super) sectorsize: u32,
    clone_alignment: u32,
    csum_type: u16,
    /// Bytes of the checksum of a sector; 0 from kernels that do not tell.
    pub(super) csum_size: u16,
    /// In: what to tell beyond the basics.
    flags: u64,
    rest: [u8; 968],
}
/// Flag of [`FsInfoArgs`]: tell about the checksums.
const FS_INFO_CSUM: u64 = 1;
const _: () = assert!(size_of::<FsInfoArgs>() == 1024);

/// Seconds and nanoseconds, with the padding that C gives them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Timespec {
    pub(super) sec: u64,
    pub(super) nsec: u32,
}

/// `struct btrfs_ioctl_get_subvol_info_args`.
#[repr(C)]
pub(super) struct SubvolInfoArgs {
    pub(super) treeid: u64,
    name: [u8; 256],
    pub(super) parent_id: u64,
    pub(super) dirid: u64,
    pub(super) generation: u64,
    pub(super) flags: u64,
    pub(super) uuid: [u8; 16],
    pub(super) parent_uuid: [u8; 16],
    pub(super) received_uuid: [u8; 16],
    pub(super) ctransid: u64,
    pub(super) otransid: u64,
    pub(super) stransid: u64,
    pub(super) rtransid: u64,
    ctime: Timespec,
    otime: Timespec,
    stime: Timespec,
    rtime: Timespec,
    reserved: [u64; 8],
}
const _: () = assert!(size_of::<SubvolInfoArgs>() == 504);

#[cfg(any(test, feature = "testing"))]
#[repr(C)]
struct ReceivedSubvolArgs {
    uuid: [u8; 16],
    stransid: u64,
    rtransid: u64,
    stime: Timespec,
    rtime: Timespec,
    flags: u64,
    reserved: [u64; 16],
}
#[cfg(any(test, feature = "testing"))]
const _: () = assert!(size_of::<ReceivedSubvolArgs>() == 200);

#[repr(C)]
struct SendArgs {
    send_fd: i64,
    clone_sources_count: u64,
    clone_sources: *const u64,
    parent_root: u64,
    flags: u64,
    version: u32,
    reserved: [u8; 28],
}
#[cfg(target_pointer_width = "64")]
const _: () = assert!(SEND == 0x4048_9426);

/// A name behind which zeros follow; an error if it is too long or would end early.
fn padded<const N: usize>(name: &[u8]) -> io::Result<[u8; N]> {
    if name.is_empty() || name.len() >= N || name.contains(&0) || name.contains(&b'/') {
        return Err(io::Error::from(rustix::io::Errno::INVAL));
    }
    let mut padded = [0; N];
    padded[..name.len()].copy_from_slice(name);
    Ok(padded)
}

/// Makes an empty subvolume `name` in the directory `dir`.
pub(super) fn subvol_create(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let args = VolArgs { fd: 0, name: padded(name)? };
    // SAFETY: SUBVOL_CREATE reads a btrfs_ioctl_vol_args, whose layout VolArgs has; its name ends with a NUL.
    Ok(unsafe { ioctl(dir, Setter::<SUBVOL_CREATE, _>::new(args)) }?)
}

/// Deletes the subvolume `name` of the directory `dir`.
pub(super) fn snap_destroy(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<()> {
    let args = VolArgs { fd: 0, name: padded(name)? };
    // SAFETY: SNAP_DESTROY reads a btrfs_ioctl_vol_args, whose layout VolArgs has; its name ends with a NUL.
    Ok(unsafe { ioctl(dir, Setter::<SNAP_DESTROY, _>::new(args)) }?)
}

/// Makes `name` in the directory `dir` a snapshot of the subvolume `source`.
pub(super) fn snap_create(dir: BorrowedFd<'_>, name: &[u8], source: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    let args = VolArgsV2 { fd: source.as_raw_fd().into(), transid: 0, flags, unused: [0; 4], name: padded(name)? };
    // SAFETY: SNAP_CREATE_V2 reads a btrfs_ioctl_vol_args_v2, whose layout VolArgsV2 has; `source` is open during the call.
    Ok(unsafe { ioctl(dir, Setter::<SNAP_CREATE_V2, _>::new(args)) }?)
}

/// Fills `args.items` with items of a tree. ENOENT if there is no such tree.
pub(super) fn tree_search(fd: BorrowedFd<'_>, args: &mut SearchArgs) -> io::Result<()> {
    // SAFETY: TREE_SEARCH reads and writes a btrfs_ioctl_search_args, whose layout SearchArgs has; any bytes are valid in it.
    Ok(unsafe { ioctl(fd, Updater::<TREE_SEARCH, _>::new(args)) }?)
}

/// The same with a larger buffer. EOVERFLOW if an item is larger than that.
pub(super) fn tree_search_long(fd: BorrowedFd<'_>, args: &mut LongSearchArgs) -> io::Result<()> {
    args.buf_size = LONG_SEARCH_BUFFER_BYTES as u64;
    // SAFETY: TREE_SEARCH_V2 reads and writes a btrfs_ioctl_search_args_v2 with a buffer of buf_size bytes behind it, as
    // LongSearchArgs has it; any bytes are valid in it.
    Ok(unsafe { ioctl(fd, Updater::<TREE_SEARCH_V2, _>::new(args)) }?)
}

/// The path of a directory inside the subvolume `treeid`, with a slash at its end; empty for the root.
pub(super) fn ino_lookup(fd: BorrowedFd<'_>, treeid: u64, objectid: u64) -> io::Result<Vec<u8>> {
    let mut args = InoLookupArgs { treeid, objectid, name: [0; 4080] };
    // SAFETY: INO_LOOKUP reads and writes a btrfs_ioctl_ino_lookup_args, whose layout InoLookupArgs has; any bytes are valid.
    unsafe { ioctl(fd, Updater::<INO_LOOKUP, _>::new(&mut args)) }?;
    let end = args.name.iter().position(|&b| b == 0).unwrap_or(args.name.len());
    Ok(args.name[..end].to_vec())
}

/// Starts to commit the running transaction; returns its number.
pub(super) fn start_sync(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: START_SYNC writes a u64.
    Ok(unsafe { ioctl(fd, Getter::<START_SYNC, u64>::new()) }?)
}

/// Waits until the transaction of that number is on disk.
pub(super) fn wait_sync(fd: BorrowedFd<'_>, transid: u64) -> io::Result<()> {
    // SAFETY: WAIT_SYNC reads a u64.
    Ok(unsafe { ioctl(fd, Setter::<WAIT_SYNC, _>::new(transid)) }?)
}

/// Flags of a subvolume, of which [`SUBVOL_RDONLY`] is known here.
pub(super) fn subvol_flags(fd: BorrowedFd<'_>) -> io::Result<u64> {
    // SAFETY: SUBVOL_GETFLAGS writes a u64.
    Ok(unsafe { ioctl(fd, Getter::<SUBVOL_GETFLAGS, u64>::new()) }?)
}

/// Sets the flags of a subvolume.
pub(super) fn set_subvol_flags(fd: BorrowedFd<'_>, flags: u64) -> io::Result<()> {
    // SAFETY: SUBVOL_SETFLAGS reads a u64.
    Ok(unsafe { ioctl(fd, Setter::<SUBVOL_SETFLAGS, _>::new(flags)) }?)
}

/// Commits what the file system has in memory, and sets the cleaner to work on what is deleted.
pub(super) fn sync(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: SYNC has no argument.
    Ok(unsafe { ioctl(fd, NoArg::<SYNC>::new()) }?)
}

/// What the chunks of the file system are and how full they are, by kind and profile.
pub(super) fn space_info(fd: BorrowedFd<'_>) -> io::Result<Vec<SpaceInfo>> {
    let head = SpaceHead { space_slots: SPACE_SLOTS as u64, total_spaces: 0 };
    let mut args = SpaceArgs { head, slots: [SpaceInfo::default(); SPACE_SLOTS] };
    // SAFETY: SPACE_INFO reads and writes a btrfs_ioctl_space_args with space_slots btrfs_ioctl_space_info behind it, as SpaceArgs
    // has it; any bytes are valid in it.
    unsafe { ioctl(fd, Updater::<SPACE_INFO, _>::new(&mut args)) }?;
    let told = usize::try_from(args.head.total_spaces).unwrap_or(SPACE_SLOTS).min(SPACE_SLOTS);
    Ok(args.slots[..told].to_vec())
}

/// About one device of the file system. ENODEV if none has that id.
pub(super) fn dev_info(fd: BorrowedFd<'_>, devid: u64) -> io::Result<DevInfoArgs> {
    let mut args =
        DevInfoArgs { devid, uuid: [0; 16], bytes_used: 0, total_bytes: 0, unused: [0; 379], path: [0; 1024] };
    // SAFETY: DEV_INFO reads and writes a btrfs_ioctl_dev_info_args, whose layout DevInfoArgs has; any bytes are valid in it.
    unsafe { ioctl(fd, Updater::<DEV_INFO, _>::new(&mut args)) }?;
    Ok(args)
}

/// About the file system.
pub(super) fn fs_info(fd: BorrowedFd<'_>) -> io::Result<FsInfoArgs> {
    let mut args = FsInfoArgs {
        max_id: 0,
        num_devices: 0,
        fsid: [0; 16],
        nodesize: 0,
        sectorsize: 0,
        clone_alignment: 0,
        csum_type: 0,
        csum_size: 0,
        flags: FS_INFO_CSUM,
        rest: [0; 968],
    };
    // SAFETY: FS_INFO reads (flags) and writes a btrfs_ioctl_fs_info_args, whose size FsInfoArgs has; any bytes are
    // valid in it.
    unsafe { ioctl(fd, Updater::<FS_INFO, _>::new(&mut args)) }?;
    Ok(args)
}

/// About the subvolume that the file belongs to.
pub(super) fn subvol_info(fd: BorrowedFd<'_>) -> io::Result<SubvolInfoArgs> {
    // SAFETY: GET_SUBVOL_INFO writes a whole btrfs_ioctl_get_subvol_info_args, whose layout SubvolInfoArgs has; any bytes are
    // valid in it.
    Ok(unsafe { ioctl(fd, Getter::<GET_SUBVOL_INFO, SubvolInfoArgs>::new()) }?)
}

/// Says of a subvolume that it was received: `uuid` and `stransid` of its origin.
#[cfg(any(test, feature = "testing"))]
pub(super) fn set_received(fd: BorrowedFd<'_>, uuid: [u8; 16], stransid: u64) -> io::Result<()> {
    let (stime, rtime) = (Timespec::default(), Timespec::default());
    let mut args = ReceivedSubvolArgs { uuid, stransid, rtransid: 0, stime, rtime, flags: 0, reserved: [0; 16] };
    // SAFETY: SET_RECEIVED_SUBVOL reads and writes a btrfs_ioctl_received_subvol_args, whose layout ReceivedSubvolArgs has.
    Ok(unsafe { ioctl(fd, Updater::<SET_RECEIVED_SUBVOL, _>::new(&mut args)) }?)
}

/// Writes the send stream of `subvolume` into `output`; returns when it is written. `parent` is 0 for a full send.
pub(super) fn send(
    subvolume: BorrowedFd<'_>,
    output: BorrowedFd<'_>,
    parent: u64,
    clone_sources: &[u64],
    flags: u64,
    version: u32,
) -> io::Result<()> {
    let args = SendArgs {
        send_fd: output.as_raw_fd().into(),
        clone_sources_count: clone_sources.len() as u64,
        clone_sources: clone_sources.as_ptr(),
        parent_root: parent,
        flags,
        version,
        reserved: [0; 28],
    };
    // SAFETY: SEND reads a btrfs_ioctl_send_args, whose layout SendArgs has; `clone_sources` has as many elements as it says, and
    // it, `output` and `subvolume` live until the call returns.
    Ok(unsafe { ioctl(subvolume, Setter::<SEND, _>::new(args)) }?)
}
