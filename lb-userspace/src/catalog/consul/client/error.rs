//! Why there is no answer.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::StatusCode;

use super::super::kill_switch::PATH as SWITCH_PATH;

/// Why there is no answer, with the fix.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// No connection.
    #[error(
        "can't reach Consul at {address} ({}): start its agent, or fix consul.address or \
         CONSUL_HTTP_ADDR",
        root_cause(.source)
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// Why not.
        source: reqwest::Error,
    },
    /// The files for TLS can't be used.
    #[error("can't speak TLS with Consul: {what}")]
    TlsFile {
        /// The key, the file, what is wrong with it, and the fix.
        what: String,
    },
    /// One side doesn't accept the other's certificate, or doesn't speak TLS at all.
    #[error("Consul at {address} and nohop don't agree on TLS ({source}): {fix}")]
    Tls {
        /// Where Consul is.
        address: String,
        /// The error of TLS.
        source: Box<dyn Error + Send + Sync>,
        /// What to do.
        fix: &'static str,
    },
    /// The agent requires TLS, and the address is `http`.
    #[error(
        "Consul at {address} speaks TLS there: write https://{address} as consul.address or \
         CONSUL_HTTP_ADDR"
    )]
    WantsTls {
        /// Where Consul is.
        address: String,
    },
    /// The address leads to another one, which isn't followed: the token is meant for this one.
    #[error(
        "Consul at {address} redirects to {to}: write the address of the agent itself as \
         consul.address or CONSUL_HTTP_ADDR"
    )]
    Redirected {
        /// Where Consul should be.
        address: String,
        /// Where the answer leads.
        to: String,
    },
    /// 401, which Consul itself never answers.
    #[error(
        "a proxy before Consul denies access (401, `{message}`): {}",
        if *.has_auth {
            "it doesn't accept the user and password of CONSUL_HTTP_AUTH"
        } else {
            "it wants a user and a password; set CONSUL_HTTP_AUTH=USER:PASSWORD"
        }
    )]
    Unauthorized {
        /// The first line of the body.
        message: String,
        /// Whether a user and a password were sent.
        has_auth: bool,
    },
    /// 429 or 503, or a connection that the agent closed before an answer, as it does past its
    /// limit of connections.
    #[error("{busy}: asking again more slowly")]
    Busy {
        /// How it reported it.
        busy: Busy,
    },
    /// The answer didn't come in time.
    #[error("Consul at {address} gave no answer within {limit:?}: look at its agent's log")]
    Hung {
        /// Where Consul is.
        address: String,
        /// How long it had.
        limit: Duration,
    },
    /// The answer began, and its end didn't come in time.
    #[error("Consul at {address} began an answer and didn't end it within {limit:?}")]
    Slow {
        /// Where Consul is.
        address: String,
        /// How long the body had.
        limit: Duration,
    },
    /// 403.
    #[error(
        "Consul denies access (403, `{message}`): the token needs service:read and node:read; see \
         consul.token_file and CONSUL_HTTP_TOKEN"
    )]
    Denied {
        /// The first line of the body.
        message: String,
    },
    /// 404 without one of Consul's headers: a proxy's, or Consul's by a proxy that drops them.
    #[error(
        "what answers at {address} has no {path} (404, without Consul's headers): a proxy before Consul doesn't \
         pass the path on, or drops headers such as X-Consul-Index; have it pass both, or write the address of \
         the agent itself as consul.address{}",
        if *.path == SWITCH_PATH {
            "; or set the key, so that its value shows that Consul has answered: consul kv put nohop/off false"
        } else {
            ""
        }
    )]
    NotFound {
        /// Where Consul should be.
        address: String,
        /// What was requested.
        path: String,
    },
    /// Another status that isn't 200.
    #[error("Consul failed ({code}, `{message}`): look at its agent's log")]
    Status {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        message: String,
    },
    /// A response of an agent without a leader: of any age, perhaps empty.
    #[error("Consul's servers have no leader: look at `consul operator raft list-peers`")]
    NoLeader,
    /// A response of a server that was last in contact with its leader long ago.
    #[error(
        "Consul's answer is more than {limit:?} old, since the server that gave it has not heard its \
         leader: look at `consul operator raft list-peers`"
    )]
    Stale {
        /// The most that X-Consul-LastContact may be. The age itself would differ each time, and with it
        /// the revision of the status.
        limit: Duration,
    },
    /// The body ended early.
    #[error("Consul's answer was cut short ({})", root_cause(.source))]
    Cut {
        /// Why.
        source: reqwest::Error,
    },
    /// The body is larger than what is read.
    #[error("Consul's answer is larger than {limit} bytes")]
    TooLarge {
        /// The most that is read.
        limit: usize,
    },
    /// The body isn't what this version understands.
    #[error("Consul's answer has another shape than expected: {source}")]
    Shape {
        /// Where in the document, and what is there.
        source: serde_path_to_error::Error<serde_json::Error>,
    },
    /// The body is a page for people.
    #[error(
        "what answers at {address} sends a page (HTML), so it isn't Consul's agent: write the address of \
         the agent itself as consul.address or CONSUL_HTTP_ADDR"
    )]
    Page {
        /// Where Consul should be.
        address: String,
    },
    /// 502 or 504, which Consul itself never answers.
    #[error(
        "a proxy before Consul gets no answer from it ({code}): look at the proxy's log and the agent's, or \
         write the address of the agent itself as consul.address or CONSUL_HTTP_ADDR"
    )]
    Gateway {
        /// The status.
        code: StatusCode,
    },
    /// The token file can't be read.
    #[error("can't read the Consul token from {path} ({source}): fix consul.token_file")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// No token can be this.
    #[error(
        "the Consul token {what}: write the token itself, its SecretID, and nothing else {place}"
    )]
    BadToken {
        /// What is wrong with it.
        what: &'static str,
        /// Where it comes from.
        place: String,
    },
    /// The address or the path makes no HTTP request.
    #[error("consul.address `{address}` is no address of HTTP ({})", root_cause(.source))]
    BadRequest {
        /// Where Consul is.
        address: String,
        /// The error of the HTTP client.
        source: reqwest::Error,
    },
}

/// How Consul reports that it has too much to do.
#[derive(Debug, thiserror::Error)]
pub enum Busy {
    /// By 429 or 503.
    #[error("Consul is busy ({code}, `{message}`)")]
    Status {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        message: String,
    },
    /// By closing a connection before it answered.
    #[error(
        "the connection to Consul at {address} was lost before an answer ({}); where that goes on, \
         raise the agent's limits.http_max_conns_per_client{}",
        root_cause(.source),
        if .address.starts_with("https://") { "" } else { ", or write https:// if it speaks TLS there" }
    )]
    Reset {
        /// Where Consul is.
        address: String,
        /// Why.
        source: reqwest::Error,
    },
}

impl QueryError {
    /// How it is counted: the status of the answer, or what came instead of a whole one. `None`
    /// where nothing was asked.
    pub fn code(&self) -> Option<&str> {
        match self {
            QueryError::Unreachable { .. } | QueryError::Tls { .. } => Some("unreachable"),
            QueryError::Busy { busy: Busy::Reset { .. } } => Some("reset"),
            QueryError::Hung { .. } | QueryError::Slow { .. } => Some("timeout"),
            QueryError::Denied { .. } => Some("403"),
            QueryError::Unauthorized { .. } => Some("401"),
            QueryError::WantsTls { .. } => Some("400"),
            QueryError::Redirected { .. } => Some("redirected"),
            QueryError::Busy { busy: Busy::Status { code, .. } }
            | QueryError::Status { code, .. } => Some(code.as_str()),
            QueryError::NotFound { .. } => Some("404"),
            QueryError::NoLeader | QueryError::Stale { .. } => Some("200"),
            QueryError::Gateway { code } => Some(code.as_str()),
            QueryError::Cut { .. }
            | QueryError::TooLarge { .. }
            | QueryError::Shape { .. }
            | QueryError::Page { .. } => Some("malformed"),
            QueryError::TlsFile { .. }
            | QueryError::TokenFile { .. }
            | QueryError::BadToken { .. }
            | QueryError::BadRequest { .. } => None,
        }
    }

    /// A request without a response. Over a connection that was made it means that the agent has too
    /// many of them, or that TLS failed: with TLS 1.3 an agent reports only after the handshake that
    /// it doesn't accept a certificate.
    pub fn of_failed(address: String, source: reqwest::Error) -> QueryError {
        if let Some(error) = find::<rustls::Error>(&source) {
            return QueryError::Tls { address, fix: fix(error), source: plain(error).into() };
        }
        if source.is_builder() {
            return QueryError::BadRequest { address, source };
        }
        if !source.is_connect() {
            return QueryError::Busy { busy: Busy::Reset { address, source } };
        }
        use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
        let is_lost = |error: &io::Error| {
            matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
        };
        // connect(2) returns none of these, so it was the handshake that the agent broke off.
        // The first one may only wrap the one with the kind.
        let is_handshake = address.starts_with("https://")
            && causes(&source).filter_map(|cause| cause.downcast_ref()).any(is_lost);
        match is_handshake {
            true => {
                let source = root_cause(&source).to_string().into();
                QueryError::Tls { address, source, fix: ANY_FILE }
            }
            false => QueryError::Unreachable { address, source },
        }
    }
}

/// The first error of type `T` among an error and its causes.
fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

/// What reqwest wraps it in only names the request.
fn root_cause<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    causes(error).last().unwrap_or(error)
}

/// An error and its causes; an [`io::Error`]'s own cause is what it wraps, which its `source` skips.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error: &&'a (dyn Error + 'static)| {
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|wrapped| wrapped as &(dyn Error + 'static)).or_else(|| error.source())
    })
}

/// The error without the time, which would differ each time, and with it the revision of the status.
fn plain(error: &rustls::Error) -> rustls::Error {
    use rustls::{CertificateError as Cause, Error as Tls};
    match error {
        Tls::InvalidCertificate(Cause::ExpiredContext { .. }) => Cause::Expired.into(),
        Tls::InvalidCertificate(Cause::NotValidYetContext { .. }) => Cause::NotValidYet.into(),
        error => error.clone(),
    }
}

const ANY_FILE: &str = "see consul.ca_file, consul.tls_server_name, consul.cert_file and \
                        consul.key_file";

/// What to do where TLS fails.
fn fix(error: &rustls::Error) -> &'static str {
    use rustls::{AlertDescription as Alert, CertificateError as Cause, Error as Tls};
    match error {
        Tls::InvalidCertificate(cause) => match cause {
            // The latter where a known authority has the same name.
            Cause::UnknownIssuer | Cause::BadSignature => {
                "no known authority signed the agent's certificate: set consul.ca_file or \
                 CONSUL_CACERT to the one that did, or to the certificate itself where it is \
                 self-signed"
            }
            Cause::Expired | Cause::ExpiredContext { .. } => {
                "the agent's certificate has expired: renew it, or set this host's clock"
            }
            Cause::NotValidYet | Cause::NotValidYetContext { .. } => {
                "the agent's certificate isn't valid yet: set this host's clock, or the one of the \
                 host that made it"
            }
            Cause::NotValidForNameContext { presented, .. } if presented.is_empty() => {
                "the agent's certificate names no host (subjectAltName): make one that does, as `consul \
                 tls cert create` would"
            }
            Cause::NotValidForName | Cause::NotValidForNameContext { .. } => {
                "the agent's certificate is for another name: set consul.tls_server_name or \
                 CONSUL_TLS_SERVER_NAME to one that it has, such as server.dc1.consul"
            }
            cause if is_authority_as_agent(cause) => {
                "the agent shows the certificate of an authority (CA:TRUE), as `openssl req -x509` \
                 makes it: set consul.ca_file or CONSUL_CACERT to that certificate itself"
            }
            _ => "the agent's certificate can't be used: make another for it",
        },
        Tls::AlertReceived(Alert::CertificateRequired | Alert::HandshakeFailure) => {
            "it may want a certificate of nohop: set consul.cert_file and consul.key_file"
        }
        Tls::AlertReceived(
            Alert::BadCertificate
            | Alert::UnknownCA
            | Alert::CertificateUnknown
            | Alert::CertificateExpired
            | Alert::UnsupportedCertificate
            | Alert::DecryptError
            | Alert::AccessDenied,
        ) => {
            "it doesn't accept nohop's certificate: see consul.cert_file, consul.key_file, and the \
             agent's ca_file"
        }
        Tls::AlertReceived(Alert::UnrecognisedName) => {
            "it doesn't know the name that it is asked for: set consul.tls_server_name"
        }
        Tls::InvalidMessage(_) => {
            "it may speak no TLS there: write http://HOST:PORT, or the agent's ports.https"
        }
        _ => ANY_FILE,
    }
}

/// Whether a certificate is refused because it is an authority's, which webpki never takes for that
/// of an agent. The crate's own error can't be named here without a dependency on it.
pub fn is_authority_as_agent(cause: &rustls::CertificateError) -> bool {
    matches!(cause, rustls::CertificateError::Other(other)
        if format!("{other:?}").contains("CaUsedAsEndEntity"))
}
