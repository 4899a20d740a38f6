//! The clients' addresses that edges send along with SYNs, for servers that ask for their peer's: accept() and
//! getpeername() run the hook of the unit `connect`, which shows what is stored here as it shows VIPs.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::bpf_get_socket_cookie;
use aya_ebpf::helpers::generated::{bpf_load_hdr_opt, bpf_setsockopt, bpf_skc_to_mptcp_sock};
use aya_ebpf::programs::SockOpsContext;
use lb_common::{
    Address, CLIENT_EXPERIMENT, CLIENT_OPTION, CLIENT_OPTION_LEN, Counter, MAX_CLIENT_SOURCES,
    NOT_COUNTED, RevNat, client_of,
};

use crate::maps::{self, layout};
use crate::socket::{read, socket};

/// The addresses of edges that are trusted, as they lie in memory; 0 for none.
#[unsafe(no_mangle)]
static CLIENT_ADDRESS_FROM: [u32; MAX_CLIENT_SOURCES] = [0; MAX_CLIENT_SOURCES];

/// 1 where the kernel has `bpf_skc_to_mptcp_sock`.
#[unsafe(no_mangle)]
static HAS_MPTCP: u32 = 0;

const ENOENT: i64 = 2;
const SOL_TCP: i32 = 6;
const TCP_SAVE_SYN: i32 = 27;
/// Look in the SYN that was kept, rather than in the segment at hand.
const BPF_LOAD_HDR_OPT_TCP_SYN: u64 = 1;

#[inline(always)]
fn trusted(nth: usize) -> u32 {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    unsafe { (&raw const CLIENT_ADDRESS_FROM[nth]).read_volatile() }
}

/// A socket begins to listen: the kernel is to keep the SYNs of its connections until they are established.
#[inline(always)]
pub fn listen(ctx: &SockOpsContext) {
    if trusted(0) == 0 {
        return;
    }
    let mut is_kept = 1i32;
    // SAFETY: the helper takes the context, and a value that is as long as named.
    unsafe {
        bpf_setsockopt(ctx.as_ptr(), SOL_TCP, TCP_SAVE_SYN, (&raw mut is_kept).cast(), 4);
    }
}

/// A connection was accepted: keeps the address that its SYN has, if an edge sent that.
#[inline(always)]
pub fn accept(ctx: &SockOpsContext) {
    if trusted(0) == 0 || maps::is_shadow() {
        return;
    }
    // Of IPv6 sockets it is 0 but where they have an IPv4 peer.
    let peer = read!(ctx.remote_ip4);
    let (mut is_trusted, mut nth) = (false, 0);
    while nth < MAX_CLIENT_SOURCES {
        is_trusted |= trusted(nth) == peer;
        nth += 1;
    }
    let socket = socket(ctx);
    if peer == 0 || !is_trusted || socket.is_null() {
        return;
    }
    // What to look for, and room for what is found.
    let [first, second] = CLIENT_EXPERIMENT;
    let mut option = [0u8; CLIENT_OPTION_LEN as usize];
    (option[0], option[1], option[2], option[3]) = (CLIENT_OPTION, 4, first, second);
    let flags = BPF_LOAD_HDR_OPT_TCP_SYN;
    // SAFETY: the helper takes the context, and as much room as named.
    let len =
        unsafe { bpf_load_hdr_opt(ctx.ops, option.as_mut_ptr().cast(), CLIENT_OPTION_LEN, flags) };
    if len == -ENOENT {
        maps::count(Counter::ClientNoSyn);
        return;
    }
    let found = if len == i64::from(CLIENT_OPTION_LEN) { client_of(&option) } else { None };
    let Some((client, port)) = found else {
        maps::count(Counter::ClientNoOption);
        return;
    };
    let [_, _, high, low] = read!(ctx.remote_port).to_ne_bytes();
    let shown = RevNat {
        frontend: Address::v4(client),
        backend: Address::v4(peer.to_ne_bytes()),
        frontend_port: port,
        backend_port: u16::from_be_bytes([high, low]),
        layout: layout(),
        naming: NOT_COUNTED,
        backend_idx: 0,
        generation: 0,
    };
    // SAFETY: the storage is the socket's own, which nothing else has yet.
    let Some(kept) = (unsafe { maps::made(socket).as_mut() }) else {
        maps::count(Counter::StorageAllocFailed);
        return;
    };
    *kept = shown;
    show_outside(socket, &shown);
    maps::count(Counter::ClientShown);
    // The hook looks at sockets with a cookie alone.
    // SAFETY: the context is valid.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
}

/// Shows the same of the MPTCP socket that a subflow is of, if it is one and the kernel lets a program know (5.19):
/// accept() and getpeername() run the hook on that one. Subflows that join it later change nothing.
#[inline(always)]
fn show_outside(socket: *mut bpf_sock, shown: &RevNat) {
    // SAFETY: a static is valid and aligned; volatile, because its value comes after compilation.
    if unsafe { (&raw const HAS_MPTCP).read_volatile() } == 0 {
        return;
    }
    // SAFETY: the helper takes the context's socket.
    let mptcp = unsafe { bpf_skc_to_mptcp_sock(socket.cast()) };
    if mptcp.is_null() {
        return;
    }
    // SAFETY: the storage is that socket's own, which lives as long as the socket does.
    if let Some(kept) = unsafe { maps::made(mptcp.cast()).as_mut() }
        && kept.backend_port == 0
    {
        *kept = *shown;
    }
}
