//! The headers of a packet: which flow it is of, and where what has to be translated lies.

use core::hint::black_box;

use zerocopy::{Immutable, IntoBytes};

use crate::{Address, IPPROTO_TCP, IPPROTO_UDP};

/// How many bytes of a packet are looked at, from its IP header on. All headers that are translated have
/// to be within. A power of two.
pub const WINDOW_LEN: usize = 128;

/// The protocol number of ICMP.
pub const IPPROTO_ICMP: u8 = 1;
/// The protocol number of ICMPv6.
pub const IPPROTO_ICMPV6: u8 = 58;

/// TCP's flag FIN.
pub const TCP_FIN: u8 = 1;
/// TCP's flag SYN.
pub const TCP_SYN: u8 = 2;
/// TCP's flag RST.
pub const TCP_RST: u8 = 4;
/// TCP's flag ACK.
pub const TCP_ACK: u8 = 16;

/// The length of a header of IPv4 without options.
pub const IPV4_HEADER: u32 = 20;
/// The length of IPv6's first header.
pub const IPV6_HEADER: u32 = 40;
/// The shortest header of TCP.
pub const TCP_HEADER: u32 = 20;
/// UDP's header.
pub const UDP_HEADER: u32 = 8;
/// What of ICMP comes before the packet that an error is about.
pub const ICMP_HEADER: u32 = 8;

/// The first bytes of a packet, from its IP header on.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Immutable, IntoBytes)]
pub struct Window {
    /// The bytes. What the packet doesn't have has any value.
    pub octets: [u8; WINDOW_LEN],
}

impl Window {
    /// The octet at an offset below [`WINDOW_LEN`]. The mask spares the comparison, and the kernel's
    /// verifier what it would have to keep apart.
    #[inline(always)]
    pub fn octet(&self, at: u32) -> u8 {
        self.octets[at as usize & (WINDOW_LEN - 1)]
    }

    /// The number of 16 bits there, which is in network byte order.
    #[inline(always)]
    pub fn be16(&self, at: u32) -> u16 {
        u16::from_be_bytes([self.octet(at), self.octet(at + 1)])
    }

    /// The number of 32 bits there, likewise.
    #[inline(always)]
    pub fn be32(&self, at: u32) -> u32 {
        u32::from(self.be16(at)) << 16 | u32::from(self.be16(at + 2))
    }

    /// The 16 bits there as they lie in memory.
    #[inline(always)]
    pub fn word(&self, at: u32) -> u16 {
        u16::from_ne_bytes([self.octet(at), self.octet(at + 1)])
    }

    /// The 32 bits there, likewise, at a multiple of four: by one load.
    #[inline(always)]
    pub fn long_word(&self, at: u32) -> u32 {
        let words: &[u32; WINDOW_LEN / 4] = zerocopy::transmute_ref!(self);
        words[(at as usize / 4) & (WINDOW_LEN / 4 - 1)]
    }

    /// Writes 16 bits as [`Window::word`] reads them.
    #[inline(always)]
    pub fn set_word(&mut self, at: u32, word: u16) {
        let [low, high] = word.to_ne_bytes();
        self.octets[at as usize & (WINDOW_LEN - 1)] = low;
        self.octets[(at + 1) as usize & (WINDOW_LEN - 1)] = high;
    }

    /// The four octets there.
    #[inline(always)]
    pub fn ipv4(&self, at: u32) -> [u8; 4] {
        core::array::from_fn(|idx| self.octet(at + idx as u32))
    }

    /// The sixteen octets there.
    #[inline(always)]
    pub fn ipv6(&self, at: u32) -> Address {
        Address { octets: core::array::from_fn(|idx| self.octet(at + idx as u32)) }
    }
}

/// What a packet is, as far as it may be of a flow.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from. Of an ICMP error it is what the packet that it is about was sent to, so that it
    /// is what a reply to that has.
    pub source: Address,
    /// Where it goes to; of an ICMP error likewise.
    pub destination: Address,
    /// The port of [`Packet::source`].
    pub source_port: u16,
    /// The port of [`Packet::destination`].
    pub destination_port: u16,
    /// [`IPPROTO_TCP`] or [`IPPROTO_UDP`]; of an ICMP error that of the packet that it is about.
    pub protocol: u8,
    /// 1 for IPv6.
    pub is_ipv6: u8,
    /// TCP's flags; 0 for any other.
    pub tcp_flags: u8,
    /// 1 for an ICMP error.
    pub is_error: u8,
    /// The length of the packet, from the IP header on.
    pub len: u32,
    /// Where the header of TCP, UDP or ICMP begins.
    pub l4: u32,
    /// Where the IP header of the packet begins that an ICMP error is about.
    pub inner: u32,
    /// Where the header of TCP or UDP begins in that.
    pub inner_l4: u32,
}

/// Why a packet is of no flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum NoFlow {
    /// It is of another protocol, or an ICMP message that is no error.
    Other = 1,
    /// It is a part of a packet, without the ports or with less than all of it.
    Fragment = 2,
    /// Its source is no host's address that could be answered.
    Martian = 3,
    /// Its lengths don't agree, or headers are longer than [`WINDOW_LEN`].
    BadHeader = 4,
}

/// Where the IP header begins in an Ethernet frame with up to two VLAN tags (IEEE 802.1Q, 802.1ad), and
/// whether it is IPv6's; `None` for any other frame. `octets` are the frame's first ones, `len` is its length.
#[inline(always)]
pub fn ip_header(octets: &[u8; 22], len: u32) -> Option<(u32, bool)> {
    const IPV4: u16 = 0x0800;
    const IPV6: u16 = 0x86dd;
    const TAGS: [u16; 2] = [0x8100, 0x88a8];
    let kind = |at: usize| u16::from_be_bytes([octets[at], octets[at + 1]]);
    let first = kind(12);
    let at = if !TAGS.contains(&first) {
        12
    } else if !TAGS.contains(&kind(16)) {
        16
    } else {
        20
    };
    let is_ipv6 = match kind(at) {
        IPV4 => false,
        IPV6 => true,
        _ => return None,
    };
    let begin = at as u32 + 2;
    (len > begin).then_some((begin, is_ipv6))
}

/// What a packet is. `len` is how many bytes there are from its IP header on, of which the window has the
/// first; there may be more than the packet has, as Ethernet fills up short ones.
///
/// # Errors
/// When it is of no flow.
#[inline(always)]
pub fn parse(window: &Window, len: u32, is_ipv6: bool) -> Result<Packet, NoFlow> {
    if is_ipv6 { parse_ipv6(window, len) } else { parse_ipv4(window, len) }
}

/// [`parse`] for IPv4 (RFC 791).
///
/// # Errors
/// See there.
#[inline(always)]
pub fn parse_ipv4(window: &Window, len: u32) -> Result<Packet, NoFlow> {
    if len < IPV4_HEADER {
        return Err(NoFlow::BadHeader);
    }
    let l4 = ipv4_header(window, 0)?;
    let total = total_len(u32::from(window.be16(2)), len)?;
    if window.be16(6) & 0x3fff != 0 {
        return Err(NoFlow::Fragment);
    }
    let (source, destination) = (window.ipv4(12), window.ipv4(16));
    if is_martian4(source) {
        return Err(NoFlow::Martian);
    }
    let packet = Packet {
        source: Address::v4(source),
        destination: Address::v4(destination),
        protocol: window.octet(9),
        len: total,
        l4,
        ..Packet::default()
    };
    if packet.protocol != IPPROTO_ICMP {
        return transport(window, packet);
    }
    // Destination unreachable, time exceeded, parameter problem.
    if total < l4 + ICMP_HEADER || !matches!(window.octet(l4), 3 | 11 | 12) {
        return Err(NoFlow::Other);
    }
    let inner = l4 + ICMP_HEADER;
    if total < inner + IPV4_HEADER {
        return Err(NoFlow::BadHeader);
    }
    let header_len = ipv4_header(window, inner)?;
    if window.be16(inner + 6) & 0x1fff != 0 {
        return Err(NoFlow::Fragment);
    }
    let about = Packet {
        source: Address::v4(window.ipv4(inner + 16)),
        destination: Address::v4(window.ipv4(inner + 12)),
        protocol: window.octet(inner + 9),
        inner,
        inner_l4: inner + header_len,
        ..packet
    };
    error(window, about)
}

/// [`parse`] for IPv6 (RFC 8200).
///
/// # Errors
/// See there.
#[inline(always)]
pub fn parse_ipv6(window: &Window, len: u32) -> Result<Packet, NoFlow> {
    if len < IPV6_HEADER || window.octet(0) >> 4 != 6 {
        return Err(NoFlow::BadHeader);
    }
    let payload = u32::from(window.be16(4));
    // Without a length it is longer than one could be.
    let total = if payload == 0 { 0 } else { payload + IPV6_HEADER };
    let total = total_len(total, len)?;
    let (source, destination) = (window.ipv6(8), window.ipv6(24));
    if is_martian6(&source) {
        return Err(NoFlow::Martian);
    }
    let (protocol, l4) = skip_extensions(window, window.octet(6), IPV6_HEADER, true)?;
    let packet =
        Packet { source, destination, protocol, is_ipv6: 1, len: total, l4, ..Packet::default() };
    if protocol != IPPROTO_ICMPV6 {
        return transport(window, packet);
    }
    // RFC 4443: destination unreachable, packet too big, time exceeded, parameter problem.
    if total < l4 + ICMP_HEADER || !matches!(window.octet(l4), 1..=4) {
        return Err(NoFlow::Other);
    }
    let inner = l4 + ICMP_HEADER;
    if total < inner + IPV6_HEADER || inner + IPV6_HEADER > WINDOW_LEN as u32 {
        return Err(NoFlow::BadHeader);
    }
    let inner = unknown(inner);
    if window.octet(inner) >> 4 != 6 {
        return Err(NoFlow::BadHeader);
    }
    let first = window.octet(inner + 6);
    let (protocol, inner_l4) = skip_extensions(window, first, inner + IPV6_HEADER, false)?;
    let about = Packet {
        source: window.ipv6(inner + 24),
        destination: window.ipv6(inner + 8),
        protocol,
        inner,
        inner_l4,
        ..packet
    };
    error(window, about)
}

/// An offset that was compared with a limit, of which the compiler knows nothing any more: it would leave out the
/// mask of [`Window::octet`], where the verifier may not know the limit.
#[inline(always)]
pub(super) fn unknown(at: u32) -> u32 {
    black_box(at)
}

/// The length of an IPv4 header at an offset.
#[inline(always)]
fn ipv4_header(window: &Window, at: u32) -> Result<u32, NoFlow> {
    let first = window.octet(at);
    let len = u32::from(first & 0xf) * 4;
    if first >> 4 != 4 || len < IPV4_HEADER || at + len > WINDOW_LEN as u32 {
        return Err(NoFlow::BadHeader);
    }
    Ok(len)
}

/// The length of a packet, by its header and by what there is. The kernel joins packets of a flow to ones
/// that are longer than the header can name; those have 0 there (BIG TCP).
#[inline(always)]
fn total_len(named: u32, len: u32) -> Result<u32, NoFlow> {
    if named == 0 && len > 0xffff {
        return Ok(len);
    }
    if named > len {
        return Err(NoFlow::BadHeader);
    }
    Ok(named)
}

/// The packet with its ports, if it is of TCP or UDP.
#[inline(always)]
fn transport(window: &Window, packet: Packet) -> Result<Packet, NoFlow> {
    let Packet { l4, len, protocol, .. } = packet;
    let mut tcp_flags = 0;
    match protocol {
        IPPROTO_TCP => {
            if l4 + TCP_HEADER > WINDOW_LEN as u32 || l4 + TCP_HEADER > len {
                return Err(NoFlow::BadHeader);
            }
            let at = unknown(l4);
            let header_len = u32::from(window.octet(at + 12) >> 4) * 4;
            if header_len < TCP_HEADER || l4 + header_len > len {
                return Err(NoFlow::BadHeader);
            }
            tcp_flags = window.octet(at + 13);
        }
        IPPROTO_UDP => {
            if l4 + UDP_HEADER > WINDOW_LEN as u32 || l4 + UDP_HEADER > len {
                return Err(NoFlow::BadHeader);
            }
            let udp_len = u32::from(window.be16(unknown(l4) + 4));
            if udp_len < UDP_HEADER || l4 + udp_len > len {
                return Err(NoFlow::BadHeader);
            }
        }
        _ => return Err(NoFlow::Other),
    }
    let l4 = unknown(l4);
    let (source_port, destination_port) = (window.be16(l4), window.be16(l4 + 2));
    if source_port == 0 || destination_port == 0 {
        return Err(NoFlow::BadHeader);
    }
    Ok(Packet { source_port, destination_port, tcp_flags, ..packet })
}

/// An ICMP error, with the ports of what it is about: its first eight bytes at least are there (RFC 792).
#[inline(always)]
fn error(window: &Window, packet: Packet) -> Result<Packet, NoFlow> {
    let Packet { inner_l4, len, protocol, .. } = packet;
    if protocol != IPPROTO_TCP && protocol != IPPROTO_UDP {
        return Err(NoFlow::Other);
    }
    if inner_l4 + 8 > WINDOW_LEN as u32 || inner_l4 + 8 > len {
        return Err(NoFlow::BadHeader);
    }
    let at = unknown(inner_l4);
    let (source_port, destination_port) = (window.be16(at + 2), window.be16(at));
    Ok(Packet { source_port, destination_port, is_error: 1, ..packet })
}

/// The protocol behind IPv6's extension headers, and where its header begins. A fragment that is the whole
/// packet (RFC 6946) is none, nor is a first one in an ICMP error.
#[inline(always)]
fn skip_extensions(
    window: &Window,
    first: u8,
    begin: u32,
    is_whole: bool,
) -> Result<(u8, u32), NoFlow> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    const MAX_EXTENSIONS: u32 = 6;
    let (mut protocol, mut at) = (first, begin);
    let mut n_skipped = 0;
    while n_skipped < MAX_EXTENSIONS {
        let len = match protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => (u32::from(window.octet(at + 1)) + 1) * 8,
            AUTHENTICATION => (u32::from(window.octet(at + 1)) + 2) * 4,
            FRAGMENT => {
                // The offset, and that more follow.
                let place = window.be16(at + 2);
                if place & 0xfff8 != 0 || is_whole && place & 1 != 0 {
                    return Err(NoFlow::Fragment);
                }
                8
            }
            _ => return Ok((protocol, at)),
        };
        protocol = window.octet(at);
        at += len;
        if at > WINDOW_LEN as u32 - 8 {
            return Err(NoFlow::BadHeader);
        }
        at = unknown(at);
        n_skipped += 1;
    }
    Err(NoFlow::BadHeader)
}

/// Whether an IPv4 address is one that no reply reaches: of this network, loopback, multicast or reserved.
#[inline(always)]
fn is_martian4([first, ..]: [u8; 4]) -> bool {
    first == 0 || first == 127 || first >= 224
}

/// Whether an IPv6 address is: unspecified, loopback, IPv4 in IPv6, link-local, multicast.
#[inline(always)]
fn is_martian6(address: &Address) -> bool {
    let [high, _] = address.words();
    let high = u64::from_be(high);
    high == 0 || high >> 56 == 0xff || high >> 54 == 0xfe80 >> 6
}
