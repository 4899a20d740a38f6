//! The quantities of a comparison, and their samples.

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::Serialize;

use crate::format;
use crate::report::Better;
use crate::stats::Spread;

/// The number of turns within a round, in which the binaries alternate; together they go through all
/// services.
pub const N_TURNS: usize = 4;

/// A part of the comparison, named after the suite that measures the same of nohop alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// Start, first sync, one change, memory
    Scale,
    /// connect() to a VIP, and the connect hook
    Connect,
    /// Datagrams, and the hooks that they run
    Udp,
    /// Queries of the zone, and forwarded ones
    Dns,
}

/// A number of NEW and of OLD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Quantity {
    Ready,
    ReadyCpu,
    FirstSync,
    Change,
    Resident,
    Maps,
    ConnectFew,
    ConnectMany,
    HitFew,
    HitMany,
    Miss,
    RoundTrip,
    HookSend,
    HookReceive,
    ZoneRate,
    ZoneCpu,
    ForwardedRate,
    ForwardedCpu,
    ForwardedP99,
}

impl Quantity {
    /// Its part, its unit, its name (`MANY` stands for the number of services).
    pub fn describe(self) -> (Part, &'static str, &'static str) {
        match self {
            Quantity::Ready => (Part::Scale, "ms", "start until ready, MANY services"),
            Quantity::ReadyCpu => {
                (Part::Scale, "ms", "start until ready, MANY services, processor time")
            }
            Quantity::FirstSync => (Part::Scale, "ms", "first sync of MANY services into the maps"),
            Quantity::Change => (Part::Scale, "ms", "one change among MANY, rename to map"),
            Quantity::Resident => (Part::Scale, "MB", "resident memory, MANY services"),
            Quantity::Maps => (Part::Scale, "MB", "kernel memory of the maps, MANY services"),
            Quantity::ConnectFew => {
                (Part::Connect, "ns", "connect() to a VIP, 10 services in turn")
            }
            Quantity::ConnectMany => {
                (Part::Connect, "ns", "connect() to a VIP, MANY services in turn")
            }
            Quantity::HitFew => (Part::Connect, "ns", "connect hook, hit, 10 services in turn"),
            Quantity::HitMany => (Part::Connect, "ns", "connect hook, hit, MANY services in turn"),
            Quantity::Miss => (Part::Connect, "ns", "connect hook, miss, MANY services"),
            Quantity::RoundTrip => (Part::Udp, "us", "UDP round trip to a VIP, unconnected socket"),
            Quantity::HookSend => (Part::Udp, "ns", "sendmsg hook, a datagram to a VIP"),
            Quantity::HookReceive => (Part::Udp, "ns", "recvmsg hook, a datagram from a VIP"),
            Quantity::ZoneRate => (Part::Dns, "queries/s", "DNS, zone of MANY names"),
            Quantity::ZoneCpu => (Part::Dns, "us", "DNS, zone, processor time a query"),
            Quantity::ForwardedCpu => (Part::Dns, "us", "DNS, forwarded, processor time a query"),
            Quantity::ForwardedRate => (Part::Dns, "queries/s", "DNS, forwarded"),
            Quantity::ForwardedP99 => {
                (Part::Dns, "us", "DNS, forwarded, 99th percentile at 40% of the rate")
            }
        }
    }

    pub fn name(self, n_services: usize) -> String {
        self.describe().2.replace("MANY", &format::count(n_services as f64))
    }

    pub fn better(self) -> Better {
        match self {
            Quantity::ZoneRate | Quantity::ForwardedRate => Better::Higher,
            _ => Better::Lower,
        }
    }
}

/// One binary's numbers in one round, by turn.
#[derive(Debug, Default)]
pub struct Samples {
    /// The present turn, below [`N_TURNS`].
    pub turn: usize,
    by_quantity: BTreeMap<Quantity, [Option<f64>; N_TURNS]>,
}

impl Samples {
    /// Adds a number in the present turn.
    pub fn add(&mut self, quantity: Quantity, value: f64) {
        self.by_quantity.entry(quantity).or_default()[self.turn] = Some(value);
    }

    pub fn turns(&self, quantity: Quantity) -> [Option<f64>; N_TURNS] {
        self.by_quantity.get(&quantity).copied().unwrap_or_default()
    }

    /// The median of the turns; `None` where there is none.
    pub fn median(&self, quantity: Quantity) -> Option<f64> {
        Some(Spread::of(self.turns(quantity).into_iter().flatten())?.median)
    }
}
