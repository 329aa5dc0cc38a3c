//! Every limit of the protocol, with its reason. They are checked before anything is allocated or sliced.

use std::time::Duration;

/// Stream bytes in a block, before compression: large enough that a system call and a TLS record a block do not count, small
/// enough that the handful in flight on each side stay a few MiB.
pub const MAX_BLOCK_BYTES: usize = 256 << 10;

/// Payload of a data frame: header and block. A block that compression would make larger is sent plain.
pub const MAX_DATA_FRAME_BYTES: usize = super::codec::DATA_HEADER_BYTES + MAX_BLOCK_BYTES;

/// Payload of a control message. The largest is an inventory: some 150 bytes a snapshot, so thousands of snapshots.
pub const MAX_CONTROL_BYTES: usize = 1 << 20;

/// Payload of Hello and Refuse: two short texts each.
pub const MAX_GREETING_BYTES: usize = 1 << 10;

/// A text in Hello or Refuse.
pub const MAX_GREETING_TEXT_BYTES: usize = 255;

/// A reason in a control message, cut to this by whoever says it: it lands in a log line on the other side.
pub const MAX_REASON_BYTES: usize = 4 << 10;

/// Silence after which a side says that it is alive.
pub const KEEP_ALIVE: Duration = Duration::from_secs(8);

/// Silence after which the other side is given up: three keep-alives missed, and within the 30 s in which a half-open
/// connection must be found.
pub const MAX_SILENCE: Duration = Duration::from_secs(26);

/// From the accepted connection to the end of the greeting: strangers do not hold a place for longer.
pub const MAX_GREETING_TIME: Duration = Duration::from_secs(10);
