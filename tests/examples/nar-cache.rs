//! Makes data for the demonstration and for benchmarks: the cache of a build farm.
//!
//! `nar-cache DIR MB SEED` adds packages of about that many MB in all; `nar-cache DIR --remove PERCENT SEED` removes some.

use std::{path::Path, process::ExitCode};

use snapferry_tests::nar;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        [dir, "--remove", percent, seed] => match (percent.parse(), seed.parse()) {
            (Ok(percent), Ok(seed)) => {
                nar::collect(Path::new(dir), percent, seed).map(|removed| format!("{removed} packages removed"))
            }
            _ => return usage(),
        },
        [dir, megabytes, seed] => match (megabytes.parse::<u64>(), seed.parse()) {
            (Ok(megabytes), Ok(seed)) => nar::grow(Path::new(dir), megabytes * 1_000_000, seed)
                .map(|grown| format!("{} packages added, {} MB", grown.items, grown.bytes / 1_000_000)),
            _ => return usage(),
        },
        _ => return usage(),
    };
    match done {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("nar-cache: {}: {error}", words[0]);
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: nar-cache DIR MB SEED | nar-cache DIR --remove PERCENT SEED");
    ExitCode::from(2)
}
