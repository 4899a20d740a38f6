//! The client's address in a TCP option of the SYN that an edge sends on: an experimental option (RFC 6994), of IPv4
//! alone. No other segment has it, so it takes no room from data.

use crate::edge::checksum::adjusted;
use crate::edge::packet::{Packet, TCP_HEADER, Window};
use crate::edge::translate::{Difference, replace};

/// The option's kind: the second one for experiments (RFC 4727).
pub const CLIENT_OPTION: u8 = 254;
/// Its experiment's identifier, two octets: "nh". It isn't registered with IANA.
pub const CLIENT_EXPERIMENT: [u8; 2] = *b"nh";
/// Its length: kind, length, identifier, address, port.
pub const CLIENT_OPTION_LEN: u32 = 10;
/// How much longer it makes a header: two NOPs come first.
pub const CLIENT_OPTION_ROOM: u32 = CLIENT_OPTION_LEN + 2;
/// How many edges' addresses a node trusts.
pub const MAX_CLIENT_SOURCES: usize = 8;
/// The longest header of TCP (RFC 9293, section 3.1).
const MAX_TCP_HEADER: u32 = 60;
/// The most octets of options, and so the most options.
pub const MAX_OPTIONS: u32 = MAX_TCP_HEADER - TCP_HEADER;
/// TCP's options of one octet.
const END: u8 = 0;
const NOP: u8 = 1;

/// How long the TCP header is.
#[inline(always)]
fn header_len(window: &Window, l4: u32) -> u32 {
    u32::from(window.octet(l4 + 12) >> 4) * 4
}

/// Whether a SYN may have an option of this kind: most have no such octet. `l4` is where its TCP header begins in an
/// IPv4 packet.
#[inline(always)]
pub fn may_have_client(window: &Window, l4: u32) -> bool {
    let (mut at, end) = (l4 + TCP_HEADER, l4 + header_len(window, l4));
    let mut nth = 0;
    while nth < MAX_OPTIONS && at < end {
        if window.octet(at) == CLIENT_OPTION {
            return true;
        }
        at += 1;
        nth += 1;
    }
    false
}

/// The way through a SYN's options, which makes those of this kind, the client's own, NOPs; likewise what follows the
/// end of the options, and what can't be read, as receivers read nothing behind it.
///
/// A program takes each step by itself: the verifier would follow each once for each case of those before.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OptionWalk {
    /// The next octet.
    at: u32,
    /// Up to which one all become NOPs.
    nops_until: u32,
    /// Where the header ends.
    end: u32,
    /// By how much the sum of the segment's words differs; 0 where nothing does.
    pub difference: u32,
}

impl OptionWalk {
    /// The beginning, in an IPv4 packet whose TCP header begins at `l4`.
    #[inline(always)]
    pub fn of(window: &Window, l4: u32) -> OptionWalk {
        let end = l4 + header_len(window, l4);
        OptionWalk { at: l4 + TCP_HEADER, nops_until: 0, end, difference: 0 }
    }

    /// Takes a step; returns whether there is another one, of [`MAX_OPTIONS`] in all.
    #[inline(always)]
    pub fn step(&mut self, window: &mut Window) -> bool {
        let OptionWalk { at, end, .. } = *self;
        if at >= end {
            return false;
        }
        let kind = window.octet(at);
        if at >= self.nops_until {
            let len = u32::from(window.octet(at + 1));
            if kind == END || kind != NOP && (at + 1 >= end || len < 2 || at + len > end) {
                self.nops_until = end;
            } else if kind == CLIENT_OPTION && (len < 4 || is_ours(window, at)) {
                // A shorter one too: the kernel's search for ours ends at it.
                self.nops_until = at + len;
            } else {
                self.at += if kind == NOP { 1 } else { len };
                return true;
            }
        }
        // Two octets are a word, and headers begin at an even one.
        let even = at & !1;
        let before = window.word(even).to_ne_bytes();
        let after = if at & 1 == 0 { [NOP, before[1]] } else { [before[0], NOP] };
        if before != after {
            replace(window, even, u16::from_ne_bytes(after), &mut self.difference);
        }
        self.at += 1;
        true
    }
}

#[inline(always)]
fn is_ours(window: &Window, at: u32) -> bool {
    [window.octet(at + 2), window.octet(at + 3)] == CLIENT_EXPERIMENT
}

/// Appends the option to a SYN without data whose options were walked through ([`OptionWalk`]), with the address and port
/// that it came from. Returns by how much the sums differ, of the pseudo-header and of the segment; `None`, and the
/// window as it was, where there is no room. The IP header's checksum is right again.
#[inline(always)]
pub fn append_client(window: &mut Window, packet: &Packet) -> Option<Difference> {
    let &Packet { l4, len, source, source_port, .. } = packet;
    let header_len = header_len(window, l4);
    if header_len + CLIENT_OPTION_ROOM > MAX_TCP_HEADER || len != l4 + header_len {
        return None;
    }
    let [.., a, b, c, d] = source.octets;
    let [port_high, port_low] = source_port.to_be_bytes();
    let [first, second] = CLIENT_EXPERIMENT;
    let option = [
        [NOP, NOP],
        [CLIENT_OPTION, CLIENT_OPTION_LEN as u8],
        [first, second],
        [a, b],
        [c, d],
        [port_high, port_low],
    ];
    let mut difference = Difference::default();
    let mut nth = 0;
    while nth < option.len() {
        let word = u16::from_ne_bytes(option[nth]);
        window.set_word(l4 + header_len + 2 * nth as u32, word);
        difference.ports += u32::from(word);
        nth += 1;
    }
    let words = ((header_len + CLIENT_OPTION_ROOM) / 4) as u8;
    let offset = words << 4 | window.octet(l4 + 12) & 0xf;
    let word = u16::from_ne_bytes([offset, window.octet(l4 + 13)]);
    replace(window, l4 + 12, word, &mut difference.ports);
    // What the pseudo-header has of the length.
    let lens = [len - l4, len - l4 + CLIENT_OPTION_ROOM].map(|len| (len as u16).to_be());
    difference.addresses = u32::from(!lens[0]) + u32::from(lens[1]);
    let mut ip = 0;
    replace(window, 2, ((len + CLIENT_OPTION_ROOM) as u16).to_be(), &mut ip);
    let checksum = adjusted(window.word(10), ip);
    window.set_word(10, checksum);
    Some(difference)
}

/// The address that a SYN's option has, as the kernel finds it: the whole option.
#[inline(always)]
pub fn client_of(option: &[u8; CLIENT_OPTION_LEN as usize]) -> Option<([u8; 4], u16)> {
    let &[kind, len, first, second, a, b, c, d, port_high, port_low] = option;
    let is_it = kind == CLIENT_OPTION
        && u32::from(len) == CLIENT_OPTION_LEN
        && [first, second] == CLIENT_EXPERIMENT;
    is_it.then_some(([a, b, c, d], u16::from_be_bytes([port_high, port_low])))
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::edge::reference::{Spec, packet, read_client, remove_client, window};
    use crate::{Address, IPPROTO_TCP, TCP_SYN, Target, adjusted, parse_ipv4};

    fn syn(tcp_options: &[u8], payload: &[u8]) -> Spec {
        Spec {
            target: Target {
                source: Address::v4([198, 51, 100, 7]),
                destination: Address::v4([203, 0, 113, 10]),
                source_port: 0x9c41,
                destination_port: 443,
                padding: 0,
            },
            is_ipv6: false,
            protocol: IPPROTO_TCP,
            tcp_flags: TCP_SYN,
            numbers: [0x0102_0304, 0],
            hop_limit: 64,
            options: Vec::new(),
            tcp_options: tcp_options.into(),
            is_unchecked: false,
            payload: payload.into(),
        }
    }

    /// What an edge makes of a SYN, with its checksum.
    fn changed(spec: &Spec, is_shown: bool) -> Vec<u8> {
        let before = packet(spec);
        let mut window = window(&before);
        let parsed = parse_ipv4(&window, before.len() as u32).unwrap();
        let mut difference = remove_client(&mut window, parsed.l4);
        let mut len = before.len();
        if is_shown && let Some(appended) = append_client(&mut window, &parsed) {
            difference += appended.addresses + appended.ports;
            len += CLIENT_OPTION_ROOM as usize;
        }
        let sum = adjusted(window.word(parsed.l4 + 16), difference);
        window.set_word(parsed.l4 + 16, sum);
        let in_window = len.min(window.octets.len());
        [&window.octets[..in_window], &before[in_window.min(before.len())..]].concat()
    }

    const OPTION: [u8; 12] = [1, 1, 254, 10, b'n', b'h', 198, 51, 100, 7, 0x9c, 0x41];
    const FORGED: [u8; 10] = [254, 10, b'n', b'h', 9, 9, 9, 9, 9, 9];
    const MSS: [u8; 4] = [2, 4, 5, 180];

    /// The options before, after them with and without the edge's own, as another SYN has them.
    #[test]
    fn options_are_as_in_a_syn_made_with_them() {
        let nops = |n| std::vec![1u8; n];
        let rows: [(Vec<u8>, Vec<u8>); 9] = [
            (Vec::new(), Vec::new()),
            (MSS.into(), MSS.into()),
            // The end of the options, and what comes behind it.
            ([&MSS[..], &[0, 7, 7, 7]].concat(), [&MSS[..], &nops(4)].concat()),
            // A forged one, at even and odd places, twice.
            ([&FORGED[..], &[1, 1]].concat(), nops(12)),
            ([&[1][..], &FORGED, &[0]].concat(), nops(12)),
            ([&FORGED[..], &FORGED, &MSS].concat(), [&nops(20)[..], &MSS].concat()),
            // Of other experiments; and of none, at which the kernel's search would end.
            ([254, 4, 1, 2].into(), [254, 4, 1, 2].into()),
            ([254, 3, b'n', 1].into(), nops(4)),
            // What can't be read.
            ([&MSS[..], &[8, 10, 1, 2]].concat(), [&MSS[..], &nops(4)].concat()),
        ];
        for (before, after) in rows {
            for payload in [&b""[..], b"x"] {
                let spec = syn(&before, payload);
                assert_eq!(changed(&spec, false), packet(&syn(&after, payload)), "{before:?}");
                let with = [&after[..], &OPTION].concat();
                // Where there is data, there is no option.
                let options = if payload.is_empty() { &with } else { &after };
                assert_eq!(changed(&spec, true), packet(&syn(options, payload)), "{before:?}");
            }
        }
        for len in [28, 32, 40] {
            let full = syn(&nops(len), b"");
            let options = if len == 28 { [&nops(len)[..], &OPTION].concat() } else { nops(len) };
            assert_eq!(changed(&full, true), packet(&syn(&options, b"")), "{len}");
        }
        assert_eq!(client_of(&OPTION[2..].try_into().unwrap()), Some(([198, 51, 100, 7], 0x9c41)));
        assert_eq!(client_of(&[254; 10]), None);
    }

    /// Whatever the options are, a reader of them finds none of ours but the edge's.
    #[test]
    fn nothing_forged_is_found() {
        let mut seed = 7u64;
        for _ in 0..20_000 {
            let options: Vec<u8> = (0..28)
                .map(|_| {
                    // Knuth's multiplier (MMIX); few values, so that options come about.
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    [254, 254, b'n', b'h', b'h', 4, 6, 10, 2, 1, 0, 3][(seed >> 33) as usize % 12]
                })
                .collect();
            let before = packet(&syn(&options, b""));
            let may_be = may_have_client(&window(&before), 20);
            assert!(may_be || read_client(&before[40..]).is_none(), "{options:?}");
            for is_shown in [false, true] {
                let after = changed(&syn(&options, b""), is_shown);
                let header = usize::from(after[32] >> 4) * 4;
                let found = read_client(&after[40..20 + header]);
                let wanted = is_shown.then_some(&OPTION[2..]);
                assert_eq!(found, wanted, "{options:?} {after:?}");
            }
        }
    }
}
