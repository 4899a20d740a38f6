//! The end-to-end scenarios: each on a cluster of its own, with the real daemon and the real kernel. `cargo xtask test` runs them; they need root.
#![forbid(unsafe_code)]

mod acls;
mod admin_over_tcp;
mod affinity;
mod agent_partition;
mod all_critical_keeps;
mod all_critical_refuses_and_recovers;
mod another_hosts_loopback;
mod bpf_log;
mod cgroup_namespace;
mod cgroup_recreated;
mod clients_by_name;
mod cluster;
mod command_line;
mod consul_connections;
mod consul_killed_and_restarted;
mod container_namespace;
mod crash_loop;
mod critical_backend_leaves;
mod curl_by_name;
mod dashboard;
mod disk;
mod dns_over_tls;
mod docker;
mod drain;
mod edge;
mod edge_bgp;
mod edge_clients;
mod edge_failover;
mod edge_shows_clients;
mod ejected_is_shown;
mod explained;
mod external_detach;
mod faulty_backends;
mod first_minutes;
mod foreign_route;
mod forwarding;
mod four_capabilities;
mod ha_cluster;
mod instance_filter;
mod instances_listen_late;
mod intercepted;
mod invalid_records;
mod ipv6_by_name;
mod killed_under_load;
mod leader_killed;
mod load;
mod maintenance;
mod map_full;
mod names_by_resolvers;
mod names_from_containers;
mod names_outlive_the_daemon;
mod names_under_load;
mod nohop_in_docker;
mod non_vip_passthrough;
mod not_ready_before_consul;
mod one_of_ten_fails;
mod openapi;
mod operators_view;
mod page;
mod page_cost;
mod page_link;
mod pinned_address;
mod port_reused;
mod ports_from_meta;
mod postgres;
mod prefer_node;
mod public_vips;
mod queried;
mod reference;
mod refuses_to_start;
mod reload_source;
mod reloaded_live;
mod resolvers;
mod restarted_without_consul;
mod rules;
mod server;
mod services_never_mix;
mod several_sources;
mod shadow_mode;
mod socket_activation;
mod spare_set;
mod state_dir_lost;
mod static_catalog;
mod stopped_instance_drains;
mod stops_on_signals;
mod tag_removed;
mod tls_rotated;
mod top;
mod trace;
mod udp_echo;
mod upgraded_under_load;
mod wildcard_server_never_reached;

use std::process::ExitCode;

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use testbed::{cleanup, cmd, process};

type Scenario = fn() -> Result<()>;

const SCENARIOS: &[(&str, Scenario)] = &[
    ("acl_policies", acls::policies),
    ("acls", acls::run),
    ("admin_over_tcp", admin_over_tcp::run),
    ("affinity_by_cgroup", affinity::run),
    ("agent_partition", agent_partition::run),
    ("all_critical_refuses_and_recovers", all_critical_refuses_and_recovers::run),
    ("all_critical_keeps_the_last_backends", all_critical_keeps::run),
    ("all_refuse_at_once", faulty_backends::all_refuse),
    ("another_hosts_loopback", another_hosts_loopback::run),
    ("backend_flaps", faulty_backends::flaps),
    ("backend_resets", faulty_backends::resets),
    ("bpf_log", bpf_log::run),
    ("cgroup_namespace", cgroup_namespace::run),
    ("cgroup_recreated", cgroup_recreated::run),
    ("command_line", command_line::run),
    ("consul_as_resolver", resolvers::consul),
    ("consul_connections", consul_connections::run),
    ("consul_killed_and_restarted", consul_killed_and_restarted::run),
    ("container_namespace", container_namespace::run),
    ("crash_loop", crash_loop::run),
    ("critical_backend_leaves", critical_backend_leaves::run),
    ("curl_by_name", curl_by_name::run),
    ("dig_by_name", resolvers::dig),
    ("disk_full", disk::full),
    ("disk_stalled", disk::stalled),
    ("dns_acl", resolvers::strangers),
    ("dnsmasq_in_front", resolvers::dnsmasq),
    ("drain_by_hand", drain::by_hand),
    ("drain_deadline", drain::deadline),
    ("drain_on_a_slow_disk", drain::on_a_slow_disk),
    ("edge", edge::run),
    ("ejected_is_shown", ejected_is_shown::run),
    ("explained", explained::run),
    ("external_detach", external_detach::run),
    ("foreign_route", foreign_route::run),
    ("forwarding", forwarding::run),
    ("forwarding_loop", resolvers::circle),
    ("four_capabilities", four_capabilities::run),
    ("instance_filter", instance_filter::run),
    ("instances_listen_late", instances_listen_late::run),
    ("invalid_records", invalid_records::run),
    ("ipv6_by_name", ipv6_by_name::run),
    ("killed_under_load", killed_under_load::run),
    ("leader_killed", leader_killed::run),
    ("maintenance", maintenance::run),
    ("map_full", map_full::run),
    ("names_after_a_crash", names_under_load::crashed),
    ("names_after_twenty_kills", names_under_load::killed_at_random),
    ("names_lost_without_the_unit", names_under_load::lost_without_the_unit),
    ("names_of_idle_services", names_under_load::idle_services),
    ("names_outlive_the_daemon", names_outlive_the_daemon::run),
    ("intercepted", intercepted::run),
    ("names_left_to_the_daemon", names_outlive_the_daemon::refused),
    ("names_refused_when_too_old", names_outlive_the_daemon::too_old),
    ("names_through_an_update", names_under_load::updated),
    ("non_vip_passthrough", non_vip_passthrough::run),
    ("not_ready_before_consul", not_ready_before_consul::run),
    ("one_of_ten_is_silent", one_of_ten_fails::is_silent),
    ("one_of_ten_refuses", one_of_ten_fails::refuses),
    ("openapi", openapi::run),
    ("operators_view", operators_view::run),
    ("public_vips", public_vips::run),
    ("reference_page", reference::run),
    ("pinned_address", pinned_address::run),
    ("port_reused", port_reused::run),
    ("ports_from_meta", ports_from_meta::run),
    ("prefers_its_node", prefer_node::run),
    ("queried", queried::run),
    ("refuses_to_start", refuses_to_start::run),
    ("reload_source", reload_source::run),
    ("reloaded_live", reloaded_live::run),
    ("restarted_without_consul", restarted_without_consul::run),
    ("services_never_mix", services_never_mix::run),
    ("several_sources", several_sources::run),
    ("shadow_mode", shadow_mode::run),
    ("shadow_mode_by_key", shadow_mode::by_key),
    ("spare_set", spare_set::run),
    ("state_dir_lost", state_dir_lost::run),
    ("static_catalog", static_catalog::run),
    ("stops_on_signals", stops_on_signals::run),
    ("tag_removed", tag_removed::run),
    ("tls_rotated", tls_rotated::run),
    ("top", top::run),
    ("trace", trace::run),
    ("udp_echo", udp_echo::run),
    ("unread_log", disk::unread_log),
    ("upgraded_under_load", upgraded_under_load::run),
    ("wildcard_server_never_reached", wildcard_server_never_reached::run),
];

/// The scenarios of programs that not every machine has, each with those that it needs.
const SCENARIOS_OF_PROGRAMS: &[(&str, &[&str], Scenario)] = &[
    ("dns_over_tls", &["kdig"], dns_over_tls::run),
    ("edge_failover", &["keepalived"], edge_failover::run),
    ("edge_bgp", &["bgpd", "bird", "zebra"], edge_bgp::run),
    ("edge_clients", &["gtlsclient", "gtlsserver", "iperf3", "wrk"], edge_clients::run),
    ("edge_shows_clients", &["nginx"], edge_shows_clients::run),
    ("drill_by_name", &["drill"], resolvers::drill),
    ("first_minutes", &["tmux"], first_minutes::run),
    ("forwarded_without_loss", &["dnsperf"], resolvers::forwarded),
    ("grafana_dashboard", &["promtool"], dashboard::run),
    ("intercepted_while_it_stops", &["python3"], intercepted::while_it_stops),
    ("java_by_name", &["java", "javac"], clients_by_name::java),
    ("kdig_by_name", &["kdig"], resolvers::kdig),
    ("musl_by_name", &["musl-gcc"], resolvers::musl),
    ("names_by_resolvers", &["musl-gcc", "node"], names_by_resolvers::run),
    ("names_from_cni", &["host-local"], names_from_containers::by_cni),
    ("names_from_docker", docker::PROGRAMS, names_from_containers::by_docker),
    ("node_by_name", &["node"], clients_by_name::node),
    ("nohop_in_docker", docker::PROGRAMS, nohop_in_docker::run),
    ("postgres", &["psql", "initdb", "postgres"], postgres::run),
    ("prometheus_rules", &["promtool"], rules::run),
    ("python_by_name", &["python3"], clients_by_name::python),
    ("socket_activation", &["python3"], socket_activation::run),
    ("stopped_instance_drains", &["python3"], stopped_instance_drains::run),
    ("systemd_resolved_by_name", &["systemd-resolved"], resolvers::systemd_resolved),
];

/// What takes too long for CI, each with the programs that it needs: of `cargo xtask test --full`, which
/// sets NOHOP_FULL.
const SCENARIOS_IN_FULL: &[(&str, &[&str], Scenario)] = &[
    ("page", &["chromium"], page::run),
    ("page_cost", &["bash"], page_cost::run),
    ("page_link", &["chromium", "ss"], page_link::run),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // Most of their time is waiting for intervals of Consul and of the daemon: four use some 1.3 processors.
    arguments.test_threads.get_or_insert(4);
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("The scenarios are ignored: needs root: run `cargo xtask test`");
    }
    if let Err(error) = cleanup::on_signals() {
        eprintln!("Can't handle signals: {error}");
        return ExitCode::FAILURE;
    }
    let everywhere = SCENARIOS.iter().map(|&(name, scenario)| (name, &[][..], scenario));
    let trials = everywhere.chain(SCENARIOS_OF_PROGRAMS.iter().copied());
    let trials = trials.map(|(name, programs, scenario)| {
        Trial::ignorable_test(name, move || run(programs, scenario)).with_ignored_flag(!is_root)
    });
    let is_full = std::env::var_os("NOHOP_FULL").is_some();
    let in_full = SCENARIOS_IN_FULL.iter().map(|&(name, programs, scenario)| {
        Trial::test(name, move || run_in_full(programs, scenario))
            .with_ignored_flag(!is_root || !is_full)
    });
    // Of `cargo xtask test --full` as well, once the packages are made.
    let has_image = std::env::var_os("NOHOP_IMAGE").is_some();
    let image = || run_in_full(docker::PROGRAMS, docker::packaged_image);
    let image = Trial::test("packaged_image", image).with_ignored_flag(!is_root || !has_image);
    let trials = trials.chain(in_full).chain([image]);
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// Runs a scenario whose programs have to be installed.
fn run_in_full(programs: &[&str], scenario: Scenario) -> Result<(), Failed> {
    for program in programs {
        let fix = "`cargo xtask test --full` installs it, with apt-get";
        cmd::installed(program).map_err(|_| format!("{program} isn't on PATH: {fix}"))?;
    }
    completed(scenario)
}

fn completed(scenario: Scenario) -> Result<(), Failed> {
    scenario().map_err(|error| Failed::from(format!("{error:?}\n{}", process::failure_output())))
}

/// Runs a scenario where the programs that it needs are installed; CI has to have them.
fn run(programs: &[&str], scenario: Scenario) -> Result<Completion, Failed> {
    if let Some(absent) = programs.iter().find_map(|program| cmd::installed(program).err()) {
        return cmd::skip(&absent.to_string());
    }
    completed(scenario).map(|()| Completion::Completed)
}
