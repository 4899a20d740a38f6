//! The context of a socket-address program: the address that it is about, and the socket.
//!
//! The verifier wants each field read and written by itself, as a whole, at a fixed offset.

use core::hint::black_box;

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, DnsServer};

const AF_INET6: u32 = 10;

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

/// The port.
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> u16 {
    // A field of 32 bits with the 16-bit port in it, in network order.
    u16::from_be(read!(ctx.user_port) as u16)
}

/// The IPv4 address, in the order of octets.
#[inline(always)]
pub fn address4(ctx: &SockAddrContext) -> [u8; 4] {
    read!(ctx.user_ip4).to_ne_bytes()
}

/// The IPv6 address.
#[inline(always)]
pub fn address6(ctx: &SockAddrContext) -> Address {
    address_of([
        read!(ctx.user_ip6[0]),
        read!(ctx.user_ip6[1]),
        read!(ctx.user_ip6[2]),
        read!(ctx.user_ip6[3]),
    ])
}

/// Puts an IPv4 address and a port there.
#[inline(always)]
pub fn set4(ctx: &SockAddrContext, address: [u8; 4], port: u16) {
    write!(u32::from_ne_bytes(address) => ctx.user_ip4);
    write!(u32::from(port.to_be()) => ctx.user_port);
}

/// Puts an IPv6 address, or an IPv4 one in IPv6's form, and a port there.
#[inline(always)]
pub fn set6(ctx: &SockAddrContext, address: Address, port: u16) {
    let [a, b, c, d]: [u32; 4] = zerocopy::transmute!(address);
    write!(a => ctx.user_ip6[0]);
    write!(b => ctx.user_ip6[1]);
    write!(c => ctx.user_ip6[2]);
    write!(d => ctx.user_ip6[3]);
    write!(u32::from(port.to_be()) => ctx.user_port);
}

/// What the socket is connected to; port 0 for nothing.
#[inline(always)]
pub fn peer(ctx: &SockAddrContext) -> DnsServer {
    let socket = socket(ctx);
    // Opaque: the compiler would load what both have at one place of two, and "R3 pointer arithmetic on
    // sock prohibited", says the verifier.
    let address = if read!(ctx.family) == AF_INET6 {
        address_of(black_box([
            read_socket!(socket.dst_ip6[0]),
            read_socket!(socket.dst_ip6[1]),
            read_socket!(socket.dst_ip6[2]),
            read_socket!(socket.dst_ip6[3]),
        ]))
    } else {
        Address::v4(read_socket!(socket.dst_ip4).to_ne_bytes())
    };
    DnsServer::new(address, u16::from_be(read_socket!(socket.dst_port)))
}

/// Whether the socket is bound to an interface (SO_BINDTODEVICE), or in a VRF: then it reaches no other.
#[inline(always)]
pub fn is_bound_to_interface(ctx: &SockAddrContext) -> bool {
    let socket = socket(ctx);
    read_socket!(socket.bound_dev_if) != 0
}

#[inline(always)]
fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    read!(ctx.__bindgen_anon_1.sk)
}

#[inline(always)]
fn address_of(words: [u32; 4]) -> Address {
    Address { octets: zerocopy::transmute!(words) }
}
