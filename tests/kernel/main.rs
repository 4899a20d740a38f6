//! The object in the kernel: real programs, real sockets, in a cgroup of the test's own.
//!
//! The whole process enters that cgroup, so the trials run one after another.
#![expect(clippy::unwrap_used, reason = "a trial that can't continue fails")]

mod atomic_updates;
mod bypass;
mod choice;
mod connector;
mod conns;
mod disconnect;
mod edge;
mod edge_bad_input;
mod edge_client;
mod edge_proof;
mod edge_room;
mod edge_trace;
mod edge_upgrade;
mod edge_xdp;
mod ejection;
mod families;
mod in_flight;
mod index;
mod intercept;
mod layout2;
mod lockdown;
mod maps;
mod memcg;
mod names;
mod names_changes;
mod names_firewall;
mod names_packets;
mod names_refused;
mod names_versions;
mod netns;
mod netns_scope;
mod obstacles;
mod odd_sockets;
mod options;
mod pins;
mod ports;
mod proof;
mod public;
mod refusal;
mod reports;
mod restart;
mod rollback;
mod shadow;
mod soak;
mod sockops;
mod stress;
mod translation;
mod trust;
mod udp;
mod units;
mod verifier;

use std::sync::Mutex;

use lb_tests::fixture;
use libtest_mimic::{Arguments, Completion, Trial};

/// The trial whose numbers docs/verifier.md has.
const COUNTS_TRIAL: &str = "verified_instructions_are_told";

/// A kernel's version: major and minor.
type Version = (u32, u32);

struct KernelTrial {
    /// The first kernel with the tested feature.
    min_kernel: Version,
    /// Whether it is about a kernel's behaviour, and runs on each.
    on_each: bool,
    /// Whether it is about a locked-down kernel, and runs on such a one alone.
    locked_down: bool,
    name: &'static str,
    run: fn(),
}

/// A trial for each kernel from this one on.
const fn since(min_kernel: Version, name: &'static str, run: fn()) -> KernelTrial {
    KernelTrial { min_kernel, on_each: true, locked_down: false, name, run }
}

/// A trial for kernels that are locked down, which `cargo xtask vm` starts.
const fn locked_down(name: &'static str, run: fn()) -> KernelTrial {
    KernelTrial { min_kernel: (5, 10), on_each: true, locked_down: true, name, run }
}

/// A trial of the daemon's behaviour, the same on every kernel: in a VM it is left out, because an
/// emulated processor takes minutes for it.
const fn once(name: &'static str, run: fn()) -> KernelTrial {
    KernelTrial { min_kernel: (5, 10), on_each: false, locked_down: false, name, run }
}

const TRIALS: &[KernelTrial] = &[
    since((5, 10), "edge_clients_reach_backends", edge::clients_reach_backends),
    since((5, 10), "edge_what_is_of_no_flow", edge::what_is_of_no_flow),
    since((5, 10), "edge_what_is_the_hosts", edge::what_is_the_hosts),
    since((5, 10), "edge_short_links", edge::short_links),
    since((5, 10), "edge_flows_are_traced", edge_trace::flows_are_traced),
    since((5, 10), "edge_ejections_are_reported", edge_trace::ejections_are_reported),
    since((5, 10), "edge_packets_that_are_not_right", edge_bad_input::packets_that_are_not_right),
    since((5, 10), "edge_syns_that_show_nothing", edge_bad_input::syns_that_show_nothing),
    since((5, 10), "edge_handshakes", edge_bad_input::handshakes_that_are_not_completed),
    since((5, 10), "edge_vlans", edge_bad_input::vlans),
    once("edge_jumbo_frames", edge_bad_input::jumbo_frames),
    once("edge_without_forwarding", edge_bad_input::without_forwarding),
    since((5, 10), "edge_a_proof", edge_proof::passes_and_fails),
    once("edge_a_proof_of_a_killed_daemon", edge_proof::of_a_killed_daemon),
    since((5, 10), "edge_no_route", edge_trace::no_route),
    since((5, 10), "edge_flows_outlive_the_daemon", edge::flows_outlive_the_daemon),
    since((5, 10), "edge_clients_are_shown", edge_client::clients_are_shown),
    since((5, 10), "edge_clients_of_mptcp_are_shown", edge_client::clients_of_mptcp_are_shown),
    // The kernel reports from 6.3 on whether the other end of a veth takes packets from XDP; tcx is of 6.6.
    since((6, 6), "edge_xdp_established_flows", edge_xdp::established_flows),
    since((6, 6), "edge_xdp_checksums_left_to_the_card", edge_xdp::checksums_left_to_the_card),
    since((6, 6), "edge_xdp_one_arm", edge_xdp::one_arm),
    since((6, 6), "edge_xdp_attachments", edge_xdp::attachments),
    since((6, 6), "edge_xdp_no_neighbour", edge_xdp::no_neighbour),
    since((6, 6), "edge_xdp_sent_back", edge_xdp::sent_back),
    since((5, 10), "edge_an_upgrade", edge_upgrade::between_versions),
    once("edge_an_upgrade_of_the_layout", edge_upgrade::over_another_layout),
    since((5, 10), "edge_a_silent_neighbour", edge::a_silent_neighbour),
    once("edge_sources_come_and_go", edge::sources_come_and_go),
    once("edge_a_service_goes", edge::a_service_goes),
    once("edge_no_flow_begins", edge::no_flow_begins),
    once("edge_udp_moves", edge::udp_moves),
    once("edge_clients_reuse_ports", edge::clients_reuse_ports),
    since((5, 10), "edge_a_backend_is_here", edge::a_backend_is_here),
    since((5, 10), "edge_interfaces_change", edge::interfaces_change),
    once("edge_a_full_table", edge_room::a_full_table),
    once("edge_room_without_a_daemon", edge_room::room_without_a_daemon),
    once("edge_too_many_vips", edge_room::too_many_vips),
    once("edge_a_sweep_in_parts", edge_room::a_sweep_in_parts),
    once("edge_room_elsewhere", edge_room::room_elsewhere),
    once("edge_a_flood", edge_room::a_flood),
    once("edge_a_record_of_another_family", edge_room::a_record_of_another_family),
    once("edge_ports_run_out", edge_room::ports_run_out),
    once("edge_a_backend_is_silent", edge_room::a_backend_is_silent),
    since((5, 10), "a_connect_reaches_a_backend", translation::a_connect_reaches_a_backend),
    once("weights_are_shares", translation::weights_are_shares),
    since((5, 10), "an_earlier_peer_is_cleared", translation::an_earlier_peer_is_cleared),
    since((5, 10), "other_addresses_pass", translation::other_addresses_pass),
    since((5, 10), "connects_are_counted", translation::connects_are_counted),
    since((5, 10), "least_avoids_the_busier_one", choice::least_avoids_the_busier_one),
    since((5, 10), "round_robin_is_exact", choice::round_robin_is_exact),
    since((5, 10), "maglev_keeps_a_cgroups_backend", choice::maglev_keeps_a_cgroups_backend),
    since((5, 10), "ejected_backends_come_last", choice::ejected_backends_come_last),
    since(
        (5, 10),
        "silence_is_found_at_the_next_connect",
        choice::silence_is_found_at_the_next_connect,
    ),
    since(
        (5, 10),
        "a_trial_is_claimed_by_one_connection",
        choice::a_trial_is_claimed_by_one_connection,
    ),
    since(
        (5, 10),
        "the_spare_set_takes_over_and_gives_back",
        choice::the_spare_set_takes_over_and_gives_back,
    ),
    since(
        (5, 10),
        "beyond_the_share_the_spare_set_is_used",
        choice::beyond_the_share_the_spare_set_is_used,
    ),
    since((5, 10), "a_new_backend_ramps_up", choice::a_new_backend_ramps_up),
    since(
        (5, 10),
        "datagrams_avoid_an_ejected_backend",
        choice::datagrams_avoid_an_ejected_backend,
    ),
    since(
        (5, 10),
        "a_trace_that_is_over_is_switched_off",
        choice::a_trace_that_is_over_is_switched_off,
    ),
    since((5, 10), "public_vips_lead_to_a_backend", public::vips_lead_to_a_backend),
    since((5, 10), "public_networks_pass_otherwise", public::others_in_their_networks_pass),
    since((5, 10), "names_are_answered", names::are_answered),
    since((5, 10), "names_follow_the_table_and_the_daemon", names::follow_the_table_and_the_daemon),
    since((6, 6), "names_where_it_is_refused", names::where_it_is_refused),
    since((5, 10), "names_outlive_the_daemon", names::outlive_the_daemon),
    since((5, 10), "names_are_for_served_clients", names::are_for_served_clients),
    since((5, 10), "names_of_packets_of_all_kinds", names_packets::of_all_kinds),
    since((5, 10), "names_of_batches_pass", names_packets::batches_pass),
    since((6, 6), "names_beside_other_programs", names_changes::beside_other_programs),
    once("names_by_the_thousand_are_replaced", names_changes::thousands_are_replaced),
    once("names_in_a_full_map", names_changes::a_full_map),
    since((5, 10), "names_in_one_bucket", names_changes::in_one_bucket),
    once("names_behind_firewalls", names_firewall::what_a_client_sees),
    since((5, 10), "names_by_other_layouts", names_versions::of_other_layouts),
    since((5, 10), "names_of_another_layout_end", names_versions::of_another_layout_end),
    since((5, 10), "names_with_other_formats", names_versions::with_other_formats),
    since((5, 10), "names_after_one_without_the_unit", names_versions::after_one_without_the_unit),
    once("names_where_the_program_is_refused", names_refused::the_program_is_refused),
    since((5, 10), "names_reach_containers", names::reach_containers),
    since((5, 10), "names_leave_others_alone", names::leave_others_alone),
    since((5, 10), "names_pass_where_answers_get_lost", names::pass_where_answers_get_lost),
    since((5, 10), "the_recipe_for_bpftool_works", maps::the_recipe_works),
    since((5, 10), "maps_have_field_names", maps::maps_have_field_names),
    since((5, 10), "pins_of_layout_2_are_taken_over", layout2::pins_are_taken_over),
    since((5, 10), "shadow_mode_of_layout_2_is_taken_over", layout2::shadow_mode_is_taken_over),
    since((5, 10), "rolled_back_to_layout_2", layout2::is_rolled_back_to),
    since((6, 1), "refused_by_errno", refusal::by_errno),
    since((5, 10), "refused_by_port_zero", refusal::by_port_zero),
    since((5, 10), "refused_by_an_old_table", refusal::by_an_old_table),
    since((5, 10), "a_pin_applies_on_the_host", netns_scope::a_pin_applies_on_the_host),
    since((5, 10), "a_pin_applies_to_datagrams", netns_scope::a_pin_applies_to_datagrams),
    since((5, 10), "no_socket_follows_a_moved_pin", netns_scope::no_socket_follows_a_moved_pin),
    since((5, 10), "a_pin_passes_elsewhere", netns_scope::a_pin_passes_elsewhere),
    since((5, 10), "loopback_backends_are_the_hosts", netns_scope::loopback_backends_are_the_hosts),
    since((5, 10), "detached_is_gone", netns_scope::detached_is_gone),
    since((5, 10), "no_cgroup_is_an_error", netns_scope::no_cgroup_is_an_error),
    since((5, 10), "swaps_are_atomic", atomic_updates::swaps_are_atomic),
    since((5, 10), "services_never_mix", atomic_updates::services_never_mix),
    since((5, 10), "only_the_chosen_are_disconnected", disconnect::only_the_chosen),
    since((5, 10), "a_disconnected_application_notices", disconnect::the_application_notices),
    since((5, 10), "disconnected_in_another_namespace", disconnect::in_another_namespace),
    since((5, 10), "disconnected_in_another_process", disconnect::in_another_process),
    since((5, 10), "disconnected_in_a_threads_namespace", disconnect::in_a_threads_namespace),
    since((5, 10), "sockets_of_the_same_addresses_are_disconnected", disconnect::same_addresses),
    since((5, 10), "many_are_disconnected", disconnect::many),
    since((5, 10), "failure_to_examine_is_reported", disconnect::failure_is_reported),
    since((5, 10), "one_failure_keeps_no_other", disconnect::one_failure_keeps_no_other),
    since((5, 10), "failure_to_disconnect_is_reported", disconnect::unreached_is_reported),
    since((5, 10), "datagrams_reach_a_backend", udp::datagrams_reach_a_backend),
    since((5, 10), "a_socket_keeps_its_backends", udp::a_socket_keeps_its_backends),
    since(
        (5, 10),
        "a_datagram_after_a_departure_goes_elsewhere",
        udp::a_datagram_after_a_departure_goes_elsewhere,
    ),
    since(
        (5, 10),
        "sockets_of_a_backend_that_left_are_disconnected",
        udp::sockets_of_a_backend_that_left_are_disconnected,
    ),
    since(
        (5, 10),
        "a_socket_that_goes_elsewhere_names_its_peer",
        udp::a_socket_that_goes_elsewhere_names_its_peer,
    ),
    since(
        (5, 10),
        "a_reply_from_before_the_connection_comes_from_its_vip",
        udp::a_reply_from_before_the_connection_comes_from_its_vip,
    ),
    since(
        (5, 10),
        "a_reply_from_before_a_disconnection_comes_from_its_vip",
        udp::a_reply_from_before_a_disconnection_comes_from_its_vip,
    ),
    since((5, 10), "threads_on_one_socket_never_mix", udp::threads_on_one_socket_never_mix),
    since(
        (5, 10),
        "sockets_reach_what_their_family_can",
        families::sockets_reach_what_their_family_can,
    ),
    since((6, 1), "every_socket_is_refused_by_errno", families::refused_by_errno),
    since((5, 10), "every_socket_is_refused_by_port_zero", families::refused_by_port_zero),
    since((5, 10), "without_a_pool_ipv6_passes", families::without_a_pool_ipv6_passes),
    since((5, 10), "each_port_leads_to_the_backend", ports::each_port_leads_to_the_backend),
    since(
        (5, 10),
        "any_port_replies_from_the_connected_one",
        ports::any_port_replies_from_the_connected_one,
    ),
    since(
        (5, 10),
        "a_connected_socket_keeps_a_port_that_stays",
        ports::a_connected_socket_keeps_a_port_that_stays,
    ),
    since((5, 10), "protocols_are_honoured", ports::protocols_are_honoured),
    since((5, 10), "a_proof_cant_be_forged", proof::a_proof_cant_be_forged),
    once("a_proof_corrects_the_namespace", proof::a_proof_corrects_the_namespace),
    since((5, 10), "a_frozen_scope_is_reported", proof::a_frozen_scope_is_reported),
    since((5, 10), "excluded_cgroups_are_bypassed", bypass::excluded_cgroups),
    since((5, 10), "cgroups_are_excluded_by_pattern", bypass::excluded_by_pattern),
    since((5, 10), "excluded_cgroups_come_and_go", bypass::excluded_come_and_go),
    since((5, 10), "many_cgroups_are_excluded", bypass::many_excluded),
    since((5, 10), "the_daemon_is_bypassed", bypass::the_daemon),
    since((5, 10), "a_cold_service_is_reported_once", reports::a_cold_service_is_reported_once),
    since((5, 10), "a_refused_connect_is_reported", reports::a_refused_connect_is_reported),
    since((5, 10), "a_restart_asks_for_reports_anew", reports::a_restart_asks_anew),
    once("usage_is_told", reports::usage_is_told),
    since((5, 10), "a_shadow_leaves_connects_untouched", shadow::leaves_connects_untouched),
    since((5, 10), "a_shadow_leaves_ipv6_untouched", shadow::leaves_ipv6_untouched),
    since((5, 10), "a_shadow_refuses_nothing", shadow::refuses_nothing),
    since((5, 10), "a_shadow_lets_connections_go_on", shadow::lets_connections_go_on),
    since((5, 10), "a_shadow_outlives_the_daemon", shadow::outlives_the_daemon),
    once("a_shadow_counts_pins_on_the_host_alone", shadow::counts_pins_on_the_host_alone),
    since((6, 8), "connects_go_on_without_storage", odd_sockets::connects_go_on_without_storage),
    since((5, 10), "fast_open_reaches_a_backend", odd_sockets::fast_open),
    since((5, 10), "mptcp_reaches_a_backend", odd_sockets::mptcp),
    since((5, 10), "mptcp_connects_again", odd_sockets::mptcp_again),
    since((5, 10), "options_have_the_same_outcome", options::have_the_same_outcome),
    once("unusable_sources_fail_alike", options::unusable_sources_fail_alike),
    since((5, 10), "a_ring_is_no_way_around", options::a_ring_is_no_way_around),
    since(
        (5, 10),
        "a_connected_socket_that_names_its_vip_follows_its_connection",
        udp::a_connected_socket_that_names_its_vip_follows_its_connection,
    ),
    since(
        (5, 10),
        "a_connect_that_fails_changes_nothing",
        udp::a_connect_that_fails_changes_nothing,
    ),
    since(
        (5, 10),
        "a_reply_from_before_a_second_connect_comes_from_its_vip",
        udp::a_reply_from_before_a_second_connect_comes_from_its_vip,
    ),
    since(
        (5, 10),
        "a_direct_datagram_is_answered_by_its_own_name",
        udp::a_direct_datagram_is_answered_by_its_own_name,
    ),
    since((5, 10), "flows_in_use_never_give_way", udp::flows_in_use_never_give_way),
    since(
        (5, 10),
        "a_connections_datagrams_are_translated_once",
        udp::a_connections_datagrams_are_translated_once,
    ),
    since(
        (5, 10),
        "what_a_writer_gets_after_its_backend_left",
        udp::what_a_writer_gets_after_its_backend_left,
    ),
    since(
        (5, 10),
        "sockets_bound_to_a_family_stay_in_it",
        families::sockets_bound_to_a_family_stay_in_it,
    ),
    since((5, 10), "a_mapped_connect_stays_with_ipv4", families::a_mapped_connect_stays_with_ipv4),
    since((5, 10), "address_lookups_are_no_connects", families::address_lookups_are_no_connects),
    since(
        (5, 10),
        "the_index_follows_what_another_version_changed",
        index::follows_what_another_version_changed,
    ),
    once(
        "no_connect_meets_the_service_of_another_vip",
        index::no_connect_meets_the_service_of_another_vip,
    ),
    since((5, 10), "a_restart_loses_no_connect", restart::a_restart_loses_no_connect),
    since((5, 10), "a_new_layout_takes_over", restart::a_new_layout_takes_over),
    once("another_directory_takes_over", restart::another_directory_takes_over),
    once("lower_sizes_take_nothing_away", restart::lower_sizes_take_nothing_away),
    once("maps_that_hold_less_are_not_used", restart::maps_that_hold_less_are_not_used),
    once("other_sizes_take_over", restart::other_sizes_take_over),
    once("a_crash_in_the_middle_serves_on", restart::a_crash_in_the_middle_serves_on),
    once("half_written_pins_serve_on", restart::half_written_pins_serve_on),
    once("spoilt_maps_are_made_anew", restart::spoilt_maps_are_made_anew),
    since((5, 10), "unload_removes_everything", restart::unload_removes_everything),
    since((5, 10), "an_exclusive_program_is_named", obstacles::an_exclusive_program_is_named),
    once("an_exclusive_program_is_named_later", obstacles::an_exclusive_program_is_named_later),
    since((5, 10), "programs_that_share_are_no_obstacle", obstacles::programs_that_share_are_none),
    once("an_open_directory_is_closed", trust::an_open_directory_is_closed),
    since(
        (5, 10),
        "a_lock_of_another_user_is_no_daemons",
        trust::a_lock_of_another_user_is_no_daemons,
    ),
    once("a_lock_is_named", trust::a_lock_is_named),
    once(
        "a_symlink_of_another_user_is_moved_aside",
        trust::a_symlink_of_another_user_is_moved_aside,
    ),
    since(
        (5, 10),
        "a_directory_of_another_user_is_moved_aside",
        trust::a_directory_of_another_user_is_moved_aside,
    ),
    once("an_unsafe_place_is_refused", trust::what_isnt_safe_is_refused),
    since((5, 10), "a_rollback_over_links_of_every_kind", rollback::over_links_of_every_kind),
    since((5, 10), "an_unload_ends_links_of_every_kind", rollback::unload_ends_links_of_every_kind),
    since((5, 10), "an_unload_ends_what_it_can", rollback::unload_ends_what_it_can),
    since((5, 10), "a_rollback_over_another_storage", rollback::over_another_storage),
    once("foreign_directories_stay", rollback::foreign_directories_stay),
    once("two_daemons_are_one_too_many", pins::two_daemons_are_one_too_many),
    once("what_is_foreign_is_refused", pins::what_is_foreign_is_refused),
    once("a_later_layout_is_replaced", pins::a_later_layout_is_replaced),
    once("another_cgroup_is_left", pins::another_cgroup_is_left),
    once("a_wrong_cgroup_leaves_all", pins::a_wrong_cgroup_leaves_all),
    once("no_bpffs_is_an_error", pins::no_bpffs_is_an_error),
    since((5, 10), "lost_links_are_fixed", pins::lost_links_are_fixed),
    once("lost_pins_are_fixed", pins::lost_pins_are_fixed),
    since((5, 10), "a_lost_cgroup_is_fixed", pins::a_lost_cgroup_is_fixed),
    since((5, 10), "hooks_come_and_go_in_order", pins::hooks_come_and_go_in_order),
    once("the_heartbeat_is_readable", pins::the_heartbeat_is_readable),
    once("full_maps_refuse_by_service", soak::full_maps_refuse_by_service),
    once("a_soak_leaks_nothing", soak::a_soak_leaks_nothing),
    once("many_connects_meet_no_wrong_one", stress::many_connects_meet_no_wrong_one),
    locked_down("lockdown_lets_nohop_serve", lockdown::it_serves),
    locked_down("lockdown_is_reported", lockdown::it_is_reported),
    since((6, 1), "maps_are_charged_to_none", memcg::maps_are_charged_to_none),
    since((6, 1), "maps_of_names_are_charged_to_none", memcg::maps_of_names_are_charged_to_none),
    since((6, 1), "a_charge_is_reported", memcg::a_charge_is_reported),
    once("map_creator_ends_with_the_daemon", memcg::the_child_ends_with_the_daemon),
    once("an_optional_unit_fails_alone", units::an_optional_unit_fails_alone),
    once("a_required_unit_is_a_condition", units::a_required_unit_is_a_condition),
    once("a_unit_waits_for_its_first_table", units::a_unit_waits_for_its_first_table),
    since((5, 10), "in_flight_is_what_the_kernel_lists", in_flight::is_what_the_kernel_lists),
    since((5, 10), "in_flight_outlives_a_gap", in_flight::outlives_a_gap),
    since((5, 10), "in_flight_after_an_upgrade_and_a_rollback", in_flight::after_an_upgrade),
    since((5, 10), "in_flight_and_silence_after_a_gap", in_flight::silence_needs_the_unit),
    since((5, 10), "in_flight_after_new_generations", in_flight::after_new_generations),
    once("in_flight_finds_a_leak_under_load", in_flight::a_leak_is_found_under_load),
    since((5, 10), "in_flight_without_callbacks", in_flight::without_callbacks),
    since((5, 10), "in_flight_and_failures", in_flight::failures_are_the_backends),
    since((5, 10), "conns_follow_their_sockets", conns::a_record_follows_its_socket),
    since((5, 10), "conns_two_sockets_at_one_record", conns::two_sockets_at_one_record),
    since((5, 10), "conns_none_without_outcomes", conns::none_without_what_releases_them),
    once("conns_nothing_remains_after_a_storm", conns::nothing_remains_after_a_storm),
    since((5, 10), "ejection_by_a_refusal", ejection::a_refusal_ejects),
    since((5, 10), "ejection_by_silence_and_timeouts", ejection::silence_is_seen),
    since((5, 10), "ejection_by_clients_that_give_up", ejection::giving_up_shows_silence),
    since((5, 10), "ejection_trials_that_show_nothing", ejection::trials_that_show_nothing),
    since((5, 10), "ejection_without_type_information", ejection::without_type_information),
    since((5, 10), "retransmitted_syns_are_counted", ejection::retransmitted_syns_are_counted),
    since((5, 10), "ejection_by_resets", ejection::resets_eject_for_a_moment),
    once("ejection_ends_whatever_the_clock", ejection::no_clock_keeps_a_backend_out),
    once("ejection_outlives_a_restart", ejection::a_restart_keeps_ejections),
    once("ejection_events_that_are_lost", ejection::events_that_find_no_room_are_counted),
    since((5, 10), "ejection_beside_other_programs", ejection::another_program_in_the_hierarchy),
    since((5, 10), "intercept_every_way_to_ask", intercept::every_way_to_ask),
    since((5, 10), "intercept_while_the_daemon_answers", intercept::only_while_the_daemon_answers),
    since((5, 10), "intercept_leaves_alone", intercept::what_is_left_alone),
    since(
        (5, 10),
        "intercept_where_resolvers_are_found",
        intercept::only_where_resolvers_are_found,
    ),
    once("intercept_what_reaches_nohop", intercept::what_reaches_nohop),
    since((5, 10), "intercept_traced", intercept::traced),
    since((5, 10), "intercept_in_another_netns", intercept::in_another_network_namespace),
    since((5, 10), "verified_instructions_are_told", verifier::instructions_are_told),
    since((5, 10), "a_probe_needs_no_locked_memory", verifier::a_probe_needs_no_locked_memory),
];

/// Why the trial that runs can't be played here.
static SKIPPED: Mutex<Option<&'static str>> = Mutex::new(None);

/// Has the trial that calls this and returns counted as skipped, for the reason.
fn skip(reason: &'static str) {
    *SKIPPED.lock().unwrap() = Some(reason);
}

fn main() -> std::process::ExitCode {
    if let Some(address) = connector::hidden_command() {
        return connector::run(address);
    }
    if let Some((address, n_sockets)) = in_flight::hidden_command() {
        return in_flight::hold(address, n_sockets);
    }
    if let Some(code) =
        proof::hidden_command().or_else(trust::hidden_command).or_else(memcg::hidden_command)
    {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!(
            "kernel tests are skipped: they load eBPF programs, which needs root; run `cargo xtask test`"
        );
    }
    let kernel = running_kernel();
    let is_locked_down = lockdown::is_locked_down();
    let share = Share::of_this_kernel();
    let is_here = |(nth, trial): &(usize, &KernelTrial)| {
        (!trial.locked_down || is_locked_down)
            && (trial.on_each || !fixture::is_emulated())
            && share.has(*nth, trial.name)
    };
    let trials = TRIALS.iter().enumerate().filter(is_here).map(|(_, trial)| {
        Trial::ignorable_test(trial.name, move || {
            let (major, minor) = trial.min_kernel;
            if kernel < trial.min_kernel {
                return Ok(Completion::ignored_with(format!("needs kernel {major}.{minor}")));
            }
            (trial.run)();
            if let Some(reason) = SKIPPED.lock().unwrap().take() {
                return Ok(Completion::ignored_with(reason));
            }
            Ok(Completion::Completed)
        })
        .with_kind("kernel")
        .with_ignored_flag(!root)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// The part of the trials that this kernel has: where several kernels stand between others that have
/// all, they divide them among themselves.
struct Share {
    nth: usize,
    of: usize,
}

impl Share {
    /// By `NOHOP_SHARE`, such as `0/2`; else all.
    fn of_this_kernel() -> Share {
        let Ok(share) = std::env::var("NOHOP_SHARE") else { return Share { nth: 0, of: 1 } };
        let numbers = share.split_once('/').and_then(|(nth, of)| {
            Some(Share { nth: nth.parse().ok()?, of: of.parse().ok().filter(|&of| of > 0)? })
        });
        numbers.unwrap_or_else(|| panic!("NOHOP_SHARE is {share:?}, not like 0/2"))
    }

    /// Each kernel counts the verifier's instructions.
    fn has(&self, nth: usize, name: &str) -> bool {
        nth % self.of == self.nth || name == COUNTS_TRIAL
    }
}

/// The running kernel's version, of a release such as `6.1.0-41-cloud-amd64`.
pub fn running_kernel() -> Version {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => panic!("{release:?} is no kernel's release"),
    }
}
