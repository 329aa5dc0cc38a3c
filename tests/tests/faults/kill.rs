//! kill -9 at random moments: of either agent, of both, of the `btrfs receive` child, in a full transfer and in an increment.

use std::{thread::sleep, time::Duration};

use rustix::process::Signal;
use snapferry_tests::{
    change,
    measure::grow,
    suite::times,
    tree,
    trial::{Books, Cost, Transfer, Trial},
};

use crate::moment;

/// Bytes of bulk in each transfer, beside every kind of file.
const BULK: u64 = 60_000_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
    Receive,
    Both,
}

pub fn sender(seed: u64) -> Books {
    survived(Victim::Sender, seed)
}

pub fn receiver(seed: u64) -> Books {
    survived(Victim::Receiver, seed)
}

pub fn receive(seed: u64) -> Books {
    survived(Victim::Receive, seed)
}

pub fn both(seed: u64) -> Books {
    survived(Victim::Both, seed)
}

fn survived(victim: Victim, seed: u64) -> Books {
    let mut trial = Trial::new(seed);
    tree::everything(trial.source(), seed);
    for increment in [false, true] {
        if increment {
            change::everything(trial.source(), seed);
        }
        // In one transfer after the other, as long as it takes: many kills in a short transfer would be many in its beginning.
        let mut left = times(10, 50);
        while left > 0 {
            let kills = left.min(10);
            let bulk = trial.rng.u64(..);
            grow(trial.source(), bulk, BULK);
            let mut transfer = trial.take();
            assert!(increment || transfer.base.is_none() || left < 50);
            trial.start_receiver();
            trial.start_sender();
            let struck = strike(&mut trial, &mut transfer, victim, kills);
            trial.interrupted(&mut transfer, struck, Cost::Crash);
            trial.arrives(&transfer);
            left -= kills;
        }
    }
    trial.end()
}

/// Kills so many times, or until the transfer is over.
fn strike(trial: &mut Trial, transfer: &mut Transfer, victim: Victim, kills: u64) -> u64 {
    for struck in 0..kills {
        if !moment::wait(trial, transfer, kills - struck) || !kill(trial, transfer, victim) {
            return struck;
        }
    }
    kills
}

/// Kills, and starts again what was killed. False if there was nobody to kill any more.
fn kill(trial: &mut Trial, transfer: &Transfer, victim: Victim) -> bool {
    let pause = Duration::from_millis(trial.rng.u64(..100));
    match victim {
        Victim::Receive => {
            return trial.during(transfer, |trial| trial.signal_receive(Signal::KILL).then_some(())).is_some();
        }
        Victim::Sender => trial.kill_sender(),
        Victim::Receiver => trial.kill_receiver(),
        Victim::Both if trial.rng.bool() => {
            trial.kill_sender();
            trial.kill_receiver();
        }
        Victim::Both => {
            trial.kill_receiver();
            trial.kill_sender();
        }
    }
    sleep(pause);
    if victim != Victim::Sender {
        trial.start_receiver();
    }
    if victim != Victim::Receiver {
        trial.start_sender();
    }
    true
}
