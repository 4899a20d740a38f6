//! Requests to a server of its own, over its sockets.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use hyper::header::{ALLOW, HeaderValue};
use hyper::{Request, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use super::connection::MAX_HEAD;
use super::limits::{MAX_CONNECTIONS, MAX_WAITING};
use super::response::{GENERATION_HEADER, HEADERS, REVISION_HEADER};
use super::server::serve_for;
use super::slow::Patience;
use super::{
    At, Listener, TcpAccess, TraceFilter, TraceRefusal, View, api, bind, client, http, serve,
};
use crate::config::AdminAddress;

/// A daemon that knows the service `web` and isn't ready before generation 1.
struct Fake {
    at: watch::Sender<At>,
    /// So many in brief.
    n_services: usize,
}

impl Fake {
    fn new(at: At) -> Fake {
        Fake { at: watch::Sender::new(at), n_services: 1 }
    }
}

impl View for Fake {
    fn status(&self) -> api::Status {
        let At { generation, revision } = *self.at.borrow();
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
        vec![api::ServiceStatus::example()]
    }

    fn summaries(&self) -> Vec<api::ServiceSummary> {
        vec![api::ServiceSummary::example(); self.n_services]
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
        self.at.subscribe()
    }

    async fn reload(&self) -> api::Reload {
        let problems = vec!["f:3: dns.ttl: is wrong".into()];
        api::Reload { ok: false, problems, changes: vec![] }
    }

    fn drains(&self) -> Vec<api::DrainStatus> {
        vec![]
    }

    fn edge_obstacle(&self) -> Option<String> {
        (self.at.borrow().generation == 0).then(|| "drained".into())
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
    server.spawn(serve(vec![Listener::Tcp(listener)], access(), Arc::new(view), Handle::current()));
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
        let view = Arc::new(Fake::new(at(0, 0)));
        let server = tokio::spawn(serve(listeners, access(), Arc::clone(&view), Handle::current()));
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
    let (address, _server) = over_tcp(Fake::new(at(1, 1))).await;
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
        ("GET /%252e%252e/etc/passwd", &local, 404),
        ("GET /..\\..\\etc\\passwd", &local, 404),
        ("GET /vendor/%2e%2e/page.mjs", &local, 404),
        ("GET /page.mjs%00", &local, 404),
        ("OPTIONS *", &local, 404),
        ("CONNECT evil.example:443", &local, 403),
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
            assert!(head.contains(&format!("\r\n{name}: {value}\r\n").to_lowercase()), "{answer}");
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
    let (address, _server) = over_tcp(Fake::new(at(1, 0))).await;
    let link = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document";
    let frame = "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe";
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
    let (address, _server) = over_tcp(Fake::new(at(1, 0))).await;
    let start = format!("GET /v1/status HTTP/1.1\r\nHost: {address}\r\n");
    let many = start.clone() + &"X-A: b\r\n".repeat(200) + "\r\n";
    let long = start.clone() + "X-A: " + &"b".repeat(2 * MAX_HEAD);
    let endless = start.clone() + "Transfer-Encoding: chunked\r\n\r\n1000\r\n";
    let two_lengths = start.clone() + "Content-Length: 1\r\nContent-Length: 2\r\n\r\n";
    let folded = format!("GET / HTTP/1.1\r\nHost: {address}\r\n evil.example\r\n\r\n");
    let zero = start + "X-A: \0\r\n\r\n";
    for (request, answer) in [
        (&many, "HTTP/1.1 431"),
        (&long, "HTTP/1.1 431"),
        (&endless, "HTTP/1.1 200"),
        (&two_lengths, "HTTP/1.1 400"),
        (&folded, "HTTP/1.1 400"),
        (&zero, "HTTP/1.1 400"),
        (&"GET /v1/status\r\n\r\n".to_owned(), "HTTP/1.1 400"),
        (&"GET /healthz HTTP/1.0\r\n\r\n".to_owned(), "HTTP/1.0 200"),
        (&"\u{16}\u{3}\u{1}\u{2}\0\u{1}\0".repeat(20), "HTTP/1.1 400"),
    ] {
        let given = over_a_connection(address, request.as_bytes()).await;
        assert_eq!(given, answer, "{request:?}");
    }
    // HTTP/2 begins so, and is closed without an answer.
    let preface = over_a_connection(address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert_eq!(preface, "\0".repeat(12));
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
    let view = Fake::new(at(1, 0));
    let revisions = view.at.clone();
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

/// Each of its bytes comes in time, and its end never does.
#[tokio::test]
async fn a_head_without_an_end_is_cut_off() {
    const STEP: Duration = Duration::from_millis(10);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let patience = Patience { head: 10 * STEP, ..Patience::default() };
    let (listeners, view) = (vec![Listener::Tcp(listener)], Arc::new(Fake::new(at(1, 0))));
    let mut server = JoinSet::new();
    server.spawn(serve_for(listeners, access(), view, Handle::current(), patience));
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let trickle = async {
        writer.write_all(b"GET /v1/status HTTP/1.1\r\nX-A: ").await.unwrap();
        for _ in 0..500 {
            if writer.write_all(b"b").await.is_err() {
                return;
            }
            tokio::time::sleep(STEP).await;
        }
        panic!("it is still read");
    };
    let mut answer = Vec::new();
    tokio::select! {
        _ = reader.read_to_end(&mut answer) => {}
        () = trickle => {}
    }
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
}

/// It reads a part of what it should, steadily: the kernel has something of it in each period.
#[tokio::test]
async fn a_viewer_that_reads_too_slowly_loses_its_place() {
    use rustix::net::sockopt::set_socket_send_buffer_size;
    const BUFFER: u32 = 8 << 10;
    const STEP: Duration = Duration::from_millis(10);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    // Connections inherit it.
    set_socket_send_buffer_size(&listener, BUFFER as usize).unwrap();
    let address = listener.local_addr().unwrap();
    let view = Arc::new(Fake { n_services: 10_000, ..Fake::new(at(1, 0)) });
    let max_time = Duration::from_secs(600);
    let patience = Patience { period: 10 * STEP, max_time, ..Patience::default() };
    let listeners = vec![Listener::Tcp(listener)];
    let mut server = JoinSet::new();
    server.spawn(serve_for(listeners, access(), view, Handle::current(), patience));

    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(BUFFER).unwrap();
    let mut viewer = socket.connect(address).await.unwrap();
    let request = format!("GET /v1/stream HTTP/1.1\r\nHost: {address}\r\n\r\n");
    viewer.write_all(request.as_bytes()).await.unwrap();
    let (mut n_read, mut buffer) = (0, [0; 2 << 10]);
    while let Ok(n @ 1..) = viewer.read(&mut buffer).await {
        n_read += n;
        assert!(n_read < 1 << 20, "it is still served");
        tokio::time::sleep(STEP).await;
    }
    assert!(n_read > 0, "it wasn't served at all");
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
    while daemon.view.at.receiver_count() < 2 {
        tokio::task::yield_now().await;
    }
    daemon.view.at.send_replace(at(0, 1));
    for each in waiting {
        assert_eq!(each.await.unwrap().revision, at(0, 1).revision);
    }
    daemon.view.at.send_replace(at(1, 2));
    // A past revision is answered at once, also one of an earlier daemon.
    let later = at(0, 1 << 40).revision.to_string();
    for after in ["0".into(), revision, "437".into(), later] {
        assert_eq!(get(after).await.unwrap().generation, 1);
    }
    assert_eq!(daemon.exchange("GET", "/readyz").await.status, 200);
}

#[tokio::test]
async fn those_that_wait_take_no_place_from_others() {
    let (address, _server) = over_tcp(Fake::new(at(1, 0))).await;
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
    // What is past needs no place.
    let stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let past = close.replace("/metrics", "/v1/status?after=7&wait=600");
    assert!(raw(stream, &past).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn tcp_takes_no_connection_from_the_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.sock");
    let tcp = "127.0.0.1:0".parse().unwrap();
    let listeners = bind(&[AdminAddress::Unix(path.clone()), AdminAddress::Tcp(tcp)]).unwrap();
    let address = listeners.iter().find_map(|listener| match listener {
        Listener::Tcp(listener) => listener.local_addr().ok(),
        Listener::Unix(..) | Listener::Waiting(_) => None,
    });
    let view = Arc::new(Fake::new(at(1, 0)));
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
    let explanation: api::Explanation = client::get(&address, "/v1/services/nope").await.unwrap();
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
