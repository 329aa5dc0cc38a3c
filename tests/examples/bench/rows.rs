//! The ways to ferry a snapshot that are compared. Each begins with taking a snapshot and ends when its replica is there.
//!
//! The snapshot is a new one each time, as in real life: what the page cache holds of the source's files or of an older snapshot's
//! is of no use to a send, whoever calls it. The images are in memory, so all rows pay the same small price for reading.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use snapferry_tests::btrfs;

use crate::{
    child::{Cost, Pipeline},
    data,
    pair::{Pair, Tuning},
    place::Place,
    ssh::{Cipher, Sshd},
};

/// A way to ferry, or another thing that takes its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// What the tools give on one machine: the measure of all others, without any network or check.
    Pipe,
    /// As scripts do it.
    Ssh,
    /// The same with the cipher that costs least.
    SshAes,
    /// As backup tools do it.
    ZstdSsh,
    /// Both agents, as they are configured if nobody says anything.
    Snapferry,
    /// Both agents, with the smallest window.
    SmallWindow,
    /// Both agents, and never a checkpoint.
    NoCheckpoints,
    /// Both agents, four times as many checkpoints.
    ManyCheckpoints,
    /// Only the kernel's send: the measure of the next.
    Discard,
    /// The sending agent's way to a checkpoint that the receiver has, as if it were the whole stream.
    FastForward,
}

impl Row {
    /// The ways to ferry, in the order of the table.
    pub const ALL: [Self; 5] = [Self::Pipe, Self::Ssh, Self::SshAes, Self::ZstdSsh, Self::Snapferry];

    /// As it is called on the command line.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "pipe" => Some(Self::Pipe),
            "ssh" => Some(Self::Ssh),
            "ssh-aes" => Some(Self::SshAes),
            "zstd" => Some(Self::ZstdSsh),
            "snapferry" => Some(Self::Snapferry),
            _ => None,
        }
    }

    /// As it stands in the table.
    pub fn title(self) -> &'static str {
        match self {
            Self::Pipe => "btrfs send | btrfs receive",
            Self::Ssh => "btrfs send | ssh btrfs receive",
            Self::SshAes => "the same with ssh -c aes128-gcm",
            Self::ZstdSsh => "btrfs send | zstd -1 | ssh ..",
            Self::Snapferry => "snapferry, everything on",
            Self::SmallWindow => "snapferry, window = \"4 MiB\"",
            Self::NoCheckpoints => "snapferry, no checkpoints",
            Self::ManyCheckpoints => "snapferry, one every 256 MiB",
            Self::Discard => "btrfs send > /dev/null",
            Self::FastForward => "snapferry, fast-forward",
        }
    }
}

/// What one run of a row took.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// From before the snapshot is taken until the replica is there.
    pub elapsed: Duration,
    /// CPU time of the sending programs.
    pub sending: Duration,
    /// CPU time of the receiving programs. None where nothing is received.
    pub receiving: Option<Duration>,
    /// The most memory of the sending agent, or of `btrfs send`, in bytes.
    pub sender_peak: u64,
    /// The most memory of the receiving agent, or of `btrfs receive`, in bytes. None where it cannot be asked.
    pub receiver_peak: Option<u64>,
}

/// Runs a row once and removes what it has made.
pub fn run(row: Row, place: &Place, programs: &Path, sshd: &Sshd) -> Sample {
    let receive = format!("btrfs receive '{}'", place.store().display());
    let agents = |tuning| snapferry(place, programs, tuning);
    let sample = match row {
        Row::Pipe => pipe(place),
        Row::Ssh => through_ssh(place, sshd, vec![sshd.client(Cipher::Default, &receive)]),
        Row::SshAes => through_ssh(place, sshd, vec![sshd.client(Cipher::Fastest, &receive)]),
        Row::ZstdSsh => {
            let there = sshd.client(Cipher::Default, &format!("zstd -q -dc | {receive}"));
            through_ssh(place, sshd, vec![program("zstd", &["-q", "-1", "-c"]), there])
        }
        Row::Snapferry => agents(Tuning::default()),
        Row::SmallWindow => agents(Tuning { window: Some("4 MiB"), ..Tuning::default() }),
        Row::NoCheckpoints => agents(Tuning { checkpoint: Some("1 TiB"), ..Tuning::default() }),
        Row::ManyCheckpoints => agents(Tuning { checkpoint: Some("256 MiB"), ..Tuning::default() }),
        Row::Discard => discard(place),
        Row::FastForward => fast_forward(place, programs),
    };
    place.clear();
    sample
}

fn pipe(place: &Place) -> Sample {
    let started = Instant::now();
    let costs =
        Pipeline::spawn(vec![send(place), program("btrfs", &["receive", place.store().to_str().unwrap()])]).finish();
    Sample {
        elapsed: started.elapsed(),
        sending: costs[0].cpu,
        receiving: Some(costs[1].cpu),
        sender_peak: costs[0].peak,
        receiver_peak: Some(costs[1].peak),
    }
}

fn through_ssh(place: &Place, sshd: &Sshd, mut stages: Vec<Command>) -> Sample {
    let before = sshd.cpu();
    let started = Instant::now();
    stages.insert(0, send(place));
    let costs = Pipeline::spawn(stages).finish();
    let elapsed = started.elapsed();
    Sample {
        elapsed,
        sending: costs.iter().map(|cost| cost.cpu).sum(),
        receiving: Some(sshd.cpu() - before),
        sender_peak: costs[0].peak,
        receiver_peak: None,
    }
}

fn snapferry(place: &Place, programs: &Path, tuning: Tuning) -> Sample {
    let pair = Pair::start(programs, place, tuning);
    let sample = cycle(&pair);
    pair.assert_published(&place.tree(), &[data::a_file(&place.tree())]);
    pair.stop();
    sample
}

fn discard(place: &Place) -> Sample {
    let mut send = send(place);
    send.args(["--proto", "2"]);
    let started = Instant::now();
    let cost = Pipeline::spawn(vec![send]).finish()[0];
    Sample {
        elapsed: started.elapsed(),
        sending: cost.cpu,
        receiving: None,
        sender_peak: cost.peak,
        receiver_peak: None,
    }
}

/// Kills the sender when most has gone, and lets the next one find the checkpoint.
fn fast_forward(place: &Place, programs: &Path) -> Sample {
    let pair = Pair::start(programs, place, Tuning { checkpoint: Some("64 MiB"), ..Tuning::default() });
    pair.interrupt(data::measure(&place.tree()).bytes * 9 / 10);
    let resumed = pair.resume();
    pair.assert_published(&place.tree(), &[data::a_file(&place.tree())]);
    pair.stop();
    let whole = resumed.stream_bytes as f64 / resumed.skipped_bytes as f64;
    Sample {
        elapsed: resumed.elapsed.mul_f64(whole),
        sending: resumed.cost.cpu,
        receiving: None,
        sender_peak: resumed.cost.peak,
        receiver_peak: None,
    }
}

/// One cycle of a pair that is there already.
pub fn cycle(pair: &Pair) -> Sample {
    let before = pair.receiver().cpu();
    let started = Instant::now();
    let Cost { cpu, peak } = pair.cycle();
    let elapsed = started.elapsed();
    Sample {
        elapsed,
        sending: cpu,
        receiving: Some(pair.receiver().cpu() - before),
        sender_peak: peak,
        receiver_peak: Some(pair.receiver().peak()),
    }
}

/// Takes a snapshot, at once, and returns what sends it.
fn send(place: &Place) -> Command {
    let snapshot = place.snapshots().join("snapshot");
    btrfs::snapshot(&place.tree(), &snapshot);
    program("btrfs", &["send", "-q", snapshot.to_str().unwrap()])
}

fn program(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(name);
    command.args(arguments);
    command
}
