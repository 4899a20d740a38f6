//! What a valid response is: the body within its limits, the status, and the headers.

use std::time::Duration;

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Response, StatusCode};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::error::{Busy, QueryError};
use crate::config::ConsulAddress;

/// The largest answer that is read: a few times that of 4,096 instances with five checks each, or
/// of the names of 100,000 services.
pub const BODY_LIMIT: usize = 64 << 20;

/// An answer beyond this is a large one.
const LARGE: usize = 1 << 20;

/// How many large answers are read at once, so that all answers together take at most 128 MiB more
/// than a MiB for each connection, whatever the agent sends.
pub const N_LARGE: usize = 2;

/// The age from which on a server's last contact with its leader makes its answer stale. Elections
/// take seconds.
const MAX_LAST_CONTACT: Duration = Duration::from_secs(60);

/// Reads a body. Beyond [`LARGE`] it waits for one of the turns that `large` has.
pub async fn read(mut response: Response, large: &Semaphore) -> Result<Vec<u8>, QueryError> {
    let too_large = QueryError::TooLarge { limit: BODY_LIMIT };
    let length = response.content_length().unwrap_or(0);
    if length > BODY_LIMIT as u64 {
        return Err(too_large);
    }
    let mut turn = None;
    let mut bytes = Vec::with_capacity((length as usize).min(LARGE));
    while let Some(data) = response.chunk().await.map_err(|source| QueryError::Cut { source })? {
        if bytes.len() + data.len() > BODY_LIMIT {
            return Err(too_large);
        }
        if bytes.len() + data.len() > LARGE && turn.is_none() {
            turn = Some(large.acquire().await.expect("the semaphore is never closed"));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// Parses the body of what answered at `address`.
pub fn parse<T: DeserializeOwned>(body: &[u8], address: &ConsulAddress) -> Result<T, QueryError> {
    // No JSON begins so.
    if body.trim_ascii_start().starts_with(b"<") {
        return Err(QueryError::Page { address: address.to_string() });
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let shape = |source| QueryError::Shape { source };
    let parsed = serde_path_to_error::deserialize(&mut json).map_err(shape)?;
    // A body with more behind its end isn't what it seems.
    let at_root = serde_path_to_error::Track::new().path();
    json.end().map_err(|error| shape(serde_path_to_error::Error::new(at_root, error)))?;
    Ok(parsed)
}

/// Go's response, on port 8501, to a request without TLS.
const WANTS_TLS: &str = "HTTP request to an HTTPS server";

/// Refuses every status but 200. `address` was asked for `path`, and `has_auth` with a user and a password.
pub fn check_status(
    code: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    (address, path): (&ConsulAddress, &str),
    has_auth: bool,
) -> Result<(), QueryError> {
    if code == StatusCode::OK {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&body[..body.len().min(1024)]);
    let message: String =
        text.lines().next().unwrap_or_default().trim().chars().take(200).collect();
    let to = headers.get(LOCATION).and_then(|to| to.to_str().ok());
    Err(match code {
        StatusCode::UNAUTHORIZED => QueryError::Unauthorized { message, has_auth },
        StatusCode::FORBIDDEN => QueryError::Denied { message },
        StatusCode::BAD_REQUEST if message.contains(WANTS_TLS) => {
            QueryError::WantsTls { address: address.to_string() }
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            QueryError::Busy { busy: Busy::Status { code, message } }
        }
        StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => QueryError::Gateway { code },
        code if code.is_redirection() && to.is_some() => QueryError::Redirected {
            address: address.to_string(),
            to: to.unwrap_or_default().chars().take(200).collect(),
        },
        StatusCode::NOT_FOUND if !has_consuls(headers) => {
            QueryError::NotFound { address: address.to_string(), path: path.to_owned() }
        }
        _ => QueryError::Status { code, message },
    })
}

/// Whether the response is Consul's to a key that isn't there, which has an index all the same, so that
/// one can wait for it. A proxy's "not found" has none, and says nothing about the key; it may be without
/// a text as Consul's is. Behind a proxy that drops the index the other headers show that it is Consul's;
/// behind one that drops all of them it can't be distinguished from the proxy's own.
pub fn is_absent_key(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> bool {
    let is_absent = index(headers).is_some() || body.is_empty() && has_consuls(headers);
    status == StatusCode::NOT_FOUND && is_absent
}

fn has_consuls(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with("x-consul-"))
}

/// Refuses the response of an agent without a leader, which `discovery_max_stale` can bring, and
/// of a server whose last contact with it is long ago. Streamed ones always report none (Consul's
/// issue 9776).
pub fn check_leader(headers: &HeaderMap) -> Result<(), QueryError> {
    if header(headers, "x-consul-query-backend") == Some("streaming") {
        return Ok(());
    }
    if header(headers, "x-consul-knownleader") == Some("false") {
        return Err(QueryError::NoLeader);
    }
    let last_contact = header(headers, "x-consul-lastcontact").and_then(|text| text.parse().ok());
    match Duration::from_millis(last_contact.unwrap_or(0)) {
        age if age > MAX_LAST_CONTACT => Err(QueryError::Stale { limit: MAX_LAST_CONTACT }),
        _ => Ok(()),
    }
}

/// Whether Consul left out what the token may not read (agents from about 1.11 on report it).
pub fn is_filtered(headers: &HeaderMap) -> bool {
    header(headers, "x-consul-results-filtered-by-acls") == Some("true")
}

/// X-Consul-Index.
pub fn index(headers: &HeaderMap) -> Option<u64> {
    header(headers, "x-consul-index")?.parse().ok()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    #[test]
    fn only_consul_knows_that_a_key_is_absent() {
        let (index, leader) = ("x-consul-index", "x-consul-knownleader");
        for (status, header, body, expected) in [
            (404, Some((index, "7")), "", true),
            // As of a proxy that drops the index.
            (404, Some((leader, "true")), "", true),
            (404, Some((index, "7")), "no such key", true),
            // As of Envoy without a route.
            (404, Some(("server", "envoy")), "", false),
            (404, None, "", false),
            (404, None, "<html>404 Not Found", false),
            (404, Some((leader, "true")), "<html>404 Not Found", false),
            (404, Some((index, "none")), "<html>404 Not Found", false),
            (500, Some((index, "7")), "", false),
            (200, None, "", false),
        ] {
            let mut headers = HeaderMap::new();
            if let Some((name, value)) = header {
                headers.insert(name, HeaderValue::from_static(value));
            }
            let status_code = StatusCode::from_u16(status).unwrap();
            let is_absent = is_absent_key(status_code, &headers, body.as_bytes());
            assert_eq!(is_absent, expected, "{status} {header:?} {body}");
        }
    }

    #[test]
    fn a_leaderless_or_an_old_answer_is_refused_unless_it_was_streamed() {
        // (KnownLeader, LastContact, Query-Backend)
        for (leader, contact, backend, is_fine) in [
            (None, None, None, true),
            (Some("true"), Some("0"), None, true),
            (Some("false"), Some("0"), None, false),
            (Some("false"), None, Some("blocking-query"), false),
            (Some("false"), Some("99999"), Some("streaming"), true),
            (Some("true"), Some("60000"), None, true),
            (Some("true"), Some("60001"), None, false),
            (Some("true"), Some("60001"), Some("blocking-query"), false),
            (Some("true"), Some("no number"), None, true),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in [
                ("x-consul-knownleader", leader),
                ("x-consul-lastcontact", contact),
                ("x-consul-query-backend", backend),
            ] {
                if let Some(value) = value {
                    headers.insert(name, HeaderValue::from_static(value));
                }
            }
            let what = format!("{leader:?} {contact:?} {backend:?}");
            assert_eq!(check_leader(&headers).is_ok(), is_fine, "{what}");
        }
    }
}
