//! From the kernel's errors to their causes, with the fix for each.
//!
//! One errno has several causes. The cause follows from the operation, the verifier's log, and the
//! process's capabilities.

use std::io;

/// The operation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A map was made or read.
    Map,
    /// A program was loaded.
    Program {
        /// Whether the verifier wrote why not.
        has_log: bool,
    },
    /// A program was attached to a cgroup.
    Attach,
}

/// The process's capabilities, and where it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// The capabilities that it lacks, of those that the kernel side needs.
    pub missing: Vec<&'static str>,
    /// The kernel's version, major and minor; zeros where it isn't known.
    pub kernel: (u32, u32),
}

impl Environment {
    /// This process, on this kernel.
    pub fn read() -> Environment {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        let kernel = match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
            _ => (0, 0),
        };
        Environment { missing: missing(&status), kernel }
    }

    /// Whether a capability is missing.
    pub fn lacks(&self, capability: &str) -> bool {
        self.missing.contains(&capability)
    }

    /// The fix for an error of the kernel.
    pub fn fix(&self, step: Step, error: &io::Error) -> String {
        const REPORT: &str = "please report this, with the kernel's version";
        let old_memlock = self.kernel < (5, 11) && self.kernel != (0, 0);
        let fixed = match (step, error.raw_os_error().unwrap_or(0)) {
            (Step::Attach, libc::EBADF) => "name a cgroup v2 directory with --cgroup",
            (Step::Attach, libc::E2BIG) => {
                "the cgroup has as many programs at this hook as it can have (64): detach some"
            }
            (Step::Attach, libc::ENODEV | libc::ENOENT) => {
                "the cgroup was removed: name one that stays with --cgroup"
            }
            (_, libc::EPERM) if !self.missing.is_empty() => {
                return format!(
                    "it lacks {}: run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON",
                    self.missing.join(", ")
                );
            }
            // A program is charged before the verifier sees it.
            (Step::Map | Step::Program { has_log: false }, libc::EPERM) if old_memlock => {
                "before 5.11 maps and programs count as locked memory: raise RLIMIT_MEMLOCK \
                 (LimitMEMLOCK=infinity)"
            }
            (_, libc::EPERM) => {
                "it has every capability, so something else forbids bpf(): a seccomp filter, as \
                 containers have, a user namespace, or a security module"
            }
            (Step::Program { has_log: true }, libc::EACCES | libc::EINVAL | libc::E2BIG) => {
                return format!("this kernel's verifier rejects it (see its log): {REPORT}");
            }
            (_, libc::EACCES) => "a security module (SELinux, AppArmor) forbids it: see its log",
            (_, libc::ENOMEM) => {
                "there is no memory for it: check the memory limit of its cgroup (MemoryMax=) and the \
                 machine's free memory, and start it again"
            }
            (_, libc::EAGAIN | libc::EINTR) => {
                "signals interrupted it again and again: start it again"
            }
            (_, libc::EMFILE | libc::ENFILE) => "raise LimitNOFILE, or fs.file-max",
            (_, libc::ENOSYS) => {
                "the kernel has no bpf() (CONFIG_BPF_SYSCALL), or a seccomp filter hides it"
            }
            (_, libc::EINVAL | libc::E2BIG | libc::EOPNOTSUPP) => {
                "boot a kernel from 5.10 on with CONFIG_CGROUP_BPF: this one doesn't know it"
            }
            _ => "`nohop check` shows what is missing",
        };
        fixed.to_owned()
    }
}

/// Whether the same call may succeed at once: the verifier gives up when a signal arrives (EAGAIN).
pub fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

/// The error of the kernel at the bottom of an error.
pub fn root_cause<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a io::Error> {
    std::iter::successors(Some(error), |error| error.source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .last()
}

/// The capabilities that are missing, by the text of /proc/self/status. CAP_SYS_ADMIN stands for
/// CAP_BPF and CAP_PERFMON. The numbers are those of linux/capability.h.
fn missing(status: &str) -> Vec<&'static str> {
    const CAP_NET_ADMIN: u32 = 12;
    const CAP_SYS_ADMIN: u32 = 21;
    const CAP_PERFMON: u32 = 38;
    const CAP_BPF: u32 = 39;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    // An unreadable value is no evidence of a cause.
    let effective = effective.unwrap_or(u64::MAX);
    let has = |capability: u32| effective & 1 << capability != 0;
    let admin = has(CAP_SYS_ADMIN);
    let needed = [
        ("CAP_BPF", admin || has(CAP_BPF)),
        ("CAP_NET_ADMIN", has(CAP_NET_ADMIN)),
        ("CAP_PERFMON", admin || has(CAP_PERFMON)),
    ];
    needed.into_iter().filter_map(|(name, has)| (!has).then_some(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_cause() {
        let program = |has_log| Step::Program { has_log };
        let all: &[&str] = &[];
        let none = &["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"];
        let rows = [
            (Step::Map, libc::EPERM, &none[..], (6, 1), "it lacks CAP_BPF, CAP_NET_ADMIN"),
            (program(false), libc::EPERM, &none[2..], (6, 1), "it lacks CAP_PERFMON:"),
            (Step::Attach, libc::EPERM, &none[1..2], (6, 1), "it lacks CAP_NET_ADMIN:"),
            (Step::Map, libc::EPERM, all, (5, 10), "RLIMIT_MEMLOCK"),
            (Step::Map, libc::EPERM, all, (6, 1), "seccomp"),
            (program(false), libc::EPERM, all, (5, 10), "RLIMIT_MEMLOCK"),
            (program(true), libc::EPERM, all, (5, 10), "seccomp"),
            (program(false), libc::EPERM, all, (6, 1), "seccomp"),
            (Step::Attach, libc::EPERM, all, (5, 10), "seccomp"),
            (program(true), libc::EACCES, none, (6, 1), "verifier rejects it"),
            (program(true), libc::EINVAL, all, (6, 1), "verifier rejects it"),
            (program(true), libc::E2BIG, all, (6, 1), "verifier rejects it"),
            (program(false), libc::EACCES, all, (6, 1), "security module"),
            (program(false), libc::EINVAL, all, (4, 19), "boot a kernel from 5.10 on"),
            (Step::Map, libc::EINVAL, all, (5, 4), "boot a kernel from 5.10 on"),
            (Step::Map, libc::ENOMEM, all, (6, 1), "MemoryMax="),
            (program(true), libc::ENOMEM, all, (6, 1), "MemoryMax="),
            (program(false), libc::EAGAIN, all, (6, 1), "signals interrupted"),
            (program(false), libc::ENOSYS, all, (6, 1), "CONFIG_BPF_SYSCALL"),
            (Step::Map, libc::EMFILE, all, (6, 1), "LimitNOFILE"),
            (Step::Attach, libc::EBADF, all, (6, 1), "--cgroup"),
            (Step::Attach, libc::E2BIG, all, (6, 1), "(64)"),
            (Step::Attach, libc::ENODEV, all, (6, 1), "was removed"),
            (Step::Attach, libc::EINVAL, all, (5, 4), "boot a kernel from 5.10 on"),
            (Step::Map, libc::EIO, all, (6, 1), "nohop check"),
        ];
        for (step, errno, missing, kernel, expected) in rows {
            let environment = Environment { missing: missing.to_vec(), kernel };
            let fix = environment.fix(step, &io::Error::from_raw_os_error(errno));
            assert!(fix.contains(expected), "{step:?} {errno} {missing:?} {kernel:?}: {fix}");
        }
    }

    #[test]
    fn capabilities_that_are_missing() {
        let table: [(&str, &[&str]); 5] = [
            ("Name:\tnohop\nCapEff:\t000001ffffffffff\n", &[]),
            ("CapEff:\t0000000000000000\n", &["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"]),
            // CAP_SYS_ADMIN alone.
            ("CapEff:\t0000000000200000\n", &["CAP_NET_ADMIN"]),
            ("CapEff:\t000000c000001400\n", &[]),
            ("", &[]),
        ];
        for (status, expected) in table {
            assert_eq!(missing(status), expected, "{status:?}");
        }
    }

    #[test]
    fn the_error_at_the_bottom() {
        let error = anyhow::Error::from(io::Error::from_raw_os_error(libc::ENOMEM)).context("top");
        let error: Box<dyn std::error::Error + Send + Sync> = error.into();
        assert_eq!(root_cause(&*error).unwrap().raw_os_error(), Some(libc::ENOMEM));
    }
}
