//! How fast the pair is and what it takes, beside the other ways to ferry a snapshot, all in one run. `tests/bench.sh` builds and
//! calls it.
//!
//! Not a test: it prints, and fails only if something could not be run. The rows are interleaved, so that whatever else the machine
//! does meets all of them; what counts are the ratios.

// A benchmark that cannot do its work panics and says why.
#![allow(clippy::unwrap_used)]

mod child;
mod data;
mod pair;
mod place;
mod report;
mod rows;
mod ssh;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use crate::{
    data::Amount,
    pair::{Pair, Tuning},
    place::Place,
    report::Measured,
    rows::{Row, Sample},
    ssh::Sshd,
};

const USAGE: &str = "usage: tests/bench.sh [--quick] [--rounds N] [--sets ABCDEF] [--rows pipe,ssh,ssh-aes,zstd,snapferry]
  --quick    little data and one round: shows that the benchmark works, and nothing else
  --rounds   how often each row is run; the median counts (3)
  --sets     A nar-like data, B 100,000 small files, C the memory for these and for as much in 1,000, D increments of a large tree,
             E what checkpoints cost, F how fast a fast-forward is
  --rows     the ways to ferry A and B";

/// All data sets.
const SETS: &str = "ABCDEF";

/// What was asked for.
struct Options {
    rounds: u32,
    sets: String,
    rows: Vec<Row>,
    sizes: Sizes,
}

/// How much data there is.
struct Sizes {
    nar_bytes: u64,
    many_files: u64,
    few_files: u64,
    tree_files: u64,
}

const FULL: Sizes = Sizes { nar_bytes: 2_500_000_000, many_files: 100_000, few_files: 1_000, tree_files: 200_000 };
const QUICK: Sizes = Sizes { nar_bytes: 200_000_000, many_files: 5_000, few_files: 1_000, tree_files: 10_000 };

/// Files that an increment changes.
const CHANGES: u64 = 10;

fn main() -> ExitCode {
    let Some(options) = options(env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let programs = env::var_os("SNAPFERRY_PROGRAMS").expect("SNAPFERRY_PROGRAMS says where the agents are").into();
    let bench = Bench { options, programs, sshd: Sshd::start(&env::temp_dir().join("ssh")) };
    println!("{}", machine());
    let mut sets = Vec::new();
    for set in bench.options.sets.chars() {
        let measured = match set {
            'A' => vec![bench.nar_like()],
            'B' => vec![bench.many_files()],
            'C' => bench.memory().into(),
            'D' => vec![bench.increments()],
            'E' => vec![bench.checkpoints()],
            _ => vec![bench.fast_forward()],
        };
        measured.iter().for_each(report::table);
        sets.extend(measured);
    }
    report::goals(&sets);
    ExitCode::SUCCESS
}

fn options(mut words: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options { rounds: 3, sets: SETS.to_owned(), rows: Row::ALL.to_vec(), sizes: FULL };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--quick" => (options.sizes, options.rounds) = (QUICK, 1),
            "--rounds" => options.rounds = words.next()?.parse().ok().filter(|rounds| *rounds > 0)?,
            "--sets" => options.sets = words.next().filter(|sets| sets.chars().all(|set| SETS.contains(set)))?,
            "--rows" => options.rows = words.next()?.split(',').map(Row::named).collect::<Option<_>>()?,
            _ => return None,
        }
    }
    Some(options)
}

/// What it is measured on: numbers without it say little.
fn machine() -> String {
    let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("")
        .trim_start_matches(['\t', ':', ' ']);
    let load = read("/proc/loadavg");
    format!(
        "Linux {}, {} cores {model}, {}, load {} before the start",
        read("/proc/sys/kernel/osrelease").trim(),
        std::thread::available_parallelism().map_or(0, usize::from),
        child::run("btrfs", &["--version"]).lines().next().unwrap_or(""),
        load.split(' ').next().unwrap_or(""),
    )
}

/// All that is needed to measure.
struct Bench {
    options: Options,
    programs: PathBuf,
    sshd: Sshd,
}

impl Bench {
    fn nar_like(&self) -> Measured {
        self.nars(('A', "nar-like data"), &self.options.rows)
    }

    fn many_files(&self) -> Measured {
        self.texts(('B', "many small files"), self.options.sizes.many_files, data::SMALL_BYTES, &self.options.rows)
    }

    /// Few files and then many, so large that either transfer goes on for seconds: the memory differs only if it depends on their
    /// number. With the smallest window: how much is in a large one, or in any for a moment, depends on how fast the receiver is.
    fn memory(&self) -> [Measured; 2] {
        let Sizes { few_files, many_files, .. } = self.options.sizes;
        let few_bytes = 10 * many_files * data::SMALL_BYTES / few_files;
        [
            self.texts(('C', "few files, for the memory"), few_files, few_bytes, &[Row::SmallWindow]),
            self.texts(('C', "many files, for the memory"), many_files, data::SMALL_BYTES, &[Row::SmallWindow]),
        ]
    }

    fn checkpoints(&self) -> Measured {
        let rows = [Row::NoCheckpoints, Row::ManyCheckpoints, Row::Snapferry];
        self.nars(('E', "checkpoints: none, every 256 MiB, and every 1 GiB as is the default"), &rows)
    }

    fn fast_forward(&self) -> Measured {
        self.nars(('F', "how fast a sender is back where it was interrupted"), &[Row::Discard, Row::FastForward])
    }

    fn nars(&self, title: (char, &str), rows: &[Row]) -> Measured {
        let bytes = self.options.sizes.nar_bytes;
        self.full(title, bytes * 3 / 2 + GIB, |root| data::nar_like(root, bytes), rows)
    }

    /// So many files of `bytes` each.
    fn texts(&self, title: (char, &str), files: u64, bytes: u64, rows: &[Row]) -> Measured {
        let room = room(files) + files * bytes * 3 / 2;
        self.full(title, room, |root| data::texts(root, files, bytes), rows)
    }

    /// Measures full sends of a tree, rows in turn.
    fn full(
        &self,
        (key, title): (char, &str),
        room: u64,
        fill: impl FnOnce(&Path) -> Amount,
        rows: &[Row],
    ) -> Measured {
        let place = Place::new(room);
        let amount = fill(&place.tree());
        place.sync();
        // What the images need of memory is had with the first use of them: that counts for nobody.
        rows::run(Row::Pipe, &place, &self.programs, &self.sshd);
        let mut measured: Vec<(Row, Vec<Sample>)> = rows.iter().map(|row| (*row, Vec::new())).collect();
        for round in 1..=self.options.rounds {
            for (row, samples) in &mut measured {
                let sample = rows::run(*row, &place, &self.programs, &self.sshd);
                progress(key, round, *row, &sample);
                samples.push(sample);
            }
        }
        Measured { key, title: title.to_owned(), amount, rows: measured }
    }

    /// Measures increments: a pair that has published the whole tree, then a few changes each time.
    fn increments(&self) -> Measured {
        let files = self.options.sizes.tree_files;
        let place = Place::new(room(files));
        data::texts(&place.tree(), files, data::SMALL_BYTES);
        place.sync();
        let pair = Pair::start(&self.programs, &place, Tuning::default());
        progress('D', 0, Row::Snapferry, &rows::cycle(&pair));
        let mut samples = Vec::new();
        for round in 1..=self.options.rounds {
            let changed = data::change(&place.tree(), files, CHANGES, round.into());
            let sample = rows::cycle(&pair);
            pair.assert_published(&place.tree(), &changed);
            progress('D', round, Row::Snapferry, &sample);
            samples.push(sample);
        }
        pair.stop();
        Measured {
            key: 'D',
            title: format!("increments of {CHANGES} changed files in a tree of {files}"),
            amount: Amount { files: CHANGES, bytes: CHANGES * data::SMALL_BYTES },
            rows: vec![(Row::Snapferry, samples)],
        }
    }
}

const GIB: u64 = 1 << 30;

/// Bytes of a file system for so many small files: they lie in the metadata, of which there are two copies.
fn room(files: u64) -> u64 {
    GIB + files * 20_000
}

fn progress(key: char, round: u32, row: Row, sample: &Sample) {
    let round = if round == 0 { "first".to_owned() } else { format!("round {round}") };
    eprintln!("{key} {round}: {:31} {:.2} s", row.title(), sample.elapsed.as_secs_f64());
}
