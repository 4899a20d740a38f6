//! What the daemon sets when it loads the object: constants to the verifier, which drops the code
//! that they rule out.

use lb_common::{Address, LAYOUT, N_PUBLIC_NETWORKS, RejectMethod};

/// The layout that the maps have.
#[unsafe(no_mangle)]
static MAP_LAYOUT: u32 = LAYOUT as u32;
/// The pool's first address, in native byte order.
#[unsafe(no_mangle)]
static POOL_NETWORK: u32 = 0;
/// The pool's netmask, in native byte order. All ones with a network of 0 means no pool.
#[unsafe(no_mangle)]
static POOL_MASK: u32 = u32::MAX;
/// The first address of the smallest network that all pins are in, in native byte order.
#[unsafe(no_mangle)]
static PINS_NETWORK: u32 = 0;
/// Its netmask, in native byte order. All ones with a network of 0 means no pins.
#[unsafe(no_mangle)]
static PINS_MASK: u32 = u32::MAX;
/// The first 8 octets of the IPv6 pool's first address, as they lie in memory; 0 for no such pool.
#[unsafe(no_mangle)]
static POOL6_NETWORK_HIGH: u64 = 0;
/// The other 8 octets.
#[unsafe(no_mangle)]
static POOL6_NETWORK_LOW: u64 = 0;
/// The first 8 octets of the IPv6 pool's netmask, as they lie in memory.
#[unsafe(no_mangle)]
static POOL6_MASK_HIGH: u64 = 0;
/// The other 8 octets.
#[unsafe(no_mangle)]
static POOL6_MASK_LOW: u64 = 0;
/// The first address of each IPv4 network of public VIPs, in native byte order.
#[unsafe(no_mangle)]
static PUBLIC_NETWORKS: [u32; N_PUBLIC_NETWORKS] = [0; N_PUBLIC_NETWORKS];
/// Their netmasks, in native byte order; 0 after the last one.
#[unsafe(no_mangle)]
static PUBLIC_MASKS: [u32; N_PUBLIC_NETWORKS] = [0; N_PUBLIC_NETWORKS];
/// The first address of each IPv6 network of public VIPs, as it lies in memory.
#[unsafe(no_mangle)]
static PUBLIC6_NETWORKS: [[u64; 2]; N_PUBLIC_NETWORKS] = [[0; 2]; N_PUBLIC_NETWORKS];
/// Their netmasks, as they lie in memory; zeros after the last one.
#[unsafe(no_mangle)]
static PUBLIC6_MASKS: [[u64; 2]; N_PUBLIC_NETWORKS] = [[0; 2]; N_PUBLIC_NETWORKS];
/// A [`RejectMethod`].
#[unsafe(no_mangle)]
static REFUSAL: u32 = RejectMethod::Errno as u32;
/// 1 where some cgroups are left alone.
#[unsafe(no_mangle)]
static HAS_BYPASS: u32 = 0;
/// Where in the kernel's `struct sock` the byte with the bit `sk_kern_sock` is.
#[unsafe(no_mangle)]
static KERNEL_SOCKET_OFFSET: u32 = 0;
/// That bit, as a mask of the byte; 0 where it isn't known.
#[unsafe(no_mangle)]
static KERNEL_SOCKET_MASK: u32 = 0;
/// Where in the kernel's `struct tcp_sock` the byte `is_mptcp` is; 0 where it isn't known.
#[unsafe(no_mangle)]
static SUBFLOW_OFFSET: u32 = 0;
/// Where in the kernel's `struct sock` the byte with the bit `skc_ipv6only` is.
#[unsafe(no_mangle)]
static IPV6_ONLY_OFFSET: u32 = 0;
/// That bit, as a mask of the byte; 0 where it isn't known.
#[unsafe(no_mangle)]
static IPV6_ONLY_MASK: u32 = 0;
/// 1 where the kernel has `bpf_skc_to_mptcp_sock`.
#[unsafe(no_mangle)]
static HAS_MPTCP: u32 = 0;
/// Where in the kernel's `struct sock` the word `skc_cookie` is; 0 where it isn't known.
#[unsafe(no_mangle)]
static COOKIE_OFFSET: u32 = 0;
/// Where in the kernel's `struct sock` the pointer `sk_bpf_storage` is; 0 where it isn't known.
#[unsafe(no_mangle)]
static STORAGE_OFFSET: u32 = 0;

macro_rules! setting {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    ($name:ident $($index:tt)*) => {
        unsafe { core::ptr::read_volatile(&raw const $name $($index)*) }
    };
}

/// The layout that the maps have.
#[inline(always)]
pub fn layout() -> u16 {
    setting!(MAP_LAYOUT) as u16
}

/// Whether `address` is one of the pool's.
#[inline(always)]
pub fn in_pool(address: [u8; 4]) -> bool {
    u32::from_be_bytes(address) & setting!(POOL_MASK) == setting!(POOL_NETWORK)
}

/// Whether `address` is near the pins, so that it has to be looked up. It spares other connections that.
#[inline(always)]
pub fn in_pin_range(address: [u8; 4]) -> bool {
    u32::from_be_bytes(address) & setting!(PINS_MASK) == setting!(PINS_NETWORK)
}

/// Whether `address` is the pool's own, which no service has.
#[inline(always)]
pub fn is_probe_address(address: [u8; 4]) -> bool {
    u32::from_be_bytes(address) == setting!(POOL_NETWORK)
}

/// Whether `address` is one of the IPv6 pool's.
#[inline(always)]
pub fn in_pool6(address: &Address) -> bool {
    let network_high = setting!(POOL6_NETWORK_HIGH);
    if network_high == 0 {
        return false;
    }
    let [high, low] = address.words();
    high & setting!(POOL6_MASK_HIGH) == network_high
        && low & setting!(POOL6_MASK_LOW) == setting!(POOL6_NETWORK_LOW)
}

/// Whether `address` is in a network of public VIPs, so that it has to be looked up: one comparison for
/// each network that there is, since the verifier drops the others.
#[inline(always)]
pub fn in_public(address: [u8; 4]) -> bool {
    let address = u32::from_be_bytes(address);
    // A macro, since a closure can't return for its caller: after the last network nothing is loaded.
    macro_rules! compare {
        ($($nth:literal)+) => {$(
            let mask = setting!(PUBLIC_MASKS[$nth]);
            if mask == 0 {
                return false;
            }
            if address & mask == setting!(PUBLIC_NETWORKS[$nth]) {
                return true;
            }
        )+};
    }
    compare!(0 1 2 3);
    false
}

/// The same for an IPv6 address.
#[inline(always)]
pub fn in_public6(address: &Address) -> bool {
    let [high, low] = address.words();
    macro_rules! compare {
        ($($nth:literal)+) => {$(
            // A netmask has the bits of its first half first.
            let mask_high = setting!(PUBLIC6_MASKS[$nth][0]);
            if mask_high == 0 {
                return false;
            }
            if high & mask_high == setting!(PUBLIC6_NETWORKS[$nth][0])
                && low & setting!(PUBLIC6_MASKS[$nth][1]) == setting!(PUBLIC6_NETWORKS[$nth][1])
            {
                return true;
            }
        )+};
    }
    compare!(0 1 2 3);
    false
}

/// Whether this kernel has `bpf_set_retval` for these programs.
#[inline(always)]
pub fn can_set_errno() -> bool {
    setting!(REFUSAL) == RejectMethod::Errno as u32
}

/// Whether some cgroups are left alone.
#[inline(always)]
pub fn has_bypass() -> bool {
    setting!(HAS_BYPASS) != 0
}

/// Where a socket says that it is the kernel's own: an offset and a mask, if that is known.
#[inline(always)]
pub fn kernel_socket_bit() -> Option<(u32, u8)> {
    let mask = setting!(KERNEL_SOCKET_MASK);
    (mask != 0).then(|| (setting!(KERNEL_SOCKET_OFFSET), mask as u8))
}

/// Where a TCP socket says that it is a part of an MPTCP one, if that is known.
#[inline(always)]
pub fn subflow_offset() -> Option<u32> {
    let offset = setting!(SUBFLOW_OFFSET);
    (offset != 0).then_some(offset)
}

/// Where an IPv6 socket says that it is closed to IPv4: an offset and a mask, if that is known.
#[inline(always)]
pub fn ipv6_only_bit() -> Option<(u32, u8)> {
    let mask = setting!(IPV6_ONLY_MASK);
    (mask != 0).then(|| (setting!(IPV6_ONLY_OFFSET), mask as u8))
}

/// Where a socket has its cookie; 0 where it isn't known.
#[inline(always)]
pub fn cookie_offset() -> u32 {
    setting!(COOKIE_OFFSET)
}

/// Where a socket has the pointer to its storage; 0 where it isn't known.
#[inline(always)]
pub fn storage_offset() -> u32 {
    setting!(STORAGE_OFFSET)
}

/// Whether a program gets from a subflow to the MPTCP socket that it is a part of.
#[inline(always)]
pub fn has_mptcp() -> bool {
    setting!(HAS_MPTCP) != 0
}
