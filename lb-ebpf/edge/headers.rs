//! The headers of a packet, in the packet itself.

use core::arch::asm;

use lb_common::{N_ENDS4, N_ENDS6};

/// Where bytes of a packet lie that the verifier knows to be there, because they were compared with its end.
///
/// Behind an Ethernet header words of 32 bits are at odd halves. The processors that this is compiled for load
/// them all the same; Rust's own loads of them would be of single octets.
#[derive(Clone, Copy)]
pub struct Headers(pub usize);

macro_rules! load {
    ($name:ident, $kind:ty, $size:literal) => {
        /// The word there, as it lies in memory.
        #[inline(always)]
        pub fn $name<const AT: usize>(self) -> $kind {
            let word: u64;
            // SAFETY: the verifier rejects the program if the bytes aren't there.
            unsafe {
                asm!(
                    concat!("{word} = *(", $size, " *)({at} + {offset})"),
                    word = out(reg) word, at = in(reg) self.0, offset = const AT,
                    options(nostack, readonly, preserves_flags)
                );
            }
            word as $kind
        }
    };
}

macro_rules! store {
    ($name:ident, $kind:ty, $size:literal) => {
        /// Replaces the word there.
        #[inline(always)]
        pub fn $name<const AT: usize>(self, word: $kind) {
            // SAFETY: as above; nothing else refers to the packet's bytes.
            unsafe {
                asm!(
                    concat!("*(", $size, " *)({at} + {offset}) = {word}"),
                    word = in(reg) u64::from(word), at = in(reg) self.0, offset = const AT,
                    options(nostack, preserves_flags)
                );
            }
        }
    };
}

impl Headers {
    load!(octet, u8, "u8");
    load!(half, u16, "u16");
    load!(word, u32, "u32");
    store!(set_half, u16, "u16");
    store!(set_word, u32, "u32");

    /// What lies so much further on.
    #[inline(always)]
    pub fn at(self, offset: usize) -> Headers {
        Headers(self.0 + offset)
    }

    /// The addresses and ports of a plain IPv4 packet, from its IP header on.
    #[inline(always)]
    pub fn ends4(self) -> [u32; N_ENDS4] {
        [self.word::<12>(), self.word::<16>(), self.word::<20>()]
    }

    /// Replaces them.
    #[inline(always)]
    pub fn set_ends4(self, [source, destination, ports]: [u32; N_ENDS4]) {
        self.set_word::<12>(source);
        self.set_word::<16>(destination);
        self.set_word::<20>(ports);
    }

    /// Those of a plain IPv6 packet.
    #[inline(always)]
    pub fn ends6(self) -> [u32; N_ENDS6] {
        [
            self.word::<8>(),
            self.word::<12>(),
            self.word::<16>(),
            self.word::<20>(),
            self.word::<24>(),
            self.word::<28>(),
            self.word::<32>(),
            self.word::<36>(),
            self.word::<40>(),
        ]
    }

    /// Replaces them.
    #[inline(always)]
    pub fn set_ends6(self, [a, b, c, d, e, f, g, h, ports]: [u32; N_ENDS6]) {
        self.set_word::<8>(a);
        self.set_word::<12>(b);
        self.set_word::<16>(c);
        self.set_word::<20>(d);
        self.set_word::<24>(e);
        self.set_word::<28>(f);
        self.set_word::<32>(g);
        self.set_word::<36>(h);
        self.set_word::<40>(ports);
    }
}
