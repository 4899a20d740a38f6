//! Which clients are served, and at what rate: `dns.allow` and `dns.client_rate`, as the daemon has it
//! (`lb-userspace/src/dns/acl.rs`).

use aya_ebpf::bindings::__sk_buff;
use lb_common::Address;

use crate::headers::Headers;
use crate::maps::{self, ControlPtr};
use crate::skb::Skb;

/// The port of DNS servers, from which no client asks: two that answered each other would never end.
const DNS_PORT: u16 = 53;

/// The decision about a client: it is served.
pub const ADMITTED: u64 = 0;
/// The daemon decides.
pub const REFUSED: u64 = 1;
/// It sends too many queries.
pub const LIMITED: u64 = 2;

/// Decides about a packet's client: [`ADMITTED`], [`REFUSED`] or [`LIMITED`].
#[inline(always)]
pub fn admit(skb: &Skb, headers: &Headers, now_ns: u64) -> u64 {
    if headers.source_port == DNS_PORT {
        return REFUSED;
    }
    if !skb.is_loopback() {
        return nohop_names_admit(skb.0, now_ns);
    }
    // This host itself. A packet has the same address twice, or two of 127/8, because the kernel chose
    // the source; by another one NAT or the application did. Conntrack knows NAT by the packet as it
    // came, and would drop the answer that is made of it.
    let [source, destination] = [headers.source.words(), headers.destination.words()];
    let is_same = source[0] == destination[0] && source[1] == destination[1];
    let is_of_127 = |address| low_ipv4(address)[0] == 127;
    let is_own =
        is_same || !headers.is_ipv6 && is_of_127(headers.source) && is_of_127(headers.destination);
    if is_own { ADMITTED } else { REFUSED }
}

/// The same about another host's.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_names_admit(ctx: *mut __sk_buff, now_ns: u64) -> u64 {
    let (Some(control), Some(scratch)) = (maps::control(), maps::scratch()) else {
        return REFUSED;
    };
    let (skb, headers) = (&Skb(ctx), &scratch.headers);
    if is_martian(headers) || !maps::is_allowed(&headers.source) || !headers.is_reachable_by(skb) {
        return REFUSED;
    }
    if is_limited(headers, control, now_ns) { LIMITED } else { ADMITTED }
}

/// Whether the source is no host's address: unspecified, loopback, multicast, reserved, or IPv4 in IPv6.
#[inline(always)]
fn is_martian(headers: &Headers) -> bool {
    let [high, _] = headers.source.words();
    if headers.is_ipv6 {
        // ::/64 has ::, ::1 and ::ffff:0:0/96.
        return high == 0 || high.to_be() >> 56 == 0xff;
    }
    let [a, ..] = low_ipv4(headers.source);
    a == 0 || a == 127 || a >= 224
}

#[inline(always)]
fn low_ipv4(address: Address) -> [u8; 4] {
    let [_, low] = address.words();
    let [_, _, _, _, octets @ ..] = low.to_ne_bytes();
    octets
}

/// Takes a query off the client's account, by the generic cell rate algorithm (ITU-T I.371): its one
/// number is when the account will be full again. Of two queries at once one may be free.
#[inline(always)]
fn is_limited(headers: &Headers, control: ControlPtr, now_ns: u64) -> bool {
    let (interval_ns, burst_ns, seed) = control.limits();
    if interval_ns == 0 {
        return false;
    }
    // An IPv4 address, or an IPv6 /64.
    let [high, low] = headers.source.words();
    let key = if headers.is_ipv6 { high } else { low };
    // SplitMix64's finalizer (Steele, Lea, Flood 2014).
    let mut hash = key ^ seed;
    hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let Some(account) = maps::account((hash >> 32) as u32) else { return false };
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    unsafe {
        let full_at_ns = account.read_volatile().max(now_ns);
        if full_at_ns - now_ns > burst_ns {
            return true;
        }
        account.write_volatile(full_at_ns + interval_ns);
    }
    false
}
