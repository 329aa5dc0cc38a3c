//! Sizes and spans of time with their units, as people write them in configuration and read them in logs. Pure.
//!
//! A bare number never says whether it counts bytes or MiB, seconds or minutes; so a configuration gives the unit, always,
//! and what is not written with one is refused.

use std::{fmt, str::FromStr, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Units of a size, largest first within each family: the first binary one that divides a size exactly spells it.
const BINARY_UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const DECIMAL_UNITS: [(&str, u64); 4] =
    [("TB", 1_000_000_000_000), ("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)];

/// Units of a span in milliseconds; the first spelling of each is the one that we write.
const SPAN_UNITS: [(&[&str], u64); 5] =
    [(&["d"], 86_400_000), (&["h"], 3_600_000), (&["min", "m"], 60_000), (&["s"], 1_000), (&["ms"], 1)];

/// The longest span that is taken: a hundred years. More is a slip of the pen, and would overflow when added to a clock.
const MAX_SPAN_MILLIS: u64 = 36_525 * 86_400_000;

/// A number of bytes, written as in `"200MiB"`, `"64KiB"`, `"10TB"` or `"0"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(pub u64);

/// Why a text is no [`ByteSize`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadByteSize {
    /// Not a whole number followed by a known unit.
    #[error(
        "a size is a whole number and a unit, one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB, as in \"200MiB\" (or \"0\"), not {0:?}"
    )]
    Form(String),
    /// More than fits into 64 bits.
    #[error("the size {0:?} is larger than 16 EiB")]
    TooLarge(String),
}

/// A span of time in whole milliseconds, written as in `"90s"`, `"1h"`, `"5min"` (or `"5m"`), `"2d"`, `"250ms"`, `"1h30min"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span(pub Duration);

/// Why a text is no [`Span`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadSpan {
    /// Not whole numbers followed by known units, largest unit first.
    #[error(
        "a duration is a whole number and a unit, one of ms, s, min, h, d, as in \"90s\" or \"1h30min\" (or \"0\"), not {0:?}"
    )]
    Form(String),
    /// More than a hundred years.
    #[error("the duration {0:?} is longer than a hundred years")]
    TooLong(String),
}

impl FromStr for ByteSize {
    type Err = BadByteSize;

    fn from_str(text: &str) -> Result<Self, BadByteSize> {
        if text == "0" {
            return Ok(Self(0));
        }
        let form = || BadByteSize::Form(excerpt(text));
        let (digits, unit) = text.split_at(text.bytes().take_while(u8::is_ascii_digit).count());
        let units = BINARY_UNITS.iter().chain(&DECIMAL_UNITS);
        let (_, factor) = units.into_iter().find(|(name, _)| *name == unit.trim_start_matches(' ')).ok_or_else(form)?;
        if digits.is_empty() {
            return Err(form());
        }
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor));
        number.map(Self).ok_or_else(|| BadByteSize::TooLarge(excerpt(text)))
    }
}

impl fmt::Display for ByteSize {
    /// Exact, in the largest binary unit that has no remainder; it reads back as the same size.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match BINARY_UNITS.iter().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => f.write_str("0"),
        }
    }
}

impl FromStr for Span {
    type Err = BadSpan;

    fn from_str(text: &str) -> Result<Self, BadSpan> {
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let form = || BadSpan::Form(excerpt(text));
        let too_long = || BadSpan::TooLong(excerpt(text));
        let (mut rest, mut millis, mut units) = (text, 0_u64, &SPAN_UNITS[..]);
        while !rest.is_empty() || millis == 0 && units.len() == SPAN_UNITS.len() {
            let (digits, behind) = rest.split_at(rest.bytes().take_while(u8::is_ascii_digit).count());
            let (unit, next) = behind.split_at(behind.bytes().take_while(u8::is_ascii_alphabetic).count());
            // Each unit at most once and the larger first: "30s1h" is more likely an error than a wish.
            let place = units.iter().position(|(names, _)| names.contains(&unit)).ok_or_else(form)?;
            if digits.is_empty() {
                return Err(form());
            }
            let part = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(units[place].1));
            millis = part.and_then(|part| part.checked_add(millis)).ok_or_else(too_long)?;
            units = &units[place + 1..];
            rest = next;
        }
        if millis > MAX_SPAN_MILLIS { Err(too_long()) } else { Ok(Self(Duration::from_millis(millis))) }
    }
}

impl fmt::Display for Span {
    /// Exact to the millisecond; it reads back as the same span.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_millis();
        if rest == 0 {
            return f.write_str("0");
        }
        for (names, factor) in SPAN_UNITS {
            let factor = u128::from(factor);
            if rest >= factor {
                write!(f, "{}{}", rest / factor, names[0])?;
                rest %= factor;
            }
        }
        Ok(())
    }
}

/// The beginning of a text for an error message.
fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Bytes for people: `0 B`, `1023 B`, `1.50 MiB`, `112 MiB`, three digits that count.
pub fn human_bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    // 999.5 rounds to 1000: four digits, hence the next unit.
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.digits$} {}", units[unit])
}

/// Bytes a second for people: `112 MiB/s`. What is no number, or negative, counts as 0.
pub fn human_rate(bytes_per_second: f64) -> String {
    // A float-to-int cast saturates, and makes 0 of what is no number.
    format!("{}/s", human_bytes(bytes_per_second.round() as u64))
}

/// A span of time for people, its two largest units: `250us`, `8.21s`, `3m20s`, `2h05m`, `4d03h`.
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    if duration.is_zero() {
        return "0s".to_owned();
    }
    if seconds < 0.000_999_5 {
        return format!("{}us", (seconds * 1e6).round());
    }
    if seconds < 0.999_5 {
        return format!("{}ms", (seconds * 1e3).round());
    }
    if seconds < 59.95 {
        let digits = if seconds < 9.995 { 2 } else { 1 };
        let text = format!("{seconds:.digits$}");
        return format!("{}s", text.trim_end_matches('0').trim_end_matches('.'));
    }
    let whole = seconds.round() as u64;
    match whole {
        0..3_600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3_600..86_400 => format!("{}h{:02}m", whole / 3_600, whole % 3_600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3_600),
    }
}

/// Takes text only: an integer has no unit.
struct TextVisitor<T>(std::marker::PhantomData<T>, &'static str);

impl<T: FromStr<Err: fmt::Display>> de::Visitor<'_> for TextVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor(std::marker::PhantomData, "a size with its unit such as \"200MiB\""))
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor(std::marker::PhantomData, "a duration with its unit such as \"90s\""))
    }
}

impl Serialize for Span {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, bytes) in [
            ("0", 0),
            ("0B", 0),
            ("17B", 17),
            ("64KiB", 65_536),
            ("200MiB", 209_715_200),
            ("200 MiB", 209_715_200),
            ("1GiB", 1 << 30),
            ("10TiB", 10 << 40),
            ("3kB", 3_000),
            ("10TB", 10_000_000_000_000),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in ["", "1", "MiB", "-1MiB", "1.5MiB", "1mib", "1M", "1 MiB ", "1MiB1", "1Mi", "٣MiB"] {
            assert!(matches!(bad.parse::<ByteSize>(), Err(BadByteSize::Form(_))), "{bad:?}");
        }
        assert!(matches!("16777216TiB".parse::<ByteSize>(), Err(BadByteSize::TooLarge(_))));
        assert!(matches!("99999999999999999999B".parse::<ByteSize>(), Err(BadByteSize::TooLarge(_))));
    }

    #[test]
    fn spans_are_read_with_their_unit() {
        for (text, millis) in [
            ("0", 0),
            ("0s", 0),
            ("250ms", 250),
            ("90s", 90_000),
            ("5m", 300_000),
            ("5min", 300_000),
            ("1h", 3_600_000),
            ("1h30min", 5_400_000),
            ("2d", 172_800_000),
        ] {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(millis))), "{text}");
        }
        for bad in ["", "1", "s", "-1s", "1.5h", "1w", "1 h", "30s1h", "1s1s", "1h ", "1month"] {
            assert!(matches!(bad.parse::<Span>(), Err(BadSpan::Form(_))), "{bad:?}");
        }
        for long in ["40000d", "99999999999999999999s", "18446744073709551615d"] {
            assert!(matches!(long.parse::<Span>(), Err(BadSpan::TooLong(_))), "{long:?}");
        }
    }

    #[test]
    fn three_digits_are_enough_for_people() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1_572_864, "1.50 MiB"),
            (10_480_517, "9.99 MiB"),
            (10_485_759, "10.0 MiB"),
            (117_440_512, "112 MiB"),
            (1_048_051_712, "0.98 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human_bytes(bytes), text, "{bytes}");
        }
        assert_eq!(human_rate(117_440_512.4), "112 MiB/s");
        assert_eq!(human_rate(f64::NAN), "0 B/s");
        assert_eq!(human_rate(-1.0), "0 B/s");
    }

    #[test]
    fn durations_show_two_units() {
        for (millis, text) in [
            (0, "0s"),
            (3, "3ms"),
            (8_214, "8.21s"),
            (10_000, "10s"),
            (59_960, "1m00s"),
            (200_000, "3m20s"),
            (7_500_000, "2h05m"),
            (356_400_000, "4d03h"),
        ] {
            assert_eq!(human_duration(Duration::from_millis(millis)), text, "{millis}");
        }
        assert_eq!(human_duration(Duration::from_micros(250)), "250us");
    }

    #[test]
    fn a_bare_number_is_refused_in_configuration() {
        #[derive(Debug, Deserialize)]
        struct Sample {
            #[allow(dead_code)]
            size: ByteSize,
        }
        let error = toml::from_str::<Sample>("size = 5").unwrap_err();
        assert!(error.message().contains("expected a size with its unit"), "{error}");
    }

    proptest! {
        #[test]
        fn sizes_read_back_as_written(bytes in any::<u64>(), shift in 0_u32..50) {
            let size = ByteSize(bytes >> shift << shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }

        #[test]
        fn spans_read_back_as_written(millis in 0..=MAX_SPAN_MILLIS, coarse in prop::sample::select(vec![1_u64, 1000, 60_000])) {
            let span = Span(Duration::from_millis(millis / coarse * coarse));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
        }

        #[test]
        fn nothing_makes_the_parsers_panic(text in "\\PC*") {
            let _ = (text.parse::<ByteSize>(), text.parse::<Span>());
        }
    }
}
