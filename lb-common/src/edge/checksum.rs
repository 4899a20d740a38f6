//! Sums of words in ones' complement (RFC 1071).

use crate::edge::packet::{WINDOW_LEN, Window};

/// The sum folded to 16 bits.
#[inline(always)]
pub fn folded(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// The same of fewer than 65,536 words of 16 bits.
#[inline(always)]
pub(super) fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    ((sum & 0xffff) + (sum >> 16)) as u16
}

/// A checksum of data that has come to differ by this: RFC 1624, equation 3.
#[inline(always)]
pub fn adjusted(checksum: u16, difference: u32) -> u16 {
    !fold(u32::from(fold(difference)) + u32::from(!checksum))
}

/// The sum of a part of the window, folded to 16 bits: from a multiple of four octets on. A function of
/// its own in the kernel: its loop is unrolled, and the stack there is short.
#[cfg_attr(target_arch = "bpf", inline(never))]
pub(super) fn sum(window: &Window, begin: u32, len: u32) -> u32 {
    let (mut sum, mut at) = (0, 0);
    while at + 4 <= len && at < WINDOW_LEN as u32 {
        sum += u64::from(window.long_word(begin + at));
        at += 4;
    }
    // Not a loop, which the verifier would follow from each end of the one before.
    if at < len && at < WINDOW_LEN as u32 {
        sum += u64::from(window.word(begin + at));
        if at + 2 < len {
            sum += u64::from(window.word(begin + at + 2));
        }
    }
    folded(sum).into()
}
