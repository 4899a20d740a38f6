//! Events of the programs: connections to cold services, ejections of backends and their ends.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use aya::maps::{Map, MapData, RingBuf};
use lb_common::{Event, EventKind};
use zerocopy::FromBytes;

use super::ejected::{BackendRef, Ejected};
use super::error::DatapathError;
use super::kernel::{Counters, ServiceNames};

/// Reads the events that the programs send: for each [`Cold`](crate::table::Watch::Cold) service that is
/// connected to one until it has been live, and one for each change of a backend's ejection. Each object
/// has a ring of its own, whose descriptor can be polled.
pub struct Reports {
    rings: Vec<RingBuf<MapData>>,
    names: ServiceNames,
    counters: Counters,
}

/// An event. If its service was removed meanwhile, the name may be the one that its index has now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A cold service was connected to.
    Connected(Arc<str>),
    /// The ejection of a backend that is in the table changed.
    Ejection {
        /// Its service.
        service: Arc<str>,
        /// The backend.
        backend: BackendRef,
        /// How it is now; `None` where it returned.
        ejected: Option<Ejected>,
    },
}

impl Reports {
    /// Reads from these rings, the maps `EVENTS`.
    pub(super) fn new(
        maps: impl IntoIterator<Item = Map>,
        names: ServiceNames,
        counters: Counters,
    ) -> Result<Reports, DatapathError> {
        let ring = |map| RingBuf::try_from(map).map_err(|source| DatapathError::Map { source });
        let rings = maps.into_iter().map(ring).collect::<Result<_, _>>()?;
        Ok(Reports { rings, names, counters })
    }

    /// The next event; `None` if there are no more now.
    pub fn next_report(&mut self) -> Option<Report> {
        let Reports { rings, names, counters } = self;
        rings.iter_mut().find_map(|ring| {
            while let Some(event) = ring.next() {
                let event = Event::read_from_bytes(&event).ok();
                if let Some(report) = event.and_then(|event| report(event, names, counters)) {
                    return Some(report);
                }
            }
            None
        })
    }

    /// The descriptors that become readable with an event.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.rings.iter().map(AsFd::as_fd)
    }
}

/// `None` for an event of another version, or about what is no longer in the table.
fn report(event: Event, names: &ServiceNames, counters: &Counters) -> Option<Report> {
    let service = names.name(event.service)?;
    match EventKind::from_number(event.kind)? {
        EventKind::Connected => Some(Report::Connected(service)),
        // The word in the map decides what is shown: it may have changed again.
        EventKind::Ejected | EventKind::Returned => {
            let Event { backend: backend_idx, generation, .. } = event;
            let address = counters.backend_address(backend_idx, generation)?;
            let backend = BackendRef { backend_idx, generation, address };
            Some(Report::Ejection { service, backend, ejected: counters.ejected(backend_idx) })
        }
    }
}
