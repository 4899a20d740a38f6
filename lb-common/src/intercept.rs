//! DNS queries that the unit `intercept` sends to nohop's own DNS server: which, and whose answers
//! their replies pass for.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Address;

/// The port whose connections and datagrams are intercepted.
pub const DNS_PORT: u16 = 53;
/// How long queries are intercepted after a heartbeat of the daemon, in nanoseconds.
pub const INTERCEPT_NS: u64 = 2_000_000_000;
/// The number of cgroups of resolvers, whose queries aren't intercepted.
pub const MAX_RESOLVERS: usize = 1_024;
/// The number of network namespaces that can be left out.
pub const MAX_UNREACHED: usize = 1_024;
/// The number of other ports that are known as those of resolvers which the daemon forwards to.
pub const MAX_UPSTREAM_PORTS: usize = 64;

/// The queries of a socket that may still be answered, of each address family.
const N_PENDING: usize = 4;
/// How long a query counts as one that may be answered while there is a later one, in nanoseconds.
/// Resolvers wait for longer before they ask the next server (glibc and dnspython 5 s and 2 s, musl
/// 2.5 s), so that a query that was lost is out of the way of the next one's reply.
const PENDING_NS: u64 = 1_000_000_000;

/// The value of `INTERCEPT_CONTROL`: what the daemon writes for the unit. All zero: nothing is
/// intercepted.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct InterceptControl {
    /// Until when queries are intercepted, in nanoseconds of CLOCK_MONOTONIC; 0 for not at all. The
    /// daemon moves it ahead, so that it ends by itself where the daemon hangs.
    pub until_ns: u64,
    /// Where queries from the host's network namespace go.
    pub on_host: DnsServers,
    /// Where queries from other network namespaces go.
    pub elsewhere: DnsServers,
}

/// The key of `INTERCEPT_RESOLVERS`: who has a DNS server, and whose queries aren't intercepted
/// therefore. The value is when that was found, in nanoseconds of CLOCK_MONOTONIC.
///
/// On the host and elsewhere apart, as one cgroup may do both: docker-proxy, which is in that of
/// Docker's daemon, has ports of the host that lead to a container's; the daemon itself asks for
/// containers in their network namespaces.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, Immutable, IntoBytes)]
pub struct ResolverCgroup {
    /// The cgroup's id.
    pub cgroup_id: u64,
    /// 1 for what is in the host's network namespace, 0 for what is in another one.
    pub is_host: u64,
}

/// Where queries go, by the family of the address that is asked.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct DnsServers {
    /// Of IPv4.
    pub ipv4: DnsServer,
    /// Of IPv6.
    pub ipv6: DnsServer,
}

/// An address at which the daemon answers. Port 0: there is none.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, FromBytes, Immutable, IntoBytes)]
pub struct DnsServer {
    /// The address.
    pub address: Address,
    /// The port.
    pub port: u16,
    /// Zero.
    pub padding: [u8; 6],
}

impl DnsServer {
    /// A server at this address.
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> DnsServer {
        DnsServer { address, port, padding: [0; 6] }
    }
}

// By words: a comparison of octets would be a loop, or a call of memcmp.
impl PartialEq for DnsServer {
    #[inline(always)]
    fn eq(&self, other: &DnsServer) -> bool {
        self.address == other.address && self.port == other.port
    }
}

impl Eq for DnsServer {}

/// What is decided on a query. The discriminant is the index of its counter in `INTERCEPT_COUNTERS`.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interception {
    /// It is sent to nohop.
    Sent = 0,
    /// The daemon doesn't run, or doesn't listen.
    NoDaemon = 1,
    /// It is the daemon's own.
    Own = 2,
    /// The process is in a cgroup of `datapath.exclude_cgroups`, or in one that has a DNS server.
    Excluded = 3,
    /// It goes to a loopback address of a network namespace other than the host's, such as that of
    /// Docker's DNS server, which knows names that no other server knows.
    Local = 4,
    /// nohop listens at no address that the socket reaches, or gets no queries from its network namespace.
    Unreachable = 5,
    /// There is no memory for what the socket has to remember.
    NoMemory = 6,
}

impl Interception {
    /// All of them, in the order of their numbers.
    pub const ALL: [Interception; 7] = [
        Interception::Sent,
        Interception::NoDaemon,
        Interception::Own,
        Interception::Excluded,
        Interception::Local,
        Interception::Unreachable,
        Interception::NoMemory,
    ];

    /// Its name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Interception::Sent => "intercepted",
            Interception::NoDaemon => "no_daemon",
            Interception::Own => "own",
            Interception::Excluded => "excluded",
            Interception::Local => "local",
            Interception::Unreachable => "unreachable",
            Interception::NoMemory => "no_memory",
        }
    }
}

/// Whether a query to `address` stays in the network namespace of its socket: loopback addresses, and
/// the unspecified one, which stands for loopback in connect() and sendto().
#[inline(always)]
pub fn is_loopback(address: &Address) -> bool {
    let [high, low] = address.words();
    match address.to_v4() {
        Some([first, ..]) => first == 127 || first == 0,
        None => high == 0 && (low == 0 || low == 1u64.to_be()),
    }
}

/// Whether an address, as a socket is bound to it, receives from its own network namespace alone.
#[inline(always)]
pub fn is_bound_to_loopback(address: &Address) -> bool {
    match address.to_v4() {
        Some([first, ..]) => first == 127,
        None => address.words() == [0, 1u64.to_be()],
    }
}

/// Whether an address is of no single server: multicast and what is reserved.
#[inline(always)]
pub fn is_multicast(address: &Address) -> bool {
    match address.to_v4() {
        Some([first, ..]) => first >= 224,
        None => address.octets[0] == 0xff,
    }
}

/// The value of `SK_INTERCEPT`: what a socket remembers of the queries that were sent to nohop. All zero:
/// of none.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct InterceptedSocket {
    /// Of those that went to nohop by IPv4.
    pub ipv4: Asked,
    /// Of those by IPv6.
    pub ipv6: Asked,
}

/// The addresses that a socket has asked, while one address of nohop's answers for them.
///
/// A program sees no more of a reply than where it comes from. So replies pass for those of the
/// addresses that were asked in the order in which they were; that is what they come in, mostly. A
/// resolver that asks several servers by one socket (musl) takes the reply of any.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct Asked {
    /// Where the queries went. Port 0: nowhere.
    pub server: DnsServer,
    /// What the socket is connected to, as the application sees it, or whom the last reply came from.
    last: Address,
    /// Queries by sendto(), the first first.
    pending: [PendingQuery; N_PENDING],
    /// The number of them.
    n_pending: u64,
}

/// A query by sendto().
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
struct PendingQuery {
    asked: Address,
    /// In nanoseconds of CLOCK_MONOTONIC.
    at_ns: u64,
}

impl Asked {
    /// Whether `server` answers for what was asked.
    #[inline(always)]
    pub fn is_by(&self, server: &DnsServer) -> bool {
        server.port != 0 && *server == self.server
    }

    /// The socket connects `asked`, and is connected to `server`.
    #[inline(always)]
    pub fn connect(&mut self, asked: Address, server: DnsServer) {
        (self.server, self.last, self.n_pending) = (server, asked, 0);
    }

    /// A datagram to `asked` is sent to `server`.
    #[inline(always)]
    pub fn send(&mut self, asked: Address, server: DnsServer, now_ns: u64) {
        if self.server != server {
            (self.server, self.n_pending) = (server, 0);
        }
        if self.n_pending >= N_PENDING as u64 {
            self.shift();
        }
        let query = PendingQuery { asked, at_ns: now_ns };
        // By numbers that the verifier knows.
        for (idx, place) in self.pending.iter_mut().enumerate() {
            if idx as u64 == self.n_pending {
                *place = query;
            }
        }
        self.n_pending += 1;
    }

    /// Whom a reply passes for that comes now. `is_connected`: the socket is connected to the server.
    #[inline(always)]
    pub fn receive(&mut self, is_connected: bool, now_ns: u64) -> Address {
        for _ in 1..N_PENDING {
            let is_over = now_ns.saturating_sub(self.pending[0].at_ns) > PENDING_NS;
            if self.n_pending > 1 && is_over {
                self.shift();
            }
        }
        if self.n_pending == 0 {
            return self.last;
        }
        let asked = self.pending[0].asked;
        self.shift();
        if !is_connected {
            self.last = asked;
        }
        asked
    }

    /// What the application sees of the peer, where that is the server.
    #[inline(always)]
    pub fn peer(&self) -> Address {
        self.last
    }

    #[inline(always)]
    fn shift(&mut self) {
        for idx in 1..N_PENDING {
            self.pending[idx - 1] = self.pending[idx];
        }
        self.n_pending = self.n_pending.saturating_sub(1);
    }
}

const _: () = {
    assert!(size_of::<DnsServer>() == 24 && size_of::<InterceptControl>() == 104);
    assert!(offset_of!(InterceptControl, elsewhere) == 56);
    assert!(size_of::<InterceptedSocket>() == 288);
};

#[cfg(test)]
mod tests {
    use core::net::IpAddr;
    use std::vec;
    use std::vec::Vec;

    use super::*;

    fn address(text: &str) -> Address {
        match text.parse().unwrap() {
            IpAddr::V4(ip) => Address::v4(ip.octets()),
            IpAddr::V6(ip) => Address { octets: ip.octets() },
        }
    }

    #[test]
    fn what_stays_in_a_namespace() {
        for local in ["127.0.0.11", "127.0.0.1", "0.0.0.0", "::1", "::"] {
            assert!(is_loopback(&address(local)), "{local}");
        }
        for other in ["10.0.0.1", "128.0.0.1", "::2", "fe80::1", "1::1"] {
            assert!(!is_loopback(&address(other)), "{other}");
        }
        for (bound, expected) in
            [("127.0.0.11", true), ("::1", true), ("0.0.0.0", false), ("::", false), ("::2", false)]
        {
            assert_eq!(is_bound_to_loopback(&address(bound)), expected, "{bound}");
        }
        for (text, expected) in
            [("224.0.0.251", true), ("255.255.255.255", true), ("ff02::fb", true)]
                .into_iter()
                .chain([("223.255.255.255", false), ("fe80::1", false)])
        {
            assert_eq!(is_multicast(&address(text)), expected, "{text}");
        }
    }

    #[test]
    fn counters_are_numbered() {
        for (number, of) in Interception::ALL.into_iter().enumerate() {
            assert_eq!(of as usize, number);
        }
    }

    const MS: u64 = 1_000_000;

    /// What happens at which millisecond, and whom each reply passes for.
    enum Step {
        Connect(char),
        Send(char),
        Reply(char),
    }
    use Step::*;

    #[test]
    fn replies_pass_for_those_of_the_asked() {
        let letter = |letter: char| Address::v4([10, 0, 0, letter as u8]);
        let server = DnsServer::new(Address::v4([127, 0, 0, 1]), 53);
        let table: Vec<(&str, Vec<(u64, Step)>)> = vec![
            (
                "one after the other",
                vec![(0, Send('a')), (1, Reply('a')), (2, Send('b')), (3, Reply('b'))],
            ),
            (
                "both at once",
                vec![(0, Send('a')), (0, Send('b')), (1, Reply('a')), (1, Reply('b'))],
            ),
            (
                "each asked twice, as for A and AAAA",
                [Send('a'), Send('a'), Send('b'), Send('b')]
                    .into_iter()
                    .chain([Reply('a'), Reply('a'), Reply('b'), Reply('b')])
                    .map(|step| (0, step))
                    .collect(),
            ),
            (
                "the first got no reply, and the next server is asked",
                vec![(0, Send('a')), (2_000, Send('b')), (2_001, Reply('b')), (2_002, Reply('b'))],
            ),
            (
                "a slow reply to the only query",
                vec![(0, Send('a')), (4_000, Reply('a')), (5_000, Send('b')), (9_000, Reply('b'))],
            ),
            (
                "more than are kept",
                "abcdef"
                    .chars()
                    .map(Send)
                    .chain("cdef".chars().map(Reply))
                    .map(|step| (0, step))
                    .collect(),
            ),
            ("a connection", vec![(0, Connect('a')), (1, Reply('a')), (2, Reply('a'))]),
            (
                "a connection that names another once",
                vec![(0, Connect('a')), (1, Send('b')), (2, Reply('b')), (3, Reply('a'))],
            ),
            (
                "connected again",
                vec![(0, Connect('a')), (1, Send('b')), (2, Connect('c')), (3, Reply('c'))],
            ),
        ];
        for (what, steps) in table {
            let (mut asked, mut is_connected) = (Asked::default(), false);
            for (at_ms, step) in steps {
                match step {
                    Connect(name) => {
                        is_connected = true;
                        asked.connect(letter(name), server);
                    }
                    Send(name) => asked.send(letter(name), server, at_ms * MS),
                    Reply(name) => {
                        assert!(asked.is_by(&server));
                        let shown = asked.receive(is_connected, at_ms * MS);
                        assert_eq!(shown, letter(name), "{what}, at {at_ms}");
                    }
                }
            }
        }
    }

    #[test]
    fn nothing_is_by_no_server() {
        let asked = Asked::default();
        assert!(!asked.is_by(&DnsServer::default()));
    }
}
