//! What an agent said: its log, line by line, as JSON or as it came.

use std::{
    io::{BufRead, BufReader, Read},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Map, Value};

/// One event of a JSON log.
#[derive(Debug, Clone, PartialEq)]
pub struct Event(Map<String, Value>);

impl Event {
    /// The event that a line of the log is; None if it is none.
    fn parse(line: &str) -> Option<Self> {
        serde_json::from_str(line).ok().map(Self)
    }

    /// The sentence.
    #[must_use]
    pub fn message(&self) -> &str {
        self.text("message")
    }

    /// `info`, `warn`, ...
    #[must_use]
    pub fn level(&self) -> &str {
        self.text("level")
    }

    /// A field that is text; empty if it is missing or something else.
    #[must_use]
    pub fn text(&self, field: &str) -> &str {
        self.0.get(field).and_then(Value::as_str).unwrap_or_default()
    }

    /// A field that is a whole number. Panics if it is missing or something else.
    #[must_use]
    pub fn count(&self, field: &str) -> u64 {
        self.0.get(field).and_then(Value::as_u64).unwrap_or_else(|| panic!("no count {field:?} in {self:?}"))
    }

    /// A field that is a number. Panics if it is missing or something else.
    #[must_use]
    pub fn number(&self, field: &str) -> f64 {
        self.0.get(field).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {field:?} in {self:?}"))
    }

    /// Whether there is such a field with a value.
    #[must_use]
    pub fn has(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(|value| !value.is_null())
    }
}

/// What a process writes to stderr, as it comes.
#[derive(Debug, Clone)]
pub struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Debug, Default)]
struct Lines {
    lines: Vec<String>,
    events: Vec<Event>,
    closed: bool,
}

impl Log {
    /// Reads `from` to its end in a thread of its own.
    pub(crate) fn read(from: impl Read + Send + 'static) -> (Self, JoinHandle<()>) {
        let log = Self(Arc::default());
        let ours = log.clone();
        let reader = thread::spawn(move || {
            for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
                ours.push(String::from_utf8_lossy(&line).into_owned());
            }
            ours.lock().closed = true;
            ours.0.1.notify_all();
        });
        (log, reader)
    }

    fn push(&self, line: String) {
        let mut lines = self.lock();
        lines.events.extend(Event::parse(&line));
        lines.lines.push(line);
        drop(lines);
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it as it came.
    #[must_use]
    pub fn as_text(&self) -> String {
        self.lock().lines.join("\n")
    }

    /// All lines as they came.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.lock().lines.clone()
    }

    /// All events so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.lock().events.clone()
    }

    /// The events so far whose sentence begins with `message`.
    #[must_use]
    pub fn all(&self, message: &str) -> Vec<Event> {
        self.lock().events.iter().filter(|event| event.message().starts_with(message)).cloned().collect()
    }

    /// The only event whose sentence begins with `message`; panics if there is none, or more.
    #[must_use]
    pub fn only(&self, message: &str) -> Event {
        let mut all = self.all(message);
        assert!(all.len() == 1, "{} times {message:?}, not once, in\n{}", all.len(), self.as_text());
        all.remove(0)
    }

    /// Waits for an event for which `wanted` is true, from the beginning of the log on. None when the time has passed or the
    /// log has ended without one.
    pub(crate) fn wait_for(&self, deadline: Duration, wanted: impl Fn(&Event) -> bool) -> Option<Event> {
        let end = Instant::now() + deadline;
        let (mut lines, mut seen) = (self.lock(), 0);
        loop {
            if let Some(found) = lines.events[seen..].iter().find(|event| wanted(event)) {
                return Some(found.clone());
            }
            seen = lines.events.len();
            let left = end.saturating_duration_since(Instant::now());
            if lines.closed || left.is_zero() {
                return None;
            }
            lines = self.0.1.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "{\"level\":\"info\",\"message\":\"listening\",\"port\":7440,\"rate\":1.5,\"eta\":null}\nplain words\n\
        {\"level\":\"warn\",\"message\":\"peer refused\"}\n";

    #[test]
    fn a_log_is_read_to_its_end() {
        let (log, reader) = Log::read(TEXT.as_bytes());
        reader.join().unwrap();
        assert_eq!((log.lines().len(), log.events().len()), (3, 2));
        let event = log.only("listening");
        assert_eq!((event.level(), event.count("port"), event.number("rate")), ("info", 7440, 1.5));
        assert!(!event.has("eta") && !event.has("nothing"));
        let found = log.wait_for(Duration::ZERO, |event| event.level() == "warn").unwrap();
        assert_eq!(found.message(), "peer refused");
        assert_eq!(log.wait_for(Duration::from_secs(60), |_| false), None, "a log that has ended is not waited for");
    }

    #[test]
    fn what_comes_later_is_waited_for() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (log, _) = Log::read(reader);
        let waiting = log.clone();
        let waiter = thread::spawn(move || waiting.wait_for(Duration::from_secs(60), |event| event.has("b")));
        std::io::Write::write_all(&mut writer, b"{\"a\":1}\n{\"b\":2}\n").unwrap();
        assert_eq!(waiter.join().unwrap().unwrap().count("b"), 2);
    }
}
