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
