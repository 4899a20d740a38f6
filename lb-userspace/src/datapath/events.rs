//! What the programs report: connections of services whose instances nobody follows.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use aya::maps::{Map, MapData, RingBuf};
use lb_common::{Event, EventKind};
use zerocopy::FromBytes;

use super::error::DatapathError;
use super::kernel::Names;

/// What tells of connections of services that are [`Cold`](crate::table::Watch::Cold): each once, until it
/// was live in between. It can be polled.
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

    /// The name of the next service that was connected to; `None` when nothing more was reported.
    ///
    /// A service that was removed meanwhile may be told by the name that its index has now.
    pub fn next_name(&mut self) -> Option<Arc<str>> {
        while let Some(event) = self.ring.next() {
            let Ok(Event { service, kind }) = Event::read_from_bytes(&event) else { continue };
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
