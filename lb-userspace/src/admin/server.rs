//! The server of the admin interface: its listeners.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::bind::{Listener, RETRY};
use super::connection::{HttpPeer, spawn};
use super::limits::ListenerLimits;
use super::origin::TcpAccess;
use super::slow::Patience;
use super::stream::Feed;
use super::view::View;

/// The pause after accept() failed, for example for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers on every listener, until it is dropped. `tcp` is what is allowed over TCP; `view` is asked on
/// the runtime `work`.
pub async fn serve<V: View>(
    listeners: Vec<Listener>,
    tcp: watch::Receiver<TcpAccess>,
    view: Arc<V>,
    work: Handle,
) {
    serve_for(listeners, tcp, view, work, Patience::default()).await;
}

/// As [`serve`], with another patience with slow clients.
pub(super) async fn serve_for<V: View>(
    listeners: Vec<Listener>,
    tcp: watch::Receiver<TcpAccess>,
    view: Arc<V>,
    work: Handle,
    patience: Patience,
) {
    let mut accepts = JoinSet::new();
    let feed = Feed::new(work.clone());
    for listener in listeners {
        let limits = Arc::new(ListenerLimits::of(&listener, &tcp, &feed, &work, patience));
        accepts.spawn(accept(listener, limits, view.clone()));
    }
    // They only end by a panic, and so does this then.
    if accepts.join_next().await.is_none() {
        pending().await
    }
}

async fn accept<V: View>(listener: Listener, limits: Arc<ListenerLimits>, view: Arc<V>) {
    let listener = match listener {
        Listener::Waiting(waiting) => Listener::Tcp(waiting.listener(RETRY).await),
        listener => listener,
    };
    let mut connections = JoinSet::new();
    let mut is_failing = false;
    loop {
        let accepted = match &listener {
            // It was replaced.
            Listener::Waiting(_) => return,
            Listener::Unix(listener, _) => {
                let stream = listener.accept().await;
                stream.map(|(stream, _)| {
                    let client = HttpPeer { name: "unix".to_owned(), local: None };
                    spawn(&mut connections, stream, client, &limits, &view);
                })
            }
            Listener::Tcp(listener) => {
                let stream = listener.accept().await;
                stream.and_then(|(stream, client)| {
                    let local = Some(stream.local_addr()?.ip());
                    let client = HttpPeer { name: client.to_string(), local };
                    spawn(&mut connections, stream, client, &limits, &view);
                    Ok(())
                })
            }
        };
        while connections.try_join_next().is_some() {}
        let Err(error) = accepted else {
            is_failing = false;
            continue;
        };
        // The client's own failure: the next connection is another's (accept(2)).
        if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset)
        {
            continue;
        }
        if !std::mem::replace(&mut is_failing, true) {
            tracing::warn!(%error, "accept() failed on the admin interface");
        }
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
