//! What both sides of nohop share: the layout of the maps, what a socket remembers, and the choice
//! of a backend.
//!
//! Everything here is plain data and plain functions. It is tested on the host and compiled,
//! unchanged, into the kernel object.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

mod address;
mod choice;
mod flows;
mod layout;

pub use address::Address;
pub use choice::choose;
pub use flows::*;
pub use layout::*;
