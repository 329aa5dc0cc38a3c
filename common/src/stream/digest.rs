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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{StreamError, samples::Sample, walk::Item};

    fn digest(scope: DigestScope, sample: &Sample) -> Digest {
        let mut digest = StreamDigest::new(scope);
        let walked = sample.walk::<StreamError>(1000, |item| {
            if let Item::Command { command, .. } = item {
                digest.update(&command);
            }
            Ok(())
        });
        assert_eq!(walked, Ok(()));
        digest.finish()
    }

    #[test]
    fn full_is_the_digest_of_the_bytes() {
        let mut sample = Sample::begun(2, None);
        sample.write(b"a", 0, b"data").utimes(b"a").end();
        let bytes: Digest = Sha256::digest(&sample.bytes).into();
        assert_eq!(digest(DigestScope::Full, &sample), bytes);
    }

    #[test]
    fn structure_leaves_out_the_bodies_with_data_only() {
        let mut sample = Sample::begun(1, None);
        let start = sample.bytes.len();
        let length = sample.write(b"a", 0, b"data").bytes.len() - start;
        sample.utimes(b"a").end();
        let mut structure = sample.bytes.clone();
        structure.drain(start + COMMAND_HEADER_BYTES..start + length);
        let bytes: Digest = Sha256::digest(&structure).into();
        assert_eq!(digest(DigestScope::Structure, &sample), bytes);
    }
}
