//! A real rsync client on a host.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use crate::{host::Host, wait};

/// An rsync that is under way.
#[derive(Debug)]
pub struct Client {
    child: Child,
    /// What it says goes here, beside its copy.
    said: PathBuf,
    /// Where its copy goes.
    pub copy: PathBuf,
}

/// How a client asks: `-a` as the users of a mirror do, with the owners as numbers, and `--delete` as on a copy that is kept.
/// Times are compared to the nanosecond: by default rsync leaves a directory's alone if it is right to the second.
fn command(host: &Host, url: &str, copy: &Path, more: &[&str]) -> Command {
    let mut command = host.command("rsync");
    command
        .args(["-a", "--numeric-ids", "--delete", "--modify-window=-1", "--contimeout=10"])
        .args(more)
        .arg(url)
        .arg(copy);
    command
}

impl Client {
    /// Starts copying `url` to `copy` at no more than `kilobytes` a second.
    #[must_use]
    pub fn start(host: &Host, url: &str, copy: &Path, kilobytes: u32) -> Self {
        let said = copy.with_extension("rsync.log");
        let log = File::create(&said).unwrap();
        let mut command = command(host, url, copy, &[&format!("--bwlimit={kilobytes}")]);
        command.stdout(log.try_clone().unwrap()).stderr(log);
        Self { child: command.spawn().unwrap(), said, copy: copy.to_owned() }
    }

    /// Waits until the copy has at least this many files, and sees that the client is not done yet: it is half-way through.
    pub fn wait_until_half_way(&mut self, files: usize) {
        wait::until("the client has copied some files", || (count_files(&self.copy) >= files).then_some(()));
        assert!(self.is_running(), "the client was done too early: {}", self.said());
    }

    /// Whether it is still at work.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it is done, no longer than that; panics with what it said unless it succeeded.
    pub fn finish(mut self, deadline: Duration) {
        let status = wait::within(deadline, || self.child.try_wait().unwrap());
        let Some(status) = status else { panic!("the client is not done after {deadline:?}: {}", self.said()) };
        assert!(status.success(), "the client failed, {status}: {}", self.said());
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap_or_default()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies `url` to `copy` as fast as it goes; panics with what rsync said if it fails.
pub fn copy(host: &Host, url: &str, copy: &Path) {
    crate::lab::run(&mut command(host, url, copy, &[]));
}

/// Whether the daemon can be reached and has what `url` names; rsync's own exit code tells why not.
#[must_use]
pub fn probe(host: &Host, url: &str) -> ExitStatus {
    host.command("rsync").args(["-q", "--contimeout=10", url]).output().unwrap().status
}

/// How many files there are below a directory. Files that come and go meanwhile may be counted or not.
fn count_files(dir: &Path) -> usize {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let count = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => count_files(&entry.path()),
        _ => 1,
    };
    entries.flatten().map(count).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{lab::Lab, manifest::assert_copy, nar};

    #[test]
    fn a_client_is_caught_half_way_and_ends_with_an_equal_copy() {
        let lab = Lab::new();
        let (head, mirror) = lab.network();
        let served = lab.directory("served");
        nar::grow(&served, 10_000_000, 1).unwrap();
        let conf = lab.path().join("rsyncd.conf");
        fs::write(&conf, format!("[m]\npath = {}\nuse chroot = yes\n", served.display())).unwrap();
        let daemon = ["--daemon", "--no-detach", "--config"];
        let mut rsyncd = mirror.command("rsync").args(daemon).arg(&conf).spawn().unwrap();
        let url = "rsync://10.77.0.2/m/";
        wait::until("the daemon answers", || probe(&head, url).success().then_some(()));
        let mut slow = Client::start(&head, url, &lab.path().join("slow"), 5000);
        slow.wait_until_half_way(3);
        copy(&head, url, &lab.path().join("fast"));
        assert!(slow.is_running());
        slow.finish(wait::DEADLINE);
        assert_copy(&served, &lab.path().join("fast"));
        assert_copy(&served, &lab.path().join("slow"));
        assert_eq!(nar::broken(&lab.path().join("slow")), Vec::<PathBuf>::new());
        rsyncd.kill().unwrap();
        rsyncd.wait().unwrap();
    }
}
