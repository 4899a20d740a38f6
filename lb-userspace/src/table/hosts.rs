//! Instances whose address is a name: what the names stand for, as data.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::Instance;

/// What the names among the instances' addresses stand for, as far as it is known. One that isn't
/// in it was not looked up yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts(pub BTreeMap<String, Host>);

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Host {
    /// This address, the first of so many in their order, IPv4 before IPv6.
    At {
        /// The address.
        address: IpAddr,
        /// How many the name has.
        n_addresses: usize,
    },
    /// None, for this reason.
    Nowhere(String),
}

impl Host {
    /// The first of a name's addresses in their order, IPv4 before IPv6: every node takes the same
    /// one, whatever the order of the answers. `None` where there is none.
    pub fn of(addresses: impl IntoIterator<Item = IpAddr>) -> Option<Host> {
        let mut addresses: Vec<IpAddr> = addresses.into_iter().collect();
        addresses.sort();
        addresses.dedup();
        let address = *addresses.first()?;
        Some(Host::At { address, n_addresses: addresses.len() })
    }
}

impl Hosts {
    /// Where the instance is and, where its address is a name, a note on that.
    ///
    /// # Errors
    /// Why it is nowhere, with the mend.
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
        match self.0.get(&name) {
            Some(Host::At { address, n_addresses }) => {
                let which = match n_addresses {
                    1 => String::new(),
                    n => format!(", the first of its {n} addresses"),
                };
                Ok((address.to_canonical(), Some(format!("`{name}` is {address}{which}"))))
            }
            Some(Host::Nowhere(reason)) => Err(reason.clone()),
            None => Err(format!("`{name}` is being looked up: no answer yet")),
        }
    }
}

impl Instance {
    /// The address, where it is a host's name: in lower case, labels of letters, digits, `-` and
    /// `_`. One whose last label is a number isn't: resolvers take such for a spelling of an
    /// address.
    pub fn hostname(&self) -> Option<String> {
        let name = self.address.strip_suffix('.').unwrap_or(&self.address);
        let is_label = |label: &str| {
            (1..=63).contains(&label.len())
                && label
                    .bytes()
                    .all(|octet| octet.is_ascii_alphanumeric() || b"-_".contains(&octet))
        };
        let ends_in_number = |name: &str| {
            name.rsplit('.').next().is_some_and(|last| last.bytes().all(|o| o.is_ascii_digit()))
        };
        let is_name = name.len() <= 253 && name.split('.').all(is_label) && !ends_in_number(name);
        (is_name && self.ip().is_none()).then(|| self.address.to_ascii_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_node_takes_the_same_address() {
        let host = |addresses: &[&str]| Host::of(addresses.iter().map(|a| a.parse().unwrap()));
        let at = |address: &str, n_addresses| {
            Some(Host::At { address: address.parse().unwrap(), n_addresses })
        };
        assert_eq!(host(&[]), None);
        assert_eq!(host(&["2001:db8::1"]), at("2001:db8::1", 1));
        assert_eq!(host(&["2001:db8::1", "10.0.0.9", "10.0.0.10"]), at("10.0.0.9", 3));
        assert_eq!(host(&["10.0.0.10", "10.0.0.9", "10.0.0.9"]), at("10.0.0.9", 2));
    }
}
