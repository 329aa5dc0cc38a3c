//! The log, the main user interface: one event a line, `text` for people or `json` for programs, the same fields in both.
//!
//! Text makes known fields readable (`rate=112 MiB/s eta=3m20s`); JSON keeps them as numbers in base units: bytes, bytes a second,
//! seconds. Both go to stderr. Whatever comes from a peer or a file name is escaped: a line of the log is a line.

use std::{
    fmt::{self, Write as _},
    io::IsTerminal,
    time::Duration,
};

use serde::Deserialize;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    filter::LevelFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, format::Writer},
    registry::LookupSpan,
};

use crate::size::{human_bytes, human_duration, human_rate};

/// How lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

/// Starts logging to stderr: for the whole process, once.
pub fn init(format: Format, level: Level) {
    let lines = Lines { format, colours: format == Format::Text && std::io::stderr().is_terminal() };
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::from_level(level))
        .with_writer(std::io::stderr)
        .event_format(lines)
        .init();
}

/// Writes an event as a line.
struct Lines {
    format: Format,
    colours: bool,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let (time, level) = (jiff::Timestamp::now(), *event.metadata().level());
        let line = match self.format {
            Format::Text => text(time, level, &fields, self.colours),
            Format::Json => json(time, level, fields),
        };
        writeln!(writer, "{line}")
    }
}

/// A field's value. NaN and infinity become null, as JSON wants.
type Value = serde_json::Value;

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        if field.name() == "message" {
            self.message = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        } else {
            self.others.push((field.name(), value));
        }
    }
}

impl Visit for Fields {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
}

fn json(time: jiff::Timestamp, level: Level, fields: Fields) -> String {
    let mut object = serde_json::Map::new();
    object.insert("time".to_owned(), format!("{time:.6}").into());
    object.insert("level".to_owned(), level.as_str().to_ascii_lowercase().into());
    object.insert("message".to_owned(), fields.message.into());
    for (name, value) in fields.others {
        object.insert(name.to_owned(), value);
    }
    Value::Object(object).to_string()
}

fn text(time: jiff::Timestamp, level: Level, fields: &Fields, colours: bool) -> String {
    let mut line = time.strftime("%Y-%m-%dT%H:%M:%SZ ").to_string();
    match (colours, level) {
        (true, Level::ERROR) => line.push_str("\x1b[31mERROR\x1b[0m "),
        (true, Level::WARN) => line.push_str("\x1b[33mWARN\x1b[0m  "),
        (_, level) => {
            // A String takes whatever is written to it.
            let _ = write!(line, "{level:<5} ");
        }
    }
    escape(&mut line, &fields.message);
    for (name, value) in &fields.others {
        line.push(' ');
        line.push_str(name);
        line.push('=');
        readable(&mut line, name, value);
    }
    line
}

/// The value of a known field in the unit that people think in; any other as it is.
fn readable(line: &mut String, name: &str, value: &Value) {
    let known = match (name, value.as_f64()) {
        ("bytes" | "total" | "sent" | "received" | "applied" | "durable" | "need" | "have" | "free", _) => {
            value.as_u64().map(human_bytes)
        }
        ("rate" | "average_rate", Some(rate)) => Some(human_rate(rate)),
        ("eta" | "retry" | "seconds", Some(seconds)) => Duration::try_from_secs_f64(seconds).ok().map(human_duration),
        ("percent", Some(percent)) => Some(format!("{percent:.1}%")),
        ("ratio", Some(ratio)) => Some(format!("{ratio:.2}")),
        ("publish_us" | "swap_us", Some(micros)) => Some(human_duration(Duration::from_micros(micros as u64))),
        _ => None,
    };
    match (known, value) {
        // "112MiB/s" is one word of the line, for the eye and for grep.
        (Some(known), _) => line.push_str(&known.replace(' ', "")),
        (None, Value::String(text)) if text.is_empty() || text.contains([' ', '"', '=']) => {
            line.push('"');
            escape(line, &text.replace('"', "\\\""));
            line.push('"');
        }
        (None, Value::String(text)) => escape(line, text),
        (None, other) => line.push_str(&other.to_string()),
    }
}

/// Appends `text` without anything that would end the line or move the cursor.
fn escape(line: &mut String, text: &str) {
    for character in text.chars() {
        if character.is_control() {
            line.extend(character.escape_default());
        } else {
            line.push(character);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> Fields {
        let others = vec![
            ("volume", "substitutes".into()),
            ("bytes", (3u64 << 30).into()),
            ("rate", (112.0 * f64::from(1 << 20)).into()),
            ("eta", 200.0.into()),
            ("percent", 43.25.into()),
            ("file", "a\nb c\u{1b}[2J".into()),
        ];
        Fields { message: "transfer progress".into(), others }
    }

    fn now() -> jiff::Timestamp {
        "2026-11-22T07:00:00.5Z".parse().unwrap()
    }

    #[test]
    fn text_is_readable_and_stays_on_its_line() {
        let line = text(now(), Level::INFO, &fields(), false);
        assert!(line.starts_with("2026-11-22T07:00:00Z INFO  transfer progress volume=substitutes bytes=3"), "{line}");
        assert!(line.contains("rate=112") && line.contains("MiB/s eta=3m20s percent=43.2%"), "{line}");
        assert!(!line.contains(char::is_control), "{line:?}");
        assert!(line.ends_with(r#"file="a\nb c\u{1b}[2J""#), "{line}");
    }

    #[test]
    fn json_keeps_the_numbers_and_the_bytes_of_names() {
        let line = json(now(), Level::WARN, fields());
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["time"], "2026-11-22T07:00:00.500000Z");
        assert_eq!(value["level"], "warn");
        assert_eq!(value["bytes"], 3u64 << 30);
        assert_eq!(value["file"], "a\nb c\u{1b}[2J");
        assert!(!line.contains('\n'));
    }
}
