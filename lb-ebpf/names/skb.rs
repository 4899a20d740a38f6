//! A packet, by the kernel's helpers.

use core::hint::black_box;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use lb_common::DnsMessage;

/// The index of the loopback interface, in every network namespace (LOOPBACK_IFINDEX).
const LOOPBACK: u32 = 1;
/// From linux/if_packet.h.
const PACKET_HOST: u32 = 0;
/// The most bytes that are copied at once.
const MAX_LEN: usize = 64;

/// A packet, from its Ethernet header on.
#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

macro_rules! read {
    // SAFETY: the kernel hands every program a valid context, and this is a field of it.
    ($skb:ident . $field:ident) => {
        unsafe { (&raw const (*$skb.0).$field).read_volatile() }
    };
}

impl Skb {
    #[inline(always)]
    pub fn of(ctx: &TcContext) -> Skb {
        Skb(ctx.skb.skb)
    }

    /// The length of the whole packet.
    #[inline(always)]
    pub fn len(&self) -> u32 {
        read!(self.len)
    }

    /// The protocol in the Ethernet header, an ETH_P_*.
    #[inline(always)]
    pub fn protocol(&self) -> u16 {
        u16::from_be(read!(self.protocol) as u16)
    }

    /// The interface that it came by.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        read!(self.ifindex)
    }

    /// Whether the address in its Ethernet header is the interface's.
    #[inline(always)]
    pub fn is_for_host(&self) -> bool {
        read!(self.pkt_type) == PACKET_HOST
    }

    #[inline(always)]
    pub fn is_loopback(&self) -> bool {
        self.ifindex() == LOOPBACK
    }

    /// Whether it stands for several datagrams (UDP_SEGMENT, GRO).
    #[inline(always)]
    pub fn is_batch(&self) -> bool {
        read!(self.gso_segs) > 1
    }

    /// The linear part: its beginning and its end.
    #[inline(always)]
    pub fn linear(&self) -> (usize, usize) {
        (read!(self.data) as usize, read!(self.data_end) as usize)
    }

    /// Copies bytes from the packet, 1..=[`MAX_LEN`]; returns whether it has them.
    #[inline(always)]
    pub fn load(&self, offset: u32, to: &mut [u8]) -> bool {
        let Some(len) = bounded(to.len()) else { return false };
        // SAFETY: the destination is as long as said.
        unsafe { bpf_skb_load_bytes(self.0.cast(), offset, to.as_mut_ptr().cast(), len) == 0 }
    }

    /// Copies bytes into the packet, 1..=[`MAX_LEN`]; returns whether it has room.
    #[inline(always)]
    pub fn store(&self, offset: u32, from: &[u8]) -> bool {
        let Some(len) = bounded(from.len()) else { return false };
        // SAFETY: the source is as long as said.
        unsafe { bpf_skb_store_bytes(self.0, offset, from.as_ptr().cast(), len, 0) == 0 }
    }
}

/// A length, in a way that the verifier sees its bounds, where the compiler knows them and would leave
/// out the comparison.
#[inline(always)]
fn bounded(len: usize) -> Option<u32> {
    // What is compared is what is used: the compiler would compare one less and use the other.
    let less = black_box(len.wrapping_sub(1));
    (less < MAX_LEN).then_some(less as u32 + 1)
}

/// A DNS message in a packet.
pub struct Message<'a> {
    pub skb: &'a Skb,
    /// Where it begins.
    pub offset: u32,
}

impl DnsMessage for Message<'_> {
    #[inline(always)]
    fn load(&self, offset: u32, to: &mut [u8]) -> bool {
        self.skb.load(self.offset + offset, to)
    }
}
