//! Serves the published trees: writes rsyncd.conf and, if told so, runs `rsync --daemon` and keeps it running.
//!
//! One read-only module a volume, with `live/tree` as its root directory by `use chroot`: a client is inside the snapshot that was
//! published when it came, to its end, and whatever a link in there says, it does not get out.

use std::{
    io::{self, Write},
    net::IpAddr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use common::{
    durable::{self, DurableError},
    snapshot::VolumeName,
};
use rustix::process::{Pid, Signal};
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader},
    process::{Child, Command},
    runtime,
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::config::{self, RsyncMode};

/// Its name in the state directory.
const CONFIG_FILE: &str = "rsyncd.conf";
/// Where the daemon counts its clients, if there is a limit to them.
const LOCK_FILE: &str = "rsyncd.lock";

/// Between two starts of a daemon that keeps ending.
const MIN_BACK_OFF: Duration = Duration::from_secs(1);
const MAX_BACK_OFF: Duration = Duration::from_secs(60);
/// A daemon that ran so long was all right: the next failure is a new one.
const RAN_WELL: Duration = Duration::from_secs(60);

/// How long daemon and clients may take to end before they are killed: a shutdown has 5 seconds for everything.
const STOP_GRACE: Duration = Duration::from_secs(2);
/// How often it is looked whether they have ended.
const STOP_POLL: Duration = Duration::from_millis(20);

/// A line of the daemon's log is cut here: it may contain a file name that a client made up.
const MAX_LINE_BYTES: u64 = 4096;

/// What clients see under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name in `rsync://host/name/`.
    pub volume: VolumeName,
    /// The published tree.
    pub path: PathBuf,
}

/// The rsync daemon, or what stands for it when somebody else runs it or nobody.
#[derive(Debug)]
pub struct Rsyncd(Option<Supervisor>);

#[derive(Debug)]
struct Supervisor {
    stop: CancellationToken,
    thread: JoinHandle<()>,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum RsyncdError {
    /// rsyncd.conf has no way to write this path.
    #[error(
        "{} cannot be the path of an rsync module: no control characters, no %, no part that is a dot, no blank or \\ at the end; \
         choose another `publish`",
        .0.display()
    )]
    Path(PathBuf),
    /// rsyncd.conf has no way to write this user.
    #[error("{0:?} cannot be the user of an rsync module; name a user of this machine as `user`")]
    User(String),
    /// rsyncd.conf cannot be written.
    #[error(transparent)]
    Write(#[from] DurableError),
    /// No thread to watch over it.
    #[error("cannot start the thread that watches over the rsync daemon")]
    Thread(#[source] io::Error),
    /// rsync cannot be run.
    #[error("cannot run rsync; install it, or set [rsync] mode = \"off\"")]
    Spawn(#[source] io::Error),
}

/// The modules of the volumes.
pub fn modules(volumes: &[config::Volume]) -> Vec<Module> {
    let module = |volume: &config::Volume| {
        let publish = std::path::absolute(&volume.publish).unwrap_or_else(|_| volume.publish.clone());
        Module { volume: volume.name.clone(), path: publish.join("live/tree") }
    };
    volumes.iter().map(module).collect()
}

impl Rsyncd {
    /// Writes `rsyncd.conf` into `state_dir` and, in mode `supervised`, starts the daemon.
    ///
    /// To be called once the published trees are brought back. A daemon that ends later is started again, with back-off.
    pub async fn start(settings: &config::Rsync, modules: &[Module], state_dir: &Path) -> Result<Self, RsyncdError> {
        if settings.mode == RsyncMode::Off {
            return Ok(Self(None));
        }
        let file = state_dir.join(CONFIG_FILE);
        durable::write_atomically(&file, &render(settings, modules, &state_dir.join(LOCK_FILE))?)?;
        if settings.mode == RsyncMode::External {
            tracing::info!(file = %file.display(), "rsync configuration written for the daemon that somebody else runs");
            return Ok(Self(None));
        }
        let stop = CancellationToken::new();
        let (started, first) = oneshot::channel();
        let daemon = Daemon { file, address: settings.address, port: settings.port };
        let told = stop.clone();
        // A thread of its own, because the kernel tells the child when the *thread* that made it is gone, and those of an async
        // runtime come and go.
        let watch = move || match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(daemon.supervise(told, started)),
            Err(error) => drop(started.send(Err(error))),
        };
        let thread = thread::Builder::new().name("rsyncd".into()).spawn(watch).map_err(RsyncdError::Thread)?;
        let supervisor = Self(Some(Supervisor { stop, thread }));
        first.await.unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into())).map_err(RsyncdError::Spawn)?;
        Ok(supervisor)
    }

    /// Ends the daemon and its clients and waits for them: 2 seconds, and then they are killed.
    pub async fn stop(self) {
        if let Some(Supervisor { stop, thread }) = self.0 {
            stop.cancel();
            // It cannot have panicked without having said so; there is nothing to add here.
            let _ = tokio::task::spawn_blocking(|| thread.join()).await;
        }
    }
}

/// What the daemon is run with.
#[derive(Debug)]
struct Daemon {
    file: PathBuf,
    address: IpAddr,
    port: u16,
}

impl Daemon {
    /// Runs the daemon until told to stop. `started` hears of the first start.
    async fn supervise(self, stop: CancellationToken, started: oneshot::Sender<io::Result<()>>) {
        let mut started = Some(started);
        let mut back_off = BackOff::new();
        while !stop.is_cancelled() {
            let begun = Instant::now();
            let ended = match self.spawn() {
                Ok(child) => {
                    started.take().map(|started| started.send(Ok(())));
                    let Some(status) = self.watch(child, &stop).await else { return };
                    status.map_or_else(|error| error.to_string(), |status| status.to_string())
                }
                Err(error) => match started.take() {
                    Some(started) => return drop(started.send(Err(error))),
                    None => error.to_string(),
                },
            };
            let pause = back_off.next(begun.elapsed());
            let seconds = pause.as_secs_f64();
            tracing::warn!(status = ended, seconds, "rsync daemon ended by itself; it is started again");
            tokio::select! {
                () = sleep(pause) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    fn spawn(&self) -> io::Result<Child> {
        let agent = rustix::process::getpid();
        let with_the_agent = move || {
            // If the agent is killed there is nobody left to stop the daemon.
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
            if rustix::process::getppid() == Some(agent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        };
        let mut command = Command::new("rsync");
        command
            // Without a log file it writes to syslog. Its own log file can be opened while it is root; clients inherit it.
            .args(["--daemon", "--no-detach", "--log-file=/dev/stderr"])
            .arg(path_option("--config=", &self.file))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A group of its own: a Ctrl-C for the agent is not for it, and all its clients can be ended at once.
            .process_group(0)
            .kill_on_drop(true);
        // SAFETY: between fork and exec only two system calls are made and nothing is allocated.
        unsafe { command.pre_exec(with_the_agent) };
        let child = command.spawn()?;
        tracing::info!(address = %self.address, port = self.port, pid = child.id(), "rsync daemon started");
        Ok(child)
    }

    /// Waits for the end of the daemon, and says how it ended; None if it was told to stop.
    async fn watch(&self, mut child: Child, stop: &CancellationToken) -> Option<io::Result<ExitStatus>> {
        if let Some(output) = child.stderr.take() {
            tokio::spawn(forward(output));
        }
        tokio::select! {
            status = child.wait() => Some(status),
            () = stop.cancelled() => {
                end(child).await;
                None
            }
        }
    }
}

/// Ends a daemon with its clients.
async fn end(mut child: Child) {
    let Some(group) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) else { return };
    let _ = rustix::process::kill_process_group(group, Signal::TERM);
    let gone = async {
        let _ = child.wait().await;
        while is_alive(group) {
            sleep(STOP_POLL).await;
        }
    };
    if timeout(STOP_GRACE, gone).await.is_err() {
        tracing::warn!(pid = group.as_raw_nonzero().get(), "rsync does not end by itself; killed");
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
        let _ = child.wait().await;
    }
}

/// Whether a process of the group has not ended. Those that wait to be reaped have: that is the business of pid 1, which takes its
/// time on some machines, and to kill(2) they are all the same.
fn is_alive(group: Pid) -> bool {
    if rustix::process::test_kill_process_group(group).is_err() {
        return false;
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return true };
    let stat = |entry: io::Result<std::fs::DirEntry>| std::fs::read_to_string(entry.ok()?.path().join("stat")).ok();
    processes.filter_map(stat).any(|stat| is_running_in(&stat, group.as_raw_pid()))
}

/// Reads a process's `stat`: `pid (name) state parent group ...`, where the name may contain anything.
fn is_running_in(stat: &str, group: i32) -> bool {
    let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
    let (state, of_group) = (fields.next(), fields.nth(1));
    of_group.is_some_and(|field| field.parse() == Ok(group)) && !matches!(state, Some("Z" | "X"))
}

/// What the daemon says goes to our log, line by line, without its clock.
async fn forward(output: impl AsyncRead + Unpin) {
    let mut output = BufReader::new(output);
    let mut line = Vec::new();
    // An error is the end of it too: then the daemon has ended, which is noticed elsewhere.
    while let Ok(1..) = (&mut output).take(MAX_LINE_BYTES).read_until(b'\n', &mut line).await {
        let text = String::from_utf8_lossy(&line);
        tracing::info!(line = without_clock(text.trim_end()), "rsync");
        line.clear();
    }
}

/// `2026/11/22 07:00:00 [4711] text` without the first two words.
fn without_clock(line: &str) -> &str {
    let stamped = line.get(..19).is_some_and(|stamp| {
        stamp.bytes().zip(*b"0000/00/00 00:00:00").all(|(b, p)| if p == b'0' { b.is_ascii_digit() } else { b == p })
    });
    if stamped { line[19..].trim_start() } else { line }
}

/// The pauses between starts.
#[derive(Debug)]
struct BackOff {
    next: Duration,
}

impl BackOff {
    fn new() -> Self {
        Self { next: MIN_BACK_OFF }
    }

    /// The pause after a daemon that ran for `ran`.
    fn next(&mut self, ran: Duration) -> Duration {
        let pause = if ran >= RAN_WELL { MIN_BACK_OFF } else { self.next };
        self.next = (pause * 2).min(MAX_BACK_OFF);
        pause
    }
}

/// rsyncd.conf; see rsyncd.conf(5).
fn render(settings: &config::Rsync, modules: &[Module], lock_file: &Path) -> Result<Vec<u8>, RsyncdError> {
    let user = &settings.user;
    if user.is_empty() || !user.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b)) {
        return Err(RsyncdError::User(user.clone()));
    }
    let mut text =
        b"# Written by snapferry-receiver at every start, from its own configuration: what is changed here is lost.\n"
            .to_vec();
    // rsync binds an IPv6 address for IPv6 only. Without any address it listens on all of both kinds.
    if settings.address != IpAddr::from([0_u16; 8]) {
        add(&mut text, "address", settings.address.to_string().as_bytes());
    }
    add(&mut text, "port", settings.port.to_string().as_bytes());
    let seconds = settings.timeout.as_millis().div_ceil(1000);
    for (key, value) in [
        ("read only", "yes"),
        ("use chroot", "yes"),
        ("uid", user.as_str()),
        // All groups of that user.
        ("gid", "*"),
        ("list", "yes"),
        // Links are data: they arrive as they are, and chroot keeps the daemon itself from following them out.
        ("munge symlinks", "no"),
        // A name server that does not answer must not keep clients waiting.
        ("reverse lookup", "no"),
        ("forward lookup", "no"),
        ("timeout", &seconds.to_string()),
    ] {
        add(&mut text, key, value.as_bytes());
    }
    if settings.max_connections > 0 {
        add(&mut text, "max connections", settings.max_connections.to_string().as_bytes());
        add(&mut text, "lock file", writable(lock_file)?);
    }
    for module in modules {
        let _ = writeln!(text, "\n[{}]", module.volume);
        add(&mut text, "path", writable(&module.path)?);
    }
    Ok(text)
}

fn add(text: &mut Vec<u8>, key: &str, value: &[u8]) {
    text.extend_from_slice(key.as_bytes());
    text.extend_from_slice(b" = ");
    text.extend_from_slice(value);
    text.push(b'\n');
}

/// A path as it can stand in rsyncd.conf, which knows no quotes; with a `/./` in it rsync would chroot to what is before that.
fn writable(path: &Path) -> Result<&[u8], RsyncdError> {
    let bytes = path.as_os_str().as_bytes();
    let dot = bytes.split(|b| *b == b'/').any(|part| part == b".");
    let odd = bytes.iter().any(|b| b.is_ascii_control() || *b == b'%');
    let bad_end = bytes.last().is_none_or(|b| *b == b'\\' || b.is_ascii_whitespace());
    if path.is_absolute() && !dot && !odd && !bad_end { Ok(bytes) } else { Err(RsyncdError::Path(path.to_owned())) }
}

fn path_option(option: &str, path: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(option);
    argument.push(path);
    argument
}

#[cfg(test)]
mod tests;
