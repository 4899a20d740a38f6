//! The server of the admin interface.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{BoxStream, StreamExt as _, unfold};
use hyper::body::{Bytes, Incoming};
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HOST, HeaderName, HeaderValue,
    REFERRER_POLICY, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinError, JoinSet};

use super::api;
use super::bind::Listener;
use super::body::ResponseBody;
use super::documents::{At, Document, Documents};
use super::http;
use super::origin::{Foreign, TcpAccess, check_host, check_site, is_navigation};
use super::page;
use super::prometheus;
use super::route::{Endpoint, EndpointError, Wait, route};
use super::slow::{IsEndless, MinRate};
use super::stream::Feed;
use super::trace::TraceRefusal;
use super::view::View;
use crate::{logging, terminal};

/// The most connections of each unix socket, and of each TCP address: each has its own, so a client
/// at a port can't lock root out of the socket.
const MAX_CONNECTIONS: [usize; 2] = [128, 128];
/// Those of them that may wait for a change, or follow the stream, at any time.
const MAX_WAITING: [usize; 2] = [96, 32];
/// The documents that may be in memory for each.
const MAX_DOCUMENTS: [usize; 2] = [8, 4];
/// How long a document is shared over TCP. Over the unix socket each is new.
const SHARED_FOR: Duration = Duration::from_secs(1);
/// The longest wait for a change over TCP.
const MAX_TCP_WAIT: Duration = Duration::from_secs(60);
/// The time limit of a request's head, the pause before it included.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The greatest head of a request, and what is buffered of a response, in bytes; hyper admits 100 headers.
const MAX_HEAD: usize = 64 << 10;
/// What every response has: no copy stays anywhere, and no page but ours uses it. Ours runs no code and
/// no style but what is served as a file.
const HEADERS: [(HeaderName, &str); 7] = [
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (X_FRAME_OPTIONS, "DENY"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
];
/// What is logged of a path, in bytes: the rest of the line has to fit.
const MAX_LOGGED_PATH: usize = 1 << 10;
/// The response to a connection above the limit.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// The time limit of the request of such a connection.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// The most of those; further ones are closed at once.
const MAX_BUSY: usize = 16;
/// The pause after accept() failed, for example for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The header with the generation of the table that a response shows.
pub const GENERATION_HEADER: &str = "x-nohop-generation";

/// The header with the revision of the status that a response shows, for `?after=`.
pub const REVISION_HEADER: &str = "x-nohop-revision";

/// What the clients of a listener may do, and its limits.
struct ListenerLimits {
    /// Whether requests with effects are accepted. The mode of its file restricts the unix socket; a
    /// TCP address is open to every client that can reach it, a web page in a browser included.
    may_change: bool,
    /// What the configuration allows over TCP.
    tcp: watch::Receiver<TcpAccess>,
    connections: Arc<Semaphore>,
    busy: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    max_wait: Duration,
    /// One for all listeners.
    feed: Arc<Feed>,
    documents: Documents,
    /// Where the view is asked: a runtime whose threads may read the datapath's maps. This one's may not.
    work: Handle,
    /// Its own, so that slow readers of other documents don't hold up a scrape.
    metrics: Documents,
}

impl ListenerLimits {
    fn of(
        listener: &Listener,
        tcp: &watch::Receiver<TcpAccess>,
        feed: &Arc<Feed>,
        work: &Handle,
    ) -> ListenerLimits {
        let (kind, max_wait, shared_for) = match listener {
            Listener::Unix(..) => (0, Duration::MAX, Duration::ZERO),
            Listener::Tcp(_) => (1, MAX_TCP_WAIT, SHARED_FOR),
        };
        ListenerLimits {
            may_change: matches!(listener, Listener::Unix(..)),
            tcp: tcp.clone(),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS[kind])),
            busy: Arc::new(Semaphore::new(MAX_BUSY)),
            waiting: Arc::new(Semaphore::new(MAX_WAITING[kind])),
            max_wait,
            work: work.clone(),
            feed: feed.clone(),
            documents: Documents::new(MAX_DOCUMENTS[kind], shared_for),
            metrics: Documents::new(MAX_DOCUMENTS[kind], shared_for),
        }
    }
}

impl ListenerLimits {
    /// Runs what blocks for a moment where the view may be asked.
    async fn ask<T: Send + 'static>(
        &self,
        ask: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, JoinError> {
        // From one of its threads, since a new thread inherits the capabilities of the one that starts it.
        let asked = self.work.spawn(async move { tokio::task::spawn_blocking(ask).await });
        asked.await.flatten()
    }
}

/// Answers on every listener, until it is dropped. `tcp` is what is allowed over TCP; `view` is asked on
/// the runtime `work`.
pub async fn serve<V: View>(
    listeners: Vec<Listener>,
    tcp: watch::Receiver<TcpAccess>,
    view: Arc<V>,
    work: Handle,
) {
    let mut accepts = JoinSet::new();
    let feed = Feed::new(work.clone());
    for listener in listeners {
        let access = Arc::new(ListenerLimits::of(&listener, &tcp, &feed, &work));
        accepts.spawn(accept(listener, access, Arc::clone(&view)));
    }
    // They only end by a panic, and so does this then.
    if accepts.join_next().await.is_none() {
        pending().await
    }
}

async fn accept<V: View>(listener: Listener, access: Arc<ListenerLimits>, view: Arc<V>) {
    let mut connections = JoinSet::new();
    let mut is_failing = false;
    loop {
        let accepted = match &listener {
            Listener::Unix(listener, _) => {
                let stream = listener.accept().await;
                stream.map(|(stream, _)| {
                    spawn(&mut connections, stream, None, "unix".to_owned(), &access, &view)
                })
            }
            Listener::Tcp(listener) => {
                let stream = listener.accept().await;
                stream.and_then(|(stream, client)| {
                    let local = Some(stream.local_addr()?.ip());
                    spawn(&mut connections, stream, local, client.to_string(), &access, &view);
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

fn spawn<V: View>(
    connections: &mut JoinSet<()>,
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    local: Option<IpAddr>,
    client: String,
    access: &Arc<ListenerLimits>,
    view: &Arc<V>,
) {
    let (access, view) = (Arc::clone(access), Arc::clone(view));
    let Ok(slot) = Arc::clone(&access.connections).try_acquire_owned() else {
        let Ok(place) = Arc::clone(&access.busy).try_acquire_owned() else { return };
        connections.spawn(async move {
            let _place = place;
            let refuse = async {
                // An answer is lost where the request before it stays unread.
                let _ = stream.read(&mut [0; 4096]).await;
                let _: io::Result<()> = stream.write_all(BUSY).await;
            };
            let _ = tokio::time::timeout(BUSY_TIMEOUT, refuse).await;
        });
        return;
    };
    connections.spawn(async move {
        let _slot = slot;
        let is_endless = IsEndless::default();
        let service = service_fn(|request: Request<Incoming>| {
            let (access, view) = (Arc::clone(&access), Arc::clone(&view));
            let (is_endless, client) = (is_endless.clone(), client.clone());
            async move {
                let logs = view.logs_access();
                let mut response = answer(&request, local, &access, view).await;
                if logs {
                    let (method, path) = (request.method(), request.uri().to_string());
                    let path = path.get(..MAX_LOGGED_PATH).unwrap_or(&path);
                    let status = response.status().as_u16();
                    tracing::info!(target: "nohop::access", %client, %method, %path, status, "request");
                }
                is_endless.set(matches!(response.body(), ResponseBody::Stream(_)));
                for (name, value) in HEADERS {
                    response.headers_mut().insert(name, HeaderValue::from_static(value));
                }
                Ok::<_, Infallible>(response)
            }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(MinRate::new(stream, is_endless.clone())), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection of the admin interface failed");
        }
    });
}

/// Answers a request. The answer to HEAD is the one to GET, of which hyper sends the head alone.
async fn answer<V: View>(
    request: &Request<Incoming>,
    local: Option<IpAddr>,
    access: &ListenerLimits,
    view: Arc<V>,
) -> Response<ResponseBody> {
    let (uri, headers) = (request.uri(), request.headers());
    let is_known = match local.is_some() || headers.contains_key(HOST) {
        true => check_host(request, local, &access.tcp.borrow().hosts),
        false => Ok(()),
    };
    // A link on another site's page may lead to the page, which has no data in it.
    let is_link = uri.path() == page::PATH && is_navigation(headers);
    let is_own_site = || if is_link { Ok(()) } else { check_site(headers) };
    if let Err(foreign) = is_known.and_then(|()| is_own_site()) {
        // Once: a scraper that uses an unknown name should show, but a client must not fill the log.
        static REPORTED: std::sync::Once = std::sync::Once::new();
        REPORTED
            .call_once(|| tracing::warn!("a request to the admin interface is refused: {foreign}"));
        let status = match foreign {
            Foreign::NoHost => StatusCode::BAD_REQUEST,
            Foreign::Host(_) | Foreign::CrossSite => StatusCode::FORBIDDEN,
        };
        return text(status, &format!("{foreign}\n"));
    }
    let (endpoint, wait) = match route(request.method(), uri.path(), uri.query()) {
        Ok(asked) => asked,
        Err(error) => return refusal(&error),
    };
    if endpoint.has_effects() && !access.may_change {
        return refusal(&EndpointError::UnixOnly);
    }
    if endpoint.shows_clients() && local.is_some() && !access.tcp.borrow().may_trace {
        return refusal(&EndpointError::Clients);
    }
    if let Endpoint::Trace(filter) = endpoint {
        let lines = access.ask(move || view.trace(filter)).await;
        return match lines {
            Ok(Ok(lines)) => {
                let lines = unfold(lines, |mut lines| async { Some((lines.recv().await?, lines)) });
                stream(http::JSON_LINES, lines.boxed())
            }
            Ok(Err(refusal @ TraceRefusal::Forbidden)) => {
                text(StatusCode::FORBIDDEN, &format!("{refusal}\n"))
            }
            Ok(Err(refusal)) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{refusal}\n")),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
        };
    }
    if let Endpoint::Page(asset) = endpoint {
        let mut response = Response::new(Bytes::from_static(asset.body).into());
        let media_type = HeaderValue::from_static(asset.media_type);
        response.headers_mut().insert(CONTENT_TYPE, media_type);
        return response;
    }
    if endpoint == Endpoint::Stream {
        let Ok(place) = access.waiting.clone().try_acquire_owned() else { return too_many_wait() };
        return stream(http::EVENTS, access.feed.watch(&view, place));
    }
    let mut now = view.at();
    if endpoint == Endpoint::Reload {
        let reload = view.reload().await;
        let status = match (reload.ok, reload.problems.is_empty()) {
            (true, _) => StatusCode::OK,
            (false, false) => StatusCode::BAD_REQUEST,
            (false, true) => StatusCode::CONFLICT,
        };
        let at = *now.borrow();
        return response(json(status, &reload), at);
    }
    if let Endpoint::Drain(target) | Endpoint::Undrain(target) = &endpoint {
        let change = view.drain(matches!(endpoint, Endpoint::Drain(_)), target).await;
        let status = if change.ok { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        let at = *now.borrow();
        return response(json(status, &change), at);
    }
    if let Endpoint::SetLog(filter) = &endpoint {
        let changed = logging::set_filter(filter);
        if changed.is_ok() {
            tracing::warn!("the log's filter is {} from now on", logging::current_filter());
        }
        let status = if changed.is_ok() { StatusCode::OK } else { StatusCode::BAD_REQUEST };
        let at = *now.borrow();
        return response(json(status, &log_status(changed.err())), at);
    }
    if let Some(Wait { after, limit }) = wait {
        let Ok(_place) = access.waiting.try_acquire() else { return too_many_wait() };
        let start = *now.borrow_and_update();
        let limit = limit.min(access.max_wait);
        // After a change or a timeout, the answer is the present state.
        let _ = tokio::time::timeout(limit, now.wait_for(|now| now.is_past(after, start))).await;
    }
    let at = *now.borrow();
    if let Endpoint::LookUp { name, kind } = &endpoint {
        return match view.look_up(name, kind).await {
            Ok(lookup) => response(json(StatusCode::OK, &lookup), at),
            Err(wrong) => text(StatusCode::BAD_REQUEST, &format!("{wrong}\n")),
        };
    }
    if endpoint == Endpoint::Health {
        return text(StatusCode::OK, "ok\n");
    }
    let documents = match endpoint {
        Endpoint::Metrics => &access.metrics,
        _ => &access.documents,
    };
    let rendered = documents.get(&endpoint, at, || async {
        if let Endpoint::Explain(what) = &endpoint {
            let (what, may_ask) = (what.clone(), access.may_change);
            let explain = async move { view.explain(&what, may_ask).await };
            let explanation = match access.work.spawn(explain).await {
                Ok(explanation) => explanation,
                Err(error) => {
                    return plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n"));
                }
            };
            let status = match explanation.is_routed() {
                true => StatusCode::OK,
                false => StatusCode::NOT_FOUND,
            };
            return json(status, &explanation);
        }
        let endpoint = endpoint.clone();
        // A view waits for the datapath's lock, and a large one takes a while to render: the threads that
        // answer DNS must not be blocked.
        let shown = access.ask(move || show(&endpoint, &*view)).await;
        shown
            .unwrap_or_else(|error| plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")))
    });
    match rendered.await {
        Some(Document { status, media_type, at, body }) => respond(status, media_type, at, body),
        None => busy("too many answers are being read"),
    }
}

/// A status, a media type and a body.
type Shown = (StatusCode, &'static str, Vec<u8>);

fn show<V: View>(endpoint: &Endpoint, view: &V) -> Shown {
    match endpoint {
        Endpoint::Status => json(StatusCode::OK, &view.status()),
        Endpoint::Services => json(StatusCode::OK, &view.services()),
        Endpoint::Metrics => (StatusCode::OK, prometheus::MEDIA_TYPE, view.metrics().into_bytes()),
        Endpoint::Ready => {
            let status = view.status();
            if status.ready {
                return plain(StatusCode::OK, "ready\n");
            }
            let problems: Vec<String> =
                status.problems.iter().map(|problem| terminal::escape(problem)).collect();
            let problems = problems.join("\n");
            plain(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready\n{problems}\n"))
        }
        Endpoint::EdgeReady => match view.edge_obstacle() {
            None => plain(StatusCode::OK, "ready\n"),
            Some(why) => plain(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready\n{why}\n")),
        },
        Endpoint::Flows { by_bytes, limit } => match view.flows(*by_bytes, *limit) {
            Some(flows) => json(StatusCode::OK, &flows),
            None => plain(
                StatusCode::NOT_FOUND,
                "this node is no edge: set edge.interfaces and edge.source in its configuration\n",
            ),
        },
        Endpoint::Config => json(StatusCode::OK, &view.settings()),
        Endpoint::Drains => json(StatusCode::OK, &view.drains()),
        Endpoint::Log => json(StatusCode::OK, &log_status(None)),
        Endpoint::Health
        | Endpoint::Reload
        | Endpoint::Drain(_)
        | Endpoint::Undrain(_)
        | Endpoint::SetLog(_)
        | Endpoint::LookUp { .. }
        | Endpoint::Explain(_)
        | Endpoint::Stream
        | Endpoint::Page(_)
        | Endpoint::Trace(_) => plain(StatusCode::OK, "ok\n"),
    }
}

fn log_status(problem: Option<String>) -> api::LogStatus {
    api::LogStatus { ok: problem.is_none(), problem, filter: logging::current_filter() }
}

fn stream(media_type: &'static str, parts: BoxStream<'static, Bytes>) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::Stream(parts));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

fn too_many_wait() -> Response<ResponseBody> {
    busy("too many requests wait for changes (?after=, /v1/stream)")
}

fn busy(why: &str) -> Response<ResponseBody> {
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, &format!("{why}: try again later\n"));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

fn refusal(error: &EndpointError) -> Response<ResponseBody> {
    let status = match error {
        EndpointError::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
        EndpointError::UnixOnly | EndpointError::Clients => StatusCode::FORBIDDEN,
        EndpointError::Path => StatusCode::NOT_FOUND,
        EndpointError::Query { .. } => StatusCode::BAD_REQUEST,
    };
    let mut response = text(status, &format!("{error}\n"));
    if let EndpointError::Method(allowed) = error {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

fn json(status: StatusCode, document: &impl Serialize) -> Shown {
    match serde_json::to_vec(document) {
        Ok(body) => (status, http::JSON, body),
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

/// Lines for people, in whose terminal they may end.
fn plain(status: StatusCode, lines: &str) -> Shown {
    (status, "text/plain; charset=utf-8", terminal::escape_lines(lines).into_bytes())
}

fn text(status: StatusCode, lines: &str) -> Response<ResponseBody> {
    let (status, media_type, body) = plain(status, lines);
    let mut response = Response::new(Bytes::from(body).into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}

fn response((status, media_type, body): Shown, at: At) -> Response<ResponseBody> {
    respond(status, media_type, at, body.into())
}

fn respond(
    status: StatusCode,
    media_type: &'static str,
    at: At,
    body: Bytes,
) -> Response<ResponseBody> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(GENERATION_HEADER, at.generation.into());
    headers.insert(REVISION_HEADER, at.revision.into());
    response
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use tokio::sync::mpsc;

    use super::*;
    use crate::admin::{TraceFilter, api, bind, client};
    use crate::config::AdminAddress;
    use crate::table::{Ports, Protocols};

    /// A daemon that knows the service `web` and isn't ready before generation 1.
    struct Fake(watch::Sender<At>);

    impl View for Fake {
        fn status(&self) -> api::Status {
            let At { generation, revision } = *self.0.borrow();
            api::Status {
                revision,
                ready: generation > 0,
                problems: if generation > 0 { vec![] } else { vec!["no table; wait".into()] },
                version: "1".into(),
                pid: 1,
                generation,
                sources: vec![],
                pool: api::PoolStatus::default(),
                services: 1,
                backends: 0,
                drains: 0,
                dns: api::DnsStatus {
                    listen: vec![],
                    listen_tls: vec![],
                    domain: "service".into(),
                    upstreams: vec![],
                },
                datapath: api::DatapathStatus::default(),
                edge: None,
            }
        }

        fn services(&self) -> Vec<api::ServiceStatus> {
            vec![api::ServiceStatus {
                name: "web".into(),
                vip: [127, 128, 0, 1].into(),
                vip6: None,
                notes: vec![],
                pin: None,
                public: Vec::new(),
                ports: Ports::only([80]),
                protocol: Protocols::Tcp,
                algorithm: crate::config::BalanceAlgorithm::Random,
                generation: 1,
                watch: Default::default(),
                error: None,
                connects: 0,
                refused: 0,
                failed: 0,
                syn_retransmits: 0,
                in_flight: Some(0),
                refused_family: 0,
                shadowed: 0,
                udp_connects: 0,
                udp_connects_refused: 0,
                backends: vec![],
            }]
        }

        fn summaries(&self) -> Vec<api::ServiceSummary> {
            vec![api::ServiceSummary::example()]
        }

        fn settings(&self) -> Vec<api::SettingStatus> {
            vec![]
        }

        async fn explain(&self, name: &str, _may_ask: bool) -> api::Explanation {
            api::Explanation {
                name: name.into(),
                connect: "a sentence".into(),
                source: None,
                shadowed: vec![],
                service: self.services().into_iter().find(|service| service.name == name),
                excluded: vec![],
                instances: vec![],
                notes: vec![],
            }
        }

        async fn look_up(&self, name: &str, _kind: &str) -> Result<api::DnsLookup, String> {
            Err(format!("no lookup of {name} here"))
        }

        fn metrics(&self) -> String {
            "nohop_ready 1\n".into()
        }

        fn trace(&self, _filter: TraceFilter) -> Result<mpsc::Receiver<Bytes>, TraceRefusal> {
            Err(TraceRefusal::Forbidden)
        }

        fn at(&self) -> watch::Receiver<At> {
            self.0.subscribe()
        }

        async fn reload(&self) -> api::Reload {
            let problems = vec!["f:3: dns.ttl: is wrong".into()];
            api::Reload { ok: false, problems, changes: vec![] }
        }

        fn drains(&self) -> Vec<api::DrainStatus> {
            vec![]
        }

        fn edge_obstacle(&self) -> Option<String> {
            (self.0.borrow().generation == 0).then(|| "drained".into())
        }

        fn flows(&self, _: bool, limit: usize) -> Option<api::FlowsDocument> {
            (limit > 1).then(api::FlowsDocument::default)
        }

        async fn drain(&self, is_drain: bool, target: &str) -> api::DrainChange {
            api::DrainChange { ok: is_drain, name: Some(target.into()), ..Default::default() }
        }
    }

    /// A moment: the table's generation, and the revisions since the daemon's first.
    fn at(generation: u64, revision: u64) -> At {
        At { generation, revision: At::FIRST_REVISION + revision }
    }

    fn access() -> watch::Receiver<TcpAccess> {
        watch::channel(TcpAccess { hosts: vec!["nohop.example".to_owned()], may_trace: false }).1
    }

    /// A server of TCP alone.
    async fn over_tcp(view: Fake) -> (std::net::SocketAddr, JoinSet<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = JoinSet::new();
        server.spawn(serve(
            vec![Listener::Tcp(listener)],
            access(),
            Arc::new(view),
            Handle::current(),
        ));
        (address, server)
    }

    /// The server's raw response to a raw request, until it closes.
    async fn raw(stream: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> String {
        let mut stream = stream;
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        String::from_utf8(answer).unwrap()
    }

    struct Daemon {
        path: PathBuf,
        view: Arc<Fake>,
        server: tokio::task::JoinHandle<()>,
        _dir: tempfile::TempDir,
    }

    impl Daemon {
        fn start() -> Daemon {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("admin.sock");
            let listeners = bind(&[AdminAddress::Unix(path.clone())]).unwrap();
            let view = Arc::new(Fake(watch::Sender::new(at(0, 0))));
            let server =
                tokio::spawn(serve(listeners, access(), Arc::clone(&view), Handle::current()));
            Daemon { path, view, server, _dir: dir }
        }

        fn address(&self) -> AdminAddress {
            AdminAddress::Unix(self.path.clone())
        }

        async fn exchange(&self, method: &str, path: &str) -> http::HttpResponse {
            let stream = tokio::net::UnixStream::connect(&self.path).await.unwrap();
            let request = Request::builder().method(method).uri(path);
            http::exchange(stream, request, "nohop").await.unwrap()
        }
    }

    #[tokio::test]
    async fn each_route_has_its_status() {
        let daemon = Daemon::start();
        let table = [
            ("GET", "/healthz", 200, "ok"),
            ("GET", "/readyz", 503, "no table; wait"),
            ("GET", "/readyz/edge", 503, "drained"),
            ("GET", "/v1/flows", 200, "\"total\":0"),
            ("GET", "/v1/flows?limit=1", 404, "edge.interfaces"),
            ("GET", "/v1/status", 200, "\"ready\":false"),
            ("GET", "/v1/services", 200, "\"vip\":\"127.128.0.1\""),
            ("GET", "/v1/services/web", 200, "a sentence"),
            ("GET", "/v1/services/nope", 404, "a sentence"),
            ("GET", "/metrics", 200, "nohop_ready 1"),
            ("POST", "/v1/reload", 400, "f:3: dns.ttl"),
            ("GET", "/v1/reload", 405, "POST"),
            ("GET", "/v1/drain", 200, "[]"),
            ("POST", "/v1/drain?target=n1%2Fweb", 200, "\"name\":\"n1/web\""),
            ("POST", "/v1/drain", 400, "write target=TARGET"),
            ("POST", "/v1/undrain?target=n1", 400, "\"ok\":false"),
            ("GET", "/v1/undrain?target=n1", 405, "POST"),
            ("PUT", "/v1/drain?target=n1", 405, "GET, HEAD, POST"),
            ("GET", "/v1/status?after=x", 400, "after"),
            ("GET", "/", 200, "<title>"),
            ("GET", "/store.mjs", 200, "v1/stream"),
            ("GET", "/v1/config", 200, "[]"),
            ("POST", "/v1/stream", 405, "GET"),
            ("GET", "/v1", 404, "/v1/services/NAME"),
            ("POST", "/v1/status", 405, "GET"),
        ];
        for (method, path, status, fragment) in table {
            let answer = daemon.exchange(method, path).await;
            let body = String::from_utf8_lossy(&answer.body).into_owned();
            assert_eq!(answer.status.as_u16(), status, "{method} {path}: {body}");
            assert!(body.contains(fragment), "{method} {path}: {body}");
        }
    }

    #[tokio::test]
    async fn tcp_changes_nothing_and_is_addressed_by_a_known_name() {
        let (address, _server) = over_tcp(Fake(watch::Sender::new(at(1, 1)))).await;
        let local = format!("Host: {address}");
        let table = [
            ("GET /v1/status", &*local, 200),
            ("GET /metrics", "Host: localhost", 200),
            ("GET /metrics", "Host: nohop.example:9153", 200),
            ("POST /v1/reload", &local, 403),
            ("GET /v1/drain", &local, 200),
            ("POST /v1/drain?target=n1", &local, 403),
            ("POST /v1/undrain?target=n1", &local, 403),
            ("GET /v1/dns?name=web.service", &local, 403),
            ("GET /v1/trace", &local, 403),
            ("GET /v1/flows", &local, 403),
            ("PUT /v1/status", &local, 405),
            ("OPTIONS /v1/status", &local, 405),
            ("GET /v1/../../etc/passwd", &local, 404),
            ("GET /%2e%2e/%2e%2e/etc/passwd", &local, 404),
            ("GET //etc/passwd", &local, 404),
            ("GET /v1/services/%2e%2e%2f%2e%2e%2fetc%2fpasswd", &local, 404),
            ("GET /v1/status", "Host: 203.0.113.7", 403),
            ("GET /v1/status", "Host: evil.example", 403),
            ("GET /v1/status", "Host: localhost\r\nOrigin: http://evil.example", 403),
            ("GET /metrics", "Host: localhost\r\nSec-Fetch-Site: cross-site", 403),
            ("GET /v1/status", "X-Host: none", 400),
            ("GET http://evil.example/v1/status", "Host: localhost", 403),
        ];
        for (request, header, status) in table {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = format!("{request} HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n");
            let answer = raw(stream, &request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}{answer}");
            let head = answer.to_lowercase();
            for (name, value) in HEADERS {
                assert!(
                    head.contains(&format!("\r\n{name}: {value}\r\n").to_lowercase()),
                    "{answer}"
                );
            }
            assert!(!head.contains("access-control-"), "{answer}");
        }
    }

    /// What a request gets of a daemon's TCP address that waits for nothing else.
    async fn over_a_connection(address: std::net::SocketAddr, request: &[u8]) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        // It may be answered, and closed, before it is sent in full.
        let _ = stream.write_all(request).await;
        let mut answer = [0; 12];
        let _ = stream.read_exact(&mut answer).await;
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[tokio::test]
    async fn a_link_elsewhere_leads_to_the_page_and_to_nothing_else() {
        let (address, _server) = over_tcp(Fake(watch::Sender::new(at(1, 0)))).await;
        let link =
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document";
        let frame =
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe";
        for (path, headers, status) in [
            ("/", link, 200),
            ("/?view=services", link, 200),
            ("/", frame, 403),
            ("/page.mjs", link, 403),
            ("/v1/status", link, 403),
            ("/v1/stream", "Sec-Fetch-Site: cross-site", 403),
        ] {
            let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n\r\n");
            let answer = over_a_connection(address, request.as_bytes()).await;
            assert_eq!(answer, format!("HTTP/1.1 {status}"), "{request}");
        }
    }

    #[tokio::test]
    async fn floods_of_headers_and_requests_without_an_end_are_cut_off() {
        let (address, _server) = over_tcp(Fake(watch::Sender::new(at(1, 0)))).await;
        let start = format!("GET /v1/status HTTP/1.1\r\nHost: {address}\r\n");
        let many = start.clone() + &"X-A: b\r\n".repeat(200) + "\r\n";
        let long = start.clone() + "X-A: " + &"b".repeat(2 * MAX_HEAD);
        let endless = start + "Transfer-Encoding: chunked\r\n\r\n1000\r\n";
        for (request, status) in [(&many, "431"), (&long, "431"), (&endless, "200")] {
            let answer = over_a_connection(address, request.as_bytes()).await;
            assert_eq!(answer, format!("HTTP/1.1 {status}"), "{}", request.len());
        }
        // The rest of a body isn't read: the connection ends after the answer.
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(endless.as_bytes()).await.unwrap();
        stream.write_all(&[b'x'; 1000]).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.starts_with(b"HTTP/1.1 200"));
    }

    #[tokio::test]
    async fn viewers_of_the_stream_get_everything_first_and_then_what_changes() {
        let view = Fake(watch::Sender::new(at(1, 0)));
        let revisions = view.0.clone();
        let (address, _server) = over_tcp(view).await;
        let request = format!("GET /v1/stream HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let mut viewers = Vec::new();
        for _ in 0..2 {
            let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            viewers.push(stream);
        }
        let mut seen = vec![String::new(); viewers.len()];
        for (viewer, seen) in viewers.iter_mut().zip(&mut seen) {
            read_until(viewer, seen, "\"all\":true").await;
            assert!(seen.contains("text/event-stream") && seen.contains("event: status"), "{seen}");
        }
        revisions.send_replace(at(2, 1));
        for (viewer, seen) in viewers.iter_mut().zip(&mut seen) {
            read_until(viewer, seen, "\"generation\":2").await;
            assert_eq!(seen.matches("event: services").count(), 1, "nothing has changed: {seen}");
        }
    }

    async fn read_until(stream: &mut tokio::net::TcpStream, seen: &mut String, text: &str) {
        let mut buffer = [0; 4096];
        while !seen.contains(text) {
            let n = stream.read(&mut buffer).await.unwrap();
            assert!(n > 0, "it ended: {seen}");
            *seen += &String::from_utf8_lossy(&buffer[..n]);
        }
    }

    #[tokio::test]
    async fn a_head_is_answered_without_a_body() {
        let daemon = Daemon::start();
        for (path, status) in
            [("/healthz", 200), ("/v1/services", 200), ("/readyz", 503), ("/metrics", 200)]
        {
            let get = daemon.exchange("GET", path).await;
            let stream = tokio::net::UnixStream::connect(&daemon.path).await.unwrap();
            let head = format!("HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            let answer = raw(stream, &head).await.to_lowercase();
            assert!(answer.starts_with(&format!("http/1.1 {status} ")), "{path}: {answer}");
            assert!(
                answer.contains(&format!("\r\ncontent-length: {}\r\n", get.body.len())),
                "{answer}"
            );
            assert!(answer.ends_with("\r\n\r\n"), "{answer}");
        }
        let refused = daemon.exchange("HEAD", "/v1/reload").await;
        assert_eq!(
            (refused.status.as_u16(), &refused.headers[ALLOW]),
            (405, &HeaderValue::from_static("POST"))
        );
        let refused = daemon.exchange("POST", "/healthz").await;
        assert_eq!(refused.headers[ALLOW], "GET, HEAD");
    }

    #[tokio::test]
    async fn an_answer_waits_for_a_change() {
        let daemon = Daemon::start();
        let address = daemon.address();
        let now = daemon.exchange("GET", "/v1/status?after=0&wait=0").await;
        assert_eq!(now.headers[GENERATION_HEADER], "0");
        let revision = now.headers[REVISION_HEADER].to_str().unwrap().to_owned();
        let get = |after: String| {
            let address = address.clone();
            let path = format!("/v1/status?after={after}&wait=600");
            tokio::spawn(async move { client::get::<api::Status>(&address, &path).await.unwrap() })
        };
        // The table has another generation, or something else has changed: both are noticed.
        let waiting = [get("0".into()), get(revision.clone())];
        while daemon.view.0.receiver_count() < 2 {
            tokio::task::yield_now().await;
        }
        daemon.view.0.send_replace(at(0, 1));
        for each in waiting {
            assert_eq!(each.await.unwrap().revision, at(0, 1).revision);
        }
        daemon.view.0.send_replace(at(1, 2));
        // A past revision is answered at once, also one of an earlier daemon.
        let later = at(0, 1 << 40).revision.to_string();
        for after in ["0".into(), revision, "437".into(), later] {
            assert_eq!(get(after).await.unwrap().generation, 1);
        }
        assert_eq!(daemon.exchange("GET", "/readyz").await.status, 200);
    }

    #[tokio::test]
    async fn those_that_wait_take_no_place_from_others() {
        let (address, _server) = over_tcp(Fake(watch::Sender::new(at(1, 0)))).await;
        let request = "GET /v1/status?after=1&wait=600 HTTP/1.1\r\nHost: localhost\r\n\r\n";
        let (n_waiting, n_refused) = (MAX_WAITING[1], MAX_CONNECTIONS[1] - 1 - MAX_WAITING[1]);
        let mut answers = JoinSet::new();
        for _ in 0..n_waiting + n_refused {
            answers.spawn(async move {
                let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
                stream.write_all(request.as_bytes()).await.unwrap();
                let mut answer = [0; 12];
                stream.read_exact(&mut answer).await.unwrap();
                // Kept open, since a connection that waits counts as well.
                (answer, stream)
            });
        }
        // All but those that may wait are refused, whichever came first.
        let mut refused = Vec::new();
        while refused.len() < n_refused {
            let (answer, stream) = answers.join_next().await.unwrap().unwrap();
            assert_eq!(&answer, b"HTTP/1.1 503");
            refused.push(stream);
        }
        assert_eq!(answers.len(), n_waiting);
        let stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let close = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        assert!(raw(stream, close).await.contains("nohop_ready 1"));
    }

    #[tokio::test]
    async fn tcp_takes_no_connection_from_the_unix_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let tcp = "127.0.0.1:0".parse().unwrap();
        let listeners = bind(&[AdminAddress::Unix(path.clone()), AdminAddress::Tcp(tcp)]).unwrap();
        let address = listeners.iter().find_map(|listener| match listener {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        });
        let view = Arc::new(Fake(watch::Sender::new(at(1, 0))));
        let server = tokio::spawn(serve(listeners, access(), view, Handle::current()));
        let mut held = Vec::new();
        for _ in 0..2 * MAX_CONNECTIONS[0] {
            held.push(tokio::net::TcpStream::connect(address.unwrap()).await.unwrap());
        }
        let status = client::get::<api::Status>(&AdminAddress::Unix(path), "/v1/status").await;
        assert_eq!(status.unwrap().generation, 1);
        server.abort();
    }

    #[tokio::test]
    async fn the_client_reads_documents_and_names_what_is_wrong() {
        let daemon = Daemon::start();
        let address = daemon.address();
        let explanation: api::Explanation =
            client::get(&address, "/v1/services/nope").await.unwrap();
        assert_eq!(explanation.service, None);
        let reload: api::Reload = client::post(&address, "/v1/reload").await.unwrap();
        assert!(!reload.ok);
        let error = client::get::<api::Status>(&address, "/v1/nope").await.unwrap_err();
        assert!(error.to_string().contains("404"), "{error}");
        let error = client::get::<api::Status>(&address, "/v1/services").await.unwrap_err();
        assert!(matches!(error, client::ClientError::Document { .. }), "{error}");

        daemon.server.abort();
        let _ = daemon.server.await;
        let error = client::get::<api::Status>(&address, "/v1/status").await.unwrap_err();
        let expected = format!("no daemon answers at {address}: is `nohop run` running?");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }

    #[tokio::test]
    async fn one_connection_too_many_is_turned_away() {
        let daemon = Daemon::start();
        let mut held = Vec::new();
        for _ in 0..MAX_CONNECTIONS[0] {
            held.push(tokio::net::UnixStream::connect(&daemon.path).await.unwrap());
        }
        let answer = daemon.exchange("GET", "/healthz").await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
