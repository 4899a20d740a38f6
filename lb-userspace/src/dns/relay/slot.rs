//! What the relay keeps of each pending question, and of each query that was sent for it.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use hickory_proto::op::ResponseCode;

use crate::dns::acl::ClientKey;
use crate::dns::encode::{self, OUR_PAYLOAD};
use crate::dns::message::{ClientQuery, HEADER_LEN};
use crate::dns::udp::LocalAddress;
use crate::dns::upstreams::UpstreamRoute;

/// The id of a socket in the pool, which is connected to one upstream.
pub(in crate::dns) type SocketId = u32;

/// A client that waits for a response.
#[derive(Clone, Debug)]
pub(in crate::dns) struct Waiter {
    pub(in crate::dns) client: SocketAddr,
    /// The local address that it queried.
    pub(in crate::dns) to: LocalAddress,
    /// The id of its message.
    pub(in crate::dns) id: u16,
    pub(in crate::dns) client_key: ClientKey,
    /// The longest response that it takes.
    pub(in crate::dns) max_len: u16,
    /// Whether the name may be a service: then an upstream's NXDOMAIN doesn't apply.
    pub(in crate::dns) is_unknown: bool,
    /// Its question if it differs in case from that of the upstream query.
    pub(super) question: Option<Box<[u8]>>,
    pub(super) since: Instant,
    /// When its message was received, perhaps long before it was to be forwarded.
    pub(in crate::dns) arrived: Instant,
}

impl Waiter {
    /// The client at `client`, which asked `query`.
    pub(in crate::dns) fn new(
        client: SocketAddr,
        to: LocalAddress,
        client_key: ClientKey,
        query: &ClientQuery<'_>,
        now: Instant,
    ) -> Waiter {
        let max_len = query.max_payload().min(OUR_PAYLOAD);
        let (id, is_unknown, question) = (query.id(), false, None);
        let (since, arrived) = (now, now);
        Waiter { client, to, id, client_key, max_len, is_unknown, question, since, arrived }
    }
}

/// A query that was sent and has no response yet.
#[derive(Debug)]
pub(super) struct InFlightQuery {
    pub(super) slot: u32,
    pub(super) generation: u32,
    pub(super) route: Arc<UpstreamRoute>,
    pub(super) rank: u8,
    pub(super) sent: Instant,
}

/// A query of a pending question.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    pub(super) rank: u8,
    pub(super) key: FlightKey,
    pub(super) sent: Instant,
    pub(super) is_waiting: bool,
}

/// The response that waiters get unless a better one comes.
#[derive(Debug)]
pub(super) struct FallbackAnswer {
    pub(super) rank: u8,
    pub(super) bytes: Box<[u8]>,
    /// Whether it denies the name; otherwise the upstream failed.
    pub(super) is_negative: bool,
}

/// A pending question. Its buffers are reused.
#[derive(Debug)]
pub(super) struct Slot {
    /// Changes when the question ends.
    pub(super) generation: u32,
    /// [`ClientQuery::forwarded_flags`].
    pub(super) flags: u8,
    pub(super) hash: u64,
    pub(super) message: Vec<u8>,
    pub(super) question_len: usize,
    pub(super) route: Option<Arc<UpstreamRoute>>,
    /// Indices of the route's upstreams, in the order of this round.
    pub(super) order: Vec<u8>,
    pub(super) next: usize,
    pub(super) round: u8,
    pub(super) round_began: Instant,
    /// When [`super::Relay::expire`] handles it next within the round.
    pub(super) next_hedge: Instant,
    pub(super) attempts: Vec<Attempt>,
    pub(super) fallback: Option<FallbackAnswer>,
    pub(super) waiters: Vec<Waiter>,
    pub(super) n_moves: u8,
}

/// A socket and the id of a query on it.
pub(super) type FlightKey = u64;

/// A slot by its index, and the generation that it is of.
pub(super) type SlotRef = (u32, u32);

/// A hasher for keys that are random themselves.
#[derive(Debug, Default)]
pub(super) struct FibonacciHasher(u64);

impl Hasher for FibonacciHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, number: u64) {
        // Fibonacci hashing: the golden ratio spreads the lower bits into the upper ones.
        self.0 = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

pub(super) type NumberMap<T> = HashMap<u64, T, BuildHasherDefault<FibonacciHasher>>;

impl Slot {
    /// An empty slot.
    pub(super) fn new(now: Instant) -> Slot {
        Slot {
            generation: 0,
            flags: 0,
            hash: 0,
            message: Vec::new(),
            question_len: 0,
            route: None,
            order: Vec::new(),
            next: 0,
            round: 0,
            round_began: now,
            next_hedge: now,
            attempts: Vec::new(),
            fallback: None,
            waiters: Vec::new(),
            n_moves: 0,
        }
    }

    /// Writes a response without records, truncated where it exceeds `max_len`.
    pub(super) fn error(
        &self,
        waiter: &Waiter,
        code: ResponseCode,
        max_len: usize,
        out: &mut Vec<u8>,
    ) {
        let mut message = self.message.clone();
        message[..2].copy_from_slice(&waiter.id.to_be_bytes());
        if let Some(theirs) = &waiter.question {
            message[HEADER_LEN..HEADER_LEN + self.question_len].copy_from_slice(theirs);
        }
        out.clear();
        if let Ok(query) = ClientQuery::read(&message) {
            encode::error(out, &query, code, max_len);
        }
    }
}

/// The key of a query.
pub(super) fn flight_key(socket: SocketId, id: u16) -> FlightKey {
    u64::from(socket) << 16 | u64::from(id)
}

/// The socket of a query.
pub(super) fn socket_of(key: FlightKey) -> SocketId {
    (key >> 16) as SocketId
}
