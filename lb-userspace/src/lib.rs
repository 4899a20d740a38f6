//! The nohop daemon and its command line, by part. ARCHITECTURE.md shows how they fit together.
#![deny(unsafe_code)]

pub mod admin;
mod boot;
mod capabilities;
pub mod catalog;
mod causes;
pub mod cli;
pub mod config;
mod counted;
pub mod daemon;
pub mod datapath;
pub mod dns;
mod dns_name;
mod durable;
mod file_lock;
mod file_state;
#[cfg(any(fuzzing, test))]
pub mod fuzzing;
mod interfaces;
mod logging;
pub mod ordmap;
mod regular_file;
pub mod table;
mod terminal;
