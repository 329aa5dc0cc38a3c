//! snapferry-receiver: the agent on the mirror box.
//!
//! The path of the data, file by file: `listen` -> `session` (the conversation) -> `apply` (checks, `jail`, `receive`) ->
//! `verify` -> `publish` -> `retire` -> `rsyncd` (serve) -> `prune`. `space` says whether there is room for it. `volume` holds what
//! belongs together, `agent` runs it all.
//! Operators reach it through `control`; `operator` does what they ask for, `wishes` remembers it.

mod agent;
mod apply;
mod check;
mod checkpoint;
mod cli;
mod config;
mod control;
mod jail;
mod listen;
mod mount;
mod operator;
mod prune;
mod publish;
mod receive;
mod retire;
mod rsyncd;
mod segments;
mod session;
mod show;
mod space;
mod store;
mod verify;
mod volume;
mod wishes;

use std::{path::Path, process::ExitCode, time::Duration};

use clap::Parser;
use common::{
    bulk,
    exit::{Exit, complain},
    identity, lock, log,
    snapshot::{SnapshotName, VolumeName},
};

use crate::{
    agent::AgentError,
    cli::{Cli, Command},
    config::Config,
    control::ControlError,
    operator::Request,
    volume::VolumeError,
};

const PROGRAM: &str = "snapferry-receiver";

/// What may still run when the program ends: threads that wait for a kernel that does not answer. The kernel ends them with us.
const LAST_GRACE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    bulk::settle();
    let cli = Cli::parse();
    match cli.command {
        Command::Keygen { dir } => print(identity::keygen(&dir, "receiver", PROGRAM)),
        Command::Fingerprint { file } => print(identity::fingerprint(&file)),
        Command::Run => with_config(&cli.config, run),
        Command::Check => with_config(&cli.config, check::check),
        Command::Snapshots => with_config(&cli.config, |config| shown(show::snapshots(config))),
        Command::Hold { snapshot, why } => {
            with_config(&cli.config, |config| asked(config, &Request::Hold { snapshot, why }))
        }
        Command::Release { snapshot } => {
            with_config(&cli.config, |config| asked(config, &Request::Release { snapshot }))
        }
        Command::Publish { snapshot, pin, latest: _, volume } => {
            with_config(&cli.config, |config| publish(config, snapshot, pin, volume))
        }
        Command::Prune { dry_run: _ } => with_config(&cli.config, |config| shown(show::retention(config))),
    }
    .into()
}

fn print(fingerprint: Result<identity::Fingerprint, identity::IdentityError>) -> Exit {
    match fingerprint {
        Ok(fingerprint) => {
            println!("{fingerprint}");
            Exit::Done
        }
        Err(error) => failed(&error, Exit::Failed),
    }
}

fn with_config(file: &Path, work: impl FnOnce(&Config) -> Exit) -> Exit {
    match Config::load(file) {
        Ok(config) => work(&config),
        Err(error) => failed(&error, Exit::Usage),
    }
}

fn run(config: &Config) -> Exit {
    log::init(config.log.format, config.log.level);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, Exit::Failed),
    };
    let ran = runtime.block_on(agent::run(config));
    runtime.shutdown_timeout(LAST_GRACE);
    match ran {
        Ok(()) => Exit::Done,
        Err(error) => {
            let exit = match &error {
                AgentError::Volume { source: VolumeError::Lock(lock::LockError::Held { .. }), .. } => Exit::Held,
                AgentError::Credentials(_) => Exit::Usage,
                _ => Exit::Failed,
            };
            failed(&error, exit)
        }
    }
}

/// `publish NAME` or `publish --latest`, of the one volume unless it is named.
fn publish(config: &Config, snapshot: Option<SnapshotName>, pin: bool, volume: Option<VolumeName>) -> Exit {
    if let Some(snapshot) = snapshot {
        return asked(config, &Request::Publish { snapshot, pin });
    }
    match (volume, &config.volumes[..]) {
        (Some(volume), _) => asked(config, &Request::PublishLatest { volume }),
        (None, [only]) => asked(config, &Request::PublishLatest { volume: only.name.clone() }),
        (None, _) => {
            eprintln!("{PROGRAM}: there is more than one volume: say which with --volume NAME");
            Exit::Usage
        }
    }
}

fn asked(config: &Config, request: &Request) -> Exit {
    match control::request(config, request) {
        Ok(done) => {
            println!("{done}");
            Exit::Done
        }
        Err(error) => {
            let exit = match &error {
                ControlError::Volume(VolumeError::Lock(lock::LockError::Held { .. })) => Exit::Held,
                ControlError::NoVolume(_) => Exit::Usage,
                _ => Exit::Failed,
            };
            failed(&error, exit)
        }
    }
}

fn shown(shown: Result<(), show::ShowError>) -> Exit {
    shown.map_or_else(|error| failed(&error, Exit::Failed), |()| Exit::Done)
}

fn failed(error: &dyn std::error::Error, exit: Exit) -> Exit {
    complain(PROGRAM, error);
    exit
}
