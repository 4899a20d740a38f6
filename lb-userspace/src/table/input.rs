//! What a source of discovery reports, before the table validates it.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ServiceMeta;
use crate::ordmap::OrdMap;

/// All that the sources report: each service's record.
///
/// It has services whose instances are all unfit, and none that isn't tagged any more.
pub type Catalog = OrdMap<ServiceId, ServiceRecord>;

/// Which service a source reports: the identity that stays while everything else about it changes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServiceId {
    /// The name, as registered.
    pub name: Arc<str>,
    /// The tag that its instances have to have; `None` for all instances of the name.
    pub subset: Option<Arc<str>>,
    /// The datacenter or namespace that it is of; `None` for what a source asks about by itself.
    pub origin: Option<Arc<str>>,
}

impl ServiceId {
    /// The service of this name, with all its instances.
    pub fn new(name: impl Into<Arc<str>>) -> ServiceId {
        ServiceId { name: name.into(), subset: None, origin: None }
    }

    /// [`ServiceId::dns_name`] in lower case: DNS ignores the case of letters (RFC 4343).
    pub fn folded_name(&self) -> Arc<str> {
        let name = self.dns_name();
        match name.bytes().any(|octet| octet.is_ascii_uppercase()) {
            true => name.to_ascii_lowercase().into(),
            false => name,
        }
    }

    /// The name below the domain that stands for it: `NAME`, `SUBSET.NAME` or `NAME.ORIGIN`.
    pub fn dns_name(&self) -> Arc<str> {
        let labels = [self.subset.as_ref(), Some(&self.name), self.origin.as_ref()];
        let labels: Vec<&str> = labels.into_iter().flatten().map(|label| &**label).collect();
        match labels[..] {
            [_] => self.name.clone(),
            _ => labels.join(".").into(),
        }
    }
}

#[cfg(test)]
impl std::ops::Index<&str> for Catalog {
    type Output = ServiceRecord;

    fn index(&self, name: &str) -> &ServiceRecord {
        self.get(&ServiceId::new(name)).expect("a service of this name")
    }
}

/// A source's record of one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceRecord {
    /// Its instances in groups, in the order of use; at least one group.
    pub groups: Arc<[InstanceGroup]>,
    /// Whether the source follows them.
    pub watch: Watch,
}

/// The instances of a service in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceGroup {
    /// The datacenter or namespace; `None` for what a source asks about by itself.
    pub origin: Option<Arc<str>>,
    /// The instances, fit or not. Unchanged ones are the same allocation from one catalog to the next.
    pub instances: Arc<[Instance]>,
}

impl ServiceRecord {
    /// A service with these instances in its one group.
    pub fn new(instances: Arc<[Instance]>, watch: Watch) -> ServiceRecord {
        ServiceRecord { groups: [InstanceGroup { origin: None, instances }].into(), watch }
    }

    /// The instances of all groups, in their order.
    pub fn instances(&self) -> impl Iterator<Item = &Instance> + Clone {
        self.groups.iter().flat_map(|group| group.instances.iter())
    }
}

/// Whether a source follows the instances of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Watch {
    /// Every change arrives.
    #[default]
    Live,
    /// It wasn't used here lately, so its record may be old or empty: a lookup or a connection makes it
    /// live.
    Cold,
}

/// One instance of a service, as its source reports it.
///
/// The values are unchecked: the table decides what can be routed to, in one place for all sources.
/// Where a field's name differs from its key in `catalog.json`, the key is that of earlier versions.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Instance {
    /// The node that the instance runs on; empty where the source knows of no nodes.
    pub node: String,
    /// The instance's name, unique within its node.
    pub id: String,
    /// An address, as text: IPv4, IPv6, a host name, or empty.
    pub address: String,
    /// The port; 1..=65535 is routable.
    pub port: i64,
    /// The weight, 1 by default.
    pub weight: i64,
    /// Whether the instance runs on this node, so that its loopback address is this host's.
    pub local: bool,
    /// Distinguishes its node from others of the same name.
    #[serde(default, rename = "home")]
    pub node_identity: NodeIdentity,
    /// Its node's own address, where it is known: where that is on a bridge of this host, so is the
    /// instance.
    #[serde(default)]
    pub node_address: Option<IpAddr>,
    /// Whether it may run on this node, though that isn't certain enough for its loopback address.
    #[serde(default)]
    pub may_be_local: bool,
    /// Whether something vouches for its health: a check of its own, or the author of a file. Of others
    /// nothing is known but that they are registered.
    #[serde(default = "is_checked", skip_serializing_if = "bool::clone")]
    pub is_checked: bool,
    /// Whether nothing but its checks takes it out, by being critical.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_critical: bool,
    /// Whether the source's own rules let it serve.
    #[serde(rename = "standing")]
    pub health: HealthStatus,
    /// When it was registered where it declares a public address: a number that is smaller for an older
    /// registration of the same source, by Consul its `CreateIndex`; 0 where that isn't known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub created: u64,
    /// Its declarations about the service as a whole.
    #[serde(rename = "says")]
    pub meta: ServiceMeta,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The default of an instance that an earlier version saved.
fn is_checked() -> bool {
    true
}

/// Distinguishes nodes of one name: checksums of the node's id, its datacenter and its admin
/// partition, since the texts would take more memory than the rest of an instance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeIdentity {
    /// 0 where it isn't known.
    id: u32,
    /// 0 where it isn't known.
    datacenter: u32,
    /// 0 for the default one.
    partition: u32,
}

impl NodeIdentity {
    /// That of a node; empty texts aren't known, and the empty partition is the default one.
    pub fn new(id: &str, datacenter: &str, partition: &str) -> NodeIdentity {
        let sum = |text: &str| match text {
            "" => 0,
            text => crc32fast::hash(text.to_ascii_lowercase().as_bytes()).max(1),
        };
        let partition = if partition.eq_ignore_ascii_case("default") { "" } else { partition };
        NodeIdentity { id: sum(id), datacenter: sum(datacenter), partition: sum(partition) }
    }

    /// Whether both can be the same node, where their names are the same.
    pub fn agrees_with(self, other: NodeIdentity) -> bool {
        let agrees = |one: u32, other: u32| one == other || one == 0 || other == 0;
        agrees(self.id, other.id)
            && agrees(self.datacenter, other.datacenter)
            && self.partition == other.partition
    }
}

impl Instance {
    /// The address, where it is one rather than a name, as [`parse_ip`] reads it.
    pub fn ip(&self) -> Option<IpAddr> {
        parse_ip(&self.address)
    }

    /// Its address and port for people, as the source has them.
    pub fn shown_address(&self) -> String {
        match self.address.contains(':') && !self.address.starts_with('[') {
            true => format!("[{}]:{}", self.address, self.port),
            false => format!("{}:{}", self.address, self.port),
        }
    }
}

#[cfg(test)]
impl Instance {
    /// One that serves at `10.0.0.1:80`, for tests, which set what matters to them.
    pub fn fixture() -> Instance {
        Instance {
            node: "n1".into(),
            id: "web-1".into(),
            address: "10.0.0.1".into(),
            port: 80,
            weight: 1,
            local: false,
            node_identity: NodeIdentity::default(),
            node_address: None,
            may_be_local: false,
            is_checked: true,
            is_critical: false,
            created: 0,
            health: HealthStatus::Serving,
            meta: ServiceMeta::default(),
        }
    }
}

/// An IP address in a text: IPv4, or IPv6 with brackets or without. An IPv4-mapped one is the IPv4
/// address that it stands for; a zone is dropped, since it means something on its own node alone.
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    let bracketed = text.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    let without_zone = |text: &str| text.split('%').next().and_then(|ip| ip.parse().ok());
    let address = match (bracketed, text.parse()) {
        (None, Ok(IpAddr::V4(address))) => IpAddr::V4(address),
        (bracketed, _) => IpAddr::V6(without_zone(bracketed.unwrap_or(text))?),
    };
    Some(address.to_canonical())
}

/// Whether an instance may serve, by the rules of its source.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum HealthStatus {
    /// It may serve.
    Serving,
    /// It may serve, with the weight that it has for this (such as ``check `web` is warning``).
    Warning(String),
    /// It may serve where no other may, with the weight that it has for this (such as ``check `web` is
    /// warning``).
    Spare(String),
    /// It may not, for this reason (such as ``check `web` is critical``).
    Out(String),
}

impl HealthStatus {
    /// Whether it may serve, if only where no other may.
    pub fn serves(&self) -> bool {
        !matches!(self, HealthStatus::Out(_))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_services_identity_has_a_dns_name() {
        let (web, some) = (ServiceId::new("Web"), |label: &str| Some(Arc::from(label)));
        for (id, name) in [
            (web.clone(), "Web"),
            (ServiceId { subset: some("v2"), ..web.clone() }, "v2.Web"),
            (ServiceId { origin: some("dc2"), ..web.clone() }, "Web.dc2"),
        ] {
            assert_eq!(&*id.dns_name(), name);
        }
    }

    #[test]
    fn nodes_of_one_name_are_told_apart_by_what_both_say() {
        let here = NodeIdentity::new("9D75-1", "dc1", "");
        // (id, datacenter, partition, whether it can be the same node)
        for (id, datacenter, partition, expected) in [
            ("9d75-1", "dc1", "", true),
            ("9d75-1", "dc1", "default", true),
            ("", "", "", true),
            ("", "dc1", "", true),
            ("9d75-1", "", "", true),
            ("9d75-2", "dc1", "", false),
            ("9d75-1", "dc2", "", false),
            ("", "dc2", "", false),
            ("9d75-1", "dc1", "team", false),
            ("", "", "team", false),
        ] {
            let other = NodeIdentity::new(id, datacenter, partition);
            assert_eq!(here.agrees_with(other), expected, "{id} {datacenter} {partition}");
            assert_eq!(other.agrees_with(here), expected, "{id} {datacenter} {partition}");
        }
    }
}
