//! Another time of day for some processes. There are no namespaces for that clock, so they get another `clock_gettime`.

use std::{fs, path::PathBuf, process::Command};

use crate::lab::{self, Lab};

/// What shifts the clock of the programs that are started with [`Clock::shifted`].
#[derive(Debug)]
pub struct Clock(PathBuf);

impl Clock {
    /// Builds the library, in a lab.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        let (source, library) = (lab.path().join("clock.c"), lab.path().join("clock.so"));
        fs::write(&source, include_str!("clock.c")).unwrap();
        lab::run(Command::new("cc").args(["-shared", "-fPIC", "-O2", "-o"]).args([&library, &source]));
        Self(library)
    }

    /// The environment of a program whose clock is ahead by so many seconds.
    #[must_use]
    pub fn shifted(&self, seconds: i64) -> Vec<(&'static str, String)> {
        vec![("LD_PRELOAD", self.0.to_str().unwrap().to_owned()), ("SNAPFERRY_TEST_CLOCK", seconds.to_string())]
    }
}

/// The time of day in the names of snapshots, ahead by so many seconds.
#[must_use]
pub fn stamp(ahead: i64) -> String {
    lab::run(Command::new("date").args(["-u", "-d", &format!("{ahead} seconds"), "+%Y%m%dT%H%M%SZ"])).trim().to_owned()
}
