//! What changes while the server runs, and clients and resolvers that keep it waiting.

use tokio::io::Interest;

use super::*;
use crate::catalog::{Lookup, LookupRequest, SourceCommand};
use crate::config::Unrouted;

#[tokio::test]
async fn all_but_listeners_and_domain_can_be_reconfigured() {
    let [first, second, consul] = [1, 2, 3].map(|last| FakeUpstream::of([192, 0, 2, last]));
    let (first, second, consul) = (first.await, second.await, consul.await);
    let rig = Rig::new(&[first.address]).await;
    let debug_client = rig.server.debug_client();
    assert_eq!(rig.lookup("nobody.service.").await, "NXDomain");
    assert_eq!(debug_client.unrouted(), Unrouted::Nxdomain);

    rig.server.reconfigure(&DnsConfig {
        forward: Forward::Servers(vec![second.address]),
        routes: BTreeMap::from([("consul".into(), consul.address)]),
        unrouted: Unrouted::Forward,
        allow: Vec::new(),
        client_rate: 1,
        ..Config::default().dns
    });
    // The host itself is served whatever `allow` and the rate say.
    let rows = [
        ("example.com.", "NoError 192.0.2.2"),
        ("web.service.consul.", "NoError 192.0.2.3"),
        ("nobody.service.", "NoError 192.0.2.2"),
        ("web.service.", "NoError 127.128.0.1"),
    ];
    for (name, expected) in rows {
        assert_eq!(rig.lookup(name).await, expected, "{name}");
    }
    assert_eq!(debug_client.unrouted(), Unrouted::Forward);
    let (_, origin) = debug_client.look_up("example.com", "A").await.unwrap();
    assert_eq!(origin, AnswerOrigin::Upstream(second.address));
}

/// A source that has an answer for `absent` alone; `rejected` exists but never comes into the table.
fn reluctant(demand: &UsageSender) -> JoinSet<()> {
    let mut wishes = demand.listen();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut kept = Vec::new();
        while let Some(wish) = wishes.recv().await {
            let SourceCommand::Lookup(LookupRequest { name, reply: Some(reply) }) = wish else {
                continue;
            };
            match &*name {
                "absent" => drop(reply.send(Lookup::Absent)),
                "rejected" => drop(reply.send(Lookup::Exists)),
                "failed" => drop(reply),
                _ => kept.push(reply),
            }
        }
    });
    tasks
}

#[tokio::test]
async fn only_what_the_source_answered_so_does_not_exist() {
    let nothing = FakeUpstream::new(|_, asked| vec![code(asked, ResponseCode::NXDomain)]).await;
    let something = FakeUpstream::of([192, 0, 2, 7]).await;
    let demand = UsageSender::default();
    let _source = reluctant(&demand);
    use Unrouted::{Forward as Elsewhere, Nxdomain};
    for (unrouted, upstream, absent, other) in [
        (Nxdomain, &nothing, "NXDomain", "ServFail"),
        (Elsewhere, &nothing, "NXDomain", "ServFail"),
        (Elsewhere, &something, "NoError 192.0.2.7", "NoError 192.0.2.7"),
    ] {
        let forward = Forward::Servers(vec![upstream.address]);
        let config = DnsConfig { forward, unrouted, ..Config::default().dns };
        let rig = Rig::with_demand(config, ServerOptions::default(), demand.clone()).await;
        assert_eq!(rig.lookup("absent.service.").await, absent, "{unrouted:?}");
        for name in ["failed", "slow", "rejected"] {
            let got = rig.lookup(&format!("{name}.service.")).await;
            assert_eq!(got, other, "{name}, {unrouted:?}");
        }
    }
}

#[tokio::test]
async fn a_flood_of_names_makes_none_of_them_absent() {
    const N: u16 = 1300; // 1,024 can wait
    let demand = UsageSender::default();
    let _source = reluctant(&demand);
    let config = Config::default().dns;
    let rig = Rig::with_demand(config, ServerOptions::default(), demand).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(rig.address).await.unwrap();
    let receive = async {
        let mut buffer = [0; 512];
        for _ in 0..N {
            let len = client.recv(&mut buffer).await.unwrap();
            let answer = Message::from_vec(&buffer[..len]).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::ServFail, "{answer}");
        }
    };
    let send = async {
        for n in 0..N {
            let question = query(&format!("n{n}.service."), RecordType::A);
            client.send(&question.to_vec().unwrap()).await.unwrap();
            if n % 50 == 0 {
                // Once this is answered, all before it have been read.
                assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
            }
        }
    };
    timeout(LONG, async { tokio::join!(send, receive) }).await.unwrap();
}

#[tokio::test]
async fn questions_that_passed_sockets_kept_wait_for_the_zone() {
    let config = DnsConfig {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        forward: Forward::Servers(Vec::new()),
        ..Config::default().dns
    };
    let mut sockets = bind(&config).await.unwrap();
    sockets.n_passed = sockets.udp.len();
    let address = sockets.addresses()[0];
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(address).await.unwrap();
    // It waits in the socket while there is no server, and in the server while there is no zone.
    client.send(&query("web.service.", RecordType::A).to_vec().unwrap()).await.unwrap();
    let (table, table_rx) = watch::channel(Arc::new(Table::default()));
    let (attached, attached_rx) = watch::channel(false);
    let (options, demand) = (ServerOptions::default(), UsageSender::default());
    let server = DnsServer::start_in(options, sockets, &config, &[], table_rx, attached_rx, demand);
    let rig = Rig { server: server.unwrap(), address, tls_address: address, table, attached };
    assert_eq!(rig.lookup("example.com.").await, "Refused", "names of others don't wait");
    rig.table.send_replace(Arc::new(web(1)));
    rig.attached.send_replace(true);
    let mut buffer = [0; 512];
    let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
    let answer = Message::from_vec(&buffer[..len]).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn more_than_can_wait_for_the_zone_stay_in_the_socket() {
    const N_CLIENTS: usize = 10;
    const N_EACH: u16 = 110; // 1,024 can wait
    let config = DnsConfig {
        listen: vec!["127.0.0.1:0".parse().unwrap()],
        forward: Forward::Servers(Vec::new()),
        ..Config::default().dns
    };
    let mut sockets = bind(&config).await.unwrap();
    sockets.n_passed = sockets.udp.len();
    for socket in &sockets.udp {
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, 1 << 20).unwrap();
    }
    let address = sockets.addresses()[0];
    let (table, table_rx) = watch::channel(Arc::new(Table::default()));
    let (_attached, attached_rx) = watch::channel(true);
    let options = ServerOptions::default();
    let _server = DnsServer::start_in(
        options,
        sockets,
        &config,
        &[],
        table_rx,
        attached_rx,
        UsageSender::default(),
    )
    .unwrap();
    let mut clients = Vec::new();
    let mut message = query("web.service.", RecordType::A);
    for _ in 0..N_CLIENTS {
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.connect(address).await.unwrap();
        for id in 0..N_EACH {
            message.metadata.id = id;
            client.send(&message.to_vec().unwrap()).await.unwrap();
        }
        clients.push(client);
    }
    table.send_replace(Arc::new(web(1)));
    let mut buffer = [0; 512];
    for client in clients {
        for _ in 0..N_EACH {
            let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
            let answer = Message::from_vec(&buffer[..len]).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        }
    }
}

#[tokio::test]
async fn a_resolver_that_cuts_off_and_then_stalls_over_tcp_costs_its_patience() {
    let stalls = FakeUpstream::new(|transport, asked| match transport {
        Transport::Udp => vec![asked_truncated(asked)],
        Transport::Tcp => Vec::new(),
    })
    .await;
    let forward = Forward::Servers(vec![stalls.address]);
    let rig =
        Rig::with(DnsConfig { forward, ..Config::default().dns }, ServerOptions::default()).await;
    let asked = query("example.com.", RecordType::A);
    assert!(rig.ask(Transport::Udp, &asked).await.metadata.truncation);
    let answer = rig.ask(Transport::Tcp, &asked).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

fn asked_truncated(asked: &Message) -> Message {
    let mut message = code(asked, ResponseCode::NoError);
    message.metadata.truncation = true;
    message
}

#[tokio::test]
async fn a_tcp_client_that_never_reads_is_cut_off() {
    let talks = FakeUpstream::new(|_, asked| vec![long_answer(asked, 300)]).await;
    let config =
        DnsConfig { forward: Forward::Servers(vec![talks.address]), ..Config::default().dns };
    let options =
        ServerOptions { tcp_idle_timeout: Duration::from_millis(200), ..ServerOptions::default() };
    let rig = Rig::with(config, options).await;
    let mut stream = TcpStream::connect(rig.address).await.unwrap();
    let question = query("example.com.", RecordType::TXT).to_vec().unwrap();
    // Their answers, of 60 kB each, are more than the kernel keeps for the two of them.
    for _ in 0..1000 {
        write_message(&mut stream, &question).await;
    }
    // What it had not read yet makes the server's end a reset.
    timeout(LONG, stream.ready(Interest::ERROR)).await.unwrap().unwrap();
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}
