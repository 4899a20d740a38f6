//! How often first packets may have flows end that may matter still.

use lb_common::N_EDGE_ACCOUNTS;

use crate::{maps, settings};

/// How many accounts each kind has.
const N_EACH: u32 = N_EDGE_ACCOUNTS / 2;

/// First packets a second that may take the record of a connection that isn't established, or of UDP: from a
/// network (IPv4 /24, IPv6 /48), and for a VIP. In nanoseconds between them.
const NETWORK_NS: u64 = 1_000_000_000 / 100;
const VIP_NS: u64 = 1_000_000_000 / 20_000;

/// Whether more first packets come from a packet's network, or to its VIP, than may take the records of
/// connections that aren't established. By the generic cell rate algorithm (ITU-T I.371), for up to a second's worth
/// at once.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn nohop_edge_is_flooded() -> u64 {
    let Some(scratch) = maps::scratch() else { return 1 };
    let packet = &scratch.packet;
    let [high, low] = packet.source.words();
    let network = match packet.is_ipv6 {
        0 => u64::from_be(low) >> 8,
        _ => u64::from_be(high) >> 16,
    };
    let [high, low] = packet.destination.words();
    let vip = high ^ low ^ u64::from(packet.destination_port) << 48 ^ 1;
    let now_ns = maps::now_ns();
    let is_over = take(network, 0, NETWORK_NS, now_ns) || take(vip, N_EACH, VIP_NS, now_ns);
    is_over.into()
}

/// Takes one off an account, among those from the first one on; returns whether there is none left.
#[inline(always)]
fn take(key: u64, first: u32, interval_ns: u64, now_ns: u64) -> bool {
    let seed = u64::from(settings::seed());
    let key = key ^ (seed << 32 | seed);
    // SplitMix64's finalizer (Steele, Lea, Flood 2014).
    let mut hash = (key ^ key >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    let Some(account) = maps::account(first + (hash >> 32) as u32 % N_EACH) else { return true };
    // SAFETY: the pointer is to an aligned word of an array's element, which stays.
    unsafe {
        let full_at_ns = account.read_volatile().max(now_ns);
        if full_at_ns - now_ns > 1_000_000_000 {
            return true;
        }
        account.write_volatile(full_at_ns + interval_ns);
    }
    false
}
