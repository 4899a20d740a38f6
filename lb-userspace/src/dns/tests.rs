//! The whole server on sockets of 127.0.0.1, asked over them, with resolvers of the test's own.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hickory_proto::op::{Edns, Message, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::relay::ForwardLimits;
use super::server::ServerOptions;
use super::{AnswerOrigin, DnsServer, Sockets, Transport, UpstreamState, UpstreamStats, bind};
use crate::catalog::UsageSender;
use crate::config::{Config, DnsConfig, Forward};
use crate::table::{Service, Table};

mod answers;
mod live;
mod tls;
mod upstreams;

/// For what must happen; a test that waits so long has failed.
const LONG: Duration = Duration::from_secs(60);

/// A server, and what it depends on.
struct Rig {
    server: DnsServer,
    address: SocketAddr,
    /// The address of TLS, where it is served.
    tls_address: SocketAddr,
    table: watch::Sender<Arc<Table>>,
    attached: watch::Sender<bool>,
}

impl Rig {
    /// A server with the service `web`, which forwards to `servers`.
    async fn new(servers: &[SocketAddr]) -> Rig {
        let forward = Forward::Servers(servers.to_vec());
        let config = DnsConfig { forward, ..Config::default().dns };
        Rig::with(config, ServerOptions::default()).await
    }

    async fn with(config: DnsConfig, options: ServerOptions) -> Rig {
        Rig::with_demand(config, options, UsageSender::default()).await
    }

    async fn with_demand(
        mut config: DnsConfig,
        options: ServerOptions,
        demand: UsageSender,
    ) -> Rig {
        config.listen = vec![SocketAddr::from(([127, 0, 0, 1], 0))];
        let sockets = bind(&config).await.unwrap();
        let address = sockets.addresses()[0];
        let tls_address = sockets.tls_addresses().first().copied().unwrap_or(address);
        let (table, table_rx) = watch::channel(Arc::new(web(1)));
        let (attached, attached_rx) = watch::channel(true);
        let server =
            DnsServer::start_in(options, sockets, &config, &[], table_rx, attached_rx, demand)
                .unwrap();
        Rig { server, address, tls_address, table, attached }
    }

    async fn ask(&self, transport: Transport, message: &Message) -> Message {
        let bytes = self.ask_bytes(transport, &message.to_vec().unwrap()).await;
        Message::from_vec(&bytes).unwrap()
    }

    async fn ask_bytes(&self, transport: Transport, bytes: &[u8]) -> Vec<u8> {
        let exchange = async {
            match transport {
                Transport::Udp => {
                    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                    socket.connect(self.address).await.unwrap();
                    socket.send(bytes).await.unwrap();
                    let mut buffer = vec![0; 65_535];
                    let len = socket.recv(&mut buffer).await.unwrap();
                    buffer.truncate(len);
                    buffer
                }
                Transport::Tcp => {
                    let mut stream = TcpStream::connect(self.address).await.unwrap();
                    write_message(&mut stream, bytes).await;
                    read_message(&mut stream).await.unwrap()
                }
            }
        };
        timeout(LONG, exchange).await.unwrap()
    }

    /// The code and the first record of the answer for an address.
    async fn lookup(&self, name: &str) -> String {
        let answer = self.ask(Transport::Udp, &query(name, RecordType::A)).await;
        let data = answer.answers.first().map(|record| format!(" {}", record.data));
        format!("{:?}{}", answer.metadata.response_code, data.unwrap_or_default())
    }
}

/// A table with one service.
fn web(generation: u64) -> Table {
    let service = Service { generation, ..Service::example(Vec::new()) };
    let services = [("web".into(), Arc::new(service))].into();
    Table { generation, services, ..Table::default() }
}

fn query(name: &str, query_type: RecordType) -> Message {
    let mut message = Message::query();
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), query_type));
    message.metadata.recursion_desired = true;
    message
}

fn with_edns(mut message: Message, version: u8, max_payload: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_version(version).set_max_payload(max_payload).set_dnssec_ok(true);
    message.set_edns(edns);
    message
}

async fn write_message(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) {
    let len = u16::try_from(bytes.len()).unwrap();
    stream.write_all(&[&len.to_be_bytes(), bytes].concat()).await.unwrap();
}

async fn read_message(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0; usize::from(stream.read_u16().await?)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// A resolver with responses of the test, over UDP and TCP, until it is dropped.
struct FakeUpstream {
    address: SocketAddr,
    asked: mpsc::UnboundedReceiver<(Transport, Message)>,
    _tasks: JoinSet<()>,
}

impl FakeUpstream {
    /// A resolver whose messages for each question come from `answers`.
    async fn new<F>(answers: F) -> FakeUpstream
    where
        F: Fn(Transport, &Message) -> Vec<Message> + Clone + Send + 'static,
    {
        let config =
            DnsConfig { listen: vec!["127.0.0.1:0".parse().unwrap()], ..Config::default().dns };
        let sockets = bind(&config).await.unwrap();
        let address = sockets.addresses()[0];
        let (sender, asked) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        for socket in sockets.udp {
            let socket = UdpSocket::from_std(socket).unwrap();
            tasks.spawn(Self::serve_udp(socket, answers.clone(), sender.clone()));
        }
        for listener in sockets.tcp {
            let listener = TcpListener::from_std(listener).unwrap();
            tasks.spawn(Self::serve_tcp(listener, answers.clone(), sender.clone()));
        }
        FakeUpstream { address, asked, _tasks: tasks }
    }

    /// A resolver with one address for every name.
    async fn of(ip: [u8; 4]) -> FakeUpstream {
        FakeUpstream::new(move |_, asked| vec![answer(asked, ip)]).await
    }

    /// A resolver that answers nothing.
    async fn silent() -> FakeUpstream {
        FakeUpstream::new(|_, _| Vec::new()).await
    }

    async fn serve_udp<F>(
        socket: UdpSocket,
        answers: F,
        asked: mpsc::UnboundedSender<(Transport, Message)>,
    ) where
        F: Fn(Transport, &Message) -> Vec<Message>,
    {
        let mut buffer = vec![0; 65_535];
        while let Ok((len, client)) = socket.recv_from(&mut buffer).await {
            let message = Message::from_vec(&buffer[..len]).unwrap();
            for answer in answers(Transport::Udp, &message) {
                socket.send_to(&answer.to_vec().unwrap(), client).await.unwrap();
            }
            // What looks for circles comes at its own times.
            if !message.queries[0].name.to_string().contains(".nohop-loop.") {
                let _ = asked.send((Transport::Udp, message));
            }
        }
    }

    async fn serve_tcp<F>(
        listener: TcpListener,
        answers: F,
        asked: mpsc::UnboundedSender<(Transport, Message)>,
    ) where
        F: Fn(Transport, &Message) -> Vec<Message> + Clone + Send + 'static,
    {
        let mut connections = JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            let (answers, asked) = (answers.clone(), asked.clone());
            connections.spawn(async move {
                while let Ok(bytes) = read_message(&mut stream).await {
                    let message = Message::from_vec(&bytes).unwrap();
                    for answer in answers(Transport::Tcp, &message) {
                        write_message(&mut stream, &answer.to_vec().unwrap()).await;
                    }
                    let _ = asked.send((Transport::Tcp, message));
                }
            });
        }
    }

    async fn next_asked(&mut self) -> (Transport, Message) {
        timeout(LONG, self.asked.recv()).await.unwrap().unwrap()
    }
}

/// An answer to `asked` without records.
fn code(asked: &Message, code: ResponseCode) -> Message {
    let mut message = Message::error_msg(asked.metadata.id, OpCode::Query, code);
    message.add_queries(asked.queries.iter().cloned());
    message.edns = asked.edns.clone();
    message
}

/// An answer to `asked`, with one address.
fn answer(asked: &Message, ip: [u8; 4]) -> Message {
    let mut message = code(asked, ResponseCode::NoError);
    let name = asked.queries[0].name.clone();
    message.add_answer(Record::from_rdata(name, 60, RData::A(Ipv4Addr::from(ip).into())));
    message
}

/// An answer to `asked`, of about `n` times 200 bytes.
fn long_answer(asked: &Message, n: usize) -> Message {
    let mut message = code(asked, ResponseCode::NoError);
    for idx in 0..n {
        let text = TXT::new(vec![format!("{idx:0>187}")]);
        let name = asked.queries[0].name.clone();
        message.add_answer(Record::from_rdata(name, 60, RData::TXT(text)));
    }
    message
}

/// For what never gets a response, so that nothing races with the timeout.
fn quick() -> ServerOptions {
    let limits = ForwardLimits { patience: Duration::from_millis(200), ..ForwardLimits::default() };
    ServerOptions { limits, ..ServerOptions::default() }
}

/// Options by which a test fails, after [`LONG`], that waits for an upstream's time-out.
fn patient() -> ServerOptions {
    let limits = ForwardLimits { patience: LONG * 10, ..ForwardLimits::default() };
    ServerOptions { limits, ..ServerOptions::default() }
}

#[tokio::test]
async fn a_service_is_answered_over_both_transports() {
    let rig = Rig::new(&[]).await;
    for transport in [Transport::Udp, Transport::Tcp] {
        let asked = query("WeB.service.", RecordType::A);
        let answer = rig.ask(transport, &asked).await;
        assert_eq!(answer.metadata.id, asked.metadata.id);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert!(answer.metadata.recursion_desired && !answer.metadata.truncation);
        assert!(answer.queries[0].name.eq_case(&asked.queries[0].name), "{answer}");
        assert_eq!(answer.answers[0].data, RData::A(Ipv4Addr::new(127, 128, 0, 1).into()));
        assert!(answer.edns.is_none());

        let answer = rig.ask(transport, &query("wbe.service.", RecordType::AAAA)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(answer.authorities[0].record_type(), RecordType::SOA);
    }
}

#[tokio::test]
async fn each_answer_is_of_its_moment() {
    let rig = Rig::new(&[]).await;
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
    rig.table.send_replace(Arc::new(Table { generation: 2, ..Table::default() }));
    assert_eq!(rig.lookup("web.service.").await, "NXDomain");
    rig.table.send_replace(Arc::new(Table::default()));
    assert_eq!(rig.lookup("web.service.").await, "ServFail");
    rig.table.send_replace(Arc::new(web(3)));
    rig.attached.send_replace(false);
    assert_eq!(rig.lookup("web.service.").await, "ServFail");
    rig.attached.send_replace(true);
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn edns_is_echoed_and_other_versions_are_refused() {
    let rig = Rig::new(&[]).await;
    let asked = with_edns(query("web.service.", RecordType::A), 0, 1232);
    let answer = rig.ask(Transport::Udp, &asked).await;
    let edns = answer.edns.unwrap();
    assert!(edns.version() == 0 && edns.flags().dnssec_ok, "{edns}");
    assert_eq!(answer.answers.len(), 1);

    for name in ["web.service.", "example.com."] {
        let asked = with_edns(query(name, RecordType::A), 1, 1232);
        let answer = rig.ask(Transport::Udp, &asked).await;
        // Two codes have the number 16; hickory reads it as the other.
        let expected = u16::from(ResponseCode::BADVERS);
        assert_eq!(u16::from(answer.metadata.response_code), expected);
        assert_eq!(answer.edns.unwrap().version(), 0);
        assert!(answer.answers.is_empty());
    }
}

#[tokio::test]
async fn malformed_messages_do_no_harm() {
    let rig = Rig::new(&[]).await;
    let good = query("web.service.", RecordType::A).to_vec().unwrap();
    let with = |idx: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[idx] = byte;
        bytes
    };
    let loop_name = [&good[..12], &[0xc0, 12, 0, 1, 0, 1]].concat();
    let mut two = query("web.service.", RecordType::A);
    two.add_query(Query::query(Name::root(), RecordType::A));
    let two = two.to_vec().unwrap();
    let rows = [
        ("no question", good[..12].iter().map(|_| 0).collect(), ResponseCode::FormErr),
        ("two questions", two, ResponseCode::FormErr),
        ("a record missing", with(7, 1), ResponseCode::FormErr),
        ("many questions missing", with(4, 255), ResponseCode::FormErr),
        ("a status request", with(2, 2 << 3), ResponseCode::NotImp),
        ("an unassigned opcode", with(2, 15 << 3), ResponseCode::NotImp),
    ];
    for (what, bytes, expected) in rows {
        for transport in [Transport::Udp, Transport::Tcp] {
            let answer = rig.ask_bytes(transport, &bytes).await;
            let answer = Message::from_vec(&answer).unwrap();
            assert_eq!(answer.metadata.response_code, expected, "{what}, {transport}");
        }
    }

    // What has no question that could be answered is dropped and counted.
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for bytes in [&loop_name, &good[..20], &good[..11], &[]] {
        socket.send_to(bytes, rig.address).await.unwrap();
    }
    timeout(LONG, async {
        while rig.server.stats().snapshot().get("malformed") != Some(&4) {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();

    // What gets no answer, or any: every single byte wrong, and every length.
    for idx in 0..good.len() {
        for bytes in [with(idx, 0xff), with(idx, 0xc0), good[..idx].to_vec()] {
            socket.send_to(&bytes, rig.address).await.unwrap();
        }
    }
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn other_names_are_forwarded_as_they_came() {
    let mut upstream = FakeUpstream::new(|_, asked| {
        let mut message = answer(asked, [192, 0, 2, 7]);
        message.metadata.response_code = ResponseCode::NXDomain;
        message.metadata.authentic_data = true;
        message.metadata.checking_disabled = asked.metadata.checking_disabled;
        message.metadata.recursion_desired = asked.metadata.recursion_desired;
        let other = message.answers[0].clone();
        // A type that hickory has no name for here, whose data must stay as it is.
        let data = RData::Unknown {
            code: RecordType::Unknown(65_280),
            rdata: hickory_proto::rr::rdata::NULL::with(vec![1, 2, 3]),
        };
        let unknown = Record::from_rdata(other.name.clone(), 1, data);
        message.authorities = vec![other.clone(), unknown];
        message.additionals = vec![other];
        vec![message]
    })
    .await;
    let rig = Rig::new(&[upstream.address]).await;
    for transport in [Transport::Udp, Transport::Tcp] {
        let mut asked = with_edns(query("ExAmple.com.", RecordType::A), 0, 1400);
        asked.metadata.checking_disabled = true;
        let got = rig.ask(transport, &asked).await;
        let (asked_over, seen) = upstream.next_asked().await;

        assert_eq!(asked_over, transport);
        assert!(seen.queries[0].name.eq_case(&asked.queries[0].name));
        let (seen_edns, edns) = (seen.edns.unwrap(), asked.edns.as_ref().unwrap());
        assert_eq!(seen_edns.flags(), edns.flags());
        assert_eq!(seen_edns.max_payload(), 1232);
        assert!(seen.metadata.checking_disabled && seen.metadata.recursion_desired);

        assert_eq!(got.metadata.id, asked.metadata.id);
        assert!(got.queries[0].name.eq_case(&asked.queries[0].name));
        assert_eq!(got.metadata.response_code, ResponseCode::NXDomain);
        let metadata = got.metadata;
        assert!(metadata.authentic_data && metadata.checking_disabled);
        assert!(metadata.recursion_desired && metadata.recursion_available);
        assert!(!metadata.authoritative && got.edns.unwrap().flags().dnssec_ok);
        let n_records = [got.answers.len(), got.authorities.len(), got.additionals.len()];
        assert_eq!(n_records, [1, 2, 1]);
        assert_eq!(got.authorities[1].record_type(), RecordType::Unknown(65_280));
    }
}

#[tokio::test]
async fn wrong_answers_are_ignored() {
    let upstream = FakeUpstream::new(|_, asked| {
        let mut wrong_id = answer(asked, [192, 0, 2, 66]);
        wrong_id.metadata.id ^= 1;
        let mut wrong_question = answer(asked, [192, 0, 2, 67]);
        wrong_question.queries[0].set_name(Name::from_ascii("example.org.").unwrap());
        let no_answer = asked.clone();
        vec![wrong_id, wrong_question, no_answer, answer(asked, [192, 0, 2, 7])]
    })
    .await;
    let rig = Rig::new(&[upstream.address]).await;
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.7");
}

#[tokio::test]
async fn a_truncated_answer_is_passed_on_and_tcp_gets_it_all() {
    let upstream = FakeUpstream::new(|transport, asked| {
        let full = long_answer(asked, 20);
        vec![if transport == Transport::Udp { full.truncate() } else { full }]
    })
    .await;
    let rig = Rig::new(&[upstream.address]).await;
    let asked = query("example.com.", RecordType::TXT);
    let got = rig.ask(Transport::Udp, &asked).await;
    assert!(got.metadata.truncation && got.answers.is_empty());
    let got = rig.ask(Transport::Tcp, &asked).await;
    assert!(!got.metadata.truncation);
    assert_eq!(got.answers.len(), 20);
}

#[tokio::test]
async fn udp_answers_keep_to_the_clients_size() {
    // This resolver gives its own size as 512, as some do, whatever it sends.
    let upstream = FakeUpstream::new(|_, asked| {
        let mut message = long_answer(asked, 3);
        message.edns = asked.edns.clone().map(|mut edns| {
            edns.set_max_payload(512);
            edns
        });
        vec![message]
    })
    .await;
    let rig = Rig::new(&[upstream.address]).await;
    for (max_payload, expected) in [(1232, 3), (700, 3), (600, 0), (0, 0)] {
        let mut asked = query("example.com.", RecordType::TXT);
        if max_payload > 0 {
            asked = with_edns(asked, 0, max_payload);
        }
        let got = rig.ask(Transport::Udp, &asked).await;
        assert_eq!(got.answers.len(), expected, "{max_payload}");
        assert_eq!(got.metadata.truncation, expected == 0, "{max_payload}");
        assert_eq!(got.edns.is_some(), max_payload > 0, "{max_payload}");
    }
}

#[tokio::test]
async fn the_next_resolver_stands_in() {
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refusing = FakeUpstream::new(|_, asked| vec![code(asked, ResponseCode::Refused)]).await;
    let failing = FakeUpstream::new(|_, asked| vec![code(asked, ResponseCode::ServFail)]).await;
    let silent = FakeUpstream::silent().await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let (refusing, failing) = (refusing.address, failing.address);
    let (silent, good) = (silent.address, good.address);
    let rows: [(&[SocketAddr], &str); 8] = [
        (&[silent, good], "NoError 192.0.2.7"),
        (&[closed, good], "NoError 192.0.2.7"),
        (&[refusing, failing, good], "NoError 192.0.2.7"),
        (&[refusing, failing], "Refused"),
        (&[silent, failing, closed], "ServFail"),
        (&[silent], "ServFail"),
        (&[closed], "ServFail"),
        (&[], "Refused"),
    ];
    for (servers, expected) in rows {
        let config =
            DnsConfig { forward: Forward::Servers(servers.to_vec()), ..Config::default().dns };
        let rig = Rig::with(config, ServerOptions::default()).await;
        assert_eq!(rig.lookup("example.com.").await, expected, "{servers:?}");
    }
}

#[tokio::test]
async fn routes_go_by_the_longest_suffix() {
    let (consul, dc2, other) = (
        FakeUpstream::of([192, 0, 2, 1]).await,
        FakeUpstream::of([192, 0, 2, 2]).await,
        FakeUpstream::of([192, 0, 2, 3]).await,
    );
    let config = DnsConfig {
        forward: Forward::Servers(vec![other.address]),
        routes: BTreeMap::from([
            ("consul".into(), consul.address),
            ("dc2.consul".into(), dc2.address),
        ]),
        ..Config::default().dns
    };
    let rig = Rig::with(config, ServerOptions::default()).await;
    assert_eq!(rig.lookup("web.service.consul.").await, "NoError 192.0.2.1");
    assert_eq!(rig.lookup("web.service.DC2.consul.").await, "NoError 192.0.2.2");
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.3");
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn what_is_reconfigured_counts_from_the_next_question_on() {
    let (first, second) =
        (FakeUpstream::of([192, 0, 2, 1]).await, FakeUpstream::of([192, 0, 2, 2]).await);
    let rig = Rig::new(&[first.address]).await;
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.1");
    let forward = Forward::Servers(vec![second.address]);
    rig.server.reconfigure(&DnsConfig { ttl: 7, forward, ..Config::default().dns });
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.2");
    let answer = rig.ask(Transport::Udp, &query("web.service.", RecordType::A)).await;
    assert_eq!(answer.answers[0].ttl, 7);
    assert_eq!(rig.lookup("nobody.service.").await, "NXDomain");

    let counted = BTreeMap::from([("NOERROR".into(), 3), ("NXDOMAIN".into(), 1)]);
    assert_eq!(rig.server.stats().snapshot(), counted);
}

#[tokio::test]
async fn nothing_is_forwarded_to_ourselves() {
    // Find a port, then serve it with a configuration that names it.
    let any = vec!["127.0.0.1:0".parse().unwrap()];
    let sockets = bind(&DnsConfig { listen: any, ..Config::default().dns }).await.unwrap();
    let address = sockets.addresses()[0];
    let config = DnsConfig {
        forward: Forward::Servers(vec![address]),
        routes: BTreeMap::from([("consul".into(), address)]),
        ..Config::default().dns
    };
    let (table, table_rx) = watch::channel(Arc::new(web(1)));
    let (attached, attached_rx) = watch::channel(true);
    let usage = UsageSender::default();
    let server =
        DnsServer::start_in(patient(), sockets, &config, &[], table_rx, attached_rx, usage)
            .unwrap();
    let rig = Rig { server, address, tls_address: address, table, attached };
    for name in ["example.com.", "web.service.consul."] {
        assert_eq!(rig.lookup(name).await, "ServFail", "{name}");
    }
    let problems = rig.server.debug_client().problems();
    for part in ["dns.routes sends consul to ", "dns.forward names no resolver but this one"] {
        assert!(problems.iter().any(|problem| problem.contains(part)), "{part}: {problems:?}");
    }
}

/// An empty `dns.forward`: other names are refused, but those of `dns.routes`, and that is no problem.
#[tokio::test]
async fn nothing_is_forwarded_where_that_is_wanted() {
    let upstream = FakeUpstream::new(|_, asked| vec![answer(asked, [192, 0, 2, 1])]).await;
    let config = DnsConfig {
        forward: Forward::Servers(Vec::new()),
        routes: BTreeMap::from([("consul".into(), upstream.address)]),
        ..Config::default().dns
    };
    let rig = Rig::with(config, patient()).await;
    for transport in [Transport::Udp, Transport::Tcp] {
        let answer = rig.ask(transport, &query("example.com.", RecordType::A)).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{transport:?}");
    }
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
    assert_eq!(rig.lookup("nobody.service.").await, "NXDomain");
    assert_eq!(rig.lookup("db.consul.").await, "NoError 192.0.2.1");
    assert_eq!(rig.server.debug_client().problems(), [""; 0]);
}

#[tokio::test]
async fn resolv_conf_without_a_nameserver_fails_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let null = "/dev/null names no nameserver but this one, so names outside the zone fail; name one there";
    let rows = [
        (dir.path().join("absent"), "absent (No such file or directory (os error 2)), so names"),
        (PathBuf::from("/dev/null"), null),
    ];
    for (resolv_conf, expected) in rows {
        let options = ServerOptions { resolv_conf, ..patient() };
        let rig = Rig::with(Config::default().dns, options).await;
        let problems = rig.server.debug_client().problems();
        assert!(problems.len() == 1 && problems[0].contains(expected), "{problems:?}");
        assert!(problems[0].contains("or to [] to forward nothing"), "{problems:?}");
        assert_eq!(rig.lookup("example.com.").await, "ServFail");
        assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
    }
}

#[tokio::test]
async fn what_is_in_flight_is_bounded_and_the_oldest_goes_first() {
    let mut silent = FakeUpstream::silent().await;
    let config =
        DnsConfig { forward: Forward::Servers(vec![silent.address]), ..Config::default().dns };
    let limits = ForwardLimits { patience: LONG * 10, max_waiting: 1, ..ForwardLimits::default() };
    let rig = Rig::with(config, ServerOptions { limits, ..ServerOptions::default() }).await;

    // From one socket, so that one thread has both.
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(rig.address).await.unwrap();
    for name in ["example.com.", "example.org."] {
        client.send(&query(name, RecordType::A).to_vec().unwrap()).await.unwrap();
        silent.next_asked().await;
    }
    let mut buffer = [0; 512];
    let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..len]).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries[0].name.to_string(), "example.com.");
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn answers_over_udp_fit_into_one_packet() {
    // This resolver sends as much as the client takes, whatever size was advertised.
    let mut upstream = FakeUpstream::new(|_, asked| vec![long_answer(asked, 15)]).await;
    let rig = Rig::new(&[upstream.address]).await;
    for (name, is_truncated) in [("example.com.", true), ("web.service.", false)] {
        let asked = with_edns(query(name, RecordType::TXT), 0, 4096);
        let bytes = rig.ask_bytes(Transport::Udp, &asked.to_vec().unwrap()).await;
        assert!(bytes.len() <= 1232, "{} bytes", bytes.len());
        assert_eq!(Message::from_vec(&bytes).unwrap().metadata.truncation, is_truncated);
    }
    let (_, seen) = upstream.next_asked().await;
    assert_eq!(seen.edns.unwrap().max_payload(), 1232);
    let asked = with_edns(query("example.com.", RecordType::TXT), 0, 4096);
    assert_eq!(rig.ask(Transport::Tcp, &asked).await.answers.len(), 15);
}

#[tokio::test]
async fn a_stop_frees_the_port() {
    let mut silent = FakeUpstream::silent().await;
    let rig = Rig::new(&[silent.address]).await;
    // A pending forwarded query, and a TCP connection that stays open.
    let waiting = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    waiting.send_to(&asked, rig.address).await.unwrap();
    silent.next_asked().await;
    let mut stream = TcpStream::connect(rig.address).await.unwrap();
    write_message(&mut stream, &query("web.service.", RecordType::A).to_vec().unwrap()).await;
    read_message(&mut stream).await.unwrap();

    timeout(LONG, rig.server.stop()).await.unwrap();
    let config = DnsConfig { listen: vec![rig.address], ..Config::default().dns };
    bind(&config).await.unwrap();
}

#[tokio::test]
async fn tcp_clients_that_dawdle_are_cut_off() {
    let options =
        ServerOptions { tcp_idle_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let rig = Rig::with(Config::default().dns, options).await;
    let question = query("web.service.", RecordType::A).to_vec().unwrap();
    let half = [&[0, question.len() as u8], &question[..20]].concat();
    for begun in [&[][..], &[0], &half] {
        let mut stream = TcpStream::connect(rig.address).await.unwrap();
        stream.write_all(begun).await.unwrap();
        let mut buffer = [0; 512];
        let read = timeout(LONG, stream.read(&mut buffer)).await.unwrap();
        assert!(matches!(read, Ok(0) | Err(_)), "{begun:?}: {read:?}");
    }
}

#[tokio::test]
async fn a_slow_name_holds_up_no_other_on_its_connection() {
    let mut silent = FakeUpstream::silent().await;
    let forward = Forward::Servers(vec![silent.address]);
    let rig = Rig::with(DnsConfig { forward, ..Config::default().dns }, patient()).await;
    let mut stream = TcpStream::connect(rig.address).await.unwrap();
    // As many as are answered at one time, but for one; the last name is ours.
    for n in 0..7 {
        let slow = query(&format!("slow{n}.example.com."), RecordType::A);
        write_message(&mut stream, &slow.to_vec().unwrap()).await;
    }
    silent.next_asked().await;
    let ours = query("web.service.", RecordType::A);
    write_message(&mut stream, &ours.to_vec().unwrap()).await;
    let first = timeout(LONG, read_message(&mut stream)).await.unwrap().unwrap();
    let first = Message::from_vec(&first).unwrap();
    assert_eq!(first.metadata.id, ours.metadata.id, "the answer that is there goes out first");
    assert_eq!(first.answers.len(), 1);
}

#[tokio::test]
async fn a_tcp_client_that_ended_its_side_gets_its_answers() {
    let upstream = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = Rig::new(&[upstream.address]).await;
    let mut stream = TcpStream::connect(rig.address).await.unwrap();
    for name in ["example.com.", "web.service.", "example.org."] {
        write_message(&mut stream, &query(name, RecordType::A).to_vec().unwrap()).await;
    }
    stream.shutdown().await.unwrap();
    for _ in 0..3 {
        let answer = timeout(LONG, read_message(&mut stream)).await.unwrap().unwrap();
        assert_eq!(Message::from_vec(&answer).unwrap().answers.len(), 1);
    }
    let mut buffer = [0; 1];
    assert_eq!(timeout(LONG, stream.read(&mut buffer)).await.unwrap().unwrap(), 0);
}

#[tokio::test]
async fn an_idle_tcp_connection_makes_room() {
    let rig = Rig::new(&[]).await;
    let question = query("web.service.", RecordType::A).to_vec().unwrap();
    let mut open = Vec::new();
    for _ in 0..=256 {
        let mut stream = TcpStream::connect(rig.address).await.unwrap();
        write_message(&mut stream, &question).await;
        timeout(LONG, read_message(&mut stream)).await.unwrap().unwrap();
        open.push(stream);
    }
    let mut buffer = [0; 512];
    let read = timeout(LONG, open[0].read(&mut buffer)).await.unwrap();
    assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
    write_message(&mut open[1], &question).await;
    timeout(LONG, read_message(&mut open[1])).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stop_lets_what_is_under_way_end() {
    let (ask, mut asked) = mpsc::unbounded_channel();
    let upstream = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let rig = Rig::new(&[upstream.local_addr().unwrap()]).await;
    let mut tasks = JoinSet::new();
    let (stopping, mut stops) = watch::channel(false);
    tasks.spawn(async move {
        let mut buffer = [0; 512];
        while let Ok((len, client)) = upstream.recv_from(&mut buffer).await {
            let message = Message::from_vec(&buffer[..len]).unwrap();
            if message.queries[0].name.to_string() == "example.com." {
                ask.send(()).unwrap();
                stops.wait_for(|stops| *stops).await.unwrap();
                let answer = answer(&message, [192, 0, 2, 7]).to_vec().unwrap();
                upstream.send_to(&answer, client).await.unwrap();
            }
        }
    });
    let udp = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    udp.connect(rig.address).await.unwrap();
    let question = query("example.com.", RecordType::A).to_vec().unwrap();
    udp.send(&question).await.unwrap();
    timeout(LONG, asked.recv()).await.unwrap().unwrap();
    stopping.send_replace(true);
    rig.server.stop().await;
    let mut buffer = [0; 512];
    let len = timeout(LONG, udp.recv(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(Message::from_vec(&buffer[..len]).unwrap().answers.len(), 1);
}
