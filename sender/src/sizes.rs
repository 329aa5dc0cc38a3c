//! `sizes`: what a volume would take on the mirror box, and what its filter, or another one, would save. Nothing is sent or changed.
//!
//! It looks at the source as it is, while the farm works in it.

mod count;
mod report;
mod sparse;

use std::{
    io::IsTerminal,
    os::fd::AsFd,
    path::Path,
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use common::{
    btrfs::{self, BtrfsError, Subvolume},
    exit::Exit,
    size::Span,
};
use indicatif::ProgressBar;
use jiff::Timestamp;

use self::count::count;
use crate::{
    config::{Config, Volume},
    failed,
    filter::{BadPattern, Filter, Patterns},
    walk::{self, Options, WalkError},
};

/// How often the progress on a terminal moves.
const TICK: Duration = Duration::from_millis(200);

/// What to look at.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only this volume
    volume: Option<String>,
    /// Try this pattern, in place of those of the configuration; may be given several times
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Try this age (as in 120d), in place of that of the configuration
    #[arg(long, value_name = "SPAN")]
    max_age: Option<Span>,
    /// Look up what is allocated on disk, too: compressed, and shared extents once
    #[arg(long)]
    on_disk: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
enum SizesError {
    #[error("there is no volume {wanted} in the configuration, only {known}")]
    NoSuchVolume { wanted: String, known: String },
    #[error("--exclude: {0}")]
    Pattern(#[from] BadPattern),
    #[error(transparent)]
    Btrfs(#[from] BtrfsError),
    #[error("cannot count {volume}: {source}")]
    Walk {
        volume: String,
        #[source]
        source: WalkError,
    },
}

/// Counts and prints.
pub fn sizes(config: &Config, arguments: &Arguments) -> Exit {
    match look(config, arguments) {
        Ok(()) => Exit::Done,
        Err(error @ (SizesError::NoSuchVolume { .. } | SizesError::Pattern(_))) => failed(&error, Exit::Usage),
        Err(error) => failed(&error, Exit::Failed),
    }
}

fn look(config: &Config, arguments: &Arguments) -> Result<(), SizesError> {
    let wanted = |volume: &&Volume| arguments.volume.as_ref().is_none_or(|name| volume.name.as_str() == name);
    let volumes: Vec<&Volume> = config.volumes.iter().filter(wanted).collect();
    if let (Some(wanted), true) = (&arguments.volume, volumes.is_empty()) {
        let known: Vec<&str> = config.volumes.iter().map(|volume| volume.name.as_str()).collect();
        return Err(SizesError::NoSuchVolume { wanted: wanted.clone(), known: known.join(", ") });
    }
    let mut reports = Vec::new();
    for volume in volumes {
        let filter = arguments.filter(volume)?;
        let sized = report::Sized::new(volume, &filter, arguments.on_disk, &count_volume(volume, &filter, arguments)?);
        if arguments.json {
            reports.push(sized);
        } else {
            print!("{sized}");
        }
    }
    if arguments.json {
        println!("{}", serde_json::json!({ "volumes": reports }));
    }
    Ok(())
}

impl Arguments {
    /// The filter of the volume, with what is tried in place of its parts.
    fn filter(&self, volume: &Volume) -> Result<Filter, BadPattern> {
        let mut filter = volume.filter.clone();
        if !self.exclude.is_empty() {
            filter.exclude = Patterns::new(&self.exclude).map_err(|(_, bad)| bad)?;
        }
        if let Some(Span(age)) = self.max_age {
            filter.max_age = Some(age);
        }
        Ok(filter)
    }
}

fn count_volume(volume: &Volume, filter: &Filter, arguments: &Arguments) -> Result<count::Counts, SizesError> {
    let path = canonical(&volume.source)?;
    let source = Subvolume::open(&path)?;
    if arguments.on_disk {
        // What still waits to be written has no place on disk, and would count as nothing.
        btrfs::sync(&path)?;
    }
    let (now, stop, started) = (Timestamp::now(), AtomicBool::new(false), Instant::now());
    let options = Options { threads: walk::threads(), stop: &stop, tick_interval: TICK };
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new_spinner() } else { ProgressBar::hidden() };
    let tick = |files: u64| {
        let rate = files as f64 / started.elapsed().as_secs_f64();
        bar.set_message(format!("{}: {files} files, {rate:.0}/s", volume.name));
        bar.tick();
    };
    let counts = count(source.as_fd(), &filter.at(now), now.as_second(), arguments.on_disk, &options, tick);
    bar.finish_and_clear();
    counts.map_err(|source| SizesError::Walk { volume: volume.name.to_string(), source })
}

/// A symlink to the source is fine; only the source must not be one.
fn canonical(path: &Path) -> Result<std::path::PathBuf, BtrfsError> {
    std::fs::canonicalize(path).map_err(|source| BtrfsError::Call { action: "find", path: path.to_owned(), source })
}

#[cfg(test)]
mod tests;
