//! DNS over TLS with a client of the test's own.

use std::path::Path;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
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
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(client)).connect(name, stream).await
}

async fn write(stream: &mut TlsStream<TcpStream>, message: &Message) {
    let bytes = message.to_vec().unwrap();
    let len = u16::try_from(bytes.len()).unwrap();
    stream.write_all(&[&len.to_be_bytes(), &bytes[..]].concat()).await.unwrap();
}

async fn read(stream: &mut TlsStream<TcpStream>) -> Message {
    let read = async {
        let mut bytes = vec![0; usize::from(stream.read_u16().await.unwrap())];
        stream.read_exact(&mut bytes).await.unwrap();
        Message::from_vec(&bytes).unwrap()
    };
    timeout(LONG, read).await.unwrap()
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
    let rig = Rig::with(config, ServerOptions::default()).await;
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
    // And after it, for which a busy machine has time enough.
    let options = ServerOptions { tcp_idle_timeout: LONG / 3, ..ServerOptions::default() };
    let rig = Rig::with(config(dir.path()), options).await;
    let mut stream = connect(rig.tls_address, &roots).await.unwrap();
    stream.write_all(&[0, 40, 1]).await.unwrap();
    let read = timeout(LONG, stream.read(&mut buffer)).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
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
