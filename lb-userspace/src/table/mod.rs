//! The table: the desired state, one immutable snapshot that every part reads.
//!
//! It knows neither Consul nor maps nor DNS. [`Builder`] turns a catalog into the next table: it
//! validates each instance, gives each name its VIP, and shares what didn't change with the table
//! before. Observations of a service (errors, ejections) are kept apart from the table.

mod build;
mod drains;
mod endpoints;
#[cfg(test)]
mod example;
pub mod first_contact;
mod index;
mod input;
mod instance_name;
pub mod keep;
mod merge;
mod ports;
mod public;
mod resolved_hosts;
mod validate;
pub mod vips;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::config::BalanceAlgorithm;
use crate::ordmap::OrdMap;

pub use build::{Builder, NextTable, SharedWaits, Waits};
pub use drains::{
    DRAIN_KINDS, Drain, DrainCatalog, DrainError, DrainTarget, Drains, EDGE, check_target,
    resolve_drained,
};
pub use index::CatalogIndex;
pub use input::{
    Catalog, HealthStatus, Instance, InstanceGroup, NodeIdentity, ServiceId, ServiceRecord, Watch,
    parse_ip,
};
pub use instance_name::{allocation, display_name, is_uuid, short_allocation, with_display_names};
pub use merge::ServiceMeta;
pub use ports::{Ports, Protocols};
pub use public::PublicAddresses;
pub use resolved_hosts::{Bridge, Host, Hosts};
pub use validate::{catalog_problems, check_name, may_be_reached};

/// One state of the world, as this node should present it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// The table's number: 0 before the first sync, then it grows with each change.
    pub generation: u64,
    /// The services, by the name that DNS answers (below the domain, in lower case).
    pub services: OrdMap<Arc<str>, Arc<Service>>,
    /// Names that the catalog has and that can't be had here, each with the reason.
    pub rejected: OrdMap<Arc<str>, Arc<str>>,
    /// The number of [`Service::healthy`] backends of all services. The builder keeps it with each change:
    /// to count them takes milliseconds among 16,384 services, and the status has it every second.
    pub n_healthy: usize,
}

impl Table {
    /// Adds a service, in the place of its former state.
    fn insert(&mut self, name: Arc<str>, service: Arc<Service>) {
        self.n_healthy += service.healthy().count();
        let former = self.services.insert(name, service);
        self.n_healthy -= former.map_or(0, |former| former.healthy().count());
    }

    /// Removes a service; returns whether there was one.
    fn remove(&mut self, name: &str) -> bool {
        let former = self.services.remove(name);
        self.n_healthy -= former.as_ref().map_or(0, |former| former.healthy().count());
        former.is_some()
    }

    /// Whether discovery has been complete once; before that, absence means nothing.
    pub fn is_synced(&self) -> bool {
        self.generation > 0
    }
}

/// A service that this node routes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// The name: a DNS label in lower case.
    pub name: Arc<str>,
    /// Its address on this node.
    pub vip: Ipv4Addr,
    /// Its IPv6 address on this node, where `vip.pool6` is set.
    pub vip6: Option<Ipv6Addr>,
    /// The ports it is connected to at.
    pub ports: Ports,
    /// The transport protocols it is connected to with.
    pub protocols: Protocols,
    /// How the backend of a connection is chosen.
    pub algorithm: BalanceAlgorithm,
    /// One more address, in the host's network namespace only.
    pub pin: Option<SocketAddrV4>,
    /// Its public addresses, sorted: an edge serves them to clients outside, and connections from this node
    /// to one of them go straight to a backend, from every network namespace. No other service has them.
    pub public: Vec<SocketAddr>,
    /// The instances that connects to may reach, ordered, and those that can't be reached from here.
    pub backends: Vec<Backend>,
    /// The instances that are out, each with the reason.
    pub excluded: Vec<Excluded>,
    /// Contradictions among its instances' declarations, a sentence each.
    pub notes: Vec<String>,
    /// Whether the source follows its instances.
    pub watch: Watch,
    /// The generation of the table that changed it last.
    pub generation: u64,
}

impl Service {
    /// Whether both are the same but for the generation.
    fn is_same(&self, other: &Service) -> bool {
        let Service { name, vip, vip6, ports, protocols, algorithm, pin, public, .. } = other;
        let Service { backends, excluded, notes, watch, generation: _, .. } = other;
        (&self.name, &self.vip, &self.vip6, &self.ports, &self.protocols)
            == (name, vip, vip6, ports, protocols)
            && (&self.algorithm, &self.pin, &self.public) == (algorithm, pin, public)
            && (&self.backends, &self.excluded, &self.notes, &self.watch)
                == (backends, excluded, notes, watch)
    }

    /// The IPv6 VIP, where a client can use it. Datagrams of a socket that isn't connected can't: the
    /// kernel sends none from an IPv6 address to an IPv4 backend (`udpv6_sendmsg` refuses what
    /// `BPF_CGROUP_UDP6_SENDMSG` maps). Clients that take the first address of a name, which is the
    /// IPv6 one by RFC 6724, would be refused though the IPv4 VIP serves them.
    pub fn answered_vip6(&self) -> Option<Ipv6Addr> {
        let has_udp = self.protocols != Protocols::Tcp;
        let is_ipv6 = |backend: &Backend| backend.address.is_some_and(|address| address.is_ipv6());
        self.vip6.filter(|_| !has_udp || self.healthy().any(is_ipv6))
    }

    /// The backends that connects to may reach, spare ones included.
    pub fn healthy(&self) -> impl Iterator<Item = &Backend> {
        self.backends.iter().filter(|backend| backend.state.is_reached())
    }
}

/// An instance that serves, as far as its source knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    /// Where connections go; `None` for an unroutable one.
    pub address: Option<SocketAddr>,
    /// The address as the source gave it, with the port.
    pub shown_address: String,
    /// The node it runs on; empty where the source knows of no nodes.
    pub node: String,
    /// The instance's name, unique within its node.
    pub id: String,
    /// Its share of new connections, relative to the service's other weights; 0 for none, which only a
    /// [`BackendState::Draining`] one has.
    pub weight: u16,
    /// Its state.
    pub state: BackendState,
    /// 0 where it is used first, as all but [`BackendState::Spare`] are; 1 or 2 where it is used when
    /// none of the groups before it is eligible.
    pub group: u8,
    /// Why it is in this state, where that isn't plain.
    pub reason: Option<String>,
    /// Whether its address is this host's loopback, so that only the host's network namespace can
    /// connect it.
    pub host_only: bool,
}

impl Backend {
    /// What makes it the same one from one table to the next.
    fn identity(&self) -> (Option<SocketAddr>, &str, &str) {
        (self.address, &self.node, &self.id)
    }
}

/// The state of a backend; the better one is less.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BackendState {
    /// It gets new connections.
    Healthy,
    /// It gets new connections, by the weight that it has while a check of its own warns.
    Warning,
    /// It gets new connections where none of the groups before its own ([`Backend::group`]) is eligible.
    Spare,
    /// It gets no new connections, and keeps those that it has: they are still counted, and sockets
    /// connected to it by UDP keep sending there. A part of the table that drains a backend sets this
    /// state and the reason, and leaves the rest as it is; the datapath keeps the backend's entry in the
    /// kernel, outside the groups that connections select from.
    Draining,
    /// No check vouches for it and no connection to it has succeeded yet: it gets none while others
    /// serve.
    Unproven,
    /// Its own failures keep connections of this node from it, for a time. What is observed isn't in a
    /// table: only a status has this state.
    Ejected,
    /// Its address means something else here, or nothing, so it gets none.
    Unroutable,
}

impl BackendState {
    /// Whether it gets new connections, if only as a spare.
    pub fn is_reached(self) -> bool {
        matches!(self, BackendState::Healthy | BackendState::Warning | BackendState::Spare)
    }

    /// Whether the kernel has an entry for it: what is reached, and what keeps its connections.
    pub fn has_entry(self) -> bool {
        self.is_reached() || self == BackendState::Draining
    }
}

/// An instance that gets no connections by its source's verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excluded {
    /// The address as the source gave it, with the port.
    pub address: String,
    /// The node it runs on.
    pub node: String,
    /// The instance's id, unique within its node.
    #[serde(rename = "instance")]
    pub id: String,
    /// Why it is out.
    pub reason: String,
}
