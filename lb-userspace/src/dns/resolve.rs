//! Decides the response to a message from its bytes and the table, without I/O.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};

use hickory_proto::op::ResponseCode;
use ipnet::IpNet;

use super::domain::Domain;
use super::encode::{self, QUESTION, ResponseWriter, Section};
use super::loop_detection;
use super::message::{ClientQuery, WireName};
use super::reverse::{self, ReverseName};
use super::sockets::Transport;
use crate::config::{DnsConfig, Unrouted};
use crate::table::{Ports, Protocols, Service, Table, Watch};

/// How long negative responses may be cached, in seconds: short, so that a service that was queried
/// too early is found soon after it appears.
const NEGATIVE_TTL: u32 = 5;

/// The port in SRV records of a service that listens on 80 or on every port.
const HTTP: u16 = 80;

/// Types and a class of RFC 1035, 3596 and 2782.
mod number {
    pub(super) const A: u16 = 1;
    pub(super) const NS: u16 = 2;
    pub(super) const SOA: u16 = 6;
    pub(super) const PTR: u16 = 12;
    pub(super) const AAAA: u16 = 28;
    pub(super) const SRV: u16 = 33;
    pub(super) const IXFR: u16 = 251;
    pub(super) const AXFR: u16 = 252;
    pub(super) const ANY: u16 = 255;
    /// The class of the internet.
    pub(super) const IN: u16 = 1;
}

/// Which names are ours, and how they are answered.
#[derive(Clone, Debug)]
pub(super) struct Zone {
    domain: Domain,
    ttl: u32,
    unrouted: Unrouted,
    /// The pools of VIPs, whose reverse names are ours, too.
    pools: Box<[IpNet]>,
}

/// A table with an index by address, built when it is first needed.
#[derive(Debug)]
pub(super) struct TableSnapshot {
    pub(super) table: Arc<Table>,
    by_address: OnceLock<HashMap<IpAddr, Arc<Service>>>,
}

/// What a response depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct ResolveContext<'a> {
    pub(super) zone: &'a Zone,
    pub(super) snapshot: &'a TableSnapshot,
    /// Whether connections to VIPs are redirected now.
    pub(super) attached: bool,
    /// Whether the query may wait while the zone isn't ready.
    pub(super) waits: bool,
    /// How names that aren't live in the table are handled.
    pub(super) missing: Missing,
}

/// How a name of the zone that isn't live in the table is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// It is looked up first.
    LookUp,
    /// It is answered from the table, which is complete.
    Absent,
    /// It is answered from the table; a name that the table doesn't have may exist all the same.
    Unknown,
}

/// The decision about a message.
#[derive(Clone, Debug)]
pub(super) enum Resolution<'m, 'k> {
    /// It gets no response: it isn't a query.
    Drop,
    /// The response is in the buffer; if it is about a live service, that service is in use.
    Reply(ResponseCode, Option<&'k Service>),
    /// It is to be forwarded.
    Forward(ClientQuery<'m>),
    /// It is about the zone, which isn't ready yet.
    Wait,
    /// It is about this name (in lower case), whose service isn't live or doesn't exist.
    Warm(String),
}

/// The kind of a name in the zone.
enum ZoneName<'a> {
    Service(&'a [u8]),
    /// `_NAME._tcp` or `_NAME._udp`.
    Served(&'a [u8], Protocols),
    /// A name above others, with nothing of its own.
    Between,
    /// None of ours.
    Nothing,
}

impl TableSnapshot {
    pub(super) fn new(table: Arc<Table>) -> TableSnapshot {
        TableSnapshot { table, by_address: OnceLock::new() }
    }

    fn at(&self, address: IpAddr) -> Option<&Service> {
        let by_address = self.by_address.get_or_init(|| {
            let addresses = |service: &Arc<Service>| {
                let vip6 = service.vip6.map(|vip6| (vip6.into(), service.clone()));
                std::iter::once((service.vip.into(), service.clone())).chain(vip6)
            };
            self.table.services.values().flat_map(addresses).collect()
        });
        by_address.get(&address).map(|service| &**service)
    }
}

/// Decides about the message `bytes`, and writes the response into `out` if there is one.
pub(super) fn answer<'m, 'k>(
    bytes: &'m [u8],
    transport: Transport,
    known: ResolveContext<'k>,
    out: &mut Vec<u8>,
) -> Resolution<'m, 'k> {
    let query = match ClientQuery::read(bytes) {
        Ok(query) => query,
        Err(why) => {
            let code = encode::to_malformed(out, bytes, why);
            return code.map_or(Resolution::Drop, |code| Resolution::Reply(code, None));
        }
    };
    let max_len = encode::max_len(&query, transport);
    let mut error = |code| {
        encode::error(out, &query, code, max_len);
        Resolution::Reply(code, None)
    };
    if query.edns.is_some_and(|edns| edns.version != 0) {
        return error(ResponseCode::BADVERS);
    }
    // Other classes have other name trees, of which we have none; zone transfers are not offered.
    let is_transfer = matches!(query.query_type, number::AXFR | number::IXFR);
    if query.query_class != number::IN || is_transfer {
        return error(ResponseCode::Refused);
    }

    let ResolveContext { zone, snapshot, .. } = known;
    let below = zone.domain.depth_of(&query.name);
    let reversed = below.is_none().then(|| reverse::classify(&query.name, &zone.pools)).flatten();
    if below.is_none() && reversed.is_none() {
        return Resolution::Forward(query);
    }
    let forwards = zone.unrouted == Unrouted::Forward;
    // A loop probe that came back is recognized in whatever state the zone is.
    if forwards && query.name.label(1).is_some_and(loop_detection::is_probe_label) {
        return Resolution::Forward(query);
    }
    if !snapshot.table.is_synced() || !known.attached {
        if known.waits {
            return Resolution::Wait;
        }
        // Never NXDOMAIN: resolvers would cache it.
        return error(ResponseCode::ServFail);
    }
    let named = below.map(|depth| (zone.named(&query.name, depth), depth));
    if let Some((named, _)) = &named {
        match (known.missing, named.not_live(&snapshot.table)) {
            (Missing::LookUp, Some((name, _))) => {
                return Resolution::Warm(String::from_utf8_lossy(name).to_ascii_lowercase());
            }
            _ if forwards && !named.is_ours(&snapshot.table) => return Resolution::Forward(query),
            // Never NXDOMAIN for lack of an answer, which resolvers would cache, and no address at which
            // connections would be refused though there may be instances: clients ask again.
            (Missing::Unknown, Some((_, service))) if service.is_none_or(is_unread) => {
                return error(ResponseCode::ServFail);
            }
            _ => {}
        }
    }
    // An address isn't looked up: the table has all VIPs, once sources have reported.
    if let Some((ReverseName::Address(address), _)) = reversed
        && known.missing == Missing::Unknown
        && snapshot.at(address).is_none()
    {
        return error(ResponseCode::ServFail);
    }
    let mut writer =
        AnswerWriter { zone, query: &query, snapshot, reply: ResponseWriter::new(out, &query) };
    let (code, used) = match (named, reversed) {
        (Some((named, depth)), _) => {
            let service = named.service(&snapshot.table);
            (writer.in_zone(&named, service, depth), service.filter(|service| is_live(service)))
        }
        (None, Some((reversed, depth))) => (writer.in_reverse(reversed, depth), None),
        (None, None) => return Resolution::Forward(query),
    };
    writer.reply.finish(code, true, max_len);
    Resolution::Reply(code, used)
}

fn is_live(service: &Service) -> bool {
    service.watch == Watch::Live
}

/// Whether nothing is known of the service's instances.
fn is_unread(service: &Service) -> bool {
    !is_live(service) && service.backends.is_empty() && service.excluded.is_empty()
}

impl Zone {
    /// The zone of `config`, and the names of the addresses in `pools`.
    pub(super) fn new(config: &DnsConfig, pools: impl IntoIterator<Item = IpNet>) -> Zone {
        Zone {
            domain: Domain::new(&config.domain),
            ttl: config.ttl,
            unrouted: config.unrouted,
            pools: pools.into_iter().collect(),
        }
    }

    /// The longest TTLs of forwarded names of the zone, in seconds: of positive and of negative
    /// responses.
    pub(super) fn max_ttls(&self) -> (u32, u32) {
        (self.ttl, NEGATIVE_TTL)
    }

    /// The response for names that no routed service has.
    pub(super) fn unrouted(&self) -> Unrouted {
        self.unrouted
    }

    /// The pools of VIPs.
    pub(super) fn pools(&self) -> &[IpNet] {
        &self.pools
    }

    /// What a name is that is `depth` labels below the zone.
    fn named<'a>(&self, name: &WireName<'a>, depth: usize) -> ZoneName<'a> {
        let protocol = |label: &[u8]| match label {
            label if label.eq_ignore_ascii_case(b"_tcp") => Some(Protocols::Tcp),
            label if label.eq_ignore_ascii_case(b"_udp") => Some(Protocols::Udp),
            _ => None,
        };
        match (depth, name.label(0), name.label(1)) {
            (0, ..) => ZoneName::Between,
            (1, Some(label), _) if protocol(label).is_some() => ZoneName::Between,
            (1, Some(label), _) => ZoneName::Service(label),
            (2, Some([b'_', service @ ..]), Some(label)) if !service.is_empty() => {
                protocol(label).map_or(ZoneName::Nothing, |by| ZoneName::Served(service, by))
            }
            _ => ZoneName::Nothing,
        }
    }
}

impl ZoneName<'_> {
    /// Whether the name is that of a service of `table`, or above all of them. Names below a
    /// service aren't: the resolver that had the zone before may have them, as Consul has
    /// `TAG.NAME`.
    fn is_ours(&self, table: &Table) -> bool {
        match *self {
            ZoneName::Service(name) | ZoneName::Served(name, _) => in_table(name, table).is_some(),
            ZoneName::Nothing => false,
            ZoneName::Between => true,
        }
    }

    /// The label of the service that the name is about if the table doesn't have it live, and the
    /// service itself if it is in the table and the name fits it.
    fn not_live<'n, 't>(&'n self, table: &'t Table) -> Option<(&'n [u8], Option<&'t Service>)> {
        let (ZoneName::Service(name) | ZoneName::Served(name, _)) = self else { return None };
        match in_table(name, table) {
            Some(service) if is_live(service) => None,
            _ => Some((name, self.service(table))),
        }
    }

    /// The service that the name is about, if it exists and has that protocol.
    fn service<'t>(&self, table: &'t Table) -> Option<&'t Service> {
        let (name, protocols) = match *self {
            ZoneName::Service(name) => (name, None),
            ZoneName::Served(name, protocols) => (name, Some(protocols)),
            ZoneName::Between | ZoneName::Nothing => return None,
        };
        let service = in_table(name, table)?;
        let is_connected_so = protocols
            .is_none_or(|by| service.protocols == by || service.protocols == Protocols::Both);
        is_connected_so.then_some(service)
    }
}

/// The service of that name, in any case.
fn in_table<'t>(name: &[u8], table: &'t Table) -> Option<&'t Service> {
    // In a stack buffer, as this runs for every query.
    let mut buffer = [0; 63];
    let lower = buffer.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    table.services.get(std::str::from_utf8(lower).ok()?).map(|service| &**service)
}

/// Writes the sections of an answer.
struct AnswerWriter<'a> {
    zone: &'a Zone,
    query: &'a ClientQuery<'a>,
    snapshot: &'a TableSnapshot,
    reply: ResponseWriter<'a>,
}

impl AnswerWriter<'_> {
    /// Whether records of `record_type` are asked for by their type.
    fn wants(&self, record_type: u16) -> bool {
        self.query.query_type == record_type
    }

    fn in_zone(
        &mut self,
        named: &ZoneName<'_>,
        service: Option<&Service>,
        depth: usize,
    ) -> ResponseCode {
        match (named, service) {
            _ if depth == 0 => self.apex(0),
            (ZoneName::Service(_), Some(service)) => self.service(service),
            (ZoneName::Served(..), Some(service)) => self.served(service),
            (ZoneName::Between, _) => self.nothing(ResponseCode::NoError, depth),
            _ => self.nothing(ResponseCode::NXDomain, depth),
        }
    }

    fn in_reverse(&mut self, reversed: ReverseName, depth: usize) -> ResponseCode {
        match reversed {
            ReverseName::Apex => self.apex(depth),
            ReverseName::Between => self.nothing(ResponseCode::NoError, depth),
            ReverseName::Nothing => self.nothing(ResponseCode::NXDomain, depth),
            ReverseName::Address(address) => match self.snapshot.at(address) {
                None => self.nothing(ResponseCode::NXDomain, depth),
                Some(service) if self.wants(number::PTR) || self.wants(number::ANY) => {
                    let len = [service.name.len() as u8]; // a label
                    let name: [&[u8]; 3] = [&len, service.name.as_bytes(), self.zone.domain.wire()];
                    self.reply.record(Section::Answer, QUESTION, number::PTR, self.zone.ttl, &name);
                    ResponseCode::NoError
                }
                Some(_) => self.nothing(ResponseCode::NoError, depth),
            },
        }
    }

    /// `NAME`: its addresses, or SRV. Also while no backend is healthy: NXDOMAIN would outlive the
    /// outage in caches.
    fn service(&mut self, service: &Service) -> ResponseCode {
        match self.query.query_type {
            // The minimal response to ANY (RFC 8482, section 4.1).
            number::A | number::ANY => self.address(Section::Answer, QUESTION, service.vip.into()),
            number::AAAA if let Some(vip6) = service.answered_vip6() => {
                self.address(Section::Answer, QUESTION, vip6.into());
            }
            number::SRV => self.srv(service, self.query.name.suffix(0)),
            _ => return self.nothing(ResponseCode::NoError, 1),
        }
        ResponseCode::NoError
    }

    /// `_NAME._tcp`: where it is served (RFC 2782).
    fn served(&mut self, service: &Service) -> ResponseCode {
        if !self.wants(number::SRV) && !self.wants(number::ANY) {
            return self.nothing(ResponseCode::NoError, 2);
        }
        // The service's own name, in the question's case.
        let Some([_, label @ ..]) = self.query.name.label(0) else {
            return self.nothing(ResponseCode::NXDomain, 2);
        };
        let mut target = [0; 256];
        let suffix = self.query.name.suffix(2);
        let len = 1 + label.len() + suffix.len(); // shorter than the question's name
        target[0] = label.len() as u8;
        target[1..=label.len()].copy_from_slice(label);
        target[1 + label.len()..len].copy_from_slice(suffix);
        self.srv(service, &target[..len]);
        ResponseCode::NoError
    }

    fn srv(&mut self, service: &Service, target: &[u8]) {
        let port = match &service.ports {
            Ports::Only(ports) if !ports.contains(&HTTP) => ports.first().copied().unwrap_or(HTTP),
            _ => HTTP,
        };
        let [high, low] = port.to_be_bytes();
        let place: &[u8] = &[0, 1, 0, 1, high, low]; // priority 1, weight 1
        let ttl = self.zone.ttl;
        let data = self.reply.record(Section::Answer, QUESTION, number::SRV, ttl, &[place, target]);
        let owner = data + place.len() as u16;
        self.address(Section::Additional, owner, service.vip.into());
        if let Some(vip6) = service.answered_vip6() {
            self.address(Section::Additional, owner, vip6.into());
        }
    }

    fn address(&mut self, section: Section, owner: u16, address: IpAddr) {
        let ttl = self.zone.ttl;
        match address {
            IpAddr::V4(vip) => self.reply.record(section, owner, number::A, ttl, &[&vip.octets()]),
            IpAddr::V6(vip6) => {
                self.reply.record(section, owner, number::AAAA, ttl, &[&vip6.octets()])
            }
        };
    }

    /// The top of a zone, `depth` labels above the question's name.
    fn apex(&mut self, depth: usize) -> ResponseCode {
        match self.query.query_type {
            number::SOA | number::ANY => self.soa(Section::Answer, depth),
            number::NS => {
                let name = self.query.name.suffix(depth);
                self.reply.record(Section::Answer, QUESTION, number::NS, self.zone.ttl, &[name]);
            }
            _ => return self.nothing(ResponseCode::NoError, depth),
        }
        ResponseCode::NoError
    }

    /// No data or no such name; the SOA has the TTL of negative responses.
    fn nothing(&mut self, code: ResponseCode, depth: usize) -> ResponseCode {
        self.soa(Section::Authority, depth);
        code
    }

    /// The SOA of the zone whose apex is `depth` labels above the question's name. Its names are
    /// those of RFC 6303, section 3, for a zone without other servers: it is its own primary, and
    /// has no responsible mailbox.
    fn soa(&mut self, section: Section, depth: usize) {
        let apex = self.query.name.suffix_offset(depth);
        let primary = (0xc000 | apex).to_be_bytes();
        let mut numbers = [0; 20];
        let serial = self.snapshot.table.generation as u32; // RFC 1982: a serial wraps
        for (bytes, number) in
            numbers.chunks_exact_mut(4).zip([serial, 3600, 1200, 604_800, NEGATIVE_TTL])
        {
            bytes.copy_from_slice(&number.to_be_bytes());
        }
        let data: [&[u8]; 3] = [&primary, b"\x06nobody\x07invalid\x00", &numbers];
        self.reply.record(section, apex, number::SOA, NEGATIVE_TTL, &data);
    }
}
