//! A packet, by the kernel's helpers.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use aya_ebpf::programs::TcContext;
use lb_common::MAX_QUERY_LEN;

/// The index of the loopback interface, in every network namespace (LOOPBACK_IFINDEX).
pub const LOOPBACK: u32 = 1;
/// From linux/if_packet.h.
const PACKET_HOST: u32 = 0;
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

    /// Copies the packet, which begins with `headers_len` bytes, and `message_len` more. Returns whether it
    /// has them.
    ///
    /// # Safety
    ///
    /// `to` is as long.
    #[inline(always)]
    pub unsafe fn load(&self, headers_len: u32, message_len: u32, to: *mut u8) -> bool {
        let len = headers_len + bounded(message_len);
        // SAFETY: the destination is as long as said.
        unsafe { bpf_skb_load_bytes(self.0.cast(), 0, to.cast(), len) == 0 }
    }

    /// The same into the packet. Returns whether it has room.
    ///
    /// # Safety
    ///
    /// `from` is as long.
    #[inline(always)]
    pub unsafe fn store(&self, headers_len: u32, message_len: u32, from: *const u8) -> bool {
        let len = headers_len + bounded(message_len);
        // SAFETY: the source is as long as said.
        unsafe { bpf_skb_store_bytes(self.0, 0, from.cast(), len, 0) == 0 }
    }
}

/// A length of a message in a way that the verifier sees its bound, where the compiler knows it and would
/// leave out the comparison.
#[inline(always)]
pub fn bounded(message_len: u32) -> u32 {
    const { assert!(MAX_QUERY_LEN < 256) };
    let mut len = u64::from(message_len);
    // SAFETY: one instruction, on one register.
    unsafe { asm!("{0} &= 255", inout(reg) len, options(pure, nomem, nostack)) };
    len as u32
}
