//! What the tests of the kernel object and the benchmarks of nohop alone stand on.
#![forbid(unsafe_code)]
#![expect(
    missing_docs,
    clippy::new_without_default,
    clippy::unwrap_used,
    reason = "a fixture: what can't go on fails its test"
)]

pub mod fixture;
