//! What the daemon sets when it loads the object: constants to the verifier, which drops the code
//! that they rule out.

use lb_common::Refusal;

/// The pool's first address, in native byte order.
#[unsafe(no_mangle)]
static POOL_NETWORK: u32 = 0;
/// The pool's netmask, in native byte order. All ones with a network of 0 means no pool.
#[unsafe(no_mangle)]
static POOL_MASK: u32 = u32::MAX;
/// The cookie of the host's network namespace; 0 where the kernel doesn't tell.
#[unsafe(no_mangle)]
static HOST_NETNS: u64 = 0;
/// A [`Refusal`].
#[unsafe(no_mangle)]
static REFUSAL: u32 = Refusal::Errno as u32;

macro_rules! setting {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    ($name:ident) => {
        unsafe { core::ptr::read_volatile(&raw const $name) }
    };
}

/// Whether `address`, in native byte order, is one of the pool's.
#[inline(always)]
pub fn in_pool(address: u32) -> bool {
    address & setting!(POOL_MASK) == setting!(POOL_NETWORK)
}

/// Whether `netns_cookie` is the host's.
#[inline(always)]
pub fn is_host(netns_cookie: u64) -> bool {
    netns_cookie == setting!(HOST_NETNS)
}

/// Whether this kernel has `bpf_set_retval` for these programs.
#[inline(always)]
pub fn can_set_errno() -> bool {
    setting!(REFUSAL) == Refusal::Errno as u32
}
