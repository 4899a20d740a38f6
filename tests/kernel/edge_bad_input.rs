//! The unit `edge` and packets that aren't as they should be, and links of other kinds.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use lb_userspace::datapath::{Datapath, EdgeOptions};

use crate::edge::{
    BACKEND, CLIENT, LONG, Network, PUBLIC, SOURCE, apply, ask, count, options, place, request,
    serve, serve_with, start_server, stop_server, web,
};
use crate::names::Container;
use crate::netns::{inside, ip};

const SYN: u8 = 2;
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

/// Sends a packet by `v1` of this thread's network namespace, as it is.
fn send(to: [u8; 6], packet: &[u8]) {
    let kind: u16 = if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 };
    let frame = [&to[..], &mac("v1"), &kind.to_be_bytes(), packet].concat();
    let name = std::ffi::CString::new("v1").unwrap();
    // SAFETY: the name lives until the call ends; the address is a sockaddr_ll of the length that is named, and the
    // frame as long.
    unsafe {
        let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        assert!(socket >= 0);
        let socket = std::os::fd::FromRawFd::from_raw_fd(socket);
        let socket: std::os::fd::OwnedFd = socket;
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

fn sum(octets: &[u8]) -> u32 {
    octets.chunks(2).map(|it| u32::from(it[0]) << 8 | u32::from(*it.get(1).unwrap_or(&0))).sum()
}

fn checksum(sum: u32) -> [u8; 2] {
    let once = (sum & 0xffff) + (sum >> 16);
    (!(((once & 0xffff) + (once >> 16)) as u16)).to_be_bytes()
}

/// A packet of a client's to a VIP's port 80 or 81: with these options or extension headers, which are of so many
/// octets as the family wants.
fn packet(source: IpAddr, protocol: u8, port: u16, options: &[u8]) -> Vec<u8> {
    let mut l4 = match protocol {
        TCP => vec![0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, SYN, 4, 0, 0, 0, 0, 0],
        _ => vec![0, 0, 0, 0, 0, 12, 0, 0, 1, 2, 3, 4],
    };
    l4[..2].copy_from_slice(&7_001u16.to_be_bytes());
    l4[2..4].copy_from_slice(&port.to_be_bytes());
    let at = if protocol == TCP { 16 } else { 6 };
    let addresses = match source {
        IpAddr::V4(ip) => [ip.octets(), PUBLIC.octets()].concat(),
        IpAddr::V6(ip) => [ip.octets(), vip6().octets()].concat(),
    };
    let of_l4 = checksum(sum(&addresses) + u32::from(protocol) + l4.len() as u32 + sum(&l4));
    l4[at..at + 2].copy_from_slice(&of_l4);
    match source {
        IpAddr::V4(_) => {
            let header = 20 + options.len();
            let mut ip = vec![0x40 | (header / 4) as u8, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
            ip[2..4].copy_from_slice(&((header + l4.len()) as u16).to_be_bytes());
            ip.extend(addresses);
            ip.extend(options);
            seal(&mut ip);
            ip.extend(l4);
            ip
        }
        IpAddr::V6(_) => {
            // The extension header names the protocol.
            let next = if options.is_empty() { protocol } else { 60 };
            let mut ip = vec![0x60, 0, 0, 0, 0, 0, next, 64];
            ip[4..6].copy_from_slice(&((options.len() + l4.len()) as u16).to_be_bytes());
            ip.extend(addresses);
            ip.extend(options);
            ip.extend(l4);
            ip
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

/// Each is dropped and counted by its own reason, or served where it is sound; no backend is the worse for it.
pub fn packets_that_are_not_right() {
    inside(|| {
        let (place, network) = (place(), Network::new());
        let datapath = serve(&place, vec![web()]);
        let to = mac("out");
        let client: IpAddr = CLIENT.into();
        let client6: IpAddr = "fd51::2".parse().unwrap();
        let changed = |source, protocol, change: &dyn Fn(&mut Vec<u8>)| {
            let mut packet = packet(source, protocol, 80, &[]);
            change(&mut packet);
            if source.is_ipv4() {
                seal(&mut packet);
            }
            packet
        };
        let from = |ip: [u8; 4]| packet(Ipv4Addr::from(ip).into(), TCP, 80, &[]);
        let from6 = |ip: &str| packet(ip.parse::<Ipv6Addr>().unwrap().into(), TCP, 80, &[]);
        let cases: Vec<(&str, &str, Vec<u8>)> = vec![
            (
                "an IPv4 packet that is cut short",
                "bad_header",
                changed(client, TCP, &|it| it.truncate(30)),
            ),
            (
                "an IPv4 length beyond the packet",
                "bad_header",
                changed(client, TCP, &|it| it[3] = 200),
            ),
            ("an IPv4 header of 16 octets", "bad_header", changed(client, TCP, &|it| it[0] = 0x44)),
            (
                "an IPv4 header beyond its packet",
                "bad_header",
                changed(client, TCP, &|it| it[0] = 0x4f),
            ),
            (
                "a TCP header of 16 octets",
                "bad_header",
                changed(client, TCP, &|it| it[32] = 4 << 4),
            ),
            (
                "a TCP header beyond its packet",
                "bad_header",
                changed(client, TCP, &|it| it[32] = 15 << 4),
            ),
            (
                "a UDP length beyond the packet",
                "bad_header",
                changed(client, UDP, &|it| it[25] = 99),
            ),
            ("a UDP length of 4", "bad_header", changed(client, UDP, &|it| it[25] = 4)),
            (
                "an IPv6 packet that is cut short",
                "bad_header",
                changed(client6, TCP, &|it| it.truncate(50)),
            ),
            (
                "an IPv6 length beyond the packet",
                "bad_header",
                changed(client6, TCP, &|it| it[5] = 200),
            ),
            (
                "an IPv6 packet without a length",
                "bad_header",
                changed(client6, TCP, &|it| it[5] = 0),
            ),
            ("from 127.0.0.1", "martian", from([127, 0, 0, 1])),
            ("from 0.0.0.0", "martian", from([0, 0, 0, 0])),
            ("from a multicast address", "martian", from([224, 0, 0, 1])),
            ("from the broadcast address", "martian", from([255, 255, 255, 255])),
            ("from ::1", "martian", from6("::1")),
            ("from a link-local address", "martian", from6("fe80::1")),
            ("from an IPv6 multicast address", "martian", from6("ff02::1")),
            ("a first fragment", "fragment", changed(client, UDP, &|it| it[6] = 0x20)),
            ("a later fragment", "fragment", changed(client, UDP, &|it| it[7] = 1)),
            ("a wrong checksum", "bad_checksum", changed(client, TCP, &|it| it[36] ^= 1)),
            (
                "a wrong checksum over IPv6",
                "bad_checksum",
                changed(client6, TCP, &|it| it[56] ^= 1),
            ),
            ("a port that no service has", "no_frontend", packet(client, UDP, 81, &[])),
            ("IPv4 options", "flows_begun", packet(client, UDP, 80, &[1, 1, 1, 0])),
            // Destination options (RFC 8200, section 4.6), with a PadN.
            (
                "an extension header",
                "flows_begun",
                packet(client6, UDP, 80, &[UDP, 0, 1, 4, 0, 0, 0, 0]),
            ),
        ];
        for (what, reason, packet) in cases {
            let before = (count(&datapath, reason), count(&datapath, "flows_begun"));
            network.client.run(move || send(to, &packet));
            let start = Instant::now();
            while count(&datapath, reason) == before.0 {
                assert!(start.elapsed() < LONG, "{what}: {:?}", datapath.edge_counts());
                std::thread::yield_now();
            }
            assert_eq!(count(&datapath, reason), before.0 + 1, "{what}");
            if reason != "flows_begun" {
                assert_eq!(count(&datapath, "flows_begun"), before.1, "{what}");
            }
        }
        start_server(&network.backend, BACKEND.into(), 'A');
        let vip = SocketAddr::from((PUBLIC, 80));
        let answer = network.client.run(move || request(vip, b"?"));
        assert_eq!(answer.unwrap(), format!("A {SOURCE} 1"));
        stop_server(&network.backend, BACKEND.into());
    });
}

fn both_families_answer(network: &Network, len: usize) {
    for (backend, vip, source, client) in [
        (IpAddr::from(BACKEND), IpAddr::from(PUBLIC), IpAddr::from(SOURCE), IpAddr::from(CLIENT)),
        (
            "fd07::2".parse().unwrap(),
            vip6().into(),
            "fd07::1".parse().unwrap(),
            "fd51::2".parse().unwrap(),
        ),
    ] {
        start_server(&network.backend, backend, 'A');
        let vip = SocketAddr::new(vip, 80);
        let answer = network.client.run(move || request(vip, &vec![7; len]));
        assert_eq!(answer.unwrap(), format!("A {source} {len}"));
        let answer = network.client.run(move || ask(client, vip, b"?"));
        assert_eq!(answer.unwrap(), format!("A {source} 1"));
        stop_server(&network.backend, backend);
    }
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
        both_families_answer(&network, 300_000);
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
        both_families_answer(&network, 300_000);
        let n_begun = |datapath: &Datapath| count(datapath, "flows_begun");
        assert_eq!(n_begun(&datapath), 4);
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
        assert_eq!(n_begun(&datapath), 4);
    });
}
