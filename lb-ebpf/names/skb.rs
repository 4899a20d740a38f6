//! A packet, by the kernel's helpers.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_pull_data;
use aya_ebpf::programs::TcContext;

/// The index of the loopback interface, in every network namespace (LOOPBACK_IFINDEX).
pub const LOOPBACK: u32 = 1;
/// From linux/if_packet.h.
const PACKET_HOST: u32 = 0;

/// Reads a field at a constant offset. In assembly, because the compiler would put an unaligned field
/// together byte by byte.
macro_rules! field {
    ($base:expr, $offset:expr, $kind:ident) => {{
        let field: u64;
        // SAFETY: the caller has compared the end of the header with the packet's end.
        unsafe {
            core::arch::asm!(
                concat!("{field} = *(", stringify!($kind), " *)({base} + {offset})"),
                field = lateout(reg) field, base = in(reg) $base, offset = const $offset,
                options(pure, readonly, nostack)
            );
        }
        field as $kind
    }};
}
pub(crate) use field;

/// Writes a field at a constant offset, likewise.
macro_rules! set_field {
    ($base:expr, $offset:expr, $kind:ident, $field:expr) => {{
        let field: $kind = $field;
        // SAFETY: the caller has compared the end of the header with the packet's end.
        unsafe {
            core::arch::asm!(
                concat!("*(", stringify!($kind), " *)({base} + {offset}) = {field}"),
                field = in(reg) u64::from(field), base = in(reg) $base, offset = const $offset,
                options(nostack)
            );
        }
    }};
}
pub(crate) use set_field;

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

    /// Has the whole packet in the linear part. Returns whether it is.
    #[inline(always)]
    pub fn linearize(&self) -> bool {
        let (data, end) = self.linear();
        let len = self.len();
        // SAFETY: the helper takes the context; pointers into the packet are read again.
        end - data >= len as usize || unsafe { bpf_skb_pull_data(self.0, len) == 0 }
    }
}
