//! The fast path at TC.

use core::ffi::c_void;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_csum_update;
use lb_common::{FastPath, folded};

use crate::fast::{self, Frame};
use crate::headers::Headers;
use crate::hops;
use crate::skb::Skb;

impl Frame for Skb {
    #[inline(always)]
    fn context(self) -> *mut c_void {
        self.0.cast()
    }

    #[inline(always)]
    fn data(self) -> usize {
        self.begin()
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        self.end()
    }

    #[inline(always)]
    fn ip_len(self) -> u32 {
        Skb::ip_len(&self).unwrap_or(0)
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        Skb::ifindex(&self)
    }

    /// [`Skb::side`] has looked.
    #[inline(always)]
    fn is_to_host(self, _: Headers) -> bool {
        !self.is_batch()
    }

    #[inline(always)]
    fn may_leave_by(self, _: u32) -> bool {
        true
    }

    /// Where the network card has summed up the packet (CHECKSUM_COMPLETE).
    #[inline(always)]
    fn set_difference(self, difference: u64) {
        // SAFETY: the helper takes the context; elsewhere it does nothing.
        unsafe { bpf_csum_update(self.0, folded(difference).into()) };
    }
}

/// See [`fast::forward`]; 0 for none. A function that the verifier follows once, with a stack of its own.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_fast(ctx: *mut __sk_buff) -> u64 {
    let Some(egress) = fast::forward(Skb(ctx)) else { return 0 };
    if let Some(processor) = hops::processor() {
        processor.count(FastPath::Tc);
    }
    egress.into()
}
