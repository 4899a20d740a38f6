//! DNS over TLS with a client of the test's own.

use std::path::Path;

use hickory_server::net::xfer::Protocol;
use hickory_server::server::Request;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::client::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::config::Allowed;
use crate::dns::connections::Connections;
use crate::dns::message::ClientQuery;
use crate::dns::tcp;
use crate::dns::tls::server_config;

/// Writes a certificate for localhost and its key.
fn issue(dir: &Path) -> RootCertStore {
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    std::fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
    std::fs::write(dir.join("key.pem"), signing_key.serialize_pem()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    roots
}

fn config(dir: &Path) -> DnsConfig {
    DnsConfig {
        listen_tls: vec!["127.0.0.1:0".parse().unwrap()],
        tls_cert_file: Some(dir.join("cert.pem")),
        tls_key_file: Some(dir.join("key.pem")),
        ..Config::default().dns
    }
}

async fn connect(
    address: SocketAddr,
    roots: &RootCertStore,
) -> std::io::Result<TlsStream<TcpStream>> {
    handshake(TcpStream::connect(address).await?, roots).await
}

async fn handshake(
    stream: TcpStream,
    roots: &RootCertStore,
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(client)).connect(name, stream).await
}

async fn write(stream: &mut TlsStream<TcpStream>, message: &Message) {
    write_message(stream, &message.to_vec().unwrap()).await;
    stream.flush().await.unwrap();
}

async fn read(stream: &mut TlsStream<TcpStream>) -> Message {
    let bytes = timeout(LONG, read_message(stream)).await.unwrap().unwrap();
    Message::from_vec(&bytes).unwrap()
}

/// Both ends of a connection.
async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (client, listener.accept().await.unwrap().0)
}

/// The responses to messages that are sent one after the other, each with its length, until the
/// server ends the connection; and whether it did.
async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    messages: &[Vec<u8>],
) -> (Vec<Vec<u8>>, bool) {
    let mut responses = Vec::new();
    for message in messages {
        stream.write_all(message).await.unwrap();
        stream.flush().await.unwrap();
        match timeout(LONG * 6, read_message(&mut stream)).await.unwrap() {
            Ok(response) => responses.push(response),
            Err(_) => return (responses, true),
        }
    }
    (responses, false)
}

#[tokio::test]
async fn queries_over_tls_are_answered_as_they_are_ready() {
    let dir = tempfile::tempdir().unwrap();
    let roots = issue(dir.path());
    let mut upstream = FakeUpstream::new(|_, asked| {
        let is_slow = asked.queries[0].name.to_string().starts_with("slow");
        if is_slow { Vec::new() } else { vec![answer(asked, [192, 0, 2, 7])] }
    })
    .await;
    let forward = Forward::Servers(vec![upstream.address]);
    let config = DnsConfig { forward, ..config(dir.path()) };
    let rig = Rig::with(config, patient()).await;
    let mut stream = connect(rig.tls_address, &roots).await.unwrap();
    let slow = query("slow.example.", RecordType::A);
    write(&mut stream, &slow).await;
    upstream.next_asked().await;
    for name in ["WeB.service.", "example.com."] {
        let asked = query(name, RecordType::A);
        write(&mut stream, &asked).await;
        let answer = read(&mut stream).await;
        assert_eq!(answer.metadata.id, asked.metadata.id, "{name} waits for the slow one");
        assert_eq!(answer.queries[0].to_string(), format!("{name} IN A"));
        assert_eq!(answer.answers.len(), 1);
    }
    timeout(LONG, rig.server.stop()).await.unwrap();
}

#[tokio::test]
async fn tls_clients_have_the_limits_of_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let roots = issue(dir.path());
    let options =
        ServerOptions { tcp_idle_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let rig = Rig::with(config(dir.path()), options).await;
    // Idle before and in the handshake.
    let mut silent = TcpStream::connect(rig.tls_address).await.unwrap();
    let mut half = TcpStream::connect(rig.tls_address).await.unwrap();
    half.write_all(&[22, 3, 1]).await.unwrap();
    let mut buffer = [0; 64];
    for stream in [&mut silent, &mut half] {
        let read = timeout(LONG, stream.read(&mut buffer)).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    }
    // And after it: the time for the handshake isn't limited here.
    let (client, server) = pair().await;
    let acceptor = TlsAcceptor::from(server_config(&config(dir.path())).unwrap().unwrap());
    let (client, server) = tokio::join!(handshake(client, &roots), acceptor.accept(server));
    let (mut client, (reader, writer)) = (client.unwrap(), tokio::io::split(server.unwrap()));
    client.write_all(&[0, 40, 1]).await.unwrap();
    client.flush().await.unwrap();
    let connection = Arc::new(Connections::default()).open(None).unwrap();
    let (_running, stops) = watch::channel(false);
    let reply = |_| std::future::ready(None);
    let served = tcp::serve_queries(reader, writer, reply, &connection, Duration::ZERO, stops);
    let error = timeout(LONG, served).await.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
}

#[tokio::test]
async fn each_message_has_the_outcome_of_plain_tcp() {
    let dir = tempfile::tempdir().unwrap();
    let roots = issue(dir.path());
    let config = DnsConfig {
        allow: vec![Allowed::Network("203.0.113.0/24".parse().unwrap())],
        client_rate: 1,
        ..config(dir.path())
    };
    let acceptor = TlsAcceptor::from(server_config(&config).unwrap().unwrap());
    let rig = Rig::with(config, ServerOptions::default()).await;
    let stats = || rig.server.handler.stats.snapshot();

    let good = query("web.service.", RecordType::A).to_vec().unwrap();
    let framed =
        |bytes: &[u8]| [&u16::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat();
    let mut missing = good.clone();
    missing[7] = 1;
    let loop_name = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
    let with = |changes: &[(usize, u8)], more: &[u8]| {
        let mut message = [&good, more].concat();
        changes.iter().for_each(|(place, byte)| message[*place] = *byte);
        message
    };
    let odd_type = with(&[(good.len() - 4, 0xff)], &[]);
    // An address of three bytes, and an option of one that should have four: hickory-proto decodes
    // neither, and no response depends on them.
    let bad_record = with(&[(7, 1)], &[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 3, 1, 2, 3]);
    let bad_option = with(&[(11, 1)], &[0, 0, 41, 4, 0, 0, 0, 0, 0, 0, 5, 0, 8, 0, 1, 9]);
    let edns_1 = with(&[(11, 1)], &[0, 0, 41, 4, 0, 0, 1, 0x80, 0, 0, 0]);
    for message in [&good, &odd_type, &bad_record, &bad_option, &edns_1] {
        let query = ClientQuery::read(message).unwrap();
        let essentials = query.essentials();
        let same = ClientQuery::read(&essentials).unwrap();
        assert!(Request::from_bytes(essentials.clone(), rig.address, Protocol::Tls).is_ok());
        assert!(essentials.len() <= 282 && essentials[..4] == message[..4]);
        assert_eq!((same.question(), same.edns), (query.question(), query.edns));
    }
    // One a second is allowed; no machine is so slow that none of so many comes sooner.
    let flood = vec![framed(&good); 1000];
    let (refused, form_err) = (Some(ResponseCode::Refused), Some(ResponseCode::FormErr));
    let no_error = Some(ResponseCode::NoError);
    // 16 is BADVERS and BADSIG, by which hickory-proto decodes it.
    let bad_vers = Some(ResponseCode::BADSIG);
    let rows = [
        ("admitted", [127, 0, 0], vec![framed(&good)], no_error, false),
        ("outside dns.allow", [192, 0, 2], vec![framed(&good)], refused, false),
        ("over dns.client_rate", [203, 0, 113], flood, no_error, true),
        ("a type without a name", [127, 0, 0], vec![framed(&odd_type)], no_error, false),
        ("a bad record", [127, 0, 0], vec![framed(&bad_record)], no_error, false),
        ("a bad option", [127, 0, 0], vec![framed(&bad_option)], no_error, false),
        ("EDNS version 1", [127, 0, 0], vec![framed(&edns_1)], bad_vers, false),
        ("a record missing", [127, 0, 0], vec![framed(&missing)], form_err, false),
        ("a name in a loop", [127, 0, 0], vec![framed(&loop_name)], None, true),
        ("below a header", [127, 0, 0], vec![framed(&good[..11])], None, true),
        ("empty", [127, 0, 0], vec![framed(&[])], None, true),
        // The length alone ends the connection.
        ("too long", [127, 0, 0], vec![4097_u16.to_be_bytes().to_vec()], None, true),
    ];
    for (what, [a, b, c], messages, expected, expected_end) in rows {
        let mut outcomes = Vec::new();
        for (acceptor, d) in [(None, 1), (Some(acceptor.clone()), 2)] {
            let before = stats();
            let (client, server) = pair().await;
            let over_tls = acceptor.is_some();
            let (handler, address) = (rig.server.handler.clone(), ([a, b, c, d], 5353).into());
            let (running, stops) = watch::channel(false);
            let server = tokio::spawn(async move {
                let connection = Arc::new(Connections::default()).open(None).unwrap();
                let (connection, idle) = (&connection, LONG * 60);
                tcp::serve_connection(server, address, acceptor, handler, connection, idle, stops)
                    .await
            });
            let (mut responses, ended) = if over_tls {
                exchange(handshake(client, &roots).await.unwrap(), &messages).await
            } else {
                exchange(client, &messages).await
            };
            running.send_replace(true);
            let _ = timeout(LONG * 6, server).await.unwrap().unwrap();
            responses.dedup();
            let counted: Vec<String> = stats()
                .into_iter()
                .filter(|(name, count)| before.get(name) != Some(count))
                .map(|(name, _)| name)
                .collect();
            outcomes.push((responses, ended, counted));
        }
        assert_eq!(outcomes[0], outcomes[1], "{what}");
        let (responses, ended, _) = &outcomes[1];
        let codes: Vec<ResponseCode> = responses
            .iter()
            .map(|bytes| Message::from_vec(bytes).unwrap().metadata.response_code)
            .collect();
        assert_eq!((codes, *ended), (Vec::from_iter(expected), expected_end), "{what}");
    }
}

#[tokio::test]
async fn the_longest_idle_tls_connection_makes_room() {
    let dir = tempfile::tempdir().unwrap();
    let roots = issue(dir.path());
    let rig = Rig::with(config(dir.path()), ServerOptions::default()).await;
    let mut first = connect(rig.tls_address, &roots).await.unwrap();
    write(&mut first, &query("web.service.", RecordType::A)).await;
    assert_eq!(read(&mut first).await.answers.len(), 1);
    // Plain connections count with those of TLS; a response shows that one was accepted.
    let mut others = Vec::new();
    let question = query("web.service.", RecordType::A).to_vec().unwrap();
    for _ in 0..256 {
        let mut stream = TcpStream::connect(rig.address).await.unwrap();
        write_message(&mut stream, &question).await;
        timeout(LONG, read_message(&mut stream)).await.unwrap().unwrap();
        others.push(stream);
    }
    let mut buffer = [0; 64];
    let read = timeout(LONG, first.read(&mut buffer)).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
}

#[tokio::test]
async fn a_certificate_that_cannot_be_used_names_file_and_fix() {
    let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    issue(dir.path());
    issue(other.path());
    let good = config(dir.path());
    assert!(server_config(&good).unwrap().is_some());
    let swapped = DnsConfig { tls_key_file: Some(other.path().join("key.pem")), ..good.clone() };
    let no_key = DnsConfig { tls_key_file: Some(dir.path().join("cert.pem")), ..good.clone() };
    let absent = DnsConfig { tls_cert_file: Some("/nonexistent".into()), ..good.clone() };
    for (config, expected) in [
        (swapped, "don't belong together"),
        (no_key, "cert.pem holds no private key in PEM; write one"),
        (absent, "dns.tls_cert_file /nonexistent can't be read"),
    ] {
        let error = server_config(&config).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(server_config(&DnsConfig { listen_tls: vec![], ..good }).unwrap().is_none());
}
