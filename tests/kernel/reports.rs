//! The daemon's knowledge of connections: an event for a cold service, at once and once, counters for the
//! others.

use std::net::SocketAddr;

use lb_userspace::datapath::{Report, Reports};
use lb_userspace::table::{Service, Watch};

use crate::families::{Use, dual, servers};
use crate::fixture::{
    Bed, OTHER_VIP, Place, Server, VIP, VIP6, connect, loopback, service, table, ways,
};

/// The services that were reported as connected to since the last call.
fn events(reports: &mut Reports) -> Vec<String> {
    let reports = std::iter::from_fn(|| reports.next_report());
    let name = |report| match report {
        Report::Connected(name) => Some(name.to_string()),
        Report::Ejection { .. } => None,
    };
    reports.filter_map(name).collect()
}

fn watched(watch: Watch, service: &Service) -> Service {
    Service { watch, ..service.clone() }
}

/// By every hook that sends; the connections go where they would go anyway.
pub fn a_cold_service_is_reported_once() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let web = dual("web", VIP, VIP6, &[ipv4.address, ipv6.address]);
    let mut bed = Bed::with_pool6();
    let mut reports = bed.datapath.take_reports().unwrap();
    let [plain, mapped] = ways(VIP, 80);
    for address in [plain, mapped, SocketAddr::from((VIP6, 80))] {
        for how in Use::ALL {
            let what = format!("{how:?} to {address}");
            bed.apply(vec![watched(Watch::Live, &web)]);
            how.connect(address).expect(&what);
            assert!(events(&mut reports).is_empty(), "{what}: it is live");

            bed.apply(vec![watched(Watch::Cold, &web)]);
            assert!(events(&mut reports).is_empty(), "{what}: no connection");
            for _ in 0..3 {
                how.connect(address).expect(&what);
            }
            assert_eq!(events(&mut reports), ["web"], "{what}");

            // It stays cold, with other backends.
            let changed = dual("web", VIP, VIP6, &[ipv4.address, ipv6.address, ipv4.address]);
            bed.apply(vec![watched(Watch::Cold, &changed)]);
            how.connect(address).expect(&what);
            assert!(events(&mut reports).is_empty(), "{what}: once");
        }
    }
}

/// A service without backends, and another one that isn't cold.
pub fn a_refused_connect_is_reported() {
    let mut bed = Bed::new();
    let mut reports = bed.datapath.take_reports().unwrap();
    bed.apply(vec![
        watched(Watch::Cold, &service("web", VIP, &[])),
        service("other", OTHER_VIP, &[]),
    ]);
    for _ in 0..3 {
        connect((VIP, 80)).unwrap_err();
        connect((OTHER_VIP, 80)).unwrap_err();
    }
    assert_eq!(events(&mut reports), ["web"]);
    let counters = bed.datapath.counters();
    for name in ["web", "other"] {
        assert_eq!(
            counters.service(bed.datapath.indices(name).unwrap().service).refused,
            3,
            "{name}"
        );
    }
}

/// A service reported to an earlier daemon is reported to the next.
pub fn a_restart_asks_anew() {
    let server = Server::start(b'a');
    let web = watched(Watch::Cold, &service("web", VIP, &[(server.address, 1)]));
    let place = Place::new();
    let mut datapath = place.start();
    let mut reports = datapath.take_reports().unwrap();
    datapath.apply(&table(vec![web.clone()])).unwrap();
    connect((VIP, 80)).unwrap();
    assert_eq!(events(&mut reports), ["web"]);
    drop((datapath, reports));
    // No daemon reads it.
    connect((VIP, 80)).unwrap();

    let mut datapath = place.start();
    assert!(datapath.is_adopted());
    let mut reports = datapath.take_reports().unwrap();
    connect((VIP, 80)).unwrap();
    assert!(events(&mut reports).is_empty(), "before the first table nothing is known of it");
    datapath.apply(&table(vec![web])).unwrap();
    assert_eq!(connect((VIP, 80)).unwrap(), 'a');
    assert_eq!(events(&mut reports), ["web"]);
}

/// By the counters, whether connections were sent or refused.
pub fn usage_is_told() {
    let server = Server::start(b'a');
    let services = || {
        let web = service("web", VIP, &[(server.address, 1)]);
        vec![web, service("empty", OTHER_VIP, &[])]
    };
    let place = Place::new();
    let mut datapath = place.start();
    datapath.apply(&table(services())).unwrap();
    assert!(datapath.active_since_last().is_empty());
    connect((VIP, 80)).unwrap();
    assert_eq!(datapath.active_since_last(), ["web".into()]);
    assert!(datapath.active_since_last().is_empty(), "not since");
    connect((OTHER_VIP, 80)).unwrap_err();
    assert_eq!(datapath.active_since_last(), ["empty".into()]);
    datapath.set_shadow(true);
    connect((VIP, 80)).unwrap_err();
    datapath.set_shadow(false);
    assert_eq!(datapath.active_since_last(), ["web".into()], "only counted");

    // A service that goes and comes begins at nothing.
    datapath.apply(&table(vec![])).unwrap();
    assert!(datapath.active_since_last().is_empty());
    datapath.apply(&table(services())).unwrap();
    assert!(datapath.active_since_last().is_empty());
    connect((VIP, 80)).unwrap();

    // Counters read by an earlier daemon aren't news to the next.
    drop(datapath);
    let mut datapath = place.start();
    assert!(datapath.is_adopted() && datapath.active_since_last().is_empty());
    connect((VIP, 80)).unwrap();
    assert_eq!(datapath.active_since_last(), ["web".into()]);
}
