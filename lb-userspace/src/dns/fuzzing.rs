//! Messages from the network, for fuzzers: what clients ask, and what other resolvers answer.

use std::sync::Arc;

use hickory_proto::op::Message;

use super::encode::{self, OUR_PAYLOAD};
use super::message::{ClientQuery, HEADER_LEN};
use super::resolve::Missing::{Absent, LookUp, Unknown};
use super::resolve::{Resolution, ResolveContext, TableSnapshot, Zone, answer};
use super::response::{RelayOptions, UpstreamResponse};
use super::sockets::Transport;
use crate::config::{Config, DnsConfig};
use crate::table::{Ports, Protocols, Service, Table, Watch};

/// The daemon's response to a message by UDP from the table, where it has one of its own.
pub fn response(bytes: &[u8], table: &Table, config: &DnsConfig) -> Option<Vec<u8>> {
    let snapshot = TableSnapshot::new(Arc::new(table.clone()));
    let zone = Zone::new(config, []);
    let known = ResolveContext {
        zone: &zone,
        snapshot: &snapshot,
        attached: true,
        waits: false,
        missing: Absent,
    };
    let mut out = Vec::new();
    matches!(answer(bytes, Transport::Udp, known, &mut out), Resolution::Reply(..)).then_some(out)
}

/// A client's message: where the kernel answers it, it does as the daemon.
#[cfg(any(fuzzing, test))]
pub fn kernel(bytes: &[u8]) {
    let (table, config) = (table(), Config::default().dns);
    if let Some(by_kernel) = crate::datapath::answered_by_kernel(bytes, &table, &config) {
        assert_eq!(Some(by_kernel), response(bytes, &table, &config));
    }
}

/// A client's message, over both transports: nothing is answered that is no question, and an answer
/// has the question's id and name, fits, and can be read.
pub fn question(bytes: &[u8]) {
    let snapshot = TableSnapshot::new(Arc::new(table()));
    let pools = ["127.128.0.0/9", "fd00::/64"].iter().filter_map(|pool| pool.parse().ok());
    let zone = Zone::new(&Config::default().dns, pools);
    let is_question = bytes.len() >= HEADER_LEN && bytes[2] & 0x80 == 0;
    let mut out = Vec::new();
    for transport in [Transport::Udp, Transport::Tcp] {
        for (attached, waits, missing) in [
            (true, false, Absent),
            (true, false, LookUp),
            (true, false, Unknown),
            (false, true, Absent),
            (false, false, LookUp),
        ] {
            let known =
                ResolveContext { zone: &zone, snapshot: &snapshot, attached, waits, missing };
            match answer(bytes, transport, known, &mut out) {
                Resolution::Drop => {}
                Resolution::Reply(..) => {
                    assert!(is_question, "an answer is answered");
                    check(bytes, &out, max_len(bytes, transport));
                    assert!(Message::from_vec(&out).is_ok(), "{out:?}");
                }
                Resolution::Forward(query) => {
                    let mut bytes = Vec::new();
                    query.forwarded(OUR_PAYLOAD, &mut bytes);
                    assert!(ClientQuery::read(&bytes).is_ok(), "{query:?}");
                }
                Resolution::Wait => assert!(waits),
                Resolution::Warm(name) => {
                    assert!(missing == LookUp && name == name.to_ascii_lowercase());
                }
            }
        }
    }
}

/// Another resolver's message, in answer to a question of ours that has its id: what is passed on
/// has the client's id and question, fits, and would be taken from another resolver.
pub fn upstream(bytes: &[u8]) {
    for client in [&b""[..], EDNS] {
        let n_more = u8::from(!client.is_empty());
        let query = [&[9, 9, 1, 0, 0, 1, 0, 0, 0, 0, 0, n_more], EXAMPLE, client].concat();
        let Ok(answer) = UpstreamResponse::read(bytes, EXAMPLE) else { continue };
        let Ok(asked_again) = ClientQuery::read(&query) else { continue };
        for (transport, max_ttls) in
            [(Transport::Udp, None), (Transport::Tcp, None), (Transport::Tcp, Some((30, 5)))]
        {
            let max_len = max_len(&query, transport);
            let mut reply = Vec::new();
            let how = RelayOptions { max_len, keeps_ad: false, max_ttls };
            answer.relay_to(&asked_again.client(), how, &mut reply);
            check(&query, &reply, max_len);
            // Its records are the other resolver's, whatever hickory thinks of them.
            assert!(UpstreamResponse::read(&reply, EXAMPLE).is_ok(), "{reply:?}");
        }
    }
}

/// `Example.com`, type A, class IN.
const EXAMPLE: &[u8] = b"\x07Example\x03com\x00\x00\x01\x00\x01";

/// An OPT record with room for 1,232 bytes.
const EDNS: &[u8] = &[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0];

fn max_len(bytes: &[u8], transport: Transport) -> usize {
    match (transport, ClientQuery::read(bytes)) {
        (_, Ok(query)) => encode::max_len(&query, transport),
        (Transport::Tcp, Err(_)) => u16::MAX.into(),
        (Transport::Udp, Err(_)) => 512,
    }
}

fn check(question: &[u8], reply: &[u8], max_len: usize) {
    assert!(reply.len() <= max_len, "{} bytes where {max_len} fit", reply.len());
    assert_eq!(reply[..2], question[..2], "another id");
    assert!(reply[2] & 0x80 != 0 && (reply[2] ^ question[2]) & 0x79 == 0, "{:02x}", reply[2]);
    if let Ok(query) = ClientQuery::read(question) {
        let head = &query.head()[HEADER_LEN..];
        assert!(reply[HEADER_LEN..].starts_with(head), "another question: {reply:?}");
    }
}

fn table() -> Table {
    let rows = [
        ("web", Ports::only([80]), Protocols::Tcp, Watch::Live),
        ("any", Ports::Any, Protocols::Both, Watch::Live),
        ("dns", Ports::only([53, 80]), Protocols::Udp, Watch::Cold),
    ];
    let services = rows.into_iter().zip(1u8..).map(|((name, ports, protocols, watch), last)| {
        let name: Arc<str> = name.into();
        let service = Service {
            name: name.clone(),
            vip: [127, 128, 0, last].into(),
            vip6: Some([0xfd00, 0, 0, 0, 0, 0, 0, last.into()].into()),
            ports,
            protocols,
            algorithm: Default::default(),
            pin: None,
            public: Vec::new(),
            backends: Vec::new(),
            excluded: Vec::new(),
            notes: Vec::new(),
            watch,
            generation: 1,
        };
        (name, Arc::new(service))
    });
    Table { generation: 1, services: services.collect(), ..Table::default() }
}
