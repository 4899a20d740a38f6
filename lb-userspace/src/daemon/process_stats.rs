//! The daemon's own process, as the metrics `process_*` that every client library of Prometheus has
//! (prometheus.io/docs/instrumenting/writing_clientlibs, "Process metrics").

use std::fs;

use rustix::process::{Resource, getrlimit};

/// USER_HZ, the unit of times in proc_pid_stat(5): 100 on every architecture that nohop is built for
/// (include/asm-generic/param.h).
const TICKS_PER_SECOND: f64 = 100.0;

/// What the kernel reports of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessStats {
    /// User and system time.
    pub cpu_seconds: f64,
    /// Since the Unix epoch.
    pub start_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub n_threads: u64,
    pub open_fds: u64,
    /// `None`: unlimited.
    pub max_fds: Option<u64>,
}

impl ProcessStats {
    /// Of this process; `None` where /proc can't be read.
    pub fn read() -> Option<ProcessStats> {
        let [stat, status, system] =
            ["/proc/self/stat", "/proc/self/status", "/proc/stat"].map(fs::read_to_string);
        let mut stats = parse(&stat.ok()?, &status.ok()?, &system.ok()?)?;
        stats.open_fds = fs::read_dir("/proc/self/fd").ok()?.count() as u64;
        stats.max_fds = getrlimit(Resource::Nofile).current;
        Some(stats)
    }
}

fn parse(stat: &str, status: &str, system: &str) -> Option<ProcessStats> {
    // The name in parentheses may have any character; what follows starts with the third field.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = |nth: usize| -> Option<f64> { fields.get(nth - 3)?.parse().ok() };
    let boot: f64 = field(system, "btime ")?;
    Some(ProcessStats {
        cpu_seconds: (ticks(14)? + ticks(15)?) / TICKS_PER_SECOND,
        start_seconds: boot + ticks(22)? / TICKS_PER_SECOND,
        resident_bytes: field::<u64>(status, "VmRSS:")? * 1024,
        virtual_bytes: field::<u64>(status, "VmSize:")? * 1024,
        n_threads: field(status, "Threads:")?,
        ..ProcessStats::default()
    })
}

/// The number after a name at the start of a line.
fn field<T: std::str::FromStr>(text: &str, name: &str) -> Option<T> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_files_are_read() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 9 9 20 0 5 0 12345 4096 10 1";
        let status = "Name:\ta\nVmSize:\t    2000 kB\nVmRSS:\t    1000 kB\nThreads:\t5\n";
        let system = "cpu  1 2 3\nbtime 1700000000\n";
        let expected = ProcessStats {
            cpu_seconds: 3.0,
            start_seconds: 1_700_000_123.45,
            resident_bytes: 1_024_000,
            virtual_bytes: 2_048_000,
            n_threads: 5,
            ..ProcessStats::default()
        };
        assert_eq!(parse(stat, status, system), Some(expected));
        assert_eq!(parse("7", status, system), None);
        let stats = ProcessStats::read().unwrap();
        assert!(stats.open_fds > 2 && stats.n_threads > 0 && stats.resident_bytes > 1 << 20);
        let age = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
        let age = age - stats.start_seconds;
        // The boot's time is a whole second, and clocks may be set.
        assert!((-2.0..86_400.0).contains(&age), "{age}");
    }
}
