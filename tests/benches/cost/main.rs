//! The price of one connection and of one datagram, by the kernel's BPF statistics: nohop's programs, and
//! others to compare them with, all in one interleaved run.

mod compared;
mod figures;
mod loopback;
mod ring;
mod traffic;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use compared::Compared;
use figures::{Figures, Goal};
use lb_tests::fixture::{self, Bed, Server, service};
use lb_userspace::config::KernelMode;
use lb_userspace::datapath::{
    Cost, IngressInterface, Measuring, NamesSettings, Options, UNITS, UnitState,
};
use lb_userspace::table::{Protocols, Service};
use ring::{Edge, Hook};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// The numbers of services.
const FEW: u32 = 10;
const MANY: u32 = 10_000;
const N_BACKENDS: u8 = 10;

/// The services that are special in every table, by their place in it: one without backends, one
/// whose backend answers, one that answers datagrams. The backends of all others refuse.
const EMPTY: u32 = 0;
const LIVE: u32 = 1;
const ECHO: u32 = 2;
const DEAD: u32 = 3;

const STRIDE: u32 = 7_919;

const GOALS: [Goal; 17] = [
    Goal::AtMost(150.0, "no VIP"),
    Goal::Over(200.0, "a VIP among 10,000", "storage alone"),
    Goal::Over(200.0, "VIPs of 10,000", "storage alone"),
    Goal::Over(500.0, "answered: a VIP", "empty"),
    Goal::Over(500.0, "a VIP among 10,000", "empty"),
    Goal::Times(1.2, "VIPs of 10,000", "VIPs of 10"),
    Goal::Times(1.2, "eligible: VIPs of 10,000", "eligible: VIPs of 10"),
    Goal::Times(1.2, "a VIP among 10,000", "a VIP among 10"),
    Goal::AtMost(400.0, "UDP: a datagram sent"),
    Goal::AtMost(400.0, "UDP: a datagram received"),
    Goal::Over(200.0, "names: a name of 10,000", "names: empty"),
    Goal::Over(70.0, "names: another datagram", "names: empty"),
    Goal::Over(150.0, "edge: XDP, 1,000 flows", "edge: XDP, empty"),
    Goal::Over(350.0, "edge: XDP, 100,000 flows", "edge: XDP, empty"),
    Goal::Over(250.0, "edge: TC, 1,000 flows", "edge: TC, empty"),
    Goal::Over(350.0, "edge: TC, 100,000 flows", "edge: TC, empty"),
    Goal::Over(1_500.0, "edge: a first packet", "edge: TC, empty"),
];

/// Where names are answered.
const DNS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 53);

fn main() -> ExitCode {
    if !rustix::process::geteuid().is_root() {
        eprintln!("can't run: it loads eBPF programs, which needs root");
        return ExitCode::FAILURE;
    }
    let Some(object) = std::env::var_os("NOHOP_MEASURE") else {
        eprintln!("run `cargo xtask bench cost`: it builds the programs to compare with");
        return ExitCode::FAILURE;
    };
    // Programs at the ingress of `lo` meet this benchmark's packets alone.
    unshare();
    let is_given = |flag: &str| std::env::args().any(|argument| argument == flag);
    // Cases by parts of their names; all, where none is named.
    let wanted: Vec<String> =
        std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect();
    let is_once = is_given("--once");
    let (n_rounds, n_calls) = match (is_once, is_given("--quick")) {
        (true, _) => (1, 10),
        (false, true) => (15, 200),
        (false, false) => (15, 2_000),
    };
    // Figures of so few calls mean nothing.
    let print = |figures: Figures, goals: &[Goal]| match is_once {
        true => println!("each case has run\n"),
        false => figures.print(goals),
    };
    println!(
        "Linux {}: interleaved rounds ({n_rounds}) of {n_calls} calls each; a program's mean run time\n\
         in ns by the kernel's BPF statistics, two readings of the clock included.\n",
        rustix::system::uname().release().to_string_lossy()
    );
    print(measure(Path::new(&object), &wanted, n_rounds, n_calls), &GOALS);
    if wanted.is_empty() || wanted.iter().any(|part| "loopback".contains(part)) {
        println!("\nA megabyte by TCP, and a datagram, on `lo`, in ns:\n");
        let mut bed = Bed::new();
        bed.apply(Vec::new());
        serve_names(&mut bed);
        let attach = move || Compared::load(Path::new(&object));
        let figures = loopback::measure(10 * n_rounds, n_calls / 10, unshare, attach);
        print(figures, &loopback::GOALS);
    }
    ExitCode::SUCCESS
}

/// Moves this thread to a new network namespace, whose `lo` is up.
fn unshare() {
    // SAFETY: the flag shares and unshares no file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace");
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip runs");
    assert!(up.success(), "lo isn't up");
}

/// A program at work.
struct Case<'a> {
    name: &'static str,
    /// The cgroup that it is attached to.
    cgroup: PathBuf,
    cost: Box<dyn Fn() -> Cost + 'a>,
    work: Box<dyn Fn() + 'a>,
    /// Of how many connections all runs together are meant; `None` for the mean of the runs.
    n_connections: Option<usize>,
}

impl<'a> Case<'a> {
    fn of(bed: &'a Bed, program: &'static str, name: &'static str, work: impl Fn() + 'a) -> Self {
        let cost = move || bed.datapath.cost(program).expect("the kernel reports it");
        let cgroup = bed.cgroup.path.clone();
        Case { name, cgroup, cost: Box::new(cost), work: Box::new(work), n_connections: None }
    }

    /// The present cost of one run, or of all runs of a connection.
    fn mean_ns(&self) -> f64 {
        std::fs::write(self.cgroup.join("cgroup.procs"), "0").expect("the cgroup takes us");
        let before = (self.cost)();
        (self.work)();
        let after = (self.cost)();
        match self.n_connections {
            None => after.mean_ns_since(before),
            Some(n) => (after.run_time - before.run_time).as_nanos() as f64 / n as f64,
        }
    }
}

fn measure(object: &Path, wanted: &[String], n_rounds: usize, n_calls: usize) -> Figures {
    // A socket belongs to the cgroup in which it is made: these to none that is measured.
    let (dead, server) = (fixture::dead(), Server::start(b'a'));
    let echo = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
    let Ok(SocketAddr::V4(echo_address)) = echo.local_addr() else { unreachable!() };
    let SocketAddr::V4(live) = server.address else { unreachable!() };
    let backends = Backends { dead, live, echo: echo_address };

    let _measuring = Measuring::start().expect("the kernel counts run times");
    let mut compared = Compared::load(object);
    let network = ring::Network::new(&mut compared);
    let compared = &compared;
    let few = table(FEW, &backends);
    let mut many = table(MANY, &backends);
    serve_names(&mut many);
    let (few, many) = (&few, &many);
    // Whose backends stay eligible, although they refuse.
    let never = |options: &mut Options| {
        let eject = &mut options.balance.eject;
        (eject.refused, eject.failures, eject.silence) = (0, 0, 0);
    };
    let eligible_few = &table_with(FEW, &backends, never);
    let eligible_many = &table_with(MANY, &backends, never);
    let public = &table_with(FEW, &backends, |options| {
        let networks = ["192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "198.18.0.0/15"];
        options.vip.public = networks.map(|it| it.parse().expect("a network")).into();
    });
    // Without what releases records.
    let stored = &table_with(FEW, &backends, |options| options.units = &UNITS[..1]);

    let in_turn = move |n_services: u32| in_turn(n_services - DEAD, n_calls as u32);
    let again = move |address: SocketAddrV4| std::iter::repeat_n(address, n_calls);
    let echo = &echo;
    let connect4 = "nohop_connect4";
    let getpeer4 = "nohop_getpeer4";
    let mut cases: Vec<Case> = compared::PROGRAMS
        .iter()
        .map(|&(name, program, of)| Case {
            name,
            cgroup: compared.cgroup(of).to_owned(),
            cost: Box::new(move || compared.cost(program)),
            work: Box::new(move || traffic::connect_each(again(dead))),
            n_connections: None,
        })
        .collect();
    cases.extend(compared::SOCKOPS.iter().map(|&(name, program, of)| Case {
        name,
        cgroup: compared.cgroup(of).to_owned(),
        cost: Box::new(move || compared.cost(program)),
        work: Box::new(move || traffic::connect_each(again(live))),
        n_connections: Some(n_calls),
    }));
    let sockops = |name, address: SocketAddrV4| {
        let work = move || traffic::connect_each(again(address));
        Case { n_connections: Some(n_calls), ..Case::of(many, "nohop_sockops", name, work) }
    };
    cases.extend([
        sockops("sockops: a VIP", vip(LIVE)),
        sockops("sockops: a VIP, refused", vip(DEAD)),
        sockops("sockops: no VIP", live),
    ]);
    cases.extend([
        Case::of(many, connect4, "no VIP", move || traffic::connect_each(again(dead))),
        Case::of(public, connect4, "no VIP, four public networks", move || {
            traffic::connect_each(again(dead));
        }),
        Case::of(many, connect4, "no backends", move || traffic::connect_each(again(vip(EMPTY)))),
        Case::of(many, connect4, "connected again", move || traffic::reconnect(vip(DEAD), n_calls)),
        Case::of(few, connect4, "a VIP among 10", move || traffic::connect_each(again(vip(DEAD)))),
        Case::of(stored, connect4, "a VIP among 10, storage", move || {
            traffic::connect_each(again(vip(DEAD)));
        }),
        Case::of(stored, getpeer4, "getpeername: storage", move || {
            traffic::ask(vip(LIVE), n_calls);
        }),
        Case::of(many, connect4, "a VIP among 10,000", move || {
            traffic::connect_each(again(vip(DEAD)))
        }),
        Case::of(few, connect4, "VIPs of 10", move || traffic::connect_each(in_turn(FEW))),
        Case::of(many, connect4, "VIPs of 10,000", move || traffic::connect_each(in_turn(MANY))),
        Case::of(eligible_few, connect4, "eligible: VIPs of 10", move || {
            traffic::connect_each(in_turn(FEW));
        }),
        Case::of(eligible_many, connect4, "eligible: VIPs of 10,000", move || {
            traffic::connect_each(in_turn(MANY));
        }),
        Case::of(eligible_many, connect4, "eligible: a VIP", move || {
            traffic::connect_each(again(vip(DEAD)));
        }),
        Case::of(many, "nohop_connect6", "a mapped VIP", move || {
            traffic::connect_mapped(again(vip(DEAD)));
        }),
        Case::of(many, connect4, "answered: a VIP", move || {
            traffic::connect_each(again(vip(LIVE)))
        }),
        Case::of(many, connect4, "answered: no VIP", {
            let live = backends.live;
            move || traffic::connect_each(again(live))
        }),
        Case::of(many, getpeer4, "getpeername: a VIP", move || traffic::ask(vip(LIVE), n_calls)),
        Case::of(many, getpeer4, "getpeername: no VIP", {
            let live = backends.live;
            move || traffic::ask(live, n_calls)
        }),
        Case::of(many, "nohop_sendmsg4", "UDP: a first datagram", move || {
            (0..n_calls).for_each(|_| traffic::exchange(vip(ECHO), echo, 1));
        }),
        Case::of(many, "nohop_sendmsg4", "UDP: a datagram sent", move || {
            traffic::exchange(vip(ECHO), echo, n_calls);
        }),
        Case::of(many, "nohop_recvmsg4", "UDP: a datagram received", move || {
            traffic::exchange(vip(ECHO), echo, n_calls);
        }),
        Case::of(many, "nohop_sendmsg4", "UDP: no VIP", move || {
            traffic::exchange(echo_address, echo, n_calls);
        }),
        Case::of(many, "nohop_names", "names: a name of 10,000", move || {
            traffic::look_up(&format!("{}.service", name(DEAD)), DNS, n_calls);
        }),
        Case::of(many, "nohop_names", "names: another datagram", move || {
            traffic::exchange(echo_address, echo, n_calls);
        }),
        Case {
            name: "names: empty",
            cgroup: many.cgroup.path.clone(),
            cost: Box::new(move || compared.cost(compared::AT_INGRESS)),
            work: Box::new(move || traffic::exchange(echo_address, echo, n_calls)),
            n_connections: None,
        },
    ]);

    let (filled, fresh) = (Edge::with_flows(network), Edge::start(network));
    let empty = |name| compared.program(name);
    let (tc, xdp) = (|| filled.program("nohop_edge"), || filled.program("nohop_edge_xdp"));
    let walks = [
        (
            "edge: XDP, empty",
            filled.established(Hook::Xdp, empty(compared::IN_DRIVER), 1_000),
            false,
        ),
        ("edge: XDP, one flow", filled.established(Hook::Xdp, xdp(), 1), true),
        ("edge: XDP, 1,000 flows", filled.established(Hook::Xdp, xdp(), 1_000), true),
        ("edge: XDP, 100,000 flows", filled.established(Hook::Xdp, xdp(), 100_000), true),
        (
            "edge: TC, empty",
            filled.established(Hook::Tc, empty(compared::AT_INGRESS), 1_000),
            false,
        ),
        ("edge: TC, one flow", filled.established(Hook::Tc, tc(), 1), true),
        ("edge: TC, 1,000 flows", filled.established(Hook::Tc, tc(), 1_000), true),
        ("edge: TC, 100,000 flows", filled.established(Hook::Tc, tc(), 100_000), true),
        ("edge: a first packet", fresh.first_packets(Hook::Tc, fresh.program("nohop_edge")), true),
    ];
    cases.extend(walks.map(|(name, walk, is_forwarded)| Case {
        name,
        cgroup: many.cgroup.path.clone(),
        cost: Box::new({
            let walk = walk.clone();
            move || walk.cost()
        }),
        work: Box::new(move || {
            walk.run(if name.ends_with("flows") { 100 } else { 10 } * n_calls, is_forwarded)
        }),
        n_connections: None,
    }));

    cases.retain(|case| {
        let is_wanted = |part: &String| case.name.contains(part);
        case.name.ends_with("empty") || wanted.is_empty() || wanted.iter().any(is_wanted)
    });
    let mut figures = Figures::of(cases.iter().map(|case| case.name));
    for _ in 0..n_rounds {
        figures.add(cases.iter().map(Case::mean_ns));
    }
    figures
}

/// Attaches the unit `names` to this network namespace's `lo`.
fn serve_names(bed: &mut Bed) {
    bed.datapath.configure_names(NamesSettings {
        mode: Some(KernelMode::Always),
        domain: "service".into(),
        ttl: 30,
        listen: vec![DNS.into()],
        listen_shared: Vec::new(),
        allowed: Vec::new(),
        client_rate: 0,
        interfaces: vec![IngressInterface { name: "lo".into(), index: 1 }],
        missing_forwarding: Vec::new(),
        is_logged: false,
    });
    let unit = bed.datapath.unit_status().into_iter().find(|unit| unit.name == "names");
    let is_attached = unit.as_ref().is_some_and(|unit| unit.state == UnitState::Attached);
    assert!(is_attached, "{unit:?}");
}

/// All VIPs whose backends refuse, each as often as any other and in so many connections at least: far from one
/// to the next, by a stride that is prime to their number.
fn in_turn(n_vips: u32, n_calls: u32) -> impl Iterator<Item = SocketAddrV4> {
    let n_connects = n_calls.next_multiple_of(n_vips);
    (0..n_connects).map(move |call| vip(DEAD + call * STRIDE % n_vips))
}

struct Backends {
    dead: SocketAddrV4,
    live: SocketAddrV4,
    echo: SocketAddrV4,
}

/// A VIP as the table assigns one, by a hash: within 127.192.0.0/10, each service another one.
fn name(service_idx: u32) -> String {
    format!("web-{service_idx}")
}

fn vip(service_idx: u32) -> SocketAddrV4 {
    const BITS: u32 = 22;
    // Each step has an inverse.
    let mixed =
        [0x009e_3779, 0x85eb_ca6b].into_iter().fold(service_idx + 1, |hash: u32, factor: u32| {
            let hash = hash.wrapping_mul(factor) & ((1 << BITS) - 1);
            hash ^ hash >> (BITS / 2)
        });
    SocketAddrV4::new(Ipv4Addr::from(0x7f_c0_00_00 | mixed), 80)
}

/// A datapath with that many services.
fn table(n_services: u32, backends: &Backends) -> Bed {
    table_with(n_services, backends, |_| {})
}

/// The same with other options.
fn table_with(n_services: u32, backends: &Backends, change: impl FnOnce(&mut Options)) -> Bed {
    let web = |service_idx: u32| -> Service {
        let of_its_own = |backend_idx: u8| {
            // All of loopback is this machine, and refuses at once.
            let [_, _, c, d] = service_idx.to_be_bytes();
            SocketAddrV4::new(Ipv4Addr::new(127, 1 + backend_idx, c, d), backends.dead.port())
        };
        let addresses: Vec<SocketAddrV4> = match service_idx {
            EMPTY => vec![],
            LIVE => vec![backends.live],
            ECHO => vec![backends.echo],
            _ => (0..N_BACKENDS).map(of_its_own).collect(),
        };
        let weighted: Vec<_> = addresses.into_iter().map(|address| (address.into(), 1)).collect();
        let name = name(service_idx);
        let protocols = if service_idx == ECHO { Protocols::Both } else { Protocols::Tcp };
        Service { protocols, ..service(&name, *vip(service_idx).ip(), &weighted) }
    };
    let mut bed = Bed::with(change);
    bed.apply((0..n_services).map(web).collect());
    bed
}
