//! The DNS server: `NAME.service` is answered from the table, every other name is forwarded.
//!
//! `message` reads a question, `answer` decides and `reply` writes, all without I/O and without
//! allocating; `relay` has the questions for other resolvers, without I/O either; a `worker` for each
//! UDP socket receives, has them do their work and sends; `server` starts and stops all, `tcp` serves
//! connections. Nothing here waits for the source of discovery, but for a
//! moment where it follows services as they are used: what isn't known yet is SERVFAIL, at once.

mod acl;
mod bind;
mod connections;
mod debug_query;
mod domain;
mod encode;
mod forward;
pub mod fuzzing;
mod handler;
mod interfaces;
mod loop_detection;
mod mailbox;
mod message;
mod origin;

mod probe;
mod random;
mod relay;
mod resolv_conf;
mod resolve;
mod response;
mod reverse;
mod server;
mod socket_activation;
mod socket_pool;
mod sockets;
mod stats;
mod tcp;
mod tls;
mod udp;
mod upstream;
mod upstream_query;
mod upstreams;
mod usage_limiter;
mod worker;

#[cfg(test)]
mod answers;
#[cfg(test)]
mod tests;

pub use bind::{DnsError, bind, try_bind, try_bind_tls};
pub use debug_query::{DebugClient, DebugQueryError, ask};
pub use origin::AnswerOrigin;
pub use server::DnsServer;
pub use sockets::{Sockets, Transport};
pub use stats::DnsStats;
pub use tls::server_config as tls_server_config;
pub use upstream::{BUCKETS_US, UpstreamState, UpstreamStats};
