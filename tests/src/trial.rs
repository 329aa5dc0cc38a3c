//! A pair that is put through faults: agents that come and go, a faulty link between them, a watcher in front of what is
//! published, and the books: what went over the network, how often it had to, and from where each transfer went on.

use std::{
    collections::HashMap,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use fastrand::Rng;
use rustix::process::{Pid, Signal};

use crate::{
    agent::Agent,
    config::{Settings, VOLUME},
    event::{Event, Log},
    host::{Host, MIRROR_ADDRESS},
    lab,
    link::{Link, Way},
    manifest,
    measure::{entries, largest_file, stream_bytes},
    pair::{Disks, Pair, name},
    programs::{self, RECEIVER, SENDER},
    wait,
    watch::{MARKER, Watcher},
};

/// The variable that shows what the agents said also when all went well.
const SHOW_LOGS: &str = "SNAPFERRY_SHOW_LOGS";

/// Bytes between two checkpoints.
pub const CHECKPOINT: u64 = 2 << 20;
/// What the sender keeps until it is acknowledged: the least that it can be told.
pub const WINDOW: u64 = 4 << 20;
/// What may be sent again after a crash beyond checkpoint and window: a segment ends only behind a whole file, so the largest one
/// (see [`Trial::largest`]), and what is under way between the steps inside the receiver: a write of 1 MiB that is being collected, 1 MiB in
/// the pipe, four blocks of 256 KiB; and a TLS handshake.
const CRASH_SLACK: u64 = 4 << 20;
/// And what after a broken connection: frames of acknowledged blocks that were half sent, a handshake.
const CONNECTION_SLACK: u64 = 512 << 10;
/// TLS and frames, as a share of the bytes; and greetings.
const OVERHEAD_SHARE: u64 = 100;
const GREETINGS: u64 = 128 << 10;

/// How long a transfer may take, faults included.
const TRANSFER_DEADLINE: Duration = Duration::from_secs(180);

/// What an interruption may cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// An agent lost its memory: back to the checkpoint.
    Crash,
    /// Only the connection was lost.
    Connection,
    /// The checkpoint was lost as well: all of it again.
    Everything,
}

/// What came of the transfers of a trial.
#[derive(Debug, Clone, Copy, Default)]
pub struct Books {
    /// Transfers that ended well.
    pub transfers: u64,
    /// Faults that struck.
    pub interruptions: u64,
    /// Times that a transfer went on at the byte, in another connection.
    pub at_byte: u64,
    /// Times that it went on at a checkpoint.
    pub at_checkpoint: u64,
    /// Times that it began from nothing although there had been a checkpoint.
    pub from_nothing: u64,
    /// Bytes of the streams.
    pub stream: u64,
    /// Bytes that the sender put into the network, handshakes and all.
    pub network: u64,
}

/// A snapshot on its way.
#[derive(Debug, Clone)]
pub struct Transfer {
    /// Its name.
    pub snapshot: String,
    /// The name of the one that was published when it began.
    pub base: Option<String>,
    /// Bytes of its stream.
    pub stream: u64,
    /// What had gone over the network before.
    passed: u64,
    /// What faults have added to the most that may go over the network.
    allowed: u64,
}

/// A pair, its agents and everything around them.
pub struct Trial {
    sender: Option<Agent>,
    receiver: Option<Agent>,
    /// In front of `live/tree`.
    pub watcher: Watcher,
    /// Between the agents.
    pub link: Link,
    /// The hosts.
    pub pair: Pair,
    /// Everything random.
    pub rng: Rng,
    /// How the agents are configured.
    pub settings: Settings,
    /// Environment variables of senders that are started from now on.
    pub sender_environment: Vec<(&'static str, String)>,
    /// And of receivers.
    pub receiver_environment: Vec<(&'static str, String)>,
    receiver_logs: Vec<Log>,
    sender_logs: Vec<Log>,
    books: Books,
}

impl Trial {
    /// With agents configured for short transfers with many checkpoints, and everything else as it is by default.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Disks::default(), |_| {})
    }

    /// The same with other disks and settings.
    #[must_use]
    pub fn with(seed: u64, disks: Disks, change: impl FnOnce(&mut Settings)) -> Self {
        let mut settings = Self::settings();
        change(&mut settings);
        let pair = Pair::with(&settings, disks);
        Self::of(seed, pair, settings)
    }

    /// For short transfers with many checkpoints, over the faulty link; everything else as it is by default.
    #[must_use]
    pub fn settings() -> Settings {
        Settings {
            rsync: "off".to_owned(),
            level: Some("debug".to_owned()),
            receiver_address: Some(Link::address()),
            reconnect_grace: "60s".to_owned(),
            window: Some(format!("{WINDOW}B")),
            checkpoint: Some(format!("{CHECKPOINT}B")),
            // What compression spares would hide what is sent again.
            compression: Some("none".to_owned()),
            ..Settings::default()
        }
    }

    /// The same around a pair that is configured with these settings.
    #[must_use]
    pub fn of(seed: u64, pair: Pair, settings: Settings) -> Self {
        let link = Link::start(&pair.head, MIRROR_ADDRESS);
        let watcher = Watcher::start(&pair.live(), &pair.places.snapshot_dir);
        Self {
            sender: None,
            receiver: None,
            watcher,
            link,
            pair,
            rng: Rng::with_seed(seed),
            settings,
            sender_environment: Vec::new(),
            receiver_environment: Vec::new(),
            receiver_logs: Vec::new(),
            sender_logs: Vec::new(),
            books: Books::default(),
        }
    }

    /// Where the data is.
    #[must_use]
    pub fn source(&self) -> &Path {
        &self.pair.places.source
    }

    /// The receiver that runs.
    #[must_use]
    #[track_caller]
    pub fn receiver(&self) -> &Agent {
        self.receiver.as_ref().expect("no receiver runs")
    }

    /// The sender that runs.
    #[must_use]
    #[track_caller]
    pub fn sender(&self) -> &Agent {
        self.sender.as_ref().expect("no sender runs")
    }

    /// Starts the sender.
    pub fn start_sender(&mut self) {
        let sender = self.start_one(&self.pair.head, SENDER, &self.sender_environment, &["run"]);
        self.sender_logs.push(sender.log().clone());
        self.sender = Some(sender);
    }

    /// Starts the receiver; it may take a moment until it listens.
    pub fn start_receiver(&mut self) {
        let receiver = self.start_one(&self.pair.mirror, RECEIVER, &self.receiver_environment, &["run"]);
        self.receiver_logs.push(receiver.log().clone());
        self.receiver = Some(receiver);
    }

    fn start_one(&self, host: &Host, program: &str, environment: &[(&str, String)], arguments: &[&str]) -> Agent {
        let config = if program == SENDER { self.pair.sender_config() } else { self.pair.receiver_config() };
        let mut command = host.command(programs::path(program));
        command.envs(environment.iter().cloned()).arg("--config").arg(config);
        Agent::start(command, arguments)
    }

    /// Starts the receiver, and the sender as soon as it can be received.
    pub fn start(&mut self) {
        self.start_receiver();
        self.receiver().wait_for("listening");
        self.start_sender();
    }

    /// Ends the sender as a power cut would.
    pub fn kill_sender(&mut self) {
        self.sender.take().expect("no sender runs").kill();
    }

    /// Ends the receiver as a power cut would, but for what it has given to others: what `btrfs receive` has read it still applies.
    pub fn kill_receiver(&mut self) {
        self.receiver.take().expect("no receiver runs").kill();
    }

    /// Waits until the receiver has ended by itself.
    pub fn receiver_ended(&mut self) {
        self.receiver.take().expect("no receiver runs").wait();
    }

    /// The `btrfs receive` of the moment.
    #[must_use]
    pub fn receive_process(&self) -> Option<Pid> {
        self.pair.mirror.process("btrfs -q receive")
    }

    /// Sends a signal to the `btrfs receive` of the moment. False if there is none any more.
    #[must_use]
    pub fn signal_receive(&self, signal: Signal) -> bool {
        self.receive_process().is_some_and(|pid| rustix::process::kill_process(pid, signal).is_ok())
    }

    /// Stops both agents in good order.
    pub fn stop(&mut self) {
        for agent in [self.sender.take(), self.receiver.take()].into_iter().flatten() {
            agent.stop().0.expect(0);
        }
    }

    /// Stops the agents and lets the sender take a snapshot of the source, marked, while there is nobody who could receive it.
    pub fn take(&mut self) -> Transfer {
        self.stop();
        let marker = format!("{:016x}", self.rng.u64(..));
        fs::write(self.source().join(MARKER), &marker).unwrap();
        let before = self.pair.snapshots();
        self.start_one(&self.pair.head, SENDER, &self.sender_environment, &["run", "--once"]).wait().expect(4);
        let taken: Vec<_> = self.pair.snapshots().into_iter().filter(|path| !before.contains(path)).collect();
        assert_eq!(taken.len(), 1, "{taken:?}");
        self.announce(&taken[0])
    }

    /// A snapshot that is there already is the next to go.
    #[must_use]
    pub fn announce(&self, snapshot: &Path) -> Transfer {
        let base = self.pair.published();
        let base_path = base.as_ref().map(|base| self.pair.places.snapshot_dir.join(base));
        Transfer {
            snapshot: name(snapshot),
            base,
            stream: stream_bytes(snapshot, base_path.as_deref()),
            passed: self.link.passed(Way::Out),
            allowed: 0,
        }
    }

    /// How large the largest file of a snapshot is.
    #[must_use]
    pub fn largest(&self, transfer: &Transfer) -> u64 {
        largest_file(&self.pair.places.snapshot_dir.join(&transfer.snapshot))
    }

    /// Notes that so many faults struck.
    pub fn interrupted(&mut self, transfer: &mut Transfer, times: u64, cost: Cost) {
        let each = match cost {
            Cost::Crash => CHECKPOINT + WINDOW + CRASH_SLACK + self.largest(transfer),
            Cost::Connection => WINDOW + CONNECTION_SLACK,
            Cost::Everything => transfer.stream + transfer.stream / OVERHEAD_SHARE + WINDOW + CRASH_SLACK,
        };
        transfer.allowed += times * each;
        self.books.interruptions += times;
    }

    /// Whether the sender that runs knows that the snapshot is published.
    #[must_use]
    pub fn has_arrived(&self, transfer: &Transfer) -> bool {
        let of_it = |event: &Event| event.text("snapshot").starts_with(&transfer.snapshot);
        let done = |event: &Event| ["cycle finished", "nothing to send"].contains(&event.message()) && of_it(event);
        self.sender.as_ref().is_some_and(|sender| sender.log().events().iter().any(done))
    }

    /// Waits until `condition` gives something or the transfer is over; None if it is.
    pub fn during<T>(&self, transfer: &Transfer, mut condition: impl FnMut(&Self) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + TRANSFER_DEADLINE;
        loop {
            if let Some(found) = condition(self) {
                return Some(found);
            }
            if self.has_arrived(transfer) {
                return None;
            }
            assert!(Instant::now() < deadline, "it takes too long:\n{}", self.logs());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the snapshot is published.
    #[track_caller]
    pub fn arrived(&mut self, transfer: &Transfer) {
        let arrived = wait::within(TRANSFER_DEADLINE, || {
            let running = |agent: &mut Option<Agent>| agent.as_mut().is_none_or(Agent::is_running);
            let alive = running(&mut self.sender) && running(&mut self.receiver);
            (self.has_arrived(transfer) || !alive).then_some(())
        });
        assert!(
            arrived.is_some() && self.has_arrived(transfer),
            "{} does not arrive:\n{}",
            transfer.snapshot,
            self.logs()
        );
    }

    /// Waits until the snapshot is published, and sees that all is as it should be: an equal replica, nothing wrong in front of it, no
    /// more bytes over the network than allowed.
    #[track_caller]
    pub fn arrives(&mut self, transfer: &Transfer) {
        self.arrived(transfer);
        let network = self.link.passed(Way::Out) - transfer.passed;
        let (sent, replica) = (&self.pair.places.snapshot_dir, &self.pair.places.store);
        manifest::assert_resumed(&sent.join(&transfer.snapshot), &replica.join(&transfer.snapshot));
        assert_eq!(self.pair.published().as_ref(), Some(&transfer.snapshot), "the snapshot should be published");
        self.watcher.check();
        let most = transfer.stream + transfer.stream / OVERHEAD_SHARE + GREETINGS + transfer.allowed;
        assert!(
            network <= most,
            "{network} bytes went over the network for a stream of {}, {most} are allowed:\n{}",
            transfer.stream,
            self.logs()
        );
        self.books.transfers += 1;
        self.books.stream += transfer.stream;
        self.books.network += network;
    }

    /// Everything that the agents said, sender first.
    #[must_use]
    pub fn logs(&self) -> String {
        let part = |title: &str, logs: &[Log]| {
            let texts = logs.iter().map(|log| format!("--- {title}\n{}\n", log.as_text()));
            texts.collect::<String>()
        };
        part("sender", &self.sender_logs) + &part("receiver", &self.receiver_logs)
    }

    /// Ends the trial: sees that nothing is left over, and closes the books.
    #[track_caller]
    pub fn end(mut self) -> Books {
        let places = self.pair.places.clone();
        wait::until("former generations are gone", || (entries(&places.publish) == ["live"]).then_some(()));
        self.stop();
        self.pair.assert_no_processes(&self.pair.head);
        self.pair.assert_no_processes(&self.pair.mirror);
        self.assert_nothing_left();
        self.watcher.check();
        self.count_starts();
        if std::env::var_os(SHOW_LOGS).is_some_and(|value| value == "1") {
            println!("{}", self.logs());
        }
        self.books
    }

    #[track_caller]
    fn assert_nothing_left(&self) {
        let (pair, places) = (&self.pair, &self.pair.places);
        pair.assert_no_leftovers();
        let lock = format!(".{VOLUME}.lock");
        for (dir, snapshots) in [(&places.store, pair.replicas()), (&places.snapshot_dir, pair.snapshots())] {
            let mut expected: Vec<String> = snapshots.iter().map(|path| name(path)).collect();
            expected.insert(0, lock.clone());
            assert_eq!(entries(dir), expected, "in {}", dir.display());
        }
        let states = [
            (&places.sender, vec!["substitutes.toml"]),
            (&places.receiver, vec!["receive", "rsyncd.conf", "substitutes.publish.toml"]),
        ];
        for (dir, expected) in states {
            let dir = dir.join("state");
            let found = entries(&dir);
            assert!(found.iter().all(|name| expected.contains(&name.as_str())), "{found:?} in {}", dir.display());
        }
        assert!(entries(&places.receiver.join("state/receive")).is_empty());
        // What is to be seen of a file system on which nothing else is: its subvolumes.
        let listed = lab::run(Command::new("btrfs").args(["subvolume", "list"]).arg(&places.store));
        assert_eq!(listed.lines().count(), pair.replicas().len(), "{listed}");
        let mut mounted = lab::mounts_below(pair.lab.path());
        mounted.retain(|point| !["head", "mirror"].iter().any(|disk| *point == pair.lab.path().join(disk)));
        mounted.retain(|point| *point != pair.lab.path().join("outer"));
        assert_eq!(mounted, [pair.live()]);
    }

    /// Counts from where transfers began and went on, in the receivers' words.
    fn count_starts(&mut self) {
        let mut checkpoints: HashMap<String, bool> = HashMap::new();
        for event in self.receiver_logs.iter().flat_map(Log::events) {
            let has_checkpoint = checkpoints.entry(event.text("snapshot").to_owned()).or_default();
            match event.message() {
                "checkpoint" => *has_checkpoint = true,
                "transfer goes on" => self.books.at_byte += 1,
                "transfer started" if event.has("durable") => self.books.at_checkpoint += 1,
                "transfer started" if *has_checkpoint => {
                    self.books.from_nothing += 1;
                    *has_checkpoint = false;
                }
                _ => {}
            }
        }
    }
}
