//! snapferry-sender: the agent on the head node.
//!
//! The path of the data, file by file: `create` (snapshot) -> `plan` -> `send` (the kernel's stream) -> `pack` (frames) -> `push`
//! (the network) -> `prune`. `cycle` walks it once, `agent` again and again.

mod agent;
mod check;
mod cli;
mod compress;
mod config;
mod connect;
mod create;
mod cycle;
mod filter;
mod hazard;
mod pack;
mod plan;
mod prune;
mod push;
mod report;
mod retry;
mod send;
mod setup;
mod show;
mod sizes;
mod unsent;
mod walk;

use std::{io::IsTerminal, path::Path, process::ExitCode, time::Duration};

use clap::Parser;
use common::{
    bulk,
    exit::{Exit, complain},
    identity, lock, log,
};

use crate::{
    agent::OnceError,
    cli::{Cli, Command},
    config::Config,
    cycle::CycleError,
    report::Style,
    setup::SetupError,
    show::ShowError,
};

const PROGRAM: &str = "snapferry-sender";

/// What may still run when the program ends: threads that wait for a kernel that does not answer. The kernel ends them with us.
const LAST_GRACE: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    bulk::settle();
    let cli = Cli::parse();
    match cli.command {
        Command::Keygen { dir } => print(identity::keygen(&dir, "sender", PROGRAM)),
        Command::Fingerprint { file } => print(identity::fingerprint(&file)),
        Command::Run { once } => with_config(&cli.config, async |config| run(config, once).await),
        Command::Check => with_config(&cli.config, async |config| check::check(config).await),
        Command::Sizes(arguments) => with_config(&cli.config, async |config| sizes::sizes(config, &arguments)),
        Command::Plan => with_config(&cli.config, async |config| shown(show::plan(config).await)),
        Command::Snapshots => with_config(&cli.config, async |config| shown(show::snapshots(config).await)),
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

/// Reads the configuration and runs `work` with it.
fn with_config(file: &Path, work: impl AsyncFnOnce(&Config) -> Exit) -> Exit {
    let config = match Config::load(file) {
        Ok(config) => config,
        Err(error) => return failed(&error, Exit::Usage),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error, Exit::Failed),
    };
    let exit = runtime.block_on(work(&config));
    runtime.shutdown_timeout(LAST_GRACE);
    exit
}

async fn run(config: &Config, once: bool) -> Exit {
    log::init(config.log.format, config.log.level);
    if !once {
        return agent::run(config).await.map_or_else(|error| failed(&error, setup_exit(&error)), |()| Exit::Done);
    }
    let style = if std::io::stderr().is_terminal() { Style::Bar } else { Style::Log };
    match agent::run_once(config, style).await {
        Ok(()) => Exit::Done,
        Err(OnceError::Setup(error)) => failed(&error, setup_exit(&error)),
        // It stands in the log already.
        Err(OnceError::Cycle(error)) => cycle_exit(&error),
    }
}

fn shown(shown: Result<(), ShowError>) -> Exit {
    match shown {
        Ok(()) => Exit::Done,
        Err(ShowError::Setup(error)) => failed(&error, setup_exit(&error)),
        Err(ShowError::Cycle(error)) => failed(&error, cycle_exit(&error)),
    }
}

fn setup_exit(error: &SetupError) -> Exit {
    match error {
        SetupError::Lock(lock::LockError::Held { .. }) => Exit::Held,
        SetupError::Credentials(_) => Exit::Usage,
        _ => Exit::Failed,
    }
}

fn cycle_exit(error: &CycleError) -> Exit {
    match error {
        CycleError::Connect(_) => Exit::Peer,
        _ => Exit::Failed,
    }
}

fn failed(error: &dyn std::error::Error, exit: Exit) -> Exit {
    complain(PROGRAM, error);
    exit
}
