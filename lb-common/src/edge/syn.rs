//! Which SYNs a backend accepts that is well. That others get no answer, or a RST, shows nothing: anyone outside could
//! have backends ejected by them.

use crate::edge::checksum::{fold, sum};
use crate::edge::header::ip_len;
use crate::edge::packet::{Packet, TCP_HEADER, WINDOW_LEN, Window};

/// The least hop limit at which a SYN is taken to arrive, wherever the backend is: those of clients are 64 or more at
/// first.
const LEAST_HOPS: u8 = 16;
/// The most options that are looked at. Those of usual SYNs have five to nine, NOPs included.
pub const MAX_SYN_OPTIONS: u32 = 16;

/// TCP's options of one octet.
const END: u8 = 0;
const NOP: u8 = 1;
/// The options by which a segment is authenticated (RFC 2385, RFC 5925). Who doesn't expect one drops the segment.
const MD5: u8 = 19;
const AUTHENTICATION: u8 = 29;
/// MPTCP (RFC 8684, section 3.2): its number, and in the upper half of the third octet that of a SYN which joins a
/// connection. A listener without that connection refuses it, so another backend than the connection's does.
const MPTCP: u8 = 30;
const JOIN: u8 = 1;

/// Whether the IP header's checksum is right; IPv6 has none.
#[inline(always)]
pub fn is_ip_checksum_right(window: &Window, packet: &Packet) -> bool {
    packet.is_ipv6 != 0 || fold(sum(window, 0, packet.l4)) == 0xffff
}

/// Whether a host answers a SYN with these headers, as far as its TCP options don't matter, which [`SynOptions`] is
/// about. Of one that isn't whole in the window the checksum isn't known. What an IPv4 option or an extension header of
/// IPv6 asks for may be refused without a word, such as a route.
#[inline(always)]
pub fn is_plain_syn(window: &Window, packet: &Packet) -> bool {
    let is_ipv6 = packet.is_ipv6 != 0;
    let hops = window.octet(if is_ipv6 { 7 } else { 8 });
    packet.l4 == ip_len(is_ipv6) && packet.len <= WINDOW_LEN as u32 && hops >= LEAST_HOPS
}

/// The way through a SYN's options. A program takes each step by itself: the verifier would follow each once for each
/// case of those before.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SynOptions {
    /// The next octet.
    at: u32,
    /// Where the header ends.
    end: u32,
}

/// What a step finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum SynOption {
    /// An option that a host ignores if it doesn't know it.
    Ignorable = 0,
    /// The end: there is no other.
    End = 1,
    /// One for which a host may drop or refuse the SYN: of authentication, one by which it joins a connection of
    /// MPTCP, or one that can't be read.
    Refusable = 2,
}

impl SynOptions {
    /// The beginning, in a packet whose TCP header begins at `l4`.
    #[inline(always)]
    pub fn of(window: &Window, l4: u32) -> SynOptions {
        let header_len = u32::from(window.octet(l4 + 12) >> 4) * 4;
        SynOptions { at: l4 + TCP_HEADER, end: l4 + header_len }
    }

    /// Takes a step, of [`MAX_SYN_OPTIONS`] in all.
    #[inline(always)]
    pub fn step(&mut self, window: &Window) -> SynOption {
        let SynOptions { at, end } = *self;
        if at >= end {
            return SynOption::End;
        }
        let len = u32::from(window.octet(at + 1));
        match window.octet(at) {
            END => return SynOption::End,
            NOP => self.at += 1,
            MD5 | AUTHENTICATION => return SynOption::Refusable,
            MPTCP if window.octet(at + 2) >> 4 == JOIN => return SynOption::Refusable,
            _ if at + 1 >= end || len < 2 || at + len > end => return SynOption::Refusable,
            _ => self.at += len,
        }
        SynOption::Ignorable
    }
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;
    use crate::edge::reference::{Spec, packet, window};
    use crate::{Address, IPPROTO_TCP, TCP_SYN, Target, parse};

    fn syn(is_ipv6: bool) -> Spec {
        let address = |last| match is_ipv6 {
            true => Address { octets: [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last] },
            false => Address::v4([198, 51, 100, last]),
        };
        Spec {
            target: Target {
                source: address(7),
                destination: address(10),
                source_port: 40_001,
                destination_port: 443,
                padding: 0,
            },
            is_ipv6,
            protocol: IPPROTO_TCP,
            tcp_flags: TCP_SYN,
            numbers: [0x0102_0304, 0],
            hop_limit: 64,
            options: Vec::new(),
            tcp_options: Vec::new(),
            is_unchecked: false,
            payload: Vec::new(),
        }
    }

    /// What all steps find.
    fn walked(tcp_options: &[u8]) -> SynOption {
        let whole = packet(&Spec { tcp_options: tcp_options.into(), ..syn(false) });
        let window = window(&whole);
        let mut walk = SynOptions::of(&window, 20);
        let mut steps = (0..MAX_SYN_OPTIONS).map(|_| walk.step(&window));
        steps.find(|step| *step != SynOption::Ignorable).unwrap_or(SynOption::Refusable)
    }

    #[test]
    fn options_for_which_a_syn_is_not_accepted() {
        let md5 = [&[1, 1, 19, 18][..], &[7; 16]].concat();
        let mss = [2, 4, 5, 180];
        for (options, expected) in [
            (Vec::new(), SynOption::End),
            // Those of Linux, Windows and macOS.
            (
                [&mss[..], &[4, 2, 8, 10, 0, 0, 19, 18, 0, 0, 0, 0, 1, 3, 3, 7]].concat(),
                SynOption::End,
            ),
            ([&mss[..], &[1, 3, 3, 8, 1, 1, 4, 2]].concat(), SynOption::End),
            (
                [&mss[..], &[1, 3, 3, 6, 1, 1, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 4, 2, 0, 0]].concat(),
                SynOption::End,
            ),
            // What comes behind the end isn't read.
            ([&mss[..], &[0, 19, 18, 9]].concat(), SynOption::End),
            (std::vec![99, 4, 1, 2], SynOption::End),
            (md5.clone(), SynOption::Refusable),
            ([&mss[..], &[29, 4, 0, 0]].concat(), SynOption::Refusable),
            // That connection is to be one of MPTCP; that it joins one.
            ([&mss[..], &[30, 4, 1, 0x81]].concat(), SynOption::End),
            ([&mss[..], &[30, 12, 0x10, 2, 0, 0, 0, 7, 0, 0, 0, 9]].concat(), SynOption::Refusable),
            (std::vec![8, 99, 0, 0], SynOption::Refusable),
            (std::vec![2, 4, 5, 180, 8, 1, 1, 1], SynOption::Refusable),
            (std::vec![1, 1, 1, 8], SynOption::Refusable),
            (std::vec![1; 20], SynOption::Refusable),
        ] {
            assert_eq!(walked(&options), expected, "{options:?}");
        }
    }

    #[test]
    fn syns_that_a_sound_host_answers() {
        let check = |spec: &Spec, expected: bool| {
            let whole = packet(spec);
            let window = window(&whole);
            let parsed = parse(&window, whole.len() as u32, spec.is_ipv6).unwrap();
            assert!(is_ip_checksum_right(&window, &parsed), "{spec:?}");
            assert_eq!(is_plain_syn(&window, &parsed), expected, "{spec:?}");
        };
        for is_ipv6 in [false, true] {
            // A NOP, or destination options.
            let options = std::vec![if is_ipv6 { 60 } else { 1 }];
            let room = if is_ipv6 { 68 } else { 88 };
            check(&syn(is_ipv6), true);
            check(&Spec { hop_limit: 16, ..syn(is_ipv6) }, true);
            check(&Spec { hop_limit: 15, ..syn(is_ipv6) }, false);
            check(&Spec { options, ..syn(is_ipv6) }, false);
            check(&Spec { payload: std::vec![7; room], ..syn(is_ipv6) }, true);
            check(&Spec { payload: std::vec![7; room + 1], ..syn(is_ipv6) }, false);
        }
        let mut whole = packet(&Spec { options: std::vec![1], ..syn(false) });
        whole[23] ^= 1;
        let parsed = parse(&window(&whole), whole.len() as u32, false).unwrap();
        assert!(!is_ip_checksum_right(&window(&whole), &parsed));
    }
}
