//! The index of frontends: it leads where `FRONTENDS` leads, whichever version wrote that, and while it changes.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use aya::maps::{HashMap, Map, MapData};
use lb_common::{Frontend, INDEX_WAYS, IPPROTO_TCP, IndexKey};
use lb_userspace::table::Service;

use crate::fixture::{End, OTHER_VIP, Place, Server, VIP, connect, service, table, ways};

/// A key of `FRONTENDS`, and a service with a zero behind it.
type Frontends = HashMap<MapData, [u8; 8], u64>;

fn key(vip: Ipv4Addr) -> [u8; 8] {
    zerocopy::transmute!(frontend(vip))
}

fn frontend(vip: Ipv4Addr) -> Frontend {
    Frontend { address: vip.octets(), port: 80, protocol: IPPROTO_TCP, padding: 0 }
}

/// Another version of this layout, which has no index, moves frontends while ours doesn't run.
pub fn follows_what_another_version_changed() {
    let (web, api) = (Server::start(b'w'), Server::start(b'a'));
    let place = Place::new();
    let services = || {
        vec![
            service("web", VIP, &[(web.address, 1)]),
            service("api", OTHER_VIP, &[(api.address, 1)]),
        ]
    };
    let letters = || [VIP, OTHER_VIP].map(|vip| connect((vip, 80)).unwrap());
    let mut datapath = place.start_attached();
    datapath.apply(&table(services())).unwrap();
    assert_eq!(letters(), ['w', 'a']);
    drop(datapath);

    let pin = MapData::from_pin(place.pin("v3/maps/FRONTENDS")).unwrap();
    let mut frontends: Frontends = Map::from_map_data(pin).unwrap().try_into().unwrap();
    let [one, other] = [VIP, OTHER_VIP].map(|vip| frontends.get(&key(vip), 0).unwrap());
    frontends.insert(key(VIP), other, 0).unwrap();
    frontends.insert(key(OTHER_VIP), one, 0).unwrap();
    let mut datapath = place.start_attached();
    assert_eq!(letters(), ['a', 'w'], "as the table has it now");
    // What isn't in the table any more is found by the index, if it is in that.
    [VIP, OTHER_VIP].iter().for_each(|vip| frontends.remove(&key(*vip)).unwrap());
    assert_eq!(letters(), ['a', 'w'], "by the index");
    frontends.insert(key(VIP), other, 0).unwrap();
    frontends.insert(key(OTHER_VIP), one, 0).unwrap();
    datapath.apply(&table(services())).unwrap();
    assert_eq!(letters(), ['w', 'a']);
    datapath.apply(&table(vec![])).unwrap();
    for vip in [VIP, OTHER_VIP] {
        let refused = connect((vip, 80)).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    datapath.detach();
}

/// So many VIPs whose frontends share a bucket, more than it has room for.
const N_VIPS: usize = INDEX_WAYS + 2;

/// Which of its two services a VIP has in a table, if any.
fn variant(generation: u64, vip_idx: usize) -> Option<usize> {
    let mixed =
        (generation * N_VIPS as u64 + vip_idx as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [Some(0), Some(1), None][(mixed >> 33) as usize % 3]
}

/// Tables come and go, in each of which VIPs of one bucket appear, vanish and move to another service, while
/// connections are made to all of them.
pub fn no_connect_meets_the_service_of_another_vip() {
    let n_tables = 200;
    let bucket = |vip: &Ipv4Addr| IndexKey::of(&frontend(*vip)).bucket;
    let all = (0..).map(|n| Ipv4Addr::from(u32::from(VIP) + n));
    let vips: Vec<Ipv4Addr> = all.filter(|vip| bucket(vip) == bucket(&VIP)).take(N_VIPS).collect();
    let servers: Vec<Server> = (b'A'..).take(2 * N_VIPS).map(Server::start).collect();
    // Letters, by the VIP and the variant.
    let letter_of =
        |vip_idx: usize, variant: usize| char::from(b'A' + (2 * vip_idx + variant) as u8);
    let services = |generation: u64| -> Vec<Service> {
        let at = |vip_idx: usize| {
            let variant = variant(generation, vip_idx)?;
            let backends = [(servers[2 * vip_idx + variant].address, 1)];
            Some(service(&format!("web-{vip_idx}-{variant}"), vips[vip_idx], &backends))
        };
        (0..N_VIPS).filter_map(at).collect()
    };
    let mut place = Place::new();
    // So few that indices are soon another service's.
    (place.options.datapath.max_services, place.options.datapath.max_backends) = (16, 64);
    let mut datapath = place.start();
    datapath.apply(&table(services(0))).unwrap();
    let (begun, finished) = (AtomicU64::new(0), AtomicU64::new(0));
    let (n_done, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let connect_all = || {
        let mut met = BTreeSet::new();
        while !is_over.load(Ordering::SeqCst) {
            for (vip_idx, &vip) in vips.iter().enumerate() {
                let first = finished.load(Ordering::SeqCst);
                let [way, mapped_way] = ways(vip, 80);
                let is_mapped = n_done.fetch_add(1, Ordering::SeqCst).is_multiple_of(2);
                let result = connect(if is_mapped { mapped_way } else { way });
                let window = first..=begun.load(Ordering::SeqCst);
                let variants: BTreeSet<_> =
                    window.clone().map(|generation| variant(generation, vip_idx)).collect();
                let is_right = match &result {
                    Ok(letter) => variants
                        .iter()
                        .flatten()
                        .any(|&variant| letter_of(vip_idx, variant) == *letter),
                    // A service that goes is empty before its frontends are gone.
                    Err(error) => {
                        error.kind() == ErrorKind::ConnectionRefused
                            && (variants.contains(&None) || variants.len() > 1)
                    }
                };
                assert!(is_right, "{vip} led to {result:?} in tables {window:?}: {variants:?}");
                met.extend(result.ok());
            }
        }
        met
    };
    std::thread::scope(|scope| {
        let clients = [(); 2].map(|()| scope.spawn(connect_all));
        let end = End(&is_over);
        for generation in 1..=n_tables {
            begun.store(generation, Ordering::SeqCst);
            let errors = datapath.apply(&table(services(generation))).unwrap();
            assert!(errors.is_empty(), "{errors:?}");
            finished.store(generation, Ordering::SeqCst);
            // Connections in each table, and in each change.
            let n_before = n_done.load(Ordering::SeqCst);
            let is_waiting = || n_done.load(Ordering::SeqCst) < n_before + 2 * N_VIPS as u64;
            while is_waiting() && !clients.iter().any(|client| client.is_finished()) {
                std::thread::yield_now();
            }
        }
        drop(end);
        let met = clients.map(|client| client.join().unwrap());
        assert_eq!(met.iter().flatten().collect::<BTreeSet<_>>().len(), 2 * N_VIPS);
    });
    datapath.detach();
}
