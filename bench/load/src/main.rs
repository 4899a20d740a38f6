//! Load for the benchmarks where no existing tool fits, and the servers for it.
#![forbid(unsafe_code)]

fn main() {}
