//! Which socket receives a packet.

use aya_ebpf::bindings::{__sk_buff, BPF_F_CURRENT_NETNS, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_udp, bpf_sk_release};

use crate::headers::Headers;
use crate::maps;
use crate::skb::Skb;

/// Which socket receives a packet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Receiver {
    /// None.
    None = 0,
    /// One of the unspecified address.
    Unspecified = 1,
    /// One of the address itself.
    Own = 2,
}

/// Which socket receives the packet whose headers are in [`Scratch`](maps::Scratch).
#[inline(always)]
pub fn receiver(skb: &Skb) -> Receiver {
    match nohop_names_receiver(skb.0) {
        0 => Receiver::None,
        1 => Receiver::Unspecified,
        _ => Receiver::Own,
    }
}

/// A [`Receiver`], by its place.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_receiver(ctx: *mut __sk_buff) -> u64 {
    let Some(scratch) = maps::scratch() else { return 0 };
    find_receiver(&scratch.headers, &Skb(ctx)) as u64
}

#[inline(always)]
fn find_receiver(headers: &Headers, skb: &Skb) -> Receiver {
    let ports = u32::from(headers.source_port.to_be()) | u32::from(headers.port.to_be()) << 16;
    let [source, destination]: [[u32; 4]; 2] =
        [zerocopy::transmute!(headers.source), zerocopy::transmute!(headers.destination)];
    let [a, b, c, d] = source;
    let [e, f, g, h] = destination;
    let mut words = if headers.is_ipv6 {
        [a, b, c, d, e, f, g, h, ports]
    } else {
        [d, h, ports, 0, 0, 0, 0, 0, 0]
    };
    // SAFETY: the tuple is as long as said; the socket that is found is released.
    unsafe {
        let tuple = words.as_mut_ptr().cast::<bpf_sock_tuple>();
        let netns = BPF_F_CURRENT_NETNS as u64;
        let socket = if headers.is_ipv6 {
            bpf_sk_lookup_udp(skb.0.cast(), tuple, 36, netns, 0)
        } else {
            bpf_sk_lookup_udp(skb.0.cast(), tuple, 12, netns, 0)
        };
        if socket.is_null() {
            return Receiver::None;
        }
        let is_own = if headers.is_ipv6 {
            let own = &raw const (*socket).src_ip6;
            let [a, b, c, d]: [u32; 4] =
                core::array::from_fn(|idx| own.cast::<u32>().add(idx).read_volatile());
            a | b | c | d != 0
        } else {
            (&raw const (*socket).src_ip4).read_volatile() != 0
        };
        bpf_sk_release(socket.cast());
        if is_own { Receiver::Own } else { Receiver::Unspecified }
    }
}
