//! A domain, for the question whether a name lies in it.

use hickory_proto::rr::Name;

/// The labels of a domain, in lower case; none for the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suffix(Vec<Box<[u8]>>);

impl Suffix {
    /// Reads a domain such as `service` or `lb.example`; dots at the ends don't count.
    pub(super) fn new(domain: &str) -> Suffix {
        let labels = domain.split('.').filter(|label| !label.is_empty());
        Suffix(labels.map(|label| label.to_ascii_lowercase().into_bytes().into()).collect())
    }

    /// The number of labels.
    pub(super) fn n_labels(&self) -> usize {
        self.0.len()
    }

    /// How many labels `name` has below this domain: 0 for the domain itself, `None` for a name
    /// outside. Case doesn't count.
    pub(super) fn depth_of(&self, name: &Name) -> Option<usize> {
        let depth = name.iter().len().checked_sub(self.0.len())?;
        let within = name
            .iter()
            .skip(depth)
            .zip(&self.0)
            .all(|(theirs, ours)| theirs.eq_ignore_ascii_case(ours));
        within.then_some(depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn depth() {
        let table = [
            ("service", "service.", Some(0)),
            ("service", "web.service.", Some(1)),
            ("service", "Web.SERVICE.", Some(1)),
            ("service", "a.b.service.", Some(2)),
            ("service", "*.service.", Some(1)),
            ("service", "web.service.consul.", None),
            ("service", "webservice.", None),
            ("service", ".", None),
            ("Lb.Example.", "web.lb.example.", Some(1)),
            ("lb.example", "example.", None),
            ("", "example.", Some(1)),
        ];
        for (domain, name, expected) in table {
            let name = Name::from_ascii(name).unwrap();
            assert_eq!(Suffix::new(domain).depth_of(&name), expected, "{name} in {domain:?}");
        }
    }
}
