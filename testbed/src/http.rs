//! HTTP over a unix socket, which a program outside of a host's network can reach.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::TIMEOUT;

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status, such as 200.
    pub status: u16,
    /// The lines before the body.
    pub head: String,
    /// The body.
    pub body: String,
}

/// One request. Returns the body.
///
/// # Errors
/// When there is no answer, or another one than 200.
pub fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let Answer { status, head, body } = exchange(socket, method, path, body)?;
    ensure!(status == 200, "{method} {path}: {head}\n{body}");
    Ok(body)
}

/// One request; HTTP/1.0, so that the answer is simply what comes until the end.
///
/// # Errors
/// When there is no answer.
pub fn exchange(socket: &Path, method: &str, path: &str, body: &str) -> Result<Answer> {
    let connected = UnixStream::connect(socket);
    let mut stream = connected.with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let n_bytes = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nContent-Length: {n_bytes}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    let status = head.split_whitespace().nth(1).and_then(|status| status.parse().ok());
    let status = status.with_context(|| format!("no status in {head}"))?;
    Ok(Answer { status, head: head.to_owned(), body: body.to_owned() })
}
