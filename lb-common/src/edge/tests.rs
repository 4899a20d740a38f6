use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::reference::{ErrorSpec, Spec, error, fuzz, packet, translated, window};
use super::*;
use crate::{Address, IPPROTO_TCP, IPPROTO_UDP};

fn address(is_ipv6: bool, last: u8) -> Address {
    if is_ipv6 {
        let mut octets = [0; 16];
        (octets[0], octets[1], octets[9], octets[15]) = (0x20, 0x01, 0xff, last);
        Address { octets }
    } else {
        Address::v4([203, 0, 113, last])
    }
}

fn target(is_ipv6: bool, from: u8, to: u8) -> Target {
    let (source, destination) = (address(is_ipv6, from), address(is_ipv6, to));
    let (source_port, destination_port) = (40_000 + u16::from(from), 80 + u16::from(to));
    Target { source, destination, source_port, destination_port, padding: 0 }
}

fn plain(is_ipv6: bool, protocol: u8) -> Spec {
    Spec {
        target: target(is_ipv6, 1, 2),
        is_ipv6,
        protocol,
        tcp_flags: TCP_SYN,
        numbers: [u32::MAX - 3, 0xdead_beef],
        hop_limit: 64,
        options: Vec::new(),
        tcp_options: Vec::new(),
        is_unchecked: false,
        payload: Vec::from(*b"an odd length"),
    }
}

fn parsed(packet: &[u8], is_ipv6: bool) -> Result<Packet, NoFlow> {
    parse(&window(packet), packet.len() as u32, is_ipv6)
}

/// An error as it comes about what an edge sent: the inner packet is one from `to`'s addresses.
fn about(is_ipv6: bool, protocol: u8, kind: u8, len: usize) -> ErrorSpec {
    let about = plain(is_ipv6, protocol);
    // From a router to where the inner packet came from.
    let target = Target {
        source: address(is_ipv6, 77),
        destination: about.target.source,
        ..Target::default()
    };
    ErrorSpec { target, hop_limit: 9, kind, about, len }
}

const KINDS: [(bool, u8); 4] =
    [(false, IPPROTO_TCP), (false, IPPROTO_UDP), (true, IPPROTO_TCP), (true, IPPROTO_UDP)];

#[test]
fn a_packet_is_what_it_was_made_of() {
    for (is_ipv6, protocol) in KINDS {
        let spec = plain(is_ipv6, protocol);
        let packet = packet(&spec);
        let found = parsed(&packet, is_ipv6).unwrap();
        assert_eq!(
            (found.source, found.destination),
            (spec.target.source, spec.target.destination)
        );
        assert_eq!((found.source_port, found.destination_port), (40_001, 82));
        assert_eq!((found.protocol, found.len as usize), (protocol, packet.len()));
        assert_eq!(found.tcp_flags, if protocol == IPPROTO_TCP { TCP_SYN } else { 0 });
        // Ethernet fills up short frames.
        let padded = [&packet[..], &[0; 9]].concat();
        assert_eq!(parsed(&padded, is_ipv6), Ok(found));
    }
}

/// Each packet is translated as if it had been made with the other addresses.
#[test]
fn translation_is_as_if_made_anew() {
    for (is_ipv6, protocol) in KINDS {
        let options: &[&[u8]] = match is_ipv6 {
            true => &[&[], &[0], &[60, 43], &[51], &[44], &[0, 60, 43, 60]],
            false => &[&[], &[7], &[1, 2, 3], &[9; 10]],
        };
        for options in options {
            for is_unchecked in [false, protocol == IPPROTO_UDP && !is_ipv6] {
                for len in 0..40 {
                    let spec = Spec {
                        options: options.to_vec(),
                        is_unchecked,
                        payload: (0..len).collect(),
                        ..plain(is_ipv6, protocol)
                    };
                    let before = packet(&spec);
                    let found = parsed(&before, is_ipv6).unwrap();
                    let target = target(is_ipv6, 3, 4);
                    let other = Spec { target, hop_limit: 63, ..spec.clone() };
                    let after = translated(&before, &found, &target, true);
                    assert_eq!(after, packet(&other), "{spec:?}");
                    let local = translated(&before, &found, &target, false);
                    assert_eq!(local, packet(&Spec { hop_limit: 64, ..other }), "{spec:?}");
                }
            }
        }
    }
}

/// Of an error its receiver finds in it what it sent, whatever part of that it has.
#[test]
fn errors_are_translated_as_if_made_anew() {
    for (is_ipv6, protocol) in KINDS {
        let kinds: &[u8] = if is_ipv6 { &[1, 2, 3, 4] } else { &[3, 11, 12] };
        let ip_len = if is_ipv6 { 40 } else { 20 };
        for &kind in kinds {
            for len in [8, 9, 17, 18, 20, 28, 33].map(|len| ip_len + len) {
                let spec = about(is_ipv6, protocol, kind, len);
                let before = error(&spec);
                let found = parsed(&before, is_ipv6).unwrap();
                // As a reply to what it is about.
                let inner = &spec.about.target;
                assert_eq!((found.source, found.destination), (inner.destination, inner.source));
                assert_eq!(found.source_port, inner.destination_port);
                assert_eq!((found.is_error, found.protocol), (1, protocol));
                let target = target(is_ipv6, 3, 4);
                let mut other = spec.clone();
                (other.target, other.hop_limit) = (target, 8);
                other.about.target = Target {
                    source: target.destination,
                    destination: target.source,
                    source_port: target.destination_port,
                    destination_port: target.source_port,
                    padding: 0,
                };
                assert_eq!(translated(&before, &found, &target, true), error(&other), "{spec:?}");
            }
        }
    }
}

#[test]
fn what_is_cut_short_is_of_no_flow() {
    for (is_ipv6, protocol) in KINDS {
        let whole = packet(&plain(is_ipv6, protocol));
        for len in 0..whole.len() {
            assert_eq!(parsed(&whole[..len], is_ipv6), Err(NoFlow::BadHeader), "{len}");
        }
        let spec = about(is_ipv6, protocol, 3, 100);
        let whole = error(&spec);
        for len in 0..whole.len() {
            assert_eq!(parsed(&whole[..len], is_ipv6), Err(NoFlow::BadHeader), "{len}");
        }
        // Less of the inner packet than there has to be.
        let ip_len = if is_ipv6 { 40 } else { 20 };
        for len in 0..ip_len + 8 {
            let short = error(&about(is_ipv6, protocol, 3, len));
            assert_eq!(parsed(&short, is_ipv6), Err(NoFlow::BadHeader), "{len}");
        }
    }
}

#[test]
fn bad_headers() {
    type Row<'a> = (&'a str, usize, &'a [u8], NoFlow);
    let check = |is_ipv6: bool, protocol: u8, rows: &[Row<'_>]| {
        for &(what, at, octets, expected) in rows {
            let mut packet = packet(&plain(is_ipv6, protocol));
            packet[at..at + octets.len()].copy_from_slice(octets);
            assert_eq!(parsed(&packet, is_ipv6), Err(expected), "{what}");
        }
    };
    use NoFlow::{BadHeader, Fragment, Martian, Other};
    check(
        false,
        IPPROTO_TCP,
        &[
            ("version 6", 0, &[0x65], BadHeader),
            ("four words", 0, &[0x44], BadHeader),
            ("options to behind the end", 0, &[0x4f], BadHeader),
            ("longer than it is", 2, &[0x70], BadHeader),
            ("no length", 2, &[0, 0], BadHeader),
            ("shorter than its header", 2, &[0, 19], BadHeader),
            ("more fragments", 6, &[0x20], Fragment),
            ("a later fragment", 7, &[1], Fragment),
            ("GRE", 9, &[47], Other),
            ("ICMP echo", 9, &[1], Other),
            ("from this network", 12, &[0], Martian),
            ("from loopback", 12, &[127], Martian),
            ("from multicast", 12, &[224], Martian),
            ("from broadcast", 12, &[255, 255, 255, 255], Martian),
            ("from port 0", 20, &[0, 0], BadHeader),
            ("to port 0", 22, &[0, 0], BadHeader),
            ("TCP of four words", 32, &[0x40], BadHeader),
            ("TCP of more words than there are", 32, &[0xf0], BadHeader),
        ],
    );
    check(
        false,
        IPPROTO_UDP,
        &[
            ("UDP of seven bytes", 24, &[0, 7], BadHeader),
            ("UDP longer than the packet", 24, &[0, 22], BadHeader),
        ],
    );
    check(
        true,
        IPPROTO_UDP,
        &[
            ("version 4", 0, &[0x40], BadHeader),
            ("no length", 4, &[0, 0], BadHeader),
            ("longer than it is", 4, &[1], BadHeader),
            ("no next header", 6, &[59], Other),
            ("ESP", 6, &[50], Other),
            ("neighbour discovery", 6, &[58], Other),
            ("from ::", 8, &[0; 16], Martian),
            ("from multicast", 8, &[0xff], Martian),
            ("from this link", 8, &[0xfe, 0xbf], Martian),
        ],
    );
    let extended =
        |options: &[u8]| packet(&Spec { options: options.to_vec(), ..plain(true, IPPROTO_UDP) });
    assert_eq!(parsed(&extended(&[60; 7]), true), Err(BadHeader), "seven extension headers");
    assert!(parsed(&extended(&[60; 5]), true).is_ok());
    let mut long = extended(&[60]);
    long[41] = 200;
    assert_eq!(parsed(&long, true), Err(BadHeader), "an extension header behind the end");
    for place in [[0, 1], [0, 8]] {
        let mut part = extended(&[44]);
        part[42..44].copy_from_slice(&place);
        assert_eq!(parsed(&part, true), Err(Fragment));
    }
    for (is_ipv6, protocol) in KINDS {
        // Of a later fragment there are no ports.
        let spec = about(is_ipv6, protocol, 3, 80);
        let mut later = error(&spec);
        if !is_ipv6 {
            later[20 + 8 + 7] = 1;
            assert_eq!(parsed(&later, is_ipv6), Err(Fragment));
        }
        let echo = error(&ErrorSpec { kind: if is_ipv6 { 128 } else { 8 }, ..spec });
        assert_eq!(parsed(&echo, is_ipv6), Err(Other));
    }
}

#[test]
fn tags_before_the_ip_header() {
    let frame = |kinds: &[u16]| {
        let mut octets = [0; 22];
        let mut at = 12;
        for kind in kinds {
            octets[at..at + 2].copy_from_slice(&kind.to_be_bytes());
            at += 4;
        }
        ip_header(&octets, 60)
    };
    assert_eq!(frame(&[0x0800]), Some((14, false)));
    assert_eq!(frame(&[0x86dd]), Some((14, true)));
    assert_eq!(frame(&[0x8100, 0x0800]), Some((18, false)));
    assert_eq!(frame(&[0x88a8, 0x8100, 0x86dd]), Some((22, true)));
    assert_eq!(frame(&[0x88a8, 0x8100, 0x8100]), None);
    assert_eq!(frame(&[0x0806]), None);
    let mut octets = [0; 22];
    (octets[12], octets[13]) = (8, 0);
    assert_eq!(ip_header(&octets, 14), None);
}

/// The RST is as if made: whole, and with the pseudo-header's sum where the network card completes it.
#[test]
fn a_reset_answers_a_segment() {
    for is_ipv6 in [false, true] {
        let rows = [
            (TCP_SYN, [0, 10], TCP_RST | TCP_ACK),
            (TCP_SYN | TCP_ACK, [0xdead_beef, 0], TCP_RST),
            (TCP_ACK, [0xdead_beef, 0], TCP_RST),
            (TCP_FIN, [0, 10], TCP_RST | TCP_ACK),
            (0, [0, 9], TCP_RST | TCP_ACK),
        ];
        for (tcp_flags, numbers, expected) in rows {
            for options in [&[][..], &[0]] {
                let options = options.to_vec();
                let spec = Spec { tcp_flags, options, ..plain(is_ipv6, IPPROTO_TCP) };
                let before = packet(&spec);
                let found = parsed(&before, is_ipv6).unwrap();
                let mut window = window(&before);
                let reset = make_reset(&mut window, &found);
                let Target { source, destination, source_port, destination_port, .. } = spec.target;
                let target = Target {
                    source: destination,
                    destination: source,
                    source_port: destination_port,
                    destination_port: source_port,
                    padding: 0,
                };
                let (payload, options) = (Vec::new(), Vec::new());
                let answer =
                    Spec { target, tcp_flags: expected, numbers, payload, options, ..spec.clone() };
                let mut expected = packet(&answer);
                // No service class, no identification, no label.
                if is_ipv6 {
                    expected[1..4].fill(0);
                } else {
                    (expected[1], expected[4], expected[5]) = (0, 0, 0);
                    expected[10..12].copy_from_slice(&window.octets[10..12]);
                }
                assert_eq!(reset.len as usize, expected.len());
                assert_eq!(window.octets[..expected.len()], expected, "{spec:?}");
                let sum = u16::from_be(reset.pseudo_sum);
                assert_eq!(super::reference::pseudo_sum(&target, is_ipv6, 20), sum);
                assert!(super::reference::is_summed_up(&window.octets[..20]) || is_ipv6);
            }
        }
    }
}

/// What an edge can't send on is reported to where it came from, by the receiver of it.
#[test]
fn an_error_is_about_a_packet() {
    for is_ipv6 in [false, true] {
        for (mtu, kind) in [(1_280, [3, 4]), (0, [11, 0]), (0x1_2345, [3, 4])] {
            for options in [&[][..], &[0]] {
                let payload = vec![0xa5; 1_400];
                let spec =
                    Spec { options: options.to_vec(), payload, ..plain(is_ipv6, IPPROTO_TCP) };
                let before = packet(&spec);
                let found = parsed(&before, is_ipv6).unwrap();
                let mut window = window(&before);
                let len = make_error(&mut window, &found, mtu) as usize;
                if !options.is_empty() {
                    assert_eq!((len, &window.octets[..40]), (0, &before[..40]));
                    continue;
                }
                let (ip_len, from, to) = if is_ipv6 { (40, 8, 24) } else { (20, 12, 16) };
                let error = &window.octets[..len];
                assert!(error.len() > ip_len + 8 + ip_len + 7, "{len}");
                assert_eq!(error[ip_len + 8..], before[..len - ip_len - 8]);
                // Both addresses are exchanged.
                let octets = to - from;
                assert_eq!(error[from..to], before[to..to + octets]);
                assert_eq!(error[to..to + octets], before[from..to]);
                let kind = match (is_ipv6, mtu) {
                    (false, _) => kind,
                    (true, 0) => [3, 0],
                    (true, _) => [2, 0],
                };
                assert_eq!(error[ip_len..ip_len + 2], kind);
                assert_eq!(error[ip_len + 4..ip_len + 8], mtu.to_be_bytes());
                if is_ipv6 {
                    let payload_len = u16::from_be_bytes([error[4], error[5]]);
                    assert_eq!(usize::from(payload_len) + 40, len);
                    let target = Target {
                        source: found.destination,
                        destination: found.source,
                        ..spec.target
                    };
                    let icmp_len = (len - 40) as u32;
                    // That one is of TCP.
                    let pseudo = super::reference::pseudo_sum(&target, true, icmp_len as u8);
                    let pseudo = u32::from(pseudo) + u32::from(IPPROTO_ICMPV6 - IPPROTO_TCP);
                    let words = error[40..]
                        .chunks(2)
                        .map(|two| u32::from(u16::from_be_bytes([two[0], two[1]])));
                    let mut sum = pseudo + words.sum::<u32>();
                    sum = (sum & 0xffff) + (sum >> 16);
                    assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
                } else {
                    assert_eq!(usize::from(u16::from_be_bytes([error[2], error[3]])), len);
                    assert!(super::reference::is_summed_up(&error[..20]));
                    assert!(super::reference::is_summed_up(&error[20..]));
                }
            }
        }
    }
}

/// A SYN whose checksum is wrong mustn't be waited for: its receiver doesn't answer it.
#[test]
fn checksums_of_segments() {
    for is_ipv6 in [false, true] {
        for len in 0..40 {
            let spec = Spec { payload: vec![0xa5; len], ..plain(is_ipv6, IPPROTO_TCP) };
            let mut octets = packet(&spec);
            let parsed = parsed(&octets, is_ipv6).unwrap();
            // What is behind the packet doesn't count.
            let mut whole = window(&octets);
            whole.octets[octets.len()..].fill(0xee);
            assert!(is_checksum_right(&whole, &parsed), "{len}");
            let last = octets.len() - 1;
            octets[last] ^= 1;
            assert!(!is_checksum_right(&window(&octets), &parsed), "{len}");
        }
    }
}

/// States by what each side sends: `c` for the client, `b` for the backend.
#[test]
fn states_of_a_connection() {
    use FlowState::{Closed, Established, HalfClosed, SynReceived, SynSent};
    const SYN_ACK: u8 = TCP_SYN | TCP_ACK;
    const FIN_ACK: u8 = TCP_FIN | TCP_ACK;
    type Step = (char, u8, FlowState);
    const OPEN: [Step; 3] =
        [('c', TCP_SYN, SynSent), ('b', SYN_ACK, SynReceived), ('c', TCP_ACK, Established)];
    let rows: &[&[Step]] = &[
        &[('c', TCP_ACK, Established), ('c', FIN_ACK, HalfClosed), ('b', TCP_ACK, HalfClosed)],
        &[('c', FIN_ACK, HalfClosed), ('c', FIN_ACK, HalfClosed), ('b', FIN_ACK, Closed)],
        &[('b', FIN_ACK, HalfClosed), ('c', FIN_ACK, Closed), ('b', TCP_ACK, Closed)],
        &[('b', TCP_RST, Closed), ('c', TCP_ACK, Closed)],
        &[('c', TCP_RST | TCP_ACK, Closed), ('c', TCP_ACK, Closed)],
        // Again, as their answers were lost.
        &[('c', TCP_SYN, Established), ('b', SYN_ACK, Established)],
    ];
    let next = |word: FlowWord, side, tcp_flags, idle_ms| {
        let after = word.after(tcp_flags, side == 'b', idle_ms);
        match side {
            'b' => FlowWord { backend: after, ..word },
            _ => FlowWord { client: after, ..word },
        }
    };
    let begun = FlowWord { client: FlowWord::FIRST, protocol: IPPROTO_TCP, ..FlowWord::default() };
    for row in rows {
        let mut word = begun;
        for &(side, tcp_flags, expected) in OPEN.iter().chain(*row) {
            word = next(word, side, tcp_flags, 0);
            assert_eq!(word.state(), expected, "{row:?}");
        }
    }
    // Nothing but the backend's answer leads on.
    for tcp_flags in [TCP_ACK, FIN_ACK] {
        assert_eq!(next(begun, 'c', tcp_flags, 0), begun);
    }
    // What else it sends shows that it is there.
    let of = |flags: u8| FlowWord { flags: flags | FlowWord::IN_FLIGHT, ..begun };
    let other = next(of(FlowWord::PENDING), 'b', TCP_ACK, 0);
    assert_eq!(other.state(), SynSent);
    assert_eq!(next(other, 'b', SYN_ACK, 0).state(), SynReceived);
    for (flags, tcp_flags, is_unsettled) in [
        (FlowWord::PENDING, TCP_ACK, true),
        (FlowWord::PENDING, SYN_ACK, true),
        (FlowWord::SHOWS_ANSWER, TCP_ACK, false),
        (FlowWord::SHOWS_ANSWER, SYN_ACK, true),
        (0, SYN_ACK, false),
    ] {
        assert!(!of(flags).is_unsettled());
        assert_eq!(next(of(flags), 'b', tcp_flags, 0).is_unsettled(), is_unsettled, "{flags}");
    }
    // A RST that wasn't the client's is one of many signs: what it sends later shows that.
    let open = OPEN.iter().fold(begun, |word, &(side, flags, _)| next(word, side, flags, 0));
    let reset = next(open, 'c', TCP_RST, 0);
    assert_eq!(next(reset, 'b', TCP_ACK, 9_000).state(), Closed);
    assert_eq!(next(reset, 'c', TCP_ACK, 999).state(), Closed);
    assert_eq!(next(reset, 'c', TCP_ACK, 1_000), open);
    assert!(is_first_syn(TCP_SYN) && !is_first_syn(SYN_ACK) && !is_first_syn(TCP_SYN | TCP_FIN));
}

/// Both sides at once: each packet changes what its own side has shown, whatever it saw of the other's.
#[test]
fn packets_of_both_sides_at_once_lose_nothing() {
    const FIN_ACK: u8 = TCP_FIN | TCP_ACK;
    let open = FlowWord {
        client: FlowWord::FIRST | FlowWord::ACK,
        backend: FlowWord::FIRST,
        flags: FlowWord::IN_FLIGHT,
        protocol: IPPROTO_TCP,
    };
    let sent = FlowWord { backend: 0, flags: open.flags | FlowWord::PENDING, ..open };
    let rows = [
        (open, FIN_ACK, FIN_ACK, FlowState::Closed),
        (sent, TCP_RST, TCP_SYN | TCP_ACK, FlowState::Closed),
        (open, TCP_ACK, TCP_RST, FlowState::Closed),
    ];
    for (before, by_client, by_backend, expected) in rows {
        assert!(!before.is_unsettled());
        let client = before.after(by_client, false, 0);
        let after = FlowWord { client, backend: before.after(by_backend, true, 0), ..before };
        assert_eq!(after.state(), expected);
        assert!(after.is_unsettled(), "{after:?}");
        let flags = after.flags & !(FlowWord::IN_FLIGHT | FlowWord::PENDING);
        assert!(!FlowWord { flags, ..after }.is_unsettled());
    }
}

#[test]
fn ports_come_one_after_the_other() {
    let n_ports = N_EDGE_PORTS;
    for n_sources in 1..=4 {
        let mut all: Vec<_> = (0..n_ports * n_sources)
            .map(|place| {
                let at = PortPlace::of(place, n_sources);
                assert_eq!(at.place, place);
                (at.source, at.port)
            })
            .collect();
        assert_eq!(PortPlace::of(n_ports * n_sources + 7, n_sources), PortPlace::of(7, n_sources));
        assert!(
            all.iter().all(|&(source, port)| source < n_sources && (1_024..32_768).contains(&port))
        );
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len() as u32, n_ports * n_sources);
    }
    assert_eq!([0, 1, 2, 3].map(PortPlace::step), [0, 1, 3, 7]);
}

#[test]
fn times_wrap() {
    assert!(is_long_ago(0, 60_000, 60_000) && !is_long_ago(1, 60_000, 60_000));
    assert!(is_long_ago(u32::MAX - 9, 59_990, 60_000));
    // Another processor's clock may be ahead.
    assert!(!is_long_ago(60_005, 60_000, 60_000));
}

proptest! {
    #[test]
    fn any_bytes_are_translated_there_and_back(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        (is_ipv6, protocol) in proptest::sample::select(&KINDS[..]),
        changes in proptest::collection::vec((0usize..120, any::<u8>()), 0..3),
        payload in proptest::collection::vec(any::<u8>(), 0..80),
        is_error in any::<bool>(),
    ) {
        fuzz(&bytes);
        let spec = Spec { payload, ..plain(is_ipv6, protocol) };
        let mut packet = match is_error {
            true => error(&ErrorSpec { about: spec, ..about(is_ipv6, protocol, 3, 90) }),
            false => packet(&spec),
        };
        for (at, octet) in changes {
            if let Some(place) = packet.get_mut(at) {
                *place = octet;
            }
        }
        fuzz(&[&[u8::from(is_ipv6)][..], &packet].concat());
    }
}
