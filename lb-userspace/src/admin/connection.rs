//! One connection: its time limits, its requests one after the other, and the access log.

use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::answer::answer;
use super::body::ResponseBody;
use super::limits::ListenerLimits;
use super::response::add_headers;
use super::slow::{IsEndless, MinRate};
use super::view::View;

/// The greatest head of a request, and what is buffered of a response, in bytes; hyper admits 100 headers.
pub(super) const MAX_HEAD: usize = 64 << 10;
/// What is logged of a path, in bytes: the rest of the line has to fit.
const MAX_LOGGED_PATH: usize = 1 << 10;
/// The response to a connection above the limit.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// The time limit of the request of such a connection.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);

/// The client of a connection.
#[derive(Clone)]
pub(super) struct HttpPeer {
    /// Its address, for the access log; `unix` on a socket.
    pub(super) name: String,
    /// The address that it has connected to; `None` on a unix socket.
    pub(super) local: Option<IpAddr>,
}

/// Serves a connection in a task of its own, if there is a place for it.
pub(super) fn spawn<V: View>(
    connections: &mut JoinSet<()>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    client: HttpPeer,
    limits: &Arc<ListenerLimits>,
    view: &Arc<V>,
) {
    if let Ok(place) = limits.connections.clone().try_acquire_owned() {
        connections.spawn(serve(stream, place, client, limits.clone(), view.clone()));
    } else if let Ok(place) = limits.busy.clone().try_acquire_owned() {
        connections.spawn(refuse(stream, place));
    }
}

async fn refuse(
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    _place: OwnedSemaphorePermit,
) {
    let refuse = async {
        // An answer is lost where the request before it stays unread.
        let _ = stream.read(&mut [0; 4096]).await;
        let _: io::Result<()> = stream.write_all(BUSY).await;
    };
    let _ = tokio::time::timeout(BUSY_TIMEOUT, refuse).await;
}

async fn serve<V: View>(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    _place: OwnedSemaphorePermit,
    client: HttpPeer,
    limits: Arc<ListenerLimits>,
    view: Arc<V>,
) {
    let is_endless = IsEndless::default();
    let service = service_fn(|request: Request<Incoming>| {
        let (client, limits, view) = (client.clone(), limits.clone(), view.clone());
        let is_endless = is_endless.clone();
        async move {
            let logs = view.logs_access();
            let mut response = answer(&request, client.local, &limits, view).await;
            if logs {
                let (method, path) = (request.method(), request.uri().to_string());
                let path = &path[..path.floor_char_boundary(MAX_LOGGED_PATH)];
                let (client, status) = (client.name, response.status().as_u16());
                tracing::info!(target: "nohop::access", %client, %method, %path, status, "request");
            }
            is_endless.set(matches!(response.body(), ResponseBody::Stream(_)));
            add_headers(&mut response);
            Ok::<_, Infallible>(response)
        }
    });
    let stream = MinRate::new(stream, is_endless.clone(), limits.patience);
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.patience.head)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection of the admin interface failed");
    }
}
