//! What `check` says: a line a finding, and an exit code.

use std::error::Error;

use crate::exit::{Exit, chain};

/// Findings, printed as they come.
#[derive(Debug, Default)]
pub struct Findings {
    errors: usize,
}

impl Findings {
    /// All is well with something.
    pub fn good(&self, text: &str) {
        println!("ok       {text}");
    }

    /// It works, but an operator should know.
    pub fn note(&self, text: &str) {
        println!("warning  {text}");
    }

    /// It will not work.
    pub fn bad(&mut self, text: &str) {
        self.errors += 1;
        println!("error    {text}");
    }

    /// It will not work, as an error says.
    pub fn error(&mut self, error: &dyn Error) {
        self.bad(&chain(error));
    }

    /// `good` or the error; the value goes on.
    pub fn judge<T>(&mut self, good: &str, result: Result<T, impl Error + 'static>) -> Option<T> {
        match result {
            Ok(value) => {
                self.good(good);
                Some(value)
            }
            Err(error) => {
                self.error(&error);
                None
            }
        }
    }

    /// Both agents need root.
    pub fn root(&mut self) {
        if rustix::process::geteuid().is_root() {
            self.good("root");
        } else {
            self.bad(
                "not root: snapshots, sends and mounts need CAP_SYS_ADMIN; run it with sudo or as a system service",
            );
        }
    }

    /// [`Exit::Failed`] if anything will not work.
    pub fn exit(&self) -> Exit {
        if self.errors == 0 { Exit::Done } else { Exit::Failed }
    }
}
