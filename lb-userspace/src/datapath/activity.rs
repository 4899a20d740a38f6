//! Which services are connected to, by the counters that the programs keep.

use std::collections::HashMap;
use std::sync::Arc;

use super::kernel::Counters;

/// The last reading of each service's counters.
#[derive(Debug)]
pub struct Usage {
    counters: Counters,
    last: HashMap<Arc<str>, u64>,
}

impl Usage {
    /// Begins with the present readings of these services, each given with its index.
    pub fn begin<'a>(
        services: impl Iterator<Item = (&'a Arc<str>, u32)>,
        counters: Counters,
    ) -> Usage {
        let count = |service_idx| counters.service(service_idx).all();
        let last = services.map(|(name, service_idx)| (name.clone(), count(service_idx))).collect();
        Usage { counters, last }
    }

    /// The names of these services, each given with its index, of which more connections are counted than
    /// at the last look.
    pub fn active_since_last<'a>(
        &mut self,
        services: impl Iterator<Item = (&'a Arc<str>, u32)>,
    ) -> Vec<Arc<str>> {
        let former = std::mem::take(&mut self.last);
        let mut connected = Vec::new();
        for (name, service_idx) in services {
            let n_connects = self.counters.service(service_idx).all();
            // A service that is new, or came again, is counted from 0.
            if former.get(name).copied().unwrap_or(0) != n_connects && n_connects > 0 {
                connected.push(name.clone());
            }
            self.last.insert(name.clone(), n_connects);
        }
        connected
    }
}
