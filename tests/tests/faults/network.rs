//! What a network can do to a connection. Both agents live on, so that a transfer always goes on at the byte: nothing is fetched from
//! a checkpoint, and what is sent again is at most what was on its way.

use std::time::Duration;

use snapferry_tests::{
    change,
    link::{Fault, Manner, Trouble, Way},
    measure::grow,
    suite::times,
    trial::{Books, Cost, Transfer, Trial},
};

/// Bytes of a transfer that many faults strike.
const BULK: u64 = 80_000_000;
/// Bytes of one that takes long for each byte.
const LITTLE: u64 = 1_500_000;

/// More bytes than the sender says before the first block of the stream.
const HANDSHAKE: u64 = 6000;
/// Bytes that the receiver says in any case: what strikes within them strikes before the conversation.
const ANSWER: u64 = 800;

/// A pair with a source of about so many bytes, and nothing sent yet.
fn prepared(seed: u64, bytes: u64) -> (Trial, Transfer) {
    let mut trial = Trial::new(seed);
    change::randomly(trial.source(), seed, 50);
    grow(trial.source(), seed, bytes);
    let transfer = trial.take();
    (trial, transfer)
}

/// Lets the transfer run while the link does as planned, then without further trouble.
fn survived(mut trial: Trial, mut transfer: Transfer) -> Books {
    trial.start();
    // What strikes later is counted below: only then is it known how often.
    let arrived = trial.during(&transfer, |_| None::<()>);
    assert!(arrived.is_none());
    let struck = trial.link.struck().len() as u64;
    trial.interrupted(&mut transfer, struck, Cost::Connection);
    trial.arrives(&transfer);
    let books = trial.end();
    assert_eq!(books.at_checkpoint, 0, "a broken connection must not cost more than a new one: {books:?}");
    books
}

/// So many troubles of these kinds, one a connection; the first connection always gets as far as the stream.
fn plan(trial: &mut Trial, stream: u64, count: u64, kinds: &'static [Fault]) {
    let mut rng = trial.rng.fork();
    let mut left = count;
    trial.link.plan(move |number| {
        left = left.checked_sub(1)?;
        let fault = *rng.choice(kinds).unwrap();
        // In all of them together some two thirds of the stream pass.
        let further = rng.u64(..(stream * 4 / 3 / count).max(1));
        let (way, after) = match rng.u8(..10) {
            0..7 => (Way::Out, further),
            7 => (Way::Out, rng.u64(..HANDSHAKE)),
            _ => (Way::Back, rng.u64(..ANSWER)),
        };
        let (way, after) = if number == 0 { (Way::Out, HANDSHAKE + further) } else { (way, after) };
        Some(Trouble { way, after, fault })
    });
}

/// Two hundred cuts in one transfer.
pub fn cuts(seed: u64) -> Books {
    let count = times(200, 2000);
    let (mut trial, transfer) = prepared(seed, BULK);
    plan(&mut trial, transfer.stream, count, &[Fault::Reset, Fault::Close]);
    let books = survived(trial, transfer);
    assert!(books.interruptions >= count * 9 / 10, "{books:?}");
    assert!(books.at_byte >= count / 2, "{books:?}");
    books
}

/// Bytes that are not what they were: TLS finds every one.
pub fn flips(seed: u64) -> Books {
    let count = times(20, 200);
    let (mut trial, transfer) = prepared(seed, BULK / 2);
    plan(&mut trial, transfer.stream, count, &[Fault::Flip]);
    let books = survived(trial, transfer);
    assert!(books.interruptions >= count / 2 && books.at_byte >= count / 4, "{books:?}");
    books
}

/// One side hears that it is over, the other does not.
pub fn half_closes(seed: u64) -> Books {
    let count = times(20, 200);
    let (mut trial, transfer) = prepared(seed, BULK / 2);
    plan(&mut trial, transfer.stream, count, &[Fault::HalfClose]);
    let books = survived(trial, transfer);
    assert!(books.interruptions >= count / 2 && books.at_byte >= count / 4, "{books:?}");
    books
}

/// A black hole in the middle of the stream, then one in the handshake of the next connection.
pub fn hole(seed: u64) -> Books {
    let (mut trial, transfer) = prepared(seed, BULK / 4);
    let after = HANDSHAKE + trial.rng.u64(..transfer.stream / 2);
    let in_handshake = trial.rng.u64(..2000);
    trial.link.plan(move |number| match number {
        0 => Some(Trouble { way: Way::Out, after, fault: Fault::Hole }),
        1 => Some(Trouble { way: Way::Out, after: in_handshake, fault: Fault::Hole }),
        _ => None,
    });
    let books = survived(trial, transfer);
    // The second swallows the greeting, or what follows it: then the transfer was taken up once more.
    assert_eq!(books.interruptions, 2, "{books:?}");
    assert!((1..=2).contains(&books.at_byte), "{books:?}");
    books
}

/// A black hole that swallows what the receiver answers.
pub fn deaf(seed: u64) -> Books {
    let (mut trial, mut transfer) = prepared(seed, BULK / 4);
    trial.start();
    let wanted = trial.rng.u64(HANDSHAKE..transfer.stream / 2);
    let there = trial.during(&transfer, |trial| (trial.link.passed(Way::Out) >= wanted).then_some(()));
    assert!(there.is_some(), "the transfer was over too early");
    trial.link.mute(Way::Back);
    trial.interrupted(&mut transfer, 1, Cost::Connection);
    trial.arrives(&transfer);
    let books = trial.end();
    assert_eq!((books.at_byte, books.at_checkpoint), (1, 0), "{books:?}");
    books
}

/// A tenth of a second each way.
pub fn delay(seed: u64) -> Books {
    let (trial, transfer) = prepared(seed, BULK / 2);
    trial.link.set_manner(Manner { delay: Duration::from_millis(100), ..Manner::default() });
    let books = survived(trial, transfer);
    assert_eq!(books.at_byte, 0, "{books:?}");
    books
}

/// Everything that fits comes in pieces of one byte.
pub fn one_by_one(seed: u64) -> Books {
    let (trial, transfer) = prepared(seed, LITTLE);
    trial.link.set_manner(Manner { one_by_one: times(200_000, 2_000_000), ..Manner::default() });
    let books = survived(trial, transfer);
    assert_eq!(books.at_byte, 0, "{books:?}");
    books
}
