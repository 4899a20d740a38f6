//! Upstreams that misbehave: circles, lies, silence.

use tokio::time::Instant;

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

/// A server that listens on `sockets` and forwards to `servers`.
fn serve(sockets: Sockets, servers: &[SocketAddr], limits: Limits) -> Rig {
    serve_as(sockets, servers, limits, Unrouted::Nxdomain)
}

fn serve_as(sockets: Sockets, servers: &[SocketAddr], limits: Limits, unrouted: Unrouted) -> Rig {
    let address = sockets.addresses()[0];
    let forward = Forward::Servers(servers.to_vec());
    let config = DnsConfig { forward, unrouted, ..Config::default().dns };
    let (table, table_rx) = watch::channel(Arc::new(web(1)));
    let (attached, attached_rx) = watch::channel(true);
    let surroundings = Surroundings { limits, ..Surroundings::default() };
    let server = Server::start_in(
        surroundings,
        sockets,
        &config,
        &[],
        table_rx,
        attached_rx,
        Demand::default(),
    )
    .unwrap();
    Rig { server, address, table, attached }
}

async fn any_sockets() -> Sockets {
    let any = vec!["127.0.0.1:0".parse().unwrap()];
    bind(&DnsConfig { listen: any, ..Config::default().dns }).await.unwrap()
}

#[tokio::test]
async fn a_circle_of_resolvers_is_found_and_left_out() {
    let sockets = any_sockets().await;
    let (near, _near_tasks) = relay(sockets.addresses()[0], ".").await;
    let (far, _far_tasks) = relay(near, ".").await;
    let good = Upstream::of([192, 0, 2, 7]).await;
    let rig = serve(sockets, &[far, good.address], Limits::default());
    // The circle costs no patience: its question comes back, fails, and the next one is asked.
    let start = Instant::now();
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.7");
    assert!(start.elapsed() < Limits::default().patience, "{:?}", start.elapsed());
    let problems = timeout(LONG, async {
        loop {
            let problems = rig.server.inquirer().problems();
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
async fn a_circle_alone_is_servfail_and_no_storm() {
    let sockets = any_sockets().await;
    let (near, _tasks) = relay(sockets.addresses()[0], ".").await;
    let rig = serve(sockets, &[near], Limits::default());
    let start = Instant::now();
    assert_eq!(rig.lookup("example.com.").await, "ServFail");
    assert!(start.elapsed() < Limits::default().patience, "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_dead_resolver_costs_its_patience_for_a_few_names() {
    let mut silent = Upstream::silent().await;
    let good = Upstream::of([192, 0, 2, 7]).await;
    let servers = [silent.address, good.address];
    let rig = serve(any_sockets().await, &servers, quick().limits);
    for name in ["a.example.", "b.example.", "c.example."] {
        assert_eq!(rig.lookup(name).await, "NoError 192.0.2.7");
    }
    while silent.asked.try_recv().is_ok() {}
    assert_eq!(rig.lookup("d.example.").await, "NoError 192.0.2.7");
    assert!(silent.asked.try_recv().is_err(), "it was asked again");
}

#[tokio::test]
async fn a_name_that_fails_leaves_its_resolver_in_its_place() {
    let first = Upstream::new(|_, asked| {
        let is_slow = asked.queries[0].name.to_string() == "slow.example.";
        if is_slow { Vec::new() } else { vec![answer(asked, [192, 0, 2, 1])] }
    })
    .await;
    let public = Upstream::of([192, 0, 2, 2]).await;
    let servers = [first.address, public.address];
    let rig = serve(any_sockets().await, &servers, quick().limits);
    for _ in 0..4 {
        assert_eq!(rig.lookup("slow.example.").await, "NoError 192.0.2.2");
    }
    assert_eq!(rig.lookup("internal.example.").await, "NoError 192.0.2.1");
}

#[tokio::test]
async fn a_name_that_everybody_wants_is_asked_for_once() {
    const N: u16 = 200; // answers that a socket keeps until they are read
    let mut silent = Upstream::silent().await;
    let good = Upstream::of([192, 0, 2, 7]).await;
    let limits = Limits { patience: Duration::from_secs(2), ..Limits::default() };
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
    let good = Upstream::of([192, 0, 2, 7]).await;
    let servers = [delegates, good.address];
    let rig = serve_as(sockets, &servers, Limits::default(), Unrouted::Forward);
    let start = Instant::now();
    assert_eq!(rig.lookup("unknown.service.").await, "NoError 192.0.2.7");
    assert!(start.elapsed() < Limits::default().patience, "{:?}", start.elapsed());
    let problems = rig.server.inquirer().problems().join("\n");
    let expected = format!("{delegates} sends names below service back");
    assert!(problems.contains(&expected), "{problems}");
    // It knows that there are no such names, and that counts.
    assert_eq!(rig.lookup("example.com.").await, "NXDomain");
    assert_eq!(rig.lookup("web.service.").await, "NoError 127.128.0.1");
}

#[tokio::test]
async fn answers_from_elsewhere_and_late_ones_are_ignored() {
    // One socket hears the question, another answers it: only the next resolver's answer counts.
    let heard = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = heard.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let elsewhere = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut buffer = vec![0; 512];
        while let Ok((len, client)) = heard.recv_from(&mut buffer).await {
            let asked = Message::from_vec(&buffer[..len]).unwrap();
            let lie = answer(&asked, [192, 0, 2, 66]).to_vec().unwrap();
            // A port that nobody holds any more refuses it, which is as good.
            let _ = elsewhere.send_to(&lie, client).await;
        }
    });
    let good = Upstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[address, good.address], quick().limits);
    assert_eq!(rig.lookup("example.com.").await, "NoError 192.0.2.7");
    assert_eq!(rig.lookup("example.org.").await, "NoError 192.0.2.7");
}

#[tokio::test]
async fn a_lookup_that_takes_too_long_tells_why() {
    let mut silent = Upstream::silent().await;
    let patient = Limits { patience: LONG, ..Limits::default() };
    let rig = serve(any_sockets().await, &[silent.address], patient);
    let mut inquirer = rig.server.inquirer();
    inquirer.time_limit = Duration::from_secs(1);
    let (answer, origin) = inquirer.look_up("example.com", "A").await.unwrap();
    silent.next_asked().await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.queries[0].to_string(), "example.com. IN A");
    assert_eq!(origin, Origin::Nowhere("no resolver has answered in time".to_owned()));
}

#[tokio::test]
async fn who_asks_prefers_loopback() {
    // An address of documentation (RFC 5737), which this host may get later.
    let listen = ["192.0.2.1:0", "127.0.0.1:0"].map(|text| text.parse().unwrap()).to_vec();
    let sockets = bind(&DnsConfig { listen, ..Config::default().dns }).await.unwrap();
    let rig = serve(sockets, &[], quick().limits);
    let (answer, _) = rig.server.inquirer().look_up("web.service", "A").await.unwrap();
    assert_eq!(answer.answers.len(), 1);
}

#[tokio::test]
async fn a_lookup_of_our_own_tells_where_the_answer_came_from() {
    let good = Upstream::of([192, 0, 2, 7]).await;
    let rig = serve(any_sockets().await, &[good.address], quick().limits);
    let inquirer = rig.server.inquirer();
    let (answer, origin) = inquirer.look_up("web.service", "A").await.unwrap();
    assert_eq!((answer.answers.len(), origin), (1, Origin::Own));
    let (answer, origin) = inquirer.look_up("example.com", "a").await.unwrap();
    assert_eq!((answer.answers.len(), origin), (1, Origin::Upstream(good.address)));

    let silent = Upstream::silent().await;
    let rig = serve(any_sockets().await, &[silent.address], quick().limits);
    let (answer, origin) = rig.server.inquirer().look_up("example.com", "A").await.unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(origin, Origin::Nowhere("none of 1 resolvers answered".to_owned()));
}
