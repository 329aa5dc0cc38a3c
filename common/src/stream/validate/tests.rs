//! A hand-made hostile stream for every rule, and good ones that must pass.

use super::*;
use crate::stream::{
    samples::{BASE, ID, NAME, OTHER, Sample, n, time},
    walk::Item,
};

fn expectation(version: u32, base: Option<SnapshotId>) -> Expectation {
    Expectation { name: NAME.to_owned(), id: ID, base, stream_version: version }
}

fn judge(sample: &Sample, version: u32, base: Option<SnapshotId>) -> Result<(), Violation> {
    let mut validator = Validator::new(expectation(version, base));
    sample.walk(1 << 20, |item| match item {
        Item::Version(version) => validator.version(version),
        Item::Command { command, .. } => validator.check(&command),
    })
}

/// The rule that a full stream of version 2 breaks which goes on with `more`.
#[track_caller]
fn refused(rule: &str, more: impl FnOnce(&mut Sample)) {
    refused_in(2, None, rule, more);
}

#[track_caller]
fn refused_in(version: u32, base: Option<SnapshotId>, rule: &str, more: impl FnOnce(&mut Sample)) {
    let mut sample = Sample::begun(version, base);
    more(&mut sample);
    let violation = judge(sample.end(), version, base).expect_err("the stream should have been refused");
    assert_eq!(violation.rule(), rule, "{violation}");
}

#[track_caller]
fn taken(base: Option<SnapshotId>, more: impl Fn(&mut Sample)) {
    for version in [1, 2] {
        let mut sample = Sample::begun(version, base);
        more(&mut sample);
        assert_eq!(judge(sample.end(), version, base), Ok(()), "version {version}");
    }
}

#[test]
fn what_the_kernel_writes_is_taken() {
    taken(None, |s| {
        s.make(Kind::Mkfile, b"o257-7-0").rename(b"o257-7-0", b"dir/\xff\n name").utimes(b"");
        s.write(b"dir/a", 0, &[1; 49152]).write(b"dir/a", i64::MAX as u64 - 1, b"x").truncate(b"dir/a", 7);
        s.clone_from(ID, b"b", b"dir/a", 4096);
        s.make(Kind::Mkdir, &[b'x'; 255]).make(Kind::Mkdir, &[b"d/".repeat(2047), b"d".to_vec()].concat());
        s.push(Kind::Link, &[(Attr::Path, b"new"), (Attr::PathLink, b"old/name")]);
        for text in [&b"/etc/passwd"[..], b"../../..", b".", &[b'/'; 4095]] {
            s.push(Kind::Symlink, &[(Attr::Path, b"link"), (Attr::Ino, &n(1)), (Attr::PathLink, text)]);
        }
        for (kind, mode) in
            [(Kind::Mknod, 0o020_666), (Kind::Mknod, 0o060_600), (Kind::Mkfifo, 0o010_644), (Kind::Mksock, 0o140_755)]
        {
            s.push(kind, &[(Attr::Path, b"node"), (Attr::Ino, &n(1)), (Attr::Rdev, &n(259)), (Attr::Mode, &n(mode))]);
        }
        s.push(Kind::Chmod, &[(Attr::Path, b""), (Attr::Mode, &n(0o7777))]);
        s.push(Kind::Chown, &[(Attr::Path, b""), (Attr::Uid, &n(65534)), (Attr::Gid, &n(u64::from(u32::MAX) - 1))]);
        for name in [&b"user.x"[..], b"security.capability", b"system.posix_acl_access", b"btrfs.compression"] {
            let value = vec![0; 40_000];
            s.push(Kind::SetXattr, &[(Attr::Path, b"f"), (Attr::XattrName, name), (Attr::XattrData, &value)]);
            s.push(Kind::RemoveXattr, &[(Attr::Path, b""), (Attr::XattrName, name)]);
        }
        s.push(Kind::Unlink, &[(Attr::Path, b"...")]).push(Kind::Rmdir, &[(Attr::Path, b".x/..y")]);
    });
    taken(Some(BASE), |s| {
        s.clone_from(ID, b"a", b"b", 1).clone_from(BASE, b"a", b"b", 1);
    });
    assert_eq!(judge(Sample::begun(2, None).write(b"a", 0, &[1; MAX_WRITE_BYTES_V2]).end(), 2, None), Ok(()));
    for mode in [0u32, 1, 3, 0x10, 0x11] {
        let mut sample = Sample::begun(2, None);
        fallocate(&mut sample, mode, 0, 1);
        sample.push(Kind::Fileattr, &[(Attr::Path, b"a"), (Attr::Fileattr, &n(1))]);
        assert_eq!(judge(sample.end(), 2, None), Ok(()));
    }
}

#[test]
fn the_subvolume_is_the_offered_one_first_and_once() {
    refused("subvolume-first-and-once", |s| {
        s.begin(NAME, ID, None);
    });
    refused("subvolume-first-and-once", |s| {
        s.make(Kind::Mkfile, b"a").begin(NAME, ID, Some(BASE));
    });
    for mut early in [Sample::new(2), Sample::new(2).make(Kind::Mkfile, b"a").clone()] {
        assert_eq!(judge(early.end(), 2, None).map_err(|v| v.rule()), Err("subvolume-first-and-once"));
    }
    let begins = |name: &str, id, base, agreed| {
        let mut sample = Sample::new(2);
        judge(sample.begin(name, id, base).end(), 2, agreed).map_err(|v| v.rule())
    };
    assert_eq!(begins(NAME, ID, None, None), Ok(()));
    assert_eq!(begins("volume.20261122T070001Z", ID, None, None), Err("subvolume-name"));
    assert_eq!(begins(NAME, OTHER, None, None), Err("subvolume-uuid"));
    assert_eq!(begins(NAME, SnapshotId { ctransid: 71, ..ID }, None, None), Err("subvolume-uuid"));
    assert_eq!(begins(NAME, ID, Some(OTHER), Some(BASE)), Err("base-uuid"));
    assert_eq!(begins(NAME, ID, Some(BASE), None), Err("base-uuid"));
    assert_eq!(begins(NAME, ID, None, Some(BASE)), Err("base-uuid"));
    // A name that leaves the store is refused as a path already.
    assert_eq!(begins("../x", ID, None, None), Err("path-relative"));
    assert_eq!(judge(Sample::begun(1, None).end(), 2, None).map_err(|v| v.rule()), Err("stream-version"));
}

#[test]
fn commands_belong_into_a_stream_with_data_of_the_agreed_version() {
    refused("unknown-command", |s| {
        s.update_extent(b"a", 0, 1);
    });
    refused("unknown-command", |s| {
        s.push(Kind::EnableVerity, &[(Attr::Path, b"a")]);
    });
    refused_in(1, None, "unknown-command", |s| fallocate(s, 3, 0, 1));
    refused_in(1, None, "unknown-command", |s| encoded(s, &[1], 1, 1, 0, 2));
    refused_in(1, None, "unknown-command", |s| {
        s.push(Kind::Fileattr, &[(Attr::Path, b"a"), (Attr::Fileattr, &n(1))]);
    });
    refused("unknown-command", |s| crate::stream::encode(27, &[], 2, &mut s.bytes));
    refused("unknown-command", |s| crate::stream::encode(0, &[], 2, &mut s.bytes));
}

#[test]
fn attributes_are_those_of_the_command() {
    let path = (Attr::Path, &b"a"[..]);
    refused("unknown-attribute", |s| {
        s.push(Kind::Unlink, &[path, (Attr::PathTo, b"b")]);
    });
    refused("unknown-attribute", |s| crate::stream::encode(11, &[(15, b"a"), (36, b"")], 2, &mut s.bytes));
    refused("unknown-attribute", |s| crate::stream::encode(11, &[(15, b"a"), (0xffff, b"")], 2, &mut s.bytes));
    refused("duplicate-attribute", |s| {
        s.push(Kind::Unlink, &[path, path]);
    });
    refused("missing-attribute", |s| {
        s.push(Kind::Unlink, &[]);
    });
    refused("missing-attribute", |s| {
        s.push(Kind::Write, &[path, (Attr::FileOffset, &n(0))]);
    });
    refused("attribute-length", |s| {
        s.push(Kind::Truncate, &[path, (Attr::Size, &[0; 4])]);
    });
    refused("attribute-length", |s| {
        let time = &[0; 11][..];
        s.push(Kind::Utimes, &[path, (Attr::Atime, time), (Attr::Mtime, time), (Attr::Ctime, time)]);
    });
    refused("unknown-attribute", |s| {
        s.push(Kind::End, &[path]);
    });
}

#[test]
fn paths_stay_inside() {
    let long_name = [b'x'; 256];
    let long_path = [b"d/".repeat(2047), b"xx".to_vec()].concat();
    for (rule, path) in [
        ("path-relative", &b""[..]),
        ("path-relative", b"/etc/passwd"),
        ("path-relative", b"."),
        ("path-relative", b".."),
        ("path-relative", b"a/../../b"),
        ("path-relative", b"a/.."),
        ("path-relative", b"a/./b"),
        ("path-relative", b"a//b"),
        ("path-relative", b"a/"),
        ("path-relative", b"a\0b"),
        ("path-length", &long_name),
        ("path-length", &long_path),
    ] {
        let path_attr = (Attr::Path, path);
        let fine = (Attr::Path, &b"a"[..]);
        refused(rule, |s| {
            s.push(Kind::Mkdir, &[path_attr, (Attr::Ino, &n(1))]);
        });
        refused(rule, |s| {
            s.push(Kind::Unlink, &[path_attr]);
        });
        refused(rule, |s| {
            s.write(path, 0, b"x");
        });
        refused(rule, |s| {
            s.rename(b"a", path);
        });
        refused(rule, |s| {
            s.rename(path, b"a");
        });
        refused(rule, |s| {
            s.push(Kind::Link, &[fine, (Attr::PathLink, path)]);
        });
        refused(rule, |s| {
            s.clone_from(ID, b"a", path, 1);
        });
        if !path.is_empty() {
            refused(rule, |s| {
                s.utimes(path);
            });
        }
    }
    for text in [&b""[..], b"a\0b", &[b'x'; 4096]] {
        refused("symlink-text", |s| {
            s.push(Kind::Symlink, &[(Attr::Path, b"a"), (Attr::Ino, &n(1)), (Attr::PathLink, text)]);
        });
    }
}

#[test]
fn clones_come_from_the_snapshot_or_its_base() {
    for (base, source) in [
        (None, OTHER),
        (None, BASE),
        (Some(BASE), OTHER),
        (Some(BASE), SnapshotId { ctransid: 51, ..BASE }),
        (Some(BASE), SnapshotId { ctransid: 71, ..ID }),
    ] {
        refused_in(2, base, "clone-source", |s| {
            s.clone_from(source, b"a", b"b", 1);
        });
    }
    // To the kernel a length of 0 means: all of it.
    refused("data-length", |s| {
        s.clone_from(ID, b"a", b"b", 0);
    });
    refused("range-overflow", |s| {
        s.clone_from(ID, b"a", b"b", u64::MAX);
    });
}

#[test]
fn data_and_ranges_are_bounded() {
    refused("data-length", |s| {
        s.write(b"a", 0, b"");
    });
    refused("data-length", |s| {
        s.write(b"a", 0, &[0; MAX_WRITE_BYTES_V2 + 1]);
    });
    refused_in(1, None, "data-length", |s| {
        s.write(b"a", 0, &[0; MAX_WRITE_BYTES_V1 + 1]);
    });
    for offset in [i64::MAX as u64, u64::MAX] {
        refused("range-overflow", |s| {
            s.write(b"a", offset, b"x");
        });
        refused("range-overflow", |s| fallocate(s, 3, offset, 1));
    }
    refused("range-overflow", |s| {
        s.truncate(b"a", 1 << 63);
    });
    refused("data-length", |s| fallocate(s, 3, 0, 0));
    for mode in [2, 8, 9, 0x20, 0x21, 0x40, 0x13] {
        refused("fallocate-mode", |s| fallocate(s, mode, 0, 1));
    }
}

#[test]
fn encoded_data_is_what_it_says() {
    let mut good = Sample::begun(2, None);
    encoded(&mut good, &[1; 4096], 100_000, 131_072, 4096, 2);
    assert_eq!(judge(good.end(), 2, None), Ok(()));
    refused("data-length", |s| encoded(s, &[], 1, 1, 0, 2));
    refused("data-length", |s| encoded(s, &[0; MAX_ENCODED_BYTES + 1], 1, 1, 0, 2));
    refused("encoding", |s| encoded(s, &[1], 0, 1, 0, 2));
    refused("encoding", |s| encoded(s, &[1], 2, 1, 0, 2));
    refused("encoding", |s| encoded(s, &[1], 2, 2, 1, 2));
    refused("encoding", |s| encoded(s, &[1], 2, 2, u64::MAX, 2));
    refused("encoding", |s| encoded(s, &[1], 1, 131_073, 0, 2));
    refused("encoding", |s| encoded(s, &[1], 1, 1, 0, 8));
}

#[test]
fn modes_devices_owners_and_times_exist() {
    let node = |s: &mut Sample, kind, mode, device| {
        s.push(kind, &[(Attr::Path, b"a"), (Attr::Ino, &n(1)), (Attr::Rdev, &n(device)), (Attr::Mode, &n(mode))]);
    };
    refused("mode", |s| node(s, Kind::Mknod, 0o100_644, 1));
    refused("mode", |s| node(s, Kind::Mkfifo, 0o020_644, 1));
    refused("mode", |s| node(s, Kind::Mksock, 0o644, 1));
    refused("mode", |s| node(s, Kind::Mknod, 0o1_020_644, 1));
    refused("device", |s| node(s, Kind::Mknod, 0o020_644, 1 << 32));
    refused("mode", |s| {
        s.push(Kind::Chmod, &[(Attr::Path, b"a"), (Attr::Mode, &n(0o100_644))]);
    });
    for (uid, gid) in [(u64::from(u32::MAX), 0), (0, u64::from(u32::MAX)), (1 << 32, 0), (0, u64::MAX)] {
        refused("owner", |s| {
            s.push(Kind::Chown, &[(Attr::Path, b"a"), (Attr::Uid, &n(uid)), (Attr::Gid, &n(gid))]);
        });
    }
    // 0x3fffffff is UTIME_NOW to utimensat(2).
    for nanoseconds in [1_000_000_000, 0x3fff_ffff, u32::MAX] {
        refused("time", |s| {
            let (good, bad) = (&time(1, 0)[..], &time(1, nanoseconds)[..]);
            s.push(Kind::Utimes, &[(Attr::Path, b"a"), (Attr::Atime, good), (Attr::Mtime, bad), (Attr::Ctime, good)]);
        });
    }
}

#[test]
fn extended_attributes_are_bounded() {
    let long = [b"user.".to_vec(), vec![b'x'; 251]].concat();
    for name in [&b""[..], b"user.", b"other.x", b"x", b"user.a\0b", &long] {
        refused("xattr-name", |s| {
            s.push(Kind::SetXattr, &[(Attr::Path, b"a"), (Attr::XattrName, name), (Attr::XattrData, b"v")]);
        });
        refused("xattr-name", |s| {
            s.push(Kind::RemoveXattr, &[(Attr::Path, b"a"), (Attr::XattrName, name)]);
        });
    }
}

#[test]
fn what_a_peer_wrote_is_escaped_and_cut_in_messages() {
    let mut sample = Sample::begun(2, None);
    sample.write(&[b"/\n\x1b[31m".to_vec(), vec![b'x'; 1000]].concat(), 0, b"x");
    let message = judge(&sample, 2, None).expect_err("absolute path").to_string();
    assert!(message.contains(r"\n\x1b[31mxxx") && message.len() < 400, "{message}");
}

fn fallocate(sample: &mut Sample, mode: u32, offset: u64, length: u64) {
    sample.push(
        Kind::Fallocate,
        &[
            (Attr::Path, b"a"),
            (Attr::FallocateMode, &mode.to_le_bytes()),
            (Attr::FileOffset, &n(offset)),
            (Attr::Size, &n(length)),
        ],
    );
}

fn encoded(sample: &mut Sample, data: &[u8], covered: u64, whole: u64, skipped: u64, compression: u32) {
    sample.push(
        Kind::EncodedWrite,
        &[
            (Attr::Path, b"a"),
            (Attr::FileOffset, &n(0)),
            (Attr::UnencodedFileLen, &n(covered)),
            (Attr::UnencodedLen, &n(whole)),
            (Attr::UnencodedOffset, &n(skipped)),
            (Attr::Compression, &compression.to_le_bytes()),
            (Attr::Data, data),
        ],
    );
}
