//! The DNS server: it answers `NAME.service` from the table and forwards every other name.
//!
//! `message` parses a query, `resolve` decides and `encode` writes the response, all without I/O
//! and without allocating; `relay` holds the queries for upstreams, also without I/O; a `worker`
//! per UDP socket receives, calls these and sends; `server` starts and stops all of it, `tcp` and
//! `tls` serve connections. Nothing here waits for the source of discovery, except for a moment
//! where services are followed as they are used: what isn't known yet is SERVFAIL at once.

mod acl;
mod bind;
mod connections;
mod debug_query;
mod domain;
mod encode;
mod forward;
pub mod fuzzing;
mod handler;
mod loop_detection;
mod mailbox;
mod message;
mod origin;
mod probe;
mod query_log;
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
mod tests;

pub use acl::allowed_networks;
pub use bind::{DnsError, bind, try_bind, try_bind_tls};
pub use debug_query::{DebugClient, DebugQueryError, ask, check_question};
pub use origin::AnswerOrigin;
pub use resolv_conf::{is_stub, nameservers};
pub use server::DnsServer;
pub use sockets::{Sockets, Transport};
pub use stats::DnsStats;
pub use tls::server_config as tls_server_config;
pub use upstream::{BUCKETS_US, UpstreamState, UpstreamStats};
pub use upstreams::{leads_to_own, reached_at, upstream_problems};
