//! Packets as the tests make them, with checksums of all of it, and what a fuzzer finds of those that it
//! makes.

use std::vec::Vec;

use crate::{
    Address, CLIENT_EXPERIMENT, CLIENT_OPTION, Difference, IPPROTO_ICMP, IPPROTO_ICMPV6,
    IPPROTO_TCP, IPPROTO_UDP, MAX_OPTIONS, OptionWalk, Packet, Target, WINDOW_LEN, Window,
    append_client, checksum_offset, client_of, finish, hop_limit, ip_header, parse, translate,
    translate_error,
};

/// A packet of TCP or UDP.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its addresses and ports.
    pub target: Target,
    /// Whether it is IPv6.
    pub is_ipv6: bool,
    /// The protocol number.
    pub protocol: u8,
    /// TCP's flags.
    pub tcp_flags: u8,
    /// TCP's sequence number, and what it acknowledges.
    pub numbers: [u32; 2],
    /// The hop limit.
    pub hop_limit: u8,
    /// Options of IPv4, in words; extension headers of IPv6, by their numbers.
    pub options: Vec<u8>,
    /// Those of TCP, a multiple of four octets.
    pub tcp_options: Vec<u8>,
    /// Whether UDP's checksum is left out.
    pub is_unchecked: bool,
    /// The data.
    pub payload: Vec<u8>,
}

/// An ICMP error.
#[derive(Clone, Debug)]
pub struct ErrorSpec {
    /// Where it comes from and goes to; the ports mean nothing.
    pub target: Target,
    /// The hop limit.
    pub hop_limit: u8,
    /// The type.
    pub kind: u8,
    /// What it is about.
    pub about: Spec,
    /// How many bytes of that it has, from its IP header on.
    pub len: usize,
}

/// The sum of 16-bit words in ones' complement (RFC 1071), word by word.
fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

fn low(address: &Address) -> &[u8] {
    &address.octets[12..]
}

fn ip(
    spec: &Target,
    is_ipv6: bool,
    hop_limit: u8,
    protocol: u8,
    options: &[u8],
    l4: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::new();
    if is_ipv6 {
        let mut extensions = Vec::new();
        for (nth, &kind) in options.iter().enumerate() {
            let next = options.get(nth + 1).copied().unwrap_or(protocol);
            // Authentication counts in words less two, the others in eights less one.
            let len = [next, if kind == 51 { 2 } else { 0 }];
            extensions.extend(len);
            extensions.extend([0; 6]);
            if kind == 51 {
                extensions.extend([7; 8]);
            }
        }
        let len = (extensions.len() + l4.len()) as u16;
        packet.extend([0x60, 1, 2, 3]);
        packet.extend(len.to_be_bytes());
        packet.extend([options.first().copied().unwrap_or(protocol), hop_limit]);
        packet.extend(spec.source.octets.iter().chain(&spec.destination.octets));
        packet.extend(extensions);
    } else {
        let header_len = 20 + options.len() * 4;
        let len = ((header_len + l4.len()) as u16).to_be_bytes();
        packet.extend([0x40 | (header_len / 4) as u8, 0x10, len[0], len[1], 0x12, 0x34, 0x40, 0]);
        packet.extend([hop_limit, protocol, 0, 0]);
        packet.extend(low(&spec.source).iter().chain(low(&spec.destination)));
        options.iter().for_each(|&option| packet.extend([1, 1, 1, option]));
        let checksum = !sum(&[&packet]);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
    packet.extend(l4);
    packet
}

/// The checksum of a header and what follows, with the pseudo-header.
fn l4_checksum(spec: &Target, is_ipv6: bool, protocol: u8, l4: &[u8]) -> u16 {
    let len = (l4.len() as u32).to_be_bytes();
    let (source, destination): (&[u8], &[u8]) = match is_ipv6 {
        true => (&spec.source.octets, &spec.destination.octets),
        false => (low(&spec.source), low(&spec.destination)),
    };
    !sum(&[source, destination, &len, &[0, 0, 0, protocol], l4])
}

/// The sum of TCP's pseudo-header.
pub fn pseudo_sum(target: &Target, is_ipv6: bool, len: u8) -> u16 {
    let (source, destination): (&[u8], &[u8]) = match is_ipv6 {
        true => (&target.source.octets, &target.destination.octets),
        false => (low(&target.source), low(&target.destination)),
    };
    sum(&[source, destination, &[0, len, 0, IPPROTO_TCP]])
}

/// Whether the checksum of an IPv4 header is right.
pub fn is_summed_up(header: &[u8]) -> bool {
    sum(&[header]) == 0xffff
}

/// A packet from its IP header on.
pub fn packet(spec: &Spec) -> Vec<u8> {
    let Spec { target, is_ipv6, protocol, .. } = spec;
    let mut l4 = Vec::new();
    l4.extend(target.source_port.to_be_bytes());
    l4.extend(target.destination_port.to_be_bytes());
    if *protocol == IPPROTO_TCP {
        l4.extend(spec.numbers.map(u32::to_be_bytes).concat());
        let words = 5 + spec.tcp_options.len() as u8 / 4;
        l4.extend([words << 4, spec.tcp_flags, 0, 0, 0, 0, 0, 0]);
        l4.extend(&spec.tcp_options);
    } else {
        l4.extend((8 + spec.payload.len() as u16).to_be_bytes());
        l4.extend([0, 0]);
    }
    l4.extend(&spec.payload);
    let at = checksum_offset(*protocol) as usize;
    if !(*protocol == IPPROTO_UDP && spec.is_unchecked) {
        let checksum = match l4_checksum(target, *is_ipv6, *protocol, &l4) {
            0 if *protocol == IPPROTO_UDP => 0xffff,
            checksum => checksum,
        };
        l4[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
    ip(target, *is_ipv6, spec.hop_limit, *protocol, &spec.options, &l4)
}

/// An ICMP error, likewise.
pub fn error(spec: &ErrorSpec) -> Vec<u8> {
    let ErrorSpec { target, about, .. } = spec;
    let inner = packet(about);
    let mut l4 = Vec::from([spec.kind, 0, 0, 0, 0, 0, 5, 0]);
    l4.extend(&inner[..spec.len.min(inner.len())]);
    let checksum = match about.is_ipv6 {
        true => l4_checksum(target, true, IPPROTO_ICMPV6, &l4),
        false => !sum(&[&l4]),
    };
    l4[2..4].copy_from_slice(&checksum.to_be_bytes());
    let protocol = if about.is_ipv6 { IPPROTO_ICMPV6 } else { IPPROTO_ICMP };
    ip(target, about.is_ipv6, spec.hop_limit, protocol, &[], &l4)
}

/// The first bytes of a packet; what it doesn't have is something else.
pub fn window(packet: &[u8]) -> Window {
    let mut window = Window { octets: [0xa5; WINDOW_LEN] };
    let len = packet.len().min(WINDOW_LEN);
    window.octets[..len].copy_from_slice(&packet[..len]);
    window
}

/// A packet as an edge sends it on, with its checksums.
pub fn translated(packet: &[u8], parsed: &Packet, target: &Target, is_forwarded: bool) -> Vec<u8> {
    let mut window = window(packet);
    if parsed.is_error != 0 {
        let end = translate_error(&mut window, parsed, target, is_forwarded) as usize;
        assert!(end <= packet.len().min(WINDOW_LEN), "{parsed:?}");
    } else {
        let difference = translate(&mut window, parsed, target, is_forwarded);
        // The kernel's helper takes both apart.
        let Difference { addresses, ports } = difference;
        finish(&mut window, parsed, Difference { addresses, ports });
    }
    let len = packet.len().min(WINDOW_LEN);
    [&window.octets[..len], &packet[len..]].concat()
}

/// The first option of ours, as `bpf_search_tcp_opt` in the kernel finds it.
pub fn read_client(mut options: &[u8]) -> Option<&[u8]> {
    while let [kind, rest @ ..] = options {
        options = match (kind, rest) {
            (0, _) => return None,
            (1, _) => rest,
            (_, [len, ..]) if *len >= 2 && usize::from(*len) <= options.len() => {
                let (option, after) = options.split_at((*len).into());
                if *kind == CLIENT_OPTION {
                    // It ends at one without room for the experiment's number.
                    let experiment = option.get(2..4)?;
                    if experiment == CLIENT_EXPERIMENT {
                        return Some(option);
                    }
                }
                after
            }
            _ => return None,
        };
    }
    None
}

/// Any bytes are a packet of no flow, or one that comes back as it was when it is translated back.
pub fn fuzz(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let mut ethernet = [0; 22];
    let len = rest.len().min(22);
    ethernet[..len].copy_from_slice(&rest[..len]);
    if let Some((at, _)) = ip_header(&ethernet, rest.len() as u32) {
        assert!(matches!(at, 14 | 18 | 22) && at < rest.len() as u32);
    }
    let is_ipv6 = first & 1 != 0;
    let Ok(parsed) = parse(&window(rest), rest.len() as u32, is_ipv6) else { return };
    assert!(parsed.len as usize <= rest.len() && parsed.l4 < parsed.len, "{parsed:?}");
    if !is_ipv6 && parsed.protocol == IPPROTO_TCP && parsed.is_error == 0 {
        fuzz_options(window(rest), &parsed);
    }
    let place = |octet: u8, port| match is_ipv6 {
        true => (Address { octets: [octet; 16] }, port),
        false => (Address::v4([octet; 4]), port),
    };
    let ((source, source_port), (destination, destination_port)) = (place(9, 77), place(8, 66));
    let there = Target { source, destination, source_port, destination_port, padding: 0 };
    let once = translated(rest, &parsed, &there, true);
    let Packet { source_port, destination_port, .. } = parsed;
    let (source, destination) = (parsed.source, parsed.destination);
    let again = parse(&window(&once), once.len() as u32, is_ipv6).unwrap_or_else(|why| {
        panic!("{why:?}: {rest:02x?} -> {once:02x?}");
    });
    assert_eq!((again.source, again.destination), (there.source, there.destination));
    assert_eq!((again.source_port, again.destination_port), (77, 66));
    if parsed.is_error != 0 {
        // The outer addresses may differ from the inner ones, which alone identify the flow.
        return assert_eq!(again.is_error, 1);
    }
    let back = Target { source, destination, source_port, destination_port, padding: 0 };
    let mut twice = translated(&once, &again, &back, false);
    let mut before = rest.to_vec();
    let hops = if is_ipv6 { 7 } else { 8 };
    assert_eq!(hop_limit(&window(&once), is_ipv6), before[hops].wrapping_sub(1));
    twice[hops] = before[hops];
    let l4 = parsed.l4 as usize + checksum_offset(parsed.protocol) as usize;
    let checksums = if is_ipv6 { &[l4][..] } else { &[l4, 10][..] };
    for &at in checksums {
        // Of IPv4's header another one is right, with another hop limit.
        if at != 10 {
            let number = |packet: &[u8]| u16::from_be_bytes([packet[at], packet[at + 1]]) % 0xffff;
            assert_eq!(number(&twice), number(&before), "{rest:02x?} -> {once:02x?}");
        }
        twice[at..at + 2].fill(0);
        before[at..at + 2].fill(0);
    }
    assert_eq!(twice, before);
}

/// Makes a SYN's own options of the edge's kind NOPs; returns by how much its sum differs.
pub fn remove_client(window: &mut Window, l4: u32) -> u32 {
    let mut walk = OptionWalk::of(window, l4);
    let mut n_steps = 0;
    while walk.step(window) {
        n_steps += 1;
    }
    assert!(n_steps <= MAX_OPTIONS);
    walk.difference
}

/// A reader of the options finds none of ours but the edge's.
fn fuzz_options(mut window: Window, packet: &Packet) {
    let l4 = packet.l4 as usize;
    let read = |window: &Window| {
        let end = l4 + usize::from(window.octets[l4 + 12] >> 4) * 4;
        read_client(&window.octets[l4 + 20..end]).map(<[u8]>::to_vec)
    };
    remove_client(&mut window, packet.l4);
    assert_eq!(read(&window), None);
    if append_client(&mut window, packet).is_some() {
        let found = read(&window).and_then(|option| option.try_into().ok());
        let found = found.as_ref().and_then(client_of);
        let [.., a, b, c, d] = packet.source.octets;
        assert_eq!(found, Some(([a, b, c, d], packet.source_port)));
    }
}
