//! Netlink (netlink(7)): requests, their answers, and attributes.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use super::bpf::ask_for_reasons;

const NLMSG_ERROR: u16 = libc::NLMSG_ERROR as u16;
const NLMSG_DONE: u16 = libc::NLMSG_DONE as u16;
const NLM_F_REQUEST: u16 = libc::NLM_F_REQUEST as u16;
/// The kernel is to report the result.
pub const NLM_F_ACK: u16 = libc::NLM_F_ACK as u16;
/// All objects are to be listed.
pub const NLM_F_DUMP: u16 = libc::NLM_F_DUMP as u16;
/// A list that changed while it was made.
pub const NLM_F_DUMP_INTR: u16 = libc::NLM_F_DUMP_INTR as u16;
/// Attributes follow a result.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// NLMSGERR_ATTR_MSG
const REASON: u16 = 1;

/// NLA_F_NESTED and NLA_F_NET_BYTEORDER.
const ATTRIBUTE_FLAGS: u16 = 3 << 14;
const ATTRIBUTE_HEADER_SIZE: usize = 4;
/// struct nlmsghdr
pub const MESSAGE_HEADER_SIZE: usize = 16;
/// Messages start at multiples of it.
const ALIGNMENT: usize = 4;
/// More than the kernel puts into one answer.
const BUFFER_SIZE: usize = 1 << 16;

/// The kernel answers at once; this is for the day on which it doesn't.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// A netlink socket. It belongs to the network namespace that it was opened in.
#[derive(Debug)]
pub struct Netlink {
    socket: OwnedFd,
    /// The last request's number.
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Opens one in the calling thread's network namespace; `None` is rtnetlink's protocol, whose number is 0.
    ///
    /// # Errors
    /// When the kernel was built without the protocol.
    pub fn open(protocol: Option<rustix::net::Protocol>) -> io::Result<Netlink> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        Ok(Netlink { socket, sequence: 0, buffer: vec![0; BUFFER_SIZE] })
    }

    /// Has errors be the kernel's own words, where it has some: they have no number then.
    ///
    /// # Errors
    /// When the kernel can't (before 4.12).
    pub fn with_reasons(self) -> io::Result<Netlink> {
        ask_for_reasons(self.socket.as_fd())?;
        Ok(self)
    }

    /// Sends a request.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn send(&mut self, kind: u16, flags: u16, payload: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = (MESSAGE_HEADER_SIZE + payload.len()) as u32;
        let message = [
            &length.to_ne_bytes()[..],
            &kind.to_ne_bytes(),
            &(NLM_F_REQUEST | flags).to_ne_bytes(),
            &self.sequence.to_ne_bytes(),
            &0u32.to_ne_bytes(),
            payload,
        ]
        .concat();
        rustix::io::retry_on_intr(|| send(&self.socket, &message, SendFlags::empty()))?;
        Ok(())
    }

    /// Passes each message of the last request's answer to `take`, up to the one with the request's
    /// result.
    ///
    /// # Errors
    /// The request's own, and those of `take`.
    pub fn receive(
        &mut self,
        mut take: impl FnMut(Message<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        loop {
            let receive = || recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC);
            let (_, length) = rustix::io::retry_on_intr(receive)?;
            let mut rest = self.buffer.get(..length).ok_or_else(malformed)?;
            while !rest.is_empty() {
                let message = Message::parse(&mut rest)?;
                // A message of an earlier request that failed half-way.
                if message.sequence != self.sequence {
                    continue;
                }
                if matches!(message.kind, NLMSG_ERROR | NLMSG_DONE) {
                    return message.outcome();
                }
                take(message)?;
            }
        }
    }
}

/// struct nlattr, and what follows it.
pub fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = (ATTRIBUTE_HEADER_SIZE + value.len()) as u16;
    [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
}

/// The value of the first attribute of a kind.
///
/// # Errors
/// When the attributes can't be understood.
pub fn find_attribute(mut bytes: &[u8], kind: u16) -> io::Result<Option<&[u8]>> {
    while let Some(&[l0, l1, k0, k1]) = bytes.first_chunk() {
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(ATTRIBUTE_HEADER_SIZE..length).ok_or_else(malformed)?;
        if u16::from_ne_bytes([k0, k1]) & !ATTRIBUTE_FLAGS == kind {
            return Ok(Some(value));
        }
        bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
    }
    Ok(None)
}

/// struct nlmsghdr, and what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Its type.
    pub kind: u16,
    /// NLM_F_*
    pub flags: u16,
    sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

impl<'a> Message<'a> {
    /// Takes the first message off `bytes`, which may end before its padding.
    fn parse(bytes: &mut &'a [u8]) -> io::Result<Message<'a>> {
        let header: [u8; MESSAGE_HEADER_SIZE] = *bytes.first_chunk().ok_or_else(malformed)?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = header;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let payload = bytes.get(MESSAGE_HEADER_SIZE..length).ok_or_else(malformed)?;
        *bytes = bytes.get(length.next_multiple_of(ALIGNMENT)..).unwrap_or_default();
        Ok(Message {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            payload,
        })
    }

    /// How a request ended: both NLMSG_ERROR and NLMSG_DONE start with 0 or a negative errno.
    fn outcome(&self) -> io::Result<()> {
        match i32::from_ne_bytes(*self.payload.first_chunk().ok_or_else(malformed)?) {
            negative_errno @ ..0 => {
                let error = io::Error::from_raw_os_error(negative_errno.saturating_neg());
                Err(self.reason().map_or(error, io::Error::other))
            }
            _ => Ok(()),
        }
    }

    /// The kernel's own words about an error, if it has some.
    fn reason(&self) -> Option<String> {
        if self.kind != NLMSG_ERROR || self.flags & NLM_F_ACK_TLVS == 0 {
            return None;
        }
        let attributes = self.payload.get(4 + MESSAGE_HEADER_SIZE..)?;
        let text = find_attribute(attributes, REASON).ok()??;
        let text = text.split(|&octet| octet == 0).next()?;
        Some(String::from_utf8_lossy(text).into_owned())
    }
}

/// What the kernel doesn't send.
pub fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer can't be understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_end_with_zero_or_an_errno() {
        let message = |payload: &[u8]| {
            let length = (MESSAGE_HEADER_SIZE + payload.len()) as u32;
            [&length.to_ne_bytes()[..], &[0; 12], payload].concat()
        };
        let outcome = |bytes: &[u8]| Message::parse(&mut &bytes[..]).unwrap().outcome();
        assert!(outcome(&message(&0i32.to_ne_bytes())).is_ok());
        let refused = outcome(&message(&(-libc::EPERM).to_ne_bytes())).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EPERM));
        assert!(outcome(&message(&i32::MIN.to_ne_bytes())).is_err());
        assert!(outcome(&message(&[])).is_err());
        assert!(Message::parse(&mut &message(&[0; 4])[..19]).is_err());
    }

    #[test]
    fn an_error_may_have_words() {
        let words = attribute(REASON, b"XDP is not enough\0");
        let payload =
            [&(-libc::EINVAL).to_ne_bytes()[..], &[0; MESSAGE_HEADER_SIZE], &words].concat();
        let message = |flags| Message { kind: NLMSG_ERROR, flags, sequence: 1, payload: &payload };
        let error = message(NLM_F_ACK_TLVS).outcome().unwrap_err();
        assert_eq!(error.to_string(), "XDP is not enough");
        assert_eq!(message(0).outcome().unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
