//! Features of the running kernel, detected by loading small programs before the object.
//!
//! A helper depends on the kernel, on the program's type *and* on its attach type: `bpf_set_retval`
//! came to these programs with 6.1, and distributions have backported it. So each is tested by a
//! program of a few instructions. Only the verifier's message for an unknown helper means that it is
//! missing; any other failure is reported as an error.

use std::fmt;
use std::io;

use lb_common::RejectMethod;

use super::bpf::{AttachType, Rejected, load_trial};
use super::btf::{self, SocketBits};
use super::cause::{Environment, Step, is_transient};
use super::error::DatapathError;

/// How often what a signal interrupted is tried: as often as libbpf does (PROG_LOAD_ATTEMPTS).
pub const N_ATTEMPTS: usize = 5;

/// Where programs refuse.
const REFUSING: [AttachType; 4] =
    [AttachType::CONNECT4, AttachType::CONNECT6, AttachType::SENDMSG4, AttachType::SENDMSG6];

/// Where the kernel shows how far it is locked down; kernel_lockdown(7).
const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

/// A small program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    /// Nothing but a return.
    Empty,
    /// `bpf_set_retval(-ECONNREFUSED)`
    SetRetval,
    /// `bpf_probe_read_kernel(stack, 1, 0)`
    ReadKernel,
}

impl Trial {
    fn instructions(self) -> Vec<u64> {
        // struct bpf_insn: opcode, registers (source, destination), offset, immediate.
        let instruction = |opcode: u8, registers: u8, immediate: i32| {
            let [a, b, c, d] = immediate.to_ne_bytes();
            u64::from_ne_bytes([opcode, registers, 0, 0, a, b, c, d])
        };
        let set = |register, immediate| instruction(0xb7, register, immediate);
        let call = |helper| instruction(0x85, 0, helper);
        let mut instructions = match self {
            Trial::Empty => Vec::new(),
            Trial::SetRetval => vec![set(1, -libc::ECONNREFUSED), call(187)],
            Trial::ReadKernel => {
                let (copy_stack, subtract) = (instruction(0xbf, 0xa1, 0), instruction(0x07, 1, -8));
                vec![copy_stack, subtract, set(2, 1), set(3, 0), call(113)]
            }
        };
        instructions.extend([set(0, 1), instruction(0x95, 0, 0)]);
        instructions
    }
}

/// Features that the kernel lacks and nohop can do without.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Programs can't choose the error that a call fails with.
    PortZero,
    /// Programs can't read the kernel's memory; the kernel's lockdown, where it can be read.
    NoKernelRead(Option<String>),
    /// No type information, for this reason.
    NoBtf(String),
    /// Type information that doesn't have the bit.
    NoKernelBit,
    /// Maps and socket storage are charged to this process's memory cgroup, for this reason.
    Charged(String),
}

impl Limit {
    /// The fix.
    pub fn fix(&self) -> &'static str {
        match self {
            Limit::PortZero => "boot a kernel from 6.1 on",
            Limit::NoKernelRead(_) => {
                "nothing, unless the kernel itself (NFS, SMB, Ceph) connects to VIPs: then mount by \
                 an instance's address, or boot with lockdown=integrity"
            }
            Limit::Charged(_) => {
                "start it in the host's cgroup namespace with /sys/fs/cgroup writable, once after \
                 `nohop unload`"
            }
            Limit::NoBtf(_) | Limit::NoKernelBit => {
                "boot a kernel with CONFIG_DEBUG_INFO_BTF, as distributions' kernels are"
            }
        }
    }
}

/// The consequence of each.
impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SO: &str = "the kernel's own sockets, such as NFS's, are translated like others";
        match self {
            Limit::PortZero => f.write_str(
                "this kernel has no bpf_set_retval for these programs: connect() is refused by a \
                 rewrite to port 0, sendto() with EPERM",
            ),
            Limit::NoKernelRead(Some(lockdown)) if lockdown == "confidentiality" => write!(
                f,
                "the kernel is locked down (lockdown=confidentiality), so programs can't read its \
                 memory: {SO}"
            ),
            Limit::NoKernelRead(_) => write!(
                f,
                "this kernel has no bpf_probe_read_kernel for these programs \
                 (lockdown=confidentiality, or no CONFIG_BPF_EVENTS): {SO}"
            ),
            Limit::NoBtf(error) => write!(f, "the kernel has no BTF ({error}): {SO}"),
            Limit::Charged(reason) => write!(
                f,
                "maps and socket storage are charged to this daemon's memory cgroup ({reason}): a \
                 connection costs more, and MemoryMax= can leave sockets without storage"
            ),
            Limit::NoKernelBit => {
                write!(f, "the kernel's BTF has no `sk_kern_sock` in `sock`: {SO}")
            }
        }
    }
}

/// Features of the running kernel.
#[derive(Clone, Debug)]
pub struct Features {
    /// How programs refuse a connection.
    pub refusal: RejectMethod,
    /// Where a socket shows that it is the kernel's own.
    pub sockets: SocketBits,
    /// Missing features.
    pub limits: Vec<Limit>,
}

impl Features {
    /// Tests the running kernel. Raises this process's limit of locked memory for the tests and for what
    /// is loaded after them.
    ///
    /// # Errors
    /// When the kernel refuses even an empty program, or a test fails for another reason than an unknown
    /// helper.
    pub fn probe() -> Result<Features, DatapathError> {
        lift_memory_limit();
        let environment = Environment::read();
        let load = |trial: Trial, attach_type| load_trial(&trial.instructions(), attach_type);
        let bits = btf::socket_bits();
        let lockdown = std::fs::read_to_string(LOCKDOWN).ok().and_then(|text| in_brackets(&text));
        Features::by(load, bits, lockdown, &environment)
    }

    fn by(
        mut load: impl FnMut(Trial, AttachType) -> Result<(), Rejected>,
        bits: io::Result<SocketBits>,
        lockdown: Option<String>,
        environment: &Environment,
    ) -> Result<Features, DatapathError> {
        let mut has = |trial, attach_type| {
            let loaded = retried(|| load(trial, attach_type), |rejected| &rejected.error);
            match loaded {
                Ok(()) => Ok(true),
                Err(rejected) if trial != Trial::Empty && rejected.is_for_no_helper() => Ok(false),
                Err(Rejected { error, log }) => Err(DatapathError::Probe {
                    fix: environment.fix(Step::Program { has_log: !log.is_empty() }, &error),
                    source: error,
                    log,
                }),
            }
        };
        let mut limits = Vec::new();
        let mut refusal = RejectMethod::Errno;
        for attach_type in REFUSING {
            has(Trial::Empty, attach_type)?;
            if !has(Trial::SetRetval, attach_type)? {
                refusal = RejectMethod::PortZero;
            }
        }
        if refusal == RejectMethod::PortZero {
            limits.push(Limit::PortZero);
        }
        let mut sockets = SocketBits::default();
        match bits {
            Err(error) => limits.push(Limit::NoBtf(error.to_string())),
            Ok(bits @ SocketBits { kernel: None, .. }) => {
                (sockets.error, sockets.cookie, sockets.storage) =
                    (bits.error, bits.cookie, bits.storage);
                limits.push(Limit::NoKernelBit);
            }
            // The verifier hides this helper from those who lack CAP_PERFMON, too. That is no reason
            // to do without it.
            Ok(_) if environment.lacks("CAP_PERFMON") => {
                let source = io::Error::from_raw_os_error(libc::EPERM);
                let fix = environment.fix(Step::Program { has_log: false }, &source);
                return Err(DatapathError::Probe { fix, source, log: String::new() });
            }
            Ok(bits) => {
                if has(Trial::ReadKernel, AttachType::CONNECT4)? {
                    sockets = bits;
                } else {
                    // These are read by the type of the socket's structure, without the helper.
                    sockets.ipv6_only = bits.ipv6_only;
                    (sockets.error, sockets.cookie, sockets.storage) =
                        (bits.error, bits.cookie, bits.storage);
                    limits.push(Limit::NoKernelRead(lockdown));
                }
            }
        }
        Ok(Features { refusal, sockets, limits })
    }
}

/// Before 5.11 programs (`__bpf_prog_charge`) and maps count as locked memory. Without
/// CAP_SYS_RESOURCE the limit can be raised as far as the hard one. If that isn't enough, loading
/// fails with a message.
fn lift_memory_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let hard = getrlimit(Resource::Memlock).maximum;
    let limits = [None, hard].map(|limit| Rlimit { current: limit, maximum: limit });
    let _ = limits.into_iter().any(|limit| setrlimit(Resource::Memlock, limit).is_ok());
}

/// Tries again what a signal interrupted, a few times.
fn retried<T, E>(
    mut attempt: impl FnMut() -> Result<T, E>,
    errno: impl Fn(&E) -> &io::Error,
) -> Result<T, E> {
    for _ in 1..N_ATTEMPTS {
        match attempt() {
            Err(error) if is_transient(errno(&error)) => {}
            result => return result,
        }
    }
    attempt()
}

/// The value that the kernel marks as the current one: `none [integrity] confidentiality`.
fn in_brackets(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits() -> SocketBits {
        let bit = btf::Bit { offset: 8, mask: 1 };
        SocketBits { kernel: Some(bit), ..SocketBits::default() }
    }

    fn rejected(errno: i32, log: &str) -> Result<(), Rejected> {
        Err(Rejected { error: io::Error::from_raw_os_error(errno), log: log.to_owned() })
    }

    fn root() -> Environment {
        Environment { missing: Vec::new(), kernel: (6, 12) }
    }

    #[test]
    fn what_is_missing_is_known_from_the_verifier_alone() {
        use Limit::*;
        let no_helper = "unknown func bpf_set_retval#187\nprocessed 1 insns";
        let not_here = "program of this type cannot use helper bpf_probe_read_kernel#113";
        let locked = || Some("confidentiality".to_owned());
        // Which program fails, where, by which error and log; and what is missing then.
        type Row<'a> = (Trial, Option<AttachType>, i32, &'a str, Result<Vec<Limit>, i32>);
        let rows: Vec<Row<'_>> = vec![
            (Trial::SetRetval, None, libc::EINVAL, no_helper, Ok(vec![PortZero])),
            (
                Trial::SetRetval,
                Some(AttachType::SENDMSG6),
                libc::EINVAL,
                no_helper,
                Ok(vec![PortZero]),
            ),
            (Trial::ReadKernel, None, libc::EINVAL, not_here, Ok(vec![NoKernelRead(locked())])),
            // The same errno for another reason is no missing helper; nor is any other error.
            (Trial::SetRetval, None, libc::EINVAL, "", Err(libc::EINVAL)),
            (Trial::SetRetval, None, libc::ENOMEM, "", Err(libc::ENOMEM)),
            (Trial::ReadKernel, None, libc::ENOMEM, "", Err(libc::ENOMEM)),
            (Trial::Empty, None, libc::EPERM, "", Err(libc::EPERM)),
            (Trial::Empty, None, libc::EINVAL, no_helper, Err(libc::EINVAL)),
            (Trial::SetRetval, None, libc::EAGAIN, "", Err(libc::EAGAIN)),
        ];
        for (trial, at, errno, log, expected) in rows {
            let load = |asked, attach_type| {
                let fails = asked == trial && at.is_none_or(|at| at == attach_type);
                if fails { rejected(errno, log) } else { Ok(()) }
            };
            let features = Features::by(load, Ok(bits()), locked(), &root());
            let found = match features {
                Ok(features) => Ok(features.limits),
                Err(DatapathError::Probe { source, .. }) => Err(source.raw_os_error().unwrap()),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(found, expected, "{trial:?} {errno} {log:?}");
        }
    }

    #[test]
    fn what_a_signal_interrupts_is_tried_again() {
        let mut n_left = 4;
        let load = |_, _| {
            let is_interrupted = n_left > 0;
            n_left -= i32::from(is_interrupted);
            if is_interrupted { rejected(libc::EAGAIN, "") } else { Ok(()) }
        };
        let features = Features::by(load, Ok(bits()), None, &root()).unwrap();
        assert_eq!((features.refusal, features.limits), (RejectMethod::Errno, vec![]));
        assert_eq!(features.sockets.kernel, bits().kernel);
    }

    #[test]
    fn a_capability_that_is_missing_is_no_lockdown() {
        let environment = Environment { missing: vec!["CAP_PERFMON"], kernel: (6, 12) };
        let load = |trial, _| match trial {
            Trial::ReadKernel => rejected(libc::EINVAL, "unknown func bpf_probe_read_kernel#113"),
            _ => Ok(()),
        };
        let error = Features::by(load, Ok(bits()), None, &environment).unwrap_err().to_string();
        assert!(error.contains("CAP_PERFMON"), "{error}");
    }

    #[test]
    fn without_type_information_nothing_is_read() {
        let read = |bits| Features::by(|_, _| Ok(()), bits, None, &root()).unwrap();
        let absent = read(Err(io::ErrorKind::NotFound.into()));
        assert!(matches!(&absent.limits[..], [Limit::NoBtf(_)]), "{:?}", absent.limits);
        let without_bit = read(Ok(SocketBits::default()));
        assert_eq!(without_bit.limits, [Limit::NoKernelBit]);
        assert!(without_bit.sockets.kernel.is_none());
    }

    #[test]
    fn the_lockdown_in_force() {
        let table = [
            ("[none] integrity confidentiality\n", Some("none")),
            ("none integrity [confidentiality]\n", Some("confidentiality")),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(in_brackets(text).as_deref(), expected);
        }
    }
}
