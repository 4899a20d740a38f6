//! TCP: messages, each after its length. A client may send further questions before the answer to the
//! first (RFC 7766, section 6.2.1.1); answers go out as they are there, in whatever order.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::OwnedReadHalf;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::acl;
use super::handler::Handler;
use super::message::HEADER_LEN;
use super::sockets::Transport;
use super::udp::MAX_QUESTION_LEN;

/// The connections of this host at one time, and as many of all others together. Beyond, the one
/// that has been idle longest makes room.
const MAX_CONNECTIONS: usize = 256;

/// The connections of one other client, beyond which the same goes for its own.
const MAX_CONNECTIONS_EACH: usize = 64;

/// The questions of one connection that are answered at one time. While there are so many, no
/// further one is read.
const MAX_PIPELINED: usize = 8;

/// How long a client may take to send a question, counted from the last answer while none is under
/// way, and to take an answer.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a listener rests that can't accept, such as for want of file descriptors.
const BACKOFF: Duration = Duration::from_millis(100);

/// The connections that are open.
#[derive(Debug, Default)]
pub(super) struct Connections {
    open: Mutex<ConnectionTable>,
}

/// Each by its number, in the order in which they came.
#[derive(Debug, Default)]
struct ConnectionTable {
    last: u64,
    by_number: BTreeMap<u64, ConnectionEntry>,
}

#[derive(Debug)]
struct ConnectionEntry {
    owner: Option<u64>,
    /// Since when it waits for a question; `None` while one is answered.
    idle_since: Option<Instant>,
    /// Ends it.
    end: Arc<Notify>,
}

/// One of the connections, until it is dropped.
#[derive(Debug)]
struct ConnectionGuard {
    connections: Arc<Connections>,
    number: u64,
    end: Arc<Notify>,
}

impl Connections {
    /// A place for one more, for which an idle one may have to go; `None` where all are busy.
    fn place(self: &Arc<Self>, owner: Option<u64>) -> Option<ConnectionGuard> {
        let mut open = self.lock();
        if owner.is_some() {
            open.evict_for(MAX_CONNECTIONS_EACH, |other| other == owner)?;
        }
        open.evict_for(MAX_CONNECTIONS, |other| other.is_some() == owner.is_some())?;
        open.last += 1;
        let (number, end) = (open.last, Arc::new(Notify::new()));
        let connection =
            ConnectionEntry { owner, idle_since: Some(Instant::now()), end: end.clone() };
        open.by_number.insert(number, connection);
        drop(open);
        Some(ConnectionGuard { connections: Arc::clone(self), number, end })
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionTable> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionTable {
    /// Sees to it that fewer than `most` are open of those whose owners are `such`; `None` where none
    /// of them is idle.
    fn evict_for(&mut self, most: usize, such: impl Fn(Option<u64>) -> bool) -> Option<()> {
        let those = || self.by_number.iter().filter(|(_, connection)| such(connection.owner));
        if those().count() < most {
            return Some(());
        }
        let idle =
            those().filter_map(|(number, connection)| Some((connection.idle_since?, *number)));
        let (_, number) = idle.min()?;
        self.by_number.remove(&number)?.end.notify_one();
        Some(())
    }
}

impl ConnectionGuard {
    /// Says whether a question is being answered. Returns whether the place is still there.
    fn set_busy(&self, is_busy: bool) -> bool {
        let mut open = self.connections.lock();
        let Some(connection) = open.by_number.get_mut(&self.number) else { return false };
        connection.idle_since = (!is_busy).then(Instant::now);
        true
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.connections.lock().by_number.remove(&self.number);
    }
}

/// Serves a listener until it is to stop; then until the questions are answered that have come.
pub(super) async fn serve(
    listener: TcpListener,
    handler: Arc<Handler>,
    connections: Arc<Connections>,
    patience: Duration,
    mut stops: watch::Receiver<bool>,
) {
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = open.join_next() => continue,
            _ = stops.wait_for(|stops| *stops) => break,
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!("a DNS connection can't be accepted: {error}");
                tokio::time::sleep(BACKOFF).await;
                continue;
            }
        };
        let client = client.ip().to_canonical();
        let Some(owner) = handler.owner(client) else {
            debug!(%client, "isn't served, so its connection is closed");
            continue;
        };
        let Some(place) = connections.place(owner) else {
            debug!(%client, "has too many connections");
            continue;
        };
        let (handler, stops) = (Arc::clone(&handler), stops.clone());
        open.spawn(async move {
            if let Err(error) =
                serve_connection(stream, client, &handler, &place, patience, stops).await
            {
                debug!(%client, %error, "a connection ended");
            }
        });
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

/// Answers what a client asks. One that doesn't go on sending and reading is cut off.
async fn serve_connection(
    stream: TcpStream,
    client: IpAddr,
    handler: &Arc<Handler>,
    place: &ConnectionGuard,
    patience: Duration,
    mut stops: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, writer) = stream.into_split();
    let writer = Arc::new(tokio::sync::Mutex::new(writer));
    let mut answers = JoinSet::new();
    let mut deadline = Instant::now() + patience;
    'connection: loop {
        // Kept over all that happens meanwhile: half a question must not be lost.
        let mut question = pin!(read(&mut reader));
        let question = loop {
            let is_idle = answers.is_empty();
            tokio::select! {
                question = &mut question, if answers.len() < MAX_PIPELINED => match question {
                    Ok(question) => break question,
                    // It may have ended its side only.
                    Err(_) if !is_idle => break 'connection,
                    Err(error) => return Err(error),
                },
                Some(ended) = answers.join_next(), if !is_idle => {
                    if !ended?? {
                        return Ok(());
                    }
                    if answers.is_empty() {
                        place.set_busy(false);
                        deadline = Instant::now() + patience;
                    }
                }
                () = tokio::time::sleep_until(deadline.into()), if is_idle => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                () = place.end.notified() => return Ok(()),
                _ = stops.wait_for(|stops| *stops) => break 'connection,
            }
        };
        if !place.set_busy(true) {
            return Ok(());
        }
        let (handler, writer) = (Arc::clone(handler), Arc::clone(&writer));
        answers.spawn(async move {
            let Some(reply) = handler.reply_over_tcp(&question, client).await else {
                return Ok(false);
            };
            let len = u16::try_from(reply.len()).map_err(io::Error::other)?;
            let reply = [&len.to_be_bytes(), &reply[..]].concat(); // some clients read no second piece
            let mut writer = writer.lock().await;
            tokio::time::timeout(patience, writer.write_all(&reply)).await??;
            Ok::<bool, io::Error>(true)
        });
    }
    while let Some(ended) = answers.join_next().await {
        ended??;
    }
    Ok(())
}

async fn read(stream: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let len = usize::from(stream.read_u16().await?);
    if !(HEADER_LEN..=MAX_QUESTION_LEN).contains(&len) {
        return Err(io::Error::other(format!("a question of {len} bytes")));
    }
    let mut question = vec![0; len];
    stream.read_exact(&mut question).await?;
    Ok(question)
}

impl Handler {
    /// Whose a connection of this client's is; `None` where it isn't served.
    fn owner(&self, client: IpAddr) -> Option<Option<u64>> {
        let clients = self.clients();
        match clients.is_own(client) {
            true => Some(None),
            false => clients.is_served(client).then(|| Some(acl::client_key(client))),
        }
    }

    /// The answer to a message over TCP; `None` where the connection is to be closed.
    async fn reply_over_tcp(&self, bytes: &[u8], client: IpAddr) -> Option<Vec<u8>> {
        match self.refusal(&self.ways(), bytes, Transport::Tcp, client) {
            Some(refusal) => refusal,
            None => self.reply(bytes, client).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_room_for_whom() {
        let connections = Arc::new(Connections::default());
        let place = |owner| connections.place(owner);
        let is_open =
            |place: &ConnectionGuard| connections.lock().by_number.contains_key(&place.number);
        let host: Vec<_> = (0..MAX_CONNECTIONS).map(|_| place(None).unwrap()).collect();
        // Four clients take all that there is for others.
        let mut others = Vec::new();
        for client in 0..4 {
            others.extend((0..MAX_CONNECTIONS_EACH).map(|_| place(Some(client)).unwrap()));
        }
        assert!(host.iter().chain(&others).all(is_open));

        // The host's own make room for it, the one that has been idle longest first.
        host[0].set_busy(true);
        host[0].set_busy(false);
        let _more = place(None).unwrap();
        assert!(is_open(&host[0]) && !is_open(&host[1]) && others.iter().all(is_open));

        // A client beyond its share makes room itself; a further one takes that of whoever is idle.
        let _more = place(Some(3)).unwrap();
        let first = 3 * MAX_CONNECTIONS_EACH;
        assert!(is_open(&others[0]) && !is_open(&others[first]));
        let _more = place(Some(9)).unwrap();
        assert!(!is_open(&others[0]) && !others[0].set_busy(true));

        // Who is busy stays.
        let busy: Vec<_> = others.iter().filter(|place| place.set_busy(true)).collect();
        assert!(place(Some(0)).is_some(), "there was room for one of its own");
        assert!(busy.iter().all(|place| is_open(place)));
    }
}
