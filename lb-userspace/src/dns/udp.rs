//! UDP listeners: they receive queries and send responses in batches.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg,
    sendmsg, setsockopt, sockopt,
};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};
use tracing::debug;

use crate::interfaces::socket_address;

/// The longest query that is received: more than any client sends.
pub(super) const MAX_QUESTION_LEN: usize = 4096;

/// How many messages are received, or sent, in one system call.
const BATCH: usize = 32;

/// A socket that is served.
#[derive(Debug)]
pub(super) struct UdpEndpoint {
    socket: UdpSocket,
    /// Whether it is bound to the unspecified address, so that the destination comes with each
    /// message (IP_PKTINFO).
    takes_any: bool,
}

/// The local address that a message was sent to, from which its response leaves.
#[derive(Clone, Copy, Debug)]
pub(super) enum LocalAddress {
    Bound,
    V4(nix::libc::in_pktinfo),
    V6(nix::libc::in6_pktinfo),
}

/// Buffers for queries.
pub(super) struct RecvBatch {
    buffers: Vec<u8>,
    headers: MultiHeaders<SockaddrStorage>,
    /// The length of each message that was received, who sent it, and where to.
    pub(super) received: Vec<(usize, SocketAddr, LocalAddress)>,
}

/// Responses to send.
#[derive(Debug, Default)]
pub(super) struct SendBatch {
    bytes: Vec<u8>,
    answers: Vec<(std::ops::Range<usize>, SocketAddr, LocalAddress)>,
}

impl RecvBatch {
    /// Empty ones.
    pub(super) fn new() -> RecvBatch {
        let control = nix::cmsg_space!(nix::libc::in_pktinfo, nix::libc::in6_pktinfo);
        RecvBatch {
            buffers: vec![0; BATCH * MAX_QUESTION_LEN],
            headers: MultiHeaders::preallocate(BATCH, Some(control)),
            received: Vec::new(),
        }
    }

    /// The message at that place of `received`.
    pub(super) fn message(&self, idx: usize) -> &[u8] {
        let (len, ..) = self.received[idx];
        &self.buffers[idx * MAX_QUESTION_LEN..][..len]
    }
}

impl SendBatch {
    /// Adds an answer.
    pub(super) fn push(&mut self, message: &[u8], client: SocketAddr, from: LocalAddress) {
        let begin = self.bytes.len();
        self.bytes.extend_from_slice(message);
        self.answers.push((begin..self.bytes.len(), client, from));
    }
}

impl AsFd for UdpEndpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl UdpEndpoint {
    /// Makes `socket` ready.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn new(socket: UdpSocket) -> io::Result<UdpEndpoint> {
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        match address.ip() {
            ip if !ip.is_unspecified() => {}
            IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
            IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
        }
        Ok(UdpEndpoint { socket, takes_any: address.ip().is_unspecified() })
    }

    /// Receives the queued messages, one batch at most.
    ///
    /// # Errors
    /// When there is none, or the socket can't be read.
    pub(super) fn receive(&self, inbox: &mut RecvBatch) -> io::Result<()> {
        inbox.received.clear();
        let mut buffers: Vec<[IoSliceMut<'_>; 1]> = inbox
            .buffers
            .chunks_mut(MAX_QUESTION_LEN)
            .map(|buffer| [IoSliceMut::new(buffer)])
            .collect();
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
        for message in recvmmsg(fd, &mut inbox.headers, &mut buffers, flags, None)? {
            let client = message.address.as_ref().and_then(socket_address);
            let mut to = LocalAddress::Bound;
            if self.takes_any {
                for control in message.cmsgs()? {
                    match control {
                        ControlMessageOwned::Ipv4PacketInfo(info) => to = LocalAddress::V4(info),
                        ControlMessageOwned::Ipv6PacketInfo(info) => to = LocalAddress::V6(info),
                        _ => {}
                    }
                }
            }
            // A sender without an internet address gets no response.
            let unspecified = SocketAddr::from(([0, 0, 0, 0], 0));
            inbox.received.push((message.bytes, client.unwrap_or(unspecified), to));
        }
        Ok(())
    }

    /// Sends all responses. One that the kernel refuses is lost: the client queries again.
    pub(super) fn flush(&self, outbox: &mut SendBatch) {
        let bound = |answer: &(std::ops::Range<usize>, SocketAddr, LocalAddress)| {
            matches!(answer.2, LocalAddress::Bound)
        };
        for batch in outbox.answers.chunk_by(|one, other| bound(one) && bound(other)) {
            for batch in batch.chunks(BATCH) {
                self.send_batch(&outbox.bytes, batch);
            }
        }
        outbox.bytes.clear();
        outbox.answers.clear();
    }

    fn send_batch(
        &self,
        bytes: &[u8],
        batch: &[(std::ops::Range<usize>, SocketAddr, LocalAddress)],
    ) {
        if let [(range, client, from)] = batch {
            return self.send(&bytes[range.clone()], *client, *from);
        }
        let messages: Vec<[IoSlice<'_>; 1]> =
            batch.iter().map(|(range, ..)| [IoSlice::new(&bytes[range.clone()])]).collect();
        let addresses: Vec<SocketAddrAny> =
            batch.iter().map(|(_, client, _)| SocketAddrAny::from(*client)).collect();
        let mut n_done = 0;
        while n_done < batch.len() {
            let mut controls: Vec<_> =
                batch[n_done..].iter().map(|_| SendAncillaryBuffer::default()).collect();
            let mut headers: Vec<MMsgHdr<'_>> = messages[n_done..]
                .iter()
                .zip(&addresses[n_done..])
                .zip(&mut controls)
                .map(|((message, address), control)| {
                    MMsgHdr::new_with_addr(address, message, control)
                })
                .collect();
            match sendmmsg(&self.socket, &mut headers, SendFlags::empty()) {
                Ok(n_sent) => n_done += n_sent.max(1),
                // It concerns the first one only.
                Err(error) => {
                    debug!(client = %batch[n_done].1, %error, "an answer was lost");
                    n_done += 1;
                }
            }
        }
    }

    /// Sends a response from the address that was queried. One that the kernel refuses is lost: the
    /// client queries again.
    pub(super) fn send(&self, bytes: &[u8], client: SocketAddr, from: LocalAddress) {
        let sent = match from {
            LocalAddress::Bound => self.socket.send_to(bytes, client),
            LocalAddress::V4(mut info) => {
                // The kernel chooses the route.
                info.ipi_ifindex = 0;
                self.send_from(bytes, client, ControlMessage::Ipv4PacketInfo(&info))
            }
            LocalAddress::V6(mut info) => {
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
