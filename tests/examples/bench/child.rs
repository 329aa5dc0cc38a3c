//! Programs as children: pipelines of them, daemons, and what they cost.

use std::{
    fs::{self, File},
    io::{self, PipeReader, Read, Seek},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};

/// What a program has cost by its end.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// CPU time of all its threads, in user space and in the kernel on its behalf.
    pub cpu: Duration,
    /// The most memory that it held at a time, in bytes.
    ///
    /// The kernel counts from the fork on: it is never less than what the benchmark itself holds. So that holds little.
    pub peak: u64,
}

/// A pipeline of programs, as a shell makes them: pipes of the default size.
pub struct Pipeline {
    children: Vec<Child>,
    log: File,
}

impl Pipeline {
    /// Starts all of them. What they write to stderr is kept for the message of a failure.
    pub fn spawn(programs: Vec<Command>) -> Self {
        let log = rustix::fs::memfd_create("stderr", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let log = File::from(log);
        let last = programs.len() - 1;
        let mut input: Option<PipeReader> = None;
        let mut children = Vec::new();
        for (index, mut program) in programs.into_iter().enumerate() {
            program.stdin(input.take().map_or_else(Stdio::null, Stdio::from)).stderr(log.try_clone().unwrap());
            if index == last {
                program.stdout(Stdio::null());
            } else {
                let (reader, writer) = io::pipe().unwrap();
                program.stdout(writer);
                input = Some(reader);
            }
            // The command goes at the end of the loop, and with it our ends of the pipes: else no reader ever saw an end of file.
            children
                .push(program.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.get_program().display())));
        }
        Self { children, log }
    }

    /// What they write to stderr.
    pub fn log(&self) -> Log {
        Log(self.log.try_clone().unwrap())
    }

    /// Waits for all of them; panics with what they said if one failed. Their costs, in their order.
    pub fn finish(self) -> Vec<Cost> {
        let ended: Vec<(ExitStatus, Cost)> = self.children.iter().map(wait).collect();
        if ended.iter().any(|(status, _)| !status.success()) {
            let said = self.log().said();
            let statuses: Vec<String> = ended.iter().map(|(status, _)| status.to_string()).collect();
            panic!("the pipeline ended with {}: {}", statuses.join(", "), said.trim());
        }
        ended.into_iter().map(|(_, cost)| cost).collect()
    }
}

/// What a pipeline has written to stderr.
pub struct Log(File);

impl Log {
    /// All of it.
    pub fn said(mut self) -> String {
        let mut said = String::new();
        let _ = self.0.rewind().and_then(|()| self.0.read_to_string(&mut said));
        said
    }
}

/// Waits for a child as [`Child::wait`] does, and asks what it has cost.
pub fn wait(child: &Child) -> (ExitStatus, Cost) {
    let mut status = 0;
    // SAFETY: plain integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to living variables of the right types; the child is ours and not waited for yet, so that its
        // id is not another's.
        let waited = unsafe { libc::wait4(child.id().cast_signed(), &raw mut status, 0, &raw mut usage) };
        if waited >= 0 {
            break;
        }
        let error = io::Error::last_os_error();
        assert!(error.kind() == io::ErrorKind::Interrupted, "cannot wait for a child: {error}");
    }
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.cast_unsigned()) + Duration::from_micros(time.tv_usec.cast_unsigned())
    };
    let cpu = time(usage.ru_utime) + time(usage.ru_stime);
    (ExitStatus::from_raw(status), Cost { cpu, peak: usage.ru_maxrss.cast_unsigned() << 10 })
}

/// A program that runs until it is dropped or stopped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts one whose stderr goes to the file `log`.
    pub fn spawn(program: &Path, arguments: &[&str], log: PathBuf) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        Self { child: command.spawn().unwrap_or_else(|error| panic!("{}: {error}", program.display())), log }
    }

    /// What it has written to stderr.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Panics with what it said if it has ended.
    pub fn assert_runs(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("{} has ended with {status}: {}", self.log.display(), self.said());
        }
    }

    /// CPU time of it and of those of its descendants that have ended and been waited for.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(self.proc("stat")).unwrap();
        // The second field is the name, in parentheses. Times are fields 14 to 17, in ticks of 10 ms on every architecture.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        let ticks: u64 = fields.skip(11).take(4).map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(10 * ticks)
    }

    /// The most memory that it has held at a time so far, in bytes.
    pub fn peak(&self) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// Whether it has children now.
    pub fn has_children(&self) -> bool {
        let file = format!("task/{}/children", self.child.id());
        fs::read_to_string(self.proc(&file)).is_ok_and(|children| !children.trim().is_empty())
    }

    /// Asks it to stop and waits until it has.
    pub fn stop(mut self) {
        kill_process(self.pid(), Signal::TERM).unwrap();
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{} ended with {status}: {}", self.log.display(), self.said());
    }

    fn proc(&self, file: &str) -> String {
        format!("/proc/{}/{file}", self.child.id())
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a program to its end; panics with what it said if it fails.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {}: {}: {said}", arguments.join(" "), output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}
