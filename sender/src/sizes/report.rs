//! What `sizes` prints: tables for people, JSON for programs.

use std::fmt::{self, Write as _};

use common::size::{Span, human_bytes};
use serde::Serialize;

use super::count::{AGES, Amount, Counts, Row};
use crate::{
    config::Volume,
    filter::{Filter, Rule},
};

/// So many rows are printed; JSON has all that were counted.
const MAX_PRINTED: usize = 25;

/// Columns of a number, and the most of a name.
const NUMBER: usize = 10;
const MAX_NAME: usize = 40;

/// A volume with its sizes.
#[derive(Debug, Serialize)]
pub(super) struct Sized {
    volume: String,
    source: String,
    /// All of it.
    #[serde(flatten)]
    total: Line,
    /// The largest first.
    directories: Vec<Line>,
    /// What each rule of the filter takes away.
    filters: Vec<Saving>,
    #[serde(skip)]
    with_disk: bool,
    #[serde(skip)]
    guix_cache: bool,
}

/// A directory, or all of them.
#[derive(Debug, Serialize)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    #[serde(flatten)]
    all: Sum,
    /// What is not older than so many days.
    younger: Vec<Younger>,
    /// What the filter leaves.
    left: Sum,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Sum {
    files: u64,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    on_disk: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Younger {
    days: u64,
    files: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct Saving {
    /// As it stands in the configuration.
    filter: String,
    files: u64,
    bytes: u64,
}

impl Sized {
    pub(super) fn new(volume: &Volume, filter: &Filter, with_disk: bool, counts: &Counts) -> Self {
        let mut rows: Vec<&(Option<Vec<u8>>, Row)> = counts.rows.iter().collect();
        rows.sort_by(|(name, row), (other_name, other)| {
            (other.all.bytes, other.all.files, name).cmp(&(row.all.bytes, row.all.files, other_name))
        });
        let directories = rows.into_iter().map(|(name, row)| {
            let name = match name.as_deref() {
                None => "(files)".to_owned(),
                Some(b"") => "(other directories)".to_owned(),
                Some(name) => String::from_utf8_lossy(name).into_owned(),
            };
            // What the left ones of a single row occupy was not counted.
            Line::new(Some(name), row, with_disk, false)
        });
        Self {
            volume: volume.name.to_string(),
            source: volume.source.display().to_string(),
            total: Line::new(None, &counts.total, with_disk, with_disk),
            directories: directories.collect(),
            filters: savings(filter, counts),
            with_disk,
            guix_cache: filter.guix_cache,
        }
    }

    /// The widest name of a row that is printed.
    fn name_width(&self) -> usize {
        let names = self.printed().filter_map(|line| line.name.as_ref()).map(|name| shown(name).chars().count());
        let filters = self.filters.iter().map(|saving| shown(&saving.filter).chars().count());
        names.chain(filters).chain([12]).max().unwrap_or(0)
    }

    fn printed(&self) -> impl Iterator<Item = &Line> {
        self.directories.iter().take(MAX_PRINTED)
    }

    /// One of the two tables by directory and age.
    fn table(&self, f: &mut fmt::Formatter<'_>, title: &str, cell: impl Fn(u64, u64) -> String) -> fmt::Result {
        let width = self.name_width();
        write!(f, "  {title:<width$} {:>NUMBER$}", "all")?;
        if self.with_disk && title == "size" {
            write!(f, " {:>NUMBER$}", "on disk")?;
        }
        for days in AGES {
            write!(f, " {:>NUMBER$}", format!("<= {days}d"))?;
        }
        f.write_str("\n")?;
        for line in self.printed().chain([&self.total]) {
            let name = line.name.as_deref().unwrap_or("total");
            write!(f, "  {:<width$} {:>NUMBER$}", shown(name), cell(line.all.files, line.all.bytes))?;
            if let Some(on_disk) = line.all.on_disk.filter(|_| title == "size") {
                write!(f, " {:>NUMBER$}", human_bytes(on_disk))?;
            }
            for younger in &line.younger {
                write!(f, " {:>NUMBER$}", cell(younger.files, younger.bytes))?;
            }
            f.write_str("\n")?;
        }
        Ok(())
    }

    fn notes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.directories.len() > MAX_PRINTED {
            writeln!(f, "  {} more directories: --json lists them", self.directories.len() - MAX_PRINTED)?;
        }
        let rows: u64 = self.directories.iter().map(|line| line.all.files).sum();
        if rows > self.total.all.files {
            writeln!(f, "  Files with names in several directories (hard links) count once in the total.")?;
        }
        if self.guix_cache {
            writeln!(f, "  By the age of each file; max_age lets an item go when its youngest file is too old.")?;
        }
        Ok(())
    }
}

impl fmt::Display for Sized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "volume {}: {}", self.volume, self.source)?;
        self.table(f, "size", |_, bytes| human_bytes(bytes))?;
        f.write_str("\n")?;
        self.table(f, "files", |files, _| files.to_string())?;
        self.notes(f)?;
        f.write_str("\n")?;
        let width = self.name_width();
        write!(f, "  {:<width$} {:>NUMBER$} {:>NUMBER$}", "filter", "size", "files")?;
        if self.with_disk {
            write!(f, " {:>NUMBER$}", "on disk")?;
        }
        f.write_str("\n")?;
        for Saving { filter, files, bytes } in &self.filters {
            writeln!(f, "  {:<width$} {:>NUMBER$} {files:>NUMBER$}", shown(filter), human_bytes(*bytes))?;
        }
        for (name, sum) in [("total", self.total.all), ("left", self.total.left)] {
            write!(f, "  {name:<width$} {:>NUMBER$} {:>NUMBER$}", human_bytes(sum.bytes), sum.files)?;
            if let Some(on_disk) = sum.on_disk {
                write!(f, " {:>NUMBER$}", human_bytes(on_disk))?;
            }
            f.write_str("\n")?;
        }
        Ok(())
    }
}

impl Line {
    fn new(name: Option<String>, row: &Row, with_disk: bool, left_with_disk: bool) -> Self {
        let younger = AGES.into_iter().zip(row.younger);
        Self {
            name,
            all: Sum::new(row.all, with_disk),
            younger: younger.map(|(days, Amount { files, bytes, .. })| Younger { days, files, bytes }).collect(),
            left: Sum::new(row.left, left_with_disk),
        }
    }
}

impl Sum {
    fn new(Amount { files, bytes, on_disk }: Amount, with_disk: bool) -> Self {
        Self { files, bytes, on_disk: with_disk.then_some(on_disk) }
    }
}

/// The rules in the order of the configuration, those that take nothing away too.
fn savings(filter: &Filter, counts: &Counts) -> Vec<Saving> {
    let saving = |rule: Rule, filter: String| {
        let Amount { files, bytes, .. } = counts.rules.get(&rule).copied().unwrap_or_default();
        Saving { filter, files, bytes }
    };
    let patterns = filter.exclude.texts().enumerate();
    let patterns = patterns.map(|(place, text)| saving(Rule::Pattern(place), format!("exclude {text:?}")));
    let age = filter.max_age.map(|age| saving(Rule::Age, format!("max_age \"{}\"", Span(age))));
    let companions = (filter.guix_cache && !filter.is_idle()).then(|| saving(Rule::Companion, "guix_cache".to_owned()));
    patterns.chain(age).chain(companions).collect()
}

/// A name on a terminal: in one line, of bounded length.
fn shown(name: &str) -> String {
    let mut shown = String::new();
    for character in name.chars().take(MAX_NAME) {
        if character.is_control() {
            // A String takes whatever is written to it.
            let _ = write!(shown, "{}", character.escape_default());
        } else {
            shown.push(character);
        }
    }
    if name.chars().count() > MAX_NAME {
        shown.push('…');
    }
    shown
}
