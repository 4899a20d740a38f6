//! The object in the kernel: real programs, real sockets, in a cgroup of the test's own.
//!
//! The whole process enters that cgroup, so the trials run one after another.
#![expect(clippy::unwrap_used, reason = "a trial that can't go on fails")]

mod bed;
mod changes;
mod disconnect;
mod refusal;
mod scope;
mod translation;

use libtest_mimic::{Arguments, Trial};

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!(
            "kernel tests are skipped: they load eBPF programs, which needs root; run `cargo xtask test`"
        );
    }
    let trials: [(&str, fn()); _] = [
        ("a_dial_reaches_a_backend", translation::a_dial_reaches_a_backend),
        ("weights_are_shares", translation::weights_are_shares),
        ("the_peer_is_forgotten", translation::the_peer_is_forgotten),
        ("what_is_no_vip_passes", translation::what_is_no_vip_passes),
        ("dials_are_counted", translation::dials_are_counted),
        ("maps_are_readable", translation::maps_are_readable),
        ("refused_by_errno", refusal::by_errno),
        ("refused_by_port_zero", refusal::by_port_zero),
        ("a_pin_counts_on_the_host", scope::a_pin_counts_on_the_host),
        ("a_pin_passes_elsewhere", scope::a_pin_passes_elsewhere),
        ("loopback_backends_are_the_hosts", scope::loopback_backends_are_the_hosts),
        ("detached_is_gone", scope::detached_is_gone),
        ("unload_detaches_anothers_programs", scope::unload_detaches_anothers_programs),
        ("no_cgroup_is_an_error", scope::no_cgroup_is_an_error),
        ("swaps_are_atomic", changes::swaps_are_atomic),
        ("services_never_mix", changes::services_never_mix),
        ("only_the_chosen_are_disconnected", disconnect::only_the_chosen),
        ("a_disconnected_application_notices", disconnect::the_application_notices),
        ("disconnected_in_another_namespace", disconnect::in_another_namespace),
        ("disconnected_in_another_process", disconnect::in_another_process),
        ("disconnected_in_a_threads_namespace", disconnect::in_a_threads_namespace),
        ("twins_are_disconnected", disconnect::twins),
        ("many_are_disconnected", disconnect::many),
        ("failure_to_examine_is_reported", disconnect::failure_is_reported),
        ("failure_to_disconnect_is_reported", disconnect::unreached_is_reported),
    ];
    let trials = trials.map(|(name, run)| {
        Trial::test(name, move || {
            run();
            Ok(())
        })
        .with_kind("kernel")
        .with_ignored_flag(!root)
    });
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}
