//! What the choice of a backend asks of addresses, which here are looked up already.

use lb_common::Address;

/// Whether an address is of the pool of VIPs.
#[inline(always)]
pub fn in_pool(_: [u8; 4]) -> bool {
    false
}

/// Whether an address is the one of probes.
#[inline(always)]
pub fn is_probe_address(_: [u8; 4]) -> bool {
    false
}

/// Whether an address is of the IPv6 pool of VIPs.
#[inline(always)]
pub fn in_pool6(_: &Address) -> bool {
    false
}
