//! What the unit is configured to do.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

/// The unit's name.
pub const UNIT: &str = "edge";

/// What an edge does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeOptions {
    /// The interfaces by which clients and backends send their packets here.
    pub interfaces: Vec<String>,
    /// The networks that public VIPs may come from, at most four.
    pub networks: Vec<IpNet>,
    /// This host's addresses from which packets go to backends, at most four of each address family.
    pub sources: Vec<IpAddr>,
    /// How many flows there are room for.
    pub max_flows: u32,
    /// After how long without a packet flows end.
    pub timeouts: EdgeTimeouts,
    /// The services whose backends are shown clients' addresses, by IPv4 and TCP.
    pub client_address: Vec<String>,
}

/// After how long without a packet a flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeTimeouts {
    /// An established TCP connection.
    pub established: Duration,
    /// One that one side has closed.
    pub half_closed: Duration,
    /// One that both have closed or that was reset, and one that isn't established yet. Where room is short, it
    /// is over as soon as another flow needs its place.
    pub closed: Duration,
    /// UDP.
    pub udp: Duration,
}

impl Default for EdgeTimeouts {
    fn default() -> EdgeTimeouts {
        EdgeTimeouts {
            established: Duration::from_secs(3_600),
            half_closed: Duration::from_secs(120),
            closed: Duration::from_secs(60),
            udp: Duration::from_secs(60),
        }
    }
}
