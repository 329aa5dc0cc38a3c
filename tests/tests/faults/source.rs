//! Between an interruption and the next attempt the source goes on living: written to, defragmented, balanced. With reflinks in the
//! snapshot its second stream then has other bytes, and still goes on where the first one ended.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
};

use fastrand::Rng;
use snapferry_tests::{
    btrfs, change, lab,
    measure::{grow, stream_bytes, stream_digest},
    suite::times,
    tree,
    trial::{Books, Cost, Transfer, Trial},
};

use crate::moment;

const BULK: u64 = 30_000_000;

pub fn changes(seed: u64) -> Books {
    let mut trial = Trial::new(seed);
    tree::everything(trial.source(), seed);
    for increment in [false, true] {
        if increment {
            change::randomly(trial.source(), seed, 200);
        }
        let bulk = trial.rng.u64(..);
        grow(trial.source(), bulk, BULK);
        shared(trial.source(), bulk);
        let mut transfer = trial.take();
        trial.start();
        let first = digest(&trial, &transfer);
        let (mut struck, mut others) = (0, 0);
        for round in 0..times(4, 20) {
            if !in_the_middle(&mut trial, &transfer) {
                break;
            }
            trial.kill_sender();
            trial.kill_receiver();
            struck += 1;
            disturb(&mut trial, round);
            others += u64::from(digest(&trial, &transfer) != first);
            transfer.stream = transfer.stream.max(stream(&trial, &transfer));
            trial.start();
        }
        trial.interrupted(&mut transfer, struck, Cost::Crash);
        trial.arrives(&transfer);
        assert!(others > 0, "the second stream was the same: that shows nothing");
    }
    let books = trial.end();
    assert!(books.at_checkpoint > 0, "{books:?}");
    books
}

/// A random moment at which there is a checkpoint to go on from.
fn in_the_middle(trial: &mut Trial, transfer: &Transfer) -> bool {
    let stands = |trial: &Trial| !trial.receiver().log().all("checkpoint").is_empty();
    trial.during(transfer, |trial| stands(trial).then_some(())).is_some() && moment::wait(trial, transfer, 2)
}

/// Files whose extents are shared, wholly and in parts, among each other.
fn shared(source: &Path, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let dir = source.join(format!("shared-{seed:016x}"));
    fs::create_dir(&dir).unwrap();
    for number in 0..60 {
        let bytes = rng.usize(100_000..400_000);
        fs::write(dir.join(format!("{number}")), tree::random(&mut rng, bytes)).unwrap();
    }
    btrfs::sync(source);
    for number in 0..60 {
        for copy in 0..rng.u8(1..4) {
            let (from, to) = (dir.join(format!("{number}")), dir.join(format!("{number}-{copy}")));
            lab::run(Command::new("cp").arg("--reflink=always").args([&from, &to]));
        }
    }
    btrfs::sync(source);
}

/// What goes on at the head node meanwhile.
fn disturb(trial: &mut Trial, round: u64) {
    let source = trial.source().to_owned();
    match round % 4 {
        0 => overwrite(&source, &mut trial.rng),
        1 => {
            drop(lab::run(Command::new("btrfs").args(["-q", "filesystem", "defragment", "-r", "-czstd"]).arg(&source)));
        }
        2 => drop(lab::run(Command::new("btrfs").args(["-q", "balance", "start", "--full-balance"]).arg(&source))),
        _ => change::randomly(&source, round, 30),
    }
    btrfs::sync(&source);
}

/// Writes into the middle of every second file, and removes every seventh.
fn overwrite(dir: &Path, rng: &mut Rng) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            overwrite(&entry.path(), rng);
        } else if kind.is_file() && rng.u8(..7) == 0 {
            fs::remove_file(entry.path()).unwrap();
        } else if kind.is_file() && rng.bool() {
            let file = OpenOptions::new().write(true).open(entry.path()).unwrap();
            let middle = file.metadata().unwrap().len() / 2;
            file.write_all_at(&tree::random(rng, 5000), middle).unwrap();
        }
    }
}

fn digest(trial: &Trial, transfer: &Transfer) -> String {
    let dir = &trial.pair.places.snapshot_dir;
    stream_digest(&dir.join(&transfer.snapshot), transfer.base.as_ref().map(|base| dir.join(base)).as_deref())
}

fn stream(trial: &Trial, transfer: &Transfer) -> u64 {
    let dir = &trial.pair.places.snapshot_dir;
    stream_bytes(&dir.join(&transfer.snapshot), transfer.base.as_ref().map(|base| dir.join(base)).as_deref())
}
