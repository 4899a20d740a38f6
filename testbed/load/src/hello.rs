//! `hello`: a server that answers every HTTP request with `hello from NAME`. After SIGUSR1 it resets its
//! connections; after SIGUSR2 its work takes 50 times as long.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, Scope};
use std::time::Duration;

use clap::Args;
use rustix::net::sockopt::set_socket_linger;
use signal_hook::consts::{SIGUSR1, SIGUSR2};
use signal_hook::flag;

use crate::print_address;

/// The threads at first, each of which serves a connection, and at most: others wait in the backlog.
const N_THREADS: usize = 8;
const MAX_THREADS: usize = 1024;

/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// How many times as long the work takes after SIGUSR2.
const SLOWNESS: u32 = 50;

/// The longest head of a request, in bytes.
const MAX_HEAD: u64 = 16 * 1024;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Hello {
    /// Where to listen
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// The name in its answers
    #[arg(long)]
    pub name: String,
    /// How long the work on a request takes, in milliseconds
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(0..=60_000))]
    pub work_ms: u64,
}

/// A server at work.
struct Server<'a> {
    hello: &'a Hello,
    listener: TcpListener,
    resets: Arc<AtomicBool>,
    is_slow: Arc<AtomicBool>,
    n_threads: AtomicUsize,
    n_busy: AtomicUsize,
}

impl Hello {
    /// Answers until it is killed.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let server = Server {
            hello: self,
            listener: TcpListener::bind(self.address)?,
            resets: Arc::default(),
            is_slow: Arc::default(),
            n_threads: N_THREADS.into(),
            n_busy: 0.into(),
        };
        flag::register(SIGUSR1, Arc::clone(&server.resets))?;
        flag::register(SIGUSR2, Arc::clone(&server.is_slow))?;
        print_address(server.listener.local_addr()?);
        thread::scope(|scope| {
            for _ in 0..N_THREADS {
                scope.spawn(|| server.accept(scope));
            }
        });
        Ok(())
    }
}

impl Server<'_> {
    /// Serves connections, one after the other; where all threads are busy, there is one more.
    fn accept<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        loop {
            let Ok((stream, _)) = self.listener.accept() else { continue };
            if self.n_busy.fetch_add(1, Ordering::Relaxed) + 1
                >= self.n_threads.load(Ordering::Relaxed)
                && self.n_threads.fetch_add(1, Ordering::Relaxed) < MAX_THREADS
            {
                scope.spawn(|| self.accept(scope));
            }
            // A client that closes its connection is no error.
            let _ = self.serve(stream);
            self.n_busy.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Answers the requests of one connection.
    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        let Hello { name, work_ms, .. } = self.hello;
        if self.resets.load(Ordering::Relaxed) {
            return reset(&stream);
        }
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(keep_alive) = read_head(&mut reader)? {
            if self.resets.load(Ordering::Relaxed) {
                return reset(&stream);
            }
            let slowness = if self.is_slow.load(Ordering::Relaxed) { SLOWNESS } else { 1 };
            thread::sleep(Duration::from_millis(*work_ms) * slowness);
            let body = format!("hello from {name}\n");
            let connection = if keep_alive { "keep-alive" } else { "close" };
            let length = body.len();
            write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\
                 Connection: {connection}\r\n\r\n{body}"
            )?;
            if !keep_alive {
                break;
            }
        }
        Ok(())
    }
}

/// Has the stream reset when it is closed.
fn reset(stream: &TcpStream) -> io::Result<()> {
    Ok(set_socket_linger(stream, Some(Duration::ZERO))?)
}

/// Reads the head of a request: whether the connection is kept after it, or `None` at the end of
/// the connection. Bodies aren't read, so a request with a body is the last one.
fn read_head(reader: &mut impl BufRead) -> io::Result<Option<bool>> {
    let mut head = String::new();
    let mut reader = reader.take(MAX_HEAD);
    while !head.ends_with("\r\n\r\n") {
        if reader.read_line(&mut head)? == 0 {
            return Ok(None);
        }
    }
    let head = head.to_ascii_lowercase();
    let last = ["http/1.0\r\n", "connection: close", "content-length:", "transfer-encoding:"];
    Ok(Some(!last.iter().any(|mark| head.contains(mark))))
}
