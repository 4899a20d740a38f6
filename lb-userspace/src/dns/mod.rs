//! The DNS server: `NAME.service` is answered from the table, every other name is forwarded.
//!
//! `message` reads a question, `answer` decides and `reply` writes, all without I/O and without
//! allocating; `forward` carries questions to other resolvers; `server` stands between them and the
//! sockets, which `udp` and `tcp` serve. Nothing here waits for the source of discovery, but for a
//! moment where it follows services as they are used: what isn't known yet is SERVFAIL, at once.

mod answer;
mod clients;
mod exchange;
mod forward;
pub mod fuzzing;
mod health;
mod lookup;
mod loops;
mod message;
mod passed;
mod received;
mod reply;
mod resolv_conf;
mod reverse;
mod same;
mod server;
mod sockets;
mod stats;
mod suffix;
mod tcp;
mod told;
mod udp;
mod upstreams;

#[cfg(test)]
mod answers;
#[cfg(test)]
mod tests;

pub use lookup::{Inquirer, LookupError, Origin, ask};
pub use server::Server;
pub use sockets::{DnsError, Sockets, Transport, bind, try_bind};
pub use stats::Stats;
