//! What the daemon has set: the networks, the source addresses, the timeouts, and until when flows may begin.

use core::hint::black_box;
use lb_common::{
    Address, ControlWords as _, EDGE_HEARTBEAT_NS, FlowState, MAX_EDGE_NETWORKS, MAX_EDGE_SOURCES,
    N_FLOW_STATES,
};

use crate::maps::EDGE_CONTROL;
use crate::tables;

macro_rules! control_word {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the daemon
    // writes it.
    ($control:ident . $($field:tt)+) => {
        unsafe { (&raw const (*$control).$($field)+).read_volatile() }
    };
}

/// Whose packet one may be, by where it goes to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// No flow's.
    None,
    /// A client's, to a VIP.
    Vip,
    /// A backend's, to a source address.
    Source,
}

/// Whose packet it may be that goes to this address, as it lies in memory.
#[inline(always)]
pub fn side4(address: u32) -> Side {
    let Some(control) = EDGE_CONTROL.get_ptr(0) else { return Side::None };
    let mut idx = 0;
    while idx < MAX_EDGE_NETWORKS {
        let [network, mask] = control_word!(control.settings.networks[idx]);
        if address & mask == network {
            return Side::Vip;
        }
        idx += 1;
    }
    let mut idx = 0;
    while idx < MAX_EDGE_SOURCES {
        if address == control_word!(control.settings.sources[idx]) {
            return Side::Source;
        }
        idx += 1;
    }
    Side::None
}

/// The same of an IPv6 address, by its halves.
#[inline(always)]
pub fn side6(high: u64, low: u64) -> Side {
    let Some(control) = EDGE_CONTROL.get_ptr(0) else { return Side::None };
    let mut idx = 0;
    while idx < MAX_EDGE_NETWORKS {
        let [network, mask] = control_word!(control.settings.networks6[idx]);
        if high & mask == network {
            return Side::Vip;
        }
        idx += 1;
    }
    let mut idx = 0;
    while idx < MAX_EDGE_SOURCES {
        if [high, low] == control_word!(control.settings.sources6[idx]).words() {
            return Side::Source;
        }
        idx += 1;
    }
    Side::None
}

/// The same of an address of either family.
#[inline(always)]
pub fn side(address: &Address, is_ipv6: bool) -> Side {
    if is_ipv6 {
        let [high, low] = address.words();
        side6(high, low)
    } else {
        side4(address.v4_word())
    }
}

/// Whether flows may begin: not while connections are only counted, nor after a daemon of another version has
/// run that doesn't keep the frontends.
#[inline(always)]
pub fn may_begin() -> bool {
    let (Some(daemon), Some(control)) = (tables::control(), EDGE_CONTROL.get_ptr(0)) else {
        return false;
    };
    // A daemon that stops takes its heartbeat back, not when its table was right.
    let last_ns = daemon.heartbeat_ns().max(daemon.table_ns());
    let kept_ns = control_word!(control.settings.heartbeat_ns);
    !daemon.is_shadow() && last_ns < kept_ns.saturating_add(EDGE_HEARTBEAT_NS)
}

/// Whether flows go to backends on this host.
#[inline(always)]
pub fn has_local() -> bool {
    EDGE_CONTROL.get_ptr(0).is_some_and(|control| control_word!(control.has_local) != 0)
}

/// See [`has_local`].
#[inline(always)]
pub fn set_local() {
    if let Some(control) = EDGE_CONTROL.get_ptr_mut(0) {
        // SAFETY: an array's element stays, and this is an aligned word of it, which is only ever set to 1.
        unsafe { (&raw mut (*control).has_local).write_volatile(1) };
    }
}

/// The number of records.
#[inline(always)]
pub fn n_records() -> u32 {
    EDGE_CONTROL.get_ptr(0).map_or(0, |control| control_word!(control.settings.n_records))
}

/// See [`EdgeSettings::seed`](lb_common::EdgeSettings::seed).
#[inline(always)]
pub fn seed() -> u32 {
    EDGE_CONTROL.get_ptr(0).map_or(0, |control| control_word!(control.settings.seed))
}

/// After how long without a packet a flow of this state ends, in milliseconds.
#[inline(always)]
pub fn timeout_ms(state: FlowState) -> u32 {
    let state = state as usize & (N_FLOW_STATES - 1);
    EDGE_CONTROL
        .get_ptr(0)
        .map_or(u32::MAX, |control| control_word!(control.settings.timeouts_ms[state]))
}

/// A source address.
pub enum Source {
    /// As it lies in memory.
    V4(u32),
    /// Where it is.
    V6(*const Address),
}

/// The nth source address of a family.
#[inline(always)]
pub fn source(is_ipv6: bool, nth: u32) -> Option<Source> {
    let control = EDGE_CONTROL.get_ptr(0)?;
    // The compiler may know that the mask changes nothing, but the verifier doesn't.
    let nth = (black_box(nth) & (MAX_EDGE_SOURCES as u32 - 1)) as usize;
    Some(match is_ipv6 {
        // SAFETY: an array's element stays, and the index is within the field.
        true => Source::V6(unsafe { &raw const (*control).settings.sources6[nth] }),
        false => Source::V4(control_word!(control.settings.sources[nth])),
    })
}

/// How many source addresses of a family there are.
#[inline(always)]
pub fn n_sources(is_ipv6: bool) -> u32 {
    let Some(control) = EDGE_CONTROL.get_ptr(0) else { return 0 };
    if is_ipv6 {
        control_word!(control.settings.n_sources6)
    } else {
        control_word!(control.settings.n_sources)
    }
}
