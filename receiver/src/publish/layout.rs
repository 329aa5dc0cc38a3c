//! The directory `publish`: what is in it, and who.
//!
//! ```text
//! live/tree      what new clients see: the mount point of the published snapshot
//! gen-7/tree     a snapshot on its way to live/tree, or one that was there and still has clients
//! ```
//! The mount points are one level down because a directory that *is* a mount point cannot be renamed; one that contains a
//! mount point can. Each `tree` has mode 0: while nothing is mounted there, after a reboot for instance, a daemon that serves
//! it as `nobody` gets 'permission denied'. From an empty directory a client with --delete would learn to delete everything.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use common::{
    btrfs::Subvolume,
    snapshot::{Snapshot, SnapshotName, VolumeName},
};

use super::PublishError;
use crate::mount::{self, Mount};

/// Generations from this number on cannot be ours.
const MAX_GENERATION: u64 = 1 << 48;

/// What is mounted at a `tree`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Occupant {
    /// Nothing.
    Nobody,
    /// A complete snapshot of the volume.
    Snapshot(Snapshot),
    /// What was a snapshot of the volume and is none any more: deleted, or made writable.
    Spoiled(String),
    /// Not a snapshot of the volume.
    Foreign(String),
}

impl Occupant {
    pub fn as_snapshot(&self) -> Option<&Snapshot> {
        if let Self::Snapshot(snapshot) = self { Some(snapshot) } else { None }
    }
}

/// The directory of a volume.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    dir: PathBuf,
    volume: VolumeName,
}

impl Layout {
    pub fn new(dir: &Path, volume: &VolumeName) -> Self {
        Self { dir: dir.to_owned(), volume: volume.clone() }
    }

    pub fn make_directory(&self) -> Result<(), PublishError> {
        fs::create_dir_all(&self.dir).map_err(PublishError::io("make the directory", &self.dir))
    }

    pub fn volume(&self) -> &VolumeName {
        &self.volume
    }

    pub fn live(&self) -> PathBuf {
        self.dir.join("live")
    }

    pub fn live_tree(&self) -> PathBuf {
        self.live().join("tree")
    }

    pub fn generation(&self, number: u64) -> PathBuf {
        self.dir.join(format!("gen-{number}"))
    }

    pub fn generation_tree(&self, number: u64) -> PathBuf {
        self.generation(number).join("tree")
    }

    /// The numbers of all `gen-N` that are there, lowest first.
    pub fn generations(&self) -> Result<Vec<u64>, PublishError> {
        let names = entries(&self.dir)?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| generation_number(name.to_str()?)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Who is at `live/tree`; None if there is no `live` yet. Something there that no publication made is an error.
    pub fn look_at_live(&self) -> Result<Option<Occupant>, PublishError> {
        let live = self.live();
        match fs::symlink_metadata(&live) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(PublishError::io("look at", &live)(error)),
            Ok(metadata) if !metadata.is_dir() => return Err(PublishError::NotOurs { path: live }),
            Ok(_) => {}
        }
        if let Some(mount) = mount::at(&live)? {
            return Err(PublishError::Foreign { path: live, what: description(&mount) });
        }
        match self.look_at(&live)? {
            Occupant::Foreign(what) => Err(PublishError::Foreign { path: self.live_tree(), what }),
            occupant => Ok(Some(occupant)),
        }
    }

    /// Who is at `<parent>/tree`, where parent is `live` or a generation, and holds nothing else.
    pub fn look_at(&self, parent: &Path) -> Result<Occupant, PublishError> {
        let tree = parent.join("tree");
        if entries(parent)?.iter().any(|name| name != "tree") {
            return Err(PublishError::NotOurs { path: parent.to_owned() });
        }
        match fs::symlink_metadata(&tree) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Occupant::Nobody),
            Err(error) => return Err(PublishError::io("look at", &tree)(error)),
            Ok(metadata) if !metadata.is_dir() => return Err(PublishError::NotOurs { path: tree }),
            Ok(_) => {}
        }
        match mount::at(&tree)? {
            Some(mount) => Ok(identify(&self.volume, &tree, &mount)),
            None if entries(&tree)?.is_empty() => Ok(Occupant::Nobody),
            None => Err(PublishError::NotOurs { path: tree }),
        }
    }

    /// Makes `gen-N/tree`.
    pub fn make(&self, number: u64) -> Result<(), PublishError> {
        let make = |path: &Path, mode: u32| {
            fs::create_dir(path)?;
            // Not by the mode of mkdir: the agent's umask must not decide whether clients get in.
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
        };
        let (dir, tree) = (self.generation(number), self.generation_tree(number));
        make(&dir, 0o755).map_err(PublishError::io("make the directory", &dir))?;
        make(&tree, 0).map_err(PublishError::io("make the directory", &tree))
    }

    /// Removes `gen-N`, at which nothing is mounted. Only empty directories go: there may be something in them that is not ours.
    pub fn remove(&self, number: u64) -> Result<(), PublishError> {
        for dir in [self.generation_tree(number), self.generation(number)] {
            match fs::remove_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(PublishError::io("remove the directory", &dir)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Makes what was renamed in here survive a crash.
    pub fn sync(&self) -> Result<(), PublishError> {
        fs::File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(PublishError::io("sync", &self.dir))
    }
}

fn generation_number(name: &str) -> Option<u64> {
    let number = name.strip_prefix("gen-")?.parse().ok().filter(|number| *number < MAX_GENERATION)?;
    // parse takes "+7" and "007" too.
    (name == format!("gen-{number}")).then_some(number)
}

fn entries(dir: &Path) -> Result<Vec<std::ffi::OsString>, PublishError> {
    let list = || fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>();
    list().map_err(PublishError::io("list", dir))
}

/// Who is mounted at `tree`. The mount says which subvolume, the subvolume says what it was received as: no record is needed.
fn identify(volume: &VolumeName, tree: &Path, mount: &Mount) -> Occupant {
    let root = mount.root.to_string_lossy();
    let (root, deleted) = root.strip_suffix("//deleted").map_or((&*root, false), |root| (root, true));
    let name = root.rsplit('/').next().and_then(|name| name.parse::<SnapshotName>().ok());
    let Some(name) = name.filter(|name| name.volume() == volume && mount.fs_type == "btrfs") else {
        return Occupant::Foreign(description(mount));
    };
    let info = || Subvolume::open(tree)?.info();
    match info().ok().and_then(|info| info.received_id()).filter(|_| !deleted) {
        Some(id) => Occupant::Snapshot(Snapshot { name, id }),
        None => Occupant::Spoiled(name.to_string()),
    }
}

fn description(mount: &Mount) -> String {
    format!("{} of the {} file system {}", mount.root.display(), mount.fs_type, mount.source.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_names_that_we_give_are_generations() {
        assert_eq!(generation_number("gen-0"), Some(0));
        assert_eq!(generation_number("gen-41"), Some(41));
        for other in ["gen-", "gen-07", "gen-+7", "gen-7 ", "Gen-7", "gen-7a", "live", "gen-18446744073709551615"] {
            assert_eq!(generation_number(other), None, "{other}");
        }
    }
}
