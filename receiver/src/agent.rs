//! The agent: volumes brought back, the door opened, the rsync daemon beside it, tidying in the background.

use std::{
    io,
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use common::{
    btrfs,
    exit::chain,
    signals,
    tls::{Acceptor, Credentials, CredentialsError},
};
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::interval,
};

use crate::{
    config::Config,
    control::Control,
    listen::Door,
    receive::{self, ReceiveError},
    rsyncd::{self, Rsyncd, RsyncdError},
    session::Host,
    volume::{Volume, VolumeError},
};

/// How often it is tried whether the last client of a former snapshot has left.
const RETIRE_INTERVAL: Duration = Duration::from_secs(2);

/// Why the agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Certificates, key, peers.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The state directory.
    #[error("cannot make the directory {path}")]
    Directory {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A volume.
    #[error("volume {volume}: {source}")]
    Volume {
        /// Which.
        volume: String,
        /// Why.
        source: VolumeError,
    },
    /// `btrfs` is missing.
    #[error(transparent)]
    Tool(#[from] ReceiveError),
    /// The door.
    #[error("cannot listen at {address}: {source}")]
    Listen {
        /// As configured.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// The socket for operators.
    #[error("cannot listen for operators at {path}: {source}")]
    Control {
        /// Where.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The rsync daemon.
    #[error(transparent)]
    Rsyncd(#[from] RsyncdError),
    /// Signals cannot be caught, or a thread died.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
}

/// Runs until a signal says stop.
///
/// # Errors
/// See [`AgentError`]; all of it is found before anything is accepted.
pub async fn run(config: &Config) -> Result<(), AgentError> {
    let shutdown = signals::shutdown_token().map_err(AgentError::Signals)?;
    let credentials = Credentials::load(&config.tls.certificate, &config.tls.private_key)?;
    let acceptor = Acceptor::new(&credentials, &config.tls.peers)?;
    let stream_version = receive::stream_version()?;
    let volumes = open_volumes(config)?;
    let control = Control::open(&config.agent.state_dir)
        .map_err(|source| AgentError::Control { path: Control::path(&config.agent.state_dir), source })?;
    let door = Door::open(&config.listen.address, acceptor, &config.agent.name)
        .await
        .map_err(|source| AgentError::Listen { address: config.listen.address.clone(), source })?;
    let rsync = Rsyncd::start(&config.rsync, &rsyncd::modules(&config.volumes), &config.agent.state_dir).await?;
    let address = door.address().map_or_else(|_| config.listen.address.clone(), |address| address.to_string());
    tracing::info!(address, volumes = volumes.len(), stream_version, "listening");
    let host = Arc::new(Host {
        volumes,
        stream_version,
        progress_interval: config.log.progress_interval,
        reconnect_grace: config.listen.reconnect_grace,
        parkings: AtomicU64::new(0),
        shutdown: shutdown.clone(),
        tidy: tokio::sync::Notify::new(),
    });
    let tidying = tokio::spawn(tidy(Arc::clone(&host)));
    let operators = tokio::spawn(control.serve(Arc::clone(&host)));
    door.serve(Arc::clone(&host)).await;
    for volume in &host.volumes {
        volume.abandon_parked().await;
    }
    // A deletion under way is not waited for: it goes on in the kernel, or is tried again after the next start.
    tidying.abort();
    operators.abort();
    rsync.stop().await;
    tracing::info!("stopped");
    Ok(())
}

fn open_volumes(config: &Config) -> Result<Vec<Arc<Volume>>, AgentError> {
    let state_dir = &config.agent.state_dir;
    std::fs::create_dir_all(state_dir).map_err(|source| AgentError::Directory { path: state_dir.clone(), source })?;
    let open = |volume: &crate::config::Volume| {
        // On no btrfs: that is an error of the next step.
        if btrfs::has_qgroups(&volume.store).unwrap_or_default() {
            tracing::warn!(
                volume = %volume.name,
                "quotas are on; deleting snapshots will be slow, and can stall (btrfs quota disable)"
            );
        }
        let opened = Volume::open(volume, state_dir).and_then(|volume| volume.catch_up().map(|()| volume));
        opened.map(Arc::new).map_err(|source| AgentError::Volume { volume: volume.name.to_string(), source })
    };
    config.volumes.iter().map(open).collect()
}

/// Retires and prunes: at the start, after every arrival and every word of an operator, and while clients are still inside a former
/// snapshot. A deletion is not waited for: one that does not end keeps neither the other volumes nor the clients of this one.
async fn tidy(host: Arc<Host>) {
    let mut ticks = interval(RETIRE_INTERVAL);
    let mut chores: Vec<Chores> = host.volumes.iter().map(Chores::new).collect();
    loop {
        for chores in &mut chores {
            chores.go_on().await;
        }
        tokio::select! {
            () = host.tidy.notified() => chores.iter_mut().for_each(|chores| chores.prune_due = true),
            _ = ticks.tick() => {}
        }
    }
}

/// What is to be tidied in a volume.
struct Chores {
    volume: Arc<Volume>,
    prune_due: bool,
    pruning: Option<JoinHandle<()>>,
}

impl Chores {
    fn new(volume: &Arc<Volume>) -> Self {
        Self { volume: Arc::clone(volume), prune_due: true, pruning: None }
    }

    async fn go_on(&mut self) {
        if self.volume.is_retiring() {
            let volume = Arc::clone(&self.volume);
            self.prune_due |= spawn_blocking(move || volume.retire()).await.unwrap_or(false);
        }
        if self.prune_due && self.pruning.as_ref().is_none_or(JoinHandle::is_finished) {
            self.prune_due = false;
            let volume = Arc::clone(&self.volume);
            self.pruning = Some(spawn_blocking(move || {
                if let Err(error) = volume.prune() {
                    tracing::warn!(volume = %volume.config.name, stage = "prune", error = chain(&error), "cannot tidy");
                }
            }));
        }
    }
}
