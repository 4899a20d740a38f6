//! The backends of a service, one for each address and port.
//!
//! Several agents may register one endpoint (each of them watches the same database, or a node came
//! back under another name): a record for each would multiply its share.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::Backend;

/// How many further registrations of an endpoint are named.
const MAX_NAMED: usize = 3;

/// The backends, as their instances were judged.
#[derive(Clone, Debug, Default)]
pub struct Endpoints {
    backends: Vec<Backend>,
    /// Where the backend of each address is.
    at: HashMap<SocketAddr, usize>,
    /// The further registrations of a backend.
    also: HashMap<usize, Vec<String>>,
}

impl Endpoints {
    /// Adds an instance's backend. One of an address that is there already is the same backend: it
    /// has the better of both states, and the larger weight.
    pub fn add(&mut self, backend: Backend) {
        let idx = match backend.address {
            Some(address) => *self.at.entry(address).or_insert(self.backends.len()),
            None => self.backends.len(),
        };
        let Some(first) = self.backends.get_mut(idx) else {
            return self.backends.push(backend);
        };
        first.weight = first.weight.max(backend.weight);
        if (backend.state, backend.group) < (first.state, first.group) {
            (first.group, first.state) = (backend.group, backend.state);
            first.reason = backend.reason;
        }
        let Backend { node, id, .. } = backend;
        let name = if node.is_empty() { id } else { format!("{node}/{id}") };
        self.also.entry(idx).or_default().push(name);
    }

    /// The backends, in the order in which their first instances came.
    pub fn backends(mut self) -> Vec<Backend> {
        for (idx, names) in self.also {
            let named = names.iter().take(MAX_NAMED).map(|name| format!("`{name}`"));
            let named = named.collect::<Vec<_>>().join(", ");
            let more = match names.len().saturating_sub(MAX_NAMED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            let note = format!("also registered as {named}{more}");
            if let Some(backend) = self.backends.get_mut(idx) {
                let reason = backend.reason.take().map(|reason| reason + "; ");
                backend.reason = Some(reason.unwrap_or_default() + &note);
            }
        }
        self.backends
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::BackendState;

    fn backend(address: Option<&str>, id: &str, weight: u16, state: BackendState) -> Backend {
        Backend {
            address: address.map(|address| address.parse().unwrap()),
            shown_address: String::new(),
            node: "n".into(),
            id: id.into(),
            weight,
            state,
            group: u8::from(state == BackendState::Spare),
            reason: (state != BackendState::Healthy).then(|| format!("{id} is odd")),
            host_only: false,
        }
    }

    #[test]
    fn an_endpoint_is_one_backend_with_the_largest_weight_and_the_best_state() {
        use BackendState::*;
        let mut endpoints = Endpoints::default();
        for (address, id, weight, state) in [
            (Some("10.0.0.9:5432"), "a", 2, Warning),
            (Some("10.0.0.9:5433"), "b", 1, Healthy),
            (Some("10.0.0.9:5432"), "c", 7, Healthy),
            (Some("10.0.0.9:5432"), "d", 5, Warning),
            (None, "e", 1, Unroutable),
            (None, "f", 1, Unroutable),
            (Some("10.0.0.9:5432"), "g", 1, Healthy),
            (Some("10.0.0.9:5432"), "h", 1, Healthy),
            (Some("10.0.0.10:1"), "i", 1, Warning),
            (Some("10.0.0.10:1"), "j", 1, Warning),
            (Some("10.0.0.11:1"), "k", 0, Draining),
            (Some("10.0.0.11:1"), "l", 3, Spare),
            (Some("10.0.0.12:1"), "m", 1, Spare),
            (Some("10.0.0.12:1"), "n", 1, Warning),
            (Some("10.0.0.12:1"), "o", 1, Spare),
        ] {
            endpoints.add(backend(address, id, weight, state));
        }
        let shown = endpoints.backends().into_iter().map(|backend| {
            let Backend { id, weight, state, reason, .. } = backend;
            format!("{id} x{weight} {state:?} {}", reason.unwrap_or_default())
        });
        assert_eq!(
            shown.collect::<Vec<_>>(),
            [
                "a x7 Healthy also registered as `n/c`, `n/d`, `n/g` and 1 more",
                "b x1 Healthy ",
                "e x1 Unroutable e is odd",
                "f x1 Unroutable f is odd",
                "i x1 Warning i is odd; also registered as `n/j`",
                "k x3 Spare l is odd; also registered as `n/l`",
                "m x1 Warning n is odd; also registered as `n/n`, `n/o`",
            ]
        );
    }
}
