//! sender.toml: raw as it stands in the file, then legal by construction.

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use common::{
    config::{
        Agent, ConfigError, HostPort, Log, RawAgent, RawKeep, RawLog, RawPath, RawTls, Source, Spanned, Tls, Wrong,
        all_different, at_least, at_least_bytes,
    },
    exit::chain,
    retention::Policy,
    size::{ByteSize, Span},
    snapshot::VolumeName,
    stream::DigestScope,
};
use serde::Deserialize;

use crate::filter::{AgeBy, Filter, Patterns};

/// Where state is kept unless the file says otherwise.
const STATE_DIR: &str = "/var/lib/snapferry-sender";

/// Enough for a few blocks.
const LEAST_WINDOW: u64 = 4 << 20;
const DEFAULT_WINDOW: u64 = 64 << 20;

/// Four days at the default interval: more than any usual `keep` holds, so that it bites only where nothing else would. Without any
/// bound a receiver that is away for weeks would fill the head node; and btrfs gets slow with hundreds of snapshots of one source.
const DEFAULT_MAX_UNSENT: NonZeroU32 = NonZeroU32::new(100).expect("it is not 0");

/// Anything shorter would exclude what was not even sent.
const LEAST_MAX_AGE: Duration = Duration::from_secs(3600);

/// sender.toml
#[derive(Debug, Clone)]
pub struct Config {
    /// `[agent]`
    pub agent: Agent,
    /// `[tls]`
    pub tls: Tls,
    /// `[receiver]`
    pub receiver: Receiver,
    /// `[[volume]]`, at least one.
    pub volumes: Vec<Volume>,
    /// `[log]`
    pub log: Log,
}

/// `[receiver]`
#[derive(Debug, Clone)]
pub struct Receiver {
    /// `host:port`
    pub address: String,
    /// How long TCP and TLS may take together.
    pub connect_timeout: Duration,
    /// How long a transfer whose connection broke is kept alive and tries to connect again.
    pub reconnect_grace: Duration,
    /// The most bytes that are kept until the receiver has them.
    pub window: u64,
}

/// `[[volume]]`
#[derive(Debug, Clone)]
pub struct Volume {
    /// The volume's name, the same on the receiver.
    pub name: VolumeName,
    /// The subvolume that is replicated.
    pub source: PathBuf,
    /// Where its snapshots are: on the same file system, outside the source.
    pub snapshot_dir: PathBuf,
    /// A snapshot every so often.
    pub interval: Duration,
    /// Which snapshots stay here.
    pub keep: Policy,
    /// The most that stay while the receiver does not take them: the oldest of them go first.
    pub max_unsent: NonZeroU32,
    /// What the stream digest covers.
    pub digest: DigestScope,
    /// Whether blocks that shrink are compressed.
    pub compression: Compression,
    /// Whether every snapshot is sent, not only the newest.
    pub every_snapshot: bool,
    /// What of the volume does not leave the machine.
    pub filter: Filter,
}

/// Compression of blocks on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// zstd where it shrinks a block.
    #[default]
    Zstd,
    /// Never.
    None,
}

impl Compression {
    /// Whether anything is compressed.
    pub fn is_on(self) -> bool {
        self == Self::Zstd
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawConfig {
    agent: RawAgent,
    tls: Spanned<RawTls>,
    receiver: RawReceiver,
    volume: Spanned<Vec<RawVolume>>,
    #[serde(default)]
    log: RawLog,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [receiver]")]
struct RawReceiver {
    address: Spanned<HostPort>,
    connect_timeout: Option<Spanned<Span>>,
    reconnect_grace: Option<Spanned<Span>>,
    window: Option<Spanned<ByteSize>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section [[volume]]")]
struct RawVolume {
    name: Spanned<VolumeName>,
    source: RawPath,
    snapshot_dir: Spanned<RawPath>,
    interval: Option<Spanned<Span>>,
    keep: Option<Spanned<RawKeep>>,
    max_unsent: Option<Spanned<i64>>,
    #[serde(default)]
    digest: DigestScope,
    #[serde(default)]
    compression: Compression,
    #[serde(default)]
    every_snapshot: bool,
    exclude: Option<Vec<Spanned<String>>>,
    max_age: Option<Spanned<Span>>,
    #[serde(default)]
    max_age_by: AgeBy,
    #[serde(default)]
    guix_cache: bool,
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
        let volumes = self.volume.into_inner().into_iter().map(|volume| volume.judge(source));
        Ok(Config {
            agent: self.agent.judge(source, STATE_DIR)?,
            tls: RawTls::judge(self.tls, source)?,
            receiver: self.receiver.judge()?,
            volumes: volumes.collect::<Result<_, _>>()?,
            log: self.log.judge()?,
        })
    }
}

impl RawReceiver {
    fn judge(self) -> Result<Receiver, Wrong> {
        if self.address.get_ref().port == 0 {
            return Err(Wrong::at(
                &self.address,
                "nobody can be called at port 0: name the port of [listen] in receiver.toml",
            ));
        }
        let (least, default) = (Duration::from_millis(100), Duration::from_secs(10));
        let connect_timeout = at_least(self.connect_timeout, least, default, "connect_timeout")?;
        let grace = Duration::from_secs(300);
        Ok(Receiver {
            address: self.address.into_inner().text,
            connect_timeout,
            reconnect_grace: at_least(self.reconnect_grace, Duration::ZERO, grace, "reconnect_grace")?,
            window: at_least_bytes(self.window, LEAST_WINDOW, DEFAULT_WINDOW, "window")?,
        })
    }
}

impl RawVolume {
    fn judge(self, source: &Source) -> Result<Volume, Wrong> {
        let (from, into) = (source.resolve(&self.source), source.resolve(self.snapshot_dir.get_ref()));
        if into.starts_with(&from) {
            return Err(Wrong::at(
                &self.snapshot_dir,
                "snapshot_dir lies outside the source, on the same file system: a snapshot would be in every later one",
            ));
        }
        let filter = filter(self.exclude.unwrap_or_default(), self.max_age, self.max_age_by, self.guix_cache)?;
        Ok(Volume {
            name: self.name.into_inner(),
            source: from,
            snapshot_dir: into,
            interval: at_least(self.interval, Duration::from_secs(1), Duration::from_secs(3600), "interval")?,
            keep: RawKeep::judge(self.keep)?,
            max_unsent: max_unsent(self.max_unsent)?,
            digest: self.digest,
            compression: self.compression,
            every_snapshot: self.every_snapshot,
            filter,
        })
    }
}

/// # Errors
/// Not a number of snapshots.
fn max_unsent(value: Option<Spanned<i64>>) -> Result<NonZeroU32, Wrong> {
    let Some(value) = value else { return Ok(DEFAULT_MAX_UNSENT) };
    u32::try_from(*value.get_ref()).ok().and_then(NonZeroU32::new).ok_or_else(|| {
        let what = format_args!("max_unsent is 1 to {}: the newest snapshot always stays", u32::MAX);
        Wrong::at(&value, what)
    })
}

fn filter(
    exclude: Vec<Spanned<String>>,
    max_age: Option<Spanned<Span>>,
    max_age_by: AgeBy,
    guix_cache: bool,
) -> Result<Filter, Wrong> {
    let texts: Vec<&String> = exclude.iter().map(Spanned::get_ref).collect();
    let exclude = Patterns::new(&texts).map_err(|(place, bad)| Wrong::at(&exclude[place], chain(&bad)))?;
    let max_age = max_age.map(|age| at_least(Some(age), LEAST_MAX_AGE, LEAST_MAX_AGE, "max_age")).transpose()?;
    Ok(Filter { exclude, max_age, max_age_by, guix_cache })
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
        testing::example_states_the_defaults(&Path::new(ROOT).join("deploy/sender.example.toml"), Config::load);
    }

    #[test]
    fn bad_files_fail_each_with_its_message() {
        testing::bad_files_fail(&Path::new(ROOT).join("tests/bad-config/sender"), Config::load);
    }

    #[test]
    fn relative_paths_are_relative_to_the_file() {
        let config = Config::load(&Path::new(ROOT).join("deploy/sender.example.toml")).unwrap();
        assert_eq!(config.tls.certificate, Path::new(ROOT).join("deploy/sender.crt"));
        assert_eq!(config.volumes[0].source, Path::new("/var/cache/publish"));
    }
}
