//! The time.

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};

/// A reading of the clock, which is as good until the next jiffy, of 1 to 10 ms: the number of jiffies is one
/// load, and a reading costs as much as a look-up in a map.
pub struct Clock {
    jiffies: u64,
    now_ns: u64,
}

impl Clock {
    /// CLOCK_MONOTONIC, in nanoseconds.
    #[inline(always)]
    pub fn now_ns(&mut self) -> u64 {
        // SAFETY: the helpers have no preconditions.
        let jiffies = unsafe { bpf_jiffies64() };
        if jiffies != self.jiffies {
            // SAFETY: as above.
            *self = Clock { jiffies, now_ns: unsafe { bpf_ktime_get_ns() } };
        }
        self.now_ns
    }
}
