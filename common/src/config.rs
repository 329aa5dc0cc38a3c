//! The pieces of configuration that both agents have, and errors that say where.
//!
//! A file is parsed twice in one go: serde makes the raw form of it, `deny_unknown_fields` everywhere; then every raw value becomes
//! one that is legal by construction. Values that a type can judge alone are judged while they are parsed, so that the error
//! carries line and column; the others keep their place in a [`Spanned`] until they are judged.

use std::{
    fmt, io,
    num::NonZeroU32,
    ops::Range,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Deserializer, de::DeserializeOwned};
pub use toml::Spanned;
use tracing::Level;

use crate::{identity::Fingerprint, log::Format, retention::Policy, size::Span, tls::Peers};

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
            self.wrong(Wrong { span, what: error.message().to_owned() })
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
    pub fn resolve(&self, path: &Path) -> PathBuf {
        self.path.parent().unwrap_or(Path::new(".")).join(path)
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
#[serde(deny_unknown_fields)]
pub struct RawAgent {
    name: Spanned<String>,
    state_dir: Option<PathBuf>,
}

impl RawAgent {
    /// # Errors
    /// An empty or endless name.
    pub fn judge(self, source: &Source, default_state_dir: &str) -> Result<Agent, Wrong> {
        let name = self.name.get_ref();
        if name.is_empty() || name.len() > 64 || name.chars().any(char::is_control) {
            return Err(Wrong::at(&self.name, "an agent's name is 1 to 64 bytes without control characters"));
        }
        let state_dir = self.state_dir.unwrap_or_else(|| default_state_dir.into());
        Ok(Agent { name: name.clone(), state_dir: source.resolve(&state_dir) })
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
#[serde(deny_unknown_fields)]
pub struct RawTls {
    certificate: PathBuf,
    private_key: PathBuf,
    peers: Option<Spanned<Vec<Fingerprint>>>,
    ca: Option<Spanned<PathBuf>>,
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
            (None, Some(ca), Some(name)) if !name.get_ref().is_empty() => {
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
#[serde(deny_unknown_fields)]
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

/// `keep = { last = 3 }`
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawKeep {
    last: NonZeroU32,
}

impl RawKeep {
    /// The policy; the default if none is given.
    pub fn policy(keep: Option<Self>) -> Policy {
        keep.map_or_else(Policy::default, |keep| Policy { last: keep.last })
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

/// `host:port`, an IPv6 address in brackets: checked for its form while it is parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort(pub String);

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let legal = text.rsplit_once(':').is_some_and(|(host, port)| {
            let bare = !host.is_empty() && !host.contains(':');
            let bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
            (bare || bracketed) && port.parse::<u16>().is_ok()
        });
        if legal {
            Ok(Self(text))
        } else {
            let what = "an address is host:port as in \"mirror.example.org:7440\" or \"[::]:7440\"";
            Err(serde::de::Error::custom(format_args!("{what}, not {text:?}")))
        }
    }
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
            return Err(Wrong::at(name, format_args!("{what} {} stands here twice", name.get_ref())));
        }
        seen.push(name.get_ref());
    }
    Ok(())
}
