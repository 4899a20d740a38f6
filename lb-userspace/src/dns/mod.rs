//! The DNS server: `NAME.service` is answered from the table, every other name is forwarded.
//!
//! `answer` decides, without I/O; `forward` carries questions to other resolvers; `server` stands
//! between them and hickory's sockets. Nothing here waits for the source of discovery: what isn't
//! known yet is SERVFAIL, at once.

mod answer;
mod exchange;
mod forward;
mod resolv_conf;
mod server;
mod sockets;
mod stats;
mod suffix;
mod upstreams;

#[cfg(test)]
mod tests;

pub use server::Server;
pub use sockets::{DnsError, Sockets, Transport, bind};
pub use stats::Stats;
