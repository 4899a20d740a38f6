//! What the programs report of each connection while a client traces, and the switch for that.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;

/// Whether connections are traced, and which, within [`Control`](crate::Control). All zero: none.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct TraceSwitch {
    /// Until when, in nanoseconds of CLOCK_MONOTONIC; 0 while nothing is traced. A daemon with clients
    /// moves it ahead, so that it ends by itself where the daemon dies.
    pub until_ns: u64,
    /// The greatest hash of a socket that is traced, see [`is_sampled`].
    pub max_hash: u32,
    /// Zero.
    pub padding: u32,
}

/// Whether a socket is among those whose hash isn't above `max_hash`: a choice that is the same for
/// all events of a connection. `u32::MAX / N` chooses one of N. Cookies are sequential numbers, so
/// their products with the golden ratio are spread evenly (Knuth's multiplicative hash).
#[inline(always)]
pub const fn is_sampled(cookie: u64, max_hash: u32) -> bool {
    let hash = (cookie.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32;
    hash <= max_hash
}

/// What a program sends to the daemon through its map `TRACE`.
///
/// A connection to a VIP has one of [`TraceKind::Sent`] or [`TraceKind::Refused`], with all fields but
/// the last two, and after the former one of the other kinds, which have the cookie, the time and
/// those two alone.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct TraceEvent {
    /// The socket, by its cookie.
    pub cookie: u64,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// The id of the process's cgroup.
    pub cgroup_id: u64,
    /// What the application connects to.
    pub frontend: Address,
    /// Where the connection goes; unspecified where it is refused.
    pub backend: Address,
    /// The frontend's port.
    pub frontend_port: u16,
    /// The backend's port.
    pub backend_port: u16,
    /// The protocol number.
    pub protocol: u8,
    /// A [`TraceKind`].
    pub kind: u8,
    /// Of one that is refused a [`RefusalReason`], of one that is sent the number of a
    /// [`ChoiceReason`](crate::ChoiceReason), of a DNS query that of an
    /// [`Interception`](crate::Interception).
    pub reason: u8,
    /// Zero.
    pub padding: u8,
    /// The index into `SERVICES`; `u32::MAX` where there is none.
    pub service: u32,
    /// The process id, as the kernel sees it.
    pub pid: u32,
    /// The name of the process (`comm`), filled up with zeros.
    pub comm: [u8; 16],
    /// Of one that was established the time that took in microseconds; 0 where it isn't known.
    pub connect_us: u32,
    /// Of one that failed the error's number; 0 where it isn't known.
    pub error: u32,
}

/// What the unit `edge` sends to the daemon through its map `TRACE`: a flow begins, is refused or ends.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FlowEvent {
    /// The flow's [`flow_cookie`].
    pub cookie: u64,
    /// When, in nanoseconds of CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// The packets of both directions until then.
    pub packets: u64,
    /// Their bytes, from the IP header on.
    pub bytes: u64,
    /// The client.
    pub client: Address,
    /// What it sends to.
    pub vip: Address,
    /// Where its packets go; unspecified where it is refused, as the source.
    pub backend: Address,
    /// From where they go there.
    pub source: Address,
    /// The client's port.
    pub client_port: u16,
    /// The VIP's.
    pub vip_port: u16,
    /// The backend's.
    pub backend_port: u16,
    /// That of the source address.
    pub source_port: u16,
    /// The index into `SERVICES`; `u32::MAX` where there is none.
    pub service: u32,
    /// The protocol number.
    pub protocol: u8,
    /// A [`FlowEventKind`].
    pub kind: u8,
    /// Of a flow that begins the number of a [`ChoiceReason`](crate::ChoiceReason), of one that is refused that
    /// of an [`EdgeCounter`](crate::EdgeCounter), of one that ends a [`FlowEnd`].
    pub reason: u8,
    /// A [`FlowState`](crate::FlowState).
    pub state: u8,
}

/// What happened to a flow.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEventKind {
    /// Its first packet was sent on.
    Begun = 1,
    /// Its first packet was dropped, or answered by the edge.
    Refused = 2,
    /// It is over.
    Ended = 3,
}

/// Why a flow is over.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEnd {
    /// Both sides closed it.
    Closed = 1,
    /// The client reset it.
    ClientReset = 2,
    /// The backend did.
    BackendReset = 3,
    /// The backend refused the client's SYN.
    Refused = 4,
    /// Its timeout.
    Timeout = 5,
    /// Another flow needed its record.
    Taken = 6,
    /// Another flow of the same client's port replaced it: the client connects again, or its backend has left.
    Replaced = 7,
}

impl FlowEnd {
    /// As `nohop trace` shows it.
    pub const fn name(number: u8) -> &'static str {
        match number {
            1 => "closed",
            2 => "reset by the client",
            3 => "reset by the backend",
            4 => "refused by the backend",
            5 => "timed out",
            6 => "its place was needed",
            7 => "replaced by a new flow",
            _ => "unknown",
        }
    }
}

/// By what a flow is sampled ([`is_sampled`]): the same for all events of it.
#[inline(always)]
pub fn flow_cookie(client: &Address, client_port: u16, vip_port: u16) -> u64 {
    let [high, low] = client.words();
    high ^ low ^ (client_port as u64) << 16 ^ vip_port as u64
}

/// What became of a connection.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceKind {
    /// It was sent to a backend.
    Sent = 1,
    /// It was refused by the program.
    Refused = 2,
    /// It is established.
    Established = 3,
    /// It ended by an error before it was established.
    Failed = 4,
    /// It ended without one: the client gave up.
    Aborted = 5,
    /// No connection to a VIP, but a DNS query that may be intercepted: from the process, to what it asks
    /// (`frontend`), to nohop's address (`backend`; port 0 for none). The reason is the number of an
    /// [`Interception`](crate::Interception), which decides whether it goes there.
    Intercepted = 6,
}

/// Why a program refused a connection.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalReason {
    /// No service has this address and port.
    NoFrontend = 1,
    /// The service has no backend.
    NoBackend = 2,
    /// It has none of an address family that the socket reaches.
    Family = 3,
    /// It leads to a backend that isn't there.
    Inconsistent = 4,
}

const _: () = {
    assert!(size_of::<TraceSwitch>() == 16);
    assert!(size_of::<FlowEvent>() == 112);
    assert!(size_of::<TraceEvent>() == 96 && offset_of!(TraceEvent, comm) == 72);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_n_is_sampled_whatever_the_cookies_step() {
        for (n, step) in [(1, 1), (10, 1), (10, 4_096), (1_000, 7)] {
            let n_sampled =
                (0..100_000).filter(|cookie| is_sampled(cookie * step + 1, u32::MAX / n)).count();
            let expected = 100_000 / n as usize;
            assert!(n_sampled.abs_diff(expected) <= expected / 20, "{n_sampled} of {expected}");
        }
    }
}
