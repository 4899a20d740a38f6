//! connect() of an IPv6 socket, TCP or UDP. `::ffff:a.b.c.d`, which is how dual-stack clients
//! connect to IPv4, is looked up as the IPv4 address that it is.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::{Address, Call, Destination, FamilyFilter, IPPROTO_TCP};

use crate::context::{self, Endpoint, PROCEED, Reject};
use crate::revnat;
use crate::xlate::{self, in_vip_range, in_vip_range6, xlate};

const LOOPBACK6: Address = Address { octets: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1] };

/// Attached to BPF_CGROUP_INET6_CONNECT.
#[cgroup_sock_addr(connect6)]
pub fn nohop_connect6(ctx: SockAddrContext) -> i32 {
    match try_connect6(&ctx) {
        Ok(()) => PROCEED,
        Err(Reject) => context::reject(|| {
            // Nothing can listen on port 0. A UDP socket that sends there by IPv4's form gets EINVAL
            // instead, and a TCP one may have no route to IPv6, or by its source no way there
            // (ip6_dst_lookup_tail(): EAFNOSUPPORT).
            let is_ipv4 = |address: Address| address.to_v4().is_some();
            let by_ipv4 = context::protocol(&ctx) == IPPROTO_TCP
                && (is_ipv4(context::dst6(&ctx)) || is_ipv4(context::source6(&ctx)));
            let loopback = if by_ipv4 { Address::v4([127, 0, 0, 1]) } else { LOOPBACK6 };
            context::set_dst6(&ctx, loopback, 0);
            PROCEED
        }),
    }
}

#[inline(always)]
fn try_connect6(ctx: &SockAddrContext) -> Result<(), Reject> {
    let connected = Endpoint { address: context::dst6(ctx), port: context::port(ctx) };
    let address4 = connected.address.to_v4();
    let is_in_range = match address4 {
        Some(address) => in_vip_range(address),
        None => in_vip_range6(&connected.address),
    };
    if !is_in_range {
        revnat::clear(ctx, &connected, || context::peer6(ctx));
        return Ok(());
    }
    // One request for both forms: the verdict would else be verified twice.
    let destination = match address4 {
        Some(address) => Destination::V4(address),
        None => Destination::V6(connected.address.octets),
    };
    let selection = xlate(ctx, destination, Call::Connect, |only| match destination {
        Destination::V4(_) => filter_by_ipv4(ctx),
        Destination::V6(_) => filter_by_ipv6(ctx, only),
    })?;
    let Some(selection) = selection else {
        revnat::clear(ctx, &connected, || context::peer6(ctx));
        return Ok(());
    };
    // Read again, rather than kept on the stack, which is short below what chooses.
    let connected = Endpoint { address: context::dst6(ctx), port: context::port(ctx) };
    let entry = xlate::revnat(&selection.backend, selection.backend_idx, &connected);
    context::set_dst6(ctx, selection.backend.address, selection.backend.port);
    revnat::store(ctx, entry, selection.origin, || context::peer6(ctx));
    Ok(())
}

/// By a mapped address: the backends of AF_INET sockets, so that an IPv4 address leads to the same
/// ones in either form, and where IPv6 isn't routed. Where there are none, those at IPv6 addresses,
/// which a socket with an IPv4 source can't reach.
#[inline(always)]
fn filter_by_ipv4(ctx: &SockAddrContext) -> FamilyFilter {
    if context::source6(ctx).to_v4().is_some() {
        FamilyFilter::Ipv4
    } else {
        FamilyFilter::Ipv4First
    }
}

/// By an IPv6 address: all that the socket can reach, as it is. A datagram that is sent to the same
/// address can reach IPv6 alone, so a UDP socket prefers it.
#[inline(always)]
fn filter_by_ipv6(ctx: &SockAddrContext, is_ipv6_only: bool) -> FamilyFilter {
    let source = context::source6(ctx);
    let is_unbound = source.words() == [0; 2];
    if source.to_v4().is_some() {
        // ip6_dst_lookup_tail(): a mapped source and an address of IPv6 are EAFNOSUPPORT.
        return FamilyFilter::Ipv4;
    }
    // Also one that the kernel chose when a UDP socket was connected: it stays when that connects again,
    // and what IPv4 peers send doesn't reach it (__ip6_datagram_connect()).
    if is_ipv6_only || !is_unbound {
        return FamilyFilter::Ipv6;
    }
    let is_udp = context::protocol(ctx) != IPPROTO_TCP;
    if is_udp { FamilyFilter::Ipv6First } else { FamilyFilter::All }
}
