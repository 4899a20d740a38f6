//! The unit `intercept`: DNS queries of the processes in certain cgroups are sent to nohop, and the
//! replies come from the address that was asked. An object of its own, attached to those cgroups alone,
//! so that no other process pays for it.
//!
//! The programs of a cgroup run before those of the cgroups above it (`compute_effective_progs` in
//! kernel/bpf/cgroup.c), so the unit `connect` sees the address that a query is sent to, which is no
//! VIP.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so the atomic types lack the addition that it does have.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod context;
mod maps;
mod policy;
mod trace;

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Asked, DNS_PORT, DnsServer};

use crate::policy::{Call, Query};

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}

/// The kernel goes on with the address as it now is.
const PROCEED: i32 = 1;

/// bind() of an IPv4 socket.
#[cgroup_sock_addr(bind4)]
pub fn nohop_dns_bind4(ctx: SockAddrContext) -> i32 {
    policy::bind(&ctx, &Address::v4(context::address4(&ctx)));
    PROCEED
}

/// bind() of an IPv6 socket.
#[cgroup_sock_addr(bind6)]
pub fn nohop_dns_bind6(ctx: SockAddrContext) -> i32 {
    policy::bind(&ctx, &context::address6(&ctx));
    PROCEED
}

/// connect() of an IPv4 socket, TCP or UDP.
#[cgroup_sock_addr(connect4)]
pub fn nohop_dns_conn4(ctx: SockAddrContext) -> i32 {
    if context::port(&ctx) == DNS_PORT {
        translate4(&ctx, Call::Connect);
    }
    PROCEED
}

/// connect() of an IPv6 socket, also to `::ffff:a.b.c.d`.
#[cgroup_sock_addr(connect6)]
pub fn nohop_dns_conn6(ctx: SockAddrContext) -> i32 {
    if context::port(&ctx) == DNS_PORT {
        translate6(&ctx, Call::Connect);
    }
    PROCEED
}

/// sendto() and sendmsg() to an IPv4 address, also of an IPv6 socket to `::ffff:a.b.c.d`, and then also
/// where it is connected and names nothing: udpv6_sendmsg() hands its datagrams on with the address.
#[cgroup_sock_addr(sendmsg4)]
pub fn nohop_dns_send4(ctx: SockAddrContext) -> i32 {
    if context::port(&ctx) == DNS_PORT {
        translate4(&ctx, Call::Send);
    }
    PROCEED
}

/// sendto() and sendmsg() to an IPv6 address.
#[cgroup_sock_addr(sendmsg6)]
pub fn nohop_dns_send6(ctx: SockAddrContext) -> i32 {
    if context::port(&ctx) == DNS_PORT {
        translate6(&ctx, Call::Send);
    }
    PROCEED
}

/// recvfrom() and recvmsg() of an IPv4 socket.
#[cgroup_sock_addr(recvmsg4)]
pub fn nohop_dns_recv4(ctx: SockAddrContext) -> i32 {
    let server = DnsServer::new(Address::v4(context::address4(&ctx)), context::port(&ctx));
    if let Some(asked) = received(&ctx, &server)
        && let Some(address) = asked.to_v4()
    {
        context::set4(&ctx, address, DNS_PORT);
    }
    PROCEED
}

/// recvfrom() and recvmsg() of an IPv6 socket, from IPv4 senders too.
#[cgroup_sock_addr(recvmsg6)]
pub fn nohop_dns_recv6(ctx: SockAddrContext) -> i32 {
    let server = DnsServer::new(context::address6(&ctx), context::port(&ctx));
    if let Some(asked) = received(&ctx, &server) {
        context::set6(&ctx, asked, DNS_PORT);
    }
    PROCEED
}

/// getpeername() of an IPv4 socket. It runs on every accept() too.
#[cgroup_sock_addr(getpeername4)]
pub fn nohop_dns_peer4(ctx: SockAddrContext) -> i32 {
    let server = DnsServer::new(Address::v4(context::address4(&ctx)), context::port(&ctx));
    if let Some(asked) = asked_by(&ctx, &server)
        && let Some(address) = asked.peer().to_v4()
    {
        context::set4(&ctx, address, DNS_PORT);
    }
    PROCEED
}

/// getpeername() of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub fn nohop_dns_peer6(ctx: SockAddrContext) -> i32 {
    let server = DnsServer::new(context::address6(&ctx), context::port(&ctx));
    if let Some(asked) = asked_by(&ctx, &server) {
        context::set6(&ctx, asked.peer(), DNS_PORT);
    }
    PROCEED
}

#[inline(always)]
fn translate4(ctx: &SockAddrContext, call: Call) {
    let address = Address::v4(context::address4(ctx));
    if let Some(server) = policy::server_for(ctx, &Query { address, call })
        && let Some(address) = server.address.to_v4()
    {
        context::set4(ctx, address, server.port);
    }
}

#[inline(always)]
fn translate6(ctx: &SockAddrContext, call: Call) {
    let address = context::address6(ctx);
    if let Some(server) = policy::server_for(ctx, &Query { address, call }) {
        context::set6(ctx, server.address, server.port);
    }
}

/// Whom a datagram passes for, if it is a reply to an intercepted query.
#[inline(always)]
fn received(ctx: &SockAddrContext, server: &DnsServer) -> Option<Address> {
    let asked = asked_by(ctx, server)?;
    Some(asked.receive(context::peer(ctx) == *server, policy::now_ns()))
}

/// What the socket has asked, if this is who answers for it.
#[inline(always)]
fn asked_by(ctx: &SockAddrContext, server: &DnsServer) -> Option<&'static mut Asked> {
    let asked = maps::asked(ctx, server.address.to_v4().is_some())?;
    asked.is_by(server).then_some(asked)
}
