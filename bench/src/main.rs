//! The harness, which `cargo xtask bench` starts.
#![forbid(unsafe_code)]

fn main() {}
