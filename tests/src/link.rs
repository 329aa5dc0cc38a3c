//! A faulty link: a TCP relay on the head node, between the sender and the receiver, that cuts, swallows, flips, delays and chops
//! what passes through it, and counts it.
//!
//! Each connection has at most one [`Trouble`], which strikes when so many bytes have passed one way; a planner chosen by the
//! test decides which. Everything is counted where it comes in: what the sender has sent, not what has arrived.

use std::{
    collections::{HashMap, HashSet},
    io::{ErrorKind, PipeWriter, Read, Write, pipe},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, poll};

use crate::{config::PORT, host::Host};

/// The most that is read and passed on at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Chunks that are under way at a time when there is a delay.
const DELAYED_CHUNKS: usize = 64;

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// From the sender to the receiver.
    Out,
    /// From the receiver to the sender.
    Back,
}

/// What happens to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Both ends are told at once that it is over, as by a machine on the way that lost its tables.
    Reset,
    /// Both ends see an end of file.
    Close,
    /// Only the end that is spoken to sees an end of file; the other way goes on.
    HalfClose,
    /// One bit is not what it was.
    Flip,
    /// Nothing comes through any more, either way, and nobody is told.
    Hole,
}

/// When what happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trouble {
    /// The direction whose bytes count.
    pub way: Way,
    /// How many of them pass unharmed.
    pub after: u64,
    /// What then.
    pub fault: Fault,
}

/// How bytes pass, apart from troubles.
#[derive(Debug, Clone, Copy, Default)]
pub struct Manner {
    /// How long each of them takes, either way.
    pub delay: Duration,
    /// So many at the beginning of each connection pass one by one, either way.
    pub one_by_one: u64,
}

/// Decides about the n-th connection, from 0 on.
type Planner = Box<dyn FnMut(u64) -> Option<Trouble> + Send>;

/// The relay. It ends, with its connections, when dropped.
pub struct Link {
    shared: Arc<Shared>,
    /// Closed, it wakes the thread that accepts.
    awake: Option<PipeWriter>,
    accepting: Option<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    planner: Planner,
    manner: Manner,
    passed: HashMap<Way, u64>,
    connections: u64,
    struck: Vec<Fault>,
    open: HashMap<u64, Connection>,
    closing: bool,
}

/// A connection that is open.
struct Connection {
    /// Both ends, to end it.
    ends: [TcpStream; 2],
    /// Ways that are still open.
    ways: u8,
    /// The ways that nothing passes any more.
    mute: HashSet<Way>,
}

impl Link {
    /// Starts it on `host`, where the sender reaches it at [`Link::address`]; it passes on to `to`, on the same port.
    #[must_use]
    pub fn start(host: &Host, to: &str) -> Self {
        let state = State {
            planner: Box::new(|_| None),
            manner: Manner::default(),
            passed: HashMap::from([(Way::Out, 0), (Way::Back, 0)]),
            connections: 0,
            struck: Vec::new(),
            open: HashMap::new(),
            closing: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let (wake, awake) = pipe().unwrap();
        let (ready, listens) = mpsc::channel();
        let (ours, host, to) = (Arc::clone(&shared), host.clone(), SocketAddr::new(to.parse().unwrap(), PORT));
        let accepting = thread::spawn(move || {
            host.enter();
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap();
            ready.send(()).unwrap();
            loop {
                let mut waiting =
                    [listener.as_fd(), wake.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
                poll(&mut waiting, None).unwrap();
                if !waiting[1].revents().is_empty() {
                    return;
                }
                let Ok((from, _)) = listener.accept() else { continue };
                // Nobody there: whoever called finds the connection closed.
                let Ok(to) = TcpStream::connect(to) else { continue };
                ours.relay(from, to);
            }
        });
        listens.recv().unwrap();
        Self { shared, awake: Some(awake), accepting: Some(accepting) }
    }

    /// What to call in place of the receiver.
    #[must_use]
    pub fn address() -> String {
        format!("127.0.0.1:{PORT}")
    }

    /// From now on `planner` decides what happens to the connections to come: it is told the number of each, from 0 on.
    pub fn plan(&self, planner: impl FnMut(u64) -> Option<Trouble> + Send + 'static) {
        let mut state = self.shared.lock();
        state.connections = 0;
        state.planner = Box::new(planner);
    }

    /// From now on nothing happens to the connections to come.
    pub fn be_good(&self) {
        self.plan(|_| None);
        self.shared.lock().manner = Manner::default();
    }

    /// How bytes pass in the connections to come.
    pub fn set_manner(&self, manner: Manner) {
        self.shared.lock().manner = manner;
    }

    /// How many bytes came in that way, in all connections together.
    #[must_use]
    pub fn passed(&self, way: Way) -> u64 {
        self.shared.lock().passed[&way]
    }

    /// The troubles that came true so far.
    #[must_use]
    pub fn struck(&self) -> Vec<Fault> {
        self.shared.lock().struck.clone()
    }

    /// Waits until `passed` is at least `bytes` that way. False if the time has passed first.
    #[must_use]
    pub fn wait_until_passed(&self, way: Way, bytes: u64, at_most: Duration) -> bool {
        let waiting = |state: &mut State| state.passed[&way] < bytes;
        let waited = self.shared.changed.wait_timeout_while(self.shared.lock(), at_most, waiting);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }

    /// From now on nothing comes through the connections of the moment, that way, and nobody is told.
    pub fn mute(&self, way: Way) {
        self.shared.lock().open.values_mut().for_each(|connection| {
            connection.mute.insert(way);
        });
    }

    /// Ends the connections of the moment, as [`Fault::Reset`] does. Returns how many there were.
    pub fn cut(&self) -> usize {
        let cut: Vec<_> = self.shared.lock().open.drain().collect();
        self.shared.changed.notify_all();
        for (_, connection) in &cut {
            connection.reset();
        }
        cut.len()
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.changed.notify_all();
        self.cut();
        drop(self.awake.take());
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

/// One way of a connection.
struct Pump {
    shared: Arc<Shared>,
    key: u64,
    way: Way,
    from: TcpStream,
    to: TcpStream,
    passed: u64,
    trouble: Option<Trouble>,
    manner: Manner,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts two pumps, on the host of the calling thread.
    fn relay(self: &Arc<Self>, sender: TcpStream, receiver: TcpStream) {
        let mut state = self.lock();
        let number = state.connections;
        state.connections += 1;
        let trouble = (state.planner)(number);
        // Connections of different plans must not share a key.
        let key = number | (u64::from(fastrand::u32(..)) << 32);
        let clone = |stream: &TcpStream| stream.try_clone().unwrap();
        state.open.insert(key, Connection { ends: [clone(&sender), clone(&receiver)], ways: 2, mute: HashSet::new() });
        let manner = state.manner;
        drop(state);
        for stream in [&sender, &receiver] {
            let _ = stream.set_nodelay(true);
        }
        for (way, from, to) in [(Way::Out, clone(&sender), clone(&receiver)), (Way::Back, receiver, sender)] {
            let trouble = trouble.filter(|trouble| trouble.way == way);
            let shared = Arc::clone(self);
            thread::spawn(move || Pump { shared, key, way, from, to, passed: 0, trouble, manner }.run());
        }
    }
}

impl Pump {
    fn run(mut self) {
        match self.pump() {
            // An end of file is passed on, and the other way goes on.
            None | Some(Fault::HalfClose) => {
                let _ = self.to.shutdown(Shutdown::Write);
                let _ = self.from.shutdown(Shutdown::Read);
            }
            Some(Fault::Hole) => self.hold(),
            Some(fault) => {
                if let Some(connection) = self.shared.lock().open.remove(&self.key) {
                    if fault == Fault::Reset { connection.reset() } else { connection.close() }
                }
            }
        }
        let mut state = self.shared.lock();
        if let Some(connection) = state.open.get_mut(&self.key) {
            connection.ways -= 1;
            if connection.ways == 0 {
                state.open.remove(&self.key);
            }
        }
    }

    /// Passes everything on until an end of file (None) or a fault that ends it; a connection that broke ends it, too.
    fn pump(&mut self) -> Option<Fault> {
        let delay = self.manner.delay;
        let late = (!delay.is_zero()).then(|| Late::start(self.to.try_clone().unwrap(), delay));
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let read = match self.from.read(&mut buffer) {
                Ok(0) => return None,
                Ok(read) => read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Some(Fault::Close),
            };
            let (unharmed, struck) = self.look(&mut buffer[..read]);
            let passed = match &late {
                Some(late) => late.pass(buffer[..unharmed].to_vec()),
                None => self.write(&buffer[..unharmed]),
            };
            self.passed += read as u64;
            match struck {
                _ if !passed => return Some(Fault::Close),
                None | Some(Fault::Flip) => {}
                fault => return fault,
            }
        }
    }

    /// Counts what came in, and says how much of it passes and what strikes in it.
    fn look(&self, chunk: &mut [u8]) -> (usize, Option<Fault>) {
        let mut state = self.shared.lock();
        *state.passed.entry(self.way).or_default() += chunk.len() as u64;
        if state.open.get(&self.key).is_some_and(|connection| connection.mute.contains(&self.way)) {
            return (0, Some(Fault::Hole));
        }
        let strikes = |trouble: &Trouble| (self.passed..self.passed + chunk.len() as u64).contains(&trouble.after);
        let struck = self.trouble.filter(strikes);
        if let Some(Trouble { fault, .. }) = struck {
            state.struck.push(fault);
            if fault == Fault::Hole
                && let Some(connection) = state.open.get_mut(&self.key)
            {
                connection.mute.extend([Way::Out, Way::Back]);
            }
        }
        drop(state);
        self.shared.changed.notify_all();
        let Some(Trouble { after, fault, .. }) = struck else { return (chunk.len(), None) };
        let at = (after - self.passed) as usize;
        if fault == Fault::Flip {
            chunk[at] ^= 0x10;
            return (chunk.len(), Some(fault));
        }
        (at, Some(fault))
    }

    fn write(&mut self, chunk: &[u8]) -> bool {
        let single = self.manner.one_by_one.saturating_sub(self.passed).min(chunk.len() as u64) as usize;
        let (single, rest) = chunk.split_at(single);
        single.chunks(1).all(|byte| self.to.write_all(byte).is_ok()) && self.to.write_all(rest).is_ok()
    }

    /// Keeps this way as it is until the link cuts the connection or ends.
    fn hold(&self) {
        let held = |state: &mut State| !state.closing && state.open.contains_key(&self.key);
        let _held = self.shared.changed.wait_while(self.shared.lock(), held);
    }
}

impl Connection {
    fn close(&self) {
        for end in &self.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn reset(&self) {
        for end in &self.ends {
            // What dissolves the association of a TCP socket at once, data in flight or not.
            let _ = rustix::net::connect_unspec(end);
        }
        self.close();
    }
}

/// Passes chunks on when their time has come.
struct Late {
    chunks: Option<mpsc::SyncSender<(Instant, Vec<u8>)>>,
    delay: Duration,
    writing: Option<JoinHandle<()>>,
}

impl Late {
    fn start(mut to: TcpStream, delay: Duration) -> Self {
        let (chunks, coming) = mpsc::sync_channel::<(Instant, Vec<u8>)>(DELAYED_CHUNKS);
        let writing = thread::spawn(move || {
            for (due, chunk) in coming {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&chunk).is_err() {
                    return;
                }
            }
        });
        Self { chunks: Some(chunks), delay, writing: Some(writing) }
    }

    fn pass(&self, chunk: Vec<u8>) -> bool {
        self.chunks.as_ref().is_some_and(|chunks| chunks.send((Instant::now() + self.delay, chunk)).is_ok())
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        drop(self.chunks.take());
        let _ = self.writing.take().map(JoinHandle::join);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{host::MIRROR_ADDRESS, lab::Lab};

    /// A link, and somebody behind it who sends back all that comes.
    struct Echo {
        link: Link,
        head: Host,
        _lab: Lab,
    }

    impl Echo {
        fn new() -> Self {
            let lab = Lab::new();
            let (head, mirror) = lab.network();
            let (ready, listens) = mpsc::channel();
            thread::spawn(move || {
                mirror.enter();
                let listener = TcpListener::bind((MIRROR_ADDRESS, PORT)).unwrap();
                ready.send(()).unwrap();
                for stream in listener.incoming().map_while(Result::ok) {
                    thread::spawn(move || {
                        let mut writer = stream.try_clone().unwrap();
                        let _ = std::io::copy(&mut &stream, &mut writer);
                        let _ = writer.shutdown(Shutdown::Write);
                    });
                }
            });
            listens.recv().unwrap();
            Self { link: Link::start(&head, MIRROR_ADDRESS), head, _lab: lab }
        }

        /// What comes back of `bytes` until the end, or until a second has passed without any.
        fn send(&self, bytes: usize) -> (Vec<u8>, std::io::Result<()>) {
            let head = self.head.clone();
            let sent = thread::spawn(move || {
                head.enter();
                let mut stream = TcpStream::connect(Link::address()).unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
                let mut writer = stream.try_clone().unwrap();
                thread::spawn(move || {
                    let _ = writer.write_all(&vec![7; bytes]);
                    let _ = writer.shutdown(Shutdown::Write);
                });
                let mut back = Vec::new();
                let ended = stream.read_to_end(&mut back).map(drop);
                (back, ended)
            });
            sent.join().unwrap()
        }

        fn strike(&self, way: Way, fault: Fault) -> (Vec<u8>, std::io::Result<()>) {
            self.link.plan(move |number| (number == 0).then_some(Trouble { way, after: 100_000, fault }));
            let back = self.send(300_000);
            assert_eq!(self.link.struck().last(), Some(&fault));
            back
        }
    }

    #[test]
    fn what_passes_is_counted_and_unharmed_also_late_and_byte_by_byte() {
        let echo = Echo::new();
        for manner in [
            Manner::default(),
            Manner { one_by_one: 1000, ..Manner::default() },
            Manner { delay: Duration::from_millis(50), ..Manner::default() },
        ] {
            echo.link.set_manner(manner);
            let (before, begun) = (echo.link.passed(Way::Out), Instant::now());
            let (back, ended) = echo.send(200_000);
            assert!(ended.is_ok() && back == vec![7; 200_000], "{} came back: {ended:?}", back.len());
            assert_eq!(echo.link.passed(Way::Out) - before, 200_000);
            assert!(begun.elapsed() >= 2 * manner.delay);
        }
        assert_eq!(echo.link.passed(Way::Back), 600_000);
        assert!(echo.link.struck().is_empty());
    }

    #[test]
    fn each_fault_strikes_at_its_byte() {
        let echo = Echo::new();
        let (back, ended) = echo.strike(Way::Out, Fault::Flip);
        let bad: Vec<_> = (0..back.len()).filter(|at| back[*at] != 7).collect();
        assert!(ended.is_ok() && back.len() == 300_000 && bad == [100_000], "{bad:?}, {ended:?}");

        // What the client still writes meets a closed socket, whose reset may overtake the last that comes back.
        for (way, fault) in [(Way::Out, Fault::HalfClose), (Way::Back, Fault::Close)] {
            let (back, ended) = echo.strike(way, fault);
            let in_order = ended.is_ok() && back.len() == 100_000;
            let overtaken = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::ConnectionReset);
            assert!(in_order || overtaken && back.len() <= 100_000, "{fault:?}: {}, {ended:?}", back.len());
        }

        let (back, ended) = echo.strike(Way::Out, Fault::Reset);
        let kind = ended.map_err(|error| error.kind());
        assert!(kind == Err(ErrorKind::ConnectionReset) && back.len() <= 100_000, "{}, {kind:?}", back.len());

        let (back, ended) = echo.strike(Way::Out, Fault::Hole);
        let kind = ended.map_err(|error| error.kind());
        assert!(kind == Err(ErrorKind::WouldBlock) && back.len() <= 100_000, "{}, {kind:?}", back.len());

        echo.link.be_good();
        assert_eq!(echo.send(1000).0.len(), 1000, "the next connection is as if nothing had been");
    }
}
