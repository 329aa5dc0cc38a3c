//! receiver.toml: raw as it stands in the file, then legal by construction.

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use common::{
    config::{
        Agent, ConfigError, HostPort, Log, RawAgent, RawKeep, RawLog, RawPath, RawTls, Source, Spanned, Tls, Wrong,
        all_different, at_least, at_least_bytes,
    },
    retention::Policy,
    size::{ByteSize, Span},
    snapshot::VolumeName,
};
use serde::{Deserialize, Deserializer};

/// Where state is kept unless the file says otherwise.
const STATE_DIR: &str = "/var/lib/snapferry-receiver";

/// Less than this, and transaction commits would be what a transfer mostly does: about three a checkpoint.
const LEAST_CHECKPOINT: u64 = 1 << 20;
const DEFAULT_CHECKPOINT: u64 = 1 << 30;

/// What stays free unless the file says otherwise is at most so much: more than the agent, its rsync daemon and a busy log write in
/// the hours that it takes somebody to look.
const MAX_AUTO_RESERVE: u64 = 10 << 30;

/// Less than this is a slip of the pen: no snapshot fits.
const LEAST_MAX_SIZE: u64 = 1 << 20;

/// receiver.toml
#[derive(Debug, Clone)]
pub struct Config {
    /// `[agent]`
    pub agent: Agent,
    /// `[tls]`
    pub tls: Tls,
    /// `[listen]`
    pub listen: Listen,
    /// `[[volume]]`, at least one.
    pub volumes: Vec<Volume>,
    /// `[rsync]`
    pub rsync: Rsync,
    /// `[log]`
    pub log: Log,
}

/// `[listen]`
#[derive(Debug, Clone)]
pub struct Listen {
    /// `address:port`
    pub address: String,
    /// How long a transfer whose connection broke waits for its sender, before it falls back to its checkpoint.
    pub reconnect_grace: Duration,
}

/// `[[volume]]`
#[derive(Debug, Clone)]
pub struct Volume {
    /// The volume's name, the same on the sender; also the name of the rsync module.
    pub name: VolumeName,
    /// Where received snapshots are: a directory on btrfs.
    pub store: PathBuf,
    /// The directory that belongs to the agent and holds `live/tree`.
    pub publish: PathBuf,
    /// Which snapshots stay here.
    pub keep: Policy,
    /// A running transfer makes a checkpoint every so many bytes of the stream,
    pub checkpoint: u64,
    /// or every so often, whichever comes first.
    pub checkpoint_interval: Duration,
    /// What transfers leave free on the file system.
    pub reserve: Reserve,
    /// What the data of all snapshots here may take together, in bytes.
    pub max_size: Option<u64>,
}

/// What stays free on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reserve {
    /// A twentieth of it, at most [`MAX_AUTO_RESERVE`].
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl Reserve {
    /// In bytes, on a file system of `total`.
    pub fn bytes(self, total: u64) -> u64 {
        match self {
            Self::Auto => (total / 20).min(MAX_AUTO_RESERVE),
            Self::Bytes(bytes) => bytes,
        }
    }
}

impl<'de> Deserialize<'de> for Reserve {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.parse()
            .map(|ByteSize(bytes)| Self::Bytes(bytes))
            .map_err(|error| serde::de::Error::custom(format_args!("reserve is \"auto\" or a size; {error}")))
    }
}

/// `[rsync]`
#[derive(Debug, Clone)]
pub struct Rsync {
    /// Who runs the daemon.
    pub mode: RsyncMode,
    /// Where it listens.
    pub address: IpAddr,
    /// Where it listens.
    pub port: u16,
    /// As whom it reads the files.
    pub user: String,
    /// A client that says nothing for so long is sent away.
    pub timeout: Duration,
    /// Clients at a time; 0 for any number.
    pub max_connections: u32,
}

/// Who runs the rsync daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RsyncMode {
    /// The agent.
    #[default]
    Supervised,
    /// Somebody else, with the configuration that the agent writes.
    External,
    /// Nobody.
    Off,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    agent: RawAgent,
    tls: Spanned<RawTls>,
    #[serde(default)]
    listen: RawListen,
    volume: Spanned<Vec<RawVolume>>,
    #[serde(default)]
    rsync: RawRsync,
    #[serde(default)]
    log: RawLog,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [listen]")]
struct RawListen {
    address: Option<HostPort>,
    reconnect_grace: Option<Spanned<Span>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section [[volume]]")]
struct RawVolume {
    name: Spanned<VolumeName>,
    store: RawPath,
    publish: Spanned<RawPath>,
    keep: Option<Spanned<RawKeep>>,
    checkpoint: Option<Spanned<ByteSize>>,
    checkpoint_interval: Option<Spanned<Span>>,
    #[serde(default)]
    reserve: Reserve,
    max_size: Option<Spanned<ByteSize>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [rsync]")]
struct RawRsync {
    #[serde(default)]
    mode: RsyncMode,
    address: Option<Address>,
    port: Option<Spanned<i64>>,
    user: Option<Spanned<String>>,
    timeout: Option<Spanned<Span>>,
    max_connections: Option<u32>,
}

/// An IP address, an IPv6 one with or without brackets.
struct Address(IpAddr);

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(&text);
        bare.parse().map(Self).map_err(|_| {
            serde::de::Error::custom(format_args!(
                "an address is an IP address as in \"[::]\" or \"0.0.0.0\", not {text:?}"
            ))
        })
    }
}

impl Config {
    /// Reads and judges the file.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let source = Source::read(path)?;
        let raw: RawConfig = source.parse()?;
        raw.judge(&source).map_err(|wrong| source.wrong(wrong))
    }
}

impl RawConfig {
    fn judge(self, source: &Source) -> Result<Config, Wrong> {
        if self.volume.get_ref().is_empty() {
            return Err(Wrong::at(&self.volume, "at least one [[volume]] is needed"));
        }
        all_different(self.volume.get_ref().iter().map(|volume| &volume.name), "volume")?;
        apart(self.volume.get_ref(), source)?;
        let volumes =
            self.volume.into_inner().into_iter().map(|volume| volume.judge(source)).collect::<Result<_, _>>()?;
        Ok(Config {
            agent: self.agent.judge(source, STATE_DIR)?,
            tls: RawTls::judge(self.tls, source)?,
            listen: Listen {
                address: self.listen.address.map_or_else(|| "[::]:7440".to_owned(), |address| address.text),
                reconnect_grace: at_least(
                    self.listen.reconnect_grace,
                    Duration::ZERO,
                    Duration::from_secs(300),
                    "reconnect_grace",
                )?,
            },
            volumes,
            rsync: self.rsync.judge()?,
            log: self.log.judge()?,
        })
    }
}

/// Every `publish` is a directory of its own: not inside another volume's, nor inside any `store`, nor around one. (Volumes may
/// share a store: their snapshots have their names.)
fn apart(volumes: &[RawVolume], source: &Source) -> Result<(), Wrong> {
    let overlap = |a: &Path, b: &Path| a.starts_with(b) || b.starts_with(a);
    for (index, volume) in volumes.iter().enumerate() {
        let publish = source.resolve(volume.publish.get_ref());
        if volumes.iter().any(|other| overlap(&publish, &source.resolve(&other.store))) {
            return Err(Wrong::at(&volume.publish, "publish and store are two directories, neither inside the other"));
        }
        if volumes[..index].iter().any(|other| overlap(&publish, &source.resolve(other.publish.get_ref()))) {
            return Err(Wrong::at(
                &volume.publish,
                "each volume has a publish directory of its own, not inside another's",
            ));
        }
    }
    Ok(())
}

impl RawVolume {
    fn judge(self, source: &Source) -> Result<Volume, Wrong> {
        let time = (Duration::from_secs(1), Duration::from_secs(300));
        Ok(Volume {
            name: self.name.into_inner(),
            store: source.resolve(&self.store),
            publish: source.resolve(self.publish.get_ref()),
            keep: RawKeep::judge(self.keep)?,
            checkpoint: at_least_bytes(self.checkpoint, LEAST_CHECKPOINT, DEFAULT_CHECKPOINT, "checkpoint")?,
            checkpoint_interval: at_least(self.checkpoint_interval, time.0, time.1, "checkpoint_interval")?,
            reserve: self.reserve,
            max_size: match self.max_size {
                None => None,
                given => Some(at_least_bytes(given, LEAST_MAX_SIZE, LEAST_MAX_SIZE, "max_size")?),
            },
        })
    }
}

impl RawRsync {
    fn judge(self) -> Result<Rsync, Wrong> {
        if let Some(user) = &self.user
            && (user.get_ref().is_empty()
                || !user.get_ref().bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.".contains(&b)))
        {
            return Err(Wrong::at(user, "user is the name of an account, of the characters A-Z a-z 0-9 _ - ."));
        }
        let port = match self.port {
            None => 873,
            Some(port) => match u16::try_from(*port.get_ref()) {
                Ok(number) if number > 0 => number,
                _ => return Err(Wrong::at(&port, "port is 1 to 65535")),
            },
        };
        Ok(Rsync {
            mode: self.mode,
            address: self.address.map_or(IpAddr::from([0u16; 8]), |address| address.0),
            port,
            user: self.user.map_or_else(|| "nobody".to_owned(), Spanned::into_inner),
            timeout: at_least(self.timeout, Duration::from_secs(1), Duration::from_secs(600), "timeout")?,
            max_connections: self.max_connections.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use common::config::testing;

    use super::*;

    /// The directory of the crate's siblings.
    const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

    #[test]
    fn the_example_is_legal_and_states_the_defaults() {
        testing::example_states_the_defaults(&Path::new(ROOT).join("deploy/receiver.example.toml"), Config::load);
    }

    #[test]
    fn bad_files_fail_each_with_its_message() {
        testing::bad_files_fail(&Path::new(ROOT).join("tests/bad-config/receiver"), Config::load);
    }
}
