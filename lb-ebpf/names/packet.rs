//! A copy of a packet, which is read and written in words. Reading the packet itself takes a call of the
//! kernel for each field whose place the verifier doesn't know; writing to it directly has the kernel ask
//! of every packet that passes, TCP's too, whether its memory is shared (`bpf_unclone_prologue()`).

use core::arch::asm;

use lb_common::{DnsMessage, MAX_QUERY_LEN};

use crate::headers::{IP, IPV4_LEN, IPV6_LEN, UDP_LEN};
use crate::skb::{Skb, bounded};

/// Where the parts are in the copy: the message's question is at a multiple of eight, and what precedes it
/// is as long as its protocol has it.
const MESSAGE: usize = 68;
const UDP: usize = MESSAGE - UDP_LEN as usize;
const IPV4: usize = UDP - IPV4_LEN as usize;
const IPV6: usize = UDP - IPV6_LEN as usize;
const ETHERNET4: usize = IPV4 - IP as usize;
const ETHERNET6: usize = IPV6 - IP as usize;
/// The message's first 256 bytes, and a word.
const LEN: usize = MESSAGE + 256 + 12;

/// A packet of up to [`MAX_QUERY_LEN`] bytes of DNS, or as much of it. Not as bytes: the compiler would
/// copy them by functions that do so one by one.
#[repr(C, align(8))]
pub struct Packet {
    words: [u32; LEN / 4],
}

/// How many bytes of a message are copied.
#[inline(always)]
pub fn copied_len(message_len: u32) -> u32 {
    message_len.min(MAX_QUERY_LEN)
}

impl Packet {
    /// Copies a packet, with so many bytes of its message. Returns whether it has them.
    #[inline(always)]
    pub fn load(&mut self, skb: &Skb, is_ipv6: bool, message_len: u32) -> bool {
        if is_ipv6 {
            let to = &raw mut self.halves_mut()[ETHERNET6 / 2];
            // SAFETY: the copy has room for the message.
            unsafe { skb.load((MESSAGE - ETHERNET6) as u32, message_len, to.cast()) }
        } else {
            let to = &raw mut self.halves_mut()[ETHERNET4 / 2];
            // SAFETY: as above.
            unsafe { skb.load((MESSAGE - ETHERNET4) as u32, message_len, to.cast()) }
        }
    }

    /// Copies it back. Returns whether the packet has the room.
    #[inline(always)]
    pub fn store(&self, skb: &Skb, is_ipv6: bool, message_len: u32) -> bool {
        if is_ipv6 {
            let from = &raw const self.halves()[ETHERNET6 / 2];
            // SAFETY: the copy has the message.
            unsafe { skb.store((MESSAGE - ETHERNET6) as u32, message_len, from.cast()) }
        } else {
            let from = &raw const self.halves()[ETHERNET4 / 2];
            // SAFETY: as above.
            unsafe { skb.store((MESSAGE - ETHERNET4) as u32, message_len, from.cast()) }
        }
    }

    /// Turns it around: exchanges addresses and ports, which leaves the checksums as they are, and sets the
    /// lengths and the checksum of IPv4's header.
    #[inline(always)]
    pub fn turn(&mut self, is_ipv6: bool, udp_len: u16) {
        self.words[UDP / 4] = self.words[UDP / 4].rotate_left(16);
        self.halves_mut()[UDP / 2 + 2] = udp_len.to_be();
        if is_ipv6 {
            let mut word = IPV6 / 4 + 2;
            while word < IPV6 / 4 + 6 {
                self.words.swap(word, word + 4);
                word += 1;
            }
            self.halves_mut()[IPV6 / 2 + 2] = udp_len.to_be();
        } else {
            self.words.swap(IPV4 / 4 + 3, IPV4 / 4 + 4);
            let halves = self.halves_mut();
            let (before, after) = (halves[IPV4 / 2 + 1], (udp_len + IPV4_LEN as u16).to_be());
            halves[IPV4 / 2 + 1] = after;
            // RFC 1624, equation 3.
            halves[IPV4 / 2 + 5] = !add(add(!halves[IPV4 / 2 + 5], !before), after);
        }
    }

    /// Exchanges the hardware addresses.
    #[inline(always)]
    pub fn turn_ethernet(&mut self, is_ipv6: bool) {
        let halves = self.halves_mut();
        let mut idx = 0;
        while idx < 3 {
            if is_ipv6 {
                halves.swap(ETHERNET6 / 2 + idx, ETHERNET6 / 2 + idx + 3);
            } else {
                halves.swap(ETHERNET4 / 2 + idx, ETHERNET4 / 2 + idx + 3);
            }
            idx += 1;
        }
    }

    /// The checksum of UDP, as it is in memory.
    #[inline(always)]
    pub fn checksum(&self) -> u16 {
        self.halves()[UDP / 2 + 3]
    }

    /// Sets it.
    #[inline(always)]
    pub fn set_checksum(&mut self, checksum: u16) {
        self.halves_mut()[UDP / 2 + 3] = checksum;
    }

    /// UDP's header and so many bytes of the message as words to be summed up, without a checksum, and
    /// their length in bytes.
    #[inline(always)]
    pub fn sum_words(&mut self, message_len: u32) -> (*mut u32, u32) {
        self.set_checksum(0);
        self.set_word(message_len, 0);
        let len = (UDP_LEN + 3 + bounded(message_len)) & 0x1fc;
        (&raw mut self.words[UDP / 4], len)
    }

    #[inline(always)]
    fn halves(&self) -> &[u16; LEN / 2] {
        zerocopy::transmute_ref!(&self.words)
    }

    #[inline(always)]
    fn halves_mut(&mut self) -> &mut [u16; LEN / 2] {
        zerocopy::transmute_mut!(&mut self.words)
    }
}

/// The sum of two halves in ones' complement (RFC 1071).
#[inline(always)]
pub fn add(a: u16, b: u16) -> u16 {
    let sum = u32::from(a) + u32::from(b);
    (sum as u16).wrapping_add((sum >> 16) as u16)
}

impl DnsMessage for Packet {
    #[inline(always)]
    fn word(&self, offset: u32) -> u64 {
        let message = &raw const self.words[MESSAGE / 4];
        let word: u64;
        // In assembly: the compiler knows no unaligned load, and leaves out a bound that it can prove, but
        // the verifier can't.
        // SAFETY: the word is within the copy.
        unsafe {
            asm!(
                "{at} &= 255", "{at} += {message}", "{word} = *(u64 *)({at} + 0)",
                at = inout(reg) u64::from(offset) => _, message = in(reg) message, word = lateout(reg) word,
                options(pure, readonly, nostack)
            );
        }
        word
    }

    #[inline(always)]
    fn set_word(&mut self, offset: u32, word: u64) {
        let message = &raw mut self.words[MESSAGE / 4];
        // SAFETY: as above.
        unsafe {
            asm!(
                "{at} &= 255", "{at} += {message}", "*(u64 *)({at} + 0) = {word}",
                at = inout(reg) u64::from(offset) => _, message = in(reg) message, word = in(reg) word,
                options(nostack)
            );
        }
    }
}

const _: () = assert!(size_of::<Packet>() == LEN && LEN.is_multiple_of(8) && ETHERNET6 == 6);
