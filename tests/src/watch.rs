//! Looks at what is published all the time, as a client would: at every moment it must be exactly one complete snapshot.
//!
//! A look opens `live/tree` once and reads everything through that, so that it sees one generation whatever changes places
//! meanwhile. Most looks only read the marker, a file that is different in each snapshot. Whole ones compare names, sizes, modes
//! and times of everything with those of the sender's snapshots, at most a tenth of the time, and whenever the marker has changed.

use std::{
    collections::HashMap,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    os::{fd::AsRawFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// The file whose content is different in each snapshot.
pub const MARKER: &str = "marker";

/// Between two looks at the marker.
const PAUSE: Duration = Duration::from_millis(10);

/// Whole looks take at most one part in so many of the time.
const SHARE: u32 = 10;

/// Watches a published tree in a thread of its own, which ends when this is dropped.
#[derive(Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
    watching: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    live: PathBuf,
    snapshot_dir: PathBuf,
    seen: Mutex<Seen>,
    over: AtomicBool,
}

/// What was seen.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// The snapshots, in the order in which they were published.
    pub snapshots: Vec<String>,
    /// Looks at the marker.
    pub looks: u64,
    /// Whole looks.
    pub whole_looks: u64,
    /// What must not be.
    wrong: Vec<String>,
    /// What each of the sender's snapshots looks like.
    known: HashMap<String, u64>,
    /// The machine is off.
    paused: bool,
}

impl Watcher {
    /// Watches `live` (it may not be there before the first publication); the snapshots in `snapshot_dir` say what is right.
    #[must_use]
    pub fn start(live: &Path, snapshot_dir: &Path) -> Self {
        let shared = Arc::new(Shared {
            live: live.to_owned(),
            snapshot_dir: snapshot_dir.to_owned(),
            seen: Mutex::default(),
            over: AtomicBool::new(false),
        });
        let ours = Arc::clone(&shared);
        Self { shared, watching: Some(thread::spawn(move || ours.watch())) }
    }

    /// Looks away: the machine is going down.
    pub fn pause(&self) {
        self.shared.lock().paused = true;
    }

    /// Looks again. The machine is up, and its agent has said that it listens.
    pub fn go_on(&self) {
        self.shared.lock().paused = false;
    }

    /// Has a look at the snapshots that there are now, before somebody deletes one.
    pub fn learn(&self) {
        self.shared.learn(&mut self.shared.lock());
    }

    /// What was seen so far. Panics if any of it was wrong.
    #[track_caller]
    pub fn check(&self) -> Seen {
        let seen = self.shared.lock().clone();
        assert!(seen.wrong.is_empty(), "what was published was not always one snapshot:\n{}", seen.wrong.join("\n"));
        seen
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        let _ = self.watching.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let (mut last, mut next_whole) = (String::new(), Instant::now());
        while !self.over.load(Ordering::Relaxed) {
            let mut seen = self.lock();
            if !seen.paused {
                seen.looks += 1;
                match self.look(&mut seen, &mut last, &mut next_whole) {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound && seen.snapshots.is_empty() => {}
                    Err(error) => {
                        let wrong = format!("after {:?}: {error}", seen.snapshots.last());
                        seen.wrong.push(wrong);
                    }
                }
            }
            // One is enough.
            if !seen.wrong.is_empty() {
                return;
            }
            drop(seen);
            thread::sleep(PAUSE);
        }
    }

    fn look(&self, seen: &mut Seen, last: &mut String, next_whole: &mut Instant) -> io::Result<()> {
        let tree = File::open(&self.live)?;
        let tree = PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd()));
        let marker = fs::read_to_string(tree.join(MARKER))?;
        if marker == *last && Instant::now() < *next_whole {
            return Ok(());
        }
        let begun = Instant::now();
        let looks = quick(&tree)?;
        seen.whole_looks += 1;
        if !seen.known.values().any(|known| *known == looks) {
            self.learn(seen);
        }
        let same = |(name, known): (&String, &u64)| (*known == looks).then(|| name.clone());
        let Some(name) = seen.known.iter().find_map(same) else {
            let known: Vec<_> = seen.known.keys().collect();
            return Err(io::Error::other(format!("marker {marker:?}, like none of {known:?}")));
        };
        if seen.snapshots.last() != Some(&name) {
            if seen.snapshots.contains(&name) {
                return Err(io::Error::other(format!("{name} came back after {:?}", seen.snapshots)));
            }
            seen.snapshots.push(name);
        }
        *last = marker;
        *next_whole = Instant::now() + begun.elapsed() * SHARE;
        Ok(())
    }

    fn learn(&self, seen: &mut Seen) {
        for entry in fs::read_dir(&self.snapshot_dir).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !seen.known.contains_key(&name) {
                // It may be on its way out.
                if let Ok(looks) = quick(&entry.path()) {
                    seen.known.insert(name, looks);
                }
            }
        }
    }
}

/// Names, kinds, sizes, modes and times of everything in a tree, as one number.
///
/// # Errors
/// Something cannot be read.
pub fn quick(root: &Path) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    let mut directories = vec![(root.to_owned(), PathBuf::new())];
    while let Some((path, relative)) = directories.pop() {
        let mut entries = fs::read_dir(&path)?.collect::<io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        relative.hash(&mut hasher);
        for entry in entries {
            let meta = entry.metadata()?;
            let size = if meta.is_dir() { 0 } else { meta.len() };
            (entry.file_name(), size, meta.mode(), meta.mtime(), meta.mtime_nsec()).hash(&mut hasher);
            if meta.is_dir() {
                directories.push((entry.path(), relative.join(entry.file_name())));
            }
        }
    }
    Ok(hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use rustix::fs::{CWD, RenameFlags};

    use super::*;
    use crate::wait;

    /// Two snapshots and what is published, all of it plain directories.
    struct Scene {
        dir: tempfile::TempDir,
    }

    impl Scene {
        fn new() -> Self {
            let scene = Self { dir: tempfile::tempdir().unwrap() };
            for (name, place) in [("one", "live"), ("two", "next")] {
                let (tree, copy) = (scene.path("snapshots").join(name), scene.path(place).join("tree"));
                fs::create_dir_all(tree.join("below")).unwrap();
                fs::write(tree.join(MARKER), name).unwrap();
                fs::write(tree.join("below/file"), name).unwrap();
                fs::create_dir_all(copy.parent().unwrap()).unwrap();
                crate::lab::run(std::process::Command::new("cp").arg("-a").args([&tree, &copy]));
            }
            scene
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        fn watch(&self) -> Watcher {
            let watcher = Watcher::start(&self.path("live/tree"), &self.path("snapshots"));
            self.sees(&watcher, "one");
            watcher
        }

        fn sees(&self, watcher: &Watcher, name: &str) {
            wait::until(name, || watcher.check().snapshots.iter().any(|seen| seen == name).then_some(()));
        }

        fn swap(&self) {
            rustix::fs::renameat_with(CWD, self.path("live"), CWD, self.path("next"), RenameFlags::EXCHANGE).unwrap();
        }
    }

    /// Waits until something is wrong, and says what.
    fn wrong(watcher: &Watcher) -> String {
        wait::until("something is wrong", || watcher.shared.lock().wrong.first().cloned())
    }

    #[test]
    fn one_snapshot_after_the_other_is_right_and_the_way_back_is_not() {
        let scene = Scene::new();
        let watcher = scene.watch();
        scene.swap();
        scene.sees(&watcher, "two");
        assert_eq!(watcher.check().snapshots, ["one", "two"]);
        scene.swap();
        assert!(wrong(&watcher).contains("one came back"));
    }

    #[test]
    fn a_file_that_is_not_of_the_snapshot_is_found() {
        let scene = Scene::new();
        let watcher = scene.watch();
        fs::write(scene.path("live/tree/below/file"), "another").unwrap();
        assert!(wrong(&watcher).contains("like none of"));
    }

    #[test]
    fn a_moment_without_any_is_found_unless_the_machine_is_off() {
        let scene = Scene::new();
        let watcher = scene.watch();
        watcher.pause();
        let looks = watcher.check().looks;
        fs::rename(scene.path("live/tree"), scene.path("live/away")).unwrap();
        fs::rename(scene.path("live/away"), scene.path("live/tree")).unwrap();
        assert_eq!(watcher.check().looks, looks);
        watcher.go_on();
        fs::rename(scene.path("live/tree"), scene.path("live/away")).unwrap();
        assert!(wrong(&watcher).contains("No such file"));
    }
}
