//! The unit `edge` and packets that aren't as they should be, and links of other kinds.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use lb_common::FlowWord;
use lb_userspace::datapath::{Datapath, EdgeFlow, EdgeFlowState, EdgeOptions};
use rustix::net::sockopt::{Timeout, set_socket_reuseaddr, set_socket_timeout};
use rustix::net::{AddressFamily, SocketType, bind, ipproto, listen, socket};

use crate::edge::{
    BACKEND, CLIENT, LONG, Network, PORT, PUBLIC, SILENT, SOURCE, apply, count, end_server, ends,
    exchange, flows, options, place, public, request, serve, serve_with, start_server, stop_server,
    web,
};
use crate::names::Container;
use crate::netns::{inside, ip};
use crate::running_kernel;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The hardware address of an interface in this thread's network namespace.
fn mac(device: &str) -> [u8; 6] {
    let output = Command::new("ip").args(["-o", "link", "show", device]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split("link/ether ").nth(1).unwrap().split(' ').next().unwrap();
    let octets: Vec<u8> = mac.split(':').map(|it| u8::from_str_radix(it, 16).unwrap()).collect();
    octets.try_into().unwrap()
}

/// Sends a packet by `v1` of this thread's network namespace, as it is, behind a VLAN tag or none.
fn send([to, from]: [[u8; 6]; 2], tag: &[u8], packet: &[u8]) {
    let kind: u16 = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
    let frame = [&to[..], &from, tag, &kind.to_be_bytes(), packet].concat();
    let name = std::ffi::CString::new("v1").unwrap();
    // SAFETY: the name lives until the call ends; the address is a sockaddr_ll of the length that is named, and the
    // frame as long.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        let socket = OwnedFd::from_raw_fd(socket);
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        address.sll_halen = 6;
        let sent = libc::sendto(
            socket.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        );
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
    }
}

/// A socket that receives what this thread's network namespace does, from the IP header on.
fn all_packets() -> OwnedFd {
    let value = |number: libc::c_int| (&raw const number).cast::<libc::c_void>();
    // SAFETY: the option's value lives until the call ends, and is as long as is named.
    unsafe {
        let every = libc::c_int::from((libc::ETH_P_ALL as u16).to_be());
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, every);
        assert!(socket >= 0);
        let (level, option) = (libc::SOL_PACKET, libc::PACKET_AUXDATA);
        assert_eq!(libc::setsockopt(socket, level, option, value(1), 4), 0);
        OwnedFd::from_raw_fd(socket)
    }
}

/// Whether the next such packet has a VLAN tag.
fn has_tag(socket: &OwnedFd, is_it: impl Fn(&[u8]) -> bool) -> bool {
    set_socket_timeout(socket, Timeout::Recv, Some(LONG)).unwrap();
    loop {
        let (mut packet, mut control) = ([0u8; 2_048], [0u64; 16]);
        let mut part = libc::iovec { iov_base: packet.as_mut_ptr().cast(), iov_len: packet.len() };
        // SAFETY: all that the message names lives until the calls end; the kernel sends one control message, of this
        // type.
        let (len, data) = unsafe {
            let mut message: libc::msghdr = std::mem::zeroed();
            (message.msg_iov, message.msg_iovlen) = (&raw mut part, 1);
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = size_of_val(&control);
            let len = libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0);
            assert!(len >= 0, "{}", std::io::Error::last_os_error());
            let data = libc::CMSG_DATA(libc::CMSG_FIRSTHDR(&raw const message));
            (len as usize, data.cast::<libc::tpacket_auxdata>().read_unaligned())
        };
        if is_it(&packet[..len]) {
            return data.tp_status & libc::TP_STATUS_VLAN_VALID != 0;
        }
    }
}

fn sum(octets: &[u8]) -> u32 {
    octets.chunks(2).map(|it| u32::from(it[0]) << 8 | u32::from(*it.get(1).unwrap_or(&0))).sum()
}

fn checksum(sum: u32) -> [u8; 2] {
    let once = (sum & 0xffff) + (sum >> 16);
    (!(((once & 0xffff) + (once >> 16)) as u16)).to_be_bytes()
}

/// A packet of a client's to a VIP.
#[derive(Clone)]
struct Spec {
    source: IpAddr,
    protocol: u8,
    from_port: u16,
    port: u16,
    hops: u8,
    tcp_flags: u8,
    /// Options of IPv4, or extension headers of IPv6, of so many octets as the family wants.
    options: Vec<u8>,
    /// The number of the first extension header.
    extension: u8,
    tcp_options: Vec<u8>,
    data: Vec<u8>,
}

/// Destination options, and a fragment's header (RFC 8200, sections 4.5 and 4.6).
const DESTINATION: u8 = 60;
const FRAGMENT: u8 = 44;
const ROUTING: u8 = 43;

fn tcp(source: IpAddr) -> Spec {
    Spec {
        source,
        protocol: TCP,
        from_port: 7_001,
        port: 80,
        hops: 64,
        tcp_flags: SYN,
        options: Vec::new(),
        extension: DESTINATION,
        tcp_options: Vec::new(),
        data: Vec::new(),
    }
}

fn udp(source: IpAddr) -> Spec {
    Spec { protocol: UDP, data: vec![1, 2, 3, 4], ..tcp(source) }
}

impl Spec {
    fn packet(&self) -> Vec<u8> {
        let Spec { source, protocol, port, hops, options, tcp_options, data, .. } = self;
        let mut l4 = match *protocol {
            TCP => {
                let offset = ((20 + tcp_options.len()) as u8 / 4) << 4;
                vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, offset, self.tcp_flags, 4, 0, 0, 0, 0, 0]
            }
            _ => vec![0, 0, 0, 0, 0, 8 + data.len() as u8, 0, 0],
        };
        l4.extend(tcp_options);
        l4.extend(data);
        l4[..2].copy_from_slice(&self.from_port.to_be_bytes());
        l4[2..4].copy_from_slice(&port.to_be_bytes());
        let at = if *protocol == TCP { 16 } else { 6 };
        let addresses = match source {
            IpAddr::V4(ip) => [ip.octets(), PUBLIC.octets()].concat(),
            IpAddr::V6(ip) => [ip.octets(), vip6().octets()].concat(),
        };
        let of_l4 = checksum(sum(&addresses) + u32::from(*protocol) + l4.len() as u32 + sum(&l4));
        l4[at..at + 2].copy_from_slice(&of_l4);
        match source {
            IpAddr::V4(_) => {
                let header = 20 + options.len();
                let first = 0x40 | (header / 4) as u8;
                let mut ip = vec![first, 0, 0, 0, 0, 0, 0, 0, *hops, *protocol, 0, 0];
                ip[2..4].copy_from_slice(&((header + l4.len()) as u16).to_be_bytes());
                ip.extend(addresses);
                ip.extend(options);
                seal(&mut ip);
                ip.extend(l4);
                ip
            }
            IpAddr::V6(_) => {
                // The extension header names the protocol.
                let next = if options.is_empty() { *protocol } else { self.extension };
                let mut ip = vec![0x60, 0, 0, 0, 0, 0, next, *hops];
                ip[4..6].copy_from_slice(&((options.len() + l4.len()) as u16).to_be_bytes());
                ip.extend(addresses);
                ip.extend(options);
                ip.extend(l4);
                ip
            }
        }
    }
}

/// Writes an IPv4 header's checksum.
fn seal(ip: &mut [u8]) {
    let len = usize::from(ip[0] & 15) * 4;
    ip[10..12].fill(0);
    let of_header = checksum(sum(&ip[..len.clamp(20, ip.len())]));
    ip[10..12].copy_from_slice(&of_header);
}

fn vip6() -> Ipv6Addr {
    "fd99::10".parse().unwrap()
}

/// The IPv6 extension header of a fragment of a datagram: from this eight octets on, and whether more follow.
fn fragment(offset: u16, is_more: bool) -> Vec<u8> {
    let [high, low] = (offset << 3 | u16::from(is_more)).to_be_bytes();
    vec![UDP, 0, high, low, 0, 0, 0, 7]
}

/// Each is dropped and counted by its own reason, or served where it is sound; no backend is the worse for it.
pub fn packets_that_are_not_right() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let others = ["203.0.113.11:80", "[fd99::11]:80"].map(|vip| vip.parse().unwrap());
        let datapath = serve(&place, vec![web(), public("other", &[], &others)]);
        let macs = [mac("out"), network.client.run(|| mac("v1"))];
        let client: IpAddr = CLIENT.into();
        let client6: IpAddr = "fd51::2".parse().unwrap();
        let changed = |spec: Spec, change: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = spec.packet();
            change(&mut packet);
            if spec.source.is_ipv4() {
                seal(&mut packet);
            }
            packet
        };
        let from = |ip: &str| tcp(ip.parse().unwrap()).packet();
        let with = |spec: Spec, change: &dyn Fn(&mut Spec)| {
            let mut spec = spec;
            change(&mut spec);
            spec.packet()
        };
        // Destination options, with a PadN.
        let extension = |next: u8| [next, 0, 1, 4, 0, 0, 0, 0];
        let six = [extension(DESTINATION); 6].concat();
        let of_flow = |len: usize| {
            let inner = udp(client).packet();
            let mut error =
                [&[3, 4, 0, 0, 0, 0, 5, 0][..], &inner[..len.min(inner.len())]].concat();
            let sum = checksum(sum(&error));
            error[2..4].copy_from_slice(&sum);
            let mut ip = vec![0x45, 0, 0, 20 + error.len() as u8, 0, 0, 0, 0, 64, 1, 0, 0];
            ip.extend([CLIENT.octets(), PUBLIC.octets()].concat());
            seal(&mut ip);
            [ip, error].concat()
        };
        let mut header_sum = tcp(client).packet();
        header_sum[10] ^= 1;
        let mut header_sum_udp = udp(client).packet();
        header_sum_udp[10] ^= 1;
        let cases: Vec<(&str, &str, Vec<u8>)> = vec![
            (
                "an IPv4 packet that is cut short",
                "bad_header",
                changed(tcp(client), &|it| it.truncate(30)),
            ),
            (
                "an IPv4 length beyond the packet",
                "bad_header",
                changed(tcp(client), &|it| it[3] = 200),
            ),
            ("an IPv4 length of 0", "bad_header", changed(tcp(client), &|it| it[3] = 0)),
            ("an IPv4 header of 16 octets", "bad_header", changed(tcp(client), &|it| it[0] = 0x44)),
            (
                "an IPv4 header beyond its packet",
                "bad_header",
                changed(tcp(client), &|it| it[0] = 0x4f),
            ),
            ("IPv5", "bad_header", changed(tcp(client), &|it| it[0] = 0x55)),
            (
                "a TCP header of 16 octets",
                "bad_header",
                changed(tcp(client), &|it| it[32] = 4 << 4),
            ),
            (
                "a TCP header beyond its packet",
                "bad_header",
                changed(tcp(client), &|it| it[32] = 15 << 4),
            ),
            ("from port 0", "bad_header", changed(tcp(client), &|it| it[20..22].fill(0))),
            (
                "a UDP length beyond the packet",
                "bad_header",
                changed(udp(client), &|it| it[25] = 99),
            ),
            ("a UDP length of 4", "bad_header", changed(udp(client), &|it| it[25] = 4)),
            (
                "an IPv6 packet that is cut short",
                "bad_header",
                changed(tcp(client6), &|it| it.truncate(50)),
            ),
            (
                "an IPv6 length beyond the packet",
                "bad_header",
                changed(tcp(client6), &|it| it[5] = 200),
            ),
            (
                "an IPv6 packet without a length",
                "bad_header",
                changed(tcp(client6), &|it| it[5] = 0),
            ),
            (
                "more extension headers than are followed",
                "bad_header",
                with(udp(client6), &|it| it.options = [&six[..], &extension(UDP)].concat()),
            ),
            ("an ICMP error about a part of a header", "bad_header", of_flow(12)),
            ("from 127.0.0.1", "martian", from("127.0.0.1")),
            ("from 0.0.0.0", "martian", from("0.0.0.0")),
            ("from a multicast address", "martian", from("224.0.0.1")),
            ("from the broadcast address", "martian", from("255.255.255.255")),
            ("from ::1", "martian", from("::1")),
            ("from a link-local address", "martian", from("fe80::1")),
            ("from an IPv6 multicast address", "martian", from("ff02::1")),
            ("from the VIP itself", "martian", from("203.0.113.10")),
            ("from the IPv6 VIP itself", "martian", from("fd99::10")),
            ("from another VIP", "martian", udp("203.0.113.11".parse().unwrap()).packet()),
            ("from another VIP, by TCP", "flows_begun", from("203.0.113.11")),
            ("from another IPv6 VIP", "martian", udp("fd99::11".parse().unwrap()).packet()),
            ("from between the VIPs", "flows_begun", from("203.0.113.12")),
            ("from edge.source", "martian", from("10.7.0.1")),
            ("from edge.source of IPv6", "martian", from("fd07::1")),
            ("a first fragment", "fragment", changed(udp(client), &|it| it[6] = 0x20)),
            ("a later fragment", "fragment", changed(udp(client), &|it| it[7] = 1)),
            (
                "a first fragment of IPv6",
                "fragment",
                with(udp(client6), &|it| {
                    (it.extension, it.options) = (FRAGMENT, fragment(0, true))
                }),
            ),
            (
                "the last fragment of IPv6",
                "fragment",
                with(udp(client6), &|it| {
                    (it.extension, it.options) = (FRAGMENT, fragment(9, false))
                }),
            ),
            ("a hop limit of 1", "hop_limit", with(tcp(client), &|it| it.hops = 1)),
            ("a hop limit of 0", "hop_limit", with(udp(client), &|it| it.hops = 0)),
            ("a hop limit of 1 of IPv6", "hop_limit", with(tcp(client6), &|it| it.hops = 1)),
            ("a wrong checksum", "bad_checksum", changed(tcp(client), &|it| it[36] ^= 1)),
            (
                "a wrong checksum over IPv6",
                "bad_checksum",
                changed(tcp(client6), &|it| it[56] ^= 1),
            ),
            ("a wrong checksum of the IPv4 header", "bad_checksum", header_sum),
            ("the same of a datagram", "bad_checksum", header_sum_udp),
            ("a SYN with a FIN", "unknown_flow", with(tcp(client), &|it| it.tcp_flags = 3)),
            ("no flags of TCP", "unknown_flow", with(tcp(client), &|it| it.tcp_flags = 0)),
            ("a port that no service has", "no_frontend", with(udp(client), &|it| it.port = 81)),
            ("IPv4 options", "flows_begun", with(udp(client), &|it| it.options = vec![1, 1, 1, 0])),
            (
                "an extension header",
                "flows_begun",
                with(udp(client6), &|it| it.options = extension(UDP).into()),
            ),
        ];
        let counted = |what: &str, reason: &str, tag: &'static [u8], packet: Vec<u8>| {
            let before = (count(&datapath, reason), count(&datapath, "flows_begun"));
            network.client.run(move || send(macs, tag, &packet));
            let start = Instant::now();
            while count(&datapath, reason) == before.0 {
                assert!(start.elapsed() < LONG, "{what}: {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
            assert_eq!(count(&datapath, reason), before.0 + 1, "{what}");
            if reason != "flows_begun" {
                assert_eq!(count(&datapath, "flows_begun"), before.1, "{what}");
            }
        };
        for (what, reason, packet) in cases {
            counted(what, reason, &[], packet);
        }
        // A whole packet in one fragment (RFC 6946); a tag that names no VLAN.
        let other = |source| Spec { from_port: 7_002, ..udp(source) };
        let whole = with(other(client6), &|it| {
            (it.extension, it.options) = (FRAGMENT, fragment(0, false));
        });
        counted("a fragment that is all", "flows_begun", &[], whole);
        let received = network.backend.run(all_packets);
        counted("a tag of a priority", "flows_begun", &[0x81, 0, 0xe0, 0], other(client).packet());
        let is_it = |packet: &[u8]| packet[9] == UDP && packet.ends_with(&other(client).data);
        assert!(!has_tag(&received, is_it), "it leaves with its tag");
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let answer = network.client.run(move || request(vip, b"?"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"));
        stop_server(&network.backend, BACKEND.into());
    });
}

/// Of SYNs that a backend may drop or refuse though it is well no failure follows, or anyone could have it ejected.
pub fn syns_that_show_nothing() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let vips = ends().map(|ends| ends.vip);
        // No host has these.
        let silent = [(SILENT, PORT).into(), "[fd07::9]:8080".parse().unwrap()];
        let mut datapath = serve(&place, vec![public("web", &silent, &vips)]);
        let macs = [mac("out"), network.client.run(|| mac("v1"))];
        let [client, client6] = ends().map(|ends| ends.client);
        let md5 = [&[1, 1, 19, 18][..], &[7; 16]].concat();
        let route = [&[TCP, 2, 0, 1, 0, 0, 0, 0][..], &[0xfd; 16]].concat();
        let long = vec![8, 99, 0, 0];
        let cases = [
            ("a hop limit of 2", Spec { hops: 2, ..tcp(client) }),
            ("a hop limit of 2 of IPv6", Spec { hops: 2, ..tcp(client6) }),
            ("TCP's MD5", Spec { tcp_options: md5.clone(), ..tcp(client) }),
            ("an option beyond its header", Spec { tcp_options: long, ..tcp(client6) }),
            ("a source route", Spec { options: vec![131, 7, 4, 10, 7, 0, 9, 0], ..tcp(client) }),
            ("a routing header", Spec { extension: ROUTING, options: route, ..tcp(client6) }),
            ("data that isn't whole here", Spec { data: vec![7; 200], ..tcp(client) }),
        ];
        let indices = datapath.indices("web").unwrap();
        let [v4, v6] = silent.map(|address| indices.backends[&address]);
        let (counters, mut n_begun) = (datapath.counters(), 0);
        let mut begin = |what: &str, spec: Spec| {
            n_begun += 1;
            let packet = Spec { from_port: 7_000 + n_begun, ..spec }.packet();
            network.client.run(move || send(macs, &[], &packet));
            let start = Instant::now();
            while count(&datapath, "flows_begun") < n_begun.into() {
                assert!(start.elapsed() < LONG, "{what}: {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
            [v4, v6].map(|idx| counters.outcomes(idx).pending)
        };
        for (what, spec) in cases {
            assert_eq!(begin(what, spec), [0, 0], "{what}");
        }
        assert_eq!(begin("a usual one", tcp(client)), [1, 0]);
        assert_eq!(begin("one of IPv6", tcp(client6)), [1, 1]);
        datapath.sweep_edge_after(Duration::from_secs(3_600));
        assert_eq!([v4, v6].map(|idx| counters.backend_failures(idx)), [1, 1]);
        assert_eq!([v4, v6].map(|idx| counters.outcomes(idx).in_flight), [0, 0]);

        // A server that drops one refuses what comes behind it, and it refuses a SYN that joins a connection of
        // MPTCP which it doesn't have.
        apply(&mut datapath, vec![public("other", &[(BACKEND, PORT).into()], &[vips[0]])]);
        let idx = datapath.indices("other").unwrap().backends[&(BACKEND, PORT).into()];
        let answered = |what: &str, specs: &[Spec]| {
            let packets: Vec<_> = specs.iter().map(Spec::packet).collect();
            let n_forwarded = count(&datapath, "forwarded") + packets.len() as u64 + 1;
            network.client.run(move || packets.iter().for_each(|packet| send(macs, &[], packet)));
            let start = Instant::now();
            while count(&datapath, "forwarded") < n_forwarded {
                assert!(start.elapsed() < LONG, "{what}: {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
        };
        let shows_nothing = |what: &str, specs: &[Spec]| {
            answered(what, specs);
            assert_eq!(counters.outcomes(idx).in_flight, 0, "{what}");
            assert!(counters.ejected(idx).is_none(), "{what}");
        };
        start_server(&network.backend, BACKEND.into(), 'A');
        let dropped = Spec { from_port: 7_101, tcp_options: md5, ..tcp(client) };
        let behind = Spec { tcp_flags: ACK, tcp_options: Vec::new(), ..dropped.clone() };
        shows_nothing("TCP's MD5, then an ACK", &[dropped, behind]);
        end_server(&network.backend, BACKEND.into());
        let listener = network.backend.run(|| {
            let socket =
                socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::MPTCP)).ok()?;
            // The server's last connection may still be there.
            set_socket_reuseaddr(&socket, true).unwrap();
            bind(&socket, &SocketAddr::from((BACKEND, PORT))).unwrap();
            listen(&socket, 1).unwrap();
            Some(socket)
        });
        let join = vec![30, 12, 0x10, 2, 0, 0, 0, 7, 0, 0, 0, 9];
        let join = Spec { from_port: 7_102, tcp_options: join, ..tcp(client) };
        // Before that it takes such a SYN for one of TCP.
        if listener.is_some() && running_kernel() >= (6, 1) {
            shows_nothing("a SYN that joins a connection of MPTCP", std::slice::from_ref(&join));
        }
        drop(listener);
        shows_nothing("a hop limit of 3", &[Spec { from_port: 7_103, hops: 3, ..tcp(client) }]);
        let is_ejected = |expected: bool| {
            let start = Instant::now();
            while counters.ejected(idx).is_some() != expected {
                assert!(start.elapsed() < LONG, "{expected}: {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
        };
        answered("a usual one", &[Spec { from_port: 7_104, ..tcp(client) }]);
        is_ejected(true);
        // That one is answered shows what it does.
        start_server(&network.backend, BACKEND.into(), 'A');
        answered("a hop limit of 3", &[Spec { from_port: 7_105, hops: 3, ..tcp(client) }]);
        is_ejected(false);
        stop_server(&network.backend, BACKEND.into());
    });
}

/// A client that hasn't seen the backend's SYN doesn't establish a connection, whatever it sends: its flow gives way as
/// one that isn't established. Nor is the backend ejected that resets what isn't right.
pub fn handshakes_that_are_not_completed() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let datapath = serve(&place, vec![web()]);
        let macs = [mac("out"), network.client.run(|| mac("v1"))];
        let [client, _] = ends().map(|ends| ends.client);
        // No host has it, so none resets what it gets.
        let nobody = match client {
            IpAddr::V4(ip) => IpAddr::from((u32::from(ip) + 7).to_be_bytes()),
            other => other,
        };
        start_server(&network.backend, BACKEND.into(), 'A');
        let idx = datapath.indices("web").unwrap().backends[&(BACKEND, PORT).into()];
        let flow = |port: u16| {
            let is_it = |flow: &EdgeFlow| flow.client == (nobody, port).into();
            flows(&datapath).into_iter().find(is_it)
        };
        let wait = |port: u16, what: &str, is_so: &dyn Fn(&EdgeFlow) -> bool| {
            let start = Instant::now();
            loop {
                let found = flow(port);
                if let Some(found) = found.as_ref().filter(|it| is_so(it)) {
                    return found.clone();
                }
                assert!(start.elapsed() < LONG, "{what}: {found:?}, {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
        };
        let cases = [
            ("a FIN", FIN),
            ("a FIN that acknowledges something", FIN | ACK),
            ("an acknowledgement", ACK),
            ("another", ACK),
            ("a third", ACK),
            ("a fourth", ACK),
        ];
        for (port, (what, tcp_flags)) in (7_201..).zip(cases) {
            let send = |tcp_flags: u8| {
                let packet = Spec { from_port: port, tcp_flags, ..tcp(nobody) }.packet();
                network.client.run(move || send(macs, &[], &packet));
            };
            send(SYN);
            wait(port, what, &|flow| flow.state == EdgeFlowState::SynReceived);
            send(tcp_flags);
            let flow = wait(port, what, &|flow| flow.packets >= 3);
            let is_open = [EdgeFlowState::Established, EdgeFlowState::HalfClosed];
            assert!(!is_open.contains(&flow.state) && flow.bytes < 1_000, "{what}: {flow:?}");
            if tcp_flags == ACK {
                // The backend's RST.
                wait(port, what, &|flow| flow.state == EdgeFlowState::Closed);
            }
        }
        // A RST of its own ends the backend's side of it, and counts until something else comes a second later.
        let resets = [(7_301, FIN), (7_302, ACK), (7_303, ACK), (7_304, ACK)];
        let send_to = |port: u16, tcp_flags: u8| {
            let packet = Spec { from_port: port, tcp_flags, ..tcp(nobody) }.packet();
            network.client.run(move || send(macs, &[], &packet));
        };
        for (port, _) in resets {
            send_to(port, SYN);
            wait(port, "a SYN", &|flow| flow.state == EdgeFlowState::SynReceived);
            send_to(port, RST);
        }
        for (port, tcp_flags) in resets {
            let rested = Duration::from_millis(FlowWord::RESET_IS_FINAL_MS.into());
            let is_reset =
                |flow: &EdgeFlow| flow.state == EdgeFlowState::Closed && flow.idle >= rested;
            let n_packets = wait(port, "a RST", &is_reset).packets;
            send_to(port, tcp_flags);
            let flow = wait(port, "behind a RST", &|flow| flow.packets > n_packets);
            let is_open = [EdgeFlowState::Established, EdgeFlowState::HalfClosed];
            assert!(!is_open.contains(&flow.state) && flow.bytes < 1_000, "{flow:?}");
        }
        assert!(datapath.counters().ejected(idx).is_none());
        let vip = SocketAddr::from((PUBLIC, 80));
        network.client.run(move || request(vip, b"?")).unwrap();
        stop_server(&network.backend, BACKEND.into());
        assert!(flows(&datapath).iter().all(|flow| flow.bytes < 10_000), "{:?}", flows(&datapath));
    });
}

/// Frames of 9,000 octets on both sides.
pub fn jumbo_frames() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        for device in ["out", "in"] {
            ip(&format!("link set {device} mtu 9000"));
        }
        for container in [&network.client, &network.backend] {
            container.run(|| ip("link set v1 mtu 9000"));
        }
        let datapath = serve(&place, vec![web()]);
        exchange(&network, 300_000);
        assert_eq!(count(&datapath, "too_long"), 0);
    });
}

/// An interface that doesn't forward is reported with the setting; nothing gets through, and no server of the host's
/// gets it either.
pub fn without_forwarding() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        start_server(&network.backend, BACKEND.into(), 'A');
        let set = |value: &str| {
            std::fs::write("/proc/sys/net/ipv4/conf/out/forwarding", value).unwrap();
        };
        set("0");
        let vip = SocketAddr::from((PUBLIC, 80));
        let failed = network.client.run(move || {
            TcpStream::connect_timeout(&vip, Duration::from_millis(200)).unwrap_err().kind()
        });
        assert_eq!(failed, std::io::ErrorKind::TimedOut);
        assert!(count(&datapath, "no_route") >= 1, "{:?}", datapath.edge_counts());
        datapath.fix();
        let status = datapath.edge_status().unwrap();
        assert!(status.problems[0].contains("net.ipv4.conf.out.forwarding is 0"), "{status:?}");
        assert_eq!(status.forwards, [false, true]);
        set("1");
        datapath.fix();
        assert_eq!(datapath.edge_status().unwrap().problems, Vec::<String>::new());
        let answer = network.client.run(move || request(vip, b"?"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"));
        stop_server(&network.backend, BACKEND.into());
    });
}

/// Gives a link's two ends a VLAN device each, which has the addresses instead.
fn add_vlan(device: &str, there: &Container, [here, there4, here6, there6]: [&'static str; 4]) {
    ip(&format!("addr flush dev {device}"));
    ip(&format!("link add link {device} name {device}.7 type vlan id 7"));
    ip(&format!("addr add {here} dev {device}.7"));
    ip(&format!("addr add {here6} dev {device}.7 nodad"));
    ip(&format!("link set {device}.7 up"));
    for family in ["ipv4", "ipv6"] {
        let forwarding = format!("/proc/sys/net/{family}/conf/{device}.7/forwarding");
        std::fs::write(forwarding, "1").unwrap();
    }
    there.run(move || {
        ip("addr flush dev v1");
        ip("link add link v1 name v1.7 type vlan id 7");
        ip(&format!("addr add {there4} dev v1.7"));
        ip(&format!("addr add {there6} dev v1.7 nodad"));
        ip("link set v1.7 up");
    });
}

/// Tagged frames in and out, of both families; the program at the interface below leaves them alone.
pub fn vlans() {
    if !std::path::Path::new("/proc/net/vlan").exists() {
        return crate::skip("this kernel has no VLAN devices");
    }
    inside(|| {
        let (place, network) = (place(), Network::new());
        let addresses = ["198.51.100.1/24", "198.51.100.2/24", "fd51::1/64", "fd51::2/64"];
        add_vlan("out", &network.client, addresses);
        network.client.run(|| {
            ip("route replace 203.0.113.0/24 via 198.51.100.1");
            ip("-6 route replace fd99::/64 via fd51::1");
        });
        let addresses = ["10.7.0.1/24", "10.7.0.2/24", "fd07::1/64", "fd07::2/64"];
        add_vlan("in", &network.backend, addresses);
        let interfaces = ["out.7", "in.7"].map(str::to_owned).into();
        let mut datapath = serve_with(&place, vec![web()], EdgeOptions { interfaces, ..options() });
        exchange(&network, 300_000);
        let n_begun = |datapath: &Datapath| count(datapath, "flows_begun");
        assert_eq!(n_begun(&datapath), 10);
        // Named by the interface below, packets with a tag aren't its own.
        datapath.configure_edge(Some(options()));
        apply(&mut datapath, vec![web()]);
        network.client.run(|| {
            let socket = std::net::UdpSocket::bind((CLIENT, 0)).unwrap();
            socket.send_to(b"?", (PUBLIC, 80)).unwrap();
        });
        let status = datapath.edge_status().unwrap();
        let message = status.interfaces[0].message.as_deref().unwrap_or_default();
        assert!(message.contains("VLAN tags of out.7") || message.contains("XDP"), "{status:?}");
        assert_eq!(n_begun(&datapath), 10);
    });
}
