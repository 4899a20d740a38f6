//! DNS answers about routed names, as the unit `names` gives them in the kernel: how a query is read,
//! and the answer to it.
//!
//! The answers are those of the daemon (`lb-userspace/src/dns/resolve.rs`), byte for byte. What isn't
//! common passes to it: several questions, names below a service, compression, options that make the
//! message long. There are no loops over bytes: a name is compared as eight words.
//!
//! Messages: RFC 1035, section 4. EDNS: RFC 6891. Negative answers: RFC 2308.

use core::hint::black_box;

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The length of a message's header, where the question begins.
pub const DNS_HEADER_LEN: u32 = 12;
/// The longest domain that the unit serves: on the wire, the root's length included.
pub const MAX_DOMAIN_LEN: usize = 63;
/// The longest part after the question that a query may have. It is an OPT record with its options.
pub const MAX_QUERY_TAIL: u32 = 64;
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

/// In a header's third byte: the message is a response; its opcode; recursion is desired.
const QR: u8 = 0x80;
const OPCODE: u8 = 0x78;
const RD: u8 = 0x01;
/// The answer is authoritative.
const AA: u8 = 0x04;
/// In the fourth byte: recursion is available; checking is disabled.
const RA: u8 = 0x80;
const CD: u8 = 0x10;
/// The response code of a server that failed.
const SERVFAIL: u8 = 2;

/// An OPT record without options.
const OPT_LEN: usize = 11;
/// A record's owner by a pointer, its type, class, time to live and length.
const FIXED_LEN: usize = 12;
/// A pointer into the message (RFC 1035, section 4.1.4).
const POINTER: u16 = 0xc000;
/// The responsible mailbox in SOA: none (RFC 6303, section 3).
const NO_MAILBOX: [u8; 16] = *b"\x06nobody\x07invalid\0";
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
    fn clear(&mut self) {
        clear(zerocopy::transmute_mut!(self));
    }

    #[inline(always)]
    fn word(&self, idx: usize) -> u64 {
        let words: &[u64; 8] = zerocopy::transmute_ref!(self);
        words[idx]
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
    /// Zero.
    pub reserved: [u64; 3],
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

/// A message, from the beginning of its header on.
pub trait DnsMessage {
    /// Copies bytes from `offset` on, at least one. Returns whether the message has them.
    fn load(&self, offset: u32, to: &mut [u8]) -> bool;
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
    /// Bytes 2 and 3 of the header.
    pub flags: [u8; 2],
    /// Whether it has an OPT record.
    pub has_edns: bool,
    /// Whether that has the flag DO (RFC 3225), which the answer repeats.
    pub dnssec_ok: bool,
    /// Where the domain begins in the message: 14..=76.
    pub apex: u16,
    /// Where the question ends in the message.
    pub question_end: u32,
    /// The length of what follows the question: 0..=[`MAX_QUERY_TAIL`].
    pub tail_len: u32,
}

/// The addresses that a name has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameAddresses {
    /// The VIP.
    pub vip: [u8; 4],
    /// The IPv6 VIP, where AAAA is answered.
    pub vip6: Option<[u8; 16]>,
}

/// Records on the wire, filled up with zeros. Aligned, so that it is words as well.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, Immutable, IntoBytes)]
pub struct RecordBytes {
    /// The records.
    pub octets: [u8; 64],
}

impl RecordBytes {
    /// Makes all of them zero.
    #[inline(always)]
    pub fn clear(&mut self) {
        clear(zerocopy::transmute_mut!(self));
    }
}

/// Makes words zero, one by one: by a zero that the compiler doesn't know, or it would call a function
/// that does so byte by byte.
#[inline(always)]
fn clear(words: &mut [u64; 8]) {
    let zero = black_box(0);
    let mut idx = 0;
    while idx < words.len() {
        words[idx] = zero;
        idx += 1;
    }
}

/// An answer: a header, then the question as it was asked, then the records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NameAnswer {
    /// Bytes 2 and 3 of the header. The id before them is the query's.
    pub flags: [u8; 2],
    /// The numbers of records, bytes 4..12.
    pub counts: [u8; 8],
    /// The length of the records: 0..=61.
    pub tail_len: u32,
}

/// Reads a query of `len` bytes, and its name into `key`. `None` where it isn't about a label below the domain, or isn't common:
/// it passes to the daemon.
#[inline(always)]
pub fn read_query(
    message: &impl DnsMessage,
    len: u32,
    zone: impl ZoneWords,
    key: &mut NameKey,
) -> Option<NameQuery> {
    // The header, and the length of the first label. (As a number: arrays of octets are filled by a
    // function, byte by byte, on the kernel side.)
    let mut head = 0u128;
    if !message.load(0, head.as_mut_bytes().get_mut(..DNS_HEADER_LEN as usize + 1)?) {
        return None;
    }
    // QDCOUNT is 1, ANCOUNT and NSCOUNT are 0, ARCOUNT is 0 or 1.
    let [_, _, high, low, counts @ .., label_len, _, _, _] = head.to_ne_bytes();
    let [q, questions, a, b, c, d, e, n_additionals] = counts;
    if high & (QR | OPCODE) != 0
        || q | a | b | c | d | e != 0
        || questions != 1
        || n_additionals > 1
    {
        return None;
    }
    let label_len = u32::from(label_len);
    let domain_len = zone.domain_len();
    if label_len == 0 || label_len > 63 || domain_len == 0 || domain_len > MAX_DOMAIN_LEN as u32 {
        return None;
    }

    let apex = DNS_HEADER_LEN + 1 + label_len;
    key.clear();
    if !message.load(apex, key.octets.get_mut(..domain_len as usize)?) {
        return None;
    }
    // Lengths are below 64, where ASCII has no letters.
    let mut difference = 0;
    let mut idx = 0;
    while idx < 8 {
        difference |= lower(key.word(idx)) ^ zone.domain(idx);
        idx += 1;
    }
    if difference != 0 {
        return None;
    }
    let mut kind = 0u32;
    if !message.load(apex + domain_len, kind.as_mut_bytes()) {
        return None;
    }
    let [type_high, type_low, class_high, class_low] = kind.to_ne_bytes();
    let query_type = u16::from_be_bytes([type_high, type_low]);
    if u16::from_be_bytes([class_high, class_low]) != CLASS_IN {
        return None;
    }

    let question_end = apex + domain_len + 4;
    let tail_len = len.wrapping_sub(question_end);
    let has_edns = n_additionals == 1;
    let mut dnssec_ok = false;
    if has_edns {
        let mut opt = 0u128;
        if !message.load(question_end, opt.as_mut_bytes().get_mut(..OPT_LEN)?) {
            return None;
        }
        // The root, the type, the size of messages, the upper bits of a code, the version, the flags,
        // the length of the options.
        let [root, kind_high, kind_low, _, _, _, version, flags, _, len_high, len_low, ..] =
            opt.to_ne_bytes();
        let kind = u16::from_be_bytes([kind_high, kind_low]);
        let options = u32::from(u16::from_be_bytes([len_high, len_low]));
        if root != 0 || kind != record_type::OPT || version != 0 {
            return None;
        }
        if tail_len != OPT_LEN as u32 + options || tail_len > MAX_QUERY_TAIL {
            return None;
        }
        dnssec_ok = flags & 0x80 != 0;
    } else if tail_len != 0 {
        return None;
    }
    key.clear();
    if !message.load(DNS_HEADER_LEN, key.octets.get_mut(..label_len as usize + 1)?) {
        return None;
    }
    let mut idx = 0;
    while idx < 8 {
        key.set_word(idx, lower(key.word(idx)));
        idx += 1;
    }
    let (flags, apex) = ([high, low], apex as u16);
    Some(NameQuery { query_type, flags, has_edns, dnssec_ok, apex, question_end, tail_len })
}

/// The answer to a query about a name that exists, and its records into `records`; `None` where the
/// daemon is to give it.
#[inline(always)]
pub fn answer_to(
    query: &NameQuery,
    addresses: &NameAddresses,
    zone: impl ZoneWords,
    records: &mut RecordBytes,
) -> Option<NameAnswer> {
    records.clear();
    let tail = &mut records.octets;
    let (n_answers, records_len) = match query.query_type {
        record_type::A => (1, put_a(tail, addresses.vip, zone.ttl())),
        record_type::AAAA if let Some(vip6) = addresses.vip6 => {
            (1, put_aaaa(tail, vip6, zone.ttl()))
        }
        // Answered by SRV or by A, or refused.
        record_type::SRV | record_type::ANY | record_type::IXFR | record_type::AXFR => {
            return None;
        }
        _ => (0, put_soa(tail, query.apex, zone.serial())),
    };
    if query.has_edns {
        // The places are constants, because the verifier has to know them.
        match records_len {
            A_LEN => put_opt(tail, A_LEN, query.dnssec_ok),
            AAAA_LEN => put_opt(tail, AAAA_LEN, query.dnssec_ok),
            _ => put_opt(tail, SOA_LEN, query.dnssec_ok),
        }
    }
    let n_opt = u8::from(query.has_edns);
    let tail_len = records_len as u32 + if query.has_edns { OPT_LEN as u32 } else { 0 };
    let [high, low] = query.flags;
    let high = QR | high & (OPCODE | RD) | AA;
    let (flags, counts) = ([high, RA | low & CD], [0, 1, 0, n_answers, 0, 1 - n_answers, 0, n_opt]);
    Some(NameAnswer { flags, counts, tail_len })
}

/// The flags, bytes 2 and 3 of the header, of the answer that the server failed, to a query with these.
/// All else stays as it came.
#[inline(always)]
pub const fn servfail_flags([high, low]: [u8; 2]) -> [u8; 2] {
    [QR | high & (OPCODE | RD), RA | low & CD | SERVFAIL]
}

const A_LEN: usize = FIXED_LEN + 4;
const AAAA_LEN: usize = FIXED_LEN + 16;
const SOA_LEN: usize = FIXED_LEN + 2 + NO_MAILBOX.len() + 20;

#[inline(always)]
fn put_a(tail: &mut [u8; 64], vip: [u8; 4], ttl: u32) -> usize {
    put_fixed(tail, DNS_HEADER_LEN as u16, record_type::A, ttl, 4);
    tail[FIXED_LEN..A_LEN].copy_from_slice(&vip);
    A_LEN
}

#[inline(always)]
fn put_aaaa(tail: &mut [u8; 64], vip6: [u8; 16], ttl: u32) -> usize {
    put_fixed(tail, DNS_HEADER_LEN as u16, record_type::AAAA, ttl, 16);
    tail[FIXED_LEN..AAAA_LEN].copy_from_slice(&vip6);
    AAAA_LEN
}

/// The zone's SOA, of which `apex` is the place of the zone's name in the message. It is its own primary.
#[inline(always)]
fn put_soa(tail: &mut [u8; 64], apex: u16, serial: u32) -> usize {
    const MAILBOX: usize = FIXED_LEN + 2;
    const NUMBERS: usize = MAILBOX + NO_MAILBOX.len();
    put_fixed(tail, apex, record_type::SOA, NEGATIVE_TTL, (SOA_LEN - FIXED_LEN) as u16);
    tail[FIXED_LEN..MAILBOX].copy_from_slice(&(POINTER | apex).to_be_bytes());
    tail[MAILBOX..NUMBERS].copy_from_slice(&NO_MAILBOX);
    let [refresh, retry, expiry] = SOA_TIMES;
    tail[NUMBERS..NUMBERS + 4].copy_from_slice(&serial.to_be_bytes());
    tail[NUMBERS + 4..NUMBERS + 8].copy_from_slice(&refresh.to_be_bytes());
    tail[NUMBERS + 8..NUMBERS + 12].copy_from_slice(&retry.to_be_bytes());
    tail[NUMBERS + 12..NUMBERS + 16].copy_from_slice(&expiry.to_be_bytes());
    tail[NUMBERS + 16..SOA_LEN].copy_from_slice(&NEGATIVE_TTL.to_be_bytes());
    SOA_LEN
}

/// A record's parts before its data; `owner` is the place of its name in the message.
#[inline(always)]
fn put_fixed(tail: &mut [u8; 64], owner: u16, kind: u16, ttl: u32, len: u16) {
    tail[..2].copy_from_slice(&(POINTER | owner).to_be_bytes());
    tail[2..4].copy_from_slice(&kind.to_be_bytes());
    tail[4..6].copy_from_slice(&CLASS_IN.to_be_bytes());
    tail[6..10].copy_from_slice(&ttl.to_be_bytes());
    tail[10..12].copy_from_slice(&len.to_be_bytes());
}

#[inline(always)]
fn put_opt(tail: &mut [u8; 64], at: usize, dnssec_ok: bool) {
    let [payload_high, payload_low] = DNS_PAYLOAD.to_be_bytes();
    let flags = if dnssec_ok { 0x80 } else { 0 };
    let opt: [u8; OPT_LEN] =
        [0, 0, record_type::OPT as u8, payload_high, payload_low, 0, 0, flags, 0, 0, 0];
    tail[at..at + OPT_LEN].copy_from_slice(&opt);
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
    assert!(size_of::<ListenKey>() == 24 && size_of::<NamesCounters>() == 64);
    assert!(SOA_LEN + OPT_LEN <= 64);
};

#[cfg(test)]
mod tests;
