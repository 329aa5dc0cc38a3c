//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use common::snapshot::{SnapshotName, VolumeName};

/// A reason is a sentence, not a document.
const MAX_WHY_BYTES: usize = 512;

/// Receives btrfs snapshots from snapferry-sender, publishes them without a gap and serves them by rsync.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad command line or configuration, \
    3 another agent holds this volume, 4 the peer cannot be reached or is not who it should be."
)]
pub struct Cli {
    /// The configuration
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/snapferry/receiver.toml")]
    pub config: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent, with the rsync daemon under it
    Run,
    /// Say what is wrong with the configuration and with this machine
    Check,
    /// Make a key and a self-signed certificate, and print the certificate's fingerprint
    Keygen {
        /// Where receiver.key and receiver.crt go
        dir: PathBuf,
    },
    /// Print the fingerprint of a certificate
    Fingerprint {
        /// The certificate, PEM
        file: PathBuf,
    },
    /// List the snapshots, with the state of each
    Snapshots,
    /// Never delete a snapshot, until it is released
    Hold {
        /// As `snapshots` lists it
        #[arg(value_name = "NAME")]
        snapshot: SnapshotName,
        /// Why, for whoever reads `snapshots` later
        #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT", value_parser = sentence)]
        why: String,
    },
    /// Let retention decide about a held snapshot again
    Release {
        /// As `snapshots` lists it
        #[arg(value_name = "NAME")]
        snapshot: SnapshotName,
    },
    /// Publish a snapshot by name, also an older one; the next transfer is published again
    Publish {
        /// As `snapshots` lists it
        #[arg(value_name = "NAME", required_unless_present = "latest")]
        snapshot: Option<SnapshotName>,
        /// It stays published: what arrives is kept, but not published
        #[arg(long, conflicts_with = "latest")]
        pin: bool,
        /// Publish the newest, and again whatever arrives
        #[arg(long, conflicts_with = "snapshot")]
        latest: bool,
        /// Of which volume, if there is more than one
        #[arg(long, requires = "latest", value_name = "NAME")]
        volume: Option<VolumeName>,
    },
    /// Show what retention would delete, and what keeps each of the others
    Prune {
        /// Only show it; the running agent is what deletes
        #[arg(long, required = true)]
        dry_run: bool,
    },
}

/// One line of text: it is printed in tables.
fn sentence(text: &str) -> Result<String, String> {
    if text.len() > MAX_WHY_BYTES || text.contains(char::is_control) {
        return Err(format!("one line of at most {MAX_WHY_BYTES} bytes"));
    }
    Ok(text.to_owned())
}
