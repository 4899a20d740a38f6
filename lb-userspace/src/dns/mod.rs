//! The DNS server: `NAME.service` is answered from the table, every other name is forwarded.
//!
//! `message` reads a question, `answer` decides and `reply` writes, all without I/O and without
//! allocating; `relay` has the questions for other resolvers, without I/O either; a `worker` for each
//! UDP socket receives, has them do their work and sends; `server` starts and stops all, `tcp` serves
//! connections. Nothing here waits for the source of discovery, but for a
//! moment where it follows services as they are used: what isn't known yet is SERVFAIL, at once.

mod resolve;
mod acl;
mod upstream_query;
mod forward;
pub mod fuzzing;
mod handler;
mod interfaces;
mod debug_query;
mod loop_detection;
mod mailbox;
mod message;
mod origin;
mod socket_activation;
mod ports;
mod probe;
mod random;
mod response;
mod relay;
mod encode;
mod resolv_conf;
mod reverse;
mod server;
mod sockets;
mod stats;
mod domain;
mod tcp;
mod usage_limiter;
mod udp;
mod upstream;
mod upstreams;
mod worker;

#[cfg(test)]
mod answers;
#[cfg(test)]
mod tests;

pub use debug_query::{Inquirer, LookupError, ask};
pub use origin::Origin;
pub use server::Server;
pub use sockets::{DnsError, Sockets, Transport, bind, try_bind};
pub use stats::Stats;
pub use upstream::{BUCKETS_US, Reading, State};
