//! The edge: packets of outside clients to public VIPs are sent to backends by translation of both
//! addresses. Plain functions on the first bytes of packets, and the records of flows.

mod cache;
mod checksum;
mod client;
mod error;
mod flow;
mod header;
mod hop;
mod packet;
mod plain;
mod reset;
mod syn;
mod translate;

pub use cache::*;
pub use checksum::{adjusted, folded};
pub use client::*;
pub use error::*;
pub use flow::*;
pub use hop::*;
pub use packet::*;
pub use plain::*;
pub use reset::*;
pub use syn::*;
pub use translate::*;

#[cfg(any(test, fuzzing))]
pub mod reference;

#[cfg(test)]
mod tests;
