//! Why there is no answer.

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;

/// Why there is no answer, with the mend.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// No connection.
    #[error(
        "can't reach Consul at {address} ({source}): start its agent, or mend consul.address or \
         CONSUL_HTTP_ADDR"
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// The files for TLS can't be used.
    #[error("can't speak TLS with Consul: {what}")]
    TlsFile {
        /// The key, the file, what is wrong with it, and the mend.
        what: String,
    },
    /// One side doesn't accept the other's certificate, or doesn't speak TLS at all.
    #[error(
        "Consul at {address} and nohop don't agree on TLS ({source}): see consul.ca_file, \
         consul.tls_server_name, consul.cert_file and consul.key_file"
    )]
    Tls {
        /// Where Consul is.
        address: String,
        /// What TLS says.
        source: Box<dyn Error + Send + Sync>,
    },
    /// 429 or 503, or a connection that the agent closed before an answer, as it does past its
    /// limit of connections.
    #[error("{busy}: asking again more slowly")]
    Busy {
        /// How it said so.
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
        "Consul denies access (403, `{said}`): the token needs service:read and node:read; see \
         consul.token_file and CONSUL_HTTP_TOKEN"
    )]
    Denied {
        /// The first line of the body.
        said: String,
    },
    /// Another status that isn't 200.
    #[error("Consul failed ({code}, `{said}`): look at its agent's log")]
    Status {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        said: String,
    },
    /// An answer of an agent that hears no leader: of any age, perhaps empty.
    #[error("Consul's servers have no leader: look at `consul operator raft list-peers`")]
    NoLeader,
    /// An answer of a server that heard its leader long ago.
    #[error(
        "Consul's answer is {age:?} old, since the server that gave it has not heard its leader: \
         look at `consul operator raft list-peers`"
    )]
    Stale {
        /// X-Consul-LastContact.
        age: Duration,
    },
    /// The body ended early.
    #[error("Consul's answer was cut short ({source})")]
    Cut {
        /// What the HTTP side says.
        source: hyper::Error,
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
    /// The token file can't be read.
    #[error("can't read the Consul token from {path} ({source}): mend consul.token_file")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The token is empty or has bytes that no header may have.
    #[error("the Consul token is empty or holds bytes that a token can't")]
    BadToken,
    /// The address or the path makes no HTTP request.
    #[error("consul.address `{address}` can't be asked ({source})")]
    BadRequest {
        /// Where Consul is.
        address: String,
        /// What the HTTP side says.
        source: hyper::http::Error,
    },
}

/// How Consul says that it has too much to do.
#[derive(Debug, thiserror::Error)]
pub enum Busy {
    /// By 429 or 503.
    #[error("Consul is busy ({code}, `{said}`)")]
    Status {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        said: String,
    },
    /// By closing a connection before it answered.
    #[error(
        "the connection to Consul at {address} was lost before an answer ({source}); where that \
         goes on, raise the agent's limits.http_max_conns_per_client"
    )]
    Reset {
        /// Where Consul is.
        address: String,
        /// What the HTTP side says.
        source: hyper::Error,
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
            QueryError::Busy { busy: Busy::Status { code, .. } }
            | QueryError::Status { code, .. } => Some(code.as_str()),
            QueryError::NoLeader | QueryError::Stale { .. } => Some("200"),
            QueryError::Cut { .. } | QueryError::TooLarge { .. } | QueryError::Shape { .. } => {
                Some("malformed")
            }
            QueryError::TlsFile { .. }
            | QueryError::TokenFile { .. }
            | QueryError::BadToken
            | QueryError::BadRequest { .. } => None,
        }
    }

    /// What a connection that ended before an answer means: that TLS failed, or that the agent has
    /// too many connections. With TLS 1.3 the agent says only after the handshake that it doesn't
    /// accept a certificate.
    pub fn of_lost(address: String, source: hyper::Error) -> QueryError {
        let mut cause: Option<&(dyn Error + 'static)> = Some(&source);
        while let Some(error) = cause {
            let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
            let by_tls = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>());
            if let Some(by_tls) = by_tls.or_else(|| error.downcast_ref()) {
                return QueryError::Tls { address, source: by_tls.clone().into() };
            }
            cause = error.source();
        }
        QueryError::Busy { busy: Busy::Reset { address, source } }
    }
}
