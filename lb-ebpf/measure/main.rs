//! Programs to compare nohop's with: what a hook costs that does nothing, and ways for a socket to
//! keep what it connected. The benchmarks load them; the daemon doesn't know them.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features)]

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::xdp_action::XDP_PASS;
use aya_ebpf::bindings::{
    BPF_F_MMAPABLE, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, TC_ACT_UNSPEC,
    bpf_spin_lock,
};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, SkStorage};
use aya_ebpf::helpers::generated::{
    bpf_setsockopt, bpf_skc_to_tcp_sock, bpf_spin_lock, bpf_spin_unlock,
};
use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie,
    bpf_probe_read_kernel,
};
use aya_ebpf::macros::{btf_map, cgroup_sock, cgroup_sock_addr, classifier, sock_ops, xdp};
use aya_ebpf::programs::{SockAddrContext, SockContext, SockOpsContext, TcContext, XdpContext};
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::RevNat;

const PROCEED: i32 = 1;
const N_SOCKETS: usize = 65_536;

/// The least that getpeername needs: the VIP and its port, the backend and its port, for IPv4.
#[repr(C, align(8))]
#[derive(Clone, Copy, Default)]
struct Small {
    words: [u64; 2],
}

/// A place of `PLACES`.
#[repr(C, align(8))]
struct Place {
    lock: bpf_spin_lock,
    padding: u32,
    /// The socket that has it, 0 for none.
    cookie: u64,
    peer: RevNat,
}

#[btf_map]
static WHOLE: SkStorage<RevNat> = SkStorage::new();
#[btf_map]
static SECOND: SkStorage<RevNat> = SkStorage::new();
#[btf_map]
static SMALL: SkStorage<Small> = SkStorage::new();
#[btf_map]
static BY_COOKIE: HashMap<u64, RevNat, N_SOCKETS> = HashMap::new();
#[btf_map]
static RECENT: LruHashMap<u64, RevNat, N_SOCKETS> = LruHashMap::new();
#[btf_map]
static PLACES: Array<Place, N_SOCKETS> = Array::new();
/// A record of `RECORDS`.
#[repr(C, align(8))]
struct Record {
    cookie: u64,
    claims: u32,
    stores: u32,
    peer: RevNat,
}

#[btf_map]
static RECORDS: Array<Record, N_SOCKETS, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static SHARED: Array<u64, 64, { BPF_F_MMAPABLE as usize }> = Array::new();
#[btf_map]
static UNSHARED: Array<u64, 64> = Array::new();

#[unsafe(no_mangle)]
static FIRST: u32 = 1;
#[unsafe(no_mangle)]
static SECOND_WORD: u32 = 2;

/// Nothing: what remains is the price of calling a program, and of the clock.
#[cgroup_sock_addr(connect4)]
pub fn empty(_ctx: SockAddrContext) -> i32 {
    PROCEED
}

/// Storage of the size of nohop's, made and left as zeros.
#[cgroup_sock_addr(connect4)]
pub fn storage(ctx: SockAddrContext) -> i32 {
    // SAFETY: the socket is the context's own.
    unsafe { WHOLE.get_or_insert_ptr_mut(&ctx, None) };
    PROCEED
}

/// The same, filled by the kernel from a value of ours.
#[cgroup_sock_addr(connect4)]
pub fn storage_filled(ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    unsafe { WHOLE.get_or_insert_ptr_mut(&ctx, Some(&mut peer())) };
    PROCEED
}

/// Storage of 16 bytes.
#[cgroup_sock_addr(connect4)]
pub fn storage_small(ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    unsafe { SMALL.get_or_insert_ptr_mut(&ctx, None) };
    PROCEED
}

/// Storage from two maps: the second creation finds the socket's list of storages made.
#[cgroup_sock_addr(connect4)]
pub fn storage_twice(ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    unsafe {
        WHOLE.get_or_insert_ptr_mut(&ctx, None);
        SECOND.get_or_insert_ptr_mut(&ctx, None);
    }
    PROCEED
}

/// A look for storage that isn't there.
#[cgroup_sock_addr(connect4)]
pub fn storage_absent(ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    unsafe { WHOLE.get_ptr_mut(&ctx) };
    PROCEED
}

/// A preallocated hash by the socket's cookie; [`hash_release`] takes the entry away.
#[cgroup_sock_addr(connect4)]
pub fn hash(ctx: SockAddrContext) -> i32 {
    let _ = BY_COOKIE.insert(cookie(&ctx), peer(), 0);
    PROCEED
}

/// Attached to BPF_CGROUP_INET_SOCK_RELEASE: every socket of the cgroup pays for it at close().
#[cgroup_sock(sock_release)]
pub fn hash_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid.
    let _ = BY_COOKIE.remove(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    PROCEED
}

/// A hash that forgets the socket used longest ago, which may well be open.
#[cgroup_sock_addr(connect4)]
pub fn lru(ctx: SockAddrContext) -> i32 {
    let _ = RECENT.insert(cookie(&ctx), peer(), 0);
    PROCEED
}

/// An array in which a socket's cookie names its place; [`place_release`] frees it. A socket whose
/// place is taken gets storage.
#[cgroup_sock_addr(connect4)]
pub fn place(ctx: SockAddrContext) -> i32 {
    let (cookie, peer) = (cookie(&ctx), peer());
    let kept = locked(cookie, |place| {
        let is_free = place.cookie == 0 || place.cookie == cookie;
        if is_free {
            place.cookie = cookie;
            place.peer = peer;
        }
        is_free
    });
    if kept != Some(true) {
        // SAFETY: as above.
        unsafe { WHOLE.get_or_insert_ptr_mut(&ctx, None) };
    }
    PROCEED
}

/// Attached to BPF_CGROUP_INET_SOCK_RELEASE.
#[cgroup_sock(sock_release)]
pub fn place_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    locked(cookie, |place| {
        if place.cookie == cookie {
            place.cookie = 0;
        }
    });
    PROCEED
}

/// A record by the socket's cookie, claimed by an addition: a lock for a moment.
#[cgroup_sock_addr(connect4)]
pub fn record(ctx: SockAddrContext) -> i32 {
    claim(cookie(&ctx));
    PROCEED
}

/// The same, and the socket asks for callbacks of its state (6.12).
#[cgroup_sock_addr(connect4)]
pub fn record_flagged(ctx: SockAddrContext) -> i32 {
    const SOL_TCP: i32 = 6;
    const TCP_BPF_SOCK_OPS_CB_FLAGS: i32 = 1008;
    claim(cookie(&ctx));
    let mut flags = BPF_SOCK_OPS_STATE_CB_FLAG;
    // SAFETY: the value is live, and as long as said.
    let set = unsafe {
        bpf_setsockopt(ctx.as_ptr(), SOL_TCP, TCP_BPF_SOCK_OPS_CB_FLAGS, (&raw mut flags).cast(), 4)
    };
    if set == 0 { PROCEED } else { 0 }
}

/// The cookie's helper alone.
#[cgroup_sock_addr(connect4)]
pub fn cookie_alone(ctx: SockAddrContext) -> i32 {
    i32::from(cookie(&ctx) != 0)
}

/// A look for the socket's cookie, by its type.
#[cgroup_sock_addr(connect4)]
pub fn peek(ctx: SockAddrContext) -> i32 {
    // SAFETY: the helper takes the context's own socket.
    unsafe {
        let sk = (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile();
        let socket = bpf_skc_to_tcp_sock(sk.cast()).cast::<u8>();
        if socket.is_null() {
            return PROCEED;
        }
        let cookie = socket.add(COOKIE_OFFSET).cast::<u64>().read_volatile();
        if cookie == u64::MAX { 0 } else { PROCEED }
    }
}

const COOKIE_OFFSET: usize = 88;

#[inline(always)]
fn claim(cookie: u64) {
    let index = cookie as u32 & (N_SOCKETS as u32 - 1);
    let Some(record) = RECORDS.get_ptr_mut(index) else { return };
    // SAFETY: an array's element stays.
    unsafe {
        let owner = (&raw const (*record).cookie).read_volatile();
        if owner == u64::MAX {
            return;
        }
        let claims = &raw mut (*record).claims;
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(claims, 1);
        if claims.read_volatile() == 1 && (&raw const (*record).cookie).read_volatile() == owner {
            (&raw mut (*record).stores).write_volatile((*record).stores + 1);
            (*record).peer = peer();
            (&raw mut (*record).cookie).write_volatile(cookie);
        }
        atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(claims, u32::MAX);
    }
}

/// A number in the socket's mark, from which getpeername could find the VIP.
#[cgroup_sock_addr(connect4)]
pub fn mark(ctx: SockAddrContext) -> i32 {
    const SOL_SOCKET: i32 = 1;
    const SO_MARK: i32 = 36;
    let mut mark = 7u32;
    // SAFETY: the value is live, and as long as said.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_MARK, (&raw mut mark).cast(), 4) };
    PROCEED
}

/// A word of an array that the daemon could map into its memory.
#[cgroup_sock_addr(connect4)]
pub fn word(_ctx: SockAddrContext) -> i32 {
    // SAFETY: an array's element stays.
    let word = SHARED.get_ptr(0).map(|word| unsafe { word.read_volatile() });
    word.map_or(PROCEED, |_| PROCEED)
}

/// The same of an array that it could not.
#[cgroup_sock_addr(connect4)]
pub fn word_unshared(_ctx: SockAddrContext) -> i32 {
    // SAFETY: as above.
    let word = UNSHARED.get_ptr(0).map(|word| unsafe { word.read_volatile() });
    word.map_or(PROCEED, |_| PROCEED)
}

/// Two words of `.rodata`.
#[cgroup_sock_addr(connect4)]
pub fn constants(_ctx: SockAddrContext) -> i32 {
    // SAFETY: a static is valid and aligned.
    let [first, second] =
        unsafe { [(&raw const FIRST).read_volatile(), (&raw const SECOND_WORD).read_volatile()] };
    if first == second { 0 } else { PROCEED }
}

/// The process, its network namespace and a random number: what a choice asks the kernel for.
#[cgroup_sock_addr(connect4)]
pub fn tgid(_ctx: SockAddrContext) -> i32 {
    if bpf_get_current_pid_tgid() == 0 { 0 } else { PROCEED }
}

/// As above.
#[cgroup_sock_addr(connect4)]
pub fn netns(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is valid.
    if unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == u64::MAX { 0 } else { PROCEED }
}

/// As above.
#[cgroup_sock_addr(connect4)]
pub fn random(_ctx: SockAddrContext) -> i32 {
    // SAFETY: the helper has no preconditions.
    i32::from(unsafe { bpf_get_prandom_u32() } != 0)
}

/// Two reads of the kernel's memory: the socket's address from the context, a byte of the socket.
#[cgroup_sock_addr(connect4)]
pub fn two_reads(ctx: SockAddrContext) -> i32 {
    // SAFETY: the helper reads safely, whatever the address.
    let byte = unsafe {
        bpf_probe_read_kernel::<usize>(ctx.as_ptr().cast())
            .and_then(|socket| bpf_probe_read_kernel((socket + 500) as *const u8))
    };
    if byte.is_err() { 0 } else { PROCEED }
}

/// One read, as nohop does it: the socket's address is the context's own, negated twice. Fails the
/// connect if it is another one than the kernel's context has.
#[cgroup_sock_addr(connect4)]
pub fn one_read(ctx: SockAddrContext) -> i32 {
    // SAFETY: a valid context, one instruction on one register, and a helper that reads safely.
    let (address, first) = unsafe {
        let mut address =
            (&raw const (*ctx.sock_addr).__bindgen_anon_1.sk).read_volatile() as usize;
        core::arch::asm!("{0} = -{0}", inout(reg) address);
        (address.wrapping_neg(), bpf_probe_read_kernel::<usize>(ctx.as_ptr().cast()))
    };
    if first == Ok(address) { PROCEED } else { 0 }
}

/// A sockops program that does nothing: what every TCP socket pays for one.
#[sock_ops]
pub fn sockops_empty(_ctx: SockOpsContext) -> u32 {
    1
}

/// The same, which asks for callbacks of state changes.
#[sock_ops]
pub fn sockops_states(ctx: SockOpsContext) -> u32 {
    // SAFETY: the context is valid, and this is a field of it.
    if unsafe { (&raw const (*ctx.ops).op).read_volatile() } == BPF_SOCK_OPS_TCP_CONNECT_CB {
        let _ = ctx.set_cb_flags(BPF_SOCK_OPS_STATE_CB_FLAG.cast_signed());
    }
    1
}

/// A program at the ingress of an interface that does nothing.
#[classifier]
pub fn tc_empty(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// The same in its driver.
#[xdp]
pub fn xdp_empty(_ctx: XdpContext) -> u32 {
    XDP_PASS
}

/// A peer that isn't all zeros, so that the compiler can't know that it needn't copy it.
#[inline(always)]
fn peer() -> RevNat {
    RevNat { frontend_port: 80, backend_port: 8080, generation: 1, ..RevNat::default() }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Runs `work` with a cookie's place, which is locked.
#[inline(always)]
fn locked<R>(cookie: u64, work: impl FnOnce(&mut Place) -> R) -> Option<R> {
    let index = cookie as u32 & (N_SOCKETS as u32 - 1);
    // SAFETY: an array's element stays, and is used under its lock only.
    let place = unsafe { PLACES.get_ptr_mut(index)?.as_mut() }?;
    let lock = &raw mut place.lock;
    // SAFETY: the lock is the one in the map's value; it is given back at once.
    unsafe { bpf_spin_lock(lock) };
    let result = work(place);
    // SAFETY: as above.
    unsafe { bpf_spin_unlock(lock) };
    Some(result)
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
