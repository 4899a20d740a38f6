//! The client of the admin interface: how a command finds the daemon and sends requests.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::http::request;
use hyper::{Request, StatusCode};
use serde::de::DeserializeOwned;
use tokio::net::{TcpStream, UnixStream};

use super::http::{ExchangeError, HttpResponse, JSON, exchange, read_lines};
use crate::config::AdminAddress;

use super::trace::TraceFilter;

pub use super::route::{drain_path, explain_path, log_path, lookup_path};

/// The address that is used when neither a flag nor the environment names one.
pub const DEFAULT_ADDRESS: &str = "unix:/run/nohop/admin.sock";

/// The time limit of a response.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// The time limit of a change: a reload waits for files, and for requests to Consul to end.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);

/// Why a request to the daemon failed, with the fix.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is invalid.
    #[error("{name}: {what}")]
    Address {
        /// Where it was given: `--admin` or `NOHOP_ADMIN`.
        name: &'static str,
        /// The problem, with the fix.
        what: String,
    },
    /// No process listens there.
    #[error(
        "no daemon answers at {address}: is `nohop run` running? name another address with \
         --admin or NOHOP_ADMIN"
    )]
    Unreachable {
        /// The address.
        address: AdminAddress,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
    /// This user may not connect to the socket.
    #[error("permission denied at {address}: run as root or as a member of the socket's group")]
    Forbidden {
        /// The address.
        address: AdminAddress,
    },
    /// The response takes too long.
    #[error(
        "the daemon at {address} doesn't answer within {} s: it starts, has too much to do or hangs; see its log, and \
         `nohop debug` collects what shows why",
        limit.as_secs()
    )]
    TimeLimit {
        /// The address.
        address: AdminAddress,
        /// How long it had.
        limit: Duration,
    },
    /// The response to a change takes too long, and the change may still happen.
    #[error(
        "the daemon at {address} hasn't answered within {} s: it may still apply the change; \
         its log has the outcome",
        limit.as_secs()
    )]
    UnknownOutcome {
        /// The address.
        address: AdminAddress,
        /// How long it had.
        limit: Duration,
    },
    /// The response is incomplete or isn't HTTP.
    #[error("{}", exchange_failed(address, source))]
    Exchange {
        /// The address.
        address: AdminAddress,
        /// The error.
        #[source]
        source: ExchangeError,
    },
    /// The daemon refused the request.
    #[error("{}", refusal(address, *status, body))]
    Refused {
        /// The address.
        address: AdminAddress,
        /// The status.
        status: StatusCode,
        /// The body of the response.
        body: String,
    },
    /// The document has other keys than this version expects.
    #[error(
        "can't read the response of the daemon at {address}: is it of the same version as this command?"
    )]
    Document {
        /// The address.
        address: AdminAddress,
        /// Where it differs.
        #[source]
        source: serde_json::Error,
    },
}

fn exchange_failed(address: &AdminAddress, error: &ExchangeError) -> String {
    let has_ended = match error {
        ExchangeError::Connection(error) => error.is_incomplete_message() || error.is_canceled(),
        ExchangeError::Body(_) => true,
        ExchangeError::Request(_) => false,
    };
    match has_ended {
        true => {
            format!("the daemon at {address} closed the connection: it has stopped, or restarts")
        }
        false => format!("no valid response from {address}: does nohop listen there?"),
    }
}

/// A refusal of ours is a sentence; what says nothing may be another program's.
fn refusal(address: &AdminAddress, status: StatusCode, body: &str) -> String {
    match body.is_empty() {
        true => format!("{address} answers {status} without a reason: does nohop listen there?"),
        false => format!("the daemon at {address} answers {status}: {body}"),
    }
}

impl ClientError {
    /// Whether another try may succeed, as while a daemon starts.
    pub fn is_transient(&self) -> bool {
        !matches!(self, ClientError::Address { .. } | ClientError::Forbidden { .. })
    }
}

/// The daemon's address: the flag `--admin`, else NOHOP_ADMIN, else [`DEFAULT_ADDRESS`].
///
/// # Errors
/// When the value there isn't an address.
pub fn find(
    flag: Option<&str>,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<AdminAddress, ClientError> {
    let variable = env("NOHOP_ADMIN").filter(|value| !value.is_empty());
    let (name, text) = match (flag, &variable) {
        (Some(flag), _) => ("--admin", flag),
        (None, Some(variable)) => ("NOHOP_ADMIN", variable.as_str()),
        (None, None) => ("the default", DEFAULT_ADDRESS),
    };
    text.parse().map_err(|what| ClientError::Address { name, what })
}

/// Fetches a document. One that comes with an error status, such as the explanation of an unknown
/// name, is a document, too.
///
/// # Errors
/// When there is no response within 5 s, or it isn't the document.
pub async fn get<T: DeserializeOwned>(
    address: &AdminAddress,
    path: &str,
) -> Result<T, ClientError> {
    get_within(address, path, TIME_LIMIT).await
}

/// Fetches what isn't JSON, such as metrics.
///
/// # Errors
/// As for [`get`], and when the response is no success.
pub async fn get_text(address: &AdminAddress, path: &str) -> Result<String, ClientError> {
    let late = |_| ClientError::TimeLimit { address: address.clone(), limit: TIME_LIMIT };
    let limited = tokio::time::timeout(TIME_LIMIT, ask(address, Request::get(path))).await;
    let answer = limited.map_err(late).flatten()?;
    match answer.status.is_success() {
        true => Ok(String::from_utf8_lossy(&answer.body).into_owned()),
        false => Err(refused(address, &answer)),
    }
}

/// As [`get`], with another limit than 5 s, for a request that waits.
///
/// # Errors
/// As for [`get`].
pub async fn get_within<T: DeserializeOwned>(
    address: &AdminAddress,
    path: &str,
    limit: Duration,
) -> Result<T, ClientError> {
    let late = |address| ClientError::TimeLimit { address, limit };
    document(address, Request::get(path), limit, late).await
}

/// Posts a request, and reads the document of the response.
///
/// # Errors
/// As for [`get`], but after a minute: then the daemon may still apply the change.
pub async fn post<T: DeserializeOwned>(
    address: &AdminAddress,
    path: &str,
) -> Result<T, ClientError> {
    post_within(address, path, CHANGE_LIMIT).await
}

async fn post_within<T: DeserializeOwned>(
    address: &AdminAddress,
    path: &str,
    limit: Duration,
) -> Result<T, ClientError> {
    let late = |address| ClientError::UnknownOutcome { address, limit };
    document(address, Request::post(path), limit, late).await
}

/// Traces connections: calls `opened` once the daemon does, and hands each line to `each` as it comes, until that
/// returns false.
///
/// # Errors
/// When the daemon doesn't begin within 5 s, or refuses, or the connection breaks.
pub async fn trace(
    address: &AdminAddress,
    filter: &TraceFilter,
    opened: impl FnOnce(),
    each: impl FnMut(&[u8]) -> bool,
) -> Result<(), ClientError> {
    trace_within(address, filter, opened, each, TIME_LIMIT).await
}

/// The same with another limit for the beginning.
async fn trace_within(
    address: &AdminAddress,
    filter: &TraceFilter,
    opened: impl FnOnce(),
    each: impl FnMut(&[u8]) -> bool,
    limit: Duration,
) -> Result<(), ClientError> {
    let request = Request::get(filter.path());
    let has_begun = AtomicBool::new(false);
    let opened = || {
        has_begun.store(true, Ordering::Relaxed);
        opened();
    };
    let exchange = |source| ClientError::Exchange { address: address.clone(), source };
    let traced = async {
        let unreachable = |source| unreachable(address, source);
        let answer = match address {
            AdminAddress::Unix(socket) => {
                let stream = UnixStream::connect(socket).await.map_err(unreachable)?;
                read_lines(stream, request, "nohop", opened, each).await
            }
            AdminAddress::Tcp(tcp) => {
                let stream = TcpStream::connect(tcp).await.map_err(unreachable)?;
                read_lines(stream, request, &tcp.to_string(), opened, each).await
            }
        };
        match answer.map_err(exchange)? {
            Some(refusal) => Err(refused(address, &refusal)),
            None => Ok(()),
        }
    };
    let mut traced = std::pin::pin!(traced);
    match tokio::time::timeout(limit, &mut traced).await {
        Ok(ended) => ended,
        // Only the beginning is limited.
        Err(_) if has_begun.load(Ordering::Relaxed) => traced.await,
        Err(_) => Err(ClientError::TimeLimit { address: address.clone(), limit }),
    }
}

fn refused(address: &AdminAddress, answer: &HttpResponse) -> ClientError {
    ClientError::Refused {
        address: address.clone(),
        status: answer.status,
        body: String::from_utf8_lossy(&answer.body).trim().to_owned(),
    }
}

fn unreachable(address: &AdminAddress, source: std::io::Error) -> ClientError {
    match source.kind() {
        std::io::ErrorKind::PermissionDenied => ClientError::Forbidden { address: address.clone() },
        _ => ClientError::Unreachable { address: address.clone(), source },
    }
}

async fn document<T: DeserializeOwned>(
    address: &AdminAddress,
    request: request::Builder,
    limit: Duration,
    late: impl Fn(AdminAddress) -> ClientError,
) -> Result<T, ClientError> {
    let limited = tokio::time::timeout(limit, ask(address, request)).await;
    let answer = limited.map_err(|_| late(address.clone())).flatten()?;
    if answer.headers.get("content-type").is_none_or(|kind| kind != JSON) {
        return Err(refused(address, &answer));
    }
    serde_json::from_slice(&answer.body)
        .map_err(|source| ClientError::Document { address: address.clone(), source })
}

async fn ask(
    address: &AdminAddress,
    request: request::Builder,
) -> Result<HttpResponse, ClientError> {
    let unreachable = |source| unreachable(address, source);
    let answer = match address {
        AdminAddress::Unix(socket) => {
            exchange(UnixStream::connect(socket).await.map_err(unreachable)?, request, "nohop")
                .await
        }
        AdminAddress::Tcp(address) => {
            let stream = TcpStream::connect(address).await.map_err(unreachable)?;
            exchange(stream, request, &address.to_string()).await
        }
    };
    answer.map_err(|source| ClientError::Exchange { address: address.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flag_beats_the_environment() {
        let env = |_: &str| Some("unix:/env".to_owned());
        let table = [
            (find(Some("127.0.0.1:1"), &env), "127.0.0.1:1"),
            (find(None, &env), "unix:/env"),
            (find(None, &|_| None), DEFAULT_ADDRESS),
            (find(None, &|_| Some(String::new())), DEFAULT_ADDRESS),
        ];
        for (found, expected) in table {
            assert_eq!(found.unwrap().to_string(), expected);
        }
        let error = find(None, &|_| Some("x".into())).unwrap_err().to_string();
        assert!(error.starts_with("NOHOP_ADMIN: 'x' isn't an address"), "{error}");
    }

    #[tokio::test]
    async fn a_change_that_takes_too_long_is_not_called_failed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        // It accepts, and never answers.
        let _listener = tokio::net::UnixListener::bind(&path).unwrap();
        let (address, limit) = (AdminAddress::Unix(path), Duration::from_millis(1));
        let late = post_within::<serde_json::Value>(&address, "/v1/reload", limit).await;
        let late = late.unwrap_err().to_string();
        assert!(late.contains("may still apply the change"), "{late}");
        let late = get_within::<serde_json::Value>(&address, "/v1/status", limit).await;
        assert!(late.unwrap_err().to_string().contains("doesn't answer within"));
        let (opened, each) = (|| unreachable!("it never answers"), |_: &[u8]| true);
        let late = trace_within(&address, &TraceFilter::default(), opened, each, limit).await;
        assert!(late.unwrap_err().to_string().contains("doesn't answer within"));
    }
}
