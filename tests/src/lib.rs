//! The system tests' harness: two hosts with real btrfs file systems, a network between them, and the two real agents.
//!
//! The tests see the agents as an operator does: command line, configuration, log, exit code, and what is on the disks. So
//! nothing in here uses the agents' own code to look at the result: what is checked is checked by other means.
//!
//! | module | what |
//! |---|---|
//! | [`lab`] | the scratch directory that owns everything a test makes, and takes it away again |
//! | [`host`] | a host: a network namespace; what runs in it |
//! | [`btrfs`] | subvolumes and snapshots, through the `btrfs` program |
//! | [`agent`], [`event`] | an agent as a child process, and its log |
//! | [`programs`] | where the two programs are; makes sure that they are fresh |
//! | [`config`], [`pki`] | configuration files and certificates |
//! | [`pair`] | all of this put together: a head node and a mirror box, ready to go |
//! | [`tree`], [`change`], [`nar`] | data: every kind of file there is; changes to it; the cache of a build farm |
//! | [`manifest`] | what is in a tree, down to the last attribute, and how two trees differ |
//! | [`rsync`] | a real client |

// A harness that cannot do its work panics and says why: that is a failed test.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)]

pub mod agent;
pub mod btrfs;
pub mod change;
pub mod clock;
pub mod config;
pub mod event;
pub mod host;
pub mod lab;
pub mod link;
pub mod manifest;
pub mod measure;
pub mod nar;
pub mod pair;
pub mod pki;
pub mod programs;
pub mod rsync;
pub mod suite;
pub mod tree;
pub mod trial;
pub mod wait;
pub mod watch;
