//! DNS answers about routed names, as the unit `names` gives them in the kernel: how a query is read,
//! and the answer to it.
//!
//! The answers are those of the daemon (`lb-userspace/src/dns/resolve.rs`), byte for byte. What isn't
//! common passes to it: several questions, names below a service, compression, options that make the
//! message long. A message is read and written in words of eight bytes, where it is, and never beyond its
//! end: there are no loops over bytes.
//!
//! Messages: RFC 1035, section 4. EDNS: RFC 6891. Negative answers: RFC 2308.

mod index;

use core::hint::black_box;

pub use index::NameIndexKey;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The length of a message's header, where the question begins.
pub const DNS_HEADER_LEN: u32 = 12;
/// The longest domain that the unit serves: on the wire, the root's length included.
pub const MAX_DOMAIN_LEN: usize = 63;
/// The longest part after the question that a query may have. It is an OPT record with its options.
const MAX_QUERY_TAIL: u32 = 64;
/// The longest query that is answered. No answer is longer.
pub const MAX_QUERY_LEN: u32 = DNS_HEADER_LEN + 1 + 63 + MAX_DOMAIN_LEN as u32 + 4 + MAX_QUERY_TAIL;
/// The size of UDP messages that answers advertise, in bytes: that of the DNS flag day of 2020.
pub const DNS_PAYLOAD: u16 = 1232;
/// How long negative answers may be cached, in seconds: short, so that a service that was queried too
/// early is found soon after it appears.
pub const NEGATIVE_TTL: u32 = 5;

/// Types of records (RFC 1035, 2782, 3596, 6891) and what stands for several (RFC 8482, 5936, 1995).
mod record_type {
    pub(super) const A: u16 = 1;
    pub(super) const SOA: u16 = 6;
    pub(super) const AAAA: u16 = 28;
    pub(super) const SRV: u16 = 33;
    pub(super) const OPT: u16 = 41;
    pub(super) const IXFR: u16 = 251;
    pub(super) const AXFR: u16 = 252;
    pub(super) const ANY: u16 = 255;
}

/// The name, below the domain, by whose answer the daemon proves that answers arrive.
pub const PROBE_LABEL: &[u8] = b"_nohop-probe";
/// The address that it has: one for documentation (RFC 5737).
pub const PROBE_ADDRESS: [u8; 4] = [192, 0, 2, 53];

/// The class of the internet.
const CLASS_IN: u16 = 1;

/// In a header's flags: the message is a response; its opcode; the answer is authoritative; recursion is
/// desired, is available; checking is disabled.
const QR: u16 = 0x8000;
const OPCODE: u16 = 0x7800;
const AA: u16 = 0x0400;
const RD: u16 = 0x0100;
const RA: u16 = 0x0080;
const CD: u16 = 0x0010;
/// The response code of a server that failed.
const SERVFAIL: u16 = 2;

/// An OPT record without options.
const OPT_LEN: u32 = 11;
/// In its flags: the client takes records of DNSSEC (RFC 3225).
const DO: u16 = 0x8000;
/// The lengths of records whose owner is a pointer. Before the data are owner, type, class, time to live
/// and length: 12 bytes.
const A_LEN: u32 = 12 + 4;
const AAAA_LEN: u32 = 12 + 16;
const SOA_LEN: u32 = 12 + 2 + 16 + 20;
/// A pointer into the message (RFC 1035, section 4.1.4).
const POINTER: u16 = 0xc000;
/// The responsible mailbox in SOA: none (RFC 6303, section 3).
const NO_MAILBOX: u128 = u128::from_be_bytes(*b"\x06nobody\x07invalid\0");
/// The refresh, retry and expiry times in SOA, in seconds. There are no secondary servers.
const SOA_TIMES: [u32; 3] = [3600, 1200, 604_800];

/// The key of `NAMES`: a label in lower case after its length, filled up with zeros.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, Immutable, IntoBytes)]
pub struct NameKey {
    /// The length, 1..=63, and the label.
    pub octets: [u8; 64],
}

impl NameKey {
    /// The key for a label in any case; `None` where it is empty or longer than 63 bytes.
    pub fn of(label: &[u8]) -> Option<NameKey> {
        let mut octets = [0; 64];
        octets[0] = u8::try_from(label.len()).ok().filter(|len| (1..64).contains(len))?;
        octets.get_mut(1..=label.len())?.copy_from_slice(label);
        octets.make_ascii_lowercase();
        Some(NameKey { octets })
    }

    #[inline(always)]
    fn set_word(&mut self, idx: usize, word: u64) {
        let words: &mut [u64; 8] = zerocopy::transmute_mut!(self);
        words[idx] = word;
    }
}

/// The names that are ours, and how they are answered.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct NamesZone {
    /// The domain on the wire in lower case, the root's length included, filled up with zeros.
    pub domain: [u8; 64],
    /// The length of the domain on the wire: 3..=[`MAX_DOMAIN_LEN`].
    pub domain_len: u32,
    /// The time to live of addresses, in seconds.
    pub ttl: u32,
    /// The serial number in SOA: the low half of the table's generation.
    pub serial: u32,
    /// Zero.
    pub padding: u32,
}

/// The value of `NAMES`: where a name's record is. One word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct NameRef {
    /// The index into `NAME_RECORDS`, which is that of the service.
    pub record: u32,
    /// Zero.
    pub padding: u32,
}

/// The value of `NAME_RECORDS`: how a name is answered, in one cache line.
///
/// The addresses are written before anything leads to the record, and never again while a reader may
/// know it, but for `flags`, which is part of a word of its own with the VIP.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct NameRecord {
    /// The VIP.
    pub vip: [u8; 4],
    /// [`NameRecord::COLD`] and [`NameRecord::HAS_VIP6`].
    pub flags: u32,
    /// The IPv6 VIP.
    pub vip6: [u8; 16],
    /// Queries that the program answered. It only grows, until the record is another name's.
    pub queries: u64,
    /// When it answered the last one, in nanoseconds of CLOCK_MONOTONIC.
    pub last_query_ns: u64,
    /// The [`NameKey::hash`] of the name, from when `NAMES` leads here until it doesn't any more: so that the index of
    /// names isn't trusted about others. An earlier version writes 0, for which `NAMES` is asked.
    pub check: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

impl NameRecord {
    /// The daemon doesn't follow the service's instances, and has to see a query about it.
    pub const COLD: u32 = 1;
    /// AAAA is answered with the IPv6 VIP.
    pub const HAS_VIP6: u32 = 2;
    /// It is [`PROBE_LABEL`]'s, which no service has: answered whenever the unit isn't off, and not counted.
    pub const PROBE: u32 = 4;
}

/// The value of `NAMES_CONTROL`: what the daemon writes for the unit. All zero: everything passes.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct NamesControl {
    /// See [`NamesZone`].
    pub zone: NamesZone,
    /// The number of a [`NamesMode`].
    pub mode: u32,
    /// 1 while a required hook was found detached: what isn't the daemon's to answer is SERVFAIL.
    pub is_detached: u32,
    /// Zero: an earlier version read a deadline here.
    pub unused: u64,
    /// The time in which a client regains a query, in nanoseconds; 0 where clients aren't limited.
    pub interval_ns: u64,
    /// How far ahead of the present a client's queries may be accounted, in nanoseconds.
    pub burst_ns: u64,
    /// What the hash of a client begins with, so that a client can't choose to share another's account.
    pub seed: u64,
    /// The last heartbeat of a daemon that keeps the names, in nanoseconds of CLOCK_MONOTONIC. One that
    /// is older than those in [`Control`](crate::Control) by [`NAMES_HEARTBEAT_NS`] is of an earlier
    /// daemon: an older version has run since, which doesn't keep them.
    pub heartbeat_ns: u64,
    /// The address families whose queries on `lo` pass because answers don't arrive there:
    /// [`NamesControl::IPV4`] and [`NamesControl::IPV6`].
    pub passed_on_loopback: u64,
    /// 1 while a daemon can answer from its table: not while it starts or stops. Until then the unit
    /// answers as if it were dead.
    pub is_ready: u64,
}

impl NamesControl {
    /// IPv4, in [`NamesControl::passed_on_loopback`].
    pub const IPV4: u64 = 1;
    /// IPv6.
    pub const IPV6: u64 = 2;
}

/// When the unit answers.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NamesMode {
    /// Never.
    #[default]
    Off = 0,
    /// Always.
    Always = 1,
    /// While the daemon is dead.
    Standby = 2,
}

/// The key of `NAMES_LISTEN`: an address at which the daemon answers.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, Immutable, IntoBytes)]
pub struct ListenKey {
    /// The address; IPv4 as `::ffff:a.b.c.d`.
    pub address: crate::Address,
    /// The port.
    pub port: u16,
    /// Zero.
    pub padding: [u8; 6],
}

impl ListenKey {
    /// The value of `NAMES_LISTEN` where a socket of the daemon's has the address.
    pub const BOUND: u32 = 1;
    /// The value where one of the unspecified address receives: another server's socket may have the
    /// address itself.
    pub const SHARED: u32 = 2;
}

/// The value of `NAMES_LISTEN_FIRST`: what spares most packets the look-up in `NAMES_LISTEN`.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct FirstListener {
    /// One of the addresses in `NAMES_LISTEN`, in two words.
    pub address: [u64; 2],
    /// The rest is one word. Its port.
    pub port: u16,
    /// Its value; 0 where there is none.
    pub how: u16,
    /// The port of all of them; 0 where they have several.
    pub common_port: u16,
    /// Zero.
    pub padding: u16,
}

/// The value of `NAMES_COUNTERS`: what the unit did. They only grow.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct NamesCounters {
    /// Answers by NOERROR.
    pub answered: u64,
    /// Answers by SERVFAIL.
    pub failed: u64,
    /// Queries that were dropped because the client sent too many.
    pub limited: u64,
    /// Answers that couldn't be written: the packet was dropped.
    pub broken: u64,
    /// Zero.
    pub reserved: [u64; 4],
}

/// How long the daemon counts as alive after a heartbeat, in nanoseconds.
pub const NAMES_HEARTBEAT_NS: u64 = 2_000_000_000;
/// The number of addresses at which the daemon may answer.
pub const MAX_LISTEN: usize = 256;
/// The number of accounts of clients, a bound on memory: clients share one where their hashes do.
pub const N_CLIENT_ACCOUNTS: usize = 4_096;
/// The number of networks whose clients are served.
pub const MAX_ALLOWED: usize = 1_024;

/// A message in memory, from the beginning of its header on.
pub trait DnsMessage {
    /// Eight bytes from `offset` on, 0..256, as they are in memory. Those of a word that isn't wholly
    /// within the message are arbitrary.
    fn word(&self, offset: u32) -> u64;
    /// Writes them. Does nothing if they aren't wholly within the message.
    fn set_word(&mut self, offset: u32, word: u64);
}

/// A message on the host.
#[cfg(not(target_arch = "bpf"))]
impl DnsMessage for [u8] {
    fn word(&self, offset: u32) -> u64 {
        let at = self.get(offset as usize..);
        at.and_then(<[u8]>::first_chunk).copied().map_or(0x5a5a, u64::from_ne_bytes)
    }

    fn set_word(&mut self, offset: u32, word: u64) {
        if let Some(at) = self.get_mut(offset as usize..).and_then(<[u8]>::first_chunk_mut) {
            *at = word.to_ne_bytes();
        }
    }
}

/// What is read of a [`NamesZone`], each word as it is now.
pub trait ZoneWords: Copy {
    /// A word of the domain, of eight.
    fn domain(self, idx: usize) -> u64;
    /// See [`NamesZone::domain_len`].
    fn domain_len(self) -> u32;
    /// See [`NamesZone::ttl`].
    fn ttl(self) -> u32;
    /// See [`NamesZone::serial`].
    fn serial(self) -> u32;
}

#[cfg(not(target_arch = "bpf"))]
impl ZoneWords for &NamesZone {
    fn domain(self, idx: usize) -> u64 {
        let words: [u64; 8] = zerocopy::transmute!(self.domain);
        words[idx]
    }

    fn domain_len(self) -> u32 {
        self.domain_len
    }

    fn ttl(self) -> u32 {
        self.ttl
    }

    fn serial(self) -> u32 {
        self.serial
    }
}

/// A query about a name that is one label below the domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameQuery {
    /// The type that is asked for.
    pub query_type: u16,
    /// Whether it has an OPT record.
    pub has_edns: bool,
    /// Whether that has the flag DO (RFC 3225), which the answer repeats.
    pub dnssec_ok: bool,
    /// Where the domain begins in the message: 14..=76.
    pub apex: u32,
    /// Where the question ends in the message.
    pub question_end: u32,
}

impl NameQuery {
    /// Whether the answer is an address, or that there is none of this type: not one by SRV, if the name is a
    /// service's, and not one that is refused.
    #[inline(always)]
    pub fn is_about_addresses(&self, is_service: bool) -> bool {
        use record_type::{AXFR, IXFR, SRV};
        let is_refused = matches!(self.query_type, IXFR | AXFR);
        let is_by_srv = is_service && self.query_type == SRV;
        !is_refused && !is_by_srv
    }
}

/// The addresses that a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameAddresses {
    /// The VIP.
    pub vip: [u8; 4],
    /// The IPv6 VIP, where AAAA is answered.
    pub vip6: Option<[u8; 16]>,
}

/// Reads a query of `len` bytes, and its name into `key`. `None` where it isn't about a label below the
/// domain, or isn't common: it passes to the daemon.
#[inline(always)]
pub fn read_query(
    message: &(impl DnsMessage + ?Sized),
    len: u32,
    zone: impl ZoneWords,
    key: &mut NameKey,
) -> Option<NameQuery> {
    // Id, flags, QDCOUNT, which is 1, ANCOUNT, which is 0.
    let head = u64::from_be(message.word(0));
    // NSCOUNT, which is 0, ARCOUNT, 0 or 1, and the length of the first label.
    let counts = u64::from_be(message.word(8));
    let n_additionals = counts >> 32;
    let flags = (head >> 32) as u16;
    if flags & (QR | OPCODE) != 0 || head as u32 != 1 << 16 || n_additionals > 1 {
        return None;
    }
    let label_len = (counts >> 24) as u8 as u32;
    let domain_len = zone.domain_len();
    if label_len == 0 || label_len > 63 || domain_len == 0 || domain_len > MAX_DOMAIN_LEN as u32 {
        return None;
    }

    // A zero that the compiler doesn't know: or it would call a function that writes byte by byte.
    let (mut idx, zero) = (0, black_box(0));
    while idx < 8 {
        key.set_word(idx, zero);
        idx += 1;
    }
    for_each_word(message, DNS_HEADER_LEN, label_len + 1, |idx, word| key.set_word(idx, word));
    let apex = DNS_HEADER_LEN + 1 + label_len;
    let mut difference = 0;
    for_each_word(message, apex, domain_len, |idx, word| difference |= word ^ zone.domain(idx));
    // The last words are read by their ends: nothing is read beyond the message's.
    let question_end = apex + domain_len + 4;
    let kind = u64::from_be(message.word(question_end - 8)) as u32;
    if difference != 0 || kind as u16 != CLASS_IN {
        return None;
    }
    let query_type = (kind >> 16) as u16;
    let tail_len = len.wrapping_sub(question_end);
    let has_edns = n_additionals == 1;
    let mut dnssec_ok = false;
    if has_edns {
        // The root, the type; the size of messages, the upper bits of a code, the version, flags, the length
        // of the options.
        let kind = u64::from_be(message.word(question_end)) >> 40;
        let opt = u64::from_be(message.word(question_end + OPT_LEN - 8));
        let options = u32::from(opt as u16);
        if kind != record_type::OPT.into() || (opt >> 32) as u8 != 0 {
            return None;
        }
        if tail_len != OPT_LEN + options || tail_len > MAX_QUERY_TAIL {
            return None;
        }
        dnssec_ok = (opt >> 16) as u16 & DO != 0;
    } else if tail_len != 0 {
        return None;
    }
    Some(NameQuery { query_type, has_edns, dnssec_ok, apex, question_end })
}

/// Goes over `len` bytes from `offset` on, 1..=64, by words: capital letters are in lower case, and the last
/// word has zeros after them. (Lengths of labels are below 64, where ASCII has no letters.) At least seven
/// bytes precede them.
#[inline(always)]
fn for_each_word(
    message: &(impl DnsMessage + ?Sized),
    offset: u32,
    len: u32,
    mut take: impl FnMut(usize, u64),
) {
    // A copy that the compiler doesn't know, nor the verifier after arithmetic: or it would tell apart all
    // that follows by what the comparisons below say about the length.
    let len = black_box(len) & 127;
    // What follows the whole words is the end of the word that ends with it, in two shifts because
    // there may be none of it. What 64 bytes have here is replaced by their first word.
    let last = u64::from_le(message.word(offset + len - 8));
    let rest = last >> 1 >> (63 - 8 * (len & 7));
    take((len & 56) as usize / 8, lower(rest.to_le()));
    let mut at = 0;
    while at < 64 && at + 8 <= len {
        take(at as usize / 8, lower(message.word(offset + at)));
        at += 8;
    }
}

/// The length of the answer to a query about a name's addresses, at most [`MAX_QUERY_LEN`].
#[inline(always)]
pub fn answer_len(query: &NameQuery, addresses: &NameAddresses) -> u32 {
    let record_len = match query.query_type {
        // As little as may be to ANY (RFC 8482, section 4.1).
        record_type::A | record_type::ANY => A_LEN,
        record_type::AAAA if addresses.vip6.is_some() => AAAA_LEN,
        _ => SOA_LEN,
    };
    query.question_end + record_len + if query.has_edns { OPT_LEN } else { 0 }
}

/// Makes a query about a name's addresses its answer, in a message of the answer's length.
#[inline(always)]
pub fn answer(
    message: &mut (impl DnsMessage + ?Sized),
    query: &NameQuery,
    addresses: &NameAddresses,
    zone: impl ZoneWords,
) {
    let mut end = query.question_end;
    let n_answers = match query.query_type {
        record_type::A | record_type::ANY => {
            put_a(message, end, addresses.vip, zone.ttl());
            end += A_LEN;
            1
        }
        record_type::AAAA if let Some(vip6) = addresses.vip6 => {
            put_aaaa(message, end, vip6, zone.ttl());
            end += AAAA_LEN;
            1
        }
        _ => {
            put_soa(message, end, query.apex, zone.serial());
            end += SOA_LEN;
            0
        }
    };
    if query.has_edns {
        let flags = if query.dnssec_ok { DO } else { 0 };
        let size_and_flags = u64::from(DNS_PAYLOAD) << 48 | u64::from(flags) << 16;
        let opt = u64::from(record_type::OPT) << 40 | size_and_flags >> 24;
        message.set_word(end, opt.to_be());
        message.set_word(end + OPT_LEN - 8, size_and_flags.to_be());
    }
    let head = u64::from_be(message.word(0));
    let flags = answer_flags((head >> 32) as u16) | AA;
    let id = head >> 48 << 48;
    message.set_word(0, (id | u64::from(flags) << 32 | 1 << 16 | n_answers).to_be());
    let label = u64::from_be(message.word(8)) & u64::from(u32::MAX);
    let n_opt = u64::from(query.has_edns);
    message.set_word(8, ((1 - n_answers) << 48 | n_opt << 32 | label).to_be());
}

/// Whether a message is a query: to answer a response could begin an endless exchange.
#[inline(always)]
pub fn is_query(message: &(impl DnsMessage + ?Sized)) -> bool {
    (u64::from_be(message.word(0)) >> 32) as u16 & QR == 0
}

/// Makes a message the answer that the server failed. All but the flags stays as it came.
#[inline(always)]
pub fn fail(message: &mut (impl DnsMessage + ?Sized)) {
    let head = u64::from_be(message.word(0));
    let flags = (head >> 32) as u16;
    let after = answer_flags(flags) | SERVFAIL;
    message.set_word(0, (head ^ u64::from(flags ^ after) << 32).to_be());
}

/// The flags that an answer has of its query's, and those of every answer.
const fn answer_flags(query: u16) -> u16 {
    QR | query & (OPCODE | RD) | RA | query & CD
}

#[inline(always)]
fn put_a(message: &mut (impl DnsMessage + ?Sized), at: u32, vip: [u8; 4], ttl: u32) {
    let rest = put_fixed(message, at, record_type::A, ttl, 4);
    message.set_word(at + 8, (rest | u64::from(u32::from_be_bytes(vip))).to_be());
}

#[inline(always)]
fn put_aaaa(message: &mut (impl DnsMessage + ?Sized), at: u32, vip6: [u8; 16], ttl: u32) {
    let rest = put_fixed(message, at, record_type::AAAA, ttl, 16);
    let [high, low]: [u64; 2] = zerocopy::transmute!(vip6);
    message.set_word(at + 8, rest.to_be());
    message.set_word(at + 12, high);
    message.set_word(at + 20, low);
}

/// A record of the question's name, up to its data. The last four bytes of that are the upper half of the
/// word that is returned, whose lower half the data begins with.
#[inline(always)]
fn put_fixed(
    message: &mut (impl DnsMessage + ?Sized),
    at: u32,
    kind: u16,
    ttl: u32,
    len: u16,
) -> u64 {
    let owner = POINTER | DNS_HEADER_LEN as u16;
    let class = u64::from(CLASS_IN) << 16;
    let word = u64::from(owner) << 48 | u64::from(kind) << 32 | class | u64::from(ttl >> 16);
    message.set_word(at, word.to_be());
    u64::from(ttl) << 48 | u64::from(len) << 32
}

/// The zone's SOA, of which `apex` is the place of the zone's name in the message. It is its own primary.
#[inline(always)]
fn put_soa(message: &mut (impl DnsMessage + ?Sized), at: u32, apex: u32, serial: u32) {
    let owner = u64::from(POINTER) | u64::from(apex);
    let [refresh, retry, expiry] = SOA_TIMES.map(u64::from);
    let (serial, minimum) = (u64::from(serial), u64::from(NEGATIVE_TTL));
    let len = u64::from(SOA_LEN - 12);
    let words = [
        owner << 48 | u64::from(record_type::SOA) << 32 | u64::from(CLASS_IN) << 16 | minimum >> 16,
        minimum << 48 | len << 32 | owner << 16 | (NO_MAILBOX >> 112) as u64,
        (NO_MAILBOX >> 48) as u64,
        (NO_MAILBOX as u64) << 16 | serial >> 16,
        serial << 48 | refresh << 16 | retry >> 16,
        retry << 48 | expiry << 16 | minimum >> 16,
    ];
    let mut idx = 0;
    while idx < words.len() {
        message.set_word(at + 8 * idx as u32, words[idx].to_be());
        idx += 1;
    }
    message.set_word(at + SOA_LEN - 8, (expiry << 32 | minimum).to_be());
}

/// Eight bytes with ASCII's capital letters in lower case.
#[inline(always)]
const fn lower(word: u64) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let low = word & (0x7f * ONES);
    // A byte's upper bit is set where it is at least 'A', and where it is above 'Z'.
    let from_a = low + (0x80 - b'A' as u64) * ONES;
    let above_z = low + (0x7f - b'Z' as u64) * ONES;
    let is_capital = !word & from_a & !above_z & (0x80 * ONES);
    word | is_capital >> 2
}

const _: () = {
    assert!(size_of::<NameKey>() == 64 && size_of::<NamesZone>() == 80);
    assert!(size_of::<NameRecord>() == 64 && size_of::<NamesControl>() == 144);
    assert!(size_of::<FirstListener>() == 24);
    assert!(size_of::<ListenKey>() == 24 && size_of::<NamesCounters>() == 64);
    assert!(SOA_LEN + OPT_LEN <= MAX_QUERY_TAIL && MAX_QUERY_LEN <= 240);
};

#[cfg(test)]
mod tests;
