//! One request of HTTP/1.1 over a stream, and its answer.

use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::http::request;
use hyper::{HeaderMap, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// The media type of a JSON document.
pub const JSON: &str = "application/json";

/// The media type of JSON documents, one a line.
pub const JSON_LINES: &str = "application/x-ndjson";

/// The media type of server-sent events.
pub const EVENTS: &str = "text/event-stream";

/// The longest of such lines, in bytes.
const MAX_LINE: usize = 1 << 20;

/// The largest response that is read, in bytes: several times that of a node with full maps.
const MAX_BODY: usize = 256 << 20;

/// A response, read to its end.
#[derive(Debug)]
pub struct HttpResponse {
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The request is invalid, for example because of a blank in its path.
    #[error("the request is malformed")]
    Request(#[source] hyper::http::Error),
    /// The connection broke, or the response isn't HTTP.
    #[error("the connection broke")]
    Connection(#[source] hyper::Error),
    /// The body is incomplete or too long.
    #[error("the answer broke off: {0}")]
    Body(String),
}

/// Sends a request without a body to `host`, calls `opened` when the answer begins, and hands each line of it to
/// `each` as it comes, until that returns false. An answer that isn't [`JSON_LINES`] is returned instead, read to its end.
///
/// # Errors
/// When the connection breaks before that.
pub async fn read_lines(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: request::Builder,
    host: &str,
    opened: impl FnOnce(),
    mut each: impl FnMut(&[u8]) -> bool,
) -> Result<Option<HttpResponse>, ExchangeError> {
    let request =
        request.header("host", host).body(Empty::<Bytes>::new()).map_err(ExchangeError::Request)?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(ExchangeError::Connection)?;
    let broken = |error: hyper::Error| ExchangeError::Body(error.to_string());
    let read = async move {
        let response = sender.send_request(request).await.map_err(ExchangeError::Connection)?;
        let (head, mut body) = response.into_parts();
        if head.headers.get("content-type").is_none_or(|kind| kind != JSON_LINES) {
            let body = Limited::new(body, MAX_BODY).collect().await;
            let body = body.map_err(|error| ExchangeError::Body(error.to_string()))?.to_bytes();
            return Ok(Some(HttpResponse { status: head.status, headers: head.headers, body }));
        }
        opened();
        let mut rest = Vec::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(broken)?.into_data() else { continue };
            rest.extend_from_slice(&data);
            while let Some(end) = rest.iter().position(|&octet| octet == b'\n') {
                let line: Vec<u8> = rest.drain(..=end).collect();
                if !each(&line[..end]) {
                    return Ok(None);
                }
            }
            if rest.len() > MAX_LINE {
                return Err(ExchangeError::Body(format!("a line of more than {MAX_LINE} bytes")));
            }
        }
        Ok(None)
    };
    let mut connection = std::pin::pin!(connection);
    let mut read = std::pin::pin!(read);
    tokio::select! {
        answer = &mut read => answer,
        // What breaks it also breaks the answer; what has been read of that is still there.
        _ = &mut connection => read.await,
    }
}

/// Sends a request without a body to `host`, and reads the answer to its end.
///
/// # Errors
/// When the connection breaks before that.
pub async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    request: request::Builder,
    host: &str,
) -> Result<HttpResponse, ExchangeError> {
    let request =
        request.header("host", host).body(Empty::<Bytes>::new()).map_err(ExchangeError::Request)?;
    let (mut sender, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(ExchangeError::Connection)?;
    let read = async move {
        let response = sender.send_request(request).await.map_err(ExchangeError::Connection)?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, MAX_BODY).collect().await;
        let body = body.map_err(|error| ExchangeError::Body(error.to_string()))?.to_bytes();
        Ok(HttpResponse { status: head.status, headers: head.headers, body })
    };
    // The connection ends when the sender does; what breaks it also breaks the answer.
    let (answer, _) = tokio::join!(read, connection);
    answer
}
