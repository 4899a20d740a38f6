//! Events of the programs: connections to cold services.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use aya::maps::{Map, MapData, RingBuf};
use lb_common::{Event, EventKind};
use zerocopy::FromBytes;

use super::error::DatapathError;
use super::kernel::Names;

/// Reads events of connections to [`Cold`](crate::table::Watch::Cold) services: one for each service until
/// it has been live. Its descriptor can be polled.
pub struct Reports {
    ring: RingBuf<MapData>,
    names: Names,
}

impl Reports {
    /// Reads from the map `EVENTS`.
    pub(super) fn new(map: Map, names: Names) -> Result<Reports, DatapathError> {
        let ring = RingBuf::try_from(map).map_err(|source| DatapathError::Map { source })?;
        Ok(Reports { ring, names })
    }

    /// The name of the service of the next event; `None` if there are no more.
    ///
    /// If the service was removed meanwhile, this may be the name that its index has now.
    pub fn next_name(&mut self) -> Option<Arc<str>> {
        while let Some(event) = self.ring.next() {
            let Ok(Event { service, kind, .. }) = Event::read_from_bytes(&event) else { continue };
            if kind == EventKind::Connected as u32
                && let Some(name) = self.names.name(service)
            {
                return Some(name);
            }
        }
        None
    }
}

impl AsFd for Reports {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
