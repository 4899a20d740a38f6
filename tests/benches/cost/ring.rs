//! What a packet costs an edge, by BPF_PROG_TEST_RUN, which gives a program its own output again: so the
//! flows are a ring, where the packet that one flow sends to its backend is the next flow's from its client.
//! Each run finds another flow than the last one, and none takes another way than in production.
//!
//! The hop limit of a packet ends after 255 hops, so the ring is walked in as many calls as that takes.

use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use aya::maps::{Array, HashMap, Map, MapData, MapInfo};
use aya::programs::{ProgramFd, loaded_programs};
use lb_common::{FlowKey4, FlowRecord, FlowRef, FlowWord, IPPROTO_TCP, TCP_ACK, TCP_SYN};
use lb_tests::fixture::{Bed, service};
use lb_tests::prog_run::{ProgRun, prog_run};
use lb_userspace::datapath::{Cost, EdgeOptions, EdgeTimeouts};
use lb_userspace::table::Service;

use crate::compared::Compared;
use crate::{STRIDE, vip};

/// The interface that packets come by and leave by.
const INTERFACE: &str = "edge0";
/// Its other end.
const PEER: &str = "edge1";
const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// The VIPs of established flows, one after the other.
const FIRST_VIP: Ipv4Addr = Ipv4Addr::new(10, 64, 0, 0);
/// Those of first packets.
const FIRST_OF_CHAIN: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 0);
const MAX_FLOWS: u32 = 131_072;
/// How often a packet is forwarded before its hop limit is used up.
const N_HOPS: usize = 250;

/// The numbers of flows, each a ring of its own.
pub const SIZES: [u32; 3] = [1, 1_000, 100_000];

/// A kind of program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Tc,
    Xdp,
}

impl Hook {
    /// The beginning of the context's structure, for a packet that came by an interface.
    fn context(self, interface: u32, len: usize) -> Vec<u32> {
        match self {
            // struct xdp_md, up to ingress_ifindex.
            Hook::Xdp => vec![0, len as u32, 0, interface, 0],
            // struct __sk_buff, up to ifindex.
            Hook::Tc => [[0; 10].as_slice(), &[interface]].concat(),
        }
    }

    /// What a program returns that sends a packet on.
    fn sent(self) -> u32 {
        match self {
            // TC_ACT_REDIRECT
            Hook::Tc => 7,
            // XDP_REDIRECT
            Hook::Xdp => 4,
        }
    }
}

/// The interface of edges.
#[derive(Clone, Copy)]
pub struct Network {
    interface: u32,
    mac: [u8; 6],
}

/// An edge.
pub struct Edge {
    network: Network,
    bed: RefCell<Bed>,
}

/// A program that is run on packets, and what it took.
pub struct Walk {
    edge: Rc<Edge>,
    hook: Hook,
    program: ProgramFd,
    ring: Option<Ring>,
    next: Cell<u32>,
    cost: Cell<Cost>,
}

/// Flows from the nth on.
#[derive(Clone, Copy)]
struct Ring {
    first: u32,
    n_flows: u32,
}

impl Ring {
    fn of(n_flows: u32) -> Ring {
        let first = SIZES.into_iter().take_while(|size| *size != n_flows).sum();
        Ring { first, n_flows }
    }

    /// The packet that goes to the nth flow's VIP.
    fn ends(self, nth: u32) -> (SocketAddrV4, SocketAddrV4) {
        let nth = self.first + nth % self.n_flows;
        let vip = Ipv4Addr::from(u32::from(FIRST_VIP) + nth);
        (SocketAddrV4::new(SOURCE, source_port(nth)), SocketAddrV4::new(vip, 80))
    }
}

fn source_port(nth: u32) -> u16 {
    (1_024 + nth % 31_744) as u16
}

impl Network {
    /// In this thread's network namespace. A program in the driver of the other end has it take packets from XDP.
    pub fn new(compared: &mut Compared) -> Network {
        ip(&format!("link add {INTERFACE} type veth peer name {PEER}"));
        ip(&format!("addr add {SOURCE}/24 dev {INTERFACE}"));
        for device in [INTERFACE, PEER] {
            ip(&format!("link set {device} up"));
        }
        compared.attach_in_driver(PEER);
        let forwarding = format!("/proc/sys/net/ipv4/conf/{INTERFACE}/forwarding");
        std::fs::write(forwarding, "1").expect("root may");
        let shown = Command::new("ip").args(["-o", "link", "show", INTERFACE]).output();
        let shown = String::from_utf8(shown.expect("ip runs").stdout).expect("text");
        let (interface, rest) = shown.split_once(':').expect("its index comes first");
        let (_, mac) = rest.split_once("link/ether ").expect("it has an address");
        let (mac, interface) = (&mac[..17], interface.parse().expect("a number"));
        // The next hop has the interface's own address, so that what leaves may come again.
        ip(&format!("neigh add 10.200.0.2 lladdr {mac} dev {INTERFACE} nud permanent"));
        ip(&format!("route add 10.64.0.0/10 via 10.200.0.2 dev {INTERFACE}"));
        let octet = |text| u8::from_str_radix(text, 16).expect("an octet");
        let mac: Vec<u8> = mac.split(':').map(octet).collect();
        let mac = mac.try_into().expect("six octets");
        Network { interface, mac }
    }
}

impl Edge {
    /// One whose services are a chain.
    pub fn start(network: Network) -> Rc<Edge> {
        let parsed = |text: &str| text.parse().expect("a network");
        let mut bed = Bed::with(|options| {
            let eject = &mut options.balance.eject;
            (eject.refused, eject.failures, eject.silence) = (0, 0, 0);
        });
        bed.datapath.configure_edge(Some(EdgeOptions {
            interfaces: vec![INTERFACE.to_owned()],
            // Of both kinds of VIPs; and one of the source itself, or what one flow sends on would be a martian to the
            // next one of the chain, which comes from there. No packet that goes to a VIP is compared with it.
            networks: vec![parsed("10.64.0.0/10"), parsed(&format!("{SOURCE}/32"))],
            sources: vec![SOURCE.into()],
            max_flows: MAX_FLOWS,
            timeouts: EdgeTimeouts::default(),
            client_address: Vec::new(),
        }));
        bed.apply(chain());
        let status = bed.datapath.edge_status().expect("it is configured");
        assert_eq!(status.problems, Vec::<String>::new());
        Rc::new(Edge { network, bed: RefCell::new(bed) })
    }

    /// The same with established flows.
    pub fn with_flows(network: Network) -> Rc<Edge> {
        let edge = Edge::start(network);
        fill(&edge.bed.borrow().options.bpffs.join("v3/maps"));
        edge
    }

    /// Walks the ring of so many flows.
    pub fn established(self: &Rc<Self>, hook: Hook, program: ProgramFd, n_flows: u32) -> Rc<Walk> {
        self.walk(hook, program, Some(Ring::of(n_flows)))
    }

    /// Begins flows, each with the SYN that the one before it sends on.
    pub fn first_packets(self: &Rc<Self>, hook: Hook, program: ProgramFd) -> Rc<Walk> {
        self.walk(hook, program, None)
    }

    fn walk(self: &Rc<Self>, hook: Hook, program: ProgramFd, ring: Option<Ring>) -> Rc<Walk> {
        let cost = Cost { n_runs: 0, run_time: Duration::ZERO };
        let (edge, next, cost) = (self.clone(), Cell::new(0), Cell::new(cost));
        Rc::new(Walk { edge, hook, program, ring, next, cost })
    }

    /// Has the programs take the next hop for verified just now: a packet that leaves by the kernel's own output comes
    /// once in five seconds, and isn't the next one of the ring.
    fn verify_neighbours(&self) {
        let pin = self.bed.borrow().options.bpffs.join("v3/maps/EDGE_NEIGHBOURS");
        let map = MapData::from_pin(pin).expect("it is pinned");
        let mut times: Array<MapData, u32> = Map::Array(map).try_into().expect("an array");
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let now_ms = (now.tv_sec * 1_000 + now.tv_nsec / 1_000_000) as u32;
        for idx in 0..times.len() {
            times.set(idx, now_ms, 0).expect("there is room");
        }
    }

    /// The program of this name over this edge's maps.
    pub fn program(&self, name: &str) -> ProgramFd {
        let map = MapInfo::from_pin(self.bed.borrow().options.bpffs.join("v3/maps/EDGE_RECORDS"));
        let map = map.expect("the map is pinned").id();
        let has_map = |ids: Option<Vec<u32>>| ids.is_some_and(|ids| ids.contains(&map));
        let mut found = loaded_programs().filter_map(Result::ok).filter(|program| {
            program.name() == name.as_bytes() && program.map_ids().is_ok_and(has_map)
        });
        found.next().expect("the program is loaded").fd().expect("root may")
    }
}

impl Walk {
    pub fn cost(&self) -> Cost {
        self.cost.get()
    }

    /// Sends so many packets through the program that forwards, or that does nothing.
    pub fn run(&self, n_packets: usize, is_forwarded: bool) {
        self.edge.verify_neighbours();
        // Flows that are in use have next hops which were looked up a short time ago, as they have after a round.
        if let Some(ring) = self.ring {
            let cost = self.cost.get();
            self.send(ring.n_flows as usize, is_forwarded);
            self.cost.set(cost);
        }
        self.send(n_packets, is_forwarded);
        if self.ring.is_none() && is_forwarded {
            // Room for the next round.
            self.edge.bed.borrow_mut().datapath.sweep_edge_after(Duration::from_secs(100));
        }
    }

    fn send(&self, n_packets: usize, is_forwarded: bool) {
        for _ in 0..n_packets.div_ceil(N_HOPS) {
            let nth = self.next.get();
            let (ends, last, flags) = match self.ring {
                Some(ring) => {
                    self.next.set((nth + N_HOPS as u32) % ring.n_flows);
                    (ring.ends(nth), *ring.ends(nth + N_HOPS as u32).1.ip(), TCP_ACK)
                }
                None => {
                    self.next.set(nth + 1);
                    let client = SocketAddrV4::new(Ipv4Addr::from(0xc633_6400 + nth / 50_000), 0);
                    let client = SocketAddrV4::new(*client.ip(), (1_024 + nth % 50_000) as u16);
                    let end = u32::from(FIRST_OF_CHAIN) + N_HOPS as u32;
                    ((client, SocketAddrV4::new(FIRST_OF_CHAIN, 80)), end.into(), TCP_SYN)
                }
            };
            let packet = packet(self.edge.network.mac, ends, flags);
            let context = self.hook.context(self.edge.network.interface, packet.len());
            let ProgRun { verdict, packet, run_time } =
                prog_run(self.program.as_fd(), &packet, &context, N_HOPS);
            if is_forwarded && self.hook == Hook::Xdp && is_left_to_tc(&packet) {
                continue;
            }
            if is_forwarded {
                assert_eq!(verdict, self.hook.sent(), "{packet:02x?}");
                assert_eq!(&packet[30..34], last.octets(), "the last hop");
                assert_eq!(packet[22], 255 - N_HOPS as u8, "the hop limit");
                assert_eq!([sum(&packet[14..34], 0), tcp_sum(&packet)], [0xffff; 2], "checksums");
            }
            let Cost { n_runs, run_time: total } = self.cost.get();
            let n_runs = n_runs + N_HOPS as u64;
            self.cost.set(Cost { n_runs, run_time: total + run_time * N_HOPS as u32 });
        }
    }
}

/// The services of first packets: the backend of each is the next one's VIP.
fn chain() -> Vec<Service> {
    let address = |nth: u32| SocketAddrV4::new((u32::from(FIRST_OF_CHAIN) + nth).into(), 80);
    let web = |nth: u32| -> Service {
        let backend = (address(nth + 1).into(), 1);
        let public = vec![address(nth).into()];
        Service { public, ..service(&format!("edge-{nth}"), *vip(nth).ip(), &[backend]) }
    };
    (0..=N_HOPS as u32).map(web).collect()
}

/// Writes the established flows, as the programs would have done.
fn fill(maps: &Path) {
    let map = |name: &str| MapData::from_pin(maps.join(name)).expect("it is pinned");
    let mut records: Array<MapData, [u64; 8]> =
        Map::Array(map("EDGE_RECORDS")).try_into().expect("an array");
    let mut flows: HashMap<MapData, [u64; 2], u64> =
        Map::HashMap(map("EDGE_FLOWS")).try_into().expect("a hash");
    for size in SIZES {
        let ring = Ring::of(size);
        for nth in 0..size {
            let ((client, vip), (source, backend)) = (ring.ends(nth), ring.ends(nth + 1));
            // Far from one to the next, as those of clients are.
            let idx = ring.first + (u64::from(nth) * u64::from(STRIDE) % u64::from(size)) as u32;
            let record = FlowRecord {
                claims: 1,
                word: FlowWord {
                    client: FlowWord::FIRST | FlowWord::ACK,
                    backend: FlowWord::FIRST,
                    flags: FlowWord::IN_FLIGHT,
                    protocol: IPPROTO_TCP,
                },
                last_ms: u32::MAX / 2,
                client_port: client.port(),
                vip_port: vip.port(),
                backend_port: backend.port(),
                source_port: source.port(),
                client: client.ip().octets(),
                vip: vip.ip().octets(),
                backend: backend.ip().octets(),
                source: source.ip().octets(),
                ..FlowRecord::default()
            };
            let record: [u64; 8] = zerocopy::transmute!(record);
            records.set(idx, record, 0).expect("there is room");
            let ends = |address: SocketAddrV4| (address.ip().octets(), address.port());
            for (from, to, is_back) in [(client, vip, 0), (backend, source, 1)] {
                let key = FlowKey4::of(ends(from), ends(to), IPPROTO_TCP);
                let flow = FlowRef { record: idx, is_back };
                let (key, flow): ([u64; 2], u64) =
                    (zerocopy::transmute!(key), zerocopy::transmute!(flow));
                flows.insert(key, flow, 0).expect("there is room");
            }
        }
    }
}

/// A segment from one address to another, of 64 bytes.
fn packet(mac: [u8; 6], (from, to): (SocketAddrV4, SocketAddrV4), flags: u8) -> Vec<u8> {
    let mut packet = [mac, mac].concat();
    packet.extend([8, 0, 0x45, 0, 0, 50, 0, 1, 0x40, 0, 255, IPPROTO_TCP, 0, 0]);
    packet.extend(from.ip().octets().into_iter().chain(to.ip().octets()));
    packet.extend(from.port().to_be_bytes().into_iter().chain(to.port().to_be_bytes()));
    packet.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 2, 0, 0, 0, 0, 0]);
    packet.extend([7; 10]);
    let header = !sum(&packet[14..34], 0);
    packet[24..26].copy_from_slice(&header.to_be_bytes());
    let segment = !tcp_sum(&packet);
    packet[50..52].copy_from_slice(&segment.to_be_bytes());
    packet
}

/// Whether a checksum is the pseudo-header's sum: XDP leaves one packet in 65,536 to TC for that.
fn is_left_to_tc(packet: &[u8]) -> bool {
    let addresses = u32::from(sum(&packet[26..34], 0));
    let pseudo = sum(&[], addresses + u32::from(IPPROTO_TCP) + packet[34..].len() as u32);
    packet[50..52] == pseudo.to_be_bytes()
}

/// The sum of a segment and its pseudo-header.
fn tcp_sum(packet: &[u8]) -> u16 {
    let segment = &packet[34..];
    let addresses = sum(&packet[26..34], 0);
    sum(segment, u32::from(addresses) + u32::from(IPPROTO_TCP) + segment.len() as u32)
}

fn sum(octets: &[u8], first: u32) -> u16 {
    let words = octets.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let sum = words.fold(first, |sum, word| sum + word);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

fn ip(command: &str) {
    let status = Command::new("ip").args(command.split(' ')).status().expect("ip runs");
    assert!(status.success(), "ip {command}");
}
