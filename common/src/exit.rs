//! The exit codes of both programs, and the one place where an error is printed.

use std::{error::Error, process::ExitCode};

/// How a program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed.
    Failed = 1,
    /// Bad command line or configuration.
    Usage = 2,
    /// Another agent holds this volume.
    Held = 3,
    /// The peer cannot be reached or is not who it should be.
    Peer = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Prints an error once, to stderr: its text and what of its causes the text does not say already.
pub fn complain(program: &str, error: &dyn Error) {
    eprintln!("{program}: {}", chain(error));
}

/// An error and its causes in one line; a cause that its parent quotes already is not repeated.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot read {place}")]
    struct Outer {
        place: &'static str,
        source: std::io::Error,
    }

    #[derive(Debug, thiserror::Error)]
    #[error("quoted: {0}")]
    struct Quoting(#[source] std::io::Error);

    #[test]
    fn every_cause_is_said_once() {
        let cause = || std::io::Error::other("the disk is gone");
        assert_eq!(chain(&Outer { place: "x", source: cause() }), "cannot read x: the disk is gone");
        assert_eq!(chain(&Quoting(cause())), "quoted: the disk is gone");
    }
}
