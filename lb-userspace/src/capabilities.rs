//! The capabilities of the daemon's threads. The kernel keeps them by thread, so each thread gives up
//! what it doesn't need; what a thread starts inherits its own. docs/security.md has the reasons.
//!
//! The threads share their memory: this stops a mistake, such as a path that a request names, from being
//! carried out with rights that the request shouldn't have. It doesn't contain code of an attacker's.

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// What the daemon's own threads use: maps and programs, routes and filters, files of other users.
const DATAPATH: CapabilitySet =
    CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::NET_ADMIN).union(FILES);

/// Tokens and keys of another user's, an agent's unix socket, and a state directory.
const FILES: CapabilitySet = CapabilitySet::DAC_OVERRIDE.union(CapabilitySet::DAC_READ_SEARCH);

/// What the daemon's own threads may raise: to enter network namespaces and to borrow sockets.
const SEARCH: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// For the calling thread, one of the daemon's own: drops what only the start needs, such as
/// CAP_NET_BIND_SERVICE, and sets aside what only searches need ([`for_search`]).
pub fn for_datapath() {
    reduce(DATAPATH.union(SEARCH), |permitted| {
        // What CAP_SYS_ADMIN allows as well (capabilities(7)), where it takes their place: Docker 20.10 of Debian 12
        // has no names for them.
        let is_whole = permitted.contains(CapabilitySet::BPF.union(CapabilitySet::PERFMON));
        if is_whole { DATAPATH } else { DATAPATH.union(CapabilitySet::SYS_ADMIN) }
    });
}

/// For the calling thread, which ends with its search: takes up what [`for_datapath`] has set aside.
pub fn for_search() {
    reduce(CapabilitySet::all(), |permitted| permitted);
}

/// For the calling thread, which only reads and writes files, and asks sources.
pub fn for_files() {
    reduce(FILES, |permitted| permitted);
}

/// For the calling thread, which serves requests: drops all.
pub fn none() {
    reduce(CapabilitySet::empty(), |permitted| permitted);
}

/// Keeps of what the calling thread has these alone, and has what `effective` takes of them in effect.
fn reduce(kept: CapabilitySet, effective: fn(CapabilitySet) -> CapabilitySet) {
    let reduced = capabilities(None).and_then(|has| {
        let permitted = has.permitted & kept;
        let effective = permitted & effective(permitted);
        set_capabilities(
            None,
            CapabilitySets { effective, permitted, inheritable: has.inheritable & permitted },
        )
    });
    if let Err(error) = reduced {
        tracing::warn!("a thread keeps capabilities that it doesn't need: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_keeps_what_it_is_for() {
        let of_thread = |reduce: fn()| {
            let thread = std::thread::spawn(move || {
                reduce();
                capabilities(None).unwrap()
            });
            thread.join().unwrap()
        };
        let all = capabilities(None).unwrap().permitted;
        let set_aside = of_thread(for_datapath);
        assert_eq!(set_aside.effective, all & DATAPATH);
        assert_eq!(set_aside.permitted, all & (DATAPATH | SEARCH));
        let without = of_thread(|| {
            reduce(!CapabilitySet::BPF, |permitted| permitted);
            for_datapath();
        });
        let bpf = CapabilitySet::BPF;
        assert_eq!(without.effective, all & (DATAPATH | CapabilitySet::SYS_ADMIN) & !bpf);
        let searches = of_thread(|| {
            for_datapath();
            for_search();
        });
        assert_eq!(searches.effective, all & (DATAPATH | SEARCH));
        assert_eq!(of_thread(for_files).permitted, all & FILES);
        let none = of_thread(none);
        assert!(none.permitted.is_empty() && none.effective.is_empty());
        assert_eq!(capabilities(None).unwrap().permitted, all);
    }
}
