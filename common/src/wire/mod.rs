//! The protocol between the agents, without sockets: frames (`codec`), what they may be (`limits`), what they say (`message`).
//!
//! ```text
//! sender                                             receiver
//! Hello{protocol, role, agent}                ->     Hello | Refuse
//! Query{volume}                               ->     Inventory{snapshots, unfinished, stream version}
//! Offer{snapshot, base, root times, ...}      ->     Accept{from} | Have | Refused{why}
//! Total{bytes, files}                         ->     as soon as it is known
//! Data...                                     ->     Ack{received, applied, durable} ...
//! End{bytes, digests}                         ->     Verified, Published | Arrived{pinned} | Failed{stage, reason}
//! ```
//! `Abort{reason}` may come from either side at any time: a read error at the source is an Abort, never an end of data.
//! `KeepAlive` flows both ways. After `Published` or `Arrived` the sender may offer the next snapshot or leave.

pub mod codec;
pub mod limits;
pub mod message;
