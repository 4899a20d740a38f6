//! Instances whose address is a host name: the resolved addresses, as data.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Instance;
use crate::dns_name;

/// The addresses of host names among the instances, and this host's bridges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    /// The names, as far as they are known. One that isn't in it was not looked up yet.
    pub names: BTreeMap<String, Host>,
    /// The bridges that only this host's own containers and machines are on.
    pub bridges: Vec<Bridge>,
}

/// The result of resolving a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// This address.
    At {
        /// The address.
        address: IpAddr,
        /// Whether the name has had other addresses. Their number isn't kept: many resolvers return a few
        /// of many at random, and a changing number would change the service.
        is_one_of_many: bool,
    },
    /// None, for this reason.
    Nowhere(String),
}

/// A network on a bridge of this host that no other host is on: the same addresses on another node
/// are other instances (Docker gives each host 172.17.0.0/16, Nomad 172.26.64.0/20).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bridge {
    /// The interface's name.
    pub name: String,
    /// The network.
    pub network: IpNet,
}

impl Hosts {
    /// The bridge whose network has this address.
    pub(super) fn bridge_around(&self, address: IpAddr) -> Option<&Bridge> {
        self.bridges.iter().find(|bridge| bridge.network.contains(&address))
    }

    /// Whether a node of this address is on that bridge, in any of its networks: a virtual machine
    /// or a container with an agent of its own.
    pub(super) fn is_on(&self, bridge: &Bridge, node: IpAddr) -> bool {
        let mut networks = self.bridges.iter().filter(|other| other.name == bridge.name);
        networks.any(|bridge| bridge.network.contains(&node))
    }

    /// Where the instance is and, where its address is a name, a note on that.
    ///
    /// # Errors
    /// Why it is nowhere, with the fix.
    pub(super) fn find(&self, instance: &Instance) -> Result<(IpAddr, Option<String>), String> {
        if let Some(address) = instance.ip() {
            return Ok((address, None));
        }
        let Some(name) = instance.hostname() else {
            return Err(match instance.address.as_str() {
                "" => "it has no address: give the service or its node one".to_owned(),
                text => format!(
                    "`{text}` is neither an IP address nor a host's name: register one of them"
                ),
            });
        };
        match self.names.get(&name) {
            Some(Host::At { address, is_one_of_many }) => {
                let which = if *is_one_of_many { ", one of several addresses" } else { "" };
                Ok((address.to_canonical(), Some(format!("`{name}` is {address}{which}"))))
            }
            Some(Host::Nowhere(reason)) => Err(reason.clone()),
            None => Err(format!("`{name}` is being looked up: no answer yet")),
        }
    }

    /// The instance's address and port, where it has them.
    pub fn endpoint(&self, instance: &Instance) -> Option<SocketAddr> {
        let (address, _) = self.find(instance).ok()?;
        Some(SocketAddr::new(address, u16::try_from(instance.port).ok()?))
    }
}

impl Instance {
    /// The address, where it is a host's name: in lower case, labels of letters, digits, `-` and
    /// `_`. One whose last label is a number isn't a name: resolvers read it as an address.
    pub fn hostname(&self) -> Option<String> {
        let name = self.address.strip_suffix('.').unwrap_or(&self.address);
        let ends_in_number = |name: &str| {
            name.rsplit('.').next().is_some_and(|last| last.bytes().all(|o| o.is_ascii_digit()))
        };
        let is_name = dns_name::is_host_name(name) && !ends_in_number(name);
        (is_name && self.ip().is_none()).then(|| self.address.to_ascii_lowercase())
    }
}
