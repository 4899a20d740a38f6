//! `echo`: sends each datagram back, after its name and a space if it has one.

use std::net::{SocketAddr, UdpSocket};

use clap::Args;

use crate::print_address;
use crate::udp;

/// The arguments of this command.
#[derive(Args, Clone, Debug)]
pub struct Echo {
    /// Where to listen
    #[arg(value_name = "ADDR:PORT")]
    pub address: SocketAddr,
    /// What goes before each datagram
    #[arg(long)]
    pub name: Option<String>,
}

impl Echo {
    /// Echoes until it is killed.
    ///
    /// # Errors
    /// When it can't listen there.
    pub fn run(&self) -> anyhow::Result<()> {
        let socket = UdpSocket::bind(self.address)?;
        udp::widen(&socket);
        print_address(socket.local_addr()?);
        let prefix = self.name.as_ref().map(|name| format!("{name} ")).unwrap_or_default();
        serve(&socket, prefix.as_bytes());
        Ok(())
    }
}

/// Sends back whatever comes, after a prefix.
pub fn serve(socket: &UdpSocket, prefix: &[u8]) {
    let mut datagram = vec![0; 65_536];
    datagram[..prefix.len()].copy_from_slice(prefix);
    loop {
        // A client that is gone is no error.
        let Ok((n_bytes, from)) = socket.recv_from(&mut datagram[prefix.len()..]) else {
            continue;
        };
        let _ = socket.send_to(&datagram[..prefix.len() + n_bytes], from);
    }
}
