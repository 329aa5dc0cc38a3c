//! Writes streams: their header, and any command, good or bad. Tests make hostile streams with it.

use super::format::{Attr, COMMAND_HEADER_BYTES, MAGIC, checksum, seal};

/// Appends the header of a stream.
pub fn encode_header(version: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&version.to_le_bytes());
}

/// Appends a command: its number, the number and value of each attribute in this order.
///
/// A value longer than 65535 bytes fits only into DATA of version 2; of any other the length would be cut, and the reader refuse
/// the command. From version 2 on DATA must be the last.
pub fn encode(kind: u16, attrs: &[(u16, &[u8])], version: u32, out: &mut Vec<u8>) {
    let mut encoder = Encoder::begin(kind, version, out);
    for (number, value) in attrs {
        encoder.attr(*number, value);
    }
    encoder.end();
}

/// A command that is being appended, attribute by attribute.
pub(super) struct Encoder<'o> {
    out: &'o mut Vec<u8>,
    start: usize,
    version: u32,
}

impl<'o> Encoder<'o> {
    pub(super) fn begin(kind: u16, version: u32, out: &'o mut Vec<u8>) -> Self {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        debug_assert_eq!(out.len() - start, COMMAND_HEADER_BYTES);
        Self { out, start, version }
    }

    pub(super) fn attr(&mut self, number: u16, value: &[u8]) {
        self.out.extend_from_slice(&number.to_le_bytes());
        if self.version < 2 || number != Attr::Data.number() {
            self.out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        }
        self.out.extend_from_slice(value);
    }

    pub(super) fn end(self) {
        seal(&mut self.out[self.start..], checksum);
    }
}
