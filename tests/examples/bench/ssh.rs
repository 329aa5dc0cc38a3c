//! An sshd of our own on the loopback, with keys and a configuration that go with it: nothing of the machine's ssh is touched.

use std::{
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use snapferry_tests::wait;

use crate::child::{Daemon, run};

/// What ssh takes by itself is not the fastest that it has where the processor knows AES.
const FASTEST_CIPHER: &str = "aes128-gcm@openssh.com";

/// With which cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cipher {
    /// What both sides take if nobody says anything.
    Default,
    /// The fastest.
    Fastest,
}

/// Like any program that needs privileges, sshd wants to be called by its whole path.
const SSHD: &str = "/usr/sbin/sshd";

/// A running sshd that lets one throw-away key in.
pub struct Sshd {
    daemon: Daemon,
    dir: PathBuf,
    port: u16,
}

impl Sshd {
    /// Starts one; its files go into the directory.
    pub fn start(dir: &Path) -> Self {
        fs::create_dir_all(dir).unwrap();
        for key in ["host", "user"] {
            let file = dir.join(key);
            run("ssh-keygen", &["-q", "-t", "ed25519", "-N", "", "-C", "benchmark", "-f", file.to_str().unwrap()]);
        }
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
        let host_key = fs::read_to_string(dir.join("host.pub")).unwrap();
        fs::write(dir.join("known_hosts"), format!("[127.0.0.1]:{port} {host_key}")).unwrap();
        fs::write(dir.join("sshd_config"), configuration(dir, port)).unwrap();
        let config = dir.join("sshd_config");
        let daemon =
            Daemon::spawn(Path::new(SSHD), &["-D", "-e", "-f", config.to_str().unwrap()], dir.join("sshd.log"));
        let mut sshd = Self { daemon, dir: dir.to_owned(), port };
        wait::until("sshd listens", || {
            sshd.daemon.assert_runs();
            TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()
        });
        sshd
    }

    /// A client that runs a shell command line there.
    pub fn client(&self, cipher: Cipher, line: &str) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-T", "-p", &self.port.to_string(), "-i"]).arg(self.dir.join("user"));
        let known = format!("UserKnownHostsFile={}", self.dir.join("known_hosts").display());
        for option in ["BatchMode=yes", "IdentitiesOnly=yes", "IdentityAgent=none", "StrictHostKeyChecking=yes", &known]
        {
            ssh.args(["-o", option]);
        }
        if cipher == Cipher::Fastest {
            ssh.args(["-c", FASTEST_CIPHER]);
        }
        ssh.args(["root@127.0.0.1", line]);
        ssh
    }

    /// CPU time of the daemon and all its sessions, once the last of them has ended.
    pub fn cpu(&self) -> Duration {
        wait::until("the ssh session ends", || (!self.daemon.has_children()).then(|| self.daemon.cpu()))
    }
}

fn configuration(dir: &Path, port: u16) -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let (host, user) = (dir.join("host"), dir.join("user.pub"));
    format!(
        "ListenAddress 127.0.0.1\nPort {port}\nPidFile none\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\n\
         PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nPermitUserRC no\n\
         PrintMotd no\nUseDNS no\nSetEnv PATH={path}\n",
        host.display(),
        user.display(),
    )
}
