//! A cluster on one machine: network namespaces as hosts, cgroups as scopes, a real Consul.
//!
//! Everything that is made is undone when its guard is dropped, and also when the run is
//! interrupted (`cleanup`).
#![forbid(unsafe_code)]

use std::time::Duration;

pub mod bpffs;
pub mod capture;
pub mod cgroup;
pub mod chromium;
pub mod cleanup;
pub mod cmd;
pub mod consul;
pub mod helloworld;
pub mod http;
pub mod load;
pub mod net;
pub mod nohop;
pub mod picture;
pub mod process;
pub mod tempdir;
pub mod terminal;
pub mod tmpfs;
pub mod udp;

/// How long anything may take that a test waits for: many times what it takes on a busy machine with
/// two slow processors. Nothing that goes well waits for it to pass, and nothing measures speed by it.
pub const TIMEOUT: Duration = Duration::from_secs(300);
