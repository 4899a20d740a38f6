//! The admin interface where strangers reach it: thousands of idle connections, and clients that read
//! nothing, keep neither the unix socket from the operator nor descriptors from the daemon; and what
//! a page of another site may have.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testbed::TIMEOUT;
use testbed::nohop::Nohop;

use crate::cluster::{Catalog, Nodes};

const ADDRESS: &str = "127.0.0.1:9153";

/// The idle connections, of `cargo xtask test --full` and otherwise.
const N_IDLE: [usize; 2] = [10_000, 1_000];

/// More than the descriptors that the daemon needs besides, and its limit of connections.
const MAX_FDS: usize = 1_000;

pub fn run() -> Result<()> {
    let nodes = Nodes::new()?;
    let helloworld = nodes.helloworld("helloworld")?;
    let catalog = Catalog::new(&[("helloworld", &[helloworld.address])])?;
    let listen = format!("admin.listen = [\"{{admin}}\", \"{ADDRESS}\"]\n");
    let nohop = nodes.nohop(&(catalog.config() + &listen))?;
    let connect = || nodes.client.enter(|| Ok(TcpStream::connect(ADDRESS)?));

    for (head, expected) in [
        (format!("GET /v1/status HTTP/1.1\r\nHost: {ADDRESS}"), "200"),
        (format!("HEAD /?view=services HTTP/1.1\r\nHost: {ADDRESS}"), "200"),
        ("GET /v1/status HTTP/1.1\r\nHost: rebound.example:9153".to_owned(), "403"),
        ("GET / HTTP/1.1\r\nHost: 203.0.113.7:9153".to_owned(), "403"),
        (format!("GET /v1/dns?name=helloworld.service HTTP/1.1\r\nHost: {ADDRESS}"), "403"),
        (format!("GET /v1/trace HTTP/1.1\r\nHost: {ADDRESS}"), "403"),
        (format!("POST /v1/reload HTTP/1.1\r\nHost: {ADDRESS}\r\nContent-Length: 0"), "403"),
        (format!("DELETE / HTTP/1.1\r\nHost: {ADDRESS}"), "405"),
        (format!("GET /../../etc/passwd HTTP/1.1\r\nHost: {ADDRESS}"), "404"),
    ] {
        let status = status(connect()?, &head)?;
        ensure!(status == expected, "{head}: {status}");
    }

    let n_idle = N_IDLE[usize::from(std::env::var_os("NOHOP_FULL").is_none())];
    // Each end of a connection is a descriptor of this process or of the daemon's.
    let limit = getrlimit(Resource::Nofile);
    let n = limit.maximum.unwrap_or(u64::MAX).min(n_idle as u64 + 4096);
    setrlimit(Resource::Nofile, Rlimit { current: Some(n), maximum: limit.maximum })?;
    let held = nodes.client.enter(|| {
        let connections = (0..n_idle).map(|nth| -> Result<TcpStream> {
            let mut stream = TcpStream::connect(ADDRESS)?;
            // Some are idle, and some ask and read nothing. Those above the limit are closed.
            if nth % 2 == 1 {
                let _ = write!(stream, "GET /v1/stream HTTP/1.1\r\nHost: {ADDRESS}\r\n\r\n");
            }
            Ok(stream)
        });
        connections.collect::<Result<Vec<_>>>()
    })?;
    works(&nohop)?;
    let fds = fs::read_dir(format!("/proc/{}/fd", nohop.process.pid().as_raw_nonzero()))?.count();
    ensure!(fds < MAX_FDS, "the daemon has {fds} descriptors open");

    drop(held);
    let (mut last, deadline) = (String::new(), Instant::now() + TIMEOUT);
    while last != "200" {
        ensure!(Instant::now() < deadline, "TCP isn't served again: {last}");
        let head = format!("GET /metrics HTTP/1.1\r\nHost: {ADDRESS}");
        last = status(connect()?, &head).unwrap_or_default();
    }
    Ok(())
}

/// What the operator does at the unix socket.
fn works(nohop: &Nohop) -> Result<()> {
    for arguments in ["status", "reload", "drain 10.99.0.2:1", "undrain 10.99.0.2:1", "services"] {
        let output = nohop.cli(arguments)?;
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        // An address that no instance has can't be drained, which is an answer as well.
        let is_answered = output.status.success() || text.contains("10.99.0.2:1");
        ensure!(is_answered, "nohop {arguments}: {output:?}");
    }
    Ok(())
}

/// The status of the answer to a request with this head.
fn status(mut stream: TcpStream, head: &str) -> Result<String> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "{head}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    Ok(answer.split(' ').nth(1).context("no answer")?.to_owned())
}
