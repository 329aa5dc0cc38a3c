//! The two real agents on the loopback, everything on but the rsync daemon.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use snapferry_tests::wait;

use crate::{
    child::{Cost, Daemon, Pipeline, run},
    place::Place,
};

const VOLUME: &str = "bench";

/// What is not left as it is if nobody says anything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tuning {
    /// Of the sender.
    pub window: Option<&'static str>,
    /// Of the receiver; without one by time either if it is out of reach.
    pub checkpoint: Option<&'static str>,
}

/// How an interrupted transfer went on.
#[derive(Debug, Clone, Copy)]
pub struct Resumed {
    /// Where the sender went on in its stream.
    pub skipped_bytes: u64,
    /// How long it took to get there.
    pub elapsed: Duration,
    /// How long its whole stream was.
    pub stream_bytes: u64,
    /// What the sender has cost, from there on too.
    pub cost: Cost,
}

/// Keys, configuration and state of both agents, and a running receiver.
pub struct Pair {
    receiver: Daemon,
    sender: PathBuf,
    dir: PathBuf,
    publish: PathBuf,
}

impl Pair {
    /// Makes identities and starts the receiver. `programs` is where the agents are.
    pub fn start(programs: &Path, place: &Place, tuning: Tuning) -> Self {
        let dir = place.scratch.join("pair");
        fs::create_dir_all(&dir).unwrap();
        let (sender, receiver) = (programs.join("snapferry-sender"), programs.join("snapferry-receiver"));
        let keygen = |agent: &Path| run(agent.to_str().unwrap(), &["keygen", dir.to_str().unwrap()]).trim().to_owned();
        let (sender_print, receiver_print) = (keygen(&sender), keygen(&receiver));
        let publish = dir.join("publish");

        let config = receiver_config(&dir, &sender_print, place, &publish, tuning);
        fs::write(dir.join("receiver.toml"), config).unwrap();
        let config = dir.join("receiver.toml");
        let mut receiver =
            Daemon::spawn(&receiver, &["--config", config.to_str().unwrap(), "run"], dir.join("receiver.log"));
        let address = wait::until("the receiver listens", || {
            receiver.assert_runs();
            receiver.said().lines().find_map(listening_at)
        });

        fs::write(dir.join("sender.toml"), sender_config(&dir, &receiver_print, place, &address, tuning)).unwrap();
        Self { receiver, sender, dir, publish }
    }

    /// Runs one cycle to its end, which is when the snapshot is published. What the sender has cost.
    pub fn cycle(&self) -> Cost {
        Pipeline::spawn(vec![self.run_once()]).finish()[0]
    }

    fn run_once(&self) -> Command {
        let mut sender = Command::new(&self.sender);
        sender.arg("--config").arg(self.dir.join("sender.toml")).args(["run", "--once"]);
        sender
    }

    /// Begins a cycle and kills the sender once it has read so many bytes of the stream.
    pub fn interrupt(&self, at: u64) {
        let mut sender = self.run_once().stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let io = format!("/proc/{}/io", sender.id());
        let has_read = || {
            let said = fs::read_to_string(&io).unwrap();
            said.lines().find_map(|line| line.strip_prefix("rchar: ")?.parse::<u64>().ok()).unwrap()
        };
        wait::until("most of the stream is read", || {
            assert!(sender.try_wait().unwrap().is_none(), "the cycle ended before it could be interrupted");
            (has_read() >= at).then_some(())
        });
        sender.kill().unwrap();
        sender.wait().unwrap();
    }

    /// Runs the cycle that goes on.
    pub fn resume(&self) -> Resumed {
        let pipeline = Pipeline::spawn(vec![self.run_once()]);
        let log = pipeline.log();
        let cost = pipeline.finish()[0];
        let said = log.said();
        let events: Vec<serde_json::Value> = said.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let event = |message: &str| {
            events.iter().find(|event| event["message"] == message).unwrap_or_else(|| panic!("no {message:?}: {said}"))
        };
        let caught_up = event("at the checkpoint");
        Resumed {
            skipped_bytes: caught_up["bytes"].as_u64().unwrap(),
            elapsed: Duration::from_secs_f64(caught_up["seconds"].as_f64().unwrap()),
            stream_bytes: event("cycle finished")["bytes"].as_u64().unwrap(),
            cost,
        }
    }

    /// Panics unless these files of the tree are the same where clients look.
    pub fn assert_published(&self, tree: &Path, files: &[impl AsRef<Path>]) {
        let live = self.publish.join("live/tree");
        for file in files {
            let (ours, theirs) = (fs::read(tree.join(file)).unwrap(), fs::read(live.join(file)).unwrap());
            assert!(ours == theirs, "{} is not what was sent", live.join(file).display());
        }
    }

    /// The receiving agent, for its costs.
    pub fn receiver(&self) -> &Daemon {
        &self.receiver
    }

    /// Stops the receiver and removes all but what is on the two file systems.
    pub fn stop(self) {
        self.receiver.stop();
        // The published tree stays mounted when the agent ends: that is meant so.
        for mountpoint in snapferry_tests::lab::mounts_below(&self.publish).iter().rev() {
            run("umount", &[mountpoint.to_str().unwrap()]);
        }
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

/// The address in the log line that announces it.
fn listening_at(line: &str) -> Option<String> {
    let event: serde_json::Value = serde_json::from_str(line).ok()?;
    (event["message"] == "listening").then(|| event["address"].as_str().unwrap().to_owned())
}

fn receiver_config(dir: &Path, peer: &str, place: &Place, publish: &Path, tuning: Tuning) -> String {
    let checkpoint = tuning.checkpoint.map(|size| format!("checkpoint = \"{size}\"\ncheckpoint_interval = \"1d\"\n"));
    format!(
        "{}[listen]\naddress = \"127.0.0.1:0\"\n[rsync]\nmode = \"off\"\n\
         [[volume]]\nname = \"{VOLUME}\"\nstore = {:?}\npublish = {publish:?}\n{}[log]\nformat = \"json\"\n",
        identity(dir, "receiver", peer),
        place.store(),
        checkpoint.unwrap_or_default(),
    )
}

fn sender_config(dir: &Path, peer: &str, place: &Place, address: &str, tuning: Tuning) -> String {
    let window = tuning.window.map(|size| format!("window = \"{size}\"\n")).unwrap_or_default();
    format!(
        "{}[receiver]\naddress = \"{address}\"\n{window}\
         [[volume]]\nname = \"{VOLUME}\"\nsource = {:?}\nsnapshot_dir = {:?}\n[log]\nformat = \"json\"\n",
        identity(dir, "sender", peer),
        place.tree(),
        place.snapshots(),
    )
}

fn identity(dir: &Path, agent: &str, peer: &str) -> String {
    format!(
        "[agent]\nname = \"bench-{agent}\"\nstate_dir = {:?}\n\
         [tls]\ncertificate = \"{agent}.crt\"\nprivate_key = \"{agent}.key\"\npeers = [\"{peer}\"]\n",
        dir.join(agent),
    )
}
