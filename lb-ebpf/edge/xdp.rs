//! The fast path at XDP, in the driver, before the kernel has made anything of a packet.

use core::ffi::c_void;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::{XDP_PASS, XDP_TX};
use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_common::{EdgeInterface, FastPath};

use crate::fast::{self, Frame};
use crate::headers::Headers;
use crate::hops;

/// The interface's hardware address in its word; see [`hops::interface`].
const MAC: u64 = (1 << 48) - 1;

#[derive(Clone, Copy)]
struct XdpFrame<'a>(&'a XdpContext);

impl Frame for XdpFrame<'_> {
    #[inline(always)]
    fn context(self) -> *mut c_void {
        self.0.as_ptr()
    }

    #[inline(always)]
    fn data(self) -> usize {
        self.0.data()
    }

    #[inline(always)]
    fn data_end(self) -> usize {
        self.0.data_end()
    }

    #[inline(always)]
    fn ip_len(self) -> u32 {
        (self.0.data_end() - self.0.data()) as u32 - 14
    }

    #[inline(always)]
    fn ifindex(self) -> u32 {
        self.0.ingress_ifindex() as u32
    }

    /// An interface in promiscuous mode has others' packets too.
    #[inline(always)]
    fn is_to_host(self, ethernet: Headers) -> bool {
        let to = u64::from(ethernet.word::<0>()) | u64::from(ethernet.half::<4>()) << 32;
        hops::interface(self.ifindex()) & MAC == to
    }

    /// Where a driver has no room for packets from XDP, it drops them without a word.
    #[inline(always)]
    fn may_leave_by(self, egress: u32) -> bool {
        let has = |index: u32, flag: u16| hops::interface(index) >> 48 & u64::from(flag) != 0;
        let ingress = self.ifindex();
        egress == ingress && has(ingress, EdgeInterface::SENDS_BACK)
            || has(ingress, EdgeInterface::REDIRECTS)
                && has(egress, EdgeInterface::TAKES_REDIRECTED)
    }

    /// There is no sum of it yet.
    #[inline(always)]
    fn set_difference(self, _: u64) {}
}

/// Attached to interfaces whose driver runs it. What it leaves goes to [`nohop_edge`](crate::nohop_edge).
#[xdp]
pub fn nohop_edge_xdp(ctx: XdpContext) -> u32 {
    let frame = XdpFrame(&ctx);
    let Some(egress) = fast::forward(frame) else { return XDP_PASS };
    let sends_back = u64::from(EdgeInterface::SENDS_BACK);
    let is_back = egress == frame.ifindex() && hops::interface(egress) >> 48 & sends_back != 0;
    if let Some(processor) = hops::processor() {
        processor.count(if is_back { FastPath::XdpTx } else { FastPath::XdpRedirect });
    }
    if is_back {
        return XDP_TX;
    }
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_redirect(egress, 0) as u32 }
}
