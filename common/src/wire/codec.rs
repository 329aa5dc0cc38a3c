//! Frames: `u32 length` (little-endian, of the payload), `u8 kind`, payload.
//!
//! | kind | payload | limit |
//! |---|---|---|
//! | 0 Hello, 1 Refuse | fixed for all versions, see `message` | [`limits::MAX_GREETING_BYTES`] |
//! | 2 Control | one message, bincode | [`limits::MAX_CONTROL_BYTES`] |
//! | 3 Data | `u64 offset` of its first byte in the stream, `u32 length` of the block, `u8 encoding` (0 plain, 1 zstd), block | [`limits::MAX_DATA_FRAME_BYTES`] |

use bytes::{Buf, Bytes, BytesMut};
use tokio_util::codec::Decoder;

use super::limits;

/// Length and kind.
pub const FRAME_HEADER_BYTES: usize = 5;
/// Offset, length and encoding.
pub const DATA_HEADER_BYTES: usize = 13;
/// What stands before the block in a data frame.
pub const DATA_PREFIX_BYTES: usize = FRAME_HEADER_BYTES + DATA_HEADER_BYTES;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The first frame of either side.
    Hello = 0,
    /// The last frame of a side that cannot talk to the other.
    Refuse = 1,
    /// A message.
    Control = 2,
    /// A block of the stream.
    Data = 3,
}

/// How a block's bytes are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As they are.
    Plain = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// A frame as it came, lengths checked, nothing decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// See [`super::message::Hello`].
    Hello(Bytes),
    /// See [`super::message::Refuse`].
    Refuse(Bytes),
    /// A message.
    Control(Bytes),
    /// A block of the stream.
    Data(DataFrame),
}

/// A block of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFrame {
    /// Where in the stream its first byte belongs.
    pub offset: u64,
    /// Bytes of the block when decoded, 1 to [`limits::MAX_BLOCK_BYTES`].
    pub length: usize,
    /// How `body` is written.
    pub encoding: Encoding,
    /// The block as it travelled.
    pub body: Bytes,
}

/// What is wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The connection broke.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// It closed in the middle of a frame.
    #[error("the connection ended in the middle of a frame")]
    Truncated,
    /// A kind that no version of the protocol has.
    #[error("frame kind {0} does not exist")]
    UnknownKind(u8),
    /// Outside the limits of its kind.
    #[error("a {kind:?} frame of {length} bytes is outside {min} to {max}")]
    Length {
        /// The frame's kind.
        kind: Kind,
        /// What it said.
        length: usize,
        /// The least.
        min: usize,
        /// The most.
        max: usize,
    },
    /// A data header that contradicts itself.
    #[error("a data frame says {length} bytes in encoding {encoding} with {body} bytes behind it")]
    Data {
        /// Decoded length as it said.
        length: usize,
        /// Encoding as it said.
        encoding: u8,
        /// Bytes that came.
        body: usize,
    },
}

impl Kind {
    fn parse(byte: u8) -> Result<Self, FrameError> {
        Ok(match byte {
            0 => Self::Hello,
            1 => Self::Refuse,
            2 => Self::Control,
            3 => Self::Data,
            other => return Err(FrameError::UnknownKind(other)),
        })
    }

    /// Least and most bytes of a payload.
    fn limits(self) -> (usize, usize) {
        match self {
            Self::Hello | Self::Refuse => (1, limits::MAX_GREETING_BYTES),
            Self::Control => (1, limits::MAX_CONTROL_BYTES),
            Self::Data => (DATA_HEADER_BYTES + 1, limits::MAX_DATA_FRAME_BYTES),
        }
    }
}

/// Cuts a connection's bytes into frames.
#[derive(Debug, Default)]
pub struct FrameDecoder;

impl Decoder for FrameDecoder {
    type Item = Frame;
    type Error = FrameError;

    fn decode(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if source.len() < FRAME_HEADER_BYTES {
            return Ok(None);
        }
        let length = u32::from_le_bytes([source[0], source[1], source[2], source[3]]) as usize;
        let kind = Kind::parse(source[4])?;
        let (min, max) = kind.limits();
        if !(min..=max).contains(&length) {
            return Err(FrameError::Length { kind, length, min, max });
        }
        let whole = FRAME_HEADER_BYTES + length;
        if source.len() < whole {
            source.reserve(whole - source.len());
            return Ok(None);
        }
        let mut frame = source.split_to(whole).freeze();
        frame.advance(FRAME_HEADER_BYTES);
        Ok(Some(match kind {
            Kind::Hello => Frame::Hello(frame),
            Kind::Refuse => Frame::Refuse(frame),
            Kind::Control => Frame::Control(frame),
            Kind::Data => Frame::Data(DataFrame::parse(frame)?),
        }))
    }

    fn decode_eof(&mut self, source: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        match self.decode(source)? {
            None if !source.is_empty() => Err(FrameError::Truncated),
            frame => Ok(frame),
        }
    }
}

impl DataFrame {
    /// `payload` is at least a header and a byte long.
    fn parse(mut payload: Bytes) -> Result<Self, FrameError> {
        let offset = payload.get_u64_le();
        let length = payload.get_u32_le() as usize;
        let encoding = payload.get_u8();
        let bad = FrameError::Data { length, encoding, body: payload.len() };
        let encoding = match encoding {
            0 if payload.len() == length => Encoding::Plain,
            1 if payload.len() < length => Encoding::Zstd,
            _ => return Err(bad),
        };
        if length > limits::MAX_BLOCK_BYTES || offset.checked_add(length as u64).is_none() {
            return Err(bad);
        }
        Ok(Self { offset, length, encoding, body: payload })
    }
}

/// Header and payload of a frame that is not a block.
pub fn encode_frame(kind: Kind, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(FRAME_HEADER_BYTES + payload.len());
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&[kind as u8]);
    frame.extend_from_slice(payload);
    frame.freeze()
}

/// Writes the headers of a data frame into the first [`DATA_PREFIX_BYTES`] of `frame`, whose rest is the encoded block.
///
/// The room is reserved by whoever fills the buffer, so that a block is copied nowhere between the pipe and TLS.
///
/// # Panics
/// If `frame` is shorter than the prefix: that is our own mistake, never a peer's.
pub fn write_data_prefix(frame: &mut [u8], offset: u64, length: usize, encoding: Encoding) {
    let payload = (frame.len() - FRAME_HEADER_BYTES) as u32;
    frame[..4].copy_from_slice(&payload.to_le_bytes());
    frame[4] = Kind::Data as u8;
    frame[5..13].copy_from_slice(&offset.to_le_bytes());
    frame[13..17].copy_from_slice(&(length as u32).to_le_bytes());
    frame[17] = encoding as u8;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn data(offset: u64, body: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; DATA_PREFIX_BYTES];
        frame.extend_from_slice(body);
        write_data_prefix(&mut frame, offset, body.len(), Encoding::Plain);
        frame
    }

    #[test]
    fn lengths_are_judged_before_the_payload_is_waited_for() {
        for (kind, length) in [(0u8, 0u32), (0, 1025), (2, 0), (2, 1 << 21), (3, 13), (3, u32::MAX), (2, u32::MAX)] {
            let mut bytes = BytesMut::from(&length.to_le_bytes()[..]);
            bytes.extend_from_slice(&[kind]);
            assert!(
                matches!(FrameDecoder.decode(&mut bytes), Err(FrameError::Length { .. })),
                "kind {kind} length {length}"
            );
        }
        let mut bytes = BytesMut::from(&[1, 0, 0, 0, 9][..]);
        assert!(matches!(FrameDecoder.decode(&mut bytes), Err(FrameError::UnknownKind(9))));
    }

    #[test]
    fn a_data_header_that_contradicts_itself_is_refused() {
        let good = data(7, b"abc");
        let tampered = |at: usize, to: u8| {
            let mut bytes = BytesMut::from(&good[..]);
            bytes[at] = to;
            FrameDecoder.decode(&mut bytes)
        };
        assert!(matches!(tampered(13, 4), Err(FrameError::Data { .. })), "plain block with a wrong length");
        assert!(matches!(tampered(17, 1), Err(FrameError::Data { .. })), "zstd that does not shrink");
        assert!(matches!(tampered(17, 2), Err(FrameError::Data { .. })), "unknown encoding");
        let mut overflowing = BytesMut::from(&data(u64::MAX - 1, b"abc")[..]);
        assert!(matches!(FrameDecoder.decode(&mut overflowing), Err(FrameError::Data { .. })));
    }

    #[test]
    fn an_end_in_the_middle_of_a_frame_is_no_clean_end() {
        let whole = data(0, b"abc");
        let mut part = BytesMut::from(&whole[..whole.len() - 1]);
        assert!(matches!(FrameDecoder.decode_eof(&mut part), Err(FrameError::Truncated)));
        assert!(matches!(FrameDecoder.decode_eof(&mut BytesMut::new()), Ok(None)));
    }

    proptest! {
        #[test]
        fn frames_come_out_as_they_went_in_however_the_bytes_arrive(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..300), 1..8),
            cuts in prop::collection::vec(1usize..50, 1..50),
        ) {
            let mut wire = Vec::new();
            let mut offset = 0;
            for block in &blocks {
                wire.extend_from_slice(&data(offset, block));
                wire.extend_from_slice(&encode_frame(Kind::Control, block));
                offset += block.len() as u64;
            }
            let mut source = BytesMut::new();
            let mut frames = Vec::new();
            let mut rest = &wire[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                source.extend_from_slice(now);
                rest = later;
                while let Some(frame) = FrameDecoder.decode(&mut source).unwrap() {
                    frames.push(frame);
                }
                if rest.is_empty() { break; }
            }
            let mut expected = Vec::new();
            let mut offset = 0;
            for block in &blocks {
                let body = Bytes::from(block.clone());
                expected.push(Frame::Data(DataFrame { offset, length: block.len(), encoding: Encoding::Plain, body: body.clone() }));
                expected.push(Frame::Control(body));
                offset += block.len() as u64;
            }
            prop_assert_eq!(frames, expected);
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut source = BytesMut::from(&bytes[..]);
            while let Ok(Some(_)) = FrameDecoder.decode(&mut source) {}
        }
    }
}
