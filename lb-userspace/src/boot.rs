//! This boot: its identity, and the time since its beginning.

use std::io;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// The identity of this boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The identity of this boot; no other of this machine has it.
///
/// # Errors
/// When /proc can't be read.
pub fn id() -> io::Result<String> {
    Ok(std::fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// The time since the boot by CLOCK_BOOTTIME, which counts suspension and can't be set.
pub fn time() -> Duration {
    read(ClockId::Boottime)
}

/// How long the machine has been suspended since it was booted.
pub fn suspended() -> Duration {
    let awake = read(ClockId::Monotonic);
    time().saturating_sub(awake)
}

fn read(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
