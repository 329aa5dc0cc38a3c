//! Processes that hang: an agent that is stopped for longer than the other one takes its silence for, a `btrfs receive` that does not go
//! on.

use rustix::process::Signal;
use snapferry_tests::{
    link::Way,
    measure::grow,
    trial::{Books, Cost, Transfer, Trial},
};

const BULK: u64 = 40_000_000;

/// A transfer that is somewhere in its middle.
fn in_the_middle(seed: u64) -> (Trial, Transfer) {
    let mut trial = Trial::new(seed);
    grow(trial.source(), seed, BULK);
    let transfer = trial.take();
    trial.start();
    let wanted = trial.rng.u64(transfer.stream / 10..transfer.stream / 2);
    let there = trial.during(&transfer, |trial| (trial.link.passed(Way::Out) >= wanted).then_some(()));
    assert!(there.is_some(), "the transfer was over too early");
    (trial, transfer)
}

/// The kernel's send does not survive that: interrupted in its write to the pipe it begins again from its start, in the middle of the
/// stream. That is seen, and the transfer goes on from its checkpoint.
pub fn sender(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    trial.sender().signal(Signal::STOP);
    trial.receiver().wait_for("connection lost");
    trial.sender().signal(Signal::CONT);
    trial.interrupted(&mut transfer, 1, Cost::Crash);
    trial.arrives(&transfer);
    let books = trial.end();
    assert!(books.at_byte + books.at_checkpoint > 0, "{books:?}");
    books
}

pub fn receiver(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    trial.receiver().signal(Signal::STOP);
    trial.sender().wait_for("connection lost");
    trial.receiver().signal(Signal::CONT);
    trial.interrupted(&mut transfer, 1, Cost::Connection);
    trial.arrives(&transfer);
    let books = trial.end();
    assert_eq!((books.at_byte, books.at_checkpoint), (1, 0), "{books:?}");
    books
}

/// It is named in the log; the connection stays, and when it goes on so does the transfer.
pub fn receive(seed: u64) -> Books {
    let (mut trial, mut transfer) = in_the_middle(seed);
    let stopped = trial.during(&transfer, |trial| trial.signal_receive(Signal::STOP).then_some(()));
    assert!(stopped.is_some(), "the transfer was over too early");
    let stalled = trial.receiver().wait_for("nothing moves");
    assert!(stalled.text("waits_for").starts_with("btrfs receive, pid "), "{stalled:?}");
    trial.sender().wait_for("nothing moves");
    assert!(trial.signal_receive(Signal::CONT));
    trial.interrupted(&mut transfer, 1, Cost::Connection);
    trial.arrives(&transfer);
    let books = trial.end();
    assert_eq!((books.at_byte, books.at_checkpoint), (0, 0), "{books:?}");
    books
}
