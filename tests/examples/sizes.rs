//! How fast `snapferry-sender sizes` counts, and a filter removes: on small files, warm, in memory.
//!
//! `TMPDIR=/dev/shm cargo run --release -p snapferry-tests --example sizes [FILES]`, as root. The default is a million files: once
//! in four flat directories, as a guix cache is, and once in directories of a hundred files each.

// A benchmark that cannot do its work panics and says why.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};
use snapferry_tests::{
    btrfs,
    config::VOLUME,
    lab::Lab,
    programs::{self, SENDER},
};

const FILES: usize = 1_000_000;
/// Each is measured so often; the first time warms up.
const ROUNDS: u32 = 4;

fn main() {
    let files = std::env::args().nth(1).map_or(FILES, |count| count.parse().unwrap());
    let lab = Lab::new();
    let disk = lab.file_system("disk", 16 << 30, "noatime");
    for (shape, directories) in [("flat", 4), ("deep", files / 100)] {
        let source = disk.join(shape);
        btrfs::create(&source);
        fill(&source, files, directories);
        let config = configure(&lab, shape, &source);
        for arguments in [&["sizes"][..], &["sizes", "--on-disk"], &["sizes", "--exclude", "*7.x", "--max-age", "120d"]]
        {
            let taken = (0..ROUNDS).map(|_| time(&config, arguments)).skip(1);
            report(shape, &arguments.join(" "), files, taken.min().unwrap());
        }
        // Half of the names go; then there is nobody to send to.
        let filtered = filtered(&config);
        report(shape, "filter, half of the files removed", files, filtered);
    }
}

fn fill(source: &Path, files: usize, directories: usize) {
    for d in 0..directories {
        let path = source.join(format!("{}/{d}", d % 10));
        fs::create_dir_all(&path).unwrap();
        let directory = rustix::fs::open(&path, OFlags::PATH, Mode::empty()).unwrap();
        for i in 0..files / directories {
            let name = format!("{i:032}-package-{}.x", i % 10);
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(&directory, name, flags, Mode::RUSR).unwrap();
        }
    }
    btrfs::sync(source);
}

/// A configuration with a filter, and a receiver that is not there.
fn configure(lab: &Lab, shape: &str, source: &Path) -> PathBuf {
    let dir = lab.directory(&format!("etc-{shape}"));
    run(Command::new(programs::path(SENDER)).arg("keygen").arg(&dir));
    let file = dir.join("sender.toml");
    let snapshots = source.with_extension("snapshots");
    let pin = "0".repeat(64);
    let text = format!(
        "[agent]\nname = \"bench\"\nstate_dir = \"state\"\n[tls]\ncertificate = \"sender.crt\"\nprivate_key = \"sender.key\"\n\
         peers = [\"sha256:{pin}\"]\n[receiver]\naddress = \"127.0.0.1:9\"\n[[volume]]\nname = \"{VOLUME}\"\n\
         source = {source:?}\nsnapshot_dir = {snapshots:?}\nexclude = [\"*[02468].x\"]\n[log]\nformat = \"json\"\n"
    );
    fs::write(&file, text).unwrap();
    file
}

fn time(config: &Path, arguments: &[&str]) -> Duration {
    let start = Instant::now();
    run(Command::new(programs::path(SENDER)).arg("--config").arg(config).args(arguments));
    start.elapsed()
}

/// How long the filter took, as the log says.
fn filtered(config: &Path) -> Duration {
    let output = Command::new(programs::path(SENDER)).arg("--config").arg(config).args(["run", "--once"]).output();
    let log = String::from_utf8(output.unwrap().stderr).unwrap();
    let events = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let event = events.into_iter().find(|event| event["message"] == "filtered").unwrap_or_else(|| panic!("{log}"));
    Duration::from_secs_f64(event["seconds"].as_f64().unwrap())
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn report(shape: &str, what: &str, files: usize, taken: Duration) {
    let rate = files as f64 / taken.as_secs_f64();
    println!("{shape}  {what:<50} {:>7.2} s {rate:>9.0} files/s", taken.as_secs_f64());
}
