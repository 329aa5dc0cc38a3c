//! One command of a stream: a view of its bytes, whose framing has been checked.

use uuid::Uuid;

use super::{
    error::StreamError,
    format::{Attr, COMMAND_HEADER_BYTES, Kind, MAX_COMMAND_BYTES, MAX_FILE_BYTES, checksum, stored_checksum},
};

/// A whole command. Its length, its checksum and the framing of its attributes are right; what they say may be anything.
#[derive(Debug, Clone, Copy)]
pub struct Command<'a> {
    bytes: &'a [u8],
    kind: Kind,
    version: u32,
}

/// A range of a file that a command fills: bytes `start` to before `end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataRange<'a> {
    /// The file, relative to the subvolume.
    pub path: &'a [u8],
    /// Offset of its first byte.
    pub start: u64,
    /// Offset behind its last byte.
    pub end: u64,
}

impl<'a> Command<'a> {
    /// The command that begins at the start of `bytes`: None if they do not hold all of it.
    ///
    /// `version` is that of the stream, `position` the offset of `bytes` in it, for errors. What is wrong shows as soon as enough
    /// bytes are there to tell: nobody needs to gather the 4 GiB of a length that is too long.
    pub fn first(bytes: &'a [u8], version: u32, position: u64) -> Result<Option<Self>, StreamError> {
        let Some(length) = whole_length(bytes, position)? else { return Ok(None) };
        let Some(bytes) = bytes.get(..length) else { return Ok(None) };
        if checksum(bytes) != stored_checksum(bytes) {
            return Err(StreamError::BadChecksum { position });
        }
        let number = u16::from_le_bytes([bytes[4], bytes[5]]);
        let kind = Kind::from_number(number).ok_or(StreamError::UnknownCommand { position, number })?;
        let command = Self { bytes, kind, version };
        let mut attrs = command.attrs();
        attrs.by_ref().for_each(drop);
        if attrs.rest.is_empty() { Ok(Some(command)) } else { Err(StreamError::BadAttributes { position, kind }) }
    }

    /// A command that may be longer than any of the kernel's, as segments have them.
    #[cfg(test)]
    pub(super) fn unlimited(bytes: &'a [u8], version: u32) -> Self {
        let kind = Kind::from_number(u16::from_le_bytes([bytes[4], bytes[5]])).unwrap();
        Self { bytes, kind, version }
    }

    /// What it does.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The version of the stream that it is from: its attributes are spelled accordingly.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// All its bytes, header included.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Its attributes, without the header.
    pub fn body(&self) -> &'a [u8] {
        &self.bytes[COMMAND_HEADER_BYTES..]
    }

    /// Its attributes in their order, by number: nobody has said yet that the numbers are known, or occur once.
    pub fn attrs(&self) -> Attrs<'a> {
        Attrs { rest: self.body(), version: self.version }
    }

    /// The value of an attribute, if it is there; of several the first.
    pub fn opt_attr(&self, attr: Attr) -> Option<&'a [u8]> {
        self.attrs().find_map(|(number, value)| (number == attr.number()).then_some(value))
    }

    /// The value of an attribute.
    pub fn attr(&self, attr: Attr) -> Result<&'a [u8], StreamError> {
        self.opt_attr(attr).ok_or(StreamError::MissingAttribute { kind: self.kind, attr })
    }

    /// The path that it is about, relative to the subvolume; empty for its root directory.
    pub fn path(&self) -> Result<&'a [u8], StreamError> {
        self.attr(Attr::Path)
    }

    /// The value of an attribute of 8 bytes.
    pub fn u64(&self, attr: Attr) -> Result<u64, StreamError> {
        self.fixed(attr).map(u64::from_le_bytes)
    }

    /// The value of an attribute of 4 bytes.
    pub fn u32(&self, attr: Attr) -> Result<u32, StreamError> {
        self.fixed(attr).map(u32::from_le_bytes)
    }

    /// The value of an attribute that is a uuid.
    pub fn uuid(&self, attr: Attr) -> Result<Uuid, StreamError> {
        self.fixed(attr).map(Uuid::from_bytes)
    }

    /// What it fills of a file: of WRITE, CLONE, ENCODED_WRITE and UPDATE_EXTENT; None of all others.
    pub fn data_range(&self) -> Result<Option<DataRange<'a>>, StreamError> {
        let length = match self.kind {
            Kind::Write => self.attr(Attr::Data)?.len() as u64,
            Kind::Clone => self.u64(Attr::CloneLen)?,
            Kind::EncodedWrite => self.u64(Attr::UnencodedFileLen)?,
            Kind::UpdateExtent => self.u64(Attr::Size)?,
            _ => return Ok(None),
        };
        let (path, start) = (self.path()?, self.u64(Attr::FileOffset)?);
        let end = start.checked_add(length).filter(|end| *end <= MAX_FILE_BYTES);
        let end = end.ok_or(StreamError::RangeOverflow { kind: self.kind })?;
        Ok(Some(DataRange { path, start, end }))
    }

    fn fixed<const N: usize>(&self, attr: Attr) -> Result<[u8; N], StreamError> {
        let value = self.attr(attr)?;
        value.try_into().map_err(|_| StreamError::AttributeLength { kind: self.kind, attr, bytes: value.len() })
    }
}

/// Length of the command that begins at the start of `bytes`, once they hold its header; checked against its limit.
pub(super) fn whole_length(bytes: &[u8], position: u64) -> Result<Option<usize>, StreamError> {
    let [a, b, c, d, ..] = *bytes else { return Ok(None) };
    let length = u64::from(u32::from_le_bytes([a, b, c, d])) + COMMAND_HEADER_BYTES as u64;
    if length > MAX_COMMAND_BYTES as u64 {
        return Err(StreamError::CommandTooLong { position, bytes: length });
    }
    Ok(Some(length as usize))
}

/// The attributes of a command: number and value of each.
#[derive(Debug, Clone)]
pub struct Attrs<'a> {
    rest: &'a [u8],
    version: u32,
}

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    /// Ends at the first attribute that does not fit into what is left; `rest` then still holds it.
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (number, behind) = self.rest.split_first_chunk::<2>()?;
        let number = u16::from_le_bytes(*number);
        let (value, rest) = if number == Attr::Data.number() && self.version >= 2 {
            (behind, &[][..])
        } else {
            let (length, behind) = behind.split_first_chunk::<2>()?;
            behind.split_at_checked(usize::from(u16::from_le_bytes(*length)))?
        };
        self.rest = rest;
        Some((number, value))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::stream::encode::encode;

    #[test]
    fn attributes_that_do_not_fill_the_body_are_refused() {
        for (version, body) in [(1, &[15, 0, 9, 0, b'a'][..]), (1, &[15]), (2, &[15, 0, 1]), (1, &[19, 0, b'x'])] {
            let mut bytes = vec![0; COMMAND_HEADER_BYTES];
            bytes[4] = 11;
            bytes.extend_from_slice(body);
            crate::stream::format::seal(&mut bytes, checksum);
            let refused = Command::first(&bytes, version, 17).unwrap_err();
            assert_eq!(refused, StreamError::BadAttributes { position: 17, kind: Kind::Unlink });
        }
    }

    #[test]
    fn data_takes_the_rest_from_version_2_on() {
        for version in [1, 2] {
            let mut bytes = Vec::new();
            let attrs: [(u16, &[u8]); 3] = [(15, b"a/b"), (18, &7u64.to_le_bytes()), (19, b"data\x0f\x00")];
            encode(Kind::Write.number(), &attrs, version, &mut bytes);
            let command = Command::first(&bytes, version, 0).unwrap().unwrap();
            assert_eq!(command.attr(Attr::Data), Ok(&b"data\x0f\x00"[..]));
            assert_eq!(command.attrs().count(), 3);
            let range = command.data_range().unwrap().unwrap();
            assert_eq!((range.path, range.start, range.end), (&b"a/b"[..], 7, 13));
            assert_eq!(bytes.len(), COMMAND_HEADER_BYTES + 7 + 12 + 6 + if version == 1 { 4 } else { 2 });
        }
    }

    #[test]
    fn wrong_lengths_missing_attributes_and_overflow_are_errors() {
        let mut bytes = Vec::new();
        let attrs: [(u16, &[u8]); 3] = [(15, b"a"), (18, &u64::MAX.to_le_bytes()), (19, b"x")];
        encode(Kind::Write.number(), &attrs, 2, &mut bytes);
        let command = Command::first(&bytes, 2, 0).unwrap().unwrap();
        assert_eq!(command.data_range(), Err(StreamError::RangeOverflow { kind: Kind::Write }));
        assert_eq!(
            command.u32(Attr::FileOffset),
            Err(StreamError::AttributeLength { kind: Kind::Write, attr: Attr::FileOffset, bytes: 8 })
        );
        assert_eq!(command.u64(Attr::Mode), Err(StreamError::MissingAttribute { kind: Kind::Write, attr: Attr::Mode }));
    }
}
