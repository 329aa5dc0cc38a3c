//! A head node and a mirror box, ready to go: file systems, network, keys, configurations. Agents are started by the tests.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::Pid;

use crate::{
    agent::{Agent, Ended},
    btrfs,
    config::{self, Places, Settings, VOLUME},
    event::Event,
    host::{Host, MIRROR_ADDRESS},
    lab::{self, Lab},
    manifest,
    programs::{self, RECEIVER, SENDER},
    wait,
};

/// What the file systems of a pair are like.
#[derive(Debug, Clone)]
pub struct Disks {
    /// Bytes of each.
    pub bytes: u64,
    /// Mount options of the head node's.
    pub head: &'static str,
    /// Mount options of the mirror box's.
    pub mirror: &'static str,
}

impl Default for Disks {
    fn default() -> Self {
        Self { bytes: 2 * lab::SMALL, head: "noatime", mirror: "noatime" }
    }
}

/// Two hosts and all that they have. Declare agents after it, so that they go first.
#[derive(Debug)]
pub struct Pair {
    /// Where everything is.
    pub lab: Lab,
    /// The head node.
    pub head: Host,
    /// The mirror box.
    pub mirror: Host,
    /// What is where.
    pub places: Places,
    /// The sender's fingerprint, as `keygen` printed it.
    pub sender_fingerprint: String,
    /// The receiver's fingerprint, as `keygen` printed it.
    pub receiver_fingerprint: String,
    disks: Disks,
}

impl Pair {
    /// A pair with default settings.
    #[must_use]
    pub fn new() -> Self {
        Self::with(&Settings::default(), Disks::default())
    }

    /// A pair.
    #[must_use]
    pub fn with(settings: &Settings, disks: Disks) -> Self {
        let lab = Lab::new();
        let (head, mirror) = lab.network();
        let head_disk = lab.file_system("head", disks.bytes, disks.head);
        let mirror_disk = lab.file_system("mirror", disks.bytes, disks.mirror);
        let places = Places {
            source: head_disk.join("publish"),
            snapshot_dir: head_disk.join(".snapferry"),
            store: mirror_disk.join(VOLUME),
            publish: lab.path().join("publish").join(VOLUME),
            sender: lab.directory("etc-head"),
            receiver: lab.directory("etc-mirror"),
        };
        btrfs::create(&places.source);
        fs::create_dir(&places.snapshot_dir).unwrap();
        let sender_fingerprint = keygen(&head, SENDER, &places.sender);
        let receiver_fingerprint = keygen(&mirror, RECEIVER, &places.receiver);
        let pair = Self { lab, head, mirror, places, sender_fingerprint, receiver_fingerprint, disks };
        pair.configure(settings);
        pair
    }

    /// Writes both configuration files anew; agents read them when they start.
    pub fn configure(&self, settings: &Settings) {
        let sender = config::sender(&self.places, settings, &self.receiver_fingerprint);
        let receiver = config::receiver(&self.places, settings, &self.sender_fingerprint);
        config::write(&self.sender_config(), &sender);
        config::write(&self.receiver_config(), &receiver);
    }

    /// The sender's configuration file.
    #[must_use]
    pub fn sender_config(&self) -> PathBuf {
        self.places.sender.join("sender.toml")
    }

    /// The receiver's configuration file.
    #[must_use]
    pub fn receiver_config(&self) -> PathBuf {
        self.places.receiver.join("receiver.toml")
    }

    /// Starts the sender's program on the head node with these arguments.
    #[must_use]
    pub fn sender(&self, arguments: &[&str]) -> Agent {
        let mut command = self.head.command(programs::path(SENDER));
        command.arg("--config").arg(self.sender_config());
        Agent::start(command, arguments)
    }

    /// Starts the receiver's program on the mirror box with these arguments.
    #[must_use]
    pub fn receiver(&self, arguments: &[&str]) -> Agent {
        let mut command = self.mirror.command(programs::path(RECEIVER));
        command.arg("--config").arg(self.receiver_config());
        Agent::start(command, arguments)
    }

    /// Starts the receiver and waits until it listens.
    #[must_use]
    #[track_caller]
    pub fn start_receiver(&self) -> Agent {
        let receiver = self.receiver(&["run"]);
        receiver.wait_for("listening");
        receiver
    }

    /// One cycle that succeeds; what the sender said of it. (Of the last one, if it had an unfinished transfer to finish first.)
    #[track_caller]
    pub fn ferry(&self) -> Event {
        let ended = self.run_once().expect(0);
        ended.log.all("cycle finished").pop().unwrap_or_else(|| panic!("no cycle finished:\n{}", ended.log.as_text()))
    }

    /// One cycle, however it ends.
    #[track_caller]
    pub fn run_once(&self) -> Ended {
        self.sender(&["run", "--once"]).wait()
    }

    /// The sender's snapshots, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<PathBuf> {
        btrfs::subvolumes(&self.places.snapshot_dir)
    }

    /// The sender's newest snapshot.
    #[must_use]
    #[track_caller]
    pub fn newest(&self) -> PathBuf {
        self.snapshots().pop().expect("the sender has no snapshot")
    }

    /// The receiver's snapshots, complete or not, oldest first.
    #[must_use]
    pub fn replicas(&self) -> Vec<PathBuf> {
        btrfs::subvolumes(&self.places.store)
    }

    /// What clients see: the path through which they see it.
    #[must_use]
    pub fn live(&self) -> PathBuf {
        self.places.publish.join("live/tree")
    }

    /// The name of the receiver's snapshot that is published; None if none is.
    #[must_use]
    pub fn published(&self) -> Option<String> {
        let live = self.live();
        let mounted = lab::mounts_below(self.lab.path()).contains(&live);
        let uuid = mounted.then(|| btrfs::show(&live)["UUID"].clone())?;
        let ours = self.replicas().into_iter().find(|replica| btrfs::show(replica)["UUID"] == uuid);
        ours.map(|replica| name(&replica))
    }

    /// The rsync module.
    #[must_use]
    pub fn url(&self) -> String {
        format!("rsync://{MIRROR_ADDRESS}/{VOLUME}/")
    }

    /// The `btrfs receive` that is at work on the mirror box.
    #[must_use]
    pub fn btrfs_receive(&self) -> Option<Pid> {
        self.mirror.process("receive --chroot")
    }

    /// Panics unless the sender's newest snapshot has an equal replica, complete and published, and is what clients see.
    #[track_caller]
    pub fn assert_arrived(&self) {
        self.assert_arrived_by(manifest::assert_replica);
    }

    /// The same with another judge of source and replica.
    #[track_caller]
    pub fn assert_arrived_by(&self, judge: fn(&Path, &Path)) {
        let newest = self.newest();
        let replica = self.places.store.join(name(&newest));
        assert_complete(&replica);
        judge(&newest, &replica);
        assert_eq!(self.published(), Some(name(&newest)), "the newest snapshot should be published");
    }

    /// Panics unless everything in the store is a complete snapshot: no transfer left anything behind.
    #[track_caller]
    pub fn assert_no_leftovers(&self) {
        for replica in self.replicas() {
            assert_complete(&replica);
        }
    }

    /// Panics unless no process of an agent runs on this host, `btrfs` and rsync included, or comes to its end soon.
    #[track_caller]
    pub fn assert_no_processes(&self, host: &Host) {
        let ended = wait::within(Duration::from_secs(2), || host.processes().is_empty().then_some(()));
        assert!(ended.is_some(), "still running: {:?}", host.processes());
    }

    /// The mirror box goes down and comes up again, without its agent: everything is unmounted, the file system mounted anew.
    pub fn reboot_mirror(&self) {
        self.lab.unmount_all(&self.places.publish);
        let disk = self.lab.path().join("mirror");
        self.lab.unmount_all(&disk);
        let _ = self.lab.mount("mirror", self.disks.mirror);
    }
}

impl Default for Pair {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes an identity with the real program and returns the fingerprint that it prints.
fn keygen(host: &Host, program: &str, dir: &Path) -> String {
    let ended =
        Agent::start(host.command(programs::path(program)), ["keygen".as_ref(), dir.as_os_str()]).wait().expect(0);
    let words = ended.stdout.split_whitespace().find(|word| word.starts_with("sha256:"));
    words.unwrap_or_else(|| panic!("{program} keygen printed no fingerprint: {}", ended.stdout)).to_owned()
}

/// Panics unless a subvolume is a complete replica: read-only, and it says of what.
#[track_caller]
fn assert_complete(replica: &Path) {
    assert!(replica.is_dir(), "{} is not there", replica.display());
    let about = btrfs::show(replica);
    assert!(about["Flags"].contains("readonly"), "{} is not read-only", replica.display());
    assert_ne!(about["Received UUID"], "-", "{} is not complete", replica.display());
}

/// The last part of a path.
#[must_use]
pub fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}
