//! Finds the commands in blocks of bytes that end anywhere.

use super::{
    command::{Command, whole_length},
    error::StreamError,
    format::{COMMAND_HEADER_BYTES, Kind, MAGIC, NEWEST_VERSION, STREAM_HEADER_BYTES},
};

/// What a [`Walker`] comes by.
#[derive(Debug, Clone, Copy)]
pub enum Item<'a> {
    /// The stream's header, with the version of the format.
    Version(u32),
    /// A command.
    Command {
        /// The command; its bytes are those of the block where it lies whole inside.
        command: Command<'a>,
        /// Offset in the stream just behind it.
        end: u64,
    },
}

/// Walks a stream block by block.
///
/// Memory is bounded by [`super::format::MAX_COMMAND_BYTES`]: only a command that lies across two blocks is copied. After an
/// error the walker has lost its way and must not be used again.
#[derive(Debug)]
pub struct Walker {
    stage: Stage,
    /// The beginning of a command whose end is not here yet.
    partial: Vec<u8>,
    position: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Header,
    Commands { version: u32 },
    Ended,
}

impl Default for Walker {
    fn default() -> Self {
        Self::new()
    }
}

impl Walker {
    /// At the beginning of a stream.
    pub fn new() -> Self {
        Self { stage: Stage::Header, partial: Vec::new(), position: 0 }
    }

    /// In the middle of a stream of that version, behind the command that ends at `position`.
    pub fn resume(version: u32, position: u64) -> Self {
        Self { stage: Stage::Commands { version }, partial: Vec::new(), position }
    }

    /// Calls `each` with everything that `block`, the next bytes of the stream, completes.
    ///
    /// # Errors
    /// What is wrong with the bytes, at the first command where it shows; or the first error of `each`.
    pub fn walk<E: From<StreamError>>(
        &mut self,
        mut block: &[u8],
        mut each: impl FnMut(Item<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        while !block.is_empty() {
            if self.partial.is_empty() {
                let used = self.step(block, &mut each)?;
                if used == 0 {
                    self.partial.extend_from_slice(block);
                    return Ok(());
                }
                block = &block[used..];
            } else {
                let wanted = self.wanted()? - self.partial.len();
                let (taken, rest) = block.split_at(wanted.min(block.len()));
                self.partial.extend_from_slice(taken);
                block = rest;
                let mut partial = std::mem::take(&mut self.partial);
                if self.step(&partial, &mut each)? != 0 {
                    partial.clear();
                }
                self.partial = partial;
            }
        }
        Ok(())
    }

    /// Bytes of the stream that were the header or whole commands.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Is it a whole stream?
    ///
    /// # Errors
    /// [`StreamError::Truncated`] unless END has come and nothing is left behind it.
    pub fn finish(&self) -> Result<(), StreamError> {
        match self.stage {
            Stage::Ended => Ok(()),
            _ => Err(StreamError::Truncated { position: self.position }),
        }
    }

    /// Takes one item from the start of `bytes`, and says how long it was: 0 if they do not hold all of it.
    #[inline]
    fn step<E: From<StreamError>>(
        &mut self,
        bytes: &[u8],
        each: &mut impl FnMut(Item<'_>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let used = match self.stage {
            Stage::Header => {
                let Some(version) = parse_header(bytes)? else { return Ok(0) };
                self.stage = Stage::Commands { version };
                self.position = STREAM_HEADER_BYTES as u64;
                each(Item::Version(version))?;
                STREAM_HEADER_BYTES
            }
            Stage::Commands { version } => {
                let Some(command) = Command::first(bytes, version, self.position)? else { return Ok(0) };
                if command.kind() == Kind::End {
                    self.stage = Stage::Ended;
                }
                let used = command.bytes().len();
                self.position += used as u64;
                each(Item::Command { command, end: self.position })?;
                used
            }
            Stage::Ended => return Err(StreamError::AfterEnd { position: self.position }.into()),
        };
        Ok(used)
    }

    /// How many bytes `partial` must have before it is worth another look: the header first, then the whole.
    fn wanted(&self) -> Result<usize, StreamError> {
        if self.stage == Stage::Header {
            return Ok(STREAM_HEADER_BYTES);
        }
        if self.partial.len() < COMMAND_HEADER_BYTES {
            return Ok(COMMAND_HEADER_BYTES);
        }
        Ok(whole_length(&self.partial, self.position)?.unwrap_or(COMMAND_HEADER_BYTES))
    }
}

/// The version in the header of a stream: None if `bytes` do not hold all of it.
fn parse_header(bytes: &[u8]) -> Result<Option<u32>, StreamError> {
    let magic = &bytes[..bytes.len().min(MAGIC.len())];
    if *magic != MAGIC[..magic.len()] {
        return Err(StreamError::BadMagic);
    }
    let Some([a, b, c, d]) = bytes.get(MAGIC.len()..STREAM_HEADER_BYTES) else { return Ok(None) };
    match u32::from_le_bytes([*a, *b, *c, *d]) {
        version @ 1..=NEWEST_VERSION => Ok(Some(version)),
        version => Err(StreamError::UnsupportedVersion(version)),
    }
}

#[cfg(test)]
mod tests;
