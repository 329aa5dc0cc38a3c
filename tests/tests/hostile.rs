//! A peer that holds the right key and means harm: every rule of the stream, and what else it could try, against the real receiver.
//!
//! The rules themselves are unit-tested in `common`; here it is shown that the receiver applies them before `btrfs receive` does any
//! harm: the transfer ends with the rule's name in both logs, nothing of it is left, and what is published stays.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use common::{
    link::{Incoming, Link, LinkError},
    snapshot::{Snapshot, SnapshotId},
    stream::{
        Attr, Canonical, DigestScope, Item, Kind, Mark, RootTimes, StreamDigest, StreamError, Walker, encode,
        encode_header,
    },
    tls::{Connector, Credentials, Peers},
    wire::{
        codec::{DATA_PREFIX_BYTES, Encoding, write_data_prefix},
        message::{End, Hello, Offer, PROTOCOL, Refusal, Role, ToReceiver, ToSender},
    },
};
use snapferry_tests::{
    config::{PORT, VOLUME},
    host::MIRROR_ADDRESS,
    nar,
    pair::Pair,
};
use tokio::net::TcpStream;
use uuid::Uuid;

const ID: SnapshotId = SnapshotId { uuid: Uuid::from_u128(0x1234_5678), ctransid: 7 };
const NAME: &str = "substitutes.20300101T000000Z";
const OTHER: Uuid = Uuid::from_u128(0x9999);

/// A stream made by hand.
struct Stream(Vec<u8>);

impl Stream {
    fn begun() -> Self {
        let mut bytes = Vec::new();
        encode_header(2, &mut bytes);
        Self(bytes).add(Kind::Subvol, &subvolume(NAME, ID))
    }

    fn bare() -> Self {
        let mut bytes = Vec::new();
        encode_header(2, &mut bytes);
        Self(bytes)
    }

    fn add(self, kind: Kind, attrs: &[(Attr, Vec<u8>)]) -> Self {
        self.raw(kind.number(), &attrs.iter().map(|(attr, value)| (attr.number(), &value[..])).collect::<Vec<_>>())
    }

    fn raw(mut self, kind: u16, attrs: &[(u16, &[u8])]) -> Self {
        encode(kind, attrs, 2, &mut self.0);
        self
    }

    fn file(self, path: &[u8]) -> Self {
        self.add(Kind::Mkfile, &[(Attr::Path, path.to_vec()), (Attr::Ino, number(300))])
    }

    fn write(self, path: &[u8], data: &[u8]) -> Self {
        self.add(
            Kind::Write,
            &[(Attr::Path, path.to_vec()), (Attr::FileOffset, number(0)), (Attr::Data, data.to_vec())],
        )
    }

    fn end(self) -> Self {
        self.add(Kind::End, &[])
    }

    /// Changes a byte, counted from the end.
    fn flip(mut self, from_end: usize) -> Self {
        let at = self.0.len() - from_end;
        self.0[at] ^= 1;
        self
    }
}

fn number(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn subvolume(name: &str, id: SnapshotId) -> Vec<(Attr, Vec<u8>)> {
    vec![(Attr::Path, name.into()), (Attr::Uuid, id.uuid.as_bytes().to_vec()), (Attr::Ctransid, number(id.ctransid))]
}

fn clone_from(uuid: Uuid) -> Vec<(Attr, Vec<u8>)> {
    vec![
        (Attr::FileOffset, number(0)),
        (Attr::CloneLen, number(4096)),
        (Attr::Path, b"f".to_vec()),
        (Attr::CloneUuid, uuid.as_bytes().to_vec()),
        (Attr::CloneCtransid, number(7)),
        (Attr::ClonePath, b"etc/shadow".to_vec()),
        (Attr::CloneOffset, number(0)),
    ]
}

/// Streams and the rule that refuses each.
fn hostile() -> Vec<(&'static str, Stream)> {
    let path = |path: &[u8]| Stream::begun().file(path).end();
    let f = || Stream::begun().file(b"f");
    let with_base =
        [subvolume(NAME, ID), vec![(Attr::CloneUuid, OTHER.as_bytes().to_vec()), (Attr::CloneCtransid, number(1))]]
            .concat();
    let mknod = |mode: u64| {
        let attrs = [
            (Attr::Path, b"n".to_vec()),
            (Attr::Ino, number(300)),
            (Attr::Rdev, number(1)),
            (Attr::Mode, number(mode)),
        ];
        Stream::begun().add(Kind::Mknod, &attrs).end()
    };
    let xattr = |name: &[u8]| {
        let attrs = [(Attr::Path, b"f".to_vec()), (Attr::XattrName, name.to_vec()), (Attr::XattrData, b"x".to_vec())];
        f().add(Kind::SetXattr, &attrs).end()
    };
    let symlink = |text: &[u8]| {
        let attrs = [(Attr::Path, b"s".to_vec()), (Attr::Ino, number(301)), (Attr::PathLink, text.to_vec())];
        Stream::begun().add(Kind::Symlink, &attrs).end()
    };
    let mut oversized = Stream::bare();
    oversized.0.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0]);
    vec![
        ("stream-magic", Stream(b"#!/bin/sh\nrm -rf /\n".to_vec())),
        ("stream-version", Stream(b"btrfs-stream\0\x01\0\0\0".to_vec()).end()),
        ("command-length", oversized),
        ("checksum", f().flip(1).end()),
        ("truncated", f()),
        ("after-end", f().end().end()),
        ("unknown-command", Stream::begun().raw(99, &[(15, b"f")]).end()),
        (
            "unknown-command",
            f().add(
                Kind::UpdateExtent,
                &[(Attr::Path, b"f".to_vec()), (Attr::FileOffset, number(0)), (Attr::Size, number(1))],
            )
            .end(),
        ),
        (
            "unknown-attribute",
            Stream::begun().raw(Kind::Mkfile.number(), &[(15, b"f"), (3, &number(1)), (8, &number(1))]).end(),
        ),
        (
            "duplicate-attribute",
            Stream::begun().raw(Kind::Mkfile.number(), &[(15, b"f"), (15, b"../g"), (3, &number(1))]).end(),
        ),
        ("missing-attribute", Stream::begun().add(Kind::Mkfile, &[(Attr::Ino, number(1))]).end()),
        (
            "attribute-length",
            Stream::begun().add(Kind::Mkfile, &[(Attr::Path, b"f".to_vec()), (Attr::Ino, vec![1])]).end(),
        ),
        ("subvolume-first-and-once", Stream::bare().file(b"f").end()),
        ("subvolume-first-and-once", Stream::begun().add(Kind::Subvol, &subvolume(NAME, ID)).end()),
        ("subvolume-name", Stream::bare().add(Kind::Subvol, &subvolume("substitutes.20300101T000001Z", ID)).end()),
        ("path-relative", Stream::bare().add(Kind::Subvol, &subvolume("../../etc", ID)).end()),
        ("subvolume-uuid", Stream::bare().add(Kind::Subvol, &subvolume(NAME, SnapshotId { uuid: OTHER, ..ID })).end()),
        ("base-uuid", Stream::bare().add(Kind::Snapshot, &with_base).end()),
        ("path-relative", path(b"/etc/passwd")),
        ("path-relative", path(b"../escaped")),
        ("path-relative", path(b"a/../../escaped")),
        ("path-relative", path(b"a//b")),
        ("path-relative", path(b"./a")),
        ("path-relative", path(b"a\0b")),
        ("path-length", path(&[b'a'; 256])),
        ("path-length", path(&b"a/".repeat(2100)[..4199])),
        ("symlink-text", symlink(b"")),
        ("clone-source", f().add(Kind::Clone, &clone_from(OTHER)).end()),
        (
            "range-overflow",
            f().add(
                Kind::Write,
                &[(Attr::Path, b"f".to_vec()), (Attr::FileOffset, number(u64::MAX)), (Attr::Data, b"xy".to_vec())],
            )
            .end(),
        ),
        ("mode", mknod(0o170_000)),
        ("xattr-name", xattr(&[b'n'; 300])),
    ]
}

/// A conversation with the receiver, as far as the offer.
struct Peer {
    link: Link<ToSender, ToReceiver>,
}

impl Peer {
    async fn connect(pair: &Pair) -> Self {
        let credentials =
            Credentials::load(&pair.places.sender.join("sender.crt"), &pair.places.sender.join("sender.key")).unwrap();
        let peers = Peers::Pinned(vec![pair.receiver_fingerprint.parse().unwrap()]);
        let tcp = TcpStream::connect((MIRROR_ADDRESS, PORT)).await.unwrap();
        let (stream, _) = Connector::new(&credentials, &peers).unwrap().connect(tcp).await.unwrap();
        let hello = Hello { protocol: PROTOCOL, role: Role::Sender, agent: "mallory".into(), software: "test".into() };
        Self { link: Link::greet(stream, &hello).await.unwrap() }
    }

    async fn say(&self, message: ToReceiver) {
        // A receiver that has left already has said why: that is read next.
        let _ = self.link.outbox().say(&message).await;
    }

    async fn hear(&mut self) -> Result<ToSender, LinkError> {
        loop {
            match self.link.next().await? {
                Incoming::Message(ToSender::Ack(_)) => {}
                Incoming::Message(message) => return Ok(message),
                Incoming::Data(_) => panic!("the receiver sends data"),
            }
        }
    }

    /// Offers and expects to be accepted.
    async fn offer(&mut self) {
        self.say(ToReceiver::Offer(offer())).await;
        let answer = self.hear().await.unwrap();
        assert!(matches!(answer, ToSender::Accept { .. }), "{answer:?}");
    }

    async fn data(&self, offset: u64, length: usize, encoding: Encoding, body: &[u8]) {
        let mut frame = vec![0; DATA_PREFIX_BYTES];
        frame.extend_from_slice(body);
        write_data_prefix(&mut frame, offset, length, encoding);
        let _ = self.link.outbox().data(Bytes::from(frame)).await;
    }

    async fn failure(&mut self) -> String {
        match self.hear().await {
            Ok(ToSender::Failed { reason, .. }) => reason,
            other => panic!("not refused: {other:?}"),
        }
    }
}

fn offer() -> Offer {
    let times = (1_700_000_000, 0);
    Offer {
        snapshot: Snapshot { name: NAME.parse().unwrap(), id: ID },
        base: None,
        stream_version: 2,
        digest: DigestScope::Structure,
        root_times: RootTimes { atime: times, mtime: times, ctime: times },
        total: None,
        run: [7; 16],
        resume: true,
    }
}

/// What an honest sender would say at the end of this stream, as far as it is one.
fn end_of(stream: &[u8]) -> End {
    let (mut walker, mut digest, mut canonical) =
        (Walker::new(), StreamDigest::new(DigestScope::Structure), Canonical::new());
    let _ = walker.walk::<StreamError>(stream, |item| {
        if let Item::Command { command, .. } = item {
            digest.update(&command);
            canonical.update(&command)?;
        }
        Ok(())
    });
    End { bytes: stream.len() as u64, stream_digest: digest.finish(), canonical: canonical.finish() }
}

/// Runs a peer on the head node.
fn as_peer<T: Send>(pair: &Pair, peer: impl AsyncFnOnce(&Pair) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let run = || {
            pair.head.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(peer(pair))
        };
        scope.spawn(run).join().unwrap()
    })
}

/// A pair that has published something.
fn published() -> (Pair, snapferry_tests::agent::Agent, String) {
    let pair = Pair::new();
    nar::grow(&pair.places.source, 300_000, 1).unwrap();
    let receiver = pair.start_receiver();
    pair.ferry();
    let published = pair.published().unwrap();
    (pair, receiver, published)
}

#[test]
fn every_rule_is_applied_before_any_harm_is_done() {
    let (pair, receiver, published) = published();
    for (rule, stream) in hostile() {
        let reason = as_peer(&pair, async |pair| {
            let mut peer = Peer::connect(pair).await;
            peer.offer().await;
            peer.data(0, stream.0.len(), Encoding::Plain, &stream.0).await;
            peer.say(ToReceiver::End(end_of(&stream.0))).await;
            peer.failure().await
        });
        assert!(reason.contains(rule), "expected {rule}: {reason}");
        receiver.wait_where("transfer failed", |event| event.text("rule") == rule && event.text("error") == reason);
        pair.assert_no_leftovers();
        assert_eq!(pair.published().as_ref(), Some(&published), "{rule}");
    }
    pair.ferry();
    pair.assert_arrived();
}

#[test]
fn lies_about_blocks_and_ends_are_found() {
    let (pair, receiver, published) = published();
    let good = Stream::begun().file(b"f").write(b"f", b"data").end().0;
    let honest = end_of(&good);
    let mut shrunk = zstd_like(&good);
    shrunk.truncate(good.len() - 1);
    let other_mark = Mark { count: honest.canonical.count + 1, ..honest.canonical };
    type Lie<'a> = (&'static str, u64, usize, Encoding, &'a [u8], End);
    let lies: [Lie<'_>; 6] = [
        ("offset", 1, good.len(), Encoding::Plain, &good, honest),
        ("decompress", 0, good.len(), Encoding::Zstd, &shrunk, honest),
        ("bytes", 0, good.len(), Encoding::Plain, &good, End { bytes: honest.bytes + 1, ..honest }),
        ("stream digest", 0, good.len(), Encoding::Plain, &good, End { stream_digest: [0; 32], ..honest }),
        ("canonical digest", 0, good.len(), Encoding::Plain, &good, End { canonical: other_mark, ..honest }),
        ("truncated", 0, good.len() - 1, Encoding::Plain, &good[..good.len() - 1], honest),
    ];
    for (what, offset, length, encoding, body, end) in lies {
        let reason = as_peer(&pair, async |pair| {
            let mut peer = Peer::connect(pair).await;
            peer.offer().await;
            peer.data(offset, length, encoding, body).await;
            peer.say(ToReceiver::End(end)).await;
            peer.failure().await
        });
        assert!(reason.contains(what), "expected {what}: {reason}");
        receiver.wait_where("transfer failed", |event| event.text("error") == reason);
        pair.assert_no_leftovers();
        assert_eq!(pair.published().as_ref(), Some(&published), "{what}");
    }
}

/// Bytes that are no zstd frame.
fn zstd_like(good: &[u8]) -> Vec<u8> {
    good.iter().map(|byte| byte ^ 0x55).collect()
}

#[test]
fn nothing_goes_through_a_symlink() {
    let (pair, receiver, published) = published();
    let outside = pair.lab.directory("outside");
    let link = [
        (Attr::Path, b"s".to_vec()),
        (Attr::Ino, number(300)),
        (Attr::PathLink, outside.as_os_str().as_encoded_bytes().to_vec()),
    ];
    let up = [(Attr::Path, b"u".to_vec()), (Attr::Ino, number(301)), (Attr::PathLink, b"..".to_vec())];
    for (entry, path) in [(&link, &b"s/stolen"[..]), (&up, b"u/stolen")] {
        let stream = Stream::begun().add(Kind::Symlink, entry).file(path).end().0;
        let reason = as_peer(&pair, async |pair| {
            let mut peer = Peer::connect(pair).await;
            peer.offer().await;
            peer.data(0, stream.len(), Encoding::Plain, &stream).await;
            peer.say(ToReceiver::End(end_of(&stream))).await;
            peer.failure().await
        });
        assert!(reason.contains("symbolic links"), "not the kernel's ELOOP: {reason}");
        receiver.wait_where("transfer failed", |event| event.text("stage") == "apply");
        pair.assert_no_leftovers();
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(!pair.places.store.join("stolen").exists());
        assert_eq!(pair.published().as_ref(), Some(&published));
    }
}

#[test]
fn offers_that_make_no_sense_are_refused_and_the_conversation_goes_on() {
    let (pair, _receiver, published) = published();
    as_peer(&pair, async |pair| {
        let mut peer = Peer::connect(pair).await;
        let base = Snapshot {
            name: "substitutes.20200101T000000Z".parse().unwrap(),
            id: SnapshotId { uuid: OTHER, ctransid: 1 },
        };
        let elsewhere = Snapshot { name: "elsewhere.20300101T000000Z".parse().unwrap(), id: ID };
        let taken = Snapshot { name: published.parse().unwrap(), id: ID };
        let offers = [
            (Refusal::BaseMissing, Offer { base: Some(base), ..offer() }),
            (Refusal::BadOffer, Offer { stream_version: 3, ..offer() }),
            (Refusal::BadOffer, Offer { stream_version: 0, ..offer() }),
            (Refusal::BadOffer, Offer { base: Some(offer().snapshot), ..offer() }),
            (Refusal::UnknownVolume, Offer { snapshot: elsewhere, ..offer() }),
            (Refusal::NameTaken, Offer { snapshot: taken, ..offer() }),
        ];
        for (expected, offer) in offers {
            peer.say(ToReceiver::Offer(offer.clone())).await;
            match peer.hear().await.unwrap() {
                ToSender::Refused { why, detail } => assert_eq!(why, expected, "{detail}"),
                other => panic!("{offer:?}: {other:?}"),
            }
        }
        peer.say(ToReceiver::Query { volume: VOLUME.parse().unwrap() }).await;
        assert!(matches!(peer.hear().await.unwrap(), ToSender::Inventory(_)));
    });
    pair.assert_no_leftovers();
    assert_eq!(pair.published(), Some(published));
}

#[test]
fn who_speaks_out_of_turn_is_left() {
    let (pair, _receiver, published) = published();
    for message in [ToReceiver::Resume { offset: 0 }, ToReceiver::End(end_of(&[]))] {
        let ended = as_peer(&pair, async |pair| {
            let mut peer = Peer::connect(pair).await;
            peer.say(message).await;
            peer.hear().await
        });
        assert!(ended.is_err(), "{ended:?}");
    }
    let unasked = as_peer(&pair, async |pair| {
        let mut peer = Peer::connect(pair).await;
        peer.data(0, 5, Encoding::Plain, b"block").await;
        peer.hear().await
    });
    assert!(unasked.is_err(), "{unasked:?}");
    pair.ferry();
    assert_ne!(pair.published(), Some(published));
}
