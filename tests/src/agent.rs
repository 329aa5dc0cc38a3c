//! An agent as a child process.

use std::{
    ffi::OsStr,
    fmt::Debug,
    io::Read,
    process::{Child, Command, ExitStatus, Stdio},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use crate::{
    event::{Event, Log},
    wait::{self, DEADLINE},
};

/// A running agent. Killed, with its children, when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: Log,
    reader: Option<JoinHandle<()>>,
    stdout: Option<JoinHandle<String>>,
}

/// How a program ended and what it said.
#[derive(Debug)]
pub struct Ended {
    /// How.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub log: Log,
}

impl Agent {
    /// Starts a program; the command says on which host, see [`crate::host::Host::command`].
    pub fn start<S: AsRef<OsStr> + Debug>(mut command: Command, arguments: impl IntoIterator<Item = S>) -> Self {
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let (log, reader) = Log::read(child.stderr.take().unwrap());
        let mut out = child.stdout.take().unwrap();
        let stdout = std::thread::spawn(move || {
            let mut text = Vec::new();
            let _ = out.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        });
        Self { child, log, reader: Some(reader), stdout: Some(stdout) }
    }

    /// Its log so far.
    #[must_use]
    pub fn log(&self) -> &Log {
        &self.log
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Waits for the first event whose sentence begins with `message`, from its start on.
    #[track_caller]
    pub fn wait_for(&self, message: &str) -> Event {
        self.wait_where(message, |_| true)
    }

    /// Waits for the first event whose sentence begins with `message` and for which `wanted` is true.
    #[track_caller]
    pub fn wait_where(&self, message: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let found = self.log.wait_for(DEADLINE, |event| event.message().starts_with(message) && wanted(event));
        found.unwrap_or_else(|| panic!("{message:?} did not come; the log:\n{}", self.log.as_text()))
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// SIGTERM: asks it to stop, waits until it has. Returns how it ended and how long that took.
    pub fn stop(self) -> (Ended, Duration) {
        let start = Instant::now();
        self.signal(Signal::TERM);
        let ended = self.wait();
        (ended, start.elapsed())
    }

    /// SIGKILL: it gets no chance to clean up. Waits until it is gone.
    pub fn kill(self) -> Ended {
        self.signal(Signal::KILL);
        self.wait()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let status = wait::within(DEADLINE, || self.child.try_wait().unwrap());
        let Some(status) = status else { panic!("it does not end; the log:\n{}", self.log.as_text()) };
        // A child of it that outlives it may hold the other ends of its pipes: then what came so far must do.
        let readers = |agent: &Self| {
            agent.reader.as_ref().is_none_or(JoinHandle::is_finished)
                && agent.stdout.as_ref().is_none_or(JoinHandle::is_finished)
        };
        let finished = wait::within(Duration::from_secs(2), || readers(&self).then_some(())).is_some();
        let stdout = self.stdout.take().filter(|_| finished).map(|reader| reader.join().unwrap()).unwrap_or_default();
        let log = self.log.clone();
        assert_sane(&log);
        Ended { status, stdout, log }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = rustix::process::kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("--- what {} said:\n{}", self.child.id(), self.log.as_text());
        } else {
            assert_sane(&self.log);
        }
    }
}

/// Panics if the agent panicked anywhere, whatever came of it: that is always a defect.
#[track_caller]
fn assert_sane(log: &Log) {
    assert!(!log.as_text().contains("panicked at"), "the agent panicked:\n{}", log.as_text());
}

impl Ended {
    /// Panics unless it ended with this exit code.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}; it said\n{}\n{}", self.status, self.stdout, self.log.as_text());
        self
    }

    /// Panics unless it wrote this to stdout or stderr.
    #[track_caller]
    pub fn expect_said(self, part: &str) -> Self {
        let said = format!("{}\n{}", self.stdout, self.log.as_text());
        assert!(said.contains(part), "it did not say {part:?}, but\n{said}");
        self
    }
}
