//! The agent on the head node.
#![allow(dead_code)]

mod create;

fn main() {}
