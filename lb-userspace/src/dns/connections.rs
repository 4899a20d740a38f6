//! The connections of the TCP and TLS listeners, and which makes room for a new one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use super::acl::ClientKey;

/// The most connections of this host, and of all other clients together. For a further one the one that
/// has been idle longest is closed.
const MAX_CONNECTIONS: usize = 256;

/// The most connections of one other client; the same rule applies to its own.
const MAX_CONNECTIONS_EACH: usize = 64;

/// The queries of one connection that are answered at one time. While there are so many, no further
/// one is read.
pub(super) const MAX_PIPELINED: usize = 8;

/// The connections that are open.
#[derive(Debug, Default)]
pub(super) struct Connections {
    table: Mutex<ConnectionTable>,
}

/// By number, in the order of their arrival.
#[derive(Debug, Default)]
struct ConnectionTable {
    last: u64,
    by_number: BTreeMap<u64, ConnectionEntry>,
}

#[derive(Debug)]
struct ConnectionEntry {
    client_key: ClientKey,
    /// Since when no query is pending; `None` while one is.
    idle_since: Option<Instant>,
    /// Notified when it is evicted.
    end: Arc<Notify>,
}

/// An open connection; dropping it removes it.
#[derive(Debug)]
pub(super) struct ConnectionGuard {
    connections: Arc<Connections>,
    number: u64,
    end: Arc<Notify>,
}

impl Connections {
    /// Adds a connection, for which an idle one may have to go; `None` where all are busy.
    pub(super) fn open(self: &Arc<Self>, client_key: ClientKey) -> Option<ConnectionGuard> {
        let mut table = self.lock();
        if client_key.is_some() {
            table.evict_for(MAX_CONNECTIONS_EACH, |other| other == client_key)?;
        }
        table.evict_for(MAX_CONNECTIONS, |other| other.is_some() == client_key.is_some())?;
        table.last += 1;
        let (number, end) = (table.last, Arc::new(Notify::new()));
        let connection =
            ConnectionEntry { client_key, idle_since: Some(Instant::now()), end: end.clone() };
        table.by_number.insert(number, connection);
        drop(table);
        Some(ConnectionGuard { connections: Arc::clone(self), number, end })
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionTable {
    /// Evicts the connection that has been idle longest if `most` or more are open of the clients
    /// that `such` selects; `None` if none of them is idle.
    fn evict_for(&mut self, most: usize, such: impl Fn(ClientKey) -> bool) -> Option<()> {
        let those = || self.by_number.iter().filter(|(_, connection)| such(connection.client_key));
        if those().count() < most {
            return Some(());
        }
        let idle =
            those().filter_map(|(number, connection)| Some((connection.idle_since?, *number)));
        let (_, number) = idle.min()?;
        self.by_number.remove(&number)?.end.notify_one();
        Some(())
    }
}

impl ConnectionGuard {
    /// Resolves once another connection took the place of this one.
    pub(super) async fn evicted(&self) {
        self.end.notified().await;
    }

    /// Sets whether a query is being answered. Returns whether the connection wasn't evicted.
    pub(super) fn set_busy(&self, is_busy: bool) -> bool {
        let mut table = self.connections.lock();
        let Some(connection) = table.by_number.get_mut(&self.number) else { return false };
        connection.idle_since = (!is_busy).then(Instant::now);
        true
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.connections.lock().by_number.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_idle_connection_is_evicted() {
        let connections = Arc::new(Connections::default());
        let place = |client_key| connections.open(client_key);
        let is_open =
            |place: &ConnectionGuard| connections.lock().by_number.contains_key(&place.number);
        let host: Vec<_> = (0..MAX_CONNECTIONS).map(|_| place(None).unwrap()).collect();
        // Four clients take all that there is for others.
        let mut others = Vec::new();
        for client in 0..4 {
            others.extend((0..MAX_CONNECTIONS_EACH).map(|_| place(Some(client)).unwrap()));
        }
        assert!(host.iter().chain(&others).all(is_open));

        // The host's own make room for it, the one that has been idle longest first.
        host[0].set_busy(true);
        host[0].set_busy(false);
        let _more = place(None).unwrap();
        assert!(is_open(&host[0]) && !is_open(&host[1]) && others.iter().all(is_open));

        // A client beyond its share makes room itself; a further one evicts any that is idle.
        let _more = place(Some(3)).unwrap();
        let first = 3 * MAX_CONNECTIONS_EACH;
        assert!(is_open(&others[0]) && !is_open(&others[first]));
        let _more = place(Some(9)).unwrap();
        assert!(!is_open(&others[0]) && !others[0].set_busy(true));

        // A busy one is never evicted.
        let busy: Vec<_> = others.iter().filter(|place| place.set_busy(true)).collect();
        assert!(place(Some(0)).is_some(), "there was room for one of its own");
        assert!(busy.iter().all(|place| is_open(place)));
    }
}
