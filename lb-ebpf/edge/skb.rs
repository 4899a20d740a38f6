//! A packet, by the kernel's helpers.

use core::hint::black_box;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{
    bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes, bpf_skb_vlan_pop,
};
use aya_ebpf::programs::TcContext;
use lb_common::{WINDOW_LEN, Window};

use crate::settings::{self, Side};

const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;
/// The VLAN's number in a tag.
const VLAN_ID: u32 = 0xfff;
/// The address in the Ethernet header is the interface's (linux/if_packet.h).
const PACKET_HOST: u32 = 0;
/// The length of an Ethernet header, where that of IP begins.
pub const IP: u32 = 14;

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

    /// The length from the IP header on, if there is one.
    #[inline(always)]
    pub fn ip_len(&self) -> Option<u32> {
        let len = read!(self.len);
        (len > IP).then(|| len - IP)
    }

    /// Whether it is IPv6; `None` for what is no IP.
    #[inline(always)]
    pub fn family(&self) -> Option<bool> {
        match u16::from_be(read!(self.protocol) as u16) {
            ETH_P_IP => Some(false),
            ETH_P_IPV6 => Some(true),
            _ => None,
        }
    }

    /// Where it begins, with its Ethernet header.
    #[inline(always)]
    pub fn begin(&self) -> usize {
        read!(self.data) as usize
    }

    /// Where the part of it ends that can be read directly.
    #[inline(always)]
    pub fn end(&self) -> usize {
        read!(self.data_end) as usize
    }

    /// The interface that it came by.
    #[inline(always)]
    pub fn ifindex(&self) -> u32 {
        read!(self.ifindex)
    }

    /// Whether it stands for several packets (GRO, TSO). Those of a virtual machine's host have a size alone,
    /// and no count (SKB_GSO_DODGY).
    #[inline(always)]
    pub fn is_batch(&self) -> bool {
        self.segment_size() != 0
    }

    /// How much data each of those has; 0 where it stands for itself.
    #[inline(always)]
    pub fn segment_size(&self) -> u32 {
        read!(self.gso_size)
    }

    /// Whether it has a tag that names no VLAN but a priority alone (IEEE 802.1Q, VLAN ID 0): the interface's own
    /// packets, as those without.
    #[inline(always)]
    pub fn has_priority(&self) -> bool {
        read!(self.vlan_present) != 0 && read!(self.vlan_tci) & VLAN_ID == 0
    }

    /// Takes its tag off. Returns whether that was possible.
    #[inline(always)]
    pub fn remove_tag(&self) -> bool {
        // SAFETY: the helper takes the context; pointers into the packet are read again.
        unsafe { bpf_skb_vlan_pop(self.0) == 0 }
    }

    /// Whose packet it may be, by where it goes to. What isn't sent to this interface, such as another edge's
    /// packets in promiscuous mode, and what is a VLAN device's, is left to others.
    #[inline(always)]
    pub fn side(&self) -> Side {
        let is_of_vlan = read!(self.vlan_present) != 0 && !self.has_priority();
        if read!(self.pkt_type) != PACKET_HOST || is_of_vlan {
            return Side::None;
        }
        const DESTINATION4: usize = IP as usize + 16;
        const DESTINATION6: usize = IP as usize + 24;
        let Some(is_ipv6) = self.family() else { return Side::None };
        let end = if is_ipv6 { DESTINATION6 + 16 } else { DESTINATION4 + 4 };
        if (read!(self.data) as usize) + end > read!(self.data_end) as usize {
            // Rare: the headers aren't in the first part of the packet.
            // SAFETY: the helper takes the context; pointers into the packet are read again.
            unsafe { bpf_skb_pull_data(self.0, end as u32) };
        }
        let (data, data_end) = (read!(self.data) as usize, read!(self.data_end) as usize);
        if is_ipv6 {
            if data + DESTINATION6 + 16 > data_end {
                return Side::None;
            }
            // SAFETY: the end was compared with the packet's.
            let [high, low] = unsafe {
                let at = (data + DESTINATION6) as *const u64;
                [at.read_unaligned(), at.add(1).read_unaligned()]
            };
            settings::side6(high, low)
        } else {
            if data + DESTINATION4 + 4 > data_end {
                return Side::None;
            }
            // SAFETY: as above.
            let address = unsafe { ((data + DESTINATION4) as *const u32).read_unaligned() };
            settings::side4(address)
        }
    }

    /// Copies the first bytes from the IP header on; `len` is how many there are, at least 1.
    #[inline(always)]
    pub fn load_window(&self, window: &mut Window, len: u32) -> bool {
        let len = if len < WINDOW_LEN as u32 { len } else { WINDOW_LEN as u32 };
        let Some(len) = bounded(len as usize) else { return false };
        let to = window.octets.as_mut_ptr();
        // SAFETY: the window is as long as said.
        unsafe { bpf_skb_load_bytes(self.0.cast(), IP, to.cast(), len) == 0 }
    }

    /// Writes a part of the window back. `flags` are the helper's.
    #[inline(always)]
    pub fn store_window(&self, window: &Window, at: u32, len: u32, flags: u64) -> bool {
        let at = at & (WINDOW_LEN as u32 - 1);
        let left = WINDOW_LEN as u32 - at;
        let len = if len < left { len } else { left };
        let Some(len) = bounded(len as usize) else { return false };
        let from = window.octets.as_ptr();
        // SAFETY: the part is within the window.
        unsafe {
            bpf_skb_store_bytes(self.0, IP + at, from.add(at as usize).cast(), len, flags) == 0
        }
    }

    /// Writes to the packet.
    #[inline(always)]
    pub fn store(&self, offset: u32, from: &[u8]) -> bool {
        let Some(len) = bounded(from.len()) else { return false };
        // SAFETY: the source is as long as said.
        unsafe { bpf_skb_store_bytes(self.0, offset, from.as_ptr().cast(), len, 0) == 0 }
    }

    /// Copies from the packet.
    #[inline(always)]
    pub fn load(&self, offset: u32, to: &mut [u8]) -> bool {
        let Some(len) = bounded(to.len()) else { return false };
        // SAFETY: the destination is as long as said.
        unsafe { bpf_skb_load_bytes(self.0.cast(), offset, to.as_mut_ptr().cast(), len) == 0 }
    }
}

/// A length of 1..=[`WINDOW_LEN`], in a way that the verifier sees its bounds.
#[inline(always)]
fn bounded(len: usize) -> Option<u32> {
    // What is compared is what is used: the compiler would compare one less and use the other.
    let less = black_box(len.wrapping_sub(1));
    (less < WINDOW_LEN).then_some(less as u32 + 1)
}
