use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use super::error::Busy;
use super::*;
use crate::catalog::consul::test_server::{Fake, Fault, NAMES};
use crate::config::TlsConfig;

const LIMIT: Duration = Duration::from_secs(60);

fn request(path: &str) -> ApiRequest {
    ApiRequest { path: path.into(), mode: ReadMode::Plain, wait: Duration::ZERO }
}

fn client(config: ConsulConfig) -> (Client, Publisher) {
    let output = Publisher::new("consul");
    (Client::new(&config, LIMIT, output.clone()), output)
}

fn config(address: SocketAddr) -> ConsulConfig {
    let address = ConsulAddress::Http(address.to_string());
    ConsulConfig { address, ..ConsulConfig::default() }
}

#[test]
fn names_are_percent_encoded() {
    for (text, expected) in
        [("web-1.x_y~", "web-1.x_y~"), ("a b/c?d", "a%20b%2Fc%3Fd"), ("ü", "%C3%BC")]
    {
        assert_eq!(percent_encode(text), expected);
    }
}

#[test]
fn a_request_has_index_wait_and_scope() {
    // (datacenter, namespace, partition)
    let table = [
        (["", "", ""], ReadMode::Plain, "/p"),
        (["", "", ""], ReadMode::Consistent, "/p?consistent"),
        (["", "", ""], ReadMode::Blocking(7), "/p?index=7&wait=300000ms"),
        (["eu 1", "", ""], ReadMode::Plain, "/p?dc=eu%201"),
        (["eu", "", ""], ReadMode::Blocking(7), "/p?index=7&wait=300000ms&dc=eu"),
        (["", "team", "part"], ReadMode::Plain, "/p?ns=team&partition=part"),
        (
            ["eu", "team", "part"],
            ReadMode::Consistent,
            "/p?consistent&dc=eu&ns=team&partition=part",
        ),
    ];
    for ([datacenter, namespace, partition], ask, expected) in table {
        let config = ConsulConfig {
            datacenter: datacenter.into(),
            namespace: namespace.into(),
            partition: partition.into(),
            ..ConsulConfig::default()
        };
        let wait = Duration::from_secs(300);
        let request = ApiRequest { mode: ask, wait, ..request("/p") };
        assert_eq!(client(config).0.path_and_query(&request), expected);
    }
}

#[tokio::test]
async fn every_answer_is_counted_by_its_kind() {
    let faults = [
        (None, "200"),
        (Some(Fault::Status(403, "no")), "403"),
        (Some(Fault::Status(404, "no")), "404"),
        (Some(Fault::Status(429, "no")), "429"),
        (Some(Fault::Status(500, "no")), "500"),
        (Some(Fault::Status(503, "no")), "503"),
        (Some(Fault::Body("17")), "malformed"),
        (Some(Fault::Body("{} more")), "malformed"),
        (Some(Fault::Cut), "malformed"),
        (Some(Fault::Endless), "malformed"),
        (Some(Fault::Drip), "timeout"),
        (Some(Fault::Hang), "timeout"),
        (Some(Fault::Close), "reset"),
        (Some(Fault::Header("X-Consul-KnownLeader: false")), "200"),
        (Some(Fault::Header("X-Consul-LastContact: 60001")), "200"),
    ];
    let fake = Fake::start().await;
    for (fault, code) in faults {
        fake.break_path(NAMES, fault.clone());
        let (mut client, output) = client(config(fake.address));
        client.body_limit = Duration::from_millis(300);
        if let Some(Fault::Endless) = fault {
            client.body_limit = LIMIT;
        }
        let limit = if let Some(Fault::Hang) = fault { Duration::from_millis(300) } else { LIMIT };
        let answer = client.get::<BTreeMap>(&request(NAMES), limit).await;
        assert_eq!(answer.is_err(), fault.is_some(), "{fault:?}");
        let is_busy = matches!(answer, Err(QueryError::Busy { .. }));
        assert_eq!(is_busy, ["429", "503", "reset"].contains(&code), "{fault:?}: {answer:?}");
        let counted: Vec<_> = output.stats().requests().into_iter().collect();
        assert_eq!(counted, [(code.to_owned(), 1)], "{fault:?}: {answer:?}");
        assert_eq!(
            output.stats().bytes() > 0,
            code.parse::<u16>().is_ok() || matches!(fault, Some(Fault::Body(_))),
            "{fault:?}"
        );
    }
    // Nobody listens.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let (client, output) = client(config(free));
    client.get::<Value>(&request(NAMES), LIMIT).await.unwrap_err();
    assert_eq!(output.stats().requests()["unreachable"], 1);
}

type BTreeMap = std::collections::BTreeMap<String, Vec<String>>;

#[tokio::test]
async fn a_body_of_too_large_a_length_is_not_read() {
    let fake = Fake::start().await;
    fake.break_path(NAMES, Some(Fault::Header("Content-Length: 99999999999")));
    let (client, _) = client(config(fake.address));
    let answer = client.get::<Value>(&request(NAMES), LIMIT).await;
    assert!(matches!(answer, Err(QueryError::TooLarge { .. })), "{answer:?}");
}

#[tokio::test]
async fn filtered_paths_are_a_notice() {
    let fake = Fake::start().await;
    let (client, output) = client(config(fake.address));
    let (_, health, _) = output.subscribe();
    let facts = || health.borrow().facts.clone();
    let filtered = Fault::Header("X-Consul-Results-Filtered-By-ACLs: true");
    fake.break_path(NAMES, Some(filtered));
    client.get::<Value>(&request(NAMES), LIMIT).await.unwrap();
    assert!(facts()[0].contains(&format!("from {NAMES}: ")), "{:?}", facts());
    assert_eq!(health.borrow().problem, None);
    fake.break_path(NAMES, None);
    client.get::<Value>(&request(NAMES), LIMIT).await.unwrap();
    assert_eq!(facts(), [""; 0]);
}

#[tokio::test]
async fn an_absent_key_is_null() {
    let fake = Fake::start().await;
    fake.break_path("/v1/kv/nohop/off", Some(Fault::Status(404, "")));
    let (client, output) = client(config(fake.address));
    let answer = client.get::<Value>(&request("/v1/kv/nohop/off"), LIMIT).await.unwrap();
    assert_eq!((answer.body, answer.index), (Value::Null, Some(1)));
    assert_eq!(output.stats().requests()["404"], 1);
}

/// Behind a proxy that drops Consul's headers an absent key can't be distinguished from a path that the proxy hides.
#[tokio::test]
async fn a_404_without_consuls_headers_names_the_proxy() {
    const SWITCH: &str = "/v1/kv/nohop/off";
    let fake = Fake::start().await;
    let (client, output) = client(config(fake.address));
    for (path, body, has_key) in
        [(SWITCH, "", true), (SWITCH, "<html>404", true), (NAMES, "", false)]
    {
        fake.break_path(path, Some(Fault::Bare(404, body)));
        let error = client.get::<Value>(&request(path), LIMIT).await.unwrap_err().to_string();
        let parts = [path, "drops headers such as X-Consul-Index", "consul.address"];
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(error.contains("consul kv put nohop/off false"), has_key, "{error}");
        fake.break_path(path, None);
    }
    assert_eq!(output.stats().requests()["404"], 3);
}

/// What can't be a token isn't sent: the answer would be that it isn't known.
#[tokio::test]
async fn a_token_file_has_a_token_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let (empty, other) = ("token is empty", "has a blank, a line break or another character");
    for (text, expected) in [
        (&b" \n"[..], Some(empty)),
        (b"\xef\xbb\xbf\r\n", Some(empty)),
        (b"one\ntwo\n", Some(other)),
        (b"# the token\none\n", Some(other)),
        ("\u{feff}\u{feff}one".as_bytes(), Some(other)),
        (b"one\0", Some(other)),
        (b"\xff\xfeo\0", Some("can't read the Consul token")),
        (b"\xef\xbb\xbfone\r\n", None),
        (b" one \n", None),
    ] {
        std::fs::write(&path, text).unwrap();
        let fake = Fake::start().await;
        let token = Some(Token::File(path.clone()));
        let (client, output) = client(ConsulConfig { token, ..config(fake.address) });
        let answer = client.get::<Value>(&request(NAMES), LIMIT).await;
        assert_eq!(output.stats().requests().is_empty(), expected.is_some(), "{text:?}");
        match (answer, expected) {
            (Err(error), Some(expected)) => {
                let error = error.to_string();
                assert!(error.contains(expected), "{error}");
                assert!(error.contains(path.to_str().unwrap()), "{error}");
            }
            (answer, expected) => assert!(answer.is_ok() && expected.is_none(), "{answer:?}"),
        }
    }
    // In the value of CONSUL_HTTP_TOKEN as well.
    let fake = Fake::start().await;
    let token = Some(Token::Literal("one two".into()));
    let (client, _) = client(ConsulConfig { token, ..config(fake.address) });
    let error = client.get::<Value>(&request(NAMES), LIMIT).await.unwrap_err().to_string();
    assert!(error.contains(other), "{error}");
}

#[tokio::test]
async fn a_request_over_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("consul.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let mut server = JoinSet::new();
    server.spawn(async move {
        loop {
            respond_empty(listener.accept().await.unwrap().0).await;
        }
    });
    let (client, _) =
        client(ConsulConfig { address: ConsulAddress::Unix(path), ..ConsulConfig::default() });
    client.get::<Value>(&request(NAMES), LIMIT).await.unwrap();
}

/// Answers one request with an empty object, and closes.
async fn respond_empty(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\n") {
        // A client that left is seen at the other end.
        match stream.read_buf(&mut seen).await {
            Ok(n) if n > 0 => {}
            _ => return,
        }
    }
    let said = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}";
    let _ = stream.write_all(said).await;
    let _ = stream.shutdown().await;
}

/// An authority, its directory, and what it signed.
struct Authority {
    dir: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let authority = Authority { dir: tempfile::tempdir().unwrap(), issuer };
        authority.write("ca.pem", &authority.issuer.pem());
        authority
    }

    fn path(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    /// Replaces a file as a rotation of certificates does.
    fn write(&self, file: &str, text: &str) {
        let fresh = self.path("fresh");
        std::fs::write(&fresh, text).unwrap();
        std::fs::rename(fresh, self.path(file)).unwrap();
    }

    /// Signs a certificate for a name, and writes it and its key to NAME.pem and NAME.key.
    fn sign(&self, name: &str) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        self.write(&format!("{name}.pem"), &certificate.pem());
        self.write(&format!("{name}.key"), &key.serialize_pem());
    }

    fn roots(&self) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(self.issuer.der().clone()).unwrap();
        roots.into()
    }

    /// A Consul that shows the certificate of `name` and, where `clients` is given, wants one that
    /// this authority signed.
    async fn serve(&self, name: &str, clients: Option<&Authority>) -> Server {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = match clients {
            Some(authority) => builder.with_client_cert_verifier(
                WebPkiClientVerifier::builder_with_provider(authority.roots(), provider)
                    .build()
                    .unwrap(),
            ),
            None => builder.with_no_client_auth(),
        };
        let chain = CertificateDer::from_pem_file(self.path(&format!("{name}.pem"))).unwrap();
        let key = PrivateKeyDer::from_pem_file(self.path(&format!("{name}.key"))).unwrap();
        let acceptor: TlsAcceptor =
            Arc::new(builder.with_single_cert(vec![chain], key).unwrap()).into();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        task.spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                if let Ok(stream) = acceptor.accept(stream).await {
                    respond_empty(stream).await;
                }
            }
        });
        Server { host: "127.0.0.1", port: address.port(), _task: task }
    }
}

struct Server {
    host: &'static str,
    port: u16,
    _task: JoinSet<()>,
}

impl Server {
    fn config(&self, tls: TlsConfig) -> ConsulConfig {
        let address = ConsulAddress::Https(format!("{}:{}", self.host, self.port));
        ConsulConfig { address, tls, ..ConsulConfig::default() }
    }
}

async fn ask(client: &Client) -> Result<(), String> {
    let answer = client.get::<Value>(&request(NAMES), LIMIT).await;
    answer.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn the_agents_certificate_is_verified() {
    let (ours, others) = (Authority::new(), Authority::new());
    ours.sign("server.dc1.consul");
    ours.sign("127.0.0.1");
    let by_name = ours.serve("server.dc1.consul", None).await;
    let by_address = ours.serve("127.0.0.1", None).await;
    let ca = |authority: &Authority| Some(authority.path("ca.pem"));
    let by_host = Server { host: "localhost", ..ours.serve("127.0.0.1", None).await };
    let named = Some("server.dc1.consul".to_owned());
    let addressed = Some("127.0.0.1".to_owned());
    let none = TlsConfig::default();
    let table = [
        (&by_address, TlsConfig { ca_file: ca(&ours), ..none.clone() }, None),
        (&by_address, TlsConfig { ca_path: Some(ours.dir.path().into()), ..none.clone() }, None),
        (
            &by_address,
            TlsConfig { ca_file: ca(&others), ..none.clone() },
            Some("no known authority signed the agent's certificate"),
        ),
        (
            &by_name,
            TlsConfig { ca_file: ca(&ours), ..none.clone() },
            Some("is for another name: set consul.tls_server_name"),
        ),
        (&by_name, TlsConfig { ca_file: ca(&ours), server_name: named, ..none.clone() }, None),
        (&by_name, TlsConfig { verify: false, ..none.clone() }, None),
        (&by_host, TlsConfig { ca_file: ca(&ours), server_name: addressed, ..none.clone() }, None),
        (
            &by_name,
            TlsConfig { ca_file: Some(ours.path("127.0.0.1.key")), ..none.clone() },
            Some("127.0.0.1.key holds no certificate in PEM"),
        ),
        (
            &by_name,
            TlsConfig { ca_path: Some(Path::new("/nowhere").into()), ..none },
            Some("can't read consul.ca_path /nowhere"),
        ),
    ];
    for (server, tls, problem) in table {
        let what = format!("{tls:?}");
        let answer = ask(&client(server.config(tls)).0).await;
        match problem {
            None => assert_eq!(answer, Ok(()), "{what}"),
            Some(problem) => {
                assert!(answer.as_ref().is_err_and(|e| e.contains(problem)), "{what}: {answer:?}")
            }
        }
    }
}

#[tokio::test]
async fn a_certificate_that_is_itself_in_ca_file_is_accepted_by_its_name_and_time() {
    let day = |year| rcgen::date_time_ymd(year, 1, 1);
    let (now, past) = ((day(2020), day(4000)), (day(2000), day(2001)));
    let future = (day(3999), day(4000));
    // (CA:TRUE, the name, when it is valid, whether it is in ca_file, what is wrong)
    let cases = [
        (true, "127.0.0.1", now, true, None),
        (false, "127.0.0.1", now, true, None),
        (true, "127.0.0.1", now, false, Some("(CA:TRUE)")),
        (false, "127.0.0.1", now, false, Some("no known authority signed")),
        (true, "other.example", now, true, Some("is for another name")),
        (false, "other.example", now, true, Some("is for another name")),
        (true, "127.0.0.1", past, true, Some("has expired")),
        (false, "127.0.0.1", past, true, Some("has expired")),
        (true, "127.0.0.1", future, true, Some("isn't valid yet")),
        (false, "", now, true, Some("names no host (subjectAltName)")),
    ];
    let authority = Authority::new();
    for (is_ca, name, (from, until), is_listed, problem) in cases {
        let what = format!("CA:{is_ca} {name} {from} {until} {is_listed}");
        let names = Some(name.to_owned()).filter(|name| !name.is_empty());
        let mut params = CertificateParams::new(names.into_iter().collect::<Vec<_>>()).unwrap();
        let unconstrained = IsCa::Ca(BasicConstraints::Unconstrained);
        params.is_ca = if is_ca { unconstrained } else { IsCa::ExplicitNoCa };
        (params.not_before, params.not_after) = (from, until);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        authority.write("self.pem", &certificate.pem());
        authority.write("self.key", &key.serialize_pem());
        let server = authority.serve("self", None).await;
        let listed = authority.path(if is_listed { "self.pem" } else { "ca.pem" });
        let tls = TlsConfig { ca_file: Some(listed), ..TlsConfig::default() };
        let answer = ask(&client(server.config(tls)).0).await;
        // The same each time.
        assert!(!answer.as_ref().is_err_and(|error| error.contains("seconds")), "{answer:?}");
        match problem {
            None => assert_eq!(answer, Ok(()), "{what}"),
            Some(problem) => {
                assert!(answer.as_ref().is_err_and(|e| e.contains(problem)), "{what}: {answer:?}")
            }
        }
    }
}

#[tokio::test]
async fn a_leaf_in_ca_file_is_accepted_without_its_authority_and_its_sibling_is_not() {
    let ours = Authority::new();
    ours.sign("127.0.0.1");
    ours.sign("localhost");
    let server = ours.serve("127.0.0.1", None).await;
    for (leaf, is_accepted) in [("127.0.0.1.pem", true), ("localhost.pem", false)] {
        let tls = TlsConfig { ca_file: Some(ours.path(leaf)), ..TlsConfig::default() };
        assert_eq!(ask(&client(server.config(tls)).0).await.is_ok(), is_accepted, "{leaf}");
    }
}

#[tokio::test]
async fn a_response_that_is_not_consuls_is_reported_with_cause_and_fix() {
    let fake = Fake::start().await;
    let auth = || Some(BasicAuth::new("me:secret").unwrap());
    let moved = "HTTP/1.1 301 IndexMove\r\nLocation: https://consul.example/\r\n";
    let cases = [
        (
            Fault::Status(401, "Authorization Required"),
            None,
            "a proxy before Consul denies access (401, `Authorization Required`): it wants a user \
             and a password; set CONSUL_HTTP_AUTH=USER:PASSWORD"
                .to_owned(),
        ),
        (
            Fault::Status(401, ""),
            auth(),
            "a proxy before Consul denies access (401, ``): it doesn't accept the user and \
             password of CONSUL_HTTP_AUTH"
                .to_owned(),
        ),
        (
            Fault::Status(400, "Client sent an HTTP request to an HTTPS server.\n"),
            None,
            format!(
                "Consul at {0} speaks TLS there: write https://{0} as consul.address or \
                 CONSUL_HTTP_ADDR",
                fake.address
            ),
        ),
    ];
    for (fault, auth, expected) in cases {
        fake.break_path(NAMES, Some(fault));
        let (client, _) = client(ConsulConfig { auth, ..config(fake.address) });
        assert_eq!(ask(&client).await, Err(expected));
    }
    let headers = |lines: &str| {
        let lines = lines.lines().skip(1).filter_map(|line| line.split_once(": "));
        let lines = lines.map(|(key, value)| (key.parse().unwrap(), value.parse().unwrap()));
        lines.collect::<reqwest::header::HeaderMap>()
    };
    let address = ConsulAddress::Http("c:80".into());
    let code = StatusCode::MOVED_PERMANENTLY;
    let error =
        response::check_status(code, &headers(moved), b"", (&address, NAMES), false).unwrap_err();
    let expected = "Consul at c:80 redirects to https://consul.example/: write the address of the \
                    agent itself as consul.address or CONSUL_HTTP_ADDR";
    assert_eq!(error.to_string(), expected);
}

#[tokio::test]
async fn user_and_password_are_sent_with_the_token() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let token = Some(Token::Literal("t0ken".into()));
    let auth = Some(BasicAuth::new("Aladdin:open sesame").unwrap());
    let (client, _) = client(ConsulConfig { token, auth, ..config(address) });
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"\r\n\r\n") {
            assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
        String::from_utf8(seen).unwrap().to_lowercase()
    };
    let (seen, answer) = tokio::join!(serve, ask(&client));
    assert_eq!(answer, Ok(()));
    for header in ["authorization: basic qwxhzgrpbjpvcgvuihnlc2ftzq==", "x-consul-token: t0ken"] {
        assert!(seen.contains(header), "{seen}");
    }
}

/// The server accepts one connection, so the second request reuses it.
#[tokio::test]
async fn the_peer_is_known_on_a_reused_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (client, _) = client(config(address));
    let serve = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        for _ in 0..2 {
            let mut seen = Vec::new();
            while !seen.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut seen).await.unwrap() > 0);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}").await.unwrap();
        }
    };
    let ask_twice = async {
        for _ in 0..2 {
            let response = client.get::<Value>(&request(NAMES), LIMIT).await.unwrap();
            assert_eq!(response.peer, Some(address.ip()));
        }
    };
    tokio::join!(serve, ask_twice);
}

#[tokio::test]
async fn an_agent_without_tls_is_detected() {
    let fake = Fake::start().await;
    let tls = TlsConfig { verify: false, ..TlsConfig::default() };
    let address = ConsulAddress::Https(fake.address.to_string());
    let (client, output) = client(ConsulConfig { address, tls, ..ConsulConfig::default() });
    let limit = Duration::from_millis(300);
    // The fake waits for the rest of what it takes for a request.
    client.get::<Value>(&request(NAMES), limit).await.unwrap_err();
    assert_eq!(output.stats().requests().len(), 1);
}

#[tokio::test]
async fn an_aborted_handshake_is_reported_with_the_certificates() {
    for is_reset in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = ConsulAddress::Https(listener.local_addr().unwrap().to_string());
        let (client, _) = client(ConsulConfig { address, ..ConsulConfig::default() });
        let refuse = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            // A socket that is closed before all is read resets its connection.
            let mut hello = vec![0; if is_reset { 1 } else { 16_384 }];
            assert_ne!(stream.read(&mut hello).await.unwrap(), 0);
        };
        let ((), answer) = tokio::join!(refuse, ask(&client));
        let answer = answer.unwrap_err();
        assert!(answer.contains("don't agree on TLS (") && answer.contains("ca_file"), "{answer}");
    }
}

#[tokio::test]
async fn rotated_certificates_apply_without_a_restart() {
    let (ours, others) = (Authority::new(), Authority::new());
    ours.sign("127.0.0.1");
    others.sign("nohop");
    let server = ours.serve("127.0.0.1", Some(&ours)).await;
    let files = tempfile::tempdir().unwrap();
    let place = |file: &str| files.path().join(file);
    // As a rotation of certificates does: a whole file replaces another.
    let install = |authority: &Authority, file: &str, to: &str| {
        std::fs::copy(authority.path(file), place("fresh")).unwrap();
        std::fs::rename(place("fresh"), place(to)).unwrap();
    };
    install(&others, "ca.pem", "ca.pem");
    install(&others, "nohop.pem", "cert.pem");
    install(&others, "nohop.key", "cert.key");
    let tls = TlsConfig {
        ca_file: Some(place("ca.pem")),
        cert_file: Some(place("cert.pem")),
        key_file: Some(place("cert.key")),
        ..TlsConfig::default()
    };
    let (client, output) = client(server.config(tls));
    let is_refused =
        |answer: Result<(), String>| answer.unwrap_err().contains("don't agree on TLS");
    assert!(is_refused(ask(&client).await), "the agent's authority is unknown here");
    install(&ours, "ca.pem", "ca.pem");
    let answer = ask(&client).await.unwrap_err();
    assert!(answer.contains("don't agree on TLS (received fatal alert: "), "{answer}");
    ours.sign("nohop");
    install(&ours, "nohop.pem", "cert.pem");
    let answer = ask(&client).await.unwrap_err();
    assert!(answer.contains("cert.key don't go together"), "{answer}");
    install(&ours, "nohop.key", "cert.key");
    assert_eq!(ask(&client).await, Ok(()));
    assert_eq!(ask(&client).await, Ok(()));
    let counted: Vec<_> = output.stats().requests().into_iter().collect();
    assert_eq!(counted, [("200".to_owned(), 2), ("unreachable".to_owned(), 2)]);
}

#[test]
fn a_reset_connection_is_reported_with_the_limit() {
    let message = Busy::Status { code: StatusCode::TOO_MANY_REQUESTS, message: "slow".into() };
    let error = QueryError::Busy { busy: message };
    let expected = "Consul is busy (429 Too Many Requests, `slow`): asking again more slowly";
    assert_eq!(error.to_string(), expected);
}
