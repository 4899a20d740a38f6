//! DNS over TLS (RFC 7858): the certificate, and hickory-server's `RequestHandler`. Connections are
//! served by `tcp`, with the limits of plain TCP.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::Instant;

use async_trait::async_trait;
use futures_util::StreamExt;
use hickory_proto::op::{Header, HeaderCounts, MessageType, Metadata, SerialMessage};
use hickory_server::net::runtime::{Time, TokioTime};
use hickory_server::net::xfer::Protocol;
use hickory_server::net::{BufDnsStreamHandle, DnsStreamHandle};
use hickory_server::server::{
    Request, RequestHandler, ResponseHandle, ResponseHandler, ResponseInfo,
    default_tls_server_config,
};
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tracing::{info, warn};

use super::handler::Handler;
use super::message::ClientQuery;
use super::query_log::Arrival;
use super::sockets::Transport;
use crate::capabilities;
use crate::config::DnsConfig;
use crate::config::consul::{read_certificates, read_key};
use crate::file_state::{FileState, file_state};

/// Why the listeners of `dns.listen_tls` have no certificate.
#[derive(Debug, thiserror::Error)]
#[error("can't serve DNS over TLS: {0}")]
pub struct CertificateError(String);

/// The certificate of `dns.listen_tls`. A thread of its own reads the files, since those that serve clients
/// may not: they can be another user's.
#[derive(Debug)]
struct ServerCertificate {
    requests: Sender<SyncSender<Arc<CertifiedKey>>>,
}

/// The files of the certificate, read again when they change.
struct CertificateFiles {
    cert_file: PathBuf,
    key_file: PathBuf,
    states: [FileState; 2],
    key: Arc<CertifiedKey>,
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
        let mut files = CertificateFiles::read(config)?;
        let (requests, requested) = channel::<SyncSender<_>>();
        let serve = move || {
            capabilities::for_files();
            for reply in requested {
                // A handshake that has ended doesn't wait.
                let _ = reply.send(files.current());
            }
        };
        let thread = thread::Builder::new().name("certificate".to_owned()).spawn(serve);
        thread.map_err(|error| format!("can't start a thread: {error}"))?;
        Ok(ServerCertificate { requests })
    }
}

impl CertificateFiles {
    fn read(config: &DnsConfig) -> Result<CertificateFiles, String> {
        let path = |file: &Option<PathBuf>| file.clone().unwrap_or_default(); // validated
        let (cert_file, key_file) = (path(&config.tls_cert_file), path(&config.tls_key_file));
        let states = [&cert_file, &key_file].map(|path| file_state(path));
        let key = read(&cert_file, &key_file)?;
        Ok(CertificateFiles { cert_file, key_file, states, key })
    }

    fn current(&mut self) -> Arc<CertifiedKey> {
        // Taken before the files are read: a change in between is found by the next handshake.
        let states = [&self.cert_file, &self.key_file].map(|path| file_state(path));
        if self.states != states {
            self.states = states; // also of files that are bad, so that each version is reported once
            match read(&self.cert_file, &self.key_file) {
                Ok(key) => {
                    info!("read the certificate of dns.listen_tls again, as its files changed");
                    self.key = key;
                }
                Err(error) => warn!("the former certificate of dns.listen_tls stays: {error}"),
            }
        }
        Arc::clone(&self.key)
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let (reply, key) = sync_channel(1);
        self.requests.send(reply).ok()?;
        key.recv().ok()
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

/// The zone and the forwarder behind hickory-server's [`RequestHandler`], for one message.
struct TlsRequestHandler {
    handler: Arc<Handler>,
    arrival: Arrival,
    responses: BufDnsStreamHandle,
}

#[async_trait]
impl RequestHandler for TlsRequestHandler {
    /// Sends the response as bytes: a [`ResponseHandler`] takes decoded records only, and an
    /// upstream's response may have some that hickory-proto can't decode.
    async fn handle_request<R: ResponseHandler, T: Time>(
        &self,
        request: &Request,
        _: R,
    ) -> ResponseInfo {
        let Metadata { id, op_code, .. } = request.metadata;
        if let Some(response) = self.handler.reply(request.as_slice(), &self.arrival).await {
            let sent = self.responses.clone().send(SerialMessage::new(response, request.src()));
            debug_assert!(sent.is_ok(), "{sent:?}");
        }
        let metadata = Metadata::new(id, MessageType::Response, op_code);
        Header { metadata, counts: HeaderCounts::default() }.into()
    }
}

/// The response to a message over TLS, which is that of plain TCP; `None` where there is none.
///
/// hickory-server decodes all records and options of a message, to a multiple of its size. So it
/// gets the messages of served clients within their rate alone, and of these what a response
/// depends on. A message that isn't a query doesn't get to it.
pub(super) async fn reply(
    handler: Arc<Handler>,
    message: &[u8],
    client: SocketAddr,
) -> Option<Vec<u8>> {
    let arrival = Arrival { client, transport: Transport::Tcp, at: Instant::now() };
    if let Some(refusal) = handler.refusal(&handler.policy(), message, &arrival) {
        return refusal;
    }
    let request = ClientQuery::read(message)
        .ok()
        .and_then(|query| Request::from_bytes(query.essentials(), client, Protocol::Tls).ok());
    let Some(request) = request else {
        return handler.reply(message, &arrival).await;
    };
    let (stream, mut responses) = BufDnsStreamHandle::new(client);
    let response_handle = ResponseHandle::new(client, stream.clone(), Protocol::Tls);
    let requests = TlsRequestHandler { handler, arrival, responses: stream };
    requests.handle_request::<_, TokioTime>(&request, response_handle).await;
    drop(requests); // the last sender
    responses.next().await.map(|response| response.into_parts().0)
}
