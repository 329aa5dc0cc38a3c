//! The stream digest: says whether both ends saw the same stream.

use sha2::{Digest as _, Sha256};

use super::{
    Digest, DigestScope,
    command::Command,
    format::{COMMAND_HEADER_BYTES, MAGIC},
};

/// SHA-256 over the header of a stream and over as much of its commands as a [`DigestScope`] says.
#[derive(Debug, Clone)]
pub struct StreamDigest {
    scope: DigestScope,
    hash: Sha256,
    begun: bool,
}

impl StreamDigest {
    /// Of no command yet.
    pub fn new(scope: DigestScope) -> Self {
        Self { scope, hash: Sha256::new(), begun: false }
    }

    /// Takes in the next command; with the first one, the header of the stream.
    #[inline]
    pub fn update(&mut self, command: &Command<'_>) {
        if !self.begun {
            self.begun = true;
            self.hash.update(MAGIC);
            self.hash.update(command.version().to_le_bytes());
        }
        let header_only = self.scope == DigestScope::Structure && command.kind().carries_data();
        let bytes = command.bytes();
        self.hash.update(if header_only { &bytes[..COMMAND_HEADER_BYTES] } else { bytes });
    }

    /// The digest of all commands so far.
    pub fn finish(self) -> Digest {
        self.hash.finalize().into()
    }
}
