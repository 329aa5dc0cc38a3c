//! The pieces of configuration that both agents have, and errors that say where.
//!
//! A file is parsed twice in one go: serde makes the raw form of it, `deny_unknown_fields` everywhere; then every raw value becomes
//! one that is legal by construction. Values that a type can judge alone are judged while they are parsed, so that the error
//! carries line and column; the others keep their place in a [`Spanned`] until they are judged.

use std::{
    fmt, io,
    net::Ipv6Addr,
    num::NonZeroU32,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeOwned},
};
pub use toml::Spanned;
use tracing::Level;

use crate::{
    identity::Fingerprint,
    log::Format,
    retention::Policy,
    size::{ByteSize, Span},
    tls::{Peers, is_peer_name},
};

#[cfg(any(test, feature = "testing"))]
pub mod testing;

/// Why a configuration is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {path}; --config FILE names another")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something in it is wrong.
    #[error("{path}:{line}:{column}: {what}")]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// Counted from 1, in characters.
        column: usize,
        /// What is wrong, and what is allowed.
        what: String,
    },
}

/// A configuration file that is being judged.
pub struct Source {
    path: PathBuf,
    text: String,
}

/// What is wrong with a value, and where it stands.
#[derive(Debug)]
pub struct Wrong {
    /// Bytes of the file.
    pub span: Range<usize>,
    /// What is wrong, and what is allowed.
    pub what: String,
}

impl Wrong {
    /// Something wrong with a value.
    pub fn at<T>(value: &Spanned<T>, what: impl fmt::Display) -> Self {
        Self { span: value.span(), what: what.to_string() }
    }
}

impl Source {
    /// Reads the file.
    ///
    /// # Errors
    /// [`ConfigError::Read`].
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Ok(Self { path: path.to_owned(), text }),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// The raw form of the file.
    ///
    /// # Errors
    /// [`ConfigError::Wrong`]: no TOML, an unknown key, a wrong type, an impossible value.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(&self.text).map_err(|error| {
            let span = error.span().unwrap_or(0..0);
            // A section is missing from the file, which has no place; a key from its section, which has one.
            let section = error.message().strip_prefix("missing field `").filter(|_| span.is_empty());
            let what = match section.map(|name| name.trim_end_matches('`')) {
                Some("volume") => {
                    "there is no section [[volume]], but one is needed; the example shows what it holds".into()
                }
                Some(name) => {
                    format!("there is no section [{name}], but it is needed; the example shows what it holds")
                }
                None => plain(error.message()),
            };
            self.wrong(Wrong { span, what })
        })
    }

    /// Gives what is wrong its place.
    pub fn wrong(&self, Wrong { span, what }: Wrong) -> ConfigError {
        let before = &self.text[..span.start.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, |line| line.chars().count()) + 1;
        ConfigError::Wrong { path: self.path.clone(), line, column, what }
    }

    /// A path of the configuration: relative ones are relative to the file.
    pub fn resolve(&self, path: &RawPath) -> PathBuf {
        self.path.parent().unwrap_or(Path::new(".")).join(&path.0)
    }
}

/// What serde says, in one line and in the words of TOML instead of those of Rust.
fn plain(message: &str) -> String {
    message
        .replace('\n', ", ")
        .replace("invalid type: map", "invalid type: table")
        .replace("invalid type: sequence", "invalid type: list")
        .replace("expected i64", "expected a whole number")
        .replace("expected u32", "expected a whole number from 0 to 4294967295")
        .replace("wanted string or table", "invalid type: expected a string")
        .replace(
            "expected a sequence",
            "expected a list, as in peers = [\"sha256:...\"], or a section in double brackets, as in [[volume]]",
        )
}

/// A path as it stands in the file: not empty, without control characters (it gets into logs and other programs' configuration).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawPath(PathBuf);

impl<'de> Deserialize<'de> for RawPath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        if text.is_empty() || text.contains(char::is_control) {
            let what = format_args!("a path is not empty and has no control characters, unlike {text:?}");
            return Err(de::Error::custom(what));
        }
        Ok(Self(text.into()))
    }
}

/// `[agent]`
#[derive(Debug, Clone)]
pub struct Agent {
    /// How it calls itself in greetings and logs.
    pub name: String,
    /// Where it keeps what must survive a restart.
    pub state_dir: PathBuf,
}

/// `[agent]` as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [agent]")]
pub struct RawAgent {
    name: Spanned<String>,
    state_dir: Option<RawPath>,
}

impl RawAgent {
    /// # Errors
    /// An empty or endless name.
    pub fn judge(self, source: &Source, default_state_dir: &str) -> Result<Agent, Wrong> {
        let name = self.name.get_ref();
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err(Wrong::at(&self.name, "an agent's name is 1 to 64 bytes without control characters"));
        }
        let state_dir = self.state_dir.map_or_else(|| default_state_dir.into(), |path| source.resolve(&path));
        Ok(Agent { name: name.clone(), state_dir })
    }
}

/// `[tls]`
#[derive(Debug, Clone)]
pub struct Tls {
    /// Our certificate, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM, readable by us alone.
    pub private_key: PathBuf,
    /// Whom we talk to.
    pub peers: Peers,
}

/// `[tls]` as it stands in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [tls]")]
pub struct RawTls {
    certificate: RawPath,
    private_key: RawPath,
    peers: Option<Spanned<Vec<Fingerprint>>>,
    ca: Option<Spanned<RawPath>>,
    peer_name: Option<Spanned<String>>,
}

impl RawTls {
    /// `section` is where `[tls]` stands.
    ///
    /// # Errors
    /// Not exactly one way to know the peer.
    pub fn judge(section: Spanned<Self>, source: &Source) -> Result<Tls, Wrong> {
        const ONE_WAY: &str = "give either peers = [\"sha256:...\"] or both ca and peer_name";
        let span = section.span();
        let raw = section.into_inner();
        let peers = match (raw.peers, raw.ca, raw.peer_name) {
            (Some(peers), None, None) if peers.get_ref().is_empty() => {
                return Err(Wrong::at(
                    &peers,
                    "an empty list trusts nobody; `fingerprint FILE` prints what belongs here",
                ));
            }
            (Some(peers), None, None) => Peers::Pinned(peers.into_inner()),
            (None, Some(_), Some(name)) if !is_peer_name(name.get_ref()) => {
                return Err(Wrong::at(
                    &name,
                    "peer_name is a DNS name or an IP address that stands in the peer's certificate",
                ));
            }
            (None, Some(ca), Some(name)) => {
                Peers::Ca { file: source.resolve(ca.get_ref()), peer_name: name.into_inner() }
            }
            (Some(_), Some(ca), _) => return Err(Wrong::at(&ca, ONE_WAY)),
            (_, _, Some(name)) => return Err(Wrong::at(&name, ONE_WAY)),
            (None, Some(ca), None) => return Err(Wrong::at(&ca, ONE_WAY)),
            (None, None, None) => return Err(Wrong { span, what: ONE_WAY.to_owned() }),
        };
        Ok(Tls { certificate: source.resolve(&raw.certificate), private_key: source.resolve(&raw.private_key), peers })
    }
}

/// `[log]`
#[derive(Debug, Clone, Copy)]
pub struct Log {
    /// `text` or `json`.
    pub format: Format,
    /// What is logged.
    pub level: Level,
    /// How often a running transfer reports.
    pub progress_interval: Duration,
}

/// `[log]` as it stands in the file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, expecting = "the section [log]")]
pub struct RawLog {
    #[serde(default)]
    format: Format,
    #[serde(default)]
    level: RawLevel,
    progress_interval: Option<Spanned<Span>>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
}

impl RawLog {
    /// # Errors
    /// An interval that is too short.
    pub fn judge(self) -> Result<Log, Wrong> {
        let level = match self.level {
            RawLevel::Error => Level::ERROR,
            RawLevel::Warn => Level::WARN,
            RawLevel::Info => Level::INFO,
            RawLevel::Debug => Level::DEBUG,
        };
        let progress_interval =
            at_least(self.progress_interval, Duration::from_millis(100), Duration::from_secs(10), "progress_interval")?;
        Ok(Log { format: self.format, level, progress_interval })
    }
}

/// `keep = { last = 3, daily = 7, within = "2d" }`
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table as in keep = { last = 3 }")]
pub struct RawKeep {
    last: Option<Count>,
    hourly: Option<Count>,
    daily: Option<Count>,
    weekly: Option<Count>,
    monthly: Option<Count>,
    yearly: Option<Count>,
    within: Option<Spanned<Span>>,
}

/// How many snapshots a rule keeps: at least 1. A rule that keeps none is not there.
#[derive(Debug, Clone, Copy)]
struct Count(NonZeroU32);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        let legal = u32::try_from(number).ok().and_then(NonZeroU32::new);
        legal.map(Self).ok_or_else(|| {
            de::Error::custom(format_args!(
                "a rule keeps 1 to {} snapshots, not {number}; leave it out to do without it (the newest snapshot always stays)",
                u32::MAX
            ))
        })
    }
}

impl RawKeep {
    /// The policy; the default if none is given.
    ///
    /// # Errors
    /// No rule at all, or one that keeps nothing.
    pub fn judge(keep: Option<Spanned<Self>>) -> Result<Policy, Wrong> {
        let Some(keep) = keep else { return Ok(Policy::default()) };
        let raw = keep.get_ref();
        let count = |count: Option<Count>| count.map(|Count(count)| count);
        let least = Duration::from_secs(1);
        let within = raw.within.clone().map(|within| at_least(Some(within), least, least, "within")).transpose()?;
        let policy = Policy {
            last: count(raw.last),
            hourly: count(raw.hourly),
            daily: count(raw.daily),
            weekly: count(raw.weekly),
            monthly: count(raw.monthly),
            yearly: count(raw.yearly),
            within,
        };
        if policy == Policy::NONE {
            return Err(Wrong::at(
                &keep,
                "keep has at least one of the rules last, hourly, daily, weekly, monthly, yearly, within",
            ));
        }
        Ok(policy)
    }
}

/// A span of at least `least`, or the default.
///
/// # Errors
/// A shorter one.
pub fn at_least(
    value: Option<Spanned<Span>>,
    least: Duration,
    default: Duration,
    key: &str,
) -> Result<Duration, Wrong> {
    match value {
        None => Ok(default),
        Some(value) if value.get_ref().0 < least => {
            Err(Wrong::at(&value, format_args!("{key} is at least {}", Span(least))))
        }
        Some(value) => Ok(value.into_inner().0),
    }
}

/// A size of at least `least` bytes, or the default.
///
/// # Errors
/// A smaller one.
pub fn at_least_bytes(value: Option<Spanned<ByteSize>>, least: u64, default: u64, key: &str) -> Result<u64, Wrong> {
    match value {
        None => Ok(default),
        Some(value) if value.get_ref().0 < least => {
            Err(Wrong::at(&value, format_args!("{key} is at least {}", ByteSize(least))))
        }
        Some(value) => Ok(value.into_inner().0),
    }
}

/// `host:port`, an IPv6 address in brackets: checked for its form while it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    /// As it stands in the file.
    pub text: String,
    /// The part behind the last colon.
    pub port: u16,
}

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match port(&text) {
            Some(port) => Ok(Self { text, port }),
            None => Err(de::Error::custom(format_args!(
                "an address is host:port as in \"mirror.example.org:7440\" or \"[::]:7440\", not {text:?}"
            ))),
        }
    }
}

/// The port of `host:port`, if that is what the text is.
fn port(text: &str) -> Option<u16> {
    let (host, port) = text.rsplit_once(':')?;
    let legal_host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|inner| {
            // The zone of a link-local address is the system's to judge.
            inner.split('%').next().is_some_and(|address| address.parse::<Ipv6Addr>().is_ok())
        }),
        None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)),
    };
    let digits = port.bytes().all(|b| b.is_ascii_digit());
    port.parse().ok().filter(|_| legal_host && digits)
}

/// The first name that stands twice.
///
/// # Errors
/// It, at its second place.
pub fn all_different<'a, T: PartialEq + fmt::Display + 'a>(
    names: impl IntoIterator<Item = &'a Spanned<T>>,
    what: &str,
) -> Result<(), Wrong> {
    let mut seen: Vec<&T> = Vec::new();
    for name in names {
        if seen.contains(&name.get_ref()) {
            return Err(Wrong::at(
                name,
                format_args!("there is a {what} {} above already: each has a name of its own", name.get_ref()),
            ));
        }
        seen.push(name.get_ref());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_of_keep_is_understood() {
        #[derive(Deserialize)]
        struct Sample {
            keep: Option<Spanned<RawKeep>>,
        }
        let policy = |text: &str| RawKeep::judge(toml::from_str::<Sample>(text).unwrap().keep).unwrap();
        let all =
            r#"keep = { last = 1, hourly = 2, daily = 3, weekly = 4, monthly = 5, yearly = 6, within = "1d12h" }"#;
        let expected = Policy {
            last: NonZeroU32::new(1),
            hourly: NonZeroU32::new(2),
            daily: NonZeroU32::new(3),
            weekly: NonZeroU32::new(4),
            monthly: NonZeroU32::new(5),
            yearly: NonZeroU32::new(6),
            within: Some(Duration::from_secs(36 * 3600)),
        };
        assert_eq!(policy(all), expected);
        assert_eq!(policy(""), Policy::default());
        let daily = Policy { daily: NonZeroU32::new(7), ..Policy::NONE };
        assert_eq!(policy("keep = { daily = 7 }"), daily, "a rule that is not there keeps nothing");
    }
}
