//! The pool of sockets for upstream queries: a few connected ones per upstream and thread, drawn at
//! random.
//!
//! To forge a response without seeing the query, an attacker has to hit its port and its id. A
//! random member of a random set is as hard to hit as a fresh port: 1 of the 28,232 ports of
//! net.ipv4.ip_local_port_range by default, times 65,536 ids, 30.8 bits. A pool lengthens the life
//! of a port, in which side channels may find it (SAD DNS, CVE-2020-25705), so none lives for long.
//! A connected socket receives messages of its upstream only.

use std::collections::HashMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, MultiHeaders, recvmmsg};
use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, MMsgHdr, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType, sendmmsg,
};
use tracing::debug;

use super::random::Random;
use super::relay::SocketId;

/// The sockets for each upstream.
const N_PORTS: usize = 16;

/// How many queries a socket is drawn for, and for how long.
const MAX_USES: u32 = 1024;
const MAX_AGE: Duration = Duration::from_secs(30);

/// The mismatched messages after which a socket isn't drawn any more.
const MAX_MISMATCHES: u32 = 10;

/// How many messages are received in one system call.
pub(super) const BATCH: usize = 32;

/// The buffer for one response: more than the size that we advertise, as some resolvers send more,
/// and one byte that shows that there was still more.
const ANSWER_LEN: usize = 4097;

/// The numbers in epoll below that of the first port.
pub(super) const N_RESERVED: SocketId = 2;

#[derive(Debug)]
struct PooledSocket {
    socket: OwnedFd,
    server: SocketAddr,
    opened: Instant,
    n_uses: u32,
    n_in_flight: u32,
    n_mismatches: u32,
    is_retired: bool,
}

/// The sockets of one thread.
#[derive(Debug)]
pub(super) struct SocketPool {
    epoll: OwnedFd,
    random: Random,
    sockets: HashMap<SocketId, PooledSocket>,
    /// Those that are drawn from, by place.
    pools: HashMap<SocketAddr, [Option<SocketId>; N_PORTS]>,
    /// The draw of this batch: all its queries to one upstream leave in one system call.
    drawn: HashMap<SocketAddr, SocketId>,
    last: SocketId,
    queue: Vec<(SocketId, std::ops::Range<usize>)>,
    queued: Vec<u8>,
    buffers: Vec<u8>,
    headers: MultiHeaders<()>,
}

impl SocketPool {
    /// An empty pool, whose sockets are added to `epoll`.
    pub(super) fn new(epoll: OwnedFd) -> SocketPool {
        SocketPool {
            epoll,
            random: Random::new(),
            sockets: HashMap::new(),
            pools: HashMap::new(),
            drawn: HashMap::new(),
            last: N_RESERVED - 1,
            queue: Vec::new(),
            queued: Vec::new(),
            buffers: vec![0; BATCH * ANSWER_LEN],
            headers: MultiHeaders::preallocate(BATCH, None),
        }
    }

    /// The epoll instance.
    pub(super) fn epoll(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Draws an id.
    pub(super) fn id(&mut self) -> u16 {
        self.random.u16()
    }

    /// Draws a socket that is connected to `server` for one more query; `None` where there is none
    /// to be had.
    pub(super) fn draw(&mut self, server: SocketAddr, now: Instant) -> Option<SocketId> {
        let port = match self.drawn.get(&server) {
            Some(&port) => port,
            None => {
                let port = self.draw_anew(server, now)?;
                self.drawn.insert(server, port);
                port
            }
        };
        let socket = self.sockets.get_mut(&port)?;
        (socket.n_uses, socket.n_in_flight) = (socket.n_uses + 1, socket.n_in_flight + 1);
        Some(port)
    }

    fn draw_anew(&mut self, server: SocketAddr, now: Instant) -> Option<SocketId> {
        let place = self.random.below(N_PORTS);
        let port = self.pools.get(&server).and_then(|pool| pool[place]);
        if let Some(port) = port {
            let is_fresh = self.sockets.get(&port).is_some_and(|socket| {
                socket.n_uses < MAX_USES && now.saturating_duration_since(socket.opened) < MAX_AGE
            });
            if is_fresh {
                return Some(port);
            }
            self.retire(port);
        }
        match self.open(server, now) {
            Ok(port) => {
                let pool = self.pools.entry(server).or_default();
                pool[place] = Some(port);
                Some(port)
            }
            Err(error) => {
                debug!(%server, %error, "no socket can be had for a query");
                self.pools.get(&server)?.iter().flatten().next().copied()
            }
        }
    }

    fn open(&mut self, server: SocketAddr, now: Instant) -> io::Result<SocketId> {
        let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None)?;
        // The kernel binds it, to a random port of net.ipv4.ip_local_port_range.
        rustix::net::connect(&socket, &server)?;
        // 0 comes round again only after as many sockets as there are numbers.
        let mut port = self.last.wrapping_add(1).max(N_RESERVED);
        while self.sockets.contains_key(&port) {
            port = port.wrapping_add(1).max(N_RESERVED);
        }
        self.last = port;
        let data = epoll::EventData::new_u64(port.into());
        epoll::add(&self.epoll, &socket, data, epoll::EventFlags::IN)?;
        let (n_uses, n_in_flight, n_mismatches, is_retired) = (0, 0, 0, false);
        let opened = now;
        self.sockets.insert(
            port,
            PooledSocket { socket, server, opened, n_uses, n_in_flight, n_mismatches, is_retired },
        );
        Ok(port)
    }

    /// Stops drawing a socket, and closes it once its last query is done.
    fn retire(&mut self, port: SocketId) {
        let Some(socket) = self.sockets.get_mut(&port) else { return };
        socket.is_retired = true;
        let (server, is_idle) = (socket.server, socket.n_in_flight == 0);
        if let Some(pool) = self.pools.get_mut(&server) {
            for place in pool.iter_mut().filter(|place| **place == Some(port)) {
                *place = None;
            }
            if pool.iter().all(Option::is_none) {
                self.pools.remove(&server);
            }
        }
        self.drawn.retain(|_, drawn| *drawn != port);
        if is_idle {
            self.sockets.remove(&port); // closed, so epoll forgets it
        }
    }

    /// One query of a socket is done with.
    pub(super) fn done(&mut self, port: SocketId) {
        let Some(socket) = self.sockets.get_mut(&port) else { return };
        socket.n_in_flight = socket.n_in_flight.saturating_sub(1);
        if socket.is_retired && socket.n_in_flight == 0 {
            self.sockets.remove(&port);
        }
    }

    /// Counts a message that matches no query. Returns whether the socket is retired by that.
    pub(super) fn mismatch(&mut self, port: SocketId) -> bool {
        let Some(socket) = self.sockets.get_mut(&port) else { return false };
        socket.n_mismatches += 1;
        let is_last = socket.n_mismatches >= MAX_MISMATCHES && !socket.is_retired;
        if is_last {
            debug!(server = %socket.server, "a port got too many messages that answer nothing");
            // Its queries are still in flight, so it is there until the caller has dealt with them.
            self.retire(port);
        }
        is_last
    }

    /// Closes the idle sockets that have reached their age.
    pub(super) fn close_old(&mut self, now: Instant) {
        let is_old =
            |socket: &PooledSocket| now.saturating_duration_since(socket.opened) >= MAX_AGE;
        let old = self.sockets.iter().filter(|(_, socket)| is_old(socket) && !socket.is_retired);
        let old: Vec<SocketId> = old.map(|(port, _)| *port).collect();
        old.into_iter().for_each(|port| self.retire(port));
    }

    /// Adds a query to this batch.
    pub(super) fn send(&mut self, port: SocketId, message: &[u8]) {
        let begin = self.queued.len();
        self.queued.extend_from_slice(message);
        self.queue.push((port, begin..self.queued.len()));
    }

    /// Sends the batch, those of each socket in one system call. Adds the sockets whose upstream
    /// can't be reached to `unreachable`; other queries that can't be sent are lost, as on the way.
    pub(super) fn flush(&mut self, unreachable: &mut Vec<SocketId>) {
        self.drawn.clear();
        self.queue.sort_by_key(|(port, _)| *port); // stable
        for batch in self.queue.chunk_by(|(one, _), (other, _)| one == other) {
            let Some(((port, _), socket)) =
                batch.first().and_then(|first| Some((first, self.sockets.get(&first.0)?)))
            else {
                continue;
            };
            let messages = batch.iter().map(|(_, range)| &self.queued[range.clone()]);
            if let Err(error) = send_all(&socket.socket, messages) {
                debug!(server = %socket.server, %error, "queries can't be sent");
                if !matches!(error, Errno::AGAIN | Errno::NOBUFS) {
                    unreachable.push(*port);
                }
            }
        }
        self.queue.clear();
        self.queued.clear();
    }

    /// Receives a batch of messages of a socket.
    ///
    /// # Errors
    /// When the upstream can't be reached, as an ICMP message reported.
    pub(super) fn receive(
        &mut self,
        port: SocketId,
        inbox: &mut ReceiveBuffer,
    ) -> Result<(), Errno> {
        inbox.messages.clear();
        let Some(socket) = self.sockets.get(&port) else { return Ok(()) };
        let fd = socket.socket.as_raw_fd();
        let lens: Vec<usize> = {
            let buffers = self.buffers.chunks_mut(ANSWER_LEN);
            let mut buffers: Vec<[IoSliceMut<'_>; 1]> =
                buffers.map(|buffer| [IoSliceMut::new(buffer)]).collect();
            let flags = MsgFlags::MSG_DONTWAIT;
            match recvmmsg(fd, &mut self.headers, &mut buffers, flags, None) {
                Ok(received) => received.map(|message| message.bytes).collect(),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return Ok(()),
                Err(error) => return Err(Errno::from_raw_os_error(error as i32)),
            }
        };
        for (len, buffer) in lens.into_iter().zip(self.buffers.chunks_mut(ANSWER_LEN)) {
            if len == ANSWER_LEN {
                buffer[2] |= 0x02; // the kernel cut it off
            }
            inbox.push(&buffer[..len]);
        }
        Ok(())
    }
}

/// Messages that were received, in a buffer that is used again.
#[derive(Debug, Default)]
pub(super) struct ReceiveBuffer {
    bytes: Vec<u8>,
    messages: Vec<std::ops::Range<usize>>,
}

impl ReceiveBuffer {
    fn push(&mut self, message: &[u8]) {
        if self.messages.is_empty() {
            self.bytes.clear();
        }
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(message);
        self.messages.push(begin..self.bytes.len());
    }

    /// The messages.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.messages.iter().map(|range| &self.bytes[range.clone()])
    }
}

/// Sends messages on a connected socket.
fn send_all<'a>(
    socket: impl AsFd,
    messages: impl ExactSizeIterator<Item = &'a [u8]>,
) -> Result<(), Errno> {
    let mut messages: Vec<IoSlice<'_>> = messages.map(IoSlice::new).collect();
    if let [message] = &messages[..] {
        return rustix::net::send(&socket, message, SendFlags::empty()).map(drop);
    }
    let mut rest = &mut messages[..];
    while !rest.is_empty() {
        let mut controls: Vec<_> = rest.iter().map(|_| SendAncillaryBuffer::default()).collect();
        let mut headers: Vec<MMsgHdr<'_>> = rest
            .iter()
            .zip(&mut controls)
            .map(|(message, control)| MMsgHdr::new(std::slice::from_ref(message), control))
            .collect();
        let n_sent = sendmmsg(&socket, &mut headers, SendFlags::empty())?;
        drop(headers);
        rest = &mut rest[n_sent.max(1)..];
    }
    Ok(())
}
