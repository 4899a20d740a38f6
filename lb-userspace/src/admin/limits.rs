//! What the clients of a listener may do, and how much of it at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinError;

use super::bind::Listener;
use super::documents::Documents;
use super::origin::TcpAccess;
use super::slow::Patience;
use super::stream::Feed;

/// The most connections of each unix socket, and of each TCP address: each has its own, so a client
/// at a port can't lock root out of the socket.
pub(super) const MAX_CONNECTIONS: [usize; 2] = [128, 128];
/// Those of them that may wait for a change, or follow the stream, at any time.
pub(super) const MAX_WAITING: [usize; 2] = [96, 32];
/// The connections above the limit that get an answer; further ones are closed at once.
const MAX_BUSY: usize = 16;
/// The documents that may be in memory for each.
const MAX_DOCUMENTS: [usize; 2] = [8, 4];
/// How long a document is shared over TCP. Over the unix socket each is new.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// The longest wait for a change over TCP.
const MAX_TCP_WAIT: Duration = Duration::from_secs(60);

/// What the clients of a listener may do, and its limits.
pub(super) struct ListenerLimits {
    /// Whether requests with effects are accepted. The mode of its file restricts the unix socket; a
    /// TCP address is open to every client that can reach it, a web page in a browser included.
    pub(super) may_change: bool,
    /// What the configuration allows over TCP.
    pub(super) tcp: watch::Receiver<TcpAccess>,
    pub(super) connections: Arc<Semaphore>,
    pub(super) busy: Arc<Semaphore>,
    pub(super) waiting: Arc<Semaphore>,
    pub(super) max_wait: Duration,
    /// With slow clients.
    pub(super) patience: Patience,
    /// One for all listeners.
    pub(super) feed: Arc<Feed>,
    pub(super) documents: Documents,
    /// Where the view is asked: a runtime whose threads may read the datapath's maps. This one's may not.
    pub(super) work: Handle,
    /// Its own, so that slow readers of other documents don't hold up a scrape.
    pub(super) metrics: Documents,
}

impl ListenerLimits {
    pub(super) fn of(
        listener: &Listener,
        tcp: &watch::Receiver<TcpAccess>,
        feed: &Arc<Feed>,
        work: &Handle,
        patience: Patience,
    ) -> ListenerLimits {
        let (kind, max_wait, shared_for) = match listener {
            Listener::Unix(..) => (0, Duration::MAX, Duration::ZERO),
            Listener::Tcp(_) | Listener::Waiting(_) => (1, MAX_TCP_WAIT, SHARED_FOR),
        };
        ListenerLimits {
            may_change: matches!(listener, Listener::Unix(..)),
            tcp: tcp.clone(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS[kind])),
            busy: Arc::new(Semaphore::new(MAX_BUSY)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING[kind])),
            max_wait,
            patience,
            work: work.clone(),
            feed: feed.clone(),
            documents: Documents::new(MAX_DOCUMENTS[kind], shared_for),
            metrics: Documents::new(MAX_DOCUMENTS[kind], shared_for),
        }
    }

    /// Runs what blocks for a moment where the view may be asked.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        // From one of its threads, since a new thread inherits the capabilities of the one that starts it.
        let asked = self.work.spawn(async move { tokio::task::spawn_blocking(ask).await });
        asked.await.flatten()
    }
}
