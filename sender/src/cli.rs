//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::sizes;

/// Takes read-only btrfs snapshots of volumes and sends the difference to snapferry-receiver.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad command line or configuration, \
    3 another agent holds this volume, 4 the peer cannot be reached or is not who it should be."
)]
pub struct Cli {
    /// The configuration
    #[arg(long, global = true, value_name = "FILE", default_value = "/etc/snapferry/sender.toml")]
    pub config: PathBuf,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the agent: a cycle of every volume each interval
    Run {
        /// Do one cycle of every volume and exit
        #[arg(long)]
        once: bool,
    },
    /// Say what is wrong with the configuration and with this machine
    Check,
    /// Make a key and a self-signed certificate, and print the certificate's fingerprint
    Keygen {
        /// Where sender.key and sender.crt go
        dir: PathBuf,
    },
    /// Print the fingerprint of a certificate
    Fingerprint {
        /// The certificate, PEM
        file: PathBuf,
    },
    /// Count what a volume would take on the mirror box, and what a filter would save, without sending anything
    Sizes(sizes::Arguments),
    /// Show what the next cycle would do, and why
    Plan,
    /// List our snapshots, and which of them the receiver has
    Snapshots,
}
