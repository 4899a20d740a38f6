//! The table of answers.txt, through the real server, and cases that have no row.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, Record, RecordType};
use proptest::prelude::{Just, Strategy, any, prop_oneof, proptest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::watch;

use crate::catalog::UsageSender;
use crate::config::{Config, DnsConfig, Forward, Unrouted};
use crate::datapath::answered_by_kernel;
use crate::dns::resolve::Missing::{self, Absent, LookUp, Unknown};
use crate::dns::resolve::{Resolution, ResolveContext, TableSnapshot, Zone, answer};
use crate::dns::{DnsServer, Transport, bind, fuzzing};
use crate::table::{Backend, Ports, Protocols, Service, Table, Watch};

const POOLS: [&str; 2] = ["127.128.0.0/9", "fd00::/64"];

/// A healthy backend.
fn backend(address: &str) -> Backend {
    Backend::example(address.parse().unwrap())
}

/// The table of answers.txt.
fn table(generation: u64) -> Table {
    let service = |name: &str, last: u8, vip6: Option<&str>, ports, protocols| {
        let name: Arc<str> = name.into();
        let service = Service {
            name: name.clone(),
            vip: [127, 128, 0, last].into(),
            vip6: vip6.map(|vip6| vip6.parse().unwrap()),
            ports,
            protocols,
            generation,
            ..Service::example(Vec::new())
        };
        (name, Arc::new(service))
    };
    let services = BTreeMap::from([
        service("web", 1, None, Ports::only([80]), Protocols::Tcp),
        service("db", 2, None, Ports::only([5432]), Protocols::Tcp),
        service("any", 3, None, Ports::Any, Protocols::Both),
        service("six", 4, Some("fd00::4"), Ports::only([443, 9000]), Protocols::Tcp),
        service("dns", 5, None, Ports::only([53, 80]), Protocols::Udp),
        service("v4", 6, Some("fd00::6"), Ports::only([53]), Protocols::Both),
        service("v6", 7, Some("fd00::7"), Ports::only([53]), Protocols::Both),
    ]);
    let services = services.into_iter().map(|(name, mut service)| {
        let addresses: &[&str] = match &*name {
            "v4" => &["10.0.0.7:5300"],
            "v6" => &["10.0.0.7:5300", "[2001:db8::7]:5300"],
            _ => &[],
        };
        Arc::make_mut(&mut service).backends = addresses.iter().map(|at| backend(at)).collect();
        (name, service)
    });
    let services = services.collect();
    Table { generation, services, ..Table::default() }
}

fn zone(config: &DnsConfig) -> Zone {
    Zone::new(config, POOLS.map(|pool| pool.parse().unwrap()))
}

fn query(name: &str, query_type: &str) -> Vec<u8> {
    let query_type = match query_type.strip_prefix("TYPE") {
        Some(number) => RecordType::Unknown(number.parse().unwrap()),
        None if query_type == "IXFR" => RecordType::IXFR, // which hickory doesn't read
        None => query_type.parse().unwrap(),
    };
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), query_type));
    message.metadata.recursion_desired = true;
    message.to_vec().unwrap()
}

/// A message in the notation of answers.txt.
fn show(bytes: &[u8]) -> String {
    let message = Message::from_vec(bytes).unwrap();
    let record = |record: &Record| {
        let data = match &record.data {
            RData::SOA(soa) => {
                assert_eq!(soa.mname, record.name);
                format!("{} {}", soa.serial, soa.minimum)
            }
            data => data.to_string(),
        };
        format!("{} {} {} {data}", record.name, record.ttl, record.record_type())
    };
    let section = |records: &[Record]| records.iter().map(record).collect::<Vec<_>>().join("; ");
    let aa = if message.metadata.authoritative { " aa" } else { "" };
    let [answers, authorities, additionals] =
        [&message.answers, &message.authorities, &message.additionals].map(|all| section(all));
    let code = message.metadata.response_code;
    squeeze(&format!("{code:?}{aa} {answers} | {authorities} | {additionals}"))
}

fn squeeze(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

async fn ask(transport: Transport, server: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    match transport {
        Transport::Udp => {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            socket.send_to(bytes, server).await.unwrap();
            let mut buffer = vec![0; 65_535];
            let (len, from) = socket.recv_from(&mut buffer).await.unwrap();
            assert_eq!(from, server);
            buffer.truncate(len);
            buffer
        }
        Transport::Tcp => {
            let mut stream = TcpStream::connect(server).await.unwrap();
            let len = (bytes.len() as u16).to_be_bytes();
            stream.write_all(&[&len, bytes].concat()).await.unwrap();
            let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut answer).await.unwrap();
            answer
        }
    }
}

/// A server on `ip`, which forwards to `upstream`.
async fn serve(ip: &str, upstream: Option<SocketAddr>) -> (DnsServer, SocketAddr) {
    let config = DnsConfig {
        listen: vec![SocketAddr::new(ip.parse().unwrap(), 0)],
        forward: Forward::Servers(upstream.into_iter().collect()),
        routes: BTreeMap::new(),
        ..Config::default().dns
    };
    let sockets = bind(&config).await.unwrap();
    let address = sockets.addresses()[0];
    let mut vip = Config::default().vip;
    vip.pool6 = Some(POOLS[1].parse().unwrap());
    let (table, attached) = (watch::channel(Arc::new(table(7))).1, watch::channel(true).1);
    let server = DnsServer::start(sockets, &config, &vip, table, attached, UsageSender::default());
    (server.unwrap(), address)
}

#[tokio::test]
async fn every_row_of_the_table() {
    // A resolver that answers everything with YXDOMAIN, which no other one here does.
    let listen = vec!["127.0.0.1:0".parse().unwrap()];
    let upstream = bind(&DnsConfig { listen, ..Config::default().dns }).await.unwrap();
    let upstream_address = upstream.addresses()[0];
    for socket in upstream.udp {
        let socket = UdpSocket::from_std(socket).unwrap();
        tokio::spawn(async move {
            let mut buffer = [0; 512];
            while let Ok((len, client)) = socket.recv_from(&mut buffer).await {
                buffer[2] |= 0x80;
                buffer[3] = 6;
                socket.send_to(&buffer[..len], client).await.unwrap();
            }
        });
    }
    let (server, address) = serve("127.0.0.1", Some(upstream_address)).await;
    let rows = include_str!("../answers.txt").lines();
    let rows = rows.filter(|row| !row.is_empty() && !row.starts_with('#'));
    let mut n_rows = 0;
    for row in rows {
        n_rows += 1;
        let (question, expected) = row.split_once(" = ").unwrap();
        let (name, query_type) = question.trim().split_once(' ').unwrap();
        let asked = query(name, query_type.trim());
        let is_forwarded = expected == "forwarded";
        let expected = if is_forwarded { "YXDomain | |" } else { expected };
        for transport in [Transport::Udp, Transport::Tcp] {
            if is_forwarded && transport == Transport::Tcp {
                continue; // what is forwarded is another test's
            }
            let got = ask(transport, address, &asked).await;
            assert_eq!(got[..2], asked[..2], "{row}");
            assert_eq!(got[2] & 0xf9, 0x81, "{row}: QR, RD, no TC");
            assert_eq!(got[3] & 0x80, 0x80, "{row}: RA");
            assert_eq!(show(&got), squeeze(expected), "{question} over {transport}");
        }
    }
    assert!(n_rows >= 60, "{n_rows} rows");
    server.stop().await;
}

/// A message with an OPT record, of this version, with these flags and options.
fn with_opt(mut message: Vec<u8>, version: u8, flags: u8, options: &[u8]) -> Vec<u8> {
    message[11] += 1;
    message.extend([0, 0, 41, 4, 208, 0, version, flags, 0, 0, options.len() as u8]);
    message.extend(options);
    message
}

/// Each row of the table, in different messages: where the kernel answers, it is byte for byte as the
/// daemon does; and it answers addresses and their absence.
#[test]
fn the_kernel_answers_as_the_daemon_does() {
    let (table, config) = (table(0x1_0203_0405), Config::default().dns);
    let cookie: &[u8] = &[0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8];
    let mut n_answered = 0;
    let rows = include_str!("../answers.txt").lines();
    for row in rows.filter(|row| !row.is_empty() && !row.starts_with('#')) {
        let (question, _) = row.split_once(" = ").unwrap();
        let (name, query_type) = question.trim().split_once(' ').unwrap();
        let query_type = query_type.trim();
        for name in [name.to_owned(), name.to_ascii_uppercase()] {
            let plain = query(&name, query_type);
            let mut other_flags = plain.clone();
            (other_flags[2], other_flags[3]) = (0x06, 0x7f);
            let messages = [
                plain.clone(),
                other_flags,
                with_opt(plain.clone(), 0, 0, &[]),
                with_opt(plain.clone(), 0, 0x80, cookie),
                with_opt(plain.clone(), 1, 0, &[]),
                with_opt(with_opt(plain.clone(), 0, 0, &[]), 0, 0, &[]),
                [&plain[..], &[0]].concat(),
            ];
            for message in messages {
                let by_kernel = answered_by_kernel(&message, &table, &config);
                n_answered += usize::from(by_kernel.is_some());
                if let Some(by_kernel) = &by_kernel {
                    let own = fuzzing::response(&message, &table, &config);
                    assert_eq!(Some(by_kernel), own.as_ref(), "{row}: {message:02x?}");
                }
            }
            let is_service = name.trim_end_matches('.').split('.').count() == 2
                && !name.starts_with('_')
                && fuzzing::response(&plain, &table, &config).is_some_and(|own| own[3] & 0xf == 0);
            let others = ["SRV", "AXFR", "IXFR"];
            let expected = is_service && !others.contains(&query_type);
            assert_eq!(answered_by_kernel(&plain, &table, &config).is_some(), expected, "{row}");
        }
    }
    assert!(n_answered >= 100, "{n_answered}");
}

proptest! {
    /// Whatever bytes of a query are others, and wherever it ends.
    #[test]
    fn the_kernel_answers_no_other_message_than_the_daemon(
        changes in proptest::collection::vec((0usize..60, any::<u8>()), 0..4),
        cut in 0usize..40,
        is_cut in any::<bool>(),
        has_opt in any::<bool>(),
    ) {
        let (table, config) = (table(7), Config::default().dns);
        let mut message = query("six.service.", "AAAA");
        if has_opt {
            message = with_opt(message, 0, 0, &[0, 10, 0, 2, 1, 2]);
        }
        for (at, byte) in changes {
            if let Some(place) = message.get_mut(at) {
                *place = byte;
            }
        }
        if is_cut {
            message.truncate(message.len().saturating_sub(cut));
        }
        if let Some(by_kernel) = answered_by_kernel(&message, &table, &config) {
            proptest::prop_assert_eq!(Some(by_kernel), fuzzing::response(&message, &table, &config));
        }
    }
}

#[tokio::test]
async fn the_address_that_was_asked_answers() {
    for ip in ["0.0.0.0", "::"] {
        let (server, address) = serve(ip, None).await;
        for asked in ["127.0.0.1", "127.5.6.7", "127.0.0.53"] {
            let asked = SocketAddr::new(asked.parse().unwrap(), address.port());
            // `ask` looks where the answer comes from.
            let got = ask(Transport::Udp, asked, &query("web.service.", "A")).await;
            assert_eq!(show(&got), "NoError aa web.service. 30 A 127.128.0.1 | |", "{asked}");
        }
        server.stop().await;
    }
}

/// What becomes of a message, without a server.
fn outcome(
    bytes: &[u8],
    config: &DnsConfig,
    generation: u64,
    attached: bool,
    missing: Missing,
) -> String {
    outcome_in(table(generation), bytes, config, attached, missing)
}

fn outcome_in(
    table: Table,
    bytes: &[u8],
    config: &DnsConfig,
    attached: bool,
    missing: Missing,
) -> String {
    let (zone, snapshot) = (zone(config), TableSnapshot::new(Arc::new(table)));
    let known =
        ResolveContext { zone: &zone, snapshot: &snapshot, attached, waits: false, missing };
    let mut out = Vec::new();
    match answer(bytes, Transport::Udp, known, &mut out) {
        Resolution::Drop => "drop".into(),
        Resolution::Forward(_) => "forward".into(),
        Resolution::Wait => "wait".into(),
        Resolution::Warm(name) => format!("warm {name}"),
        Resolution::Reply(code, used) => {
            let used = used.map(|service| format!(" {}", service.name)).unwrap_or_default();
            format!("{code:?}{used}")
        }
    }
}

#[test]
fn the_zone_fails_until_it_can_be_relied_on() {
    let rows = [
        ("web.service.", 0, true, "ServFail"),
        ("wbe.service.", 0, true, "ServFail"),
        ("service.", 0, true, "ServFail"),
        ("1.0.128.127.in-addr.arpa.", 0, true, "ServFail"),
        ("web.service.", 7, false, "ServFail"),
        ("a.wbe.service.", 7, false, "ServFail"),
        ("example.com.", 0, false, "forward"),
        ("web.service.", 7, true, "NoError web"),
        ("wbe.service.", 7, true, "NXDomain"),
    ];
    let config = Config::default().dns;
    for (name, generation, attached, expected) in rows {
        let got = outcome(&query(name, "A"), &config, generation, attached, Absent);
        assert_eq!(got, expected, "{name} at {generation}, attached: {attached}");
    }
}

#[test]
fn names_that_arent_routed_or_arent_live() {
    let forward = DnsConfig { unrouted: Unrouted::Forward, ..Config::default().dns };
    let rows = [
        ("WEB.service.", "A", Absent, "NoError web"),
        ("WEB.service.", "A", LookUp, "NoError web"),
        ("Wbe.service.", "A", Absent, "forward"),
        ("Wbe.service.", "A", Unknown, "forward"),
        ("Wbe.service.", "A", LookUp, "warm wbe"),
        ("_wbe._tcp.service.", "SRV", LookUp, "warm wbe"),
        ("_wbe._tcp.service.", "SRV", Absent, "forward"),
        ("_web._udp.service.", "SRV", Absent, "NXDomain"),
        ("_web._udp.service.", "SRV", LookUp, "NXDomain"),
        ("a.web.service.", "A", LookUp, "forward"),
        ("a.WEB.service.", "SRV", Absent, "forward"),
        ("_tcp.web.service.", "SRV", Absent, "forward"),
        ("_web._primary.service.", "SRV", Absent, "forward"),
        ("a.wbe.service.", "A", LookUp, "forward"),
        ("0.nohop-loop.service.", "A", LookUp, "forward"),
        ("_tcp.service.", "A", Absent, "NoError"),
        ("service.", "SOA", LookUp, "NoError"),
        ("1.0.128.127.in-addr.arpa.", "PTR", LookUp, "NoError"),
    ];
    for (name, query_type, missing, expected) in rows {
        let got = outcome(&query(name, query_type), &forward, 7, true, missing);
        assert_eq!(got, expected, "{name} {query_type}, {missing:?}");
    }
}

#[test]
fn a_name_that_nobody_answered_for_is_never_one_that_does_not_exist() {
    // Names that the table doesn't have, by every type; then names that it has.
    let unknown = [
        ("wbe.service.", "A"),
        ("WBE.service.", "AAAA"),
        ("wbe.service.", "SRV"),
        ("wbe.service.", "ANY"),
        ("wbe.service.", "TXT"),
        ("_wbe._tcp.service.", "SRV"),
        ("_wbe._udp.service.", "ANY"),
        ("9.9.128.127.in-addr.arpa.", "PTR"),
    ];
    let config = Config::default().dns;
    for (name, query_type) in unknown {
        for (missing, expected) in [(Absent, "NXDomain"), (Unknown, "ServFail")] {
            let got = outcome(&query(name, query_type), &config, 7, true, missing);
            assert_eq!(got, expected, "{name} {query_type}, {missing:?}");
        }
    }
    // The table has all VIPs, so addresses aren't looked up.
    let reverse = query("9.9.128.127.in-addr.arpa.", "PTR");
    assert_eq!(outcome(&reverse, &config, 7, true, LookUp), "NXDomain");
    let known = [
        ("web.service.", "A", "NoError web"),
        ("_web._tcp.service.", "SRV", "NoError web"),
        ("_web._udp.service.", "SRV", "NXDomain"),
        ("a.wbe.service.", "A", "NXDomain"),
        ("_tcp.service.", "A", "NoError"),
    ];
    for (name, query_type, expected) in known {
        let got = outcome(&query(name, query_type), &config, 7, true, Unknown);
        assert_eq!(got, expected, "{name} {query_type}");
    }
}

#[test]
fn a_cold_service_that_was_never_read_has_no_address_yet() {
    let config = Config::default().dns;
    let backends = vec![backend("10.0.0.7:1")];
    for (watch, backends, missing, expected) in [
        (Watch::Cold, vec![], LookUp, "warm web"),
        (Watch::Cold, vec![], Unknown, "ServFail"),
        (Watch::Cold, backends, Unknown, "NoError"),
        (Watch::Live, vec![], Unknown, "NoError web"),
    ] {
        let mut table = table(7);
        let mut web = Service::clone(&table.services["web"]);
        (web.watch, web.backends) = (watch, backends);
        table.services.insert("web".into(), Arc::new(web));
        let got = outcome_in(table, &query("web.service.", "A"), &config, true, missing);
        assert_eq!(got, expected, "{watch:?} {missing:?}");
    }
}

#[test]
fn questions_that_are_no_questions() {
    let good = query("web.service.", "A");
    let with = |idx: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[idx] = byte;
        bytes
    };
    let last = good.len() - 1;
    let rows = [
        ("an answer", with(2, 0x81), "drop"),
        ("half a header", good[..11].to_vec(), "drop"),
        ("nothing", Vec::new(), "drop"),
        ("an update", with(2, 5 << 3), "NotImp"),
        ("no question", with(5, 0), "FormErr"),
        ("two questions", with(5, 2), "FormErr"),
        ("a question cut off", good[..last].to_vec(), "drop"),
        ("records that aren't there", with(7, 1), "FormErr"),
        ("class CH", with(last, 3), "Refused"),
    ];
    let config = Config::default().dns;
    for (what, bytes, expected) in rows {
        assert_eq!(outcome(&bytes, &config, 7, true, Absent), expected, "{what}");
    }
}

/// Questions that are nearly right.
fn spoiled() -> impl Strategy<Value = Vec<u8>> {
    let names = ["web.service.", "_six._tcp.service.", "1.0.128.127.in-addr.arpa.", "x.service."];
    let types = prop_oneof![Just("A"), Just("SRV"), Just("PTR"), Just("ANY"), Just("SOA")];
    let asked = (0..names.len(), types).prop_map(move |(idx, kind)| query(names[idx], kind));
    let spoils = proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 0..4);
    let tail = proptest::collection::vec(any::<u8>(), 0..40);
    (asked, spoils, tail).prop_map(|(mut bytes, spoils, tail)| {
        bytes.extend(tail);
        for (idx, byte) in spoils {
            let idx = idx.index(bytes.len());
            bytes[idx] = byte;
        }
        bytes
    })
}

proptest! {
    /// Whatever comes: no panic, and what is sent is an answer to it that can be read, no longer
    /// than the client takes.
    #[test]
    fn garbage_does_no_harm(
        bytes in prop_oneof![proptest::collection::vec(any::<u8>(), 0..600), spoiled()],
        tcp in any::<bool>(),
    ) {
        let zone = zone(&Config::default().dns);
        let snapshot = TableSnapshot::new(Arc::new(table(7)));
        let known = ResolveContext { zone: &zone, snapshot: &snapshot, attached: true, waits: false, missing: Absent };
        let transport = if tcp { Transport::Tcp } else { Transport::Udp };
        let mut out = Vec::new();
        if let Resolution::Reply(..) = answer(&bytes, transport, known, &mut out) {
            assert_eq!(out[..2], bytes[..2]);
            assert_eq!(out[2] & 0x80, 0x80);
            assert!(tcp || out.len() <= 4096);
            Message::from_vec(&out).unwrap();
        }
    }
}

#[test]
fn what_does_not_fit() {
    // The longest name of a service, in a domain of nearly all the rest.
    let part = "d".repeat(59);
    let domain = format!("{part}.{part}.{part}");
    let config = DnsConfig { domain: domain.clone(), ..Config::default().dns };
    let name = "n".repeat(63);
    let mut table = table(7);
    let mut service = Service::clone(&table.services["six"]);
    service.name = name.as_str().into();
    table.services.insert(name.as_str().into(), Arc::new(service));
    let (zone, snapshot) = (zone(&config), TableSnapshot::new(Arc::new(table)));
    let known = ResolveContext {
        zone: &zone,
        snapshot: &snapshot,
        attached: true,
        waits: false,
        missing: Absent,
    };
    let asked = query(&format!("{name}.{domain}."), "SRV");
    for (transport, is_cut) in [(Transport::Udp, true), (Transport::Tcp, false)] {
        let mut out = Vec::new();
        answer(&asked, transport, known, &mut out);
        let message = Message::from_vec(&out).unwrap();
        assert_eq!(message.metadata.truncation, is_cut, "{transport}");
        assert_eq!(message.additionals.len(), if is_cut { 0 } else { 2 }, "{transport}");
        assert_eq!(message.answers.len(), usize::from(!is_cut), "{transport}");
    }
}
