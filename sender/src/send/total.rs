//! How much a stream will be, to the byte, before it is sent: a second send without file data, counted and thrown away.
//!
//! For an increment it is done in no time; for a first transfer of millions of small files it takes nearly as long as the send itself.
//! Then it can be made idle: it runs beside the send, only when nobody else wants the processor, and rests most of the time. For the
//! two walk the same trees, and what one core's idle thread does slows the other down through caches and locks, which no priority
//! prevents.

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{
    btrfs::Sending,
    stream::{Item, Total, TotalCounter, Walker},
};
use rustix::thread::Pid;
use tokio::sync::{mpsc, oneshot};
use tracing::debug;

use super::{SendError, Source, Stream};

/// How much is taken at once: all that a pipe of the usual size holds. It is not made wider, for the kernel should not run far ahead
/// of a pass that rests.
const BLOCK_BYTES: usize = 64 << 10;

/// An idle pass counts so long and then rests, so that a first transfer of small files, where it costs most, is a few hundredths
/// slower for it and not an eighth.
const SPELL: Duration = Duration::from_millis(20);
const REST: Duration = Duration::from_millis(80);

impl Source {
    /// Starts to count what [`Source::stream`] of that version will give, on threads of its own.
    pub fn total(&self, version: u32) -> Result<TotalPass, SendError> {
        let threads = Arc::new(Threads::default());
        let (for_sender, for_counter) = (threads.clone(), threads.clone());
        let stream = self.start("total-send", version, Sending::NoFileData, move || for_sender.enter())?;
        let (done, result) = oneshot::channel();
        let path = self.path().to_owned();
        let count = move || {
            let _running = for_counter.clone().enter();
            // Nobody may wait for it any more.
            let _ = done.send(count(stream, &for_counter));
        };
        thread::Builder::new()
            .name("total-count".into())
            .spawn(count)
            .map_err(|source| SendError::SetUp { path: path.clone(), source })?;
        Ok(TotalPass { path, result: Some(result), threads })
    }
}

/// The counting of a stream, under way. Dropped, it ends.
#[derive(Debug)]
pub struct TotalPass {
    path: PathBuf,
    result: Option<oneshot::Receiver<Result<Total, SendError>>>,
    threads: Arc<Threads>,
}

impl TotalPass {
    /// Waits for the total, but no longer than `limit`: None if it is not known by then, and the counting goes on.
    pub async fn wait(&mut self, limit: Duration) -> Option<Result<Total, SendError>> {
        tokio::time::timeout(limit, self.finish()).await.ok()
    }

    /// Waits for the total. Once it (or the failure) was given, this waits for ever.
    pub async fn finish(&mut self) -> Result<Total, SendError> {
        let Some(result) = self.result.as_mut() else { return std::future::pending().await };
        let outcome = result.await;
        self.result = None;
        outcome.unwrap_or_else(|_| Err(SendError::Panicked(self.path.clone())))
    }

    /// From now on it runs only when nobody else wants the processor, and not before `head_start` is over: a transfer that takes no
    /// longer needs no total. A courtesy: if the priority cannot be had, it counts with the one that it has.
    pub fn be_idle(&self, head_start: Duration) {
        self.threads.be_idle(Instant::now() + head_start);
    }

    /// Lets the total come through a channel, for a branch of a `select!`; dropping the channel ends the counting. If it fails the
    /// channel closes with nothing in it: the transfer is as good without. To be called inside a tokio runtime.
    pub fn into_channel(mut self) -> mpsc::Receiver<Total> {
        let (into, total) = mpsc::channel(1);
        tokio::spawn(async move {
            tokio::select! {
                () = into.closed() => {}
                outcome = self.finish() => match outcome {
                    Ok(total) => drop(into.send(total).await),
                    Err(error) => debug!(%error, "the total stays unknown"),
                },
            }
        });
        total
    }
}

impl Drop for TotalPass {
    fn drop(&mut self) {
        // The counter sees it with its next block and closes the pipe; that ends the sending thread.
        self.threads.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Reads the stream to its end.
fn count(mut stream: Stream, threads: &Threads) -> Result<Total, SendError> {
    let (mut walker, mut counter) = (Walker::new(), TotalCounter::new());
    let mut block = vec![0; BLOCK_BYTES];
    let mut spell = Instant::now();
    while !threads.cancelled.load(Ordering::Relaxed) {
        if threads.idle_from().is_some_and(|from| Instant::now() < from || spell.elapsed() >= SPELL) {
            thread::sleep(REST);
            spell = Instant::now();
            continue;
        }
        let bytes = match stream.read(&mut block) {
            Ok(0) => {
                stream.finish()?;
                walker.finish()?;
                return Ok(counter.finish());
            }
            Ok(bytes) => &block[..bytes],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(SendError::SetUp { path: stream.path().to_owned(), source }),
        };
        walker.walk(bytes, |item| match item {
            Item::Version(_) => Ok::<(), SendError>(()),
            Item::Command { command, .. } => Ok(counter.update(&command)?),
        })?;
    }
    Err(SendError::Ended(stream.path().to_owned()))
}

/// The two threads of a pass, and what is wanted of them.
#[derive(Debug, Default)]
struct Threads {
    cancelled: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Idle, and asleep until then.
    idle_from: Option<Instant>,
    /// Those that run: the number of a thread that has ended may be another's already.
    running: Vec<Pid>,
}

/// Takes the thread off the list when it ends.
#[derive(Debug)]
struct Running(Arc<Threads>);

impl Threads {
    /// Puts the calling thread on the list.
    fn enter(self: Arc<Self>) -> Running {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.push(common::thread::current());
        if state.idle_from.is_some() {
            make_idle(common::thread::current());
        }
        drop(state);
        Running(self)
    }

    fn idle_from(&self) -> Option<Instant> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).idle_from
    }

    fn be_idle(&self, from: Instant) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.idle_from = Some(from);
        state.running.iter().copied().for_each(make_idle);
    }
}

fn make_idle(thread: Pid) {
    if let Err(error) = common::thread::make_idle(thread) {
        debug!(%error, "the counting of the total keeps its priority");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.running.retain(|thread| *thread != common::thread::current());
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path, process::Command};

    use common::{
        btrfs::{self, Found},
        testing::{SMALL, TestFs, run},
    };
    use jiff::Timestamp;

    use super::*;
    use crate::create::Site;

    fn take(fs: &TestFs) -> Found {
        let dir = fs.path().join("snapshots");
        fs::create_dir_all(&dir).unwrap();
        let site = Site::open(&fs.path().join("source"), &dir).unwrap();
        site.create(&"v".parse().unwrap(), Timestamp::from_second(1_795_330_800).unwrap()).unwrap()
    }

    fn block_on<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(work)
    }

    fn wait(pass: &mut TotalPass) -> Result<Total, SendError> {
        block_on(pass.wait(Duration::from_secs(60))).unwrap()
    }

    fn length(source: &Source, version: u32) -> u64 {
        let mut stream = source.stream(version).unwrap();
        let bytes = io::copy(&mut stream, &mut io::sink()).unwrap();
        stream.finish().unwrap();
        bytes
    }

    /// Everything whose length is not plain: holes, inline and preallocated extents, reflinks, long paths, odd sizes.
    fn fill(source: &Path) {
        let deep = source.join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        for (i, bytes) in
            [0, 1, 100, 4095, 4096, 4097, 49_152, 49_153, 131_072, 131_073, 1_000_000].into_iter().enumerate()
        {
            fs::write(source.join(format!("odd-{bytes}")), vec![i as u8 + 1; bytes]).unwrap();
            fs::write(deep.join(format!("odd-{bytes}")), vec![i as u8 + 1; bytes]).unwrap();
        }
        let sparse = source.join("sparse");
        for seek in ["0", "100", "1000", "100000"] {
            let dd = ["if=/dev/urandom", "bs=5000", "count=3", "conv=notrunc", "status=none"];
            run(Command::new("dd").args(dd).arg(format!("seek={seek}")).arg(format!("of={}", sparse.display())));
        }
        run(Command::new("truncate").args(["-s", "1G"]).arg(&sparse));
        run(Command::new("cp").arg("--reflink=always").args([source.join("odd-1000000"), source.join("reflink")]));
        run(Command::new("fallocate").args(["-l", "300000"]).arg(source.join("preallocated")));
    }

    #[test]
    fn the_total_is_the_length_of_the_stream_to_the_byte() {
        let fs = TestFs::new(SMALL);
        let source = fs.subvolume("source");
        fill(&source);
        let first = take(&fs);
        fs::write(source.join("odd-4097"), vec![9; 200_000]).unwrap();
        fs::rename(source.join("reflink"), source.join("moved")).unwrap();
        run(Command::new("cp").arg("--reflink=always").args([source.join("sparse"), source.join("sparse-too")]));
        fs::remove_file(source.join("odd-100")).unwrap();
        let second = take(&fs);
        for base in [None, Some(&first)] {
            let sending = Source::open(&second, base).unwrap();
            for version in [1, 2] {
                let total = wait(&mut sending.total(version).unwrap()).unwrap();
                assert_eq!(total.bytes, length(&sending, version), "version {version}, base {}", base.is_some());
                assert!(total.data_bytes >= 200_000 && total.data_bytes < total.bytes, "{total:?}");
            }
        }
    }

    #[test]
    fn a_pass_can_be_made_idle_and_is_ended_by_dropping_it() {
        let fs = TestFs::new(1 << 30);
        let source = fs.subvolume("source");
        for i in 0..20_000 {
            fs::write(source.join(format!("{i}-{}", "n".repeat(200))), "").unwrap();
        }
        let found = take(&fs);
        let sending = Source::open(&found, None).unwrap();
        let mut pass = sending.total(2).unwrap();
        pass.be_idle(Duration::ZERO);
        assert_eq!(wait(&mut pass).unwrap().bytes, length(&sending, 2));
        // What ended is off the list: asking again asks nobody else's thread.
        let deadline = Instant::now() + Duration::from_secs(20);
        while !pass.threads.state.lock().unwrap().running.is_empty() {
            assert!(Instant::now() < deadline, "the threads do not end");
            thread::sleep(Duration::from_millis(5));
        }
        pass.be_idle(Duration::ZERO);

        // Nothing is lost by waiting in two goes, or through a channel.
        let mut pass = sending.total(2).unwrap();
        let total = block_on(async {
            let _ = pass.wait(Duration::ZERO).await;
            pass.into_channel().recv().await
        });
        assert_eq!(total, Some(wait(&mut sending.total(2).unwrap()).unwrap()));

        drop(sending.total(2).unwrap());
        block_on(async { drop(sending.total(2).unwrap().into_channel()) });
        // While a send runs the kernel refuses this.
        while let Err(error) = btrfs::delete(&found.path) {
            assert!(Instant::now() < deadline, "{error}");
            thread::sleep(Duration::from_millis(5));
        }
    }
}
