//! The benchmark harness: nohop side by side with everything that it replaces.
#![forbid(unsafe_code)]

mod bpf;
pub mod compare;
pub mod report_builder;
pub mod machine;
pub mod markdown;
pub mod node;
pub mod format;
pub mod peers;
pub mod progress;
pub mod random;
pub mod report;
pub mod stats;
pub mod suites;
pub mod svg;
pub mod console;
pub mod generators;
pub mod output;

#[cfg(test)]
mod sample;
