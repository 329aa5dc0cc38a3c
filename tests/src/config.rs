//! The agents' configuration files as tests need them. What no test changes is not in the file: the defaults are tested, too.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use crate::host::MIRROR_ADDRESS;

/// The name of the volume in all tests.
pub const VOLUME: &str = "substitutes";
/// Where the receiver listens.
pub const PORT: u16 = 7440;

/// What differs from test to test.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How often a snapshot is taken, as it stands in the file.
    pub interval: String,
    /// Snapshots that stay on the sender.
    pub sender_keeps: u32,
    /// Snapshots that stay on the receiver.
    pub receiver_keeps: u32,
    /// `structure` or `full`.
    pub digest: String,
    /// `supervised`, `external` or `off`.
    pub rsync: String,
    /// How often a transfer says how far it is.
    pub progress_interval: String,
    /// How long either side keeps a transfer alive whose connection broke.
    pub reconnect_grace: String,
    /// `json` or `text`.
    pub format: String,
    /// What of the log counts: `info`, or `debug` to hear of checkpoints.
    pub level: Option<String>,
    /// Whom the sender calls, `host:port`, in place of the receiver: somebody in between.
    pub receiver_address: Option<String>,
    /// What the sender keeps until it is acknowledged.
    pub window: Option<String>,
    /// Bytes between two checkpoints.
    pub checkpoint: Option<String>,
    /// What stays free on the mirror box.
    pub reserve: Option<String>,
    /// What the volume may take there.
    pub max_size: Option<String>,
    /// `zstd` or `none`.
    pub compression: Option<String>,
    /// Lines for the sender's table `[tls]` in place of `peers`.
    pub sender_trusts: Option<String>,
    /// Lines for the receiver's table `[tls]` in place of `peers`.
    pub receiver_trusts: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            interval: "1h".to_owned(),
            sender_keeps: 3,
            receiver_keeps: 3,
            digest: "structure".to_owned(),
            rsync: "supervised".to_owned(),
            progress_interval: "200ms".to_owned(),
            reconnect_grace: "5min".to_owned(),
            format: "json".to_owned(),
            level: None,
            receiver_address: None,
            window: None,
            checkpoint: None,
            reserve: None,
            max_size: None,
            compression: None,
            sender_trusts: None,
            receiver_trusts: None,
        }
    }
}

/// The places of a pair that configurations name.
#[derive(Debug, Clone)]
pub struct Places {
    /// The live subvolume on the head node.
    pub source: PathBuf,
    /// Where the sender's snapshots are.
    pub snapshot_dir: PathBuf,
    /// Where the receiver's snapshots are.
    pub store: PathBuf,
    /// The receiver's published directory.
    pub publish: PathBuf,
    /// What a sender keeps: its configuration, key and state.
    pub sender: PathBuf,
    /// What a receiver keeps.
    pub receiver: PathBuf,
}

/// The sender's configuration file.
#[must_use]
pub fn sender(places: &Places, settings: &Settings, receiver_fingerprint: &str) -> String {
    let mut text = head(&places.sender, "head", "sender", settings, &settings.sender_trusts, receiver_fingerprint);
    let address = settings.receiver_address.clone().unwrap_or_else(|| format!("{MIRROR_ADDRESS}:{PORT}"));
    let _ = writeln!(text, "[receiver]\naddress = {address:?}\nreconnect_grace = {:?}", settings.reconnect_grace);
    text.push_str(&optional("window", &settings.window));
    let _ = writeln!(text, "[[volume]]\nname = \"{VOLUME}\"\nsource = {:?}", places.source);
    let _ = writeln!(text, "snapshot_dir = {:?}\ninterval = {:?}", places.snapshot_dir, settings.interval);
    let _ = writeln!(text, "keep = {{ last = {} }}\ndigest = {:?}", settings.sender_keeps, settings.digest);
    text.push_str(&optional("compression", &settings.compression));
    text
}

/// The receiver's configuration file.
#[must_use]
pub fn receiver(places: &Places, settings: &Settings, sender_fingerprint: &str) -> String {
    let trusts = &settings.receiver_trusts;
    let mut text = head(&places.receiver, "mirror", "receiver", settings, trusts, sender_fingerprint);
    let _ = writeln!(text, "[listen]\naddress = \"[::]:{PORT}\"\nreconnect_grace = {:?}\n", settings.reconnect_grace);
    let _ = writeln!(text, "[[volume]]\nname = \"{VOLUME}\"\nstore = {:?}", places.store);
    let _ = writeln!(text, "publish = {:?}\nkeep = {{ last = {} }}", places.publish, settings.receiver_keeps);
    let room = [("checkpoint", &settings.checkpoint), ("reserve", &settings.reserve), ("max_size", &settings.max_size)];
    text.extend(room.map(|(key, value)| optional(key, value)));
    let _ = writeln!(text, "[rsync]\nmode = {:?}", settings.rsync);
    text
}

fn head(dir: &Path, name: &str, stem: &str, settings: &Settings, trusts: &Option<String>, peer: &str) -> String {
    let trusts = trusts.clone().unwrap_or_else(|| format!("peers = [\"{peer}\"]"));
    let level = optional("level", &settings.level);
    format!(
        "[agent]\nname = \"{name}\"\nstate_dir = {:?}\n\n[tls]\ncertificate = \"{stem}.crt\"\nprivate_key = \"{stem}.key\"\n\
         {trusts}\n\n[log]\nformat = {:?}\nprogress_interval = {:?}\n{level}\n",
        dir.join("state"),
        settings.format,
        settings.progress_interval
    )
}

/// A line for a key that is in the file only if a test sets it.
fn optional(key: &str, value: &Option<String>) -> String {
    value.as_ref().map_or_else(String::new, |value| format!("{key} = {value:?}\n"))
}

/// Writes a file, making its directory if need be.
pub fn write(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}
