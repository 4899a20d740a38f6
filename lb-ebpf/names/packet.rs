//! A packet, read and written in words where it is, in its linear part. Each word is compared with the
//! packet's end.
//!
//! A program that writes has the kernel begin it with a call for a packet whose memory is shared, such as
//! each TCP segment on `lo` (`bpf_unclone_prologue()`). That is less than the copies cost that would spare it.

use core::arch::asm;

use lb_common::{DnsMessage, MAX_QUERY_LEN, folded};

use crate::headers::{ETHERNET_LEN, Headers, IPV4_LEN, IPV6_LEN, UDP_LEN};
use crate::skb::{Skb, field, set_field};

/// The longest datagram that is summed up.
const MAX_SUMMED_LEN: u32 = (UDP_LEN + MAX_QUERY_LEN).next_multiple_of(8);

/// What begins with a UDP header or with the message after it.
pub struct Words {
    data: usize,
    end: usize,
    /// Where it begins in the packet. A number that the verifier doesn't know, so that each word's place is one of
    /// its own: or it would tell apart what follows by which words it has seen to be within the packet.
    start: u64,
}

impl Words {
    /// A packet's datagram, or what follows its first `skipped` bytes.
    #[inline(always)]
    pub fn of(skb: &Skb, headers: &Headers, skipped: u32) -> Words {
        let (data, end) = skb.linear();
        Words { data, end, start: u64::from(headers.udp) + u64::from(skipped) }
    }

    /// The sum of a datagram in ones' complement (RFC 1071), as it is in memory: of as much of it as is that
    /// of a query or an answer.
    #[inline(always)]
    pub fn sum(&self) -> u16 {
        let len = u32::from(u16::from_be((self.word(0) >> 32) as u16));
        // What follows the whole words is the end of the word that ends with it.
        let last = self.word(len.wrapping_sub(8));
        let mut sum = halves(last >> 1 >> (63 - 8 * (len & 7)));
        let mut at = self.data + self.start as usize;
        let mut n_words = 0;
        while n_words < MAX_SUMMED_LEN / 8 && at + 8 <= self.end {
            sum += halves(field!(at, 0, u64));
            at += 8;
            n_words += 1;
        }
        folded(sum)
    }
}

impl DnsMessage for Words {
    #[inline(always)]
    fn word(&self, offset: u32) -> u64 {
        let word: u64;
        // SAFETY: the word is read if it is within the packet.
        unsafe {
            asm!(
                "{at} &= 511", "{at} += {data}", "{next} = {at}", "{next} += 8", "{word} = 0",
                "if {next} > {end} goto +1", "{word} = *(u64 *)({at} + 0)",
                at = inout(reg) self.start + u64::from(offset) => _, data = in(reg) self.data, end = in(reg) self.end,
                next = out(reg) _, word = out(reg) word, options(pure, readonly, nostack)
            );
        }
        word
    }

    #[inline(always)]
    fn set_word(&mut self, offset: u32, word: u64) {
        // SAFETY: as above.
        unsafe {
            asm!(
                "{at} &= 511", "{at} += {data}", "{next} = {at}", "{next} += 8",
                "if {next} > {end} goto +1", "*(u64 *)({at} + 0) = {word}",
                at = inout(reg) self.start + u64::from(offset) => _, data = in(reg) self.data, end = in(reg) self.end,
                next = out(reg) _, word = in(reg) word, options(nostack)
            );
        }
    }
}

/// Turns a packet around: exchanges addresses and ports, which leaves the checksums as they are, and sets the
/// lengths and the checksum of IPv4's header; on the way to an interface the hardware addresses, too. Sets
/// UDP's checksum if there is one to be set.
#[inline(always)]
pub fn turn(
    skb: &Skb,
    is_ipv6: bool,
    udp_len: u16,
    checksum: Option<u16>,
    is_loopback: bool,
) -> Option<()> {
    const IP: u32 = ETHERNET_LEN;
    let (data, end) = skb.linear();
    let udp = if is_ipv6 {
        let udp = data + (IP + IPV6_LEN) as usize;
        (udp + UDP_LEN as usize <= end).then_some(())?;
        let source = [field!(data, IP + 8, u64), field!(data, IP + 16, u64)];
        set_field!(data, IP + 8, u64, field!(data, IP + 24, u64));
        set_field!(data, IP + 16, u64, field!(data, IP + 32, u64));
        set_field!(data, IP + 24, u64, source[0]);
        set_field!(data, IP + 32, u64, source[1]);
        set_field!(data, IP + 4, u16, udp_len.to_be());
        udp
    } else {
        let udp = data + (IP + IPV4_LEN) as usize;
        (udp + UDP_LEN as usize <= end).then_some(())?;
        set_field!(data, IP + 12, u64, field!(data, IP + 12, u64).rotate_left(32));
        let (before, after) = (field!(data, IP + 2, u16), (udp_len + IPV4_LEN as u16).to_be());
        set_field!(data, IP + 2, u16, after);
        // RFC 1624, equation 3.
        let sum = add(add(!field!(data, IP + 10, u16), !before), after);
        set_field!(data, IP + 10, u16, !sum);
        udp
    };
    set_field!(udp, 0, u32, field!(udp, 0, u32).rotate_left(16));
    set_field!(udp, 4, u16, udp_len.to_be());
    if let Some(checksum) = checksum {
        set_field!(udp, 6, u16, checksum);
    }
    if !is_loopback {
        let (low, high) = (field!(data, 0, u32), field!(data, 4, u16));
        set_field!(data, 0, u32, field!(data, 6, u32));
        set_field!(data, 4, u16, field!(data, 10, u16));
        set_field!(data, 6, u32, low);
        set_field!(data, 10, u16, high);
    }
    Some(())
}

/// The sum of two halves in ones' complement (RFC 1071).
#[inline(always)]
pub fn add(a: u16, b: u16) -> u16 {
    folded(u64::from(a) + u64::from(b))
}

/// The sum of a word's halves.
#[inline(always)]
pub fn halves(word: u64) -> u64 {
    (word & u64::from(u32::MAX)) + (word >> 32)
}
