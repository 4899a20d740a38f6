//! `greet`: a server that speaks first, and no more than a byte.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpListener};
use std::thread;

use clap::Args;
use rustix::net::sockopt::set_socket_reuseaddr;
use rustix::net::{self, SocketFlags, SocketType};

use crate::print_address;
use crate::stream::family;

/// Connections that may wait; the kernel lowers it to net.core.somaxconn.
const BACKLOG: i32 = 65_535;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Greet {
    /// Where to listen
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// How many threads accept
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub threads: u16,
}

impl Greet {
    /// Greets until it is killed.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let listener = listen(self.address)?;
        print_address(listener.local_addr()?);
        thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(|| serve(&listener));
            }
            serve(&listener);
        });
        Ok(())
    }
}

/// Listens with a long backlog.
///
/// # Errors
/// When it can't listen there.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = net::socket_with(family(address), SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_reuseaddr(&socket, true)?;
    net::bind(&socket, &address)?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Writes a byte to each client, and hangs up.
pub fn serve(listener: &TcpListener) {
    loop {
        // A client that closes its connection is no error.
        let _ = listener.accept().and_then(|(mut stream, _)| stream.write_all(b"x"));
    }
}
