//! Unpredictable numbers, read from the kernel in bulk: a system call per query id would cost as
//! much as sending the query.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// The bytes that are read at a time.
const POOL_LEN: usize = 1024;

/// Output of getrandom(2), which is cryptographically secure, each byte used once.
#[derive(Debug)]
pub(super) struct Random {
    pool: Box<[u8; POOL_LEN]>,
    n_used: usize,
}

impl Random {
    /// An empty pool: the first number fills it.
    pub(super) fn new() -> Random {
        Random { pool: Box::new([0; POOL_LEN]), n_used: POOL_LEN }
    }

    /// Any number, such as the id of a query.
    pub(super) fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes())
    }

    /// A number below `n`, which is at most 2^16; 0 where `n` is 0. The shares differ by less than
    /// one in 2^16.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (u32::from_be_bytes(self.bytes()) as usize).checked_rem(n).unwrap_or(0)
    }

    /// A number of 128 bits.
    pub(super) fn u128(&mut self) -> u128 {
        u128::from_be_bytes(self.bytes())
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        if POOL_LEN - self.n_used < N {
            self.fill();
        }
        let mut bytes = [0; N];
        let taken = &mut self.pool[self.n_used..self.n_used + N];
        bytes.copy_from_slice(taken);
        taken.fill(0);
        self.n_used += N;
        bytes
    }

    fn fill(&mut self) {
        let mut n_filled = 0;
        while n_filled < POOL_LEN {
            // More than 256 bytes may come in parts where a signal interrupts it (getrandom(2)).
            match getrandom(&mut self.pool[n_filled..], GetRandomFlags::empty()) {
                Ok(n) => n_filled += n,
                Err(Errno::INTR) => {}
                // Every kernel that runs nohop has the call, and it needs no resource.
                Err(error) => panic!("getrandom fails: {error}"),
            }
        }
        self.n_used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_and_differ() {
        let mut random = Random::new();
        let mut seen = [0; 16];
        for _ in 0..16_000 {
            seen[random.below(16)] += 1;
        }
        // 1,000 each; ten standard deviations are 306.
        assert!(seen.iter().all(|n| (690..1310).contains(n)), "{seen:?}");
        assert_ne!(random.u128(), random.u128());
        assert_eq!((random.below(1), random.below(0)), (0, 0));
    }
}
