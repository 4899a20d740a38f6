//! The benchmark harness: nohop side by side with everything that it replaces.
#![forbid(unsafe_code)]

mod bpf;
pub mod compare;
pub mod draft;
pub mod machine;
pub mod markdown;
pub mod node;
pub mod number;
pub mod peers;
pub mod progress;
pub mod random;
pub mod report;
pub mod stats;
pub mod suites;
pub mod svg;
pub mod terminal;
pub mod tools;
pub mod write;

#[cfg(test)]
mod sample;
