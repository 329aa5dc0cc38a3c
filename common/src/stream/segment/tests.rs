//! What a segment writer writes is a whole stream, and says the same as what it read.

use proptest::prelude::*;

use super::*;
use crate::stream::{
    samples::{BASE, ID, NAME, OTHER, Sample},
    walk::{Item, Walker},
};

const TIMES: RootTimes = RootTimes { atime: (1, 2), mtime: (3, 4), ctime: (5, 6) };

fn head(origin: Option<SnapshotId>) -> SegmentHead {
    SegmentHead { name: format!("{NAME}.segment-1"), uuid: OTHER.uuid, snapshot: ID, origin }
}

/// Rewrites a sample. `out` is taken away after every `every` commands.
fn rewrite(sample: &Sample, head: &SegmentHead, every: usize) -> Vec<u8> {
    let (mut whole, mut out, mut count) = (Vec::new(), Vec::new(), 0);
    let mut writer = SegmentWriter::begin(sample.version, head, &mut out);
    sample
        .walk::<StreamError>(1 << 20, |item| {
            if let Item::Command { command, .. } = item {
                writer.push(&command, &mut out)?;
                count += 1;
                if count % every == 0 {
                    whole.append(&mut out);
                }
            }
            Ok(())
        })
        .unwrap();
    writer.finish(Some(&TIMES), &mut out);
    whole.append(&mut out);
    whole
}

/// Kind, attributes and their values of a command.
type Parsed = (Kind, Vec<(u16, Vec<u8>)>);

/// Every command of a stream.
fn parsed(bytes: &[u8]) -> Vec<Parsed> {
    let mut walker = Walker::new();
    let mut commands = Vec::new();
    // In version 2 a joined WRITE may be longer than any of the kernel's: the walker would refuse it.
    let (header, mut rest) = bytes.split_at(crate::stream::format::STREAM_HEADER_BYTES);
    let mut version = 0;
    walker
        .walk::<StreamError>(header, |item| {
            if let Item::Version(found) = item {
                version = found;
            }
            Ok(())
        })
        .unwrap();
    while !rest.is_empty() {
        let length = 10 + u32::from_le_bytes(rest[..4].try_into().unwrap()) as usize;
        let (bytes, behind) = rest.split_at(length);
        assert_eq!(checksum(bytes), stored_checksum(bytes), "checksum of what was written");
        let command = Command::unlimited(bytes, version);
        commands.push((command.kind(), command.attrs().map(|(n, value)| (n, value.to_vec())).collect()));
        rest = behind;
    }
    commands
}

fn kinds(bytes: &[u8]) -> Vec<Kind> {
    parsed(bytes).into_iter().map(|(kind, _)| kind).collect()
}

#[test]
fn a_segment_has_a_head_of_its_own() {
    for version in [1, 2] {
        let full = parsed(&rewrite(Sample::begun(version, None).end(), &head(None), 1));
        assert_eq!(full.len(), 3);
        assert_eq!(full[0].0, Kind::Subvol);
        let expected = [&b"volume.20261122T070000Z.segment-1"[..], OTHER.uuid.as_bytes(), &70u64.to_le_bytes()];
        assert_eq!(full[0].1.iter().map(|(_, value)| &value[..]).collect::<Vec<_>>(), expected);
        assert_eq!((full[1].0, full[2].0), (Kind::Utimes, Kind::End));

        let next = parsed(&rewrite(Sample::begun(version, Some(BASE)).end(), &head(Some(BASE)), 1));
        assert_eq!(next[0].0, Kind::Snapshot);
        assert_eq!(next[0].1[3..], [(20, BASE.uuid.as_bytes().to_vec()), (21, 50u64.to_le_bytes().to_vec())]);
    }
}

#[test]
fn creation_and_rename_become_one() {
    let mut sample = Sample::begun(2, None);
    sample.make(Kind::Mkfile, b"o257-7-0").rename(b"o257-7-0", b"dir/a");
    sample.push(Kind::Symlink, &[(Attr::Path, b"o258-7-0"), (Attr::Ino, &[0; 8]), (Attr::PathLink, b"x")]);
    sample.rename(b"o258-7-0", b"dir/link");
    let out = parsed(&rewrite(sample.end(), &head(None), 1));
    assert_eq!(out.len(), 5);
    assert_eq!((out[1].0, &out[1].1[0].1[..]), (Kind::Mkfile, &b"dir/a"[..]));
    let link = [(15, b"dir/link".to_vec()), (3, vec![0; 8]), (17, b"x".to_vec())];
    assert_eq!(out[2], (Kind::Symlink, link.to_vec()));
}

#[test]
fn only_the_very_next_rename_of_the_same_name_is_fused() {
    use Kind::*;
    let mut sample = Sample::begun(2, None);
    sample.make(Mkfile, b"a").rename(b"b", b"c");
    sample.make(Mkdir, b"d").utimes(b"").rename(b"d", b"e");
    sample.make(Mkdir, b"f").make(Mkdir, b"g").rename(b"f", b"h");
    sample.make(Mkdir, b"i");
    let expected = [Subvol, Mkfile, Rename, Mkdir, Utimes, Rename, Mkdir, Mkdir, Rename, Mkdir, Utimes, End];
    assert_eq!(kinds(&rewrite(sample.end(), &head(None), 1)), expected);
}

#[test]
fn a_clone_of_the_snapshot_names_the_segment() {
    let mut sample = Sample::begun(2, Some(BASE));
    sample.clone_from(ID, b"a", b"b", 1).clone_from(BASE, b"a", b"b", 1);
    let sources = |head: &SegmentHead| -> Vec<Vec<u8>> {
        let out = parsed(&rewrite(sample.clone().end(), head, 1));
        let clones = out.into_iter().filter(|(kind, _)| *kind == Kind::Clone);
        clones.map(|(_, attrs)| attrs.into_iter().find(|(number, _)| *number == 20).unwrap().1).collect()
    };
    assert_eq!(sources(&head(Some(BASE))), [OTHER.uuid.as_bytes(), BASE.uuid.as_bytes()]);
    let last = SegmentHead { uuid: ID.uuid, ..head(Some(BASE)) };
    assert_eq!(sources(&last), [ID.uuid.as_bytes(), BASE.uuid.as_bytes()]);
}

#[test]
fn writes_that_touch_are_joined_up_to_a_limit_in_version_2() {
    let chunk = vec![5; 128 * 1024];
    let stream = |version, chunk: &[u8]| {
        let mut sample = Sample::begun(version, None);
        for n in 0..20 {
            sample.write(b"a", n * chunk.len() as u64, chunk);
        }
        sample.write(b"b", 0, b"x").write(b"b", 2, b"y").write(b"c", 3, b"z");
        sample.end();
        sample
    };
    let lengths = |bytes: &[u8]| -> Vec<usize> {
        let out = parsed(bytes);
        let writes = out.iter().filter(|(kind, _)| *kind == Kind::Write);
        writes.map(|(_, attrs)| attrs[2].1.len()).collect()
    };
    let joined = rewrite(&stream(2, &chunk), &head(None), 1000);
    assert_eq!(lengths(&joined), [MAX_JOINED_BYTES, MAX_JOINED_BYTES, 4 * chunk.len(), 1, 1, 1]);
    // What was taken away is not touched any more.
    assert_eq!(lengths(&rewrite(&stream(2, &chunk), &head(None), 1)).len(), 23);
    assert_eq!(lengths(&rewrite(&stream(1, &chunk[..49152]), &head(None), 1000)).len(), 23);
}

/// Creation and rename made one, the plain way.
fn fused(commands: Vec<Parsed>) -> Vec<Parsed> {
    let mut fused: Vec<Parsed> = Vec::new();
    let mut just_created = false;
    for (kind, attrs) in commands {
        match fused.last_mut() {
            Some(last) if just_created && kind == Kind::Rename && last.1[0] == attrs[0] => {
                last.1[0].1 = attrs[1].1.clone();
                just_created = false;
            }
            _ => {
                just_created = kind.creates();
                fused.push((kind, attrs));
            }
        }
    }
    fused
}

/// Every WRITE as WRITEs of one byte: how data was cut makes no difference any more.
fn bytewise(commands: Vec<Parsed>) -> Vec<Parsed> {
    let mut bytewise = Vec::new();
    for (kind, attrs) in commands {
        if kind != Kind::Write {
            bytewise.push((kind, attrs));
            continue;
        }
        let offset = u64::from_le_bytes(attrs[1].1[..].try_into().unwrap());
        for (place, byte) in (offset..).zip(&attrs[2].1) {
            let place = (18, place.to_le_bytes().to_vec());
            bytewise.push((kind, vec![attrs[0].clone(), place, (19, vec![*byte])]));
        }
    }
    bytewise
}

#[derive(Debug, Clone)]
enum Step {
    Make(u8),
    Rename(u8, u8),
    Write(u8, u64, Vec<u8>),
    Utimes(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let name = 0u8..3;
    prop_oneof![
        name.clone().prop_map(Step::Make),
        (name.clone(), name.clone()).prop_map(|(from, to)| Step::Rename(from, to)),
        (name.clone(), 0u64..6, prop::collection::vec(any::<u8>(), 1..4)).prop_map(|(n, o, d)| Step::Write(n, o, d)),
        name.prop_map(Step::Utimes),
    ]
}

proptest! {
    #[test]
    fn the_meaning_stays(steps in prop::collection::vec(step(), 0..60), version in 1u32..=2, every in 1usize..20) {
        let mut sample = Sample::begun(version, None);
        for step in &steps {
            match step {
                Step::Make(name) => sample.make(Kind::Mkfile, &[b'a' + name]),
                Step::Rename(from, to) => sample.rename(&[b'a' + from], &[b'a' + to]),
                Step::Write(name, offset, data) => sample.write(&[b'a' + name], *offset, data),
                Step::Utimes(name) => sample.utimes(&[b'a' + name]),
            };
        }
        sample.end();
        let before = bytewise(fused(parsed(&sample.bytes)));
        let after = bytewise(parsed(&rewrite(&sample, &head(None), every)));
        // Apart from the head, and from the root's times before END.
        prop_assert_eq!(&before[1..before.len() - 1], &after[1..after.len() - 2]);
    }
}
