//! TLS with the agent: which certificates are trusted and shown, read again when their files change.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore,
    SignatureScheme, WantsVerifier,
};

use super::error::is_authority_as_agent;
use crate::config::TlsConfig;
use crate::config::consul::{read_certificates, read_key};
use crate::file_state::{FileState, file_state};

/// The most files of a directory of authorities that are read.
const MAX_CA_FILES: usize = 1024;

/// TLS as it was configured, and what its files had when they were last read.
#[derive(Debug)]
pub struct Tls {
    config: TlsConfig,
    read: Mutex<Option<Files>>,
}

#[derive(Debug)]
struct Files {
    stamps: Vec<FileState>,
    client: Arc<ClientConfig>,
}

impl Tls {
    /// TLS that reads its files when they are first needed.
    pub fn new(config: TlsConfig) -> Self {
        if !config.verify {
            tracing::warn!(
                "the certificate of the Consul agent isn't verified: whoever is between may read \
                 the token and send connects anywhere; set consul.ca_file and verify = true"
            );
        }
        Tls { config, read: Mutex::default() }
    }

    /// The certificates as their files have them now.
    ///
    /// # Errors
    /// What is wrong with a file, and the fix.
    pub fn client(&self) -> Result<Arc<ClientConfig>, String> {
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at before they are read: one that changes meanwhile is read again next time.
        let stamps = self.stamps();
        if let Some(files) = read.as_ref().filter(|files| files.stamps == stamps) {
            return Ok(files.client.clone());
        }
        let client = Arc::new(self.read_files()?);
        if read.is_some() {
            tracing::info!("read the certificates for Consul again, since their files changed");
        }
        *read = Some(Files { stamps, client: client.clone() });
        Ok(client)
    }

    /// Reads the files again next time, since a handshake failed by what they had.
    pub fn invalidate(&self) {
        *self.read.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// The name that the agent's certificate must have: the configured one, or else the host of
    /// `authority`.
    ///
    /// # Errors
    /// That it is no name that a certificate can have.
    pub fn server_name(&self, authority: &str) -> Result<ServerName<'static>, String> {
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        self.configured_name()?.map_or_else(|| parse_name(host), Ok)
    }

    fn configured_name(&self) -> Result<Option<ServerName<'static>>, String> {
        self.config.server_name.as_deref().map(parse_name).transpose()
    }

    fn stamps(&self) -> Vec<FileState> {
        let TlsConfig { ca_file, ca_path, cert_file, key_file, .. } = &self.config;
        let in_ca_path = ca_path.iter().flat_map(|path| files_in(path).unwrap_or_default());
        let files = [ca_file, cert_file, key_file].into_iter().flatten().cloned();
        files.chain(in_ca_path).map(|path| file_state(&path)).collect()
    }

    fn read_files(&self) -> Result<ClientConfig, String> {
        let TlsConfig { cert_file, key_file, verify, .. } = &self.config;
        let provider = Arc::new(ring::default_provider());
        let builder =
            builder(provider.clone())?.dangerous().with_custom_certificate_verifier(match verify {
                true => {
                    let certificates = self.certificates()?;
                    let listed = certificates.iter().cloned().collect();
                    let roots = roots(certificates)?;
                    let inner = WebPkiServerVerifier::builder_with_provider(roots.into(), provider)
                        .build()
                        .map_err(|error| format!("the authorities can't be used ({error})"))?;
                    Arc::new(AcceptListed { inner, listed, name: self.configured_name()? })
                }
                false => Arc::new(AcceptAll(provider)),
            });
        let mut client = match (cert_file, key_file) {
            (Some(cert), Some(key)) => {
                let chain = named("consul.cert_file", cert, read_certificates)?;
                let secret = named("consul.key_file", key, read_key)?;
                builder.with_client_auth_cert(chain, secret).map_err(|error| {
                    format!(
                        "consul.cert_file {} and consul.key_file {} don't go together ({error})",
                        cert.display(),
                        key.display()
                    )
                })?
            }
            _ => builder.with_no_client_auth(),
        };
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(client)
    }

    /// A configuration that accepts no certificate, for connections without TLS.
    ///
    /// # Errors
    /// As [`Tls::client`], which no provider of ours brings about.
    pub fn unused() -> Result<Arc<ClientConfig>, String> {
        let builder = builder(Arc::new(ring::default_provider()))?;
        let builder = builder.with_root_certificates(RootCertStore::empty());
        Ok(Arc::new(builder.with_no_client_auth()))
    }

    /// The certificates of the authorities that are trusted.
    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let TlsConfig { ca_file, ca_path, .. } = &self.config;
        let mut certificates = Vec::new();
        if let Some(path) = ca_file {
            certificates.extend(named("consul.ca_file", path, read_certificates)?);
        }
        if let Some(path) = ca_path {
            let files = files_in(path).map_err(|error| {
                format!("can't read consul.ca_path {} ({error})", path.display())
            })?;
            // Such a directory has other files in it too.
            certificates.extend(files.iter().flat_map(|file| read_certificates(file)).flatten());
        }
        if ca_file.is_none() && ca_path.is_none() {
            certificates = rustls_native_certs::load_native_certs().certs;
        }
        Ok(certificates)
    }
}

fn builder(
    provider: Arc<CryptoProvider>,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, String> {
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| format!("TLS can't be set up ({error})"))
}

fn parse_name(name: &str) -> Result<ServerName<'static>, String> {
    ServerName::try_from(name.to_owned()).map_err(|_| {
        format!("`{name}` can't be in a certificate; set consul.tls_server_name to what is")
    })
}

fn roots(certificates: Vec<CertificateDer<'static>>) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    let (n_added, _) = roots.add_parsable_certificates(certificates);
    match n_added {
        0 => Err("no authority is known that could have signed the agent's certificate: set \
                  consul.ca_file or CONSUL_CACERT"
            .into()),
        _ => Ok(roots),
    }
}

/// Adds the key and the file to a reader's error.
fn named<T>(
    key: &str,
    path: &Path,
    read: impl Fn(&Path) -> Result<T, String>,
) -> Result<T, String> {
    read(path).map_err(|what| format!("{key} {} {what}", path.display()))
}

/// The files of a directory, in a stable order.
fn files_in(path: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(path)?.take(MAX_CA_FILES);
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    Ok(files)
}

/// Whether a certificate is refused for its issuer: an unknown authority, or, where a known one has
/// its name, another one.
fn is_of_chain(cause: &CertificateError) -> bool {
    matches!(cause, CertificateError::UnknownIssuer | CertificateError::BadSignature)
        || is_authority_as_agent(cause)
}

/// Accepts what the authorities signed and, as curl and Go do, a certificate that is itself among
/// theirs, byte for byte: webpki alone refuses a self-signed one with CA:TRUE, which `openssl req
/// -x509` makes. Its time and its name are verified all the same.
#[derive(Debug)]
struct AcceptListed {
    inner: Arc<WebPkiServerVerifier>,
    listed: HashSet<CertificateDer<'static>>,
    /// The configured name. It may be an IP address, which a URL can't have in the place of the
    /// address to connect to.
    name: Option<ServerName<'static>>,
}

impl ServerCertVerifier for AcceptListed {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let server_name = self.name.as_ref().unwrap_or(server_name);
        let verified = self.inner.verify_server_cert(
            end_entity,
            intermediates,
            server_name,
            ocsp_response,
            now,
        );
        match verified {
            // Webpki checks the time before it looks for the issuer, so that one is right
            // where it fails so. The name it looks at last.
            Err(rustls::Error::InvalidCertificate(cause))
                if is_of_chain(&cause) && self.listed.contains(end_entity) =>
            {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// Accepts any certificate (`consul.verify = false`); the handshake's signature is still verified.
#[derive(Debug)]
struct AcceptAll(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAll {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
