//! The end-to-end scenarios: each a story on a cluster of its own, with the real daemon and the
//! real kernel. `cargo xtask test` runs them; they need root.
#![forbid(unsafe_code)]

mod acls;
mod agent_partition;
mod all_critical_refuses_and_recovers;
mod another_hosts_loopback;
mod bpf_log;
mod cgroup_namespace;
mod cgroup_recreated;
mod clients_by_name;
mod cluster;
mod consul_connections;
mod consul_killed_and_restarted;
mod container_namespace;
mod crash_loop;
mod critical_backend_leaves;
mod curl_by_name;
mod disk;
mod dns_over_tls;
mod external_detach;
mod foreign_route;
mod forwarding;
mod four_capabilities;
mod ha_cluster;
mod instance_filter;
mod invalid_records;
mod ipv6_by_name;
mod killed_under_load;
mod leader_killed;
mod load;
mod maintenance;
mod map_full;
mod non_vip_passthrough;
mod not_ready_before_consul;
mod operators_view;
mod pinned_address;
mod port_reused;
mod ports_from_meta;
mod postgres;
mod refuses_to_start;
mod reload_source;
mod reloaded_live;
mod resolvers;
mod restarted_without_consul;
mod rules;
mod services_never_mix;
mod shadow_mode;
mod socket_activation;
mod state_dir_lost;
mod static_catalog;
mod stops_on_signals;
mod tag_removed;
mod tls_rotated;
mod udp_echo;
mod upgraded_under_load;
mod wildcard_server_never_reached;

use std::process::ExitCode;

use anyhow::Result;
use lb_tests::{cleanup, cmd, process};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

type Story = fn() -> Result<()>;

const STORIES: &[(&str, Story)] = &[
    ("acl_policies", acls::policies),
    ("acls", acls::story),
    ("agent_cut_off", agent_partition::story),
    ("all_critical_refuses_and_recovers", all_critical_refuses_and_recovers::story),
    ("another_hosts_loopback", another_hosts_loopback::story),
    ("bad_records", invalid_records::story),
    ("cgroup_namespace", cgroup_namespace::story),
    ("chosen_instances", instance_filter::story),
    ("consul_as_resolver", resolvers::consul),
    ("consul_connections", consul_connections::story),
    ("consul_killed_and_restarted", consul_killed_and_restarted::story),
    ("container_namespace", container_namespace::story),
    ("crash_loop", crash_loop::story),
    ("critical_backend_leaves", critical_backend_leaves::story),
    ("curl_by_name", curl_by_name::story),
    ("detached_by_hand", external_detach::story),
    ("dig_by_name", resolvers::dig),
    ("disk_full", disk::full),
    ("disk_stalled", disk::stalled),
    ("dnsmasq_in_front", resolvers::dnsmasq),
    ("foreign_route", foreign_route::story),
    ("forwarding", forwarding::story),
    ("four_capabilities", four_capabilities::story),
    ("hooks_watched", cgroup_recreated::story),
    ("ipv6_by_name", ipv6_by_name::story),
    ("kernel_has_a_voice", bpf_log::story),
    ("killed_under_load", killed_under_load::story),
    ("leader_killed", leader_killed::story),
    ("maintenance", maintenance::story),
    ("more_than_fits", map_full::story),
    ("not_a_vip_untouched", non_vip_passthrough::story),
    ("not_ready_before_consul", not_ready_before_consul::story),
    ("operators_view", operators_view::story),
    ("pinned_address", pinned_address::story),
    ("port_reused", port_reused::story),
    ("ports_from_meta", ports_from_meta::story),
    ("refuses_to_start", refuses_to_start::story),
    ("reloaded_between_consuls", reload_source::story),
    ("reloaded_live", reloaded_live::story),
    ("resolvers_in_a_circle", resolvers::circle),
    ("restarted_without_consul", restarted_without_consul::story),
    ("services_never_mix", services_never_mix::story),
    ("state_lost", state_dir_lost::story),
    ("static_catalog", static_catalog::story),
    ("stops_on_signals", stops_on_signals::story),
    ("strangers_refused", resolvers::strangers),
    ("tag_removed", tag_removed::story),
    ("tls_rotated", tls_rotated::story),
    ("udp_echo", udp_echo::story),
    ("unread_log", disk::unread_log),
    ("upgraded_under_load", upgraded_under_load::story),
    ("way_out", shadow_mode::story),
    ("way_out_by_key", shadow_mode::by_key),
    ("wildcard_server_never_reached", wildcard_server_never_reached::story),
];

/// The stories of programs that not every machine has, each with those that it needs.
const STORIES_OF_PROGRAMS: &[(&str, &[&str], Story)] = &[
    ("dns_over_tls", &["kdig"], dns_over_tls::story),
    ("drill_by_name", &["drill"], resolvers::drill),
    ("forwarded_without_loss", &["dnsperf"], resolvers::forwarded),
    ("java_by_name", &["java", "javac"], clients_by_name::java),
    ("kdig_by_name", &["kdig"], resolvers::kdig),
    ("musl_by_name", &["musl-gcc"], resolvers::musl),
    ("node_by_name", &["node"], clients_by_name::node),
    ("passed_sockets", &["python3"], socket_activation::story),
    ("postgres", &["psql", "initdb", "postgres"], postgres::story),
    ("prometheus_rules", &["promtool"], rules::story),
    ("python_by_name", &["python3"], clients_by_name::python),
    ("systemd_resolved_by_name", &["systemd-resolved"], resolvers::systemd_resolved),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Each runs a Consul or two; more at once would only make them wait for each other.
    arguments.test_threads.get_or_insert(2);
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("The scenarios are ignored: needs root: run `cargo xtask test`");
    }
    if let Err(error) = cleanup::on_signals() {
        eprintln!("Can't handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let everywhere = STORIES.iter().map(|&(name, story)| (name, &[][..], story));
    let trials = everywhere.chain(STORIES_OF_PROGRAMS.iter().copied());
    let trials = trials.map(|(name, programs, story)| {
        Trial::ignorable_test(name, move || tell(programs, story)).with_ignored_flag(!is_root)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Tells a story, where the programs that it needs are installed; CI has to have them.
fn tell(programs: &[&str], story: Story) -> Result<Completion, Failed> {
    if let Some(absent) = programs.iter().find_map(|program| cmd::installed(program).err()) {
        return cmd::skip(&absent.to_string());
    }
    story().map_err(|error| Failed::from(format!("{error:?}\n{}", process::last_words())))?;
    Ok(Completion::Completed)
}
