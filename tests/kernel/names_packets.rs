//! The program of the unit `names` on packets of any kind, by BPF_PROG_TEST_RUN: each comes out as it
//! was, or as what the daemon would answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::MapInfo;
use aya::programs::{ProgramFd, loaded_programs};
use lb_tests::prog_run::{ProgRun, prog_run};
use lb_userspace::config::{Config, DnsConfig};
use lb_userspace::datapath::{Datapath, NamesSettings};
use lb_userspace::dns::fuzzing::response;
use lb_userspace::table::Table;

use crate::fixture::{Place, VIP, is_emulated, service};
use crate::names::{self, A, AAAA, HTTPS, PORT, SRV, query};
use crate::netns::inside;

const TC_ACT_UNSPEC: u32 = u32::MAX;
const TC_ACT_REDIRECT: u32 = 7;

const CLIENT_PORT: u16 = 40_000;
const ETHERNET: usize = 14;
const UDP: usize = 8;
const IPV4: usize = 20;
const IPV6: usize = 40;

/// The program, with the maps of a datapath that serves in this network namespace.
struct Names {
    program: ProgramFd,
    datapath: Datapath,
    table: Table,
    config: DnsConfig,
    /// The interface that packets come by; `lo` where it is 0.
    interface: u32,
    n_runs: usize,
    n_answers: usize,
}

/// What may become of a packet, beside the daemon's answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Other {
    /// No daemon runs: SERVFAIL.
    Fails,
    /// One runs, and has the port.
    Passes,
}

impl Names {
    fn new(place: &Place) -> Names {
        let mut datapath = place.start();
        let mut table = names::names();
        let long = "n".repeat(63);
        table.services.insert(long.as_str().into(), service(&long, VIP, &[]).into());
        datapath.apply(&table).unwrap();
        datapath.configure_names(NamesSettings { client_rate: 0, ..names::settings(PORT) });
        let config = Config::default().dns;
        let program = program(place);
        Names { program, datapath, table, config, interface: 0, n_runs: 0, n_answers: 0 }
    }

    /// Runs the program on a packet, and returns it as it comes out; `None` where it passes untouched.
    fn run(&mut self, packet: &[u8], gso_segs: u32) -> Option<Vec<u8>> {
        self.n_runs += 1;
        let (verdict, mut out) = test_run(&self.program, packet, gso_segs, self.interface);
        if self.interface == 0 || verdict == TC_ACT_UNSPEC {
            assert_eq!(verdict, TC_ACT_UNSPEC, "{packet:02x?}");
            return (out != packet).then_some(out);
        }
        assert_eq!(verdict, TC_ACT_REDIRECT, "{packet:02x?}");
        // Back to the hardware address that it came from.
        out[..12].rotate_left(6);
        Some(out)
    }

    /// Checks what becomes of a packet. Returns whether it was answered as by the daemon.
    fn check(&mut self, packet: &[u8], other: Other) -> bool {
        if other == Other::Passes && self.n_runs.is_multiple_of(1_000) {
            self.datapath.heartbeat(None);
        }
        let Some(out) = self.run(packet, 0) else { return false };
        let query = message_of(packet)
            .unwrap_or_else(|| panic!("no plain packet, and yet: {packet:02x?} -> {out:02x?}"));
        let message = message_of(&out).unwrap_or_else(|| panic!("{packet:02x?} -> {out:02x?}"));
        check_packet(packet, &out, message);
        if other == Other::Fails && message == fails(query) {
            return false;
        }
        let expected = response(query, &self.table, &self.config);
        assert_eq!(Some(message), expected.as_deref(), "{packet:02x?}");
        self.n_answers += 1;
        true
    }

    /// The same of a packet that has to be answered as by the daemon.
    fn is_answered(&mut self, packet: &[u8]) {
        assert!(self.check(packet, Other::Fails), "{packet:02x?}");
    }
}

/// The program that uses the maps of `place`.
fn program(place: &Place) -> ProgramFd {
    let map = MapInfo::from_pin(place.pin("v3/maps/NAMES")).unwrap();
    let has_map = |ids: Option<Vec<u32>>| ids.is_some_and(|ids| ids.contains(&map.id()));
    let mut found = loaded_programs()
        .filter_map(Result::ok)
        .filter(|program| program.name() == b"nohop_names" && program.map_ids().is_ok_and(has_map));
    let program = found.next().expect("the program is loaded").fd().unwrap();
    assert!(found.next().is_none(), "two programs");
    program
}

/// Runs a program on a packet: the verdict, and the packet.
fn test_run(program: &ProgramFd, packet: &[u8], gso_segs: u32, interface: u32) -> (u32, Vec<u8>) {
    // struct __sk_buff, up to gso_size.
    let mut context = [0u32; 45];
    (context[10], context[41]) = (interface, gso_segs);
    let context = if context == [0; 45] { &[][..] } else { &context };
    let ProgRun { verdict, packet, .. } = prog_run(program.as_fd(), packet, context, 1);
    (verdict, packet)
}

/// A packet from Ethernet's header on.
fn packet(client: IpAddr, server: IpAddr, message: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; ETHERNET];
    let udp_len = (UDP + message.len()) as u16;
    match (client, server) {
        (IpAddr::V4(client), IpAddr::V4(server)) => {
            packet[12] = 0x08;
            let len = (udp_len + IPV4 as u16).to_be_bytes();
            // The service class, an identification, "don't fragment", and a hop limit.
            packet.extend([0x45, 0x10, len[0], len[1], 0x12, 0x34, 0x40, 0, 61, 17, 0, 0]);
            packet.extend(client.octets().into_iter().chain(server.octets()));
        }
        (IpAddr::V6(client), IpAddr::V6(server)) => {
            packet[12..14].copy_from_slice(&[0x86, 0xdd]);
            let len = udp_len.to_be_bytes();
            packet.extend([0x61, 0x23, 0x45, 0x67, len[0], len[1], 17, 61]);
            packet.extend(client.octets().into_iter().chain(server.octets()));
        }
        _ => panic!("two families"),
    }
    for field in [CLIENT_PORT, PORT, udp_len, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(message);
    sum_up(&mut packet);
    packet
}

fn from_loopback(is_ipv6: bool, message: &[u8]) -> Vec<u8> {
    let address = |is_ipv6| {
        if is_ipv6 { IpAddr::from(Ipv6Addr::LOCALHOST) } else { Ipv4Addr::LOCALHOST.into() }
    };
    packet(address(is_ipv6), address(is_ipv6), message)
}

fn is_ipv6(packet: &[u8]) -> bool {
    packet[12] == 0x86
}

/// Where UDP's header begins.
fn udp(packet: &[u8]) -> usize {
    ETHERNET + if is_ipv6(packet) { IPV6 } else { IPV4 }
}

/// Makes the checksums right.
fn sum_up(packet: &mut [u8]) {
    let udp = udp(packet);
    if !is_ipv6(packet) {
        packet[ETHERNET + 10..ETHERNET + 12].fill(0);
        let sum = !sum(&[&packet[ETHERNET..ETHERNET + IPV4]]);
        packet[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
    }
    packet[udp + 6..udp + 8].fill(0);
    let sum = match !udp_sum(packet) {
        0 => 0xffff,
        sum => sum,
    };
    packet[udp + 6..udp + 8].copy_from_slice(&sum.to_be_bytes());
}

/// The sum of 16-bit words in ones' complement (RFC 1071), word by word.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for word in part.chunks(2) {
            sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
    }
    sum as u16
}

/// Of UDP's header, of what follows it, and of the pseudo-header: 0xffff where the checksum is right.
fn udp_sum(packet: &[u8]) -> u16 {
    let udp = udp(packet);
    let addresses = if is_ipv6(packet) { 8..IPV6 } else { 12..IPV4 };
    let addresses = &packet[ETHERNET + addresses.start..ETHERNET + addresses.end];
    let len = &packet[udp + 4..udp + 6];
    sum(&[addresses, &[0, 17], len, &packet[udp..]])
}

/// The message of a packet that the program may answer: of UDP, without options, extension headers and
/// fragments, whose lengths agree, for one of the two addresses.
fn message_of(packet: &[u8]) -> Option<&[u8]> {
    let number =
        |at: usize| Some(usize::from(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?)));
    let ip = packet.get(ETHERNET..)?;
    let (udp, ip_len) = match packet[12..14] {
        [0x08, 0x00] => {
            let is_plain = *ip.first()? == 0x45 && *ip.get(9)? == 17;
            let is_whole = number(ETHERNET + 6)? & 0x3fff == 0;
            (is_plain && is_whole).then_some((ETHERNET + IPV4, number(ETHERNET + 2)?))?
        }
        [0x86, 0xdd] => {
            let is_plain = *ip.get(6)? == 17;
            is_plain.then_some((ETHERNET + IPV6, number(ETHERNET + 4)? + IPV6))?
        }
        _ => return None,
    };
    let udp_len = number(udp + 4)?;
    let agree = ETHERNET + ip_len == packet.len() && udp + udp_len == packet.len();
    (agree && udp_len >= UDP).then(|| &packet[udp + UDP..])
}

/// The answer of a server that failed: RFC 1035, section 4.1.1.
fn fails(query: &[u8]) -> Vec<u8> {
    let mut message = query.to_vec();
    message[2] = 0x80 | query[2] & 0x79;
    message[3] = 0x80 | query[3] & 0x10 | 2;
    message
}

/// Checks all but the message of an answer: that it goes back to the client, and has the checksums of
/// one, which are as right or as wrong as those of the query were.
fn check_packet(query: &[u8], answer: &[u8], message: &[u8]) {
    let udp = udp(query);
    let mut expected = query[..udp + UDP].to_vec();
    expected.extend(message);
    let udp_len = ((UDP + message.len()) as u16).to_be_bytes();
    let (half, addresses) = if is_ipv6(query) {
        expected[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&udp_len);
        (16, ETHERNET + 8)
    } else {
        let len = ((IPV4 + UDP + message.len()) as u16).to_be_bytes();
        expected[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&len);
        expected[ETHERNET + 10..ETHERNET + 12]
            .copy_from_slice(&answer[ETHERNET + 10..ETHERNET + 12]);
        (4, ETHERNET + 12)
    };
    expected[addresses..addresses + 2 * half].rotate_left(half);
    expected[udp..udp + 4].rotate_left(2);
    expected[udp + 4..udp + 6].copy_from_slice(&udp_len);
    expected[udp + 6..udp + 8].copy_from_slice(&answer[udp + 6..udp + 8]);
    assert_eq!(answer, expected, "{query:02x?}");

    if !is_ipv6(query) {
        let header = |packet: &[u8]| sum(&[&packet[ETHERNET..ETHERNET + IPV4]]) % 0xffff;
        assert_eq!(header(query), header(answer), "IP's checksum: {query:02x?}");
    }
    let checksum = |packet: &[u8]| [packet[udp + 6], packet[udp + 7]];
    assert_eq!(checksum(query) == [0, 0], checksum(answer) == [0, 0], "none: {query:02x?}");
    if checksum(query) != [0, 0] {
        let sum = |packet: &[u8]| udp_sum(packet) % 0xffff;
        assert_eq!(sum(query), sum(answer), "UDP's checksum: {query:02x?} -> {answer:02x?}");
    }
}

/// The reference is right about a packet whose sums were made by hand.
fn reference_is_right() {
    let packet = from_loopback(false, b"\x12\x34");
    assert_eq!(packet[ETHERNET + 10..ETHERNET + 12], [0x2d, 0x89]);
    assert_eq!(udp_sum(&packet), 0xffff);
}

/// With an OPT record of this size of messages, version, flags and options.
fn with_opt(mut message: Vec<u8>, size: u16, version: u8, flags: u16, options: &[u8]) -> Vec<u8> {
    message[11] += 1;
    message.extend([0, 0, 41]);
    message.extend(size.to_be_bytes());
    message.extend([0, version]);
    message.extend(flags.to_be_bytes());
    message.extend((options.len() as u16).to_be_bytes());
    message.extend(options);
    message
}

/// By one program, which takes seconds to load where the processor is emulated.
pub fn of_all_kinds() {
    inside(|| {
        let place = Place::new();
        let mut names = Names::new(&place);
        plain_packets(&mut names);
        kinds_of_edns(&mut names);
        spoiled_packets(&mut names);
        packets_at_a_link(&mut names);
        assert_eq!(names.datapath.names_counters().broken, 0);
    });
}

/// IP options, extension headers, fragments, lengths that disagree, checksums.
fn plain_packets(names: &mut Names) {
    reference_is_right();
    let message = query("web.service", A, true);
    for is_ipv6 in [false, true] {
        let plain = from_loopback(is_ipv6, &message);
        let udp = udp(&plain);
        names.is_answered(&plain);
        let changed = |changes: &[(usize, u8)]| {
            let mut packet = plain.clone();
            changes.iter().for_each(|&(at, byte)| packet[at] = byte);
            packet
        };
        // As wrong as they were, or none: by lo they are mostly none.
        names.is_answered(&changed(&[(udp + 6, 0), (udp + 7, 0)]));
        names.is_answered(&changed(&[(udp + 6, 0x12), (udp + 7, 0x34)]));
        // UDP's length says more, and less; and what follows the packet's end.
        let passing = [
            changed(&[(udp + 5, plain[udp + 5] + 1)]),
            changed(&[(udp + 5, plain[udp + 5] - 1)]),
            changed(&[(udp + 4, 0), (udp + 5, 0)]),
            changed(&[(udp + 4, 0), (udp + 5, 7)]),
            changed(&[(udp + 4, 0xff), (udp + 5, 0xff)]),
            [&plain[..], &[0]].concat(),
            changed(&[(12, 0x81), (13, 0)]),
            changed(&[(udp + 3, plain[udp + 3] ^ 1)]),
        ];
        let [len, protocol] = if is_ipv6 { [4, 6] } else { [2, 9] }.map(|at| ETHERNET + at);
        let of_ip = [
            changed(&[(len + 1, plain[len + 1] + 1)]),
            changed(&[(len + 1, plain[len + 1] - 1)]),
            changed(&[(len, 0), (len + 1, 0)]),
            changed(&[(len, 0xff), (len + 1, 0xff)]),
        ];
        for packet in passing.into_iter().chain(of_ip) {
            assert_eq!(names.run(&packet, 0), None, "{packet:02x?}");
        }
        for number in (0..=255).filter(|number| *number != 17) {
            assert_eq!(names.run(&changed(&[(protocol, number)]), 0), None, "protocol {number}");
        }
        for n_segments in [2, 64] {
            assert_eq!(names.run(&plain, n_segments), None, "a batch of {n_segments}");
        }
        assert!(names.run(&plain, 1).is_some(), "a batch of one");
        // From the DNS server's own port, and from clients that aren't served.
        assert_eq!(names.run(&changed(&[(udp, 0), (udp + 1, 53)]), 0), None, "from port 53");
    }
    let strangers = ["192.0.2.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "240.0.0.1"];
    let strangers6 = ["2001:db8::1", "::", "ff02::1", "::ffff:10.0.0.1", "fe80::1"];
    for source in strangers.into_iter().chain(strangers6) {
        let source: IpAddr = source.parse().unwrap();
        let server = if source.is_ipv4() {
            IpAddr::from(Ipv4Addr::LOCALHOST)
        } else {
            Ipv6Addr::LOCALHOST.into()
        };
        assert_eq!(names.run(&packet(source, server, &message), 0), None, "{source}");
    }
    // Options of IPv4, of each length, and the parts of a fragmented packet.
    let plain = from_loopback(false, &message);
    for n_words in 1..=10usize {
        let mut packet = plain.clone();
        packet[ETHERNET] += n_words as u8;
        packet[ETHERNET + 3] += 4 * n_words as u8;
        packet.splice(ETHERNET + IPV4..ETHERNET + IPV4, std::iter::repeat_n(1, 4 * n_words));
        assert_eq!(names.run(&packet, 0), None, "{n_words} words of options");
    }
    for fragment in [0x2000u16, 0x6000, 1, 0x1fff, 0x3fff] {
        let mut packet = plain.clone();
        packet[ETHERNET + 6..ETHERNET + 8].copy_from_slice(&fragment.to_be_bytes());
        assert_eq!(names.run(&packet, 0), None, "fragment {fragment:04x}");
    }
    // Extension headers of IPv6: hop by hop, routing, fragment, authentication, destination options.
    let plain = from_loopback(true, &message);
    for header in [0, 43, 44, 51, 60] {
        let mut packet = plain.clone();
        packet[ETHERNET + 5] += 8;
        packet[ETHERNET + 6] = header;
        packet.splice(ETHERNET + IPV6..ETHERNET + IPV6, [17, 0, 1, 4, 0, 0, 0, 0]);
        assert_eq!(names.run(&packet, 0), None, "extension header {header}");
    }
}

/// Forged sources, and hardware addresses of many, at an interface that leads to other hosts.
fn packets_at_a_link(names: &mut Names) {
    for words in [
        "link add d0 address 02:00:00:00:00:01 type veth peer name d1",
        "addr add 10.5.0.1/24 dev d0",
        "addr add fd05::1/64 dev d0 nodad",
        "link set d0 up",
        "link set d1 up",
    ] {
        let ip = std::process::Command::new("ip").args(words.split(' ')).status().unwrap();
        assert!(ip.success(), "{words}");
    }
    let index = std::fs::read_to_string("/proc/thread-self/net/dev_mcast").unwrap();
    let index = index.lines().find(|line| line.contains(" d0 ")).unwrap();
    names.interface = index.split_whitespace().next().unwrap().parse().unwrap();
    let listen = ["10.5.0.1", "fd05::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), PORT));
    names.datapath.configure_names(NamesSettings {
        listen: listen.into(),
        allowed: ["0.0.0.0/0", "::/0"].map(|network| network.parse().unwrap()).into(),
        client_rate: 0,
        ..names::settings(PORT)
    });
    // Without it bpf_fib_lookup finds no way, and the daemon answers.
    for family in ["ipv4/conf", "ipv6/conf"] {
        let forwarding = format!("/proc/sys/net/{family}/d0/forwarding");
        std::fs::write(&forwarding, "1").unwrap_or_else(|error| panic!("{forwarding}: {error}"));
    }
    let message = query("web.service", A, true);
    let from = |source: &str| {
        let source: IpAddr = source.parse().unwrap();
        let [server, server6] = listen.map(|address| address.ip());
        let server = if source.is_ipv4() { server } else { server6 };
        let mut packet = packet(source, server, &message);
        packet[..12].copy_from_slice(&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        packet
    };
    for source in ["10.5.0.2", "fd05::2"] {
        names.is_answered(&from(source));
        // The answer would come from such a hardware address.
        for to in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            let mut to_many = from(source);
            to_many[..6].copy_from_slice(&to);
            assert_eq!(names.run(&to_many, 0), None, "to {to:02x?}, from {source}");
        }
    }
    let forged = ["8.8.8.8", "0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1"];
    let own = ["10.5.0.1", "10.5.0.255", "fd05::1"];
    let forged6 = ["2001:db8::1", "::", "::1", "ff02::1", "::ffff:10.5.0.2"];
    for source in forged.into_iter().chain(own).chain(forged6) {
        assert_eq!(names.run(&from(source), 0), None, "{source}");
    }
}

/// Every truncation, every byte another, and changes at random.
fn spoiled_packets(names: &mut Names) {
    let n_before = names.n_answers;
    let long = format!("{}.service", "N".repeat(63));
    let below = "a.web.service";
    let cookie = [0, 10, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8];
    let messages = [
        query("web.service", A, false),
        query("Cold.SERVICE", AAAA, false),
        with_opt(query("WEB.service", AAAA, false), 4096, 0, 0x8000, &cookie),
        query(&long, HTTPS, true),
        query("web.service", SRV, true),
        query(below, A, false),
        // Compression: the name ends by a pointer to a part of itself, and to what follows.
        [&query("web.service", A, false)[..16], &[0xc0, 12, 0, 1, 0, 1]].concat(),
        [&query("web.service", A, false)[..], &query("service", A, false)[12..]].concat(),
    ];
    for (idx, message) in messages.iter().enumerate() {
        for is_ipv6 in
            [false, true].into_iter().filter(|is_ipv6| !is_emulated() || *is_ipv6 == (idx % 2 == 0))
        {
            let plain = from_loopback(is_ipv6, message);
            assert_eq!(names.check(&plain, Other::Fails), idx < 4, "{message:02x?}");
            // The message ends early, and the packet's lengths are right.
            for len in 0..message.len() {
                names.check(&from_loopback(is_ipv6, &message[..len]), Other::Fails);
            }
            // The packet ends early.
            for len in (udp(&plain)..plain.len()).filter(|_| idx < 2) {
                assert_eq!(names.run(&plain[..len], 0), None, "{len} of {plain:02x?}");
            }
            // Each byte is another one: checksums are wrong then, or are right again. Every value, or
            // each bit.
            let has_all = [0, 2].contains(&idx) && !is_emulated();
            let values: Vec<u8> =
                if has_all { (1..=255).collect() } else { (0..8).map(|bit| 1 << bit).collect() };
            for (at, value) in
                (ETHERNET..plain.len()).flat_map(|at| values.iter().map(move |v| (at, v)))
            {
                let mut packet = plain.clone();
                packet[at] ^= value;
                names.check(&packet, Other::Fails);
            }
        }
    }
    at_random(names, &messages, Other::Fails);
    let n_without = names.n_answers - n_before;

    let listeners = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let _sockets = listeners.map(|ip| UdpSocket::bind((ip, PORT)).unwrap());
    names.datapath.set_names_ready(true);
    names.datapath.heartbeat(None);
    at_random(names, &messages, Other::Passes);
    eprintln!("{} packets, {} answered as by the daemon", names.n_runs, names.n_answers);
    assert!(n_without > 500 && names.n_answers > n_before + n_without, "{n_without}");
}

/// Messages with a few changes, in packets with or without some.
fn at_random(names: &mut Names, messages: &[Vec<u8>], other: Other) {
    let mut random = fastrand::Rng::with_seed(16);
    for _ in 0..if is_emulated() { 1_000 } else { 40_000 } {
        let mut message = messages[random.usize(..messages.len())].clone();
        for _ in 0..random.usize(..4) {
            let at = random.usize(..message.len());
            match random.u8(..8) {
                0 => message.truncate(at.max(1)),
                1 => message.extend(std::iter::repeat_n(random.u8(..), random.usize(..70))),
                2 => message.insert(at, random.u8(..)),
                3 => drop((message.len() > 1).then(|| message.remove(at))),
                4 => message = with_opt(message_with_header(message), random.u16(..), 0, 0, &[]),
                5 => message[at] ^= 0x20,
                _ => message[at] = random.u8(..),
            }
        }
        let mut packet = from_loopback(random.bool(), &message);
        if random.u8(..8) == 0 {
            let at = random.usize(ETHERNET..packet.len());
            packet[at] = random.u8(..);
        }
        names.check(&packet, other);
    }
}

/// As long as a header, so that its counts can be changed.
fn message_with_header(mut message: Vec<u8>) -> Vec<u8> {
    message.resize(message.len().max(12), 0);
    message[11] &= 0x7f;
    message
}

/// EDNS: every size, every version, flags, options, OPT records at wrong places.
fn kinds_of_edns(names: &mut Names) {
    for name in ["web.service", "cold.service"] {
        let plain = query(name, A, false);
        for size in (0..=u16::MAX).step_by(if is_emulated() { 4_095 } else { 3 }) {
            names.is_answered(&from_loopback(
                size % 2 == 0,
                &with_opt(plain.clone(), size, 0, 0, &[]),
            ));
        }
        for flag in 0..16 {
            names.is_answered(&from_loopback(
                true,
                &with_opt(plain.clone(), 512, 0, 1 << flag, &[]),
            ));
        }
        for version in 0..=255 {
            let message = with_opt(plain.clone(), 1232, version, 0, &[]);
            assert_eq!(names.check(&from_loopback(false, &message), Other::Fails), version == 0);
        }
        // Options up to the length that the program reads, whatever they are.
        for len in 0..80 {
            for filling in [0, 1, 255] {
                let message = with_opt(plain.clone(), 1232, 0, 0, &vec![filling; len]);
                let packet = from_loopback(len % 2 == 0, &message);
                assert_eq!(names.check(&packet, Other::Fails), len <= 53, "{len} of {filling}");
            }
        }
        let one = with_opt(plain.clone(), 1232, 0, 0, &[]);
        let len = one.len();
        let with = |at: usize, byte: u8| {
            let mut message = one.clone();
            message[at] = byte;
            message
        };
        let others = [
            ("two", with_opt(one.clone(), 1232, 0, 0, &[])),
            ("a record after it", [&with(11, 2)[..], &[0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0]].concat()),
            ("it is an answer", [&one[..6], &[0, 1, 0, 0, 0, 0], &one[12..]].concat()),
            ("it isn't the root's", with(len - 11, 1)),
            ("another type", with(len - 9, 42)),
            ("options that aren't there", with(len - 1, 4)),
            ("a record that isn't there", [&plain[..11], &[1], &plain[12..]].concat()),
            ("bytes after it", [&one[..], &[0]].concat()),
        ];
        for (what, message) in others {
            assert!(!names.check(&from_loopback(false, &message), Other::Fails), "{what}");
        }
        let mut extended = one.clone();
        extended[len - 6] = 1; // the upper bits of a code, which no query has
        names.check(&from_loopback(false, &extended), Other::Fails);
    }
}

/// Several datagrams in one send, by UDP_SEGMENT, reach the socket as they were, each by itself. On 5.10
/// they come by `lo` one by one, and so are answered.
pub fn batches_pass() {
    inside(|| {
        let place = Place::new();
        let datapath = names::serve(&place);
        let mut n_answered = 0;
        for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            assert_eq!(n_of_batch(SocketAddr::new(ip, PORT + 1)), 3);
            let n_received = n_of_batch(SocketAddr::new(ip, PORT));
            let answered = datapath.names_counters().answered as usize;
            assert_eq!(n_received + answered - n_answered, 3);
            assert!(n_received == 3 || crate::running_kernel() < (6, 1));
            n_answered = answered;
        }
    });
}

/// Sends three queries at once, which the unit would answer, and then one that passes. Returns how many
/// of the three a socket there received.
fn n_of_batch(server: SocketAddr) -> usize {
    let listener = UdpSocket::bind(server).unwrap();
    let client = names::socket(server.ip());
    listener.set_read_timeout(client.read_timeout().unwrap()).unwrap();
    client.connect(server).unwrap();
    let (message, last) = (query("web.service", A, true), query("none.service", A, false));
    let size = libc::c_int::try_from(message.len()).unwrap();
    // SAFETY: the option is an int.
    let set = unsafe {
        libc::setsockopt(
            client.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    assert_eq!(set, 0);
    client.send(&message.repeat(3)).unwrap();
    client.send(&last).unwrap();
    let (mut buffer, mut n_received) = ([0; 512], 0);
    loop {
        let len = listener.recv(&mut buffer).unwrap();
        // Behind what was before it.
        if buffer[..len] == last {
            return n_received;
        }
        assert_eq!(buffer[..len], message, "as it was sent");
        n_received += 1;
    }
}
