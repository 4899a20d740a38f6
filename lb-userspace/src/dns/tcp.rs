//! TCP, and TLS above it (RFC 7858): messages, each after its length. Queries of one connection are
//! pipelined (RFC 7766, section 6.2.1.1): responses leave as they are ready, in any order.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use super::connections::{ConnectionGuard, Connections, MAX_PIPELINED};
use super::handler::Handler;
use super::message::HEADER_LEN;
use super::query_log::Arrival;
use super::sockets::Transport;
use super::tls;
use super::udp::MAX_QUESTION_LEN;

/// How long a client may take to send a query, counted from the last response while none is pending,
/// and to read a response.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a listener pauses after accept() failed, such as for lack of file descriptors.
const BACKOFF: Duration = Duration::from_millis(100);

/// Serves a listener, over TLS where there is an `acceptor`, until `stops`; then until the pending
/// queries are answered.
pub(super) async fn serve(
    listener: TcpListener,
    acceptor: Option<TlsAcceptor>,
    handler: Arc<Handler>,
    connections: Arc<Connections>,
    idle_timeout: Duration,
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
        let acl = handler.acl();
        if !acl.is_served(client.ip()) {
            debug!(%client, "isn't served, so its connection is closed");
            continue;
        }
        let Some(connection) = connections.open(acl.client_key(client.ip())) else {
            debug!(%client, "has too many connections");
            continue;
        };
        let (handler, stops, acceptor) = (handler.clone(), stops.clone(), acceptor.clone());
        open.spawn(async move {
            let served = serve_connection(
                stream,
                client,
                acceptor,
                handler,
                &connection,
                idle_timeout,
                stops,
            );
            if let Err(error) = served.await {
                debug!(%client, %error, "a connection ended");
            }
        });
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

/// Answers the queries of one connection, over TLS where there is an `acceptor`.
///
/// # Errors
/// When the handshake takes longer than `idle_timeout` or fails, and as [`serve_queries`].
pub(super) async fn serve_connection(
    stream: TcpStream,
    client: SocketAddr,
    acceptor: Option<TlsAcceptor>,
    handler: Arc<Handler>,
    connection: &ConnectionGuard,
    idle_timeout: Duration,
    mut stops: watch::Receiver<bool>,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let Some(acceptor) = acceptor else {
        let (reader, writer) = stream.into_split();
        let reply = move |message: Vec<u8>| {
            let handler = Arc::clone(&handler);
            let arrival = Arrival { client, transport: Transport::Tcp, at: Instant::now() };
            async move { handler.reply_over_tcp(&message, &arrival).await }
        };
        return serve_queries(reader, writer, reply, connection, idle_timeout, stops).await;
    };
    let accepted = tokio::select! {
        accepted = tokio::time::timeout(idle_timeout, acceptor.accept(stream)) => accepted??,
        () = connection.evicted() => return Ok(()),
        _ = stops.wait_for(|stops| *stops) => return Ok(()),
    };
    let (reader, writer) = tokio::io::split(accepted);
    let reply = move |message: Vec<u8>| {
        let handler = Arc::clone(&handler);
        async move { tls::reply(handler, &message, client).await }
    };
    serve_queries(reader, writer, reply, connection, idle_timeout, stops).await
}

/// Answers queries, each with what `reply` returns, until the client is idle for `idle_timeout`, reads nothing, or sends one that has
/// no response.
///
/// # Errors
/// When the client doesn't keep to the protocol or to `idle_timeout`.
pub(super) async fn serve_queries<R: Future<Output = Option<Vec<u8>>> + Send + 'static>(
    mut reader: impl AsyncRead + Unpin,
    writer: impl AsyncWrite + Unpin + Send + 'static,
    reply: impl Fn(Vec<u8>) -> R,
    connection: &ConnectionGuard,
    idle_timeout: Duration,
    mut stops: watch::Receiver<bool>,
) -> io::Result<()> {
    let writer = Arc::new(tokio::sync::Mutex::new(writer));
    let mut answers = JoinSet::new();
    let mut deadline = Instant::now() + idle_timeout;
    'connection: loop {
        // One future until it is complete: half a query must not be lost.
        let mut question = pin!(read(&mut reader));
        let question = loop {
            let is_idle = answers.is_empty();
            tokio::select! {
                question = &mut question, if answers.len() < MAX_PIPELINED => match question {
                    Ok(question) => break question,
                    // The client may have closed its side only.
                    Err(_) if !is_idle => break 'connection,
                    Err(error) => return Err(error),
                },
                Some(ended) = answers.join_next(), if !is_idle => {
                    if !ended?? {
                        return Ok(());
                    }
                    if answers.is_empty() {
                        connection.set_busy(false);
                        deadline = Instant::now() + idle_timeout;
                    }
                }
                () = tokio::time::sleep_until(deadline.into()), if is_idle => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                () = connection.evicted() => return Ok(()),
                _ = stops.wait_for(|stops| *stops) => break 'connection,
            }
        };
        if !connection.set_busy(true) {
            return Ok(());
        }
        let (reply, writer) = (reply(question), Arc::clone(&writer));
        answers.spawn(async move {
            let Some(reply) = reply.await else { return Ok(false) };
            let len = u16::try_from(reply.len()).map_err(io::Error::other)?;
            let reply = [&len.to_be_bytes(), &reply[..]].concat(); // some clients read no second segment
            let mut writer = writer.lock().await;
            let write = async {
                writer.write_all(&reply).await?;
                writer.flush().await // of the records that TLS holds
            };
            tokio::time::timeout(idle_timeout, write).await??;
            Ok::<bool, io::Error>(true)
        });
    }
    while let Some(ended) = answers.join_next().await {
        ended??;
    }
    Ok(())
}

async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let len = usize::from(stream.read_u16().await?);
    if !(HEADER_LEN..=MAX_QUESTION_LEN).contains(&len) {
        return Err(io::Error::other(format!("a question of {len} bytes")));
    }
    let mut question = vec![0; len];
    stream.read_exact(&mut question).await?;
    Ok(question)
}
