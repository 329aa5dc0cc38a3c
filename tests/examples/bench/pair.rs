//! The two real agents on the loopback, everything on but the rsync daemon.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use snapferry_tests::wait;

use crate::{
    child::{Cost, Daemon, Pipeline, run},
    place::Place,
};

const VOLUME: &str = "bench";

/// Keys, configuration and state of both agents, and a running receiver.
pub struct Pair {
    receiver: Daemon,
    sender: PathBuf,
    dir: PathBuf,
    publish: PathBuf,
}

impl Pair {
    /// Makes identities and starts the receiver. `programs` is where the agents are.
    pub fn start(programs: &Path, place: &Place) -> Self {
        let dir = place.scratch.join("pair");
        fs::create_dir_all(&dir).unwrap();
        let (sender, receiver) = (programs.join("snapferry-sender"), programs.join("snapferry-receiver"));
        let keygen = |agent: &Path| run(agent.to_str().unwrap(), &["keygen", dir.to_str().unwrap()]).trim().to_owned();
        let (sender_print, receiver_print) = (keygen(&sender), keygen(&receiver));
        let publish = dir.join("publish");

        let config = receiver_config(&dir, &sender_print, place, &publish);
        fs::write(dir.join("receiver.toml"), config).unwrap();
        let config = dir.join("receiver.toml");
        let mut receiver =
            Daemon::spawn(&receiver, &["--config", config.to_str().unwrap(), "run"], dir.join("receiver.log"));
        let address = wait::until("the receiver listens", || {
            receiver.assert_runs();
            receiver.said().lines().find_map(listening_at)
        });

        fs::write(dir.join("sender.toml"), sender_config(&dir, &receiver_print, place, &address)).unwrap();
        Self { receiver, sender, dir, publish }
    }

    /// Runs one cycle to its end, which is when the snapshot is published. What the sender has cost.
    pub fn cycle(&self) -> Cost {
        let mut sender = Command::new(&self.sender);
        sender.arg("--config").arg(self.dir.join("sender.toml")).args(["run", "--once"]);
        Pipeline::spawn(vec![sender]).finish()[0]
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

fn receiver_config(dir: &Path, peer: &str, place: &Place, publish: &Path) -> String {
    format!(
        "{}[listen]\naddress = \"127.0.0.1:0\"\n[rsync]\nmode = \"off\"\n\
         [[volume]]\nname = \"{VOLUME}\"\nstore = {:?}\npublish = {publish:?}\n[log]\nformat = \"json\"\n",
        identity(dir, "receiver", peer),
        place.store(),
    )
}

fn sender_config(dir: &Path, peer: &str, place: &Place, address: &str) -> String {
    format!(
        "{}[receiver]\naddress = \"{address}\"\n\
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
