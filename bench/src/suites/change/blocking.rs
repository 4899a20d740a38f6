//! Consul's blocking queries, over plain HTTP/1.1 on one connection.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Consul's HTTP interface.
const CONSUL: &str = "127.0.0.1:8500";

/// How long an answer may take: the wait that is asked for, and the sixteenth part that Consul adds.
const PATIENCE: Duration = Duration::from_secs(70);

/// The longest answer that is read, in bytes.
const MAX_BODY: usize = 16 << 20;

/// A service's instances that pass their checks, by id.
pub type Instances = BTreeMap<String, SocketAddrV4>;

/// Asks for a service again and again, each time for what is newer than the answer before.
pub struct Blocking {
    service: String,
    index: u64,
    stream: BufReader<TcpStream>,
}

impl Blocking {
    /// Of this service.
    ///
    /// # Errors
    /// When Consul doesn't listen.
    pub fn new(service: &str) -> Result<Blocking> {
        let stream = TcpStream::connect(CONSUL).with_context(|| format!("connect to {CONSUL}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Blocking { service: service.into(), index: 0, stream: BufReader::new(stream) })
    }

    /// What there is, at once the first time, later once it has changed or a minute has passed.
    ///
    /// # Errors
    /// When Consul doesn't answer with 200.
    pub fn next(&mut self) -> Result<Instances> {
        let Blocking { service, index, .. } = self;
        let path = format!("/v1/health/service/{service}?passing=1&index={index}&wait=60s");
        let request = format!("GET {path} HTTP/1.1\r\nHost: {CONSUL}\r\n\r\n");
        self.stream.get_mut().write_all(request.as_bytes())?;
        let answer = read_answer(&mut self.stream).with_context(|| format!("GET {path}"))?;
        // An index that goes back, or is 0, means to start over.
        self.index = if answer.index < self.index { 0 } else { answer.index.max(1) };
        instances(&serde_json::from_slice(&answer.body).context("read Consul's answer")?)
    }
}

struct Answer {
    index: u64,
    body: Vec<u8>,
}

fn read_answer(reader: &mut impl BufRead) -> Result<Answer> {
    let status = read_line(reader)?;
    let (mut index, mut n_bytes, mut is_chunked) = (0, None, false);
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').context("a header without a colon")?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "x-consul-index" => index = value.parse().context("X-Consul-Index")?,
            "content-length" => n_bytes = Some(value.parse().context("Content-Length")?),
            "transfer-encoding" => is_chunked = value.eq_ignore_ascii_case("chunked"),
            _ => {}
        }
    }
    let body = match n_bytes {
        _ if is_chunked => read_chunks(reader)?,
        Some(n_bytes) => read_bytes(reader, n_bytes)?,
        None => bail!("an answer of no length"),
    };
    ensure!(status.contains(" 200 "), "{status}: {}", String::from_utf8_lossy(&body));
    Ok(Answer { index, body })
}

fn read_chunks(reader: &mut impl BufRead) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = read_line(reader)?;
        let size = line.split(';').next().unwrap_or_default();
        let size = usize::from_str_radix(size, 16).with_context(|| format!("a chunk {line:?}"))?;
        ensure!(size <= MAX_BODY - body.len(), "an answer of more than {MAX_BODY} bytes");
        body.extend(read_bytes(reader, size)?);
        ensure!(read_line(reader)?.is_empty(), "a chunk that goes on after its end");
        if size == 0 {
            return Ok(body);
        }
    }
}

fn read_bytes(reader: &mut impl BufRead, n_bytes: usize) -> Result<Vec<u8>> {
    ensure!(n_bytes <= MAX_BODY, "an answer of {n_bytes} bytes");
    let mut bytes = vec![0; n_bytes];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn read_line(reader: &mut impl BufRead) -> Result<String> {
    let mut line = String::new();
    reader.take(16 << 10).read_line(&mut line)?;
    ensure!(line.ends_with('\n'), "the connection ended");
    Ok(line.trim_end().to_owned())
}

fn instances(body: &Value) -> Result<Instances> {
    let entries = body.as_array().context("Consul's answer is no list")?;
    let instance = |entry: &Value| -> Option<(String, SocketAddrV4)> {
        let service = &entry["Service"];
        let port = service["Port"].as_u64()?.try_into().ok()?;
        let address = service["Address"].as_str()?.parse().ok()?;
        Some((service["ID"].as_str()?.to_owned(), SocketAddrV4::new(address, port)))
    };
    let read = |entry| instance(entry).with_context(|| format!("no instance: {entry}"));
    entries.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_with_a_length_and_in_chunks() {
        let table = [
            (
                "HTTP/1.1 200 OK\r\nX-Consul-Index: 7\r\nContent-Length: 2\r\n\r\n[]",
                Some((7, &b"[]"[..])),
            ),
            (
                "HTTP/1.1 200 OK\r\nx-consul-index:8\r\nTransfer-Encoding: chunked\r\n\r\n\
                 3\r\n[1,\r\nA;x=y\r\n22,3333333\r\n1\r\n]\r\n0\r\n\r\n",
                Some((8, b"[1,22,3333333]")),
            ),
            ("HTTP/1.1 500 Oh\r\nContent-Length: 4\r\n\r\nwhy?", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabc\r\n0\r\n\r\n", None),
            ("HTTP/1.1 200 OK\r\n\r\n[]", None),
            ("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n[]", None),
            ("", None),
        ];
        for (text, expected) in table {
            let read = read_answer(&mut text.as_bytes());
            let read = read.as_ref().ok().map(|answer| (answer.index, &answer.body[..]));
            assert_eq!(read, expected, "{text}");
        }
    }

    #[test]
    fn instances_by_id() {
        let body = serde_json::json!([
            { "Node": {}, "Service": { "ID": "a", "Address": "10.98.1.0", "Port": 8080 } },
            { "Service": { "ID": "b", "Address": "10.98.1.1", "Port": 1 } },
        ]);
        let read = instances(&body).expect("it can be read");
        let read: Vec<String> = read.iter().map(|(id, at)| format!("{id} {at}")).collect();
        assert_eq!(read, ["a 10.98.1.0:8080", "b 10.98.1.1:1"]);
        for wrong in [serde_json::json!({}), serde_json::json!([{ "Service": { "ID": "a" } }])] {
            assert!(instances(&wrong).is_err(), "{wrong}");
        }
    }
}
