//! What both sides of nohop share: the layout of the maps, and the choice of a backend.
//!
//! Everything here is plain data and plain functions. It is tested on the host and compiled,
//! unchanged, into the kernel object.
#![no_std]
#![forbid(unsafe_code)]

mod choice;
mod layout;

pub use choice::choose;
pub use layout::*;
