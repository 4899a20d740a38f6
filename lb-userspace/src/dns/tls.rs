//! DNS over TLS (RFC 7858), by hickory-server: it reads the queries of a connection and has them
//! answered by its `RequestHandler`, which is the zone and the forwarder that plain TCP has, too.
//!
//! hickory-server's own `Server` would accept connections without a limit, and spins where accept()
//! fails for lack of file descriptors, so the listener and its limits are those of `tcp`. A
//! `ResponseHandler` takes decoded records alone; responses go out as the bytes that they are, so
//! records that this version of hickory can't decode pass, as over the other transports.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use hickory_proto::op::{Header, HeaderCounts, Metadata, SerialMessage};
use hickory_server::net::runtime::iocompat::AsyncIoTokioAsStd;
use hickory_server::net::runtime::{Time, TokioTime};
use hickory_server::net::tls::tls_from_stream;
use hickory_server::net::xfer::Protocol;
use hickory_server::net::{BufDnsStreamHandle, DnsStreamHandle};
use hickory_server::server::{
    Request, RequestHandler, ResponseHandle, ResponseHandler, ResponseInfo, TimeoutStream,
    default_tls_server_config,
};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tracing::{info, warn};

use super::connections::{ConnectionGuard, MAX_PIPELINED};
use super::encode;
use super::handler::Handler;
use super::message::MalformedQuery;
use crate::config::DnsConfig;
use crate::config::consul::{read_certificates, read_key};
use crate::file_state::{FileState, file_state};

/// Why the listeners of `dns.listen_tls` have no certificate.
#[derive(Debug, thiserror::Error)]
#[error("can't serve DNS over TLS: {0}")]
pub struct CertificateError(String);

/// The certificate of `dns.listen_tls`, which is read again when its files change.
#[derive(Debug)]
struct ServerCertificate {
    cert_file: PathBuf,
    key_file: PathBuf,
    loaded: Mutex<([FileState; 2], Arc<CertifiedKey>)>,
}

/// Prepares the handshakes of `dns.listen_tls`; `None` where that is empty.
///
/// # Errors
/// When a file can't be used: which, why, and what to do.
pub fn server_config(config: &DnsConfig) -> Result<Option<Arc<ServerConfig>>, CertificateError> {
    if config.listen_tls.is_empty() {
        return Ok(None);
    }
    let certificate = ServerCertificate::new(config).map_err(CertificateError)?;
    let tls = default_tls_server_config(b"dot", Arc::new(certificate));
    let tls = tls.map_err(|error| CertificateError(error.to_string()))?;
    Ok(Some(Arc::new(tls)))
}

impl ServerCertificate {
    fn new(config: &DnsConfig) -> Result<ServerCertificate, String> {
        let path = |file: &Option<PathBuf>| file.clone().unwrap_or_default(); // validated
        let (cert_file, key_file) = (path(&config.tls_cert_file), path(&config.tls_key_file));
        let states = [&cert_file, &key_file].map(|path| file_state(path));
        let key = read(&cert_file, &key_file)?;
        Ok(ServerCertificate { cert_file, key_file, loaded: Mutex::new((states, key)) })
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken before the files are read: a change in between is found by the next handshake.
        let states = [&self.cert_file, &self.key_file].map(|path| file_state(path));
        if loaded.0 != states {
            loaded.0 = states; // also of files that are bad, so that each version is reported once
            match read(&self.cert_file, &self.key_file) {
                Ok(key) => {
                    info!("read the certificate of dns.listen_tls again, as its files changed");
                    loaded.1 = key;
                }
                Err(error) => warn!("the former certificate of dns.listen_tls stays: {error}"),
            }
        }
        Some(Arc::clone(&loaded.1))
    }
}

fn read(cert_file: &Path, key_file: &Path) -> Result<Arc<CertifiedKey>, String> {
    let of = |key: &str, path: &Path, what: String| format!("{key} {} {what}", path.display());
    let chain =
        read_certificates(cert_file).map_err(|what| of("dns.tls_cert_file", cert_file, what))?;
    let key = read_key(key_file).map_err(|what| of("dns.tls_key_file", key_file, what))?;
    CertifiedKey::from_der(chain, key, &ring::default_provider()).map(Arc::new).map_err(|error| {
        format!(
            "dns.tls_cert_file {} and dns.tls_key_file {} don't belong together ({error}); name a \
             certificate, and after it those that signed it, and the key of the first one",
            cert_file.display(),
            key_file.display()
        )
    })
}

/// Answers the queries of one connection, until its client is idle for `idle_timeout`.
///
/// # Errors
/// When the handshake fails, or the client doesn't keep to the protocol.
pub(super) async fn serve_connection(
    stream: TcpStream,
    client: SocketAddr,
    acceptor: TlsAcceptor,
    handler: Arc<Handler>,
    connection: &ConnectionGuard,
    idle_timeout: Duration,
    mut stops: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(idle_timeout, acceptor.accept(stream)) => accepted??,
        () = connection.evicted() => return Ok(()),
        _ = stops.wait_for(|stops| *stops) => return Ok(()),
    };
    let (messages, responses) = tls_from_stream(AsyncIoTokioAsStd(accepted), client);
    // To wait for a message is what sends the responses, too.
    let mut messages = TimeoutStream::new(messages, idle_timeout);
    let tls_client = TlsClient { handler, client, responses };
    let mut answers = FuturesUnordered::new();
    let ended = loop {
        tokio::select! {
            message = messages.next(), if answers.len() < MAX_PIPELINED => match message {
                Some(Ok(message)) if connection.set_busy(true) => {
                    let tls_client = tls_client.clone();
                    answers.push(async move { tls_client.answer(message.into_parts().0).await });
                }
                Some(Err(error)) => break Err(error),
                Some(Ok(_)) | None => break Ok(()),
            },
            Some(()) = answers.next(), if !answers.is_empty() => {
                if answers.is_empty() {
                    connection.set_busy(false);
                }
            }
            () = connection.evicted() => return Ok(()),
            _ = stops.wait_for(|stops| *stops) => break Ok(()),
        }
    };
    while answers.next().await.is_some() {}
    let _ = messages.next().now_or_never();
    ended
}

/// The client of one connection.
#[derive(Clone)]
struct TlsClient {
    handler: Arc<Handler>,
    client: SocketAddr,
    responses: BufDnsStreamHandle,
}

impl TlsClient {
    async fn answer(&self, bytes: Vec<u8>) {
        match Request::from_bytes(bytes.clone(), self.client, Protocol::Tls) {
            Ok(request) => {
                let responses = self.responses.clone();
                let response = ResponseHandle::new(self.client, responses, Protocol::Tls);
                self.handle_request::<_, TokioTime>(&request, response).await;
            }
            Err(_) => {
                let mut out = Vec::new();
                encode::to_malformed(&mut out, &bytes, MalformedQuery::Format);
                self.send(out);
            }
        }
    }

    fn send(&self, response: Vec<u8>) {
        // The queue has room for more than MAX_PIPELINED; where it is closed, so is the connection.
        let _ = self.responses.clone().send(SerialMessage::new(response, self.client));
    }
}

#[async_trait::async_trait]
impl RequestHandler for TlsClient {
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        _response: R,
    ) -> ResponseInfo {
        let client = self.client.ip();
        if let Some(response) = self.handler.reply_over_tcp(request.as_slice(), client).await {
            self.send(response);
        }
        let metadata = Metadata::response_from_request(&request.metadata);
        Header { metadata, counts: HeaderCounts::default() }.into()
    }
}
