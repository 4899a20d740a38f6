//! A server of this process, whose behaviour a scenario changes.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use rustix::net::sockopt::set_socket_linger;
use rustix::net::{Shutdown, shutdown};

/// What a server does with a connection.
#[derive(Clone, Copy, PartialEq)]
pub enum Behaviour {
    /// Answers a request with `hello from ID`.
    Answers,
    /// Resets the connection once it is accepted.
    ResetsAtOnce,
    /// Resets the connection once a request was received.
    ResetsAfterRequest,
}

/// A listening server; its port refuses once this is dropped.
pub struct Server {
    listener: TcpListener,
    behaviour: Arc<Mutex<Behaviour>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Answers on a socket that listens.
    pub fn start(id: &'static str, listener: TcpListener) -> Result<Server> {
        let behaviour = Arc::new(Mutex::new(Behaviour::Answers));
        let (accepting, current) = (listener.try_clone()?, Arc::clone(&behaviour));
        let thread = thread::spawn(move || {
            for stream in accepting.incoming() {
                let Ok(stream) = stream else { return };
                let behaviour = *current.lock().unwrap_or_else(PoisonError::into_inner);
                // A client that has gone gets nothing.
                let _ = serve(stream, id, behaviour);
            }
        });
        Ok(Server { listener, behaviour, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddrV4> {
        Ok(self.listener.local_addr()?.to_string().parse()?)
    }

    /// Serves connections that are accepted from now on in this way.
    pub fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap_or_else(PoisonError::into_inner) = behaviour;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // accept() in the other thread fails (shutdown(2) of a listening socket).
        let _ = shutdown(&self.listener, Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn serve(mut stream: TcpStream, id: &str, behaviour: Behaviour) -> io::Result<()> {
    if behaviour != Behaviour::ResetsAtOnce {
        let _ = stream.read(&mut [0; 4096])?;
    }
    if behaviour != Behaviour::Answers {
        // close() sends a RST then.
        return Ok(set_socket_linger(&stream, Some(Duration::ZERO))?);
    }
    let answer = format!("hello from {id}");
    let length = answer.len();
    let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}");
    write!(stream, "{head}\r\n\r\n{answer}")
}
