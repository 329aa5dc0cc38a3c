//! Where the two programs are.
//!
//! `cargo test` does not build the programs of other crates, and a test against yesterday's program is worse than none: so the
//! first test of a process asks cargo to bring them up to date. `SNAPFERRY_PROGRAMS=DIR` tests those of a directory instead, for
//! instance installed ones.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::lab::run;

/// The agent of the head node.
pub const SENDER: &str = "snapferry-sender";
/// The agent of the mirror box.
pub const RECEIVER: &str = "snapferry-receiver";

/// The path of a program, which is up to date.
#[must_use]
pub fn path(program: &str) -> PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| match std::env::var_os("SNAPFERRY_PROGRAMS") {
        Some(directory) => PathBuf::from(directory),
        None => build(),
    });
    let path = directory.join(program);
    assert!(path.is_file(), "{} is not there", path.display());
    path
}

/// Builds the programs with the profile that this test was built with, and says where they are.
fn build() -> PathBuf {
    // <target>/<profile>/deps/<test> or <target>/<profile>/examples/<example>
    let us = std::env::current_exe().unwrap();
    let directory = us.ancestors().nth(2).unwrap();
    let profile = if directory.ends_with("debug") { "dev" } else { directory.file_name().unwrap().to_str().unwrap() };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| env!("CARGO").into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    // The whole workspace, as tests/run.sh builds it: a part of it would be built with other features, once more.
    let what = ["build", "--quiet", "--workspace", "--bins", "--locked", "--profile", profile, "--target-dir"];
    let mut build = Command::new(cargo);
    build.args(what).arg(directory.parent().unwrap()).current_dir(workspace);
    // What cargo tells a test of its own package must not reach it again: some dependencies are built anew when it changes, so that
    // this build and the one around it would undo each other's work every time.
    let told = |name: &str| ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_"].iter().any(|part| name.starts_with(part));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_str().is_some_and(told)) {
        build.env_remove(name);
    }
    run(&mut build);
    directory.to_owned()
}
