//! What both agents share, and the protocol between them.
//!
//! Pure modules (`snapshot`, `retention`, `stream`, `wire`, `size`, `progress`) know no clock, no file system, no process and
//! no tokio. The others are leaves: each wraps one thing of the outside world and knows nothing of the wire.

pub mod btrfs;
pub mod bulk;
pub mod config;
pub mod crash;
pub mod deletion;
pub mod durable;
pub mod exit;
pub mod findings;
pub mod identity;
pub mod link;
pub mod lock;
pub mod log;
pub mod progress;
pub mod retention;
pub mod signals;
pub mod size;
pub mod snapshot;
pub mod stall;
pub mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod thread;
pub mod tls;
pub mod wire;
