//! The instructions that the verifier processes for the programs: docs/verifier.md has them for each kernel.

use lb_userspace::datapath::{Options, RejectMethod};

use crate::fixture::Bed;

/// The configuration that leaves the programs the most to do: both pools, public networks, pins far apart, and every
/// exclusion.
fn all_of_it(options: &mut Options) {
    options.vip.pool6 = Some("fd77::/64".parse().unwrap());
    options.vip.public = ["203.0.113.0/24", "198.51.100.0/24", "2001:db8::/64", "2001:db8:1::/96"]
        .map(|network| network.parse().unwrap())
        .into();
    for (name, pin) in [("web", "127.0.0.1:80"), ("dns", "10.0.0.1:53")] {
        options.vip.pins.insert(name.to_owned(), pin.parse().unwrap());
    }
    let never = |nth| options.scope.join(format!("never{nth}"));
    options.datapath.exclude_cgroups = (0..16).map(never).collect();
}

/// `cargo xtask vm` and `cargo xtask test` read these lines.
pub fn instructions_are_told() {
    drop(Bed::with(|options| {
        all_of_it(options);
        options.refusal = Some(RejectMethod::PortZero);
    }));
    let mut bed = Bed::with(all_of_it);
    let (major, minor) = crate::running_kernel();
    println!();
    let verified = bed.datapath.verified_instructions(&bed.options);
    let refused = |error| panic!("Linux {major}.{minor}: {error}: {error:?}");
    for (program, n_instructions) in verified.unwrap_or_else(refused) {
        let n_instructions = n_instructions.unwrap_or_else(|| panic!("no count of {program}"));
        println!("verifier: {major}.{minor} {program} {n_instructions}");
    }
}

/// Before 5.11 programs count as locked memory, of which a process may have 64 KiB by default.
pub fn a_probe_needs_no_locked_memory() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(0), ..before }).unwrap();
    let probed = lb_userspace::datapath::Features::probe();
    let limit = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, before).unwrap();
    probed.unwrap();
    // As far as this process may.
    assert_eq!(limit.current, limit.maximum);
}
