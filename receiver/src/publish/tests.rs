//! Publications on a real btrfs: crashes behind every step, reboots, other people's mounts, readers across the swap.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
    process::{Command, ExitStatus},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use common::{
    btrfs::{self, Subvolume},
    snapshot::SnapshotId,
    testing::{SMALL, TestFs, run},
};
use jiff::SignedDuration;
use rustix::mount::UnmountFlags;
use uuid::Uuid;

use super::{recover::Recovery, *};
use crate::store::Store;

/// A mirror box: a file system with a store, a directory to publish in, and a state directory.
struct Mirror {
    fs: TestFs,
    home: PathBuf,
}

const STEPS: std::ops::RangeInclusive<u32> = 1..=7;

impl Mirror {
    fn new() -> Self {
        let fs = TestFs::new(SMALL);
        let home = fs.path().to_owned();
        let mirror = Self { fs, home };
        fs::create_dir(mirror.home.join("store")).unwrap();
        (1..=3).for_each(|n| mirror.receive(n));
        mirror.prepare();
        mirror
    }

    /// Another directory to publish in, in the same file system and with the same store.
    fn case(&mut self, name: &str) {
        self.reboot();
        self.home = self.fs.path().join(name);
        fs::create_dir(&self.home).unwrap();
        std::os::unix::fs::symlink(self.fs.path().join("store"), self.home.join("store")).unwrap();
        self.prepare();
    }

    fn prepare(&self) {
        fs::create_dir(self.home.join("state")).unwrap();
        fs::create_dir(self.publish()).unwrap();
    }

    fn publish(&self) -> PathBuf {
        self.home.join("publish")
    }

    fn path(&self, n: u8) -> PathBuf {
        self.home.join("store").join(snapshot(n).name.to_string())
    }

    /// What a transfer leaves: a complete snapshot, all of whose files say which one it is.
    fn receive(&self, n: u8) {
        let path = self.path(n);
        btrfs::create(&path).unwrap();
        for file in ["first", "last"] {
            fs::write(path.join(file), n.to_string()).unwrap();
        }
        btrfs::mark_received(&Subvolume::open(&path).unwrap(), snapshot(n).id).unwrap();
    }

    fn verified(&self, n: u8) -> Verified {
        Verified::unchecked(snapshot(n), self.path(n))
    }

    fn recover(&self) -> (Publisher, Recovery) {
        self.try_recover().unwrap()
    }

    fn try_recover(&self) -> Result<(Publisher, Recovery), PublishError> {
        recover(&self.home)
    }

    /// Another process recovers and publishes `n`, and dies behind `step` if that is given.
    fn publish_elsewhere(&self, n: u8, crash: Option<&str>) -> ExitStatus {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "publish::tests::another_process", "--nocapture", "--include-ignored"]);
        command.env("SNAPFERRY_TEST_HOME", &self.home).env("SNAPFERRY_TEST_SNAPSHOT", n.to_string());
        if let Some(point) = crash {
            command.env(crash::VARIABLE, point);
        }
        command.output().unwrap().status
    }

    fn dies(&self, n: u8, point: &str) {
        let status = self.publish_elsewhere(n, Some(point));
        assert_eq!(status.signal(), Some(6), "it did not die behind {point}: {status}");
    }

    /// All mounts of the publication are gone, as after a reboot.
    fn reboot(&self) {
        for mount in mount::table().unwrap().iter().rev() {
            if mount.point.starts_with(self.publish()) {
                rustix::mount::unmount(&mount.point, UnmountFlags::DETACH).unwrap();
            }
        }
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let points = mount::table().unwrap().into_iter().map(|mount| mount.point);
        points.filter(|point| point.starts_with(self.publish())).collect()
    }

    /// What a new client sees; None if there is no directory that it can see into.
    fn seen(&self) -> Option<u8> {
        see(&self.publish().join("live/tree"))
    }

    /// Nothing but the published snapshot is left, and the file says so.
    fn is_tidy(&self, publisher: &mut Publisher, published: Option<u8>) {
        tick(publisher);
        assert_eq!(publisher.retiring(), []);
        assert_eq!(publisher.published(), published.map(snapshot).as_ref());
        let remembered = publisher.file.load().unwrap();
        assert_eq!(State { generation: publisher.state.generation, ..remembered }, publisher.state);
        assert_eq!(publisher.state.intent, None);
        assert_eq!(self.seen(), published);
        let live: Vec<PathBuf> = published.map(|_| self.publish().join("live/tree")).into_iter().collect();
        assert_eq!(self.mounts(), live);
        assert_eq!(fs::read_dir(self.publish()).unwrap().count(), live.len());
        if let [live] = &live[..] {
            assert!(mount::at(live).unwrap().unwrap().is_protected());
        }
    }
}

fn recover(home: &Path) -> Result<(Publisher, Recovery), PublishError> {
    let store = Store::open(&home.join("store"), volume()).unwrap();
    Publisher::open(&volume(), &home.join("publish"), &home.join("state"))?.recover(&store.snapshots().unwrap())
}

fn volume() -> VolumeName {
    "v".parse().unwrap()
}

fn snapshot(n: u8) -> Snapshot {
    let id = SnapshotId { uuid: Uuid::from_bytes([n; 16]), ctransid: u64::from(n) };
    Snapshot { name: format!("v.2026112{n}T070000Z").parse().unwrap(), id }
}

/// Which snapshot a tree is: one directory, opened once, must be the same one in its first and in its last file.
fn see(tree: &Path) -> Option<u8> {
    let dir = fs::File::open(tree).ok()?;
    let read = |file: &str| {
        use rustix::fs::{Mode, OFlags};
        let file = rustix::fs::openat(&dir, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let mut bytes = [0; 8];
        let length = rustix::io::read(&file, &mut bytes).unwrap();
        Some(std::str::from_utf8(&bytes[..length]).unwrap().parse::<u8>().unwrap())
    };
    let (first, last) = (read("first"), read("last"));
    assert_eq!(first, last, "half one snapshot, half another");
    first
}

/// A tick in some seconds.
fn tick(publisher: &mut Publisher) -> Vec<Retiring> {
    publisher.retire_at(Timestamp::now() + SignedDuration::from_secs(10))
}

/// Not a test by itself: what [`Mirror::publish_elsewhere`] runs.
#[test]
#[ignore = "run by the other tests, in a process of its own"]
fn another_process() {
    let Some(home) = std::env::var_os("SNAPFERRY_TEST_HOME") else { return };
    let n: u8 = std::env::var("SNAPFERRY_TEST_SNAPSHOT").unwrap().parse().unwrap();
    let home = Path::new(&home);
    let (mut publisher, _) = recover(home).unwrap();
    let path = home.join("store").join(snapshot(n).name.to_string());
    publisher.publish(Verified::unchecked(snapshot(n), path)).unwrap();
    if std::env::var(crash::VARIABLE).is_ok_and(|point| point.starts_with("retire")) {
        tick(&mut publisher);
    }
}

#[test]
fn the_first_publication_and_the_next() {
    let mirror = Mirror::new();
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (None, Recovery::Nothing));
    assert!(!mirror.publish().join("live").exists(), "an empty directory must not be published");

    let published = publisher.publish(mirror.verified(1)).unwrap();
    assert!(Duration::ZERO < published.swap && published.swap < published.total);
    mirror.is_tidy(&mut publisher, Some(1));
    // Again: nothing happens.
    assert_eq!(publisher.publish(mirror.verified(1)).unwrap().swap, Duration::ZERO);
    mirror.is_tidy(&mut publisher, Some(1));

    publisher.publish(mirror.verified(2)).unwrap();
    assert_eq!(publisher.retiring().iter().map(|r| r.snapshot.clone()).collect::<Vec<_>>(), [Some(snapshot(1))]);
    assert_eq!(publisher.retire(), [], "the moment after the swap belongs to those who were just looking it up");
    mirror.is_tidy(&mut publisher, Some(2));
    // Back to an older one.
    publisher.publish(mirror.verified(1)).unwrap();
    mirror.is_tidy(&mut publisher, Some(1));
}

#[test]
fn looking_on_changes_nothing() {
    let mirror = Mirror::new();
    let look = || look(&volume(), &mirror.publish(), &mirror.home.join("state")).unwrap();
    fs::remove_dir(mirror.publish()).unwrap();
    assert_eq!(look(), Looked { published: None, retiring: Vec::new() });
    assert!(!mirror.publish().exists());
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    publisher.publish(mirror.verified(2)).unwrap();
    assert_eq!(look(), Looked { published: Some(snapshot(2)), retiring: vec![snapshot(1)] });
    tick(&mut publisher);
    assert_eq!(look(), Looked { published: Some(snapshot(2)), retiring: Vec::new() });
    mirror.reboot();
    assert_eq!(look(), Looked { published: Some(snapshot(2)), retiring: Vec::new() });
    assert_eq!(mirror.mounts(), Vec::<PathBuf>::new());
}

#[test]
fn who_is_inside_stays_inside_until_they_leave() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    let client = fs::File::open(mirror.publish().join("live/tree")).unwrap();
    publisher.publish(mirror.verified(2)).unwrap();
    publisher.publish(mirror.verified(3)).unwrap();

    let left = tick(&mut publisher);
    assert_eq!(left.iter().map(|r| r.snapshot.clone()).collect::<Vec<_>>(), [Some(snapshot(2))]);
    assert_eq!(publisher.retiring()[0].snapshot, Some(snapshot(1)));
    let inside = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&client)));
    assert_eq!(see(&inside), Some(1));
    // The agent is restarted meanwhile: the client is not forgotten, nor is the time.
    let since = publisher.retiring()[0].since;
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (Some(&snapshot(3)), Recovery::Kept));
    assert_eq!((publisher.retiring()[0].snapshot.clone(), publisher.retiring()[0].since), (Some(snapshot(1)), since));
    assert_eq!(tick(&mut publisher), []);
    // What it is inside can even be published again.
    publisher.publish(mirror.verified(1)).unwrap();
    assert_eq!(publisher.retiring().len(), 2);

    drop(client);
    assert_eq!(tick(&mut publisher).len(), 2);
    mirror.is_tidy(&mut publisher, Some(1));
}

/// Behind every step, with the mounts alive and without, the first publication and a later one.
#[test]
fn a_crash_behind_any_step_is_mended() {
    let mut mirror = Mirror::new();
    for step in STEPS {
        for (former, reboot) in [(None, false), (None, true), (Some(1), false), (Some(1), true)] {
            mirror.case(&format!("step-{step}-{former:?}-{reboot}"));
            if let Some(former) = former {
                mirror.recover().0.publish(mirror.verified(former)).unwrap();
            }
            mirror.dies(2, &format!("publish:{step}"));
            assert_eq!(mirror.seen(), if step < 5 { former } else { Some(2) }, "before recovery, step {step}");
            if reboot {
                mirror.reboot();
                assert_eq!(mirror.seen(), None);
            }
            let (mut publisher, _) = mirror.recover();
            let expected = if step < 4 { former } else { Some(2) };
            assert_eq!(
                publisher.published(),
                expected.map(snapshot).as_ref(),
                "step {step}, former {former:?}, reboot {reboot}"
            );
            mirror.is_tidy(&mut publisher, expected);
            // And life goes on.
            publisher.publish(mirror.verified(3)).unwrap();
            mirror.is_tidy(&mut publisher, Some(3));
        }
    }
}

/// The recovery takes the same steps; it may crash behind each of them too.
#[test]
fn a_crash_in_the_recovery_from_a_crash_is_mended() {
    let mut mirror = Mirror::new();
    for (first, second, reboot) in
        [4, 5].into_iter().flat_map(|a| STEPS.flat_map(move |b| [(a, b, false), (a, b, true)]))
    {
        mirror.case(&format!("steps-{first}-{second}-{reboot}"));
        mirror.recover().0.publish(mirror.verified(1)).unwrap();
        mirror.dies(2, &format!("publish:{first}"));
        if reboot {
            mirror.reboot();
        }
        let again = mirror.publish_elsewhere(2, Some(&format!("publish:{second}")));
        assert!(again.success() || again.signal() == Some(6));
        if !reboot {
            assert!(matches!(mirror.seen(), Some(1 | 2)));
        }
        let (mut publisher, _) = mirror.recover();
        assert_eq!(publisher.published(), Some(&snapshot(2)), "steps {first} and {second}, reboot {reboot}");
        mirror.is_tidy(&mut publisher, Some(2));
    }
}

#[test]
fn a_crash_while_retiring_is_mended() {
    let mut mirror = Mirror::new();
    for step in 1..=3 {
        mirror.case(&format!("retire-{step}"));
        mirror.recover().0.publish(mirror.verified(1)).unwrap();
        mirror.dies(2, &format!("retire:{step}"));
        let (mut publisher, recovered) = mirror.recover();
        assert_eq!((publisher.published(), recovered), (Some(&snapshot(2)), Recovery::Kept));
        mirror.is_tidy(&mut publisher, Some(2));
    }
}

#[test]
fn the_mounts_know_better_than_an_older_state_file() {
    let mirror = Mirror::new();
    let file = mirror.home.join("state/v.publish.toml");
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    mirror.dies(2, "publish:4");
    let older = fs::read(&file).unwrap();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(3)).unwrap();

    fs::write(&file, &older).unwrap();
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (Some(&snapshot(3)), Recovery::Kept));
    mirror.is_tidy(&mut publisher, Some(3));
    // The same, rolled back by hand to what the intent wanted to replace.
    publisher.publish(mirror.verified(1)).unwrap();
    tick(&mut publisher);
    fs::write(&file, &older).unwrap();
    mirror.is_tidy(&mut mirror.recover().0, Some(1));
    // No file at all.
    fs::remove_file(&file).unwrap();
    mirror.is_tidy(&mut mirror.recover().0, Some(1));
    // Neither mounts nor a newer file: a valid older state.
    fs::write(&file, &older).unwrap();
    mirror.reboot();
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (Some(&snapshot(2)), Recovery::Restored));
    mirror.is_tidy(&mut publisher, Some(2));
    // A file that is none.
    fs::write(&file, "generation = -1").unwrap();
    assert!(matches!(mirror.try_recover(), Err(PublishError::State(_))));
    assert_eq!(mirror.seen(), Some(2));
}

#[test]
fn a_snapshot_that_is_gone_from_the_store_is_not_published() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    // The intent's snapshot is gone: the former one, with mounts and without.
    mirror.dies(2, "publish:5");
    mirror.reboot();
    btrfs::delete(&mirror.path(2)).unwrap();
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (Some(&snapshot(1)), Recovery::Restored));
    mirror.is_tidy(&mut publisher, Some(1));
    // Deleted while it is mounted: it is no snapshot any more, and nothing else is known to be good.
    btrfs::delete(&mirror.path(1)).unwrap();
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (None, Recovery::Lost(vec![snapshot(1)])));
    publisher.publish(mirror.verified(3)).unwrap();
    assert_eq!(publisher.retiring()[0].snapshot, None);
    mirror.is_tidy(&mut publisher, Some(3));
}

#[test]
fn what_is_not_ours_is_named_and_left_alone() {
    let mirror = Mirror::new();
    let live = mirror.publish().join("live");
    // In place of live: a file, a link, a directory with something in it.
    fs::write(&live, "").unwrap();
    assert!(matches!(mirror.try_recover(), Err(PublishError::NotOurs { path }) if path == live));
    fs::remove_file(&live).unwrap();
    std::os::unix::fs::symlink("store", &live).unwrap();
    assert!(matches!(mirror.try_recover(), Err(PublishError::NotOurs { path }) if path == live));
    fs::remove_file(&live).unwrap();
    fs::create_dir_all(live.join("tree/somebody's")).unwrap();
    assert!(matches!(mirror.try_recover(), Err(PublishError::NotOurs { path }) if path == live.join("tree")));
    fs::remove_dir(live.join("tree/somebody's")).unwrap();
    fs::write(live.join("notes"), "").unwrap();
    assert!(matches!(mirror.try_recover(), Err(PublishError::NotOurs { path }) if path == live));
    fs::remove_file(live.join("notes")).unwrap();
    // Empty: that is what a reboot leaves.
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!(recovered, Recovery::Nothing);
    publisher.publish(mirror.verified(1)).unwrap();
    mirror.is_tidy(&mut publisher, Some(1));

    // A generation with somebody's files in it.
    let notes = mirror.publish().join("gen-900/notes");
    fs::create_dir(mirror.publish().join("gen-900")).unwrap();
    fs::write(&notes, "").unwrap();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(2)).unwrap();
    assert_eq!(publisher.retiring()[0].generation, 901);
    tick(&mut publisher);
    assert!(notes.exists());
}

#[test]
fn a_foreign_mount_is_not_touched() {
    let mirror = Mirror::new();
    let (live, tree) = (mirror.publish().join("live"), mirror.publish().join("live/tree"));
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    for point in [&tree, &live] {
        run(Command::new("mount").args(["-t", "tmpfs", "somebody's"]).arg(point));
        let foreign = |error: &PublishError| matches!(error, PublishError::Foreign { path, .. } if path == point);
        assert!(foreign(&publisher.publish(mirror.verified(2)).unwrap_err()));
        assert!(foreign(&mirror.try_recover().unwrap_err()));
        assert_eq!(mount::at(point).unwrap().unwrap().fs_type, "tmpfs");
        rustix::mount::unmount(point, UnmountFlags::empty()).unwrap();
        mirror.is_tidy(&mut publisher, Some(1));
    }
    // At a generation.
    let other = mirror.publish().join("gen-5/tree");
    fs::create_dir_all(&other).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "somebody's"]).arg(&other));
    let (mut publisher, _) = mirror.recover();
    tick(&mut publisher);
    assert_eq!(mount::at(&other).unwrap().unwrap().fs_type, "tmpfs");
    // A snapshot that somebody mounted there by hand is taken as what it is, and made read-only.
    mirror.reboot();
    run(Command::new("mount").arg("--bind").arg(mirror.path(2)).arg(&tree));
    let (mut publisher, recovered) = mirror.recover();
    assert_eq!((publisher.published(), recovered), (Some(&snapshot(2)), Recovery::Kept));
    mirror.is_tidy(&mut publisher, Some(2));
}

#[test]
fn a_snapshot_that_was_tampered_with_is_not_published() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    Subvolume::open(&mirror.path(2)).unwrap().set_read_only(false).unwrap();
    let error = publisher.publish(mirror.verified(2)).unwrap_err();
    assert!(matches!(error, PublishError::Changed { .. }), "{error}");
    mirror.is_tidy(&mut publisher, Some(1));
    // Something else under its name.
    let impostor = Verified::unchecked(snapshot(2), mirror.path(3));
    assert!(matches!(publisher.publish(impostor), Err(PublishError::Changed { .. })));
    // Not there at all.
    let missing = Verified::unchecked(snapshot(2), mirror.path(9));
    assert!(matches!(publisher.publish(missing), Err(PublishError::Mount(_))));
    mirror.is_tidy(&mut publisher, Some(1));
}

#[test]
fn a_state_directory_that_cannot_be_written_leaves_the_former_one() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    let state = mirror.home.join("state");
    fs::rename(&state, mirror.home.join("elsewhere")).unwrap();
    assert!(matches!(publisher.publish(mirror.verified(2)), Err(PublishError::State(_))));
    assert_eq!((mirror.seen(), publisher.published()), (Some(1), Some(&snapshot(1))));
    fs::rename(mirror.home.join("elsewhere"), &state).unwrap();
    mirror.is_tidy(&mut publisher, Some(1));
    publisher.publish(mirror.verified(2)).unwrap();
    mirror.is_tidy(&mut publisher, Some(2));
}

/// From an empty directory a client with --delete would learn to delete everything.
#[test]
fn while_nothing_is_mounted_nobody_can_look_into_the_empty_directory() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    mirror.reboot();
    let tree = mirror.publish().join("live/tree");
    assert_eq!(fs::metadata(&tree).unwrap().permissions().mode() & 0o777, 0);
    let listing = Command::new("setpriv").args(["--reuid=65534", "--clear-groups", "ls"]).arg(&tree).output().unwrap();
    assert!(!listing.status.success());
    mirror.is_tidy(&mut mirror.recover().0, Some(1));
}

/// Readers see a whole snapshot at every moment, while generations come and go and the agent is restarted.
#[test]
fn readers_never_see_anything_but_one_whole_snapshot() {
    let mirror = Mirror::new();
    let (mut publisher, _) = mirror.recover();
    publisher.publish(mirror.verified(1)).unwrap();
    let done = AtomicBool::new(false);
    let watch = || {
        let mut looks = 0_u64;
        while !done.load(Ordering::Relaxed) {
            assert!(mirror.seen().is_some(), "after {looks} looks there was nothing");
            looks += 1;
        }
        looks
    };
    let looks = thread::scope(|scope| {
        let watchers = [scope.spawn(watch), scope.spawn(watch)];
        for round in 0..60 {
            publisher.publish(mirror.verified(round % 3 + 1)).unwrap();
            publisher.retire();
            if round % 10 == 9 {
                let step = [3, 4, 5, 6][usize::from(round / 10 % 4)];
                mirror.dies((round + 1) % 3 + 1, &format!("publish:{step}"));
                publisher = mirror.recover().0;
            }
        }
        done.store(true, Ordering::Relaxed);
        watchers.map(|watcher| watcher.join().unwrap())
    });
    assert!(looks.iter().all(|looks| *looks > 60), "{looks:?}");
    tick(&mut publisher);
    assert_eq!(mirror.mounts().len(), 1);
}
