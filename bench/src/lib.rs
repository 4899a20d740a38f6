//! The benchmark harness: nohop side by side with everything that it replaces.
#![forbid(unsafe_code)]

pub mod machine;
pub mod markdown;
pub mod number;
pub mod report;
pub mod stats;
pub mod svg;
pub mod terminal;
pub mod write;

#[cfg(test)]
mod sample;
