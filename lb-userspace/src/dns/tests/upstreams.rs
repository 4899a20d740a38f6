//! Upstreams that misbehave: circles, lies, silence.

use hickory_proto::rr::rdata::SOA;

use super::*;
use crate::config::Unrouted;

/// A resolver that sends every question on to `target`, under ids and from ports of its own, as
/// dnsmasq and the like do; names outside of `domain` there are none for it.
async fn relay(target: SocketAddr, domain: &str) -> (SocketAddr, JoinSet<()>) {
    let domain = Name::from_ascii(domain).unwrap();
    let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
    let address = socket.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut relays = JoinSet::new();
        let mut buffer = vec![0; 65_535];
        while let Ok((len, client)) = socket.recv_from(&mut buffer).await {
            let (question, socket) = (buffer[..len].to_vec(), Arc::clone(&socket));
            let asked = Message::from_vec(&question).unwrap();
            if !domain.zone_of(&asked.queries[0].name) {
                let nothing = code(&asked, ResponseCode::NXDomain).to_vec().unwrap();
                socket.send_to(&nothing, client).await.unwrap();
                continue;
            }
            relays.spawn(async move {
                let outwards = UdpSocket::bind("127.0.0.1:0").await.unwrap();
                outwards.connect(target).await.unwrap();
                outwards.send(&question).await.unwrap();
                let mut answer = vec![0; 65_535];
                if let Ok(len) = outwards.recv(&mut answer).await {
                    socket.send_to(&answer[..len], client).await.unwrap();
                }
            });
        }
    });
    (address, tasks)
}

/// For upstreams that answer, however busy the machine is.
fn tolerant() -> ForwardLimits {
    ForwardLimits { patience: Duration::from_secs(5), ..ForwardLimits::default() }
}

/// A server that listens on `sockets` and forwards to `servers`.
fn serve(sockets: Sockets, servers: &[SocketAddr], limits: ForwardLimits) -> Rig {
    serve_as(sockets, servers, limits, Unrouted::Nxdomain)
}

fn serve_as(
    sockets: Sockets,
    servers: &[SocketAddr],
    limits: ForwardLimits,
    unrouted: Unrouted,
) -> Rig {
    let address = sockets.addresses()[0];
    let forward = Forward::Servers(servers.to_vec());
    let config = DnsConfig { forward, unrouted, ..Config::default().dns };
    let (table, table_rx) = watch::channel(Arc::new(web(1)));
    let (attached, attached_rx) = watch::channel(true);
    let options = ServerOptions { limits, ..ServerOptions::default() };
    let server = DnsServer::start_in(
        options,
        sockets,
        &config,
        &[],
        table_rx,
        attached_rx,
        UsageSender::default(),
    )
    .unwrap();
    Rig { server, address, tls_address: address, table, attached }
}

async fn any_sockets() -> Sockets {
    let any = vec!["127.0.0.1:0".parse().unwrap()];
    bind(&DnsConfig { listen: any, ..Config::default().dns }).await.unwrap()
}

#[tokio::test]
async fn a_loop_of_resolvers_is_found_and_left_out() {
    let sockets = any_sockets().await;
    let (near, _near_tasks) = relay(sockets.addresses()[0], ".").await;
    let (far, _far_tasks) = relay(near, ".").await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = serve(sockets, &[far, good.address], patient().limits);
    // The looping query comes back and fails, and the next one is queried at once.
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.7");
    let problems = timeout(LONG, async {
        loop {
            let problems = rig.server.debug_client().problems();
            if !problems.is_empty() {
                return problems;
            }
            tokio::task::yield_now().await;
        }
    });
    let problems = problems.await.unwrap().join("\n");
    assert!(problems.contains(&format!("{far} sends names outside the zone back")), "{problems}");
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn a_loop_alone_is_servfail_and_no_storm() {
    let sockets = any_sockets().await;
    let (near, _tasks) = relay(sockets.addresses()[0], ".").await;
    let rig = serve(sockets, &[near], patient().limits);
    assert_eq!(rig.lookup("example.com.").await, "ServFail");
}

/// Waits until an upstream is in this state over UDP.
async fn becomes(rig: &Rig, server: SocketAddr, state: UpstreamState) {
    becomes_so(rig, server, |upstream| upstream.state == state).await;
}

async fn becomes_so(rig: &Rig, server: SocketAddr, is_so: impl Fn(&UpstreamStats) -> bool) {
    let debug_client = rig.server.debug_client();
    let has_changed = || {
        let readings = debug_client.upstreams();
        readings.iter().any(|upstream| upstream.address == server && is_so(upstream))
    };
    let changed = async {
        while !has_changed() {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, changed).await.unwrap();
}

#[tokio::test]
async fn a_dead_resolver_is_asked_last_until_it_answers() {
    let (revive, is_alive) = watch::channel(false);
    let mut first = FakeUpstream::new(move |_, asked| {
        if *is_alive.borrow() { vec![answer(asked, [192, 0, 2, 1])] } else { Vec::new() }
    })
    .await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let servers = [first.address, good.address];
    let rig = serve(any_sockets().await, &servers, tolerant());
    // One name is enough, asked again and again, as a node's only application may.
    assert_eq!(rig.lookup("a.example.").await, "NoError 192.0.2.7");
    becomes(&rig, first.address, UpstreamState::Out).await;
    while first.asked.try_recv().is_ok() {}
    for _ in 0..20 {
        assert_eq!(rig.lookup("a.example.").await, "NoError 192.0.2.7");
    }
    assert!(first.asked.try_recv().is_err(), "it was asked again");
    revive.send_replace(true);
    becomes(&rig, first.address, UpstreamState::Up).await;
    assert_eq!(rig.lookup("a.example.").await, "NoError 192.0.2.1");
}

#[tokio::test]
async fn names_that_all_differ_lose_nothing_behind_a_dead_resolver() {
    let silent = FakeUpstream::silent().await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[silent.address, good.address], ForwardLimits::default());
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(rig.address).await.unwrap();
    let mut buffer = [0; 512];
    for round in 0..6 {
        // No more at a time than sockets have room for.
        for id in 0..100 {
            let mut message = query(&format!("n{id}.r{round}.example."), RecordType::A);
            message.metadata.id = id;
            client.send(&message.to_vec().unwrap()).await.unwrap();
        }
        for _ in 0..100 {
            let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
            let answer = Message::from_vec(&buffer[..len]).unwrap();
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        }
    }
}

#[tokio::test]
async fn the_next_resolver_stands_in_over_tcp_too() {
    let silent = FakeUpstream::silent().await;
    let refusing = FakeUpstream::new(|_, asked| vec![code(asked, ResponseCode::Refused)]).await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let servers = [silent.address, closed, refusing.address, good.address];
    let rig = serve(any_sockets().await, &servers, tolerant());
    for name in ["a.example.", "b.example."] {
        let answer = rig.ask(Transport::Tcp, &query(name, RecordType::A)).await;
        assert_eq!(answer.answers.len(), 1, "{answer}");
    }
    let rig = serve(any_sockets().await, &servers[..3], ForwardLimits::default());
    let answer = rig.ask(Transport::Tcp, &query("a.example.", RecordType::A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[tokio::test]
async fn a_resolver_that_is_silent_over_tcp_alone_is_asked_last_there() {
    let mut first = FakeUpstream::new(|transport, asked| match transport {
        Transport::Udp => vec![answer(asked, [192, 0, 2, 1])],
        Transport::Tcp => Vec::new(),
    })
    .await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[first.address, good.address], tolerant());
    let asked = query("a.example.", RecordType::A);
    // The second one answers before the first one's time is over.
    assert_eq!(rig.ask(Transport::Tcp, &asked).await.answers.len(), 1);
    becomes_so(&rig, first.address, |upstream| upstream.tcp_state == UpstreamState::Out).await;
    while first.asked.try_recv().is_ok() {}
    assert_eq!(rig.ask(Transport::Tcp, &asked).await.answers.len(), 1);
    while let Ok((transport, message)) = first.asked.try_recv() {
        // Probes go on.
        assert!(message.queries[0].name != asked.queries[0].name, "asked by {transport}");
    }
    assert_eq!(rig.lookup("a.example.").await, "NoError 192.0.2.1");
}

#[tokio::test]
async fn a_resolver_that_is_not_there_is_passed_over() {
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let patient = ForwardLimits { patience: 5 * LONG, ..ForwardLimits::default() };
    let rig = serve(any_sockets().await, &[closed, good.address], patient);
    // An ICMP message is as good as an answer: no patience ends.
    assert_eq!(rig.lookup("a.example.").await, "NoError 192.0.2.7");
    becomes(&rig, closed, UpstreamState::Out).await;
    assert_eq!(rig.lookup("b.example.").await, "NoError 192.0.2.7");
}

#[tokio::test]
async fn a_name_that_fails_leaves_its_resolver_in_its_place() {
    let first = FakeUpstream::new(|_, asked| {
        let is_slow = asked.queries[0].name.to_string() == "slow.example.";
        if is_slow { Vec::new() } else { vec![answer(asked, [192, 0, 2, 1])] }
    })
    .await;
    let public = FakeUpstream::of([192, 0, 2, 2]).await;
    let servers = [first.address, public.address];
    let rig = serve(any_sockets().await, &servers, tolerant());
    for _ in 0..3 {
        assert_eq!(rig.lookup("slow.example.").await, "NoError 192.0.2.2");
    }
    becomes(&rig, first.address, UpstreamState::Up).await;
    assert_eq!(rig.lookup("internal.example.").await, "NoError 192.0.2.1");
}

#[tokio::test]
async fn the_next_resolver_denies_nothing_that_the_first_knows() {
    let internal = FakeUpstream::new(|_, asked| {
        let is_slow = asked.queries[0].name.to_string().starts_with("slow");
        if is_slow { Vec::new() } else { vec![answer(asked, [192, 0, 2, 1])] }
    })
    .await;
    let public = FakeUpstream::new(|_, asked| vec![code(asked, ResponseCode::NXDomain)]).await;
    let servers = [internal.address, public.address];
    let rig = serve(any_sockets().await, &servers, tolerant());
    assert_eq!(rig.lookup("slow.example.").await, "NXDomain");
    assert_eq!(rig.lookup("internal.example.").await, "NoError 192.0.2.1");
}

#[tokio::test]
async fn what_is_forwarded_of_the_zone_is_soon_asked_again() {
    let soa = |asked: &Message| {
        let mut message = code(asked, ResponseCode::NXDomain);
        let [primary, mailbox] = ["ns.", "mail."].map(|name| Name::from_ascii(name).unwrap());
        let data = RData::SOA(SOA::new(primary, mailbox, 1, 3600, 1200, 604_800, 3600));
        message.authorities.push(Record::from_rdata(asked.queries[0].name.clone(), 3600, data));
        message
    };
    let upstream = FakeUpstream::new(move |_, asked| {
        let is_known = asked.queries[0].name.to_string().starts_with("known");
        vec![if is_known { answer(asked, [192, 0, 2, 1]) } else { soa(asked) }]
    })
    .await;
    let servers = [upstream.address];
    let rig = serve_as(any_sockets().await, &servers, ForwardLimits::default(), Unrouted::Forward);
    for transport in [Transport::Udp, Transport::Tcp] {
        let answer = rig.ask(transport, &query("known.service.", RecordType::A)).await;
        assert_eq!(answer.answers[0].ttl, 30, "that of dns.ttl");
        let answer = rig.ask(transport, &query("new.service.", RecordType::A)).await;
        assert_eq!(answer.authorities[0].ttl, 5);
        let RData::SOA(soa) = &answer.authorities[0].data else { panic!("{answer}") };
        assert_eq!(soa.minimum, 5);
        let answer = rig.ask(transport, &query("known.example.", RecordType::A)).await;
        assert_eq!(answer.answers[0].ttl, 60, "others are as they came");
    }
}

#[tokio::test]
async fn a_name_that_everybody_wants_is_asked_for_once() {
    const N: u16 = 200; // answers that a socket keeps until they are read
    let mut silent = FakeUpstream::silent().await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let limits = ForwardLimits { patience: Duration::from_secs(2), ..ForwardLimits::default() };
    let rig = serve(any_sockets().await, &[silent.address, good.address], limits);
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(rig.address).await.unwrap();
    let mut message = query("hot.example.", RecordType::A);
    for id in 0..N {
        message.metadata.id = id;
        client.send(&message.to_vec().unwrap()).await.unwrap();
    }
    let mut buffer = [0; 512];
    let mut ids = std::collections::HashSet::new();
    for _ in 0..N {
        let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
        let answer = Message::from_vec(&buffer[..len]).unwrap();
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert_eq!(answer.answers.len(), 1);
        ids.insert(answer.metadata.id);
    }
    assert_eq!(ids.len(), usize::from(N));
    silent.next_asked().await;
    assert!(silent.asked.try_recv().is_err(), "it was asked again");
}

#[tokio::test]
async fn a_circle_of_the_zone_alone_is_found() {
    let sockets = any_sockets().await;
    let (delegates, _tasks) = relay(sockets.addresses()[0], "service.").await;
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let servers = [delegates, good.address];
    let rig = serve_as(sockets, &servers, patient().limits, Unrouted::Forward);
    assert_eq!(rig.lookup("unknown.service.").await, "NoError 192.0.2.7");
    let problems = timeout(LONG, async {
        loop {
            let problems = rig.server.debug_client().problems();
            if !problems.is_empty() {
                return problems;
            }
            tokio::task::yield_now().await;
        }
    });
    let problems = problems.await.unwrap().join("\n");
    let expected = format!("{delegates} sends names below service back");
    assert!(problems.contains(&expected), "{problems}");
    // A negative response of the first upstream applies.
    assert_eq!(rig.lookup("example.com.").await, "NXDomain");
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn answers_from_elsewhere_and_late_ones_are_ignored() {
    // One socket hears the question, another answers it: only the next resolver's answer counts.
    let upstream_socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = upstream_socket.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let elsewhere = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut buffer = vec![0; 512];
        while let Ok((len, client)) = upstream_socket.recv_from(&mut buffer).await {
            let asked = Message::from_vec(&buffer[..len]).unwrap();
            let lie = answer(&asked, [192, 0, 2, 66]).to_vec().unwrap();
            // A port that is closed by now refuses it, which is as good.
            let _ = elsewhere.send_to(&lie, client).await;
        }
    });
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[address, good.address], tolerant());
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.7");
    assert_eq!(rig.lookup("example.org.").await, "NoError 192.0.2.7");
}

#[tokio::test]
async fn a_lookup_that_takes_too_long_tells_why() {
    let mut silent = FakeUpstream::silent().await;
    let patient = ForwardLimits { patience: LONG, ..ForwardLimits::default() };
    let rig = serve(any_sockets().await, &[silent.address], patient);
    let mut debug_client = rig.server.debug_client();
    debug_client.time_limit = Duration::from_secs(1);
    let (answer, origin) = debug_client.look_up("example.com", "A").await.unwrap();
    silent.next_asked().await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries[0].to_string(), "example.com. IN A");
    assert_eq!(origin, AnswerOrigin::Nowhere("no resolver has answered in time".to_owned()));
}

#[tokio::test]
async fn who_asks_prefers_loopback() {
    // An address of documentation (RFC 5737), which this host may get later.
    let listen = ["192.0.2.1:0", "127.0.0.1:0"].map(|text| text.parse().unwrap()).to_vec();
    let sockets = bind(&DnsConfig { listen, ..Config::default().dns }).await.unwrap();
    let rig = serve(sockets, &[], tolerant());
    let (answer, _) = rig.server.debug_client().look_up("web.service", "A").await.unwrap();
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn a_lookup_of_our_own_tells_where_the_answer_came_from() {
    let good = FakeUpstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[good.address], tolerant());
    let debug_client = rig.server.debug_client();
    let (answer, origin) = debug_client.look_up("web.service", "A").await.unwrap();
    assert_eq!((answer.answers.len(), origin), (1, AnswerOrigin::Own));
    let (answer, origin) = debug_client.look_up("example.com", "a").await.unwrap();
    assert_eq!((answer.answers.len(), origin), (1, AnswerOrigin::Upstream(good.address)));

    let silent = FakeUpstream::silent().await;
    let rig = serve(any_sockets().await, &[silent.address], quick().limits);
    let (answer, origin) = rig.server.debug_client().look_up("example.com", "A").await.unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(origin, AnswerOrigin::Nowhere("none of 1 resolvers answered".to_owned()));
}

/// A socket that ends with the server is read to the end, or what is sent while another query waits is lost; also
/// where others were passed.
#[tokio::test]
async fn what_is_sent_while_a_stop_waits_is_answered() {
    let mut silent = FakeUpstream::silent().await;
    let mut sockets = any_sockets().await;
    // One of several would end before the one that waits.
    sockets.udp.truncate(1);
    let passed = any_sockets().await.udp;
    sockets.n_passed = passed.len();
    sockets.udp.splice(..0, passed);
    let rig = serve(sockets, &[silent.address], patient().limits);
    let waiting = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let asked = query("example.com.", RecordType::A).to_vec().unwrap();
    waiting.send_to(&asked, rig.address).await.unwrap();
    silent.next_asked().await;
    let mut is_closing = rig.server.closing.subscribe();
    let Rig { server, address, table: _table, attached: _attached, .. } = rig;
    let stopped = tokio::spawn(server.stop());
    timeout(LONG, is_closing.wait_for(|is_closing| *is_closing)).await.unwrap().unwrap();
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    client.connect(address).await.unwrap();
    // The first may be read before the stop is noticed.
    for _ in 0..3 {
        client.send(&query("web.service.", RecordType::A).to_vec().unwrap()).await.unwrap();
        let mut buffer = [0; 512];
        let len = timeout(LONG, client.recv(&mut buffer)).await.unwrap().unwrap();
        assert_eq!(Message::from_vec(&buffer[..len]).unwrap().answers.len(), 1);
    }
    stopped.await.unwrap();
}

/// Passed sockets are read for a while before they are left to the next server: what reads a query that was on its way
/// at the stop answers it.
#[tokio::test]
async fn what_is_on_its_way_at_a_stop_is_answered() {
    let mut sockets = any_sockets().await;
    sockets.n_passed = sockets.udp.len();
    let rig = serve(sockets, &[], tolerant());
    let is_closing = rig.server.closing.subscribe();
    let Rig { server, address, table: _table, attached: _attached, .. } = rig;
    let stopped = tokio::spawn(server.stop());
    tokio::task::yield_now().await;
    // The stop has begun, and goes on once this thread, the runtime's only one, waits for nothing else.
    let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(LONG)).unwrap();
    client.connect(address).unwrap();
    client.send(&query("web.service.", RecordType::A).to_vec().unwrap()).unwrap();
    assert!(!*is_closing.borrow());
    let mut buffer = [0; 512];
    let len = client.recv(&mut buffer).unwrap();
    assert_eq!(Message::from_vec(&buffer[..len]).unwrap().answers.len(), 1);
    stopped.await.unwrap();
    assert!(*is_closing.borrow());
}
