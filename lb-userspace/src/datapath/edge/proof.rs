//! A proof that the attached programs translate: a flow of this daemon's own, a packet of which is given to them by
//! BPF_PROG_TEST_RUN, as if it came by the interface, and then the answer to it. The programs are those that are
//! attached, and look up their flow in the maps, the route and the next hop in the kernel, as for any packet; only
//! what they decide is returned instead of done, so nothing leaves the host.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;

use lb_common::{
    FlowAddresses6, FlowRecord, FlowWord, IPPROTO_TCP, PROOF_GENERATION, TCP_ACK, folded,
};

use super::super::bpf::test_run;
use super::device::Device;
use super::kernel::{EdgeMaps, address_of};

/// The ports of a proof's flow, which neither clients nor edges use.
const CLIENT_PORT: u16 = 1;
const SOURCE_PORT: u16 = 1_023;
const BACKEND_PORT: u16 = 9;
const VIP_PORT: u16 = 9;

/// How often a packet is tried: before Linux 6.3 one of the network's may come in between, and change what the
/// program remembers of it.
const N_TRIES: usize = 4;

const TC_ACT_REDIRECT: u32 = 7;
const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const XDP_REDIRECT: u32 = 4;

/// The place of `ifindex` in struct __sk_buff, and of `ingress_ifindex` in struct xdp_md, in words.
const SKB_IFINDEX: usize = 10;
const XDP_IFINDEX: usize = 3;

/// What is proved at one interface.
pub struct ProofInput<'a> {
    /// The interface's index.
    pub index: u32,
    pub device: &'a Device,
    /// The program at TC, and the one at XDP where it is attached.
    pub tc: BorrowedFd<'a>,
    pub xdp: Option<BorrowedFd<'a>>,
    /// An address in a network of public VIPs.
    pub vip: IpAddr,
    /// An address of `edge.source`, of the same family.
    pub source: IpAddr,
    /// An address in the interface's own network, where there is a route to: both a client's and a backend's.
    pub neighbour: IpAddr,
}

/// Proves that packets of a flow are translated, in both directions. `None` where there is no room for a flow.
pub fn prove(maps: &mut EdgeMaps, input: &ProofInput<'_>) -> Option<Result<(), String>> {
    let &ProofInput { vip, source, neighbour, .. } = input;
    let client = SocketAddr::new(neighbour, CLIENT_PORT);
    let vip = SocketAddr::new(vip, VIP_PORT);
    let backend = SocketAddr::new(neighbour, BACKEND_PORT);
    let source = SocketAddr::new(source, SOURCE_PORT);
    let idx = maps.insert_flow(
        &record(client, vip, backend, source),
        addresses(client, vip, backend, source),
    )?;
    let directions = [
        ("a packet to a public VIP", (client, vip), (source, backend)),
        ("the answer to it", (backend, source), (vip, client)),
    ];
    let result = directions.into_iter().try_for_each(|(what, before, after)| {
        tried(|| run(input, before, after)).map_err(|why| format!("{what} {why}"))
    });
    maps.end_flow(idx);
    Some(result)
}

/// The first success, or the last failure.
fn tried(mut attempt: impl FnMut() -> Result<(), String>) -> Result<(), String> {
    (1..N_TRIES).fold(attempt(), |result, _| result.or_else(|_| attempt()))
}

fn run(
    input: &ProofInput<'_>,
    (from, to): (SocketAddr, SocketAddr),
    after: (SocketAddr, SocketAddr),
) -> Result<(), String> {
    let &ProofInput { index, device, tc, xdp, .. } = input;
    let packet = packet(device.mac, from, to);
    let mut context = [0; 12];
    context[SKB_IFINDEX] = index;
    let failed = |error| format!("can't be given to the program: {error}");
    let (verdict, translated) = test_run(tc, &packet, &context).map_err(failed)?;
    if verdict != TC_ACT_REDIRECT {
        return Err(format!("isn't sent on: the program at TC returns {verdict}"));
    }
    is_translated(&translated, after)?;
    let Some(xdp) = xdp else { return Ok(()) };
    let mut context = [0; 6];
    (context[1], context[XDP_IFINDEX]) = (packet.len() as u32, index);
    // A driver whose queues the kernel doesn't know can't be stood in for.
    let Ok((verdict, translated)) = test_run(xdp, &packet, &context) else { return Ok(()) };
    match verdict {
        XDP_TX | XDP_REDIRECT => is_translated(&translated, after),
        XDP_PASS if translated == packet => Ok(()),
        _ => Err(format!("isn't sent on: the program at XDP returns {verdict}")),
    }
}

fn record(
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    source: SocketAddr,
) -> FlowRecord {
    let v4 = |address: SocketAddr| match address.ip() {
        IpAddr::V4(ip) => ip.octets(),
        IpAddr::V6(_) => [0; 4],
    };
    let family = if vip.is_ipv6() { FlowWord::IPV6 } else { 0 };
    FlowRecord {
        word: FlowWord {
            client: FlowWord::FIRST | FlowWord::ACK,
            backend: FlowWord::FIRST,
            // As it is open; by the generation it is none of any backend's.
            flags: family | FlowWord::IN_FLIGHT,
            protocol: IPPROTO_TCP,
        },
        generation: PROOF_GENERATION,
        client_port: client.port(),
        vip_port: vip.port(),
        backend_port: backend.port(),
        source_port: source.port(),
        client: v4(client),
        vip: v4(vip),
        backend: v4(backend),
        source: v4(source),
        ..FlowRecord::default()
    }
}

fn addresses(
    client: SocketAddr,
    vip: SocketAddr,
    backend: SocketAddr,
    source: SocketAddr,
) -> Option<FlowAddresses6> {
    let [client, vip, backend, source] =
        [client, vip, backend, source].map(|address| (address.is_ipv6(), address_of(address.ip())));
    client.0.then_some(FlowAddresses6 {
        client: client.1,
        vip: vip.1,
        backend: backend.1,
        source: source.1,
    })
}

const ETHERNET: usize = 14;
const TCP: usize = 20;

/// A segment of an open connection, with an Ethernet header to this hardware address.
fn packet(mac: [u8; 6], from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let mut tcp = [0u8; TCP];
    tcp[..2].copy_from_slice(&from.port().to_be_bytes());
    tcp[2..4].copy_from_slice(&to.port().to_be_bytes());
    (tcp[12], tcp[13]) = (5 << 4, TCP_ACK);
    let checksum = !checksum(from.ip(), to.ip(), &tcp);
    tcp[16..18].copy_from_slice(&checksum.to_be_bytes());
    let len = tcp.len() as u16;
    let (protocol, mut ip) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, IPPROTO_TCP, 0, 0];
            ip[2..4].copy_from_slice(&(len + 20).to_be_bytes());
            ip.extend(from.octets());
            ip.extend(to.octets());
            let checksum = !folded(sum(&ip));
            ip[10..12].copy_from_slice(&checksum.to_be_bytes());
            (0x0800u16, ip)
        }
        (from, to) => {
            let mut ip = vec![0x60, 0, 0, 0, 0, 0, IPPROTO_TCP, 64];
            ip[4..6].copy_from_slice(&len.to_be_bytes());
            ip.extend(address_of(from).octets);
            ip.extend(address_of(to).octets);
            (0x86dd, ip)
        }
    };
    let mut packet = mac.to_vec();
    // A locally administered hardware address.
    packet.extend([2, 0, 0, 0, 0, 1]);
    packet.extend(protocol.to_be_bytes());
    packet.append(&mut ip);
    packet.extend(tcp);
    packet
}

/// Whether a packet has these ends, and right checksums.
fn is_translated(packet: &[u8], (from, to): (SocketAddr, SocketAddr)) -> Result<(), String> {
    let wrong = || "isn't translated as it is to be".to_owned();
    let ip = packet.get(ETHERNET..).ok_or_else(wrong)?;
    let (ip_len, is_summed) = match from {
        SocketAddr::V4(_) => (20, folded(sum(ip.get(..20).ok_or_else(wrong)?)) == 0xffff),
        SocketAddr::V6(_) => (40, true),
    };
    let (ip, tcp) = ip.split_at_checked(ip_len).ok_or_else(wrong)?;
    let addresses = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
        (from, to) => [from, to].map(|ip| address_of(ip).octets).concat(),
    };
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    if !ip.ends_with(&addresses) || !tcp.starts_with(&ports) {
        return Err(wrong());
    }
    if !is_summed || checksum(from.ip(), to.ip(), tcp) != 0xffff {
        return Err("has a wrong checksum after its translation".to_owned());
    }
    Ok(())
}

/// The sum of a segment and its pseudo-header (RFC 9293, section 3.1).
fn checksum(from: IpAddr, to: IpAddr, tcp: &[u8]) -> u16 {
    // IPv4's are mapped addresses here, whose constant part has to go.
    let address = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => sum(&ip.octets()),
        IpAddr::V6(ip) => sum(&ip.octets()),
    };
    let pseudo = u64::from(IPPROTO_TCP) + tcp.len() as u64;
    folded(address(from) + address(to) + pseudo + sum(tcp))
}

fn sum(octets: &[u8]) -> u64 {
    octets
        .chunks(2)
        .map(|pair| u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0)))
        .sum()
}

/// An address beside one of a network that is neither this host's nor a VIP.
pub fn neighbour(own: IpAddr, prefix: u8, is_taken: impl Fn(&IpAddr) -> bool) -> Option<IpAddr> {
    let max = if own.is_ipv4() { 32 } else { 128 };
    let bits = match own {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    let n_bits = max - prefix.min(max);
    (1..=255u128).map(|flip| (flip, bits ^ flip)).find_map(|(flip, bits)| {
        let is_within = n_bits > 7 || flip < 1 << n_bits;
        // Neither the network's own address nor that of broadcasts.
        let host = bits & ((1 << n_bits.min(127)) - 1);
        let is_host = n_bits < 2 || host != 0 && host != (1 << n_bits.min(127)) - 1;
        let address = match own {
            IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
            IpAddr::V6(_) => IpAddr::V6(bits.into()),
        };
        (is_within && is_host && !is_taken(&address)).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_have_right_checksums() {
        for (from, to) in
            [("198.51.100.7:1", "203.0.113.10:9"), ("[2001:db8::1]:1", "[2001:db8:1::9]:9")]
        {
            let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let mut packet = packet([2; 6], from, to);
            assert_eq!(is_translated(&packet, (from, to)), Ok(()));
            assert!(is_translated(&packet, (to, from)).is_err());
            *packet.last_mut().unwrap() ^= 1;
            let why = is_translated(&packet, (from, to)).unwrap_err();
            assert!(why.contains("checksum"), "{why}");
        }
    }

    #[test]
    fn a_packet_is_tried_again() {
        for (n_failures, expected) in [(0, Ok(())), (3, Ok(())), (4, Err("the 4th".to_owned()))] {
            let mut nth = 0;
            let attempt = || {
                nth += 1;
                if nth > n_failures { Ok(()) } else { Err(format!("the {nth}th")) }
            };
            assert_eq!(tried(attempt), expected);
        }
    }

    #[test]
    fn a_neighbour_is_in_the_network_and_not_this_host() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (own, prefix, expected) in [
            ("10.7.0.1", 24, Some("10.7.0.3")),
            ("10.7.0.2", 24, Some("10.7.0.3")),
            ("10.7.0.1", 31, Some("10.7.0.0")),
            ("10.7.0.1", 32, None),
            ("10.7.0.2", 30, Some("10.7.0.1")),
            ("fd07::1", 64, Some("fd07::3")),
            ("fd07::1", 128, None),
        ] {
            let found =
                neighbour(ip(own), prefix, |address| *address == ip("10.7.0.0") && prefix == 24);
            assert_eq!(found, expected.map(ip), "{own}/{prefix}");
        }
    }
}
