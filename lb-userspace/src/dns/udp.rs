//! UDP: a thread for each socket, which receives, has the message answered and sends.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::time::Timespec;
use tracing::{debug, warn};

use super::clients;

/// The longest question: more than any that asks.
pub(super) const MAX_QUESTION_LEN: usize = 4096;

/// How long a socket rests that can't be read.
const REST: Duration = Duration::from_millis(100);

/// A socket that is served.
#[derive(Debug)]
pub(super) struct Endpoint {
    socket: UdpSocket,
    /// Whether it is bound to every address, so that each message says to which it came.
    takes_any: bool,
}

/// The address of ours that a message came to, where the socket has several.
#[derive(Clone, Copy, Debug)]
pub(super) enum To {
    Bound,
    V4(nix::libc::in_pktinfo),
    V6(nix::libc::in6_pktinfo),
}

impl Endpoint {
    /// Makes `socket` ready.
    ///
    /// # Errors
    /// Where the kernel won't.
    pub(super) fn new(socket: UdpSocket) -> io::Result<Endpoint> {
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        match address.ip() {
            ip if !ip.is_unspecified() => {}
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
            IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
        }
        Ok(Endpoint { socket, takes_any: address.ip().is_unspecified() })
    }

    /// The next message: its length, who sent it, and where to.
    fn receive(
        &self,
        buffer: &mut [u8],
        control: &mut [u8],
    ) -> io::Result<(usize, SocketAddr, To)> {
        if !self.takes_any {
            let (len, client) = self.socket.recv_from(buffer)?;
            return Ok((len, client, To::Bound));
        }
        let mut pieces = [IoSliceMut::new(buffer)];
        let fd = self.socket.as_raw_fd();
        let flags = MsgFlags::empty();
        let message = recvmsg::<SockaddrStorage>(fd, &mut pieces, Some(control), flags)?;
        let client = message.address.as_ref().and_then(clients::socket_address);
        let client = client.ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut to = To::Bound;
        for control in message.cmsgs()? {
            match control {
                ControlMessageOwned::Ipv4PacketInfo(info) => to = To::V4(info),
                ControlMessageOwned::Ipv6PacketInfo(info) => to = To::V6(info),
                _ => {}
            }
        }
        Ok((message.bytes, client, to))
    }

    /// Sends an answer, from the address that was asked. It is lost where the kernel can't take it
    /// now: the client asks again.
    pub(super) fn send(&self, bytes: &[u8], client: SocketAddr, from: To) {
        let sent = match from {
            To::Bound => self.socket.send_to(bytes, client),
            To::V4(mut info) => {
                // The address counts; the way is the kernel's to choose.
                info.ipi_ifindex = 0;
                self.send_from(bytes, client, ControlMessage::Ipv4PacketInfo(&info))
            }
            To::V6(mut info) => {
                let is_link_local = info.ipi6_addr.s6_addr[..2] == [0xfe, 0x80];
                if !is_link_local {
                    info.ipi6_ifindex = 0;
                }
                self.send_from(bytes, client, ControlMessage::Ipv6PacketInfo(&info))
            }
        };
        if let Err(error) = sent {
            debug!(%client, %error, "an answer was lost");
        }
    }

    fn send_from(
        &self,
        bytes: &[u8],
        client: SocketAddr,
        from: ControlMessage<'_>,
    ) -> io::Result<usize> {
        let client = SockaddrStorage::from(client);
        let (fd, pieces) = (self.socket.as_raw_fd(), [IoSlice::new(bytes)]);
        Ok(sendmsg(fd, &pieces, &[from], MsgFlags::empty(), Some(&client))?)
    }
}

/// Tells threads to stop.
#[derive(Debug)]
pub(super) struct Stop {
    is_set: AtomicBool,
    event: OwnedFd,
}

impl Stop {
    /// # Errors
    /// Where the kernel has no more file descriptors.
    pub(super) fn new() -> io::Result<Stop> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Stop { is_set: AtomicBool::new(false), event })
    }

    /// Stops those that wait, and those that don't.
    pub(super) fn set(&self) {
        self.is_set.store(true, Ordering::Relaxed);
        let told = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        debug_assert!(told.is_ok(), "{told:?}");
    }
}

/// Receives messages until it is stopped: each goes to `take`, with who sent it and where to.
pub(super) fn serve(
    endpoint: &Arc<Endpoint>,
    stop: &Stop,
    mut take: impl FnMut(&[u8], SocketAddr, To),
) {
    let mut buffer = vec![0; MAX_QUESTION_LEN];
    let mut control = nix::cmsg_space!(nix::libc::in_pktinfo, nix::libc::in6_pktinfo);
    while !stop.is_set.load(Ordering::Relaxed) {
        match endpoint.receive(&mut buffer, &mut control) {
            Ok((len, client, to)) => take(&buffer[..len], client, to),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait(&[PollFd::new(&endpoint.socket, PollFlags::IN)], stop, None);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                warn!("a DNS socket can't be read for a moment: {error}");
                wait(&[], stop, Some(REST));
            }
        }
    }
}

/// Waits for one of `others`, or the stop, or the end of `limit`.
fn wait(others: &[PollFd<'_>], stop: &Stop, limit: Option<Duration>) {
    let mut all: Vec<PollFd<'_>> = others.to_vec();
    all.push(PollFd::new(&stop.event, PollFlags::IN));
    let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
    match poll(&mut all, limit.as_ref()) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => {
            warn!("a DNS socket can't be waited for: {error}");
            std::thread::sleep(REST);
        }
    }
}
