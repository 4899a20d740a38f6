//! The unit `names` behind firewalls and NAT of the host: what a client sees with it, and without it.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use lb_userspace::datapath::{Datapath, NamesSettings};

use crate::fixture::{Place, nft};
use crate::names::{self, A, LONG, PORT, query, settings};
use crate::netns::inside;

/// A port that rules lead to [`PORT`].
const OTHER_PORT: u16 = PORT + 1;
/// For what doesn't come.
const SHORT: Duration = Duration::from_millis(50);

/// The first bytes of the daemon's answers here, which are no others.
const DAEMONS: [u8; 4] = *b"own!";

/// What a client sees of a query.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Seen {
    Kernel,
    Daemon,
    Nothing,
    NotPermitted,
}
use Seen::{Daemon, Kernel, NotPermitted, Nothing};

/// Rules of nftables, with PORT and OTHER for the ports; the port that is asked; what is seen without the
/// unit, and with it.
struct Row {
    what: &'static str,
    rules: &'static str,
    port: u16,
    without: Seen,
    with: Seen,
}

const fn row(what: &'static str, rules: &'static str, without: Seen, with: Seen) -> Row {
    Row { what, rules, port: PORT, without, with }
}

const ROWS: &[Row] = &[
    row("no rules", "", Daemon, Kernel),
    row(
        "queries are dropped where they leave",
        "chain o { type filter hook output priority 0; udp dport PORT drop; }",
        NotPermitted,
        NotPermitted,
    ),
    row(
        "answers are dropped where they leave, which is before the program",
        "chain o { type filter hook output priority 0; udp sport PORT drop; }",
        Nothing,
        Kernel,
    ),
    row(
        "queries are dropped where they arrive, which is after the program",
        "chain i { type filter hook input priority 0; udp dport PORT drop; }",
        Nothing,
        Kernel,
    ),
    row(
        "answers are dropped where they arrive",
        "chain i { type filter hook input priority 0; udp sport PORT drop; }",
        Nothing,
        Nothing,
    ),
    row(
        "all but lo, what is established and the port is dropped",
        "chain i { type filter hook input priority 0; policy drop;
            iif lo accept; ct state established,related accept; udp dport PORT accept; }",
        Daemon,
        Kernel,
    ),
    // The answer has the query's entry of connection tracking, and is new.
    row(
        "all but what is established and the port is dropped",
        "chain i { type filter hook input priority 0; policy drop;
            ct state established,related accept; udp dport PORT accept; }",
        Daemon,
        Nothing,
    ),
    row(
        "what is invalid is dropped",
        "chain i { type filter hook input priority 0; ct state invalid drop; }",
        Daemon,
        Kernel,
    ),
    row(
        "DNS isn't tracked, and all but what is established or untracked is dropped",
        "chain o { type filter hook output priority -300; udp dport PORT notrack; udp sport PORT notrack; }
         chain i { type filter hook input priority 0; policy drop; ct state established,untracked accept; }",
        Daemon,
        Kernel,
    ),
    Row {
        what: "another port is redirected to this one",
        rules: "chain o { type nat hook output priority -100; udp dport OTHER redirect to :PORT; }",
        port: OTHER_PORT,
        without: Daemon,
        with: Nothing,
    },
    row(
        "the port is redirected to another server's",
        "chain o { type nat hook output priority -100; udp dport PORT redirect to :OTHER; }",
        Daemon,
        Daemon,
    ),
    row(
        "the source is another address",
        "chain p { type nat hook postrouting priority 100; udp dport PORT snat ip to 127.0.0.9; }",
        Daemon,
        Nothing,
    ),
    row(
        "the source is masqueraded, by a rule that doesn't match",
        "chain p { type nat hook postrouting priority 100; udp dport 9 masquerade; }",
        Daemon,
        Kernel,
    ),
];

pub fn what_a_client_sees() {
    inside(|| {
        if !has_nftables() {
            return crate::skip("needs nft, and a kernel with connection tracking");
        }
        let place = Place::new();
        let mut datapath = names::serve(&place);
        let local = Ipv4Addr::LOCALHOST;
        let servers = [PORT, OTHER_PORT].map(|port| UdpSocket::bind((local, port)).unwrap());
        for server in servers {
            std::thread::spawn(move || answer_all(&server));
        }
        for Row { what, rules, port, without, with } in ROWS {
            assert!(set_rules(rules), "{what}");
            let mut check = |settings: NamesSettings, expected: Seen| {
                datapath.configure_names(settings);
                let seen = look(&datapath, *port, expected);
                assert_eq!(seen, expected, "{what}");
            };
            check(NamesSettings { mode: None, ..settings(PORT) }, *without);
            check(settings(PORT), *with);
        }
        // To end the servers' threads.
        assert!(set_rules(""));
        datapath.configure_names(NamesSettings { mode: None, ..settings(PORT) });
        let client = names::socket(local.into());
        for port in [PORT, OTHER_PORT] {
            client.send_to(b"", (local, port)).unwrap();
        }
    });
}

/// What becomes of a query.
fn look(datapath: &Datapath, port: u16, expected: Seen) -> Seen {
    datapath.heartbeat(None);
    let socket = names::socket(Ipv4Addr::LOCALHOST.into());
    socket.set_read_timeout(Some(if expected == Nothing { SHORT } else { LONG })).unwrap();
    socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).unwrap();
    match socket.send(&query("web.service", A, false)) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return NotPermitted,
        sent => sent.unwrap(),
    };
    let mut answer = [0; 512];
    match socket.recv(&mut answer) {
        Ok(_) if answer.starts_with(&DAEMONS) => Daemon,
        Ok(_) => Kernel,
        Err(_) => Nothing,
    }
}

/// A daemon, until it gets an empty datagram.
fn answer_all(server: &UdpSocket) {
    while let Ok((len, client)) = server.recv_from(&mut [0; 512]) {
        if len == 0 {
            return;
        }
        let _ = server.send_to(&DAEMONS, client);
    }
}

fn has_nftables() -> bool {
    let tracks = "chain i { type filter hook input priority 0; ct state established accept; }
                  chain o { type nat hook output priority -100; }";
    set_rules(tracks)
}

/// Replaces the rules of this network namespace, and forgets connections that were tracked by others.
/// False as for [`nft`].
fn set_rules(rules: &str) -> bool {
    let rules = rules.replace("PORT", &PORT.to_string()).replace("OTHER", &OTHER_PORT.to_string());
    nft(&format!("flush ruleset\ntable inet nohop {{\n{rules}\n}}\n"))
}
