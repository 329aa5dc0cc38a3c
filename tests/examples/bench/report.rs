//! The table, the goals, and whether this run has met them.

use std::time::Duration;

use crate::{
    data::Amount,
    rows::{Row, Sample},
};

const MB: u64 = 1_000_000;

/// A data set with its samples.
pub struct Measured {
    /// Of the data set.
    pub key: char,
    /// In words.
    pub title: String,
    /// How much is ferried.
    pub amount: Amount,
    /// In the order of the table.
    pub rows: Vec<(Row, Vec<Sample>)>,
}

impl Measured {
    fn samples(&self, row: Row) -> Option<&[Sample]> {
        self.rows.iter().find(|(of, _)| *of == row).map(|(_, samples)| samples.as_slice())
    }

    fn seconds(&self, row: Row) -> Option<f64> {
        self.samples(row).map(|samples| median(samples, |sample| sample.elapsed.as_secs_f64()))
    }

    /// How many times faster than `other` a row is.
    fn speed(&self, row: Row, other: Row) -> Option<f64> {
        Some(self.seconds(other)? / self.seconds(row)?)
    }

    fn peaks(&self, row: Row) -> Option<(f64, f64)> {
        let samples = self.samples(row)?;
        let sender = median(samples, |sample| sample.sender_peak as f64);
        Some((sender, median(samples, |sample| sample.receiver_peak.unwrap_or(0) as f64)))
    }
}

/// Prints the rows of a data set.
pub fn table(measured: &Measured) {
    let Measured { key, title, amount, rows } = measured;
    println!("\n{key}: {title} ({} files, {})", amount.files, decimal(amount.bytes));
    println!("{:31} {:>8} {:>13} {:>6}  {:>7} {:>9}  {:>9} {:>9}", "", "", "", "", "CPU", "s a GB", "peak", "RSS, MiB");
    println!(
        "{:31} {:>8} {:>13} {:>6}  {:>7} {:>9}  {:>9} {:>9}",
        "", "seconds", "min..max", "speed", "sending", "receiving", "sender", "receiver"
    );
    for (row, samples) in rows {
        let seconds = |sample: &Sample| sample.elapsed.as_secs_f64();
        let measure = [Row::Pipe, Row::NoCheckpoints, Row::Discard].into_iter().find_map(|row| measured.seconds(row));
        let speed = measure.map_or_else(|| "-".to_owned(), |of| format!("{:.2}", of / median(samples, seconds)));
        let least = samples.iter().map(seconds).fold(f64::INFINITY, f64::min);
        let most = samples.iter().map(seconds).fold(0.0, f64::max);
        let per_gb = |cpu: fn(&Sample) -> Option<Duration>| {
            // Of a few files it would say what starting a program costs.
            if amount.bytes < MB || samples.iter().any(|sample| cpu(sample).is_none()) {
                return "-".to_owned();
            }
            let seconds = median(samples, |sample| cpu(sample).unwrap_or_default().as_secs_f64());
            format!("{:.2}", seconds / amount.bytes as f64 * 1e9)
        };
        let receiver = samples.iter().filter_map(|sample| sample.receiver_peak).max();
        println!(
            "{:31} {:>8.2} {:>13} {:>6}  {:>7} {:>9}  {:>9.1} {:>9}",
            row.title(),
            median(samples, seconds),
            format!("{least:.2}..{most:.2}"),
            speed,
            per_gb(|sample| Some(sample.sending)),
            per_gb(|sample| sample.receiving),
            mib(samples.iter().map(|sample| sample.sender_peak).max().unwrap_or(0)),
            receiver.map_or_else(|| "-".to_owned(), |peak| format!("{:.1}", mib(peak))),
        );
    }
}

/// Prints the goals, and what this run has reached of each that it has measured.
pub fn goals(sets: &[Measured]) {
    let set = |key: char| sets.iter().find(|set| set.key == key);
    println!("\n{:70} {:>10}", "goal", "reached");
    let speed = |key, row, other| set(key).and_then(|set: &Measured| set.speed(row, other));
    let snapferry = |key, other| speed(key, Row::Snapferry, other);
    at_least("A: at least 0.85 times the speed of the plain pipe", 0.85, snapferry('A', Row::Pipe));
    at_least("A: at least 1.6 times the speed of ssh", 1.6, snapferry('A', Row::Ssh));
    at_least("B: at least 1.2 times the speed of the plain pipe", 1.2, snapferry('B', Row::Pipe));

    let ours = || {
        let of_pair = |row: Row| !matches!(row, Row::Pipe | Row::Ssh | Row::SshAes | Row::ZstdSsh | Row::Discard);
        sets.iter().flat_map(|set| &set.rows).filter(move |(row, _)| of_pair(*row)).flat_map(|(_, samples)| samples)
    };
    below_mib(
        "peak RSS of the sender below 128 MiB, all data sets",
        128.0,
        ours().map(|sample| sample.sender_peak).max(),
    );
    below_mib(
        "peak RSS of the receiver below 128 MiB, all data sets",
        128.0,
        ours().filter_map(|sample| sample.receiver_peak).max(),
    );
    let mut peaks = sets.iter().filter_map(|set| set.peaks(Row::SmallWindow));
    let pairs = peaks.next().zip(peaks.next());
    alike("C: peak RSS of the sender equal (10%) for few files and many", pairs.map(|(few, many)| (few.0, many.0)));
    alike("C: peak RSS of the receiver equal (10%) for few files and many", pairs.map(|(few, many)| (few.1, many.1)));

    let increment = set('D').and_then(|set| set.seconds(Row::Snapferry));
    verdict("D: an increment published in less than 2 s", increment.map(|s| (s < 2.0, format!("{s:.2} s"))));
    at_least(
        "E: with checkpoints at least 0.95 times the speed without",
        0.95,
        speed('E', Row::Snapferry, Row::NoCheckpoints),
    );
    at_least(
        "F: a fast-forward at least 0.9 times the speed of btrfs send",
        0.9,
        speed('F', Row::FastForward, Row::Discard),
    );
}

fn at_least(goal: &str, wanted: f64, reached: Option<f64>) {
    verdict(goal, reached.map(|reached| (reached >= wanted, format!("{reached:.2}"))));
}

fn below_mib(goal: &str, wanted: f64, reached: Option<u64>) {
    verdict(goal, reached.map(|bytes| (mib(bytes) < wanted, format!("{:.1} MiB", mib(bytes)))));
}

fn alike(goal: &str, reached: Option<(f64, f64)>) {
    verdict(
        goal,
        reached.map(|(few, many)| {
            ((many - few).abs() <= 0.1 * few.max(many), format!("{:+.1}%", (many / few - 1.0) * 100.0))
        }),
    );
}

fn verdict(goal: &str, reached: Option<(bool, String)>) {
    match reached {
        Some((met, reached)) => println!("{goal:70} {reached:>10} {:>13}", if met { "met" } else { "MISSED" }),
        None => println!("{goal:70} {:>10} {:>13}", "-", "not measured"),
    }
}

/// The one in the middle; of an even number the mean of the two there.
fn median(samples: &[Sample], of: impl Fn(&Sample) -> f64) -> f64 {
    let mut values: Vec<f64> = samples.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { f64::midpoint(values[middle - 1], values[middle]) }
}

fn decimal(bytes: u64) -> String {
    if bytes < MB { format!("{} kB", bytes / 1000) } else { format!("{:.1} MB", bytes as f64 / MB as f64) }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
