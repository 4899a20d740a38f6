//! A domain, for the question whether a name lies in it.

use super::message::WireName;

/// A domain as it is on the wire, in lower case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Domain {
    wire: Box<[u8]>,
    n_labels: usize,
}

impl Domain {
    /// Reads a domain such as `service` or `lb.example`; dots at the ends don't count. The
    /// configuration has checked the length of its labels.
    pub(super) fn new(domain: &str) -> Domain {
        let mut wire = Vec::new();
        let mut n_labels = 0;
        for label in domain.split('.').filter(|label| !label.is_empty()) {
            wire.push(label.len() as u8);
            wire.extend(label.to_ascii_lowercase().bytes());
            n_labels += 1;
        }
        wire.push(0);
        Domain { wire: wire.into(), n_labels }
    }

    /// The number of labels.
    pub(super) fn n_labels(&self) -> usize {
        self.n_labels
    }

    /// The domain on the wire, in lower case.
    pub(super) fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// How many labels `name` has below this domain: 0 for the domain itself, `None` outside of it. Case
    /// is ignored.
    pub(super) fn depth_of(&self, name: &WireName<'_>) -> Option<usize> {
        let depth = name.n_labels().checked_sub(self.n_labels)?;
        // Lengths are below 64, where ASCII has no letters.
        name.suffix(depth).eq_ignore_ascii_case(&self.wire).then_some(depth)
    }

    /// Whether `name` is this domain or lies below it.
    pub(super) fn has(&self, name: &WireName<'_>) -> bool {
        self.depth_of(name).is_some()
    }

    /// Whether this domain is `other` or lies below it.
    pub(super) fn is_within(&self, other: &Domain) -> bool {
        WireName::read(&self.wire).is_some_and(|name| other.has(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_in_a_domain() {
        let table = [
            ("service", "service", true),
            ("service", "web.service", true),
            ("service", "Web.SERVICE", true),
            ("service", "a.b.service", true),
            ("service", "*.service", true),
            ("service", "web.service.consul", false),
            ("service", "webservice", false),
            ("service", "", false),
            ("Lb.Example.", "web.lb.example", true),
            ("lb.example", "example", false),
            ("", "example", true),
            ("", "", true),
        ];
        for (domain, name, expected) in table {
            let name = Domain::new(name);
            assert_eq!(name.is_within(&Domain::new(domain)), expected, "{name:?} in {domain:?}");
            let mut shouted = name.wire.to_vec();
            shouted.make_ascii_uppercase();
            let shouted = WireName::read(&shouted).unwrap();
            assert_eq!(Domain::new(domain).has(&shouted), expected, "{name:?} in {domain:?}");
        }
    }
}
