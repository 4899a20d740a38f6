//! Logging to the daemon's log, in rare cases only: never on the path of an ordinary connection, and
//! rate-limited to one message a second of each kind.

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::btf_maps::Array;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::btf_map;
use aya_log_ebpf::{info, warn};
use lb_common::Counter;

use crate::context::Reject;
use crate::maps;

const SECOND_NS: u64 = 1_000_000_000;

/// When each kind was last logged, in nanoseconds since boot.
#[btf_map]
static LOG_LAST: Array<u64, 4, { BPF_F_MMAPABLE as usize }> = Array::new();

#[repr(u32)]
enum LogKind {
    Inconsistent = 0,
    StorageAllocFailed = 1,
    StaleBackend = 2,
    FlowsFull = 3,
}

/// A message as a global function: the verifier follows it once, and what it needs is on a stack of its
/// own. Such a function has to return a number, here none of use. The macros take a context, and don't use
/// it.
macro_rules! message {
    ($(#[$doc:meta])* $name:ident, $kind:ident, $log:ident, $text:literal $(, $index:ident)?) => {
        $(#[$doc])*
        #[inline(never)]
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($index: u64)?) -> u64 {
            if should_log(LogKind::$kind) {
                $log!((), $text $(, $index as u32)?);
            }
            0
        }
    };
}

message!(
    /// A socket has no memory left for its storage.
    nohop_log_storage_alloc_failed, StorageAllocFailed, warn,
    "no socket storage: a connection goes on, and will show its backend as the peer"
);
message!(
    /// A socket's backend left the table.
    nohop_log_stale_backend, StaleBackend, info,
    "backend {} is gone: a socket's datagrams go to another one", backend_idx
);
message!(
    /// A socket sends to more VIPs and ports than it can remember, all the time.
    nohop_log_flows_full, FlowsFull, warn,
    "a UDP socket sends to more than eight VIPs and ports: the replies of one show its backend"
);
message!(
    /// See [`inconsistent`].
    nohop_log_inconsistent, Inconsistent, warn,
    "service {} leads to a backend that isn't there: connections are refused", service
);

/// A service leads to a slot or a backend that isn't there.
#[inline(always)]
pub fn inconsistent(service: u32) -> Reject {
    maps::count(Counter::Inconsistent);
    nohop_log_inconsistent(service.into());
    Reject
}

#[inline(always)]
fn should_log(kind: LogKind) -> bool {
    let Some(said) = LOG_LAST.get_ptr_mut(kind as u32) else { return false };
    // SAFETY: the helper has no preconditions, and an array's element stays. Two CPUs that come at
    // once both speak, which is no harm.
    unsafe {
        let now = bpf_ktime_get_ns();
        if now - said.read_volatile() < SECOND_NS {
            return false;
        }
        said.write_volatile(now);
    }
    true
}
