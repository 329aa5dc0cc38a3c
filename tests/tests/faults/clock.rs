//! Clocks that are hours apart, and one that is set back between two snapshots: the order is that of the file system's transactions.

use snapferry_tests::{
    clock::{Clock, stamp},
    measure::grow,
    trial::{Books, Cost, Trial},
};

use crate::moment;

const HOUR: i64 = 3600;
const BULK: u64 = 20_000_000;

/// The sender's clock and the receiver's, in hours, in each transfer.
const CLOCKS: [(i64, i64); 4] = [(5, -7), (-3, 2), (-8, 12), (11, -12)];

pub fn apart(seed: u64) -> Books {
    let mut trial = Trial::new(seed);
    let clock = Clock::new(&trial.pair.lab);
    for (sender, receiver) in CLOCKS {
        trial.sender_environment = clock.shifted(sender * HOUR);
        trial.receiver_environment = clock.shifted(receiver * HOUR);
        let bulk = trial.rng.u64(..);
        grow(trial.source(), bulk, BULK);
        let mut transfer = trial.take();
        let taken = transfer.snapshot.rsplit('.').next().unwrap();
        let (earliest, latest) = (stamp(sender * HOUR - 600), stamp(sender * HOUR + 600));
        assert!(*earliest < *taken && *taken < *latest, "{taken} is not of a clock that is {sender} hours ahead");
        trial.start();
        if moment::wait(&mut trial, &transfer, 2) {
            trial.kill_receiver();
            trial.start_receiver();
            trial.interrupted(&mut transfer, 1, Cost::Crash);
        }
        if moment::wait(&mut trial, &transfer, 2) {
            trial.kill_sender();
            trial.start_sender();
            trial.interrupted(&mut transfer, 1, Cost::Crash);
        }
        trial.arrives(&transfer);
    }
    trial.end()
}
