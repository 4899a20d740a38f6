//! `helloworld --listen ADDR:PORT --name N`: answers every HTTP request with `hello from N`.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// Connections served at once; the others wait in the backlog.
const N_THREADS: usize = 64;

/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// The longest head of a request, in bytes.
const MAX_HEAD: u64 = 16 * 1024;

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ["--listen", listen, "--name", name] = words[..] else {
        eprintln!("usage: helloworld --listen ADDR:PORT --name N");
        std::process::exit(2);
    };
    let listener = TcpListener::bind(listen)?;
    println!("listening on {}", listener.local_addr()?);
    thread::scope(|scope| {
        for _ in 0..N_THREADS {
            scope.spawn(|| {
                loop {
                    // A client that breaks off is its own affair.
                    let _ = listener.accept().and_then(|(stream, _)| serve(stream, name));
                }
            });
        }
    });
    Ok(())
}

/// Answers the requests of one connection.
fn serve(mut stream: TcpStream, name: &str) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(keep_alive) = read_head(&mut reader)? {
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

/// Reads the head of a request: whether the connection goes on after it, or `None` at the end of
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
