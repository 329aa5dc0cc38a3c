//! Where a data set lies and where it goes: two file systems of its own, their images in memory.

use std::{
    fs,
    path::{Path, PathBuf},
};

use common::testing::TestFs;
use snapferry_tests::btrfs;

use crate::child::run;

/// The images keep the memory that they have once got, deleted data included: else every row would pay anew for it.
const OPTIONS: &str = "noatime,nodiscard";

/// A source with a tree in it, and an empty replica.
pub struct Place {
    /// For anything else.
    pub scratch: PathBuf,
    source: TestFs,
    replica: TestFs,
}

impl Place {
    /// Makes two empty file systems of `bytes` each. The images are sparse.
    pub fn new(bytes: u64) -> Self {
        let place = Self {
            scratch: std::env::temp_dir(),
            source: TestFs::with_options(bytes, &[], OPTIONS),
            replica: TestFs::with_options(bytes, &[], OPTIONS),
        };
        btrfs::create(&place.tree());
        fs::create_dir(place.snapshots()).unwrap();
        fs::create_dir(place.store()).unwrap();
        place
    }

    /// The source's subvolume.
    pub fn tree(&self) -> PathBuf {
        self.source.path().join("tree")
    }

    /// Where snapshots of it go.
    pub fn snapshots(&self) -> PathBuf {
        self.source.path().join("snapshots")
    }

    /// Where they are received.
    pub fn store(&self) -> PathBuf {
        self.replica.path().join("store")
    }

    /// Writes everything to the images.
    pub fn sync(&self) {
        btrfs::sync(self.source.path());
        btrfs::sync(self.replica.path());
    }

    /// Removes all snapshots on both sides and waits until their space is free again.
    pub fn clear(&self) {
        for dir in [self.snapshots(), self.store()] {
            for snapshot in btrfs::subvolumes(&dir) {
                btrfs::delete(&snapshot);
            }
            wait_for_cleaner(&dir);
        }
        self.sync();
    }
}

fn wait_for_cleaner(path: &Path) {
    run("btrfs", &["subvolume", "sync", path.to_str().unwrap()]);
}
