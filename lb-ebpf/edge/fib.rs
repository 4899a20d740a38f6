//! The kernel's routes.

use core::ffi::c_void;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup as FibLookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup;

/// struct bpf_fib_lookup.
pub type Fib = [u32; 16];

const _: () = assert!(size_of::<FibLookup>() == size_of::<Fib>());

/// What the kernel's routes say.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The interface and the hardware addresses are known.
    Found,
    /// The next hop's hardware address isn't.
    Unresolved,
    /// It is an address of this host, or there is none.
    Local,
    /// The packet is too long for it.
    TooLong,
    /// One refuses it, or forwarding is off.
    None,
}

/// What a route is looked up for.
pub struct Question {
    /// The interface that the packet came by.
    pub ifindex: u32,
    /// Whether it is IPv6.
    pub is_ipv6: bool,
    /// The protocol number.
    pub protocol: u8,
    /// The packet's length, from the IP header on; 0 for any.
    pub len: u32,
}

/// Looks up a route from one address to another, as they lie in memory; those of IPv4 are the last words. A
/// program's context is a struct __sk_buff or xdp_md.
#[inline(always)]
pub fn look_up(
    ctx: *mut c_void,
    fib: &mut Fib,
    question: Question,
    from: [u32; 4],
    to: [u32; 4],
) -> Route {
    const AF_INET: u8 = 2;
    const AF_INET6: u8 = 10;
    let Question { ifindex, is_ipv6, protocol, len } = question;
    fib[1] = len << 16;
    fib[2] = ifindex;
    fib[3] = 0;
    if is_ipv6 {
        fib[0] = u32::from_ne_bytes([AF_INET6, protocol, 0, 0]);
        let mut idx = 0;
        while idx < 4 {
            (fib[4 + idx], fib[8 + idx]) = (from[idx], to[idx]);
            idx += 1;
        }
    } else {
        fib[0] = u32::from_ne_bytes([AF_INET, protocol, 0, 0]);
        (fib[4], fib[8]) = (from[3], to[3]);
    }
    // SAFETY: the helper takes the context, and a structure of that length.
    let found = unsafe { bpf_fib_lookup(ctx, fib.as_mut_ptr().cast(), 64, 0) } as u32;
    match found {
        BPF_FIB_LKUP_RET_SUCCESS => Route::Found,
        BPF_FIB_LKUP_RET_NO_NEIGH => Route::Unresolved,
        BPF_FIB_LKUP_RET_NOT_FWDED => Route::Local,
        BPF_FIB_LKUP_RET_FRAG_NEEDED => Route::TooLong,
        _ => Route::None,
    }
}

/// The longest packet that the way takes, after [`Route::TooLong`] for one of that length. Kernels before 5.12 don't
/// report it: then the shortest that every way of IPv6 takes (RFC 8200, section 5).
#[inline(always)]
pub fn mtu(fib: &Fib, len: u32) -> u32 {
    const LEAST: u32 = 1_280;
    let mtu = fib[1] >> 16;
    if mtu != 0 && mtu < len { mtu } else { LEAST }
}

/// The interface by which a packet leaves.
#[inline(always)]
pub fn egress(fib: &Fib) -> u32 {
    fib[2]
}

/// The hardware addresses as an Ethernet header begins with them. In `fib` the source's six octets come first,
/// in Ethernet the destination's.
#[inline(always)]
pub fn ethernet(fib: &Fib) -> [u32; 3] {
    let [a, b, c, d] = fib[13].to_ne_bytes();
    let [e, f, g, h] = fib[14].to_ne_bytes();
    let [i, j, k, l] = fib[15].to_ne_bytes();
    [[g, h, i, j], [k, l, a, b], [c, d, e, f]].map(u32::from_ne_bytes)
}

/// Where the neighbour's time is; see [`lb_common::neighbour_time`].
#[inline(always)]
pub fn neighbour_time(fib: &Fib) -> u32 {
    lb_common::neighbour_time(egress(fib), u64::from(fib[15]) << 16 | u64::from(fib[14] >> 16))
}

/// The next hop that was found, as `bpf_redirect_neigh` takes it (struct bpf_redir_neigh): the family, then the address.
/// It lies over the end of the source address, which isn't needed any more.
#[inline(always)]
pub fn next_hop(fib: &mut Fib) -> *mut bpf_redir_neigh {
    // The kernel has written the family of the next hop, which may be another one than the packet's.
    let [family, ..] = fib[0].to_ne_bytes();
    fib[7] = family.into();
    (&raw mut fib[7]).cast()
}
