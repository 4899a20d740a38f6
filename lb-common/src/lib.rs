//! What both sides of nohop share: the layout of the maps, what a socket remembers, and the verdict
//! on a connection.
//!
//! Everything here is plain data and plain functions. It is tested on the host and compiled,
//! unchanged, into the kernel object.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(any(test, fuzzing))]
extern crate std;

mod address;
mod decide;
mod flows;
mod layout;
mod select;

pub use address::Address;
pub use decide::*;
pub use flows::*;
pub use layout::*;
pub use select::select;
