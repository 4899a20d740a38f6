//! The suites.

pub mod change;
pub mod check;
pub mod connect;
pub mod dns;
pub mod edge;
pub mod failure;
pub mod http;
pub mod scale;
pub(crate) mod site;
pub mod throughput;
pub mod udp;

use anyhow::Result;

use crate::report_builder::Draft;

/// A suite.
#[derive(Clone, Copy, Debug)]
pub struct Suite {
    /// Its name on the command line.
    pub name: &'static str,
    /// The programs that it can't do without.
    pub programs: &'static [&'static str],
    /// Measures; its argument is whether quickly.
    pub run: fn(bool) -> Result<Draft>,
}

/// All of them, in the order in which they run.
pub const SUITES: [Suite; 10] = [
    Suite { name: "check", programs: &["wrk", "nginx"], run: check::run },
    Suite { name: "http", programs: &["wrk", "nginx"], run: http::run },
    Suite { name: "throughput", programs: &["iperf3"], run: throughput::run },
    Suite { name: "connect", programs: &["bpftool"], run: connect::run },
    Suite { name: "udp", programs: &[], run: udp::run },
    Suite { name: "change", programs: &["haproxy"], run: change::run },
    Suite { name: "scale", programs: &["bpftool"], run: scale::run },
    Suite {
        name: "dns",
        programs: &["dnsperf", "dnsmasq", "dig", "taskset", "unbound"],
        run: dns::run,
    },
    Suite { name: "failure", programs: &["nft"], run: failure::run },
    Suite {
        name: "edge",
        programs: &["chrt", "ethtool", "haproxy", "nft", "nginx", "wrk"],
        run: edge::run,
    },
];

/// Parts of them, which run where they are named.
pub const PARTS: [Suite; 2] = [
    Suite {
        name: "edge-flood",
        programs: &["chrt", "ethtool", "haproxy", "nft", "nginx"],
        run: edge::run_flood,
    },
    Suite { name: "edge-clients", programs: &["nginx", "wrk"], run: edge::run_clients },
];
