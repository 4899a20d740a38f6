//! The context of a socket-address program: the address that it is about, and the socket.
//!
//! The verifier wants each field read and written by itself, as a whole, at a fixed offset.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::bpf_set_retval;
use aya_ebpf::helpers::generated::bpf_skc_to_tcp_sock;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, RevNat};

use crate::config;

/// The kernel goes on with the address as it now is.
pub const PROCEED: i32 = 1;
/// The kernel fails the call: with the errno that was set, else with EPERM.
pub const FAIL: i32 = 0;

const ECONNREFUSED: i32 = 111;

/// An address and port, such as where a connection goes.
#[derive(Clone, Copy)]
pub struct Endpoint {
    pub address: Address,
    pub port: u16,
}

impl Endpoint {
    /// Whether both are the same.
    #[inline(always)]
    pub fn is(&self, other: &Endpoint) -> bool {
        self.port == other.port && self.address == other.address
    }

    /// What was connected to.
    #[inline(always)]
    pub fn of_frontend(peer: &RevNat) -> Endpoint {
        Endpoint { address: peer.frontend, port: peer.frontend_port }
    }

    /// Where it was sent.
    #[inline(always)]
    pub fn of_backend(peer: &RevNat) -> Endpoint {
        Endpoint { address: peer.backend, port: peer.backend_port }
    }
}

macro_rules! read {
    // SAFETY: the kernel hands every program a valid context, and this is a field of it.
    ($ctx:ident . $($field:tt)+) => {
        unsafe { (&raw const (*$ctx.sock_addr).$($field)+).read_volatile() }
    };
}

macro_rules! read_socket {
    // SAFETY: the context's socket is valid while the program runs, and this is a field of it.
    ($socket:ident . $($field:tt)+) => {
        unsafe { (&raw const (*$socket).$($field)+).read_volatile() }
    };
}

macro_rules! write {
    // SAFETY: as above; this field is writable in these programs.
    ($value:expr => $ctx:ident . $($field:tt)+) => {
        unsafe { (&raw mut (*$ctx.sock_addr).$($field)+).write_volatile($value) }
    };
}

/// The protocol number of the socket.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u8 {
    read!(ctx.protocol) as u8
}

/// The socket.
#[inline(always)]
pub fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    read!(ctx.__bindgen_anon_1.sk)
}

/// The socket's address in the kernel, as a number to reckon with.
#[inline(always)]
pub fn socket_address(ctx: &SockAddrContext) -> usize {
    let mut negated = socket(ctx) as usize;
    // "R2 pointer arithmetic on sock prohibited", says the verifier of an addition. What a negation
    // leaves is a number to it, for programs that may read the kernel's memory at all.
    // SAFETY: one instruction, on one register.
    unsafe { core::arch::asm!("{0} = -{0}", inout(reg) negated) };
    negated.wrapping_neg()
}

/// The port that the socket is connected to; 0 for none.
#[inline(always)]
pub fn peer_port(ctx: &SockAddrContext) -> u16 {
    let socket = socket(ctx);
    u16::from_be(read_socket!(socket.dst_port))
}

/// The port that the socket sends from; 0 if it is bound to none, and has sent nothing since it was made or
/// disconnected.
#[inline(always)]
pub fn source_port(ctx: &SockAddrContext) -> u32 {
    let socket = socket(ctx);
    read_socket!(socket.src_port)
}

/// What a socket of either family is connected to; port 0 for nothing.
#[inline(always)]
pub fn peer(ctx: &SockAddrContext) -> Endpoint {
    const AF_INET6: u32 = 10;
    if read!(ctx.family) == AF_INET6 { peer6(ctx) } else { peer4(ctx) }
}

/// The source address of an IPv6 socket, if it is bound to one or connected; else zeros.
#[inline(always)]
pub fn source6(ctx: &SockAddrContext) -> Address {
    let socket = socket(ctx);
    address_of([
        read_socket!(socket.src_ip6[0]),
        read_socket!(socket.src_ip6[1]),
        read_socket!(socket.src_ip6[2]),
        read_socket!(socket.src_ip6[3]),
    ])
}

/// A number for the source address of a socket of either family, the same for an IPv4 address and its
/// mapped form; 0 if it is bound to none and not connected.
#[inline(always)]
pub fn source_number(ctx: &SockAddrContext) -> u64 {
    const AF_INET6: u32 = 10;
    if read!(ctx.family) == AF_INET6 {
        let [first, second] = source6(ctx).words();
        return first ^ second;
    }
    let socket = socket(ctx);
    let source = read_socket!(socket.src_ip4);
    let [first, second] = Address::v4(source.to_ne_bytes()).words();
    if source == 0 { 0 } else { first ^ second }
}

/// What an IPv4 socket is connected to; port 0 for nothing.
#[inline(always)]
pub fn peer4(ctx: &SockAddrContext) -> Endpoint {
    let socket = socket(ctx);
    let address = read_socket!(socket.dst_ip4).to_ne_bytes();
    Endpoint { address: Address::v4(address), port: u16::from_be(read_socket!(socket.dst_port)) }
}

/// What an IPv6 socket is connected to; port 0 for nothing.
#[inline(always)]
pub fn peer6(ctx: &SockAddrContext) -> Endpoint {
    let socket = socket(ctx);
    let words = [
        read_socket!(socket.dst_ip6[0]),
        read_socket!(socket.dst_ip6[1]),
        read_socket!(socket.dst_ip6[2]),
        read_socket!(socket.dst_ip6[3]),
    ];
    Endpoint { address: address_of(words), port: u16::from_be(read_socket!(socket.dst_port)) }
}

/// The context's IPv4 address, in the order of octets.
#[inline(always)]
pub fn dst4(ctx: &SockAddrContext) -> [u8; 4] {
    read!(ctx.user_ip4).to_ne_bytes()
}

/// The context's IPv6 address.
#[inline(always)]
pub fn dst6(ctx: &SockAddrContext) -> Address {
    let words = [
        read!(ctx.user_ip6[0]),
        read!(ctx.user_ip6[1]),
        read!(ctx.user_ip6[2]),
        read!(ctx.user_ip6[3]),
    ];
    address_of(words)
}

#[inline(always)]
fn address_of(words: [u32; 4]) -> Address {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words.map(u32::to_ne_bytes);
    Address { octets: [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] }
}

/// The context's port.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> u16 {
    // A field of 32 bits with the 16-bit port in it, in network order.
    u16::from_be(read!(ctx.user_port) as u16)
}

/// Puts an IPv4 address and a port into the context.
#[inline(always)]
pub fn set_dst4(ctx: &SockAddrContext, address: [u8; 4], port: u16) {
    write!(u32::from_ne_bytes(address) => ctx.user_ip4);
    write!(u32::from(port.to_be()) => ctx.user_port);
}

/// Puts an IPv6 address, or an IPv4 one in IPv6's form, and a port into the context.
#[inline(always)]
pub fn set_dst6(ctx: &SockAddrContext, address: Address, port: u16) {
    let [first, second] = address.words();
    let [a, b, c, d, e, f, g, h] = first.to_ne_bytes();
    let [i, j, k, l, m, n, o, p] = second.to_ne_bytes();
    write!(u32::from_ne_bytes([a, b, c, d]) => ctx.user_ip6[0]);
    write!(u32::from_ne_bytes([e, f, g, h]) => ctx.user_ip6[1]);
    write!(u32::from_ne_bytes([i, j, k, l]) => ctx.user_ip6[2]);
    write!(u32::from_ne_bytes([m, n, o, p]) => ctx.user_ip6[3]);
    write!(u32::from(port.to_be()) => ctx.user_port);
}

/// A connection that must not reach anything.
pub struct Reject;

/// Makes the call fail with ECONNREFUSED, where the kernel lets a program say so. Before 6.1 it is
/// EPERM, unless `divert` sends the call to where ECONNREFUSED comes from.
#[inline(always)]
pub fn reject(divert: impl FnOnce() -> i32) -> i32 {
    if config::can_set_errno() {
        // SAFETY: the helper takes any errno.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
        return FAIL;
    }
    divert()
}

/// The kernel's own structure of a TCP socket, which begins with that of any socket. The verifier knows
/// the structure, and lets a program load from it, which is quicker than a helper.
#[inline(always)]
pub fn tcp_socket(ctx: &SockAddrContext) -> *const u8 {
    // SAFETY: the helper takes the context's own socket.
    unsafe { bpf_skc_to_tcp_sock(socket(ctx).cast()) }.cast::<u8>().cast_const()
}
