//! `hello`: a server that answers every HTTP request with `hello from NAME`.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use clap::Args;

use crate::print_address;

/// Connections served at once; the others wait in the backlog.
const N_THREADS: usize = 64;

/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest head of a request, in bytes.
const MAX_HEAD: u64 = 16 * 1024;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Hello {
    /// Where to listen
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// What it calls itself
    #[arg(long)]
    pub name: String,
}

impl Hello {
    /// Answers for ever.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let listener = TcpListener::bind(self.address)?;
        print_address(listener.local_addr()?);
        thread::scope(|scope| {
            for _ in 0..N_THREADS {
                scope.spawn(|| {
                    loop {
                        // A client that breaks off is its own affair.
                        let _ = listener.accept().and_then(|(stream, _)| self.serve(stream));
                    }
                });
            }
        });
        Ok(())
    }

    /// Answers the requests of one connection.
    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(keep_alive) = read_head(&mut reader)? {
            let body = format!("hello from {}\n", self.name);
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
