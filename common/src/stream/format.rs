//! The numbers of the send stream: magic, commands, attributes, limits, checksum.
//!
//! Everything is little-endian. A stream is [`MAGIC`], a u32 version, then commands: u32 length of the body, u16 command, u32
//! checksum, body. A body is attributes: u16 type, u16 length, value; from version 2 on DATA has no length, comes last and takes
//! the rest.

use std::fmt;

/// What a stream begins with.
pub const MAGIC: &[u8; 13] = b"btrfs-stream\0";

/// Bytes before the first command: [`MAGIC`] and the version.
pub const STREAM_HEADER_BYTES: usize = MAGIC.len() + 4;

/// Bytes before a command's body: length, command, checksum.
pub const COMMAND_HEADER_BYTES: usize = 10;

/// The newest version of the send stream that we read and write.
pub const NEWEST_VERSION: u32 = 2;

/// The longest command, header included. The kernel builds each in one buffer of 144 KiB, rounded up to whole pages: 192 KiB
/// where a page has 64 KiB. Other readers believe any length up to 4 GiB; memory must not follow a length that a peer names.
pub const MAX_COMMAND_BYTES: usize = 192 * 1024;

/// What the kernel keeps free of data in the buffer of a command, for its header and its other attributes.
const COMMAND_RESERVE_BYTES: usize = 16 * 1024;

/// The most data of a WRITE in version 1: its buffer has 64 KiB.
pub const MAX_WRITE_BYTES_V1: usize = 64 * 1024 - COMMAND_RESERVE_BYTES;

/// The most data of a WRITE in version 2, on machines with the largest pages.
pub const MAX_WRITE_BYTES_V2: usize = MAX_COMMAND_BYTES - COMMAND_RESERVE_BYTES;

/// The most data of an ENCODED_WRITE, and of what it decodes to: the longest compressed extent of btrfs.
pub const MAX_ENCODED_BYTES: usize = 128 * 1024;

/// The longest path: PATH_MAX less its NUL.
pub const MAX_PATH_BYTES: usize = 4095;

/// The longest part of a path: NAME_MAX.
pub const MAX_NAME_BYTES: usize = 255;

/// The longest name of an extended attribute: XATTR_NAME_MAX.
pub const MAX_XATTR_NAME_BYTES: usize = 255;

/// The largest file, and the end of the last range in it: the kernel's loff_t.
pub const MAX_FILE_BYTES: u64 = i64::MAX as u64;

/// An enum whose variants are the numbers of the stream, with the names that the kernel gives them.
macro_rules! numbered {
    ($(#[$about:meta])* $enum:ident { $($(#[$doc:meta])* $variant:ident = $number:literal $name:literal,)* }) => {
        $(#[$about])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum $enum { $($(#[$doc])* $variant = $number,)* }

        impl $enum {
            /// Of a number in the stream; None if it stands for nothing that we know.
            pub const fn from_number(number: u16) -> Option<Self> {
                match number { $($number => Some(Self::$variant),)* _ => None }
            }

            /// As it stands in the stream.
            pub const fn number(self) -> u16 {
                self as u16
            }

            /// The kernel's name for it.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }
        }

        impl fmt::Display for $enum {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

numbered! {
    /// What a command does. Attributes of each: `schema.rs`.
    Kind {
        /// Begins a full stream.
        Subvol = 1 "SUBVOL",
        /// Begins an incremental stream: a snapshot of the base.
        Snapshot = 2 "SNAPSHOT",
        /// Creates a regular file.
        Mkfile = 3 "MKFILE",
        /// Creates a directory.
        Mkdir = 4 "MKDIR",
        /// Creates a device node.
        Mknod = 5 "MKNOD",
        /// Creates a pipe.
        Mkfifo = 6 "MKFIFO",
        /// Creates a socket.
        Mksock = 7 "MKSOCK",
        /// Creates a symbolic link.
        Symlink = 8 "SYMLINK",
        /// Renames PATH to PATH_TO.
        Rename = 9 "RENAME",
        /// Creates PATH as another name of PATH_LINK.
        Link = 10 "LINK",
        /// Removes a name that is no directory.
        Unlink = 11 "UNLINK",
        /// Removes an empty directory.
        Rmdir = 12 "RMDIR",
        /// Sets an extended attribute.
        SetXattr = 13 "SET_XATTR",
        /// Removes an extended attribute.
        RemoveXattr = 14 "REMOVE_XATTR",
        /// Writes data into a file.
        Write = 15 "WRITE",
        /// Shares a range of another file, or of the same.
        Clone = 16 "CLONE",
        /// Sets the size of a file.
        Truncate = 17 "TRUNCATE",
        /// Sets permissions.
        Chmod = 18 "CHMOD",
        /// Sets the owner.
        Chown = 19 "CHOWN",
        /// Sets the times; the last command of an inode.
        Utimes = 20 "UTIMES",
        /// Ends the stream.
        End = 21 "END",
        /// Stands for data in a stream without data.
        UpdateExtent = 22 "UPDATE_EXTENT",
        /// Allocates, or punches a hole; since version 2.
        Fallocate = 23 "FALLOCATE",
        /// Sets inode flags; since version 2.
        Fileattr = 24 "FILEATTR",
        /// Writes data that is still compressed; since version 2.
        EncodedWrite = 25 "ENCODED_WRITE",
        /// Turns fs-verity on; since version 3, which we do not speak.
        EnableVerity = 26 "ENABLE_VERITY",
    }
}

numbered! {
    /// What an attribute of a command says.
    Attr {
        /// Uuid of the subvolume, 16 bytes.
        Uuid = 1 "UUID",
        /// Transaction that made the snapshot, u64.
        Ctransid = 2 "CTRANSID",
        /// Inode number at the source, u64.
        Ino = 3 "INO",
        /// Size or length in bytes, u64.
        Size = 4 "SIZE",
        /// Mode, u64.
        Mode = 5 "MODE",
        /// Owner, u64.
        Uid = 6 "UID",
        /// Group, u64.
        Gid = 7 "GID",
        /// Device, u64.
        Rdev = 8 "RDEV",
        /// Last change of the inode, u64 seconds and u32 nanoseconds.
        Ctime = 9 "CTIME",
        /// Last change of the content, likewise.
        Mtime = 10 "MTIME",
        /// Last access, likewise.
        Atime = 11 "ATIME",
        /// Birth, likewise.
        Otime = 12 "OTIME",
        /// Name of an extended attribute.
        XattrName = 13 "XATTR_NAME",
        /// Value of an extended attribute.
        XattrData = 14 "XATTR_DATA",
        /// The path that the command is about, relative to the subvolume; no NUL behind it, and bytes, not UTF-8.
        Path = 15 "PATH",
        /// New path of a RENAME.
        PathTo = 16 "PATH_TO",
        /// Existing path of a LINK; text of a SYMLINK.
        PathLink = 17 "PATH_LINK",
        /// Offset in the file in bytes, u64.
        FileOffset = 18 "FILE_OFFSET",
        /// File data.
        Data = 19 "DATA",
        /// Uuid of the subvolume to clone from, or of the base, 16 bytes.
        CloneUuid = 20 "CLONE_UUID",
        /// Its transaction, u64.
        CloneCtransid = 21 "CLONE_CTRANSID",
        /// Path to clone from.
        ClonePath = 22 "CLONE_PATH",
        /// Offset to clone from, u64.
        CloneOffset = 23 "CLONE_OFFSET",
        /// How much to clone, u64.
        CloneLen = 24 "CLONE_LEN",
        /// Mode of fallocate(2), u32.
        FallocateMode = 25 "FALLOCATE_MODE",
        /// Inode flags, u64.
        Fileattr = 26 "FILEATTR",
        /// Bytes of the file that an ENCODED_WRITE covers, u64.
        UnencodedFileLen = 27 "UNENCODED_FILE_LEN",
        /// Bytes that its data decodes to, u64.
        UnencodedLen = 28 "UNENCODED_LEN",
        /// Where in them the covered part begins, u64.
        UnencodedOffset = 29 "UNENCODED_OFFSET",
        /// How it is compressed, u32.
        Compression = 30 "COMPRESSION",
        /// How it is encrypted, u32.
        Encryption = 31 "ENCRYPTION",
        /// fs-verity: hash algorithm.
        VerityAlgorithm = 32 "VERITY_ALGORITHM",
        /// fs-verity: block size.
        VerityBlockSize = 33 "VERITY_BLOCK_SIZE",
        /// fs-verity: salt.
        VeritySaltData = 34 "VERITY_SALT_DATA",
        /// fs-verity: signature.
        VeritySigData = 35 "VERITY_SIG_DATA",
    }
}

impl Kind {
    /// Does its body carry the content of files?
    pub const fn carries_data(self) -> bool {
        matches!(self, Self::Write | Self::EncodedWrite)
    }

    /// Does it create an inode?
    pub const fn creates(self) -> bool {
        matches!(self, Self::Mkfile | Self::Mkdir | Self::Mknod | Self::Mkfifo | Self::Mksock | Self::Symlink)
    }
}

/// Where the checksum stands in a command's header.
const CHECKSUM_RANGE: std::ops::Range<usize> = 6..COMMAND_HEADER_BYTES;

/// The checksum that belongs into the header of a command: CRC32C of header and body, with the header's checksum taken as zero.
///
/// Unlike the usual CRC32C it begins at 0 and is not inverted at the end, which makes it linear: see `crc32c_shift`.
/// `command` is a whole command, at least [`COMMAND_HEADER_BYTES`] long.
pub fn checksum(command: &[u8]) -> u32 {
    let (header, body) = command.split_at(COMMAND_HEADER_BYTES);
    let mut blank = [0; COMMAND_HEADER_BYTES];
    blank[..CHECKSUM_RANGE.start].copy_from_slice(&header[..CHECKSUM_RANGE.start]);
    // The crate inverts what goes in and what comes out.
    !crc32c::crc32c_append(crc32c::crc32c_append(!0, &blank), body)
}

/// The checksum that stands in the header of a command.
pub(super) fn stored_checksum(command: &[u8]) -> u32 {
    let [.., a, b, c, d] = command[..COMMAND_HEADER_BYTES] else { return 0 };
    u32::from_le_bytes([a, b, c, d])
}

/// Writes the length of the body and the checksum into the header of a command.
pub(super) fn seal(command: &mut [u8], checksum: impl FnOnce(&[u8]) -> u32) {
    let body = (command.len() - COMMAND_HEADER_BYTES) as u32;
    command[..4].copy_from_slice(&body.to_le_bytes());
    let checksum = checksum(command);
    command[CHECKSUM_RANGE].copy_from_slice(&checksum.to_le_bytes());
}

/// What a [`checksum`] of some bytes becomes when `zeros` zero bytes follow them.
///
/// As the checksum is linear, `checksum(a ++ b) == crc32c_shift(checksum(a), b.len()) ^ checksum(b)`: checksums of joined and of
/// split data follow from each other without a look at the data.
pub(super) fn crc32c_shift(crc: u32, zeros: usize) -> u32 {
    let mut power = 1 << 31;
    let mut left = zeros;
    let mut exponent = 3; // a byte is 2^3 bits
    while left != 0 {
        if left & 1 == 1 {
            power = multiply(POWERS[exponent % POWERS.len()], power);
        }
        left >>= 1;
        exponent += 1;
    }
    multiply(power, crc)
}

/// x^(2^n) modulo the polynomial. They repeat after 31, as its order divides 2^31 - 1.
const POWERS: [u32; 31] = {
    let mut powers = [1 << 30; 31];
    let mut n = 1;
    while n < powers.len() {
        powers[n] = multiply(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
};

/// Product of two polynomials over GF(2) modulo that of CRC32C; the highest bit is the lowest power.
const fn multiply(a: u32, mut b: u32) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut product = 0;
    let mut bit = 32;
    while bit > 0 {
        bit -= 1;
        product ^= b & ((a >> bit) & 1).wrapping_neg();
        b = (b >> 1) ^ (POLYNOMIAL & (b & 1).wrapping_neg());
    }
    product
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(bytes: &[u8]) -> u32 {
        !crc32c::crc32c_append(!0, bytes)
    }

    #[test]
    fn the_checksum_is_the_one_of_the_kernel() {
        assert_eq!(raw(b"123456789"), 0x58e3_fa20);
        // END of a stream of `btrfs send`.
        let end = [0, 0, 0, 0, 21, 0, 0x50, 0x6c, 0xc9, 0x9d];
        assert_eq!(checksum(&end), stored_checksum(&end));
    }

    #[test]
    fn checksums_of_joined_data_follow_from_those_of_the_pieces() {
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        for cut in [0, 1, 2, 9, 4095, 131_072, 299_999, 300_000] {
            let (a, b) = bytes.split_at(cut);
            assert_eq!(crc32c_shift(raw(a), b.len()) ^ raw(b), raw(&bytes), "cut at {cut}");
        }
    }

    #[test]
    fn numbers_come_back_as_what_they_stand_for() {
        for number in 0..100 {
            assert_eq!(Kind::from_number(number).map(Kind::number), (1..=26).contains(&number).then_some(number));
            assert_eq!(Attr::from_number(number).map(Attr::number), (1..=35).contains(&number).then_some(number));
        }
    }
}
