//! Shared by the tests of the kernel object and the benchmarks of nohop alone.
#![deny(unsafe_code)]
#![expect(
    missing_docs,
    clippy::new_without_default,
    clippy::unwrap_used,
    reason = "a fixture: a failure fails its test"
)]

pub mod fixture;
pub mod prog_run;
