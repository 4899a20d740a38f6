//! What both sides of nohop share: the layout of the maps, what a socket remembers, and the verdict
//! on a connection.
//!
//! Everything here is plain data and plain functions. It is tested on the host and compiled,
//! unchanged, into the kernel object, but for what builds tables, which only the daemon does.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(not(target_arch = "bpf"))]
extern crate std;

mod address;
mod algorithm;
#[cfg(not(target_arch = "bpf"))]
mod alias;
mod choose;
mod decide;
mod edge;
mod ejection;
mod flows;
mod index;
mod intercept;
mod layout;
mod maglev;
mod names;
mod select;
mod trace;

pub use address::Address;
pub use algorithm::*;
#[cfg(not(target_arch = "bpf"))]
pub use alias::alias_table;
pub use choose::*;
pub use decide::*;
pub use edge::*;
pub use ejection::*;
pub use flows::*;
pub use index::*;
pub use intercept::*;
pub use layout::*;
use maglev::mix;
pub use maglev::*;
pub use names::*;
pub use select::{select, side};
pub use trace::*;
