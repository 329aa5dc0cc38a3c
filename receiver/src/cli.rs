//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

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
    /// Show what retention would delete, and what keeps each of the others
    Prune {
        /// Only show it; the running agent is what deletes
        #[arg(long, required = true)]
        dry_run: bool,
    },
}
