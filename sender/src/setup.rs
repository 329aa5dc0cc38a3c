//! From the configuration to volumes that can run: certificates read, directories made, locks held.

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64},
    },
};

use common::{
    btrfs::{self, Subvolume},
    deletion::{Deletions, Pace},
    lock::{Lock, LockError},
    tls::{Connector, Credentials, CredentialsError},
};

use crate::{config::Config, connect::Route, cycle::Volume};

/// Why the agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// Certificates, key, peers.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// A directory that the agent needs.
    #[error("cannot make the directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory of the snapshots is not there, and would be made in a wrong place.
    #[error(
        "snapshot_dir = {dir:?} does not exist, and where it would be made is not the file system of the subvolume source = {source_path:?}; \
         is that mounted?"
    )]
    NotMounted {
        /// As configured.
        dir: PathBuf,
        /// As configured.
        source_path: PathBuf,
    },
    /// Another agent holds the volume, or its lock cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[from] io::Error),
}

/// The volumes of the configuration.
///
/// # Errors
/// See [`SetupError`].
pub fn volumes(config: &Config) -> Result<Vec<Volume>, SetupError> {
    directory(&config.agent.state_dir)?;
    let credentials = Credentials::load(&config.tls.certificate, &config.tls.private_key)?;
    let volume = |volume: &crate::config::Volume| {
        snapshot_directory(volume)?;
        Ok(Volume {
            config: volume.clone(),
            route: Route {
                address: config.receiver.address.clone(),
                connect_timeout: config.receiver.connect_timeout,
                connector: Connector::new(&credentials, &config.tls.peers)?,
                agent: config.agent.name.clone(),
                reconnect_grace: config.receiver.reconnect_grace,
                window: config.receiver.window,
            },
            state_file: config.agent.state_dir.join(format!("{}.toml", volume.name)),
            progress_interval: config.log.progress_interval,
            resumed_at: AtomicU64::new(0),
            deletions: Deletions::new(&volume.snapshot_dir, &volume.name, Pace::default()),
            pruning: Arc::default(),
            warned_of: Mutex::default(),
            looked_for_hazards: AtomicBool::default(),
            counted: Mutex::default(),
        })
    };
    config.volumes.iter().map(volume).collect()
}

/// Takes the volume for this process. The lock lies beside the snapshots, so that two agents meet at it whatever their state
/// directories are.
///
/// # Errors
/// [`SetupError::Lock`].
pub fn hold(volume: &Volume) -> Result<Lock, SetupError> {
    let file = volume.config.snapshot_dir.join(format!(".{}.lock", volume.config.name));
    Ok(Lock::acquire(&file)?)
}

/// Makes the directory of the snapshots, but only where they belong: before the volume is mounted its path leads to another file system.
fn snapshot_directory(volume: &crate::config::Volume) -> Result<(), SetupError> {
    let dir = &volume.snapshot_dir;
    if dir.exists() {
        return Ok(());
    }
    let file_system_of = |path| btrfs::file_system(path).ok();
    let place = dir.ancestors().find(|path| path.exists()).and_then(file_system_of);
    let is_right =
        Subvolume::open(&volume.source).is_ok() && place.is_some() && place == file_system_of(&volume.source);
    if !is_right {
        return Err(SetupError::NotMounted { dir: dir.clone(), source_path: volume.source.clone() });
    }
    directory(dir)
}

fn directory(path: &PathBuf) -> Result<(), SetupError> {
    std::fs::create_dir_all(path).map_err(|source| SetupError::Directory { path: path.clone(), source })
}
