//! TCP: a message after its length, and its answer, one at a time on each connection.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::message::HEADER_LEN;
use super::server::Handler;
use super::sockets::Transport;
use super::udp::MAX_QUESTION_LEN;

/// The connections at one time, of all listeners; those beyond wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 256;

/// The connections of one address; those beyond are closed.
const MAX_CONNECTIONS_EACH: usize = 64;

/// How long a client may take to send a question, counted from the answer before, and to take the
/// answer.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long a listener rests that can't accept, such as for want of file descriptors.
const REST: Duration = Duration::from_millis(100);

/// The connections that are open.
#[derive(Debug)]
pub(super) struct Connections {
    free: Arc<Semaphore>,
    by_client: Mutex<HashMap<IpAddr, usize>>,
}

impl Default for Connections {
    fn default() -> Connections {
        let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        Connections { free, by_client: Mutex::default() }
    }
}

/// One of a client's connections, until it is dropped.
struct Place {
    connections: Arc<Connections>,
    client: IpAddr,
}

impl Connections {
    fn place(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        let mut by_client = self.by_client.lock().unwrap_or_else(PoisonError::into_inner);
        let n_open = by_client.entry(client).or_default();
        if *n_open >= MAX_CONNECTIONS_EACH {
            return None;
        }
        *n_open += 1;
        Some(Place { connections: Arc::clone(self), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_client =
            self.connections.by_client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(n_open) = by_client.get_mut(&self.client) {
            *n_open -= 1;
            if *n_open == 0 {
                by_client.remove(&self.client);
            }
        }
    }
}

/// Serves a listener until it is dropped, with all of its connections.
pub(super) async fn serve(
    listener: TcpListener,
    handler: Arc<Handler>,
    connections: Arc<Connections>,
    patience: Duration,
) {
    let mut open = JoinSet::new();
    loop {
        let accept = async {
            let permit = connections.free.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accept => accepted,
            Some(_) = open.join_next() => continue,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("a DNS connection can't be accepted: {error}");
                tokio::time::sleep(REST).await;
                continue;
            }
        };
        let client = client.ip().to_canonical();
        let Some(place) = connections.place(client) else {
            debug!(%client, "has too many connections");
            continue;
        };
        let handler = Arc::clone(&handler);
        open.spawn(async move {
            let _held = (permit, place);
            if let Err(error) = converse(stream, client, &handler, patience).await {
                debug!(%client, %error, "a connection ended");
            }
        });
    }
}

/// Answers one question after the other. Whoever doesn't go on sending and reading is cut off.
async fn converse(
    mut stream: TcpStream,
    client: IpAddr,
    handler: &Handler,
    patience: Duration,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let question = tokio::time::timeout(patience, read(&mut stream)).await??;
        let Some(reply) = handler.reply_over_tcp(&question, client).await else {
            return Ok(());
        };
        let len = u16::try_from(reply.len()).map_err(io::Error::other)?;
        let reply = [&len.to_be_bytes(), &reply[..]].concat(); // some clients read no second piece
        tokio::time::timeout(patience, stream.write_all(&reply)).await??;
    }
}

async fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let len = usize::from(stream.read_u16().await?);
    if !(HEADER_LEN..=MAX_QUESTION_LEN).contains(&len) {
        return Err(io::Error::other(format!("a question of {len} bytes")));
    }
    let mut question = vec![0; len];
    stream.read_exact(&mut question).await?;
    Ok(question)
}

impl Handler {
    /// The answer to a message over TCP; `None` where the connection is to be closed.
    async fn reply_over_tcp(&self, bytes: &[u8], client: IpAddr) -> Option<Vec<u8>> {
        match self.refusal(bytes, Transport::Tcp, client) {
            Some(refusal) => refusal,
            None => self.reply(bytes, Transport::Tcp).await,
        }
    }
}
