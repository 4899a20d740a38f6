//! The server of the admin interface.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use super::api;
use super::bind::Listener;
use super::exposition;
use super::route::{Route, RouteError, Wait, route};

/// The most connections at any time; those that wait for a generation count.
const MAX_CONNECTIONS: usize = 128;
/// How long a client may take over the head of a request, the pause before it included.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// What one connection too many is told.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
/// How long one connection too many may take over its request.
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// The pause after a connection couldn't be accepted, for one because files ran out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The header that says which generation of the table an answer shows.
pub const GENERATION_HEADER: &str = "x-nohop-generation";

/// What the admin interface shows.
pub trait View: Send + Sync + 'static {
    /// The daemon as a whole.
    fn status(&self) -> api::Status;
    /// Every service, by name.
    fn services(&self) -> Vec<api::Service>;
    /// What is known of a name; of an unknown one too.
    fn explain(&self, name: &str) -> api::Explanation;
    /// What DNS answers to a name and a type, or why there is nothing to answer.
    fn look_up(
        &self,
        name: &str,
        kind: &str,
    ) -> impl Future<Output = Result<api::Lookup, String>> + Send;
    /// What is counted, as an exposition.
    fn metrics(&self) -> String;
    /// The generation of the table, as it grows.
    fn generation(&self) -> watch::Receiver<u64>;
    /// Reads the configuration again, and takes over what differs.
    fn reload(&self) -> impl Future<Output = api::Reload> + Send;
}

/// Answers on every listener, until it is dropped.
pub async fn serve<V: View>(listeners: Vec<Listener>, view: Arc<V>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut accepts = JoinSet::new();
    for listener in listeners {
        accepts.spawn(accept(listener, Arc::clone(&view), Arc::clone(&slots)));
    }
    while accepts.join_next().await.is_some() {}
    pending().await
}

async fn accept<V: View>(listener: Listener, view: Arc<V>, slots: Arc<Semaphore>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = match &listener {
            Listener::Unix(listener, _) => {
                let stream = listener.accept().await;
                stream.map(|(stream, _)| spawn(&mut connections, stream, true, &view, &slots))
            }
            Listener::Tcp(listener) => {
                let stream = listener.accept().await;
                stream.map(|(stream, _)| spawn(&mut connections, stream, false, &view, &slots))
            }
        };
        if let Err(error) = accepted {
            tracing::warn!(%error, "the admin interface can't accept a connection");
            tokio::time::sleep(ACCEPT_PAUSE).await;
        }
        while connections.try_join_next().is_some() {}
    }
}

fn spawn<V: View>(
    connections: &mut JoinSet<()>,
    mut stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    may_change: bool,
    view: &Arc<V>,
    slots: &Arc<Semaphore>,
) {
    let view = Arc::clone(view);
    let Ok(slot) = Arc::clone(slots).try_acquire_owned() else {
        connections.spawn(async move {
            // An answer is lost where the request before it stays unread.
            let _ = tokio::time::timeout(BUSY_TIMEOUT, stream.read(&mut [0; 4096])).await;
            let _: io::Result<()> = stream.write_all(BUSY).await;
        });
        return;
    };
    connections.spawn(async move {
        let _slot = slot;
        let service = service_fn(|request: Request<Incoming>| {
            let view = Arc::clone(&view);
            async move { Ok::<_, Infallible>(answer(&request, may_change, view).await) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a connection to the admin interface broke");
        }
    });
}

/// Answers a request of somebody who may, or may not, change anything. Who may use the unix socket
/// its file's rights say; TCP is for whoever can reach it, a web page in a browser too.
async fn answer<V: View>(
    request: &Request<Incoming>,
    may_change: bool,
    view: Arc<V>,
) -> Response<Full<Bytes>> {
    let uri = request.uri();
    let (route, wait) = match route(request.method(), uri.path(), uri.query()) {
        Ok(asked) => asked,
        Err(error) => return refusal(&error),
    };
    if route == Route::Reload && !may_change {
        return refusal(&RouteError::ReadOnly);
    }
    if route == Route::Reload {
        let reload = view.reload().await;
        let generation = *view.generation().borrow();
        let status = match (reload.ok, reload.problems.is_empty()) {
            (true, _) => StatusCode::OK,
            (false, false) => StatusCode::BAD_REQUEST,
            (false, true) => StatusCode::CONFLICT,
        };
        return json(status, generation, &reload);
    }
    let mut generation = view.generation();
    if let Some(Wait { after, limit }) = wait {
        // Whether the generation came or the time is over, the answer is the table as it is.
        let _ = tokio::time::timeout(limit, generation.wait_for(|now| *now > after)).await;
    }
    let generation = *generation.borrow();
    if let Route::LookUp { name, kind } = &route {
        return match view.look_up(name, kind).await {
            Ok(lookup) => json(StatusCode::OK, generation, &lookup),
            Err(wrong) => text(StatusCode::BAD_REQUEST, format!("{wrong}\n")),
        };
    }
    // A view waits for whoever changes the maps, and a large one takes a while to write down:
    // nothing for the threads that DNS is answered on.
    let shown = tokio::task::spawn_blocking(move || show(route, generation, &*view)).await;
    shown.unwrap_or_else(|error| text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")))
}

fn show<V: View>(route: Route, generation: u64, view: &V) -> Response<Full<Bytes>> {
    match route {
        Route::Status => json(StatusCode::OK, generation, &view.status()),
        Route::Services => json(StatusCode::OK, generation, &view.services()),
        Route::Explain(name) => {
            let explanation = view.explain(&name);
            let status = match explanation.service {
                Some(_) => StatusCode::OK,
                None => StatusCode::NOT_FOUND,
            };
            json(status, generation, &explanation)
        }
        Route::Metrics => {
            let mut response = text(StatusCode::OK, view.metrics());
            let media_type = HeaderValue::from_static(exposition::MEDIA_TYPE);
            response.headers_mut().insert(CONTENT_TYPE, media_type);
            response
        }
        Route::Ready => {
            let status = view.status();
            if status.ready {
                return text(StatusCode::OK, "ready\n".to_owned());
            }
            let problems = status.problems.join("\n");
            text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready\n{problems}\n"))
        }
        Route::Health | Route::Reload | Route::LookUp { .. } => {
            text(StatusCode::OK, "ok\n".to_owned())
        }
    }
}

fn refusal(error: &RouteError) -> Response<Full<Bytes>> {
    let status = match error {
        RouteError::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
        RouteError::ReadOnly => StatusCode::FORBIDDEN,
        RouteError::Path => StatusCode::NOT_FOUND,
        RouteError::Query { .. } => StatusCode::BAD_REQUEST,
    };
    let mut response = text(status, format!("{error}\n"));
    if let RouteError::Method(allowed) = error
        && let Ok(allowed) = HeaderValue::from_str(allowed.as_str())
    {
        response.headers_mut().insert(ALLOW, allowed);
    }
    response
}

fn json(status: StatusCode, generation: u64, document: &impl Serialize) -> Response<Full<Bytes>> {
    let mut response = match serde_json::to_vec(document) {
        Ok(body) => Response::new(Full::new(Bytes::from(body))),
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    };
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(super::http::JSON));
    headers.insert(GENERATION_HEADER, generation.into());
    response
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::admin::{bind, client, http};
    use crate::config::AdminAddress;
    use crate::table::{Ports, Protocols};

    /// A daemon that knows the service `web` and isn't ready before generation 1.
    struct Fake(watch::Sender<u64>);

    impl View for Fake {
        fn status(&self) -> api::Status {
            let generation = *self.0.borrow();
            api::Status {
                ready: generation > 0,
                problems: if generation > 0 { vec![] } else { vec!["no table; wait".into()] },
                version: "1".into(),
                pid: 1,
                generation,
                catalog: api::CatalogStatus {
                    source: "file".into(),
                    state: "live".into(),
                    age_seconds: None,
                    facts: Vec::new(),
                    problem: None,
                    watches: None,
                },
                pool: api::PoolStatus::default(),
                services: 1,
                backends: 0,
                dns: api::DnsStatus { listen: vec![], domain: "service".into(), upstreams: vec![] },
                plane: api::PlaneStatus::default(),
            }
        }

        fn services(&self) -> Vec<api::Service> {
            vec![api::Service {
                name: "web".into(),
                vip: [127, 128, 0, 1].into(),
                vip6: None,
                notes: vec![],
                pin: None,
                ports: Ports::only([80]),
                protocol: Protocols::Tcp,
                algorithm: "random".into(),
                generation: 1,
                watch: Default::default(),
                error: None,
                dials: 0,
                refused: 0,
                refused_family: 0,
                shadowed: 0,
                udp_connects: 0,
                udp_connects_refused: 0,
                backends: vec![],
            }]
        }

        fn explain(&self, name: &str) -> api::Explanation {
            api::Explanation {
                name: name.into(),
                dial: "a sentence".into(),
                service: self.services().into_iter().find(|service| service.name == name),
                excluded: vec![],
            }
        }

        async fn look_up(&self, name: &str, _kind: &str) -> Result<api::Lookup, String> {
            Err(format!("no lookup of {name} here"))
        }

        fn metrics(&self) -> String {
            "nohop_ready 1\n".into()
        }

        fn generation(&self) -> watch::Receiver<u64> {
            self.0.subscribe()
        }

        async fn reload(&self) -> api::Reload {
            let problems = vec!["f:3: dns.ttl: is wrong".into()];
            api::Reload { ok: false, problems, changes: vec![] }
        }
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
            let view = Arc::new(Fake(watch::Sender::new(0)));
            let server = tokio::spawn(serve(listeners, Arc::clone(&view)));
            Daemon { path, view, server, _dir: dir }
        }

        fn address(&self) -> AdminAddress {
            AdminAddress::Unix(self.path.clone())
        }

        async fn exchange(&self, method: &str, path: &str) -> http::Answer {
            let stream = tokio::net::UnixStream::connect(&self.path).await.unwrap();
            let request = Request::builder().method(method).uri(path);
            http::exchange(stream, request).await.unwrap()
        }
    }

    #[tokio::test]
    async fn each_route_has_its_status() {
        let daemon = Daemon::start();
        let table = [
            ("GET", "/healthz", 200, "ok"),
            ("GET", "/readyz", 503, "no table; wait"),
            ("GET", "/v1/status", 200, "\"ready\":false"),
            ("GET", "/v1/services", 200, "\"vip\":\"127.128.0.1\""),
            ("GET", "/v1/services/web", 200, "a sentence"),
            ("GET", "/v1/services/nope", 404, "a sentence"),
            ("GET", "/metrics", 200, "nohop_ready 1"),
            ("POST", "/v1/reload", 400, "f:3: dns.ttl"),
            ("GET", "/v1/reload", 405, "POST"),
            ("GET", "/v1/status?after=x", 400, "after"),
            ("GET", "/", 404, "/v1/services/NAME"),
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
    async fn who_comes_by_tcp_changes_nothing() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let view = Arc::new(Fake(watch::Sender::new(1)));
        let server = tokio::spawn(serve(vec![Listener::Tcp(listener)], view));
        for (method, path, status) in [("GET", "/v1/status", 200), ("POST", "/v1/reload", 403)] {
            let stream = tokio::net::TcpStream::connect(address).await.unwrap();
            let request = Request::builder().method(method).uri(path);
            let answer = http::exchange(stream, request).await.unwrap();
            assert_eq!(answer.status.as_u16(), status, "{method} {path}");
        }
        server.abort();
    }

    #[tokio::test]
    async fn an_answer_waits_for_its_generation() {
        let daemon = Daemon::start();
        let address = daemon.address();
        let waiting = tokio::spawn(async move {
            client::get::<api::Status>(&address, "/v1/status?after=0").await.unwrap()
        });
        let now = daemon.exchange("GET", "/v1/status?after=0&wait=0").await;
        assert_eq!(now.headers[GENERATION_HEADER], "0");
        daemon.view.0.send_replace(1);
        assert_eq!(waiting.await.unwrap().generation, 1);
        let now = daemon.exchange("GET", "/readyz").await;
        assert_eq!(now.status, 200);
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
        for _ in 0..MAX_CONNECTIONS {
            held.push(tokio::net::UnixStream::connect(&daemon.path).await.unwrap());
        }
        let answer = daemon.exchange("GET", "/healthz").await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    }
}
