//! The benchmark harness: nohop side by side with everything that it replaces.
#![forbid(unsafe_code)]

mod bpf;
pub mod compare;
pub mod format;
pub mod generators;
pub mod machine;
pub mod markdown;
mod napi;
pub mod node;
pub mod output;
pub mod peers;
pub(crate) mod pin;
pub mod progress;
pub mod random;
pub mod report;
pub mod report_builder;
pub mod simulate;
pub mod stats;
pub mod suites;
pub mod svg;
pub mod traffic;

#[cfg(test)]
mod tests {
    pub mod sample;
}
