//! What the daemon hears of dials: of a service that it doesn't follow at once and once, of the
//! others when it looks.

use std::net::SocketAddr;

use lb_userspace::datapath::Reports;
use lb_userspace::table::{Service, Watch};

use crate::fixture::{Bed, OTHER_VIP, Place, Server, VIP, VIP6, dial, loopback, service, table, ways};
use crate::families::{Use, dual, ha_cluster};

/// All that was reported since the last call.
fn heard(reports: &mut Reports) -> Vec<String> {
    std::iter::from_fn(|| reports.next_name()).map(|name| name.to_string()).collect()
}

fn watched(watch: Watch, service: &Service) -> Service {
    Service { watch, ..service.clone() }
}

/// By every hook that sends; the dials go where they would go anyway.
pub fn a_cold_service_is_reported_once() {
    let (ipv4, _ipv4) = servers(b'4', loopback(VIP));
    let (ipv6, _ipv6) = servers(b'6', loopback(VIP6));
    let web = dual("web", VIP, VIP6, &[ipv4.address, ipv6.address]);
    let mut bed = Bed::with_pool6();
    let mut reports = bed.plane.take_reports().unwrap();
    let [plain, mapped] = ways(VIP, 80);
    for address in [plain, mapped, SocketAddr::from((VIP6, 80))] {
        for how in Use::ALL {
            let what = format!("{how:?} to {address}");
            bed.apply(vec![watched(Watch::Live, &web)]);
            how.dial(address).expect(&what);
            assert!(heard(&mut reports).is_empty(), "{what}: it is live");

            bed.apply(vec![watched(Watch::Cold, &web)]);
            assert!(heard(&mut reports).is_empty(), "{what}: nobody dialled");
            for _ in 0..3 {
                how.dial(address).expect(&what);
            }
            assert_eq!(heard(&mut reports), ["web"], "{what}");

            // It stays cold, with other backends.
            let changed = dual("web", VIP, VIP6, &[ipv4.address, ipv6.address, ipv4.address]);
            bed.apply(vec![watched(Watch::Cold, &changed)]);
            how.dial(address).expect(&what);
            assert!(heard(&mut reports).is_empty(), "{what}: once");
        }
    }
}

/// A service without backends, and one that isn't cold beside it.
pub fn a_refused_dial_is_reported() {
    let mut bed = Bed::new();
    let mut reports = bed.plane.take_reports().unwrap();
    bed.apply(vec![
        watched(Watch::Cold, &service("web", VIP, &[])),
        service("other", OTHER_VIP, &[]),
    ]);
    for _ in 0..3 {
        dial((VIP, 80)).unwrap_err();
        dial((OTHER_VIP, 80)).unwrap_err();
    }
    assert_eq!(heard(&mut reports), ["web"]);
    let counters = bed.plane.counters();
    for name in ["web", "other"] {
        assert_eq!(counters.service(bed.plane.indices(name).unwrap().service).refused, 3, "{name}");
    }
}

/// What was reported to an earlier daemon is reported to the next.
pub fn a_restart_asks_anew() {
    let server = Server::start(b'a');
    let web = watched(Watch::Cold, &service("web", VIP, &[(server.address, 1)]));
    let place = Place::new();
    let mut plane = place.start();
    let mut reports = plane.take_reports().unwrap();
    plane.apply(&table(vec![web.clone()])).unwrap();
    dial((VIP, 80)).unwrap();
    assert_eq!(heard(&mut reports), ["web"]);
    drop((plane, reports));
    // Nobody hears it.
    dial((VIP, 80)).unwrap();

    let mut plane = place.start();
    assert!(plane.is_adopted());
    let mut reports = plane.take_reports().unwrap();
    dial((VIP, 80)).unwrap();
    assert!(heard(&mut reports).is_empty(), "before the first table nothing is known of it");
    plane.apply(&table(vec![web])).unwrap();
    assert_eq!(dial((VIP, 80)).unwrap(), 'a');
    assert_eq!(heard(&mut reports), ["web"]);
}

/// By the counters, whether dials were sent or refused.
pub fn usage_is_told() {
    let server = Server::start(b'a');
    let services = || {
        let web = service("web", VIP, &[(server.address, 1)]);
        vec![web, service("empty", OTHER_VIP, &[])]
    };
    let place = Place::new();
    let mut plane = place.start();
    plane.apply(&table(services())).unwrap();
    assert!(plane.dialled_since_last().is_empty());
    dial((VIP, 80)).unwrap();
    assert_eq!(plane.dialled_since_last(), ["web".into()]);
    assert!(plane.dialled_since_last().is_empty(), "not since");
    dial((OTHER_VIP, 80)).unwrap_err();
    assert_eq!(plane.dialled_since_last(), ["empty".into()]);
    plane.set_shadow(true);
    dial((VIP, 80)).unwrap_err();
    plane.set_shadow(false);
    assert_eq!(plane.dialled_since_last(), ["web".into()], "only counted");

    // A service that goes and comes begins at nothing.
    plane.apply(&table(vec![])).unwrap();
    assert!(plane.dialled_since_last().is_empty());
    plane.apply(&table(services())).unwrap();
    assert!(plane.dialled_since_last().is_empty());
    dial((VIP, 80)).unwrap();

    // What was counted for an earlier daemon is no news to the next.
    drop(plane);
    let mut plane = place.start();
    assert!(plane.is_adopted() && plane.dialled_since_last().is_empty());
    dial((VIP, 80)).unwrap();
    assert_eq!(plane.dialled_since_last(), ["web".into()]);
}
