//! What both agents share, and the protocol between them.
//!
//! Pure modules (`snapshot`, `retention`, `stream`, `wire`, `size`, `progress`) know no clock, no file system, no process and
//! no tokio. The others are leaves: each wraps one thing of the outside world and knows nothing of the wire.

pub mod config;
pub mod durable;
pub mod exit;
pub mod findings;
pub mod btrfs;
pub mod crash;
pub mod link;
pub mod lock;
pub mod log;
pub mod progress;
pub mod signals;
pub mod identity;
pub mod size;
pub mod retention;
pub mod snapshot;
pub mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod tls;
pub mod wire;
