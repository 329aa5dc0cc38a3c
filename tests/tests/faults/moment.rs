//! Random moments of a transfer: early, around a checkpoint, anywhere in the stream, and at its end.

use std::{thread::sleep, time::Duration};

use snapferry_tests::{
    link::Way,
    trial::{Transfer, Trial},
};

/// Waits for a random moment of a transfer, of which `left` are wanted. False if the transfer is over before it comes.
pub fn wait(trial: &mut Trial, transfer: &Transfer, left: u64) -> bool {
    let jitter = |trial: &mut Trial, most: u64| sleep(Duration::from_micros(trial.rng.u64(..most * 1000)));
    match trial.rng.u8(..10) {
        // In the beginning: handshake, plan, fast-forward.
        0 | 1 => jitter(trial, 300),
        // Around a checkpoint.
        2 | 3 => {
            let checkpoints = |trial: &Trial| trial.receiver().log().all("checkpoint").len();
            let before = checkpoints(trial);
            if trial.during(transfer, |trial| (checkpoints(trial) > before).then_some(())).is_none() {
                return false;
            }
            jitter(trial, 30);
        }
        // At the end: verify, publish.
        4.. if left == 1 && trial.rng.bool() => {
            let verified = |trial: &Trial| !trial.receiver().log().all("verified").is_empty();
            if trial.during(transfer, |trial| verified(trial).then_some(())).is_none() {
                return false;
            }
            jitter(trial, 10);
        }
        _ => {
            let further = trial.rng.u64(..transfer.stream / 6);
            let wanted = trial.link.passed(Way::Out) + further;
            return trial.during(transfer, |trial| (trial.link.passed(Way::Out) >= wanted).then_some(())).is_some();
        }
    }
    true
}
