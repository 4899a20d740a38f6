//! The certificate of DNS over TLS (RFC 7858). Connections are served by `tcp`, with the limits and the
//! handler of plain TCP.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use hickory_server::server::default_tls_server_config;
use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tracing::{info, warn};

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
