//! Runs the scenarios of a suite side by side, each with a seed of its own, and prints what came of them as one table.
//!
//! The runner of the standard library says for each test only whether it passed.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use crate::trial::Books;

/// The seed of the version of every day.
const EVERYDAY_SEED: u64 = 20_261_122;

/// The variable that sets the seed of everything random.
pub const SEED: &str = "SNAPFERRY_SEED";
/// The variable that asks for the version that takes hours.
pub const LONG: &str = "SNAPFERRY_LONG";

/// A fault and what shows that it is survived.
pub struct Scenario {
    /// Its name, also what a filter on the command line is compared with.
    pub name: &'static str,
    /// What the table calls the fault.
    pub fault: &'static str,
    /// How many times a transfer may begin from nothing in spite of a checkpoint: where that is the point.
    pub from_nothing: u64,
    /// Shows it, with everything random from this seed.
    pub run: fn(seed: u64) -> Books,
}

/// How a scenario ended.
struct Result {
    scenario: &'static Scenario,
    books: Option<Books>,
    took: Duration,
}

/// Whether the version that takes hours is wanted.
#[must_use]
pub fn is_long() -> bool {
    std::env::var_os(LONG).is_some_and(|value| value == "1")
}

/// One number for the version of every day, another for the long one.
#[must_use]
pub fn times(short: u64, long: u64) -> u64 {
    if is_long() { long } else { short }
}

/// Runs the scenarios that the command line asks for, `width` at a time unless it says otherwise, prints the table, and tells
/// whether all is well.
#[must_use]
pub fn run(scenarios: &'static [Scenario], width: usize) -> bool {
    let asked = Asked::from_command_line(width);
    if asked.list {
        scenarios.iter().for_each(|scenario| println!("{}: test", scenario.name));
        return true;
    }
    // Every day the same, so that a failure is news; the long version looks elsewhere each time.
    let default = || if is_long() { fastrand::u64(..) } else { EVERYDAY_SEED };
    let seed = std::env::var(SEED).ok().map_or_else(default, |seed| seed.parse().unwrap());
    let wanted: VecDeque<_> = scenarios.iter().filter(|scenario| asked.wants(scenario.name)).collect();
    println!("\nrunning {} tests, {} at a time; {SEED}={seed} repeats them\n", wanted.len(), asked.width);
    let (waiting, results) = (Mutex::new(wanted), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..asked.width {
            scope.spawn(|| {
                loop {
                    let next = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                    let Some(scenario) = next else { return };
                    let result = judge(scenario, seed);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|result| scenarios.iter().position(|scenario| scenario.name == result.scenario.name));
    print(&results);
    let failed: Vec<_> = results.iter().filter(|result| result.books.is_none()).collect();
    if !failed.is_empty() {
        println!("\nfailures:");
        failed.iter().for_each(|result| println!("    {}", result.scenario.name));
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    let (passed, out) = (results.len() - failed.len(), scenarios.len() - results.len());
    println!("\ntest result: {verdict}. {passed} passed; {} failed; {out} filtered out\n", failed.len());
    failed.is_empty()
}

fn judge(scenario: &'static Scenario, seed: u64) -> Result {
    let seed = scenario.name.bytes().fold(seed, |seed, byte| seed.rotate_left(5) ^ u64::from(byte));
    let begun = Instant::now();
    let judged = catch_unwind(AssertUnwindSafe(|| {
        let books = (scenario.run)(seed);
        let (found, most) = (books.from_nothing, scenario.from_nothing);
        assert!(found <= most, "{found} times from nothing in spite of a checkpoint, not {most}: {books:?}");
        books
    }));
    let took = begun.elapsed();
    let verdict = if judged.is_ok() { "ok" } else { "FAILED" };
    println!("test {} ... {verdict} ({} s)", scenario.name, took.as_secs());
    Result { scenario, books: judged.ok(), took }
}

fn print(results: &[Result]) {
    let head = ["fault", "transfers", "faults", "at byte", "at mark", "at 0", "MB", "MB again", "s"];
    println!(
        "\n{:54} {:>9} {:>6} {:>7} {:>7} {:>4} {:>6} {:>8} {:>4}",
        head[0], head[1], head[2], head[3], head[4], head[5], head[6], head[7], head[8]
    );
    for Result { scenario, books, took } in results {
        let Some(books) = books else {
            println!("{:54} FAILED", scenario.fault);
            continue;
        };
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        println!(
            "{:54} {:>9} {:>6} {:>7} {:>7} {:>4} {:>6.0} {:>8.1} {:>4}",
            scenario.fault,
            books.transfers,
            books.interruptions,
            books.at_byte,
            books.at_checkpoint,
            books.from_nothing,
            megabytes(books.stream),
            megabytes(books.network.saturating_sub(books.stream)),
            took.as_secs()
        );
    }
    println!(
        "at byte: went on in a new connection; at mark: went on behind a checkpoint; at 0: began again in spite of a checkpoint;\n\
         MB: of the streams; MB again: what went over the network beyond that, TLS and greetings included"
    );
}

/// What the command line asks for, in the words of the standard runner as far as they make sense here.
struct Asked {
    filters: Vec<String>,
    exact: bool,
    list: bool,
    width: usize,
}

impl Asked {
    fn from_command_line(width: usize) -> Self {
        let mut asked = Self { filters: Vec::new(), exact: false, list: false, width };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.split_once('=').unwrap_or((&argument, "")) {
                ("--exact", _) => asked.exact = true,
                ("--list", _) => asked.list = true,
                ("--test-threads", "") => asked.width = arguments.next().and_then(|n| n.parse().ok()).unwrap_or(width),
                ("--test-threads", n) => asked.width = n.parse().unwrap_or(width),
                // Nothing is captured, nothing is ignored.
                (option, _) if option.starts_with('-') => {}
                _ => asked.filters.push(argument),
            }
        }
        asked
    }

    fn wants(&self, name: &str) -> bool {
        let matches = |filter: &String| if self.exact { name == filter } else { name.contains(filter.as_str()) };
        self.filters.is_empty() || self.filters.iter().any(matches)
    }
}
