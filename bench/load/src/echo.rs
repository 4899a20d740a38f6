//! `echo`: sends each datagram back.

use std::net::{SocketAddr, UdpSocket};

use clap::Args;

use crate::say_listening;
use crate::udp;

/// Asked for on the command line.
#[derive(Args, Clone, Debug)]
pub struct Echo {
    /// Where to listen
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
}

impl Echo {
    /// Echoes for ever.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let socket = UdpSocket::bind(self.address)?;
        udp::widen(&socket);
        say_listening(socket.local_addr()?);
        serve(&socket);
        Ok(())
    }
}

/// Sends back whatever comes.
pub fn serve(socket: &UdpSocket) {
    let mut datagram = vec![0; 65_536];
    loop {
        // A client that is gone is its own affair.
        let Ok((n_bytes, from)) = socket.recv_from(&mut datagram) else { continue };
        let _ = socket.send_to(&datagram[..n_bytes], from);
    }
}
