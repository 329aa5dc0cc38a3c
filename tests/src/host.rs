//! A host is a network namespace with a name, one end of a cable, and whatever runs in it.
//!
//! `nsenter --net` and not `ip netns exec`: the latter gives the program a mount namespace of its own as well, in which the
//! receiver's mounts would be seen by nobody else.
//!
//! Each pair of hosts has its own cable, so that the addresses and ports are the same in every test and tests still run side by
//! side.

use std::{
    ffi::OsStr,
    fs,
    os::{
        fd::AsFd,
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use rustix::{
    process::{Pid, Signal},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::{lab::run, wait};

/// The head node's address.
pub const HEAD_ADDRESS: &str = "10.77.0.1";
/// The mirror box's address.
pub const MIRROR_ADDRESS: &str = "10.77.0.2";
/// The mirror box's address in the new internet protocol.
pub const MIRROR_ADDRESS_6: &str = "fd77::2";

/// The interface that each host has; the other end is the other host's.
const INTERFACE: &str = "eth0";

/// A host of a lab. The lab takes it away.
#[derive(Debug, Clone)]
pub struct Host {
    namespace: String,
}

impl Host {
    /// A command that runs on this host, in a process group of its own; it is killed when the test's thread ends.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.file().display()));
        command.args(["--", "setpriv", "--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
        command.stdin(Stdio::null());
        command
    }

    /// The processes that run on it: their ids and command lines.
    #[must_use]
    pub fn processes(&self) -> Vec<(Pid, String)> {
        let Ok(ours) = fs::metadata(self.file()) else { return Vec::new() };
        let in_namespace = |pid: &Pid| {
            fs::metadata(format!("/proc/{}/ns/net", pid.as_raw_nonzero()))
                .is_ok_and(|ns| (ns.dev(), ns.ino()) == (ours.dev(), ours.ino()))
        };
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
        pids.filter(in_namespace).map(|pid| (pid, command_line(pid))).collect()
    }

    /// The first process whose command line contains `part`.
    #[must_use]
    pub fn process(&self, part: &str) -> Option<Pid> {
        self.processes().into_iter().find(|(_, line)| line.contains(part)).map(|(pid, _)| pid)
    }

    /// Lets no more than this through the cable, in this direction: a tenth of a gigabit makes a transfer slow enough to be
    /// caught in the middle.
    pub fn limit_rate(&self, megabits: u32) {
        let rate = format!("{megabits}mbit");
        let tbf = ["root", "tbf", "rate", &rate, "burst", "128kb", "latency", "200ms"];
        run(Command::new("tc").args(["-n", &self.namespace, "qdisc", "replace", "dev", INTERFACE]).args(tbf));
    }

    /// Lets everything through again.
    pub fn unlimit_rate(&self) {
        run(Command::new("tc").args(["-n", &self.namespace, "qdisc", "del", "dev", INTERFACE, "root"]));
    }

    /// Pulls the cable, or plugs it in.
    pub fn set_link(&self, up: bool) {
        let state = if up { "up" } else { "down" };
        run(Command::new("ip").args(["-n", &self.namespace, "link", "set", INTERFACE, state]));
    }

    /// Moves the calling thread to this host: what it listens or connects to from now on, and in threads that it starts, is here.
    pub fn enter(&self) {
        let namespace = fs::File::open(self.file()).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
    }

    /// Whether the namespace is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.file().exists()
    }

    fn file(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.namespace)
    }
}

/// The command line of a process, words separated by blanks; empty when it is gone.
fn command_line(pid: Pid) -> String {
    let raw = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned()
}

/// Makes the namespaces `<prefix>head` and `<prefix>mirror`, joined by a cable.
pub(crate) fn network(prefix: &str) -> (Host, Host) {
    let host = |name: &str| Host { namespace: format!("{prefix}{name}") };
    let (head, mirror) = (host("head"), host("mirror"));
    for end in [&head, &mirror] {
        run(Command::new("ip").args(["netns", "add", &end.namespace]));
    }
    let cable = ["type", "veth", "peer", "name", INTERFACE, "netns", &mirror.namespace];
    run(Command::new("ip").args(["link", "add", INTERFACE, "netns", &head.namespace]).args(cable));
    for (end, last) in [(&head, 1), (&mirror, 2)] {
        let ip = |arguments: &[&str]| run(Command::new("ip").args(["-n", &end.namespace]).args(arguments));
        ip(&["addr", "add", &format!("10.77.0.{last}/24"), "dev", INTERFACE]);
        ip(&["addr", "add", &format!("fd77::{last}/64"), "dev", INTERFACE, "nodad"]);
        ip(&["link", "set", "lo", "up"]);
        ip(&["link", "set", INTERFACE, "up"]);
    }
    (head, mirror)
}

/// Kills what runs in the namespaces with this prefix and removes them. Never panics.
pub(crate) fn remove_all(prefix: &str) {
    let Ok(entries) = fs::read_dir("/run/netns") else { return };
    for entry in entries.flatten() {
        let namespace = entry.file_name().to_string_lossy().into_owned();
        if namespace.starts_with(prefix) {
            let host = Host { namespace };
            let ended = wait::within(Duration::from_secs(5), || {
                let processes = host.processes();
                for (pid, _) in &processes {
                    let _ = rustix::process::kill_process(*pid, Signal::KILL);
                }
                processes.iter().all(|(pid, _)| is_zombie(*pid)).then_some(())
            });
            if ended.is_none() {
                eprintln!("cannot kill {:?}", host.processes());
            }
            let _ = Command::new("ip").args(["netns", "del", &host.namespace]).status();
        }
    }
}

/// Whether the process has ended and waits only for its parent to ask how.
fn is_zombie(pid: Pid) -> bool {
    let status = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    status.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('Z'))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        time::Instant,
    };

    use super::*;
    use crate::lab::Lab;

    #[test]
    fn two_hosts_reach_each_other_and_the_rate_can_be_limited() {
        let lab = Lab::new();
        let (head, mirror) = lab.network();
        let daemon = format!("[m]\npath = {}\nuse chroot = yes\n", lab.directory("served").display());
        fs::File::create(lab.path().join("served/data")).unwrap().set_len(2_000_000).unwrap();
        fs::write(lab.path().join("rsyncd.conf"), daemon).unwrap();
        let mut rsyncd = mirror
            .command("rsync")
            .args(["--daemon", "--no-detach", "--config"])
            .arg(lab.path().join("rsyncd.conf"))
            .spawn()
            .unwrap();
        // Not into /dev/null: rsync puts a new file in its place.
        let first = lab.path().join("first");
        let fetch = || head.command("rsync").args(["-q", "rsync://10.77.0.2/m/data"]).arg(&first).status().unwrap();
        wait::until("the daemon answers", || fetch().success().then_some(()));
        assert!(mirror.process("rsync --daemon").is_some());
        assert!(head.process("rsync --daemon").is_none());
        mirror.limit_rate(8);
        let copy = || {
            let start = Instant::now();
            let arguments = ["-q", "--whole-file", "--ignore-times", "rsync://10.77.0.2/m/data"];
            assert!(head.command("rsync").args(arguments).arg(lab.path().join("copy")).status().unwrap().success());
            start.elapsed()
        };
        let slow = copy();
        assert!(slow > Duration::from_secs(1), "2 MB at 8 Mbit/s took {slow:?}");
        mirror.unlimit_rate();
        let fast = copy();
        assert!(fast < slow / 2, "{fast:?} without a limit, {slow:?} with one");
        rsyncd.kill().unwrap();
        rsyncd.wait().unwrap();
    }

    #[test]
    fn mounts_made_on_a_host_are_seen_by_the_test() {
        let lab = Lab::new();
        let (head, _mirror) = lab.network();
        let at = lab.directory("mnt");
        run(head.command("mount").args(["-t", "tmpfs", "none"]).arg(&at));
        assert_eq!(crate::lab::mounts_below(lab.path()), vec![at]);
    }

    #[test]
    fn a_process_is_killed_with_its_host() {
        let lab = Lab::new();
        let (head, _mirror) = lab.network();
        let mut child = head.command("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        let mut byte = [0];
        child.stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
        assert_eq!(head.processes().len(), 1);
        drop(lab);
        assert!(!child.wait().unwrap().success());
    }
}
