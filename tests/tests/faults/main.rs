//! Faults that must be survived: after each the replica equals the source, what is published was one complete snapshot at every
//! moment, nothing is left over, and no more went over the network than the stream, and for each fault what it may cost
//! (see [`snapferry_tests::trial::Cost`]).
//!
//! `SNAPFERRY_SEED=N` repeats a run as far as moments can be repeated; `SNAPFERRY_LONG=1` strikes more often, which takes a quarter of
//! an hour.

#![allow(clippy::unwrap_used)]

mod clock;
mod disk;
mod kill;
mod moment;
mod network;
mod operator;
mod power;
mod reboot;
mod source;
mod stop;

use std::process::ExitCode;

use snapferry_tests::{
    suite::{self, Scenario},
    trial::Books,
};

/// Scenarios at a time: some of them mostly wait.
const WIDTH: usize = 3;

const fn survives(name: &'static str, fault: &'static str, run: fn(u64) -> Books) -> Scenario {
    Scenario { name, fault, from_nothing: 0, run }
}

const fn loses(name: &'static str, fault: &'static str, from_nothing: u64, run: fn(u64) -> Books) -> Scenario {
    Scenario { name, fault, from_nothing, run }
}

/// The slowest first.
static SCENARIOS: &[Scenario] = &[
    survives("kill_receive", "kill -9 of btrfs receive", kill::receive),
    survives("stop_receive", "SIGSTOP of btrfs receive, until both say so", stop::receive),
    survives("hole", "black hole in the stream, then in a handshake", network::hole),
    survives("deaf", "black hole for what the receiver says", network::deaf),
    survives("stop_sender", "SIGSTOP of the sender, until the receiver gives it up", stop::sender),
    survives("stop_receiver", "SIGSTOP of the receiver, until the sender gives it up", stop::receiver),
    survives("other_bytes", "source written to, defragmented, balanced meanwhile", source::changes),
    survives("reboots", "mirror box reboots in each numbered step", reboot::reboots),
    survives("crashes", "receiver dies in each numbered step, clients stay", reboot::crashes),
    survives("power", "power cut of the mirror box", power::cuts),
    survives("kill_both", "kill -9 of both agents", kill::both),
    survives("kill_sender", "kill -9 of the sender", kill::sender),
    survives("kill_receiver", "kill -9 of the receiver", kill::receiver),
    survives("disk_full", "disk full until somebody makes room", disk::full),
    loses("snapshot_deleted", "sender's snapshot deleted", 1, operator::snapshot),
    loses("base_deleted", "sender's base deleted", 1, operator::base),
    loses("segment_deleted", "receiver's checkpoint deleted", 1, operator::checkpoint),
    loses("replica_deleted", "receiver's base, published, deleted", 1, operator::replica),
    survives("piece_deleted", "segment under way deleted", operator::segment),
    survives("clocks", "clocks hours apart, and set back", clock::apart),
    survives("cuts", "cuts at random bytes", network::cuts),
    survives("flips", "one bit flipped", network::flips),
    survives("half_closes", "half-closed connections", network::half_closes),
    survives("delay", "100 ms each way", network::delay),
    survives("one_by_one", "one byte at a time", network::one_by_one),
];

fn main() -> ExitCode {
    if suite::run(SCENARIOS, WIDTH) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
