//! HTTP over a unix socket, which a program outside of a host's network can reach.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::TIMEOUT;

/// One request; HTTP/1.0, so that the answer is simply what comes until the end. Returns its body.
///
/// # Errors
/// When there is no answer, or another one than 200.
pub fn ask(socket: &Path, method: &str, path: &str, body: &str) -> Result<String> {
    let connected = UnixStream::connect(socket);
    let mut stream = connected.with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    let n_bytes = body.len();
    write!(stream, "{method} {path} HTTP/1.0\r\nContent-Length: {n_bytes}\r\n\r\n{body}")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a head")?;
    let is_ok = head.lines().next().is_some_and(|status| status.contains(" 200 "));
    ensure!(is_ok, "{method} {path}: {head}\n{body}");
    Ok(body.to_owned())
}
