//! Programs for packets, run by BPF_PROG_TEST_RUN.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

const BPF_PROG_TEST_RUN: libc::c_int = 10;

/// What a program makes of a packet.
pub struct ProgRun {
    /// What it returns.
    pub verdict: u32,
    /// The packet as it comes out.
    pub packet: Vec<u8>,
    /// How long a run takes, in the mean.
    pub run_time: Duration,
}

/// Runs a program so many times: its output is the next run's input. `context` is the beginning of a struct
/// __sk_buff or xdp_md; empty for none.
///
/// # Panics
/// When the kernel refuses.
pub fn prog_run(program: BorrowedFd<'_>, packet: &[u8], context: &[u32], n_runs: usize) -> ProgRun {
    let mut out = vec![0; packet.len() + 128];
    let word = |low: usize, high: usize| (low as u64) | (high as u64) << 32;
    // union bpf_attr, test.
    let mut attributes = [0u64; 10];
    attributes[0] = word(program.as_raw_fd() as usize, 0);
    attributes[1] = word(packet.len(), out.len());
    (attributes[2], attributes[3]) = (packet.as_ptr() as u64, out.as_mut_ptr() as u64);
    attributes[4] = word(n_runs, 0);
    attributes[5] = word(size_of_val(context), 0);
    attributes[6] = if context.is_empty() { 0 } else { context.as_ptr() as u64 };
    let size = size_of_val(&attributes);
    // SAFETY: the attributes are as long as is named, and what they point to lives until the call ends.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_TEST_RUN, attributes.as_mut_ptr(), size) };
    assert_eq!(result, 0, "{}: {packet:02x?}", std::io::Error::last_os_error());
    let [verdict, len, run_ns] = [attributes[0] >> 32, attributes[1] >> 32, attributes[4] >> 32];
    out.truncate(len as usize);
    let run_time = Duration::from_nanos(run_ns);
    ProgRun { verdict: verdict as u32, packet: out, run_time }
}
