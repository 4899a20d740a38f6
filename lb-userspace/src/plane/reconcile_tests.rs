//! The reconciler against maps that play the kernel: after every single step they let readers look,
//! fresh ones and ones that are half-way, and check what each would dial.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use lb_common::{Service as ServiceEntry, Slot};
use proptest::prelude::*;

use super::*;
use crate::plane::Sizes;
use crate::table::{Backend as TableBackend, Protocols};

/// Service `s` has the frontend 127.128.0.s:80 and backends 10.s.x.1:80, so that an address tells
/// whose it is.
fn service(s: u8, backends: &BTreeSet<u8>, generation: u64) -> Arc<Service> {
    let backend = |&x: &u8| TableBackend {
        address: Some(SocketAddr::new(Ipv4Addr::new(10, s, x, 1).into(), 80)),
        shown_address: String::new(),
        node: String::new(),
        id: String::new(),
        weight: u16::from(x) + 1,
        state: State::Healthy,
        reason: None,
        host_only: x % 5 == 4,
    };
    Arc::new(Service {
        name: format!("s{s}").into(),
        vip: Ipv4Addr::new(127, 128, 0, s),
        vip6: None,
        ports: Ports::only([80]),
        protocols: Protocols::Tcp,
        pin: None,
        backends: backends.iter().map(backend).collect(),
        excluded: Vec::new(),
        notes: Vec::new(),
        generation,
    })
}

#[derive(Default)]
struct Model {
    frontends: HashMap<Frontend, Target>,
    services: HashMap<u32, ServiceEntry>,
    slots: HashMap<u32, Slot>,
    backends: HashMap<u32, Backend>,
    /// Readers that stopped after finding a target, or a region, with the service they are about.
    at_target: Vec<(u8, Target)>,
    at_region: Vec<(u8, Region)>,
    /// What each service may show, set by the test before it applies a table: its backends before
    /// and after, for dials from the host and from elsewhere.
    allowed: HashMap<u8, [[BTreeSet<u8>; 2]; 2]>,
    n_waits: usize,
    /// Fail the next insertion of a frontend.
    fail: bool,
}

impl Model {
    /// All that a dial through `region` can reach; each has to be a backend of service `s`.
    fn reach(&self, s: u8, region: Region) -> BTreeSet<u8> {
        let slots = region.first_slot..region.first_slot + region.n_slots;
        slots
            .flat_map(|slot_idx| {
                let slot = self.slots[&slot_idx];
                let alias = self.slots[&(region.first_slot + u32::from(slot.alias))];
                [slot.backend, alias.backend]
            })
            .map(|backend_idx| {
                let [_, owner, x, _] = self.backends[&backend_idx].address;
                assert_eq!(owner, s, "a dial to s{s} reached s{owner}");
                x
            })
            .collect()
    }

    fn look(&mut self) {
        for &(s, target) in &self.at_target {
            let entry = self.services[&target.service];
            self.reach(s, entry.host);
            self.reach(s, entry.elsewhere);
        }
        for &(s, region) in &self.at_region {
            self.reach(s, region);
        }
        for (frontend, &target) in &self.frontends {
            let s = frontend.address[3];
            let entry = self.services[&target.service];
            for (scope, region) in [entry.host, entry.elsewhere].into_iter().enumerate() {
                let reached = self.reach(s, region);
                let allowed = &self.allowed[&s];
                assert!(
                    reached == allowed[0][scope] || reached == allowed[1][scope],
                    "s{s} shows {reached:?}, which is neither of {allowed:?}"
                );
                self.at_region.push((s, region));
            }
            self.at_target.push((s, target));
        }
        // Enough half-way readers to catch an early reuse, few enough to stay quick.
        let n_targets = self.at_target.len();
        self.at_target.drain(..n_targets.saturating_sub(60));
        let n_regions = self.at_region.len();
        self.at_region.drain(..n_regions.saturating_sub(60));
    }
}

#[derive(Clone, Default)]
struct FakeMaps(Rc<RefCell<Model>>);

impl FakeMaps {
    fn step<R>(&self, change: impl FnOnce(&mut Model) -> R) -> R {
        let mut model = self.0.borrow_mut();
        let result = change(&mut model);
        model.look();
        result
    }
}

impl Maps for FakeMaps {
    fn insert_frontend(&mut self, frontend: Frontend, target: Target) -> io::Result<()> {
        self.step(|model| {
            if std::mem::take(&mut model.fail) {
                return Err(io::Error::from_raw_os_error(libc::ENOMEM));
            }
            model.frontends.insert(frontend, target);
            Ok(())
        })
    }

    fn remove_frontend(&mut self, frontend: &Frontend) -> io::Result<()> {
        self.step(|model| {
            model.frontends.remove(frontend);
            Ok(())
        })
    }

    fn write_backend(&mut self, backend_idx: u32, backend: Backend) {
        self.step(|model| model.backends.insert(backend_idx, backend));
    }

    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]) {
        for (slot_idx, &slot) in (first_slot..).zip(slots) {
            self.step(|model| model.slots.insert(slot_idx, slot));
        }
    }

    fn reset_service(&mut self, _service_idx: u32) {}

    fn publish(&mut self, service_idx: u32, service: ServiceEntry) {
        self.step(|model| model.services.insert(service_idx, service));
    }

    fn wait_for_readers(&mut self) {
        let mut model = self.0.borrow_mut();
        model.n_waits += 1;
        model.at_target.clear();
        model.at_region.clear();
    }
}

const SIZES: Sizes = Sizes { services: 5, frontends: 5, slots: 4096, backends: 24 };

struct Run {
    maps: FakeMaps,
    reconciler: Reconciler<FakeMaps>,
    table: Table,
}

impl Run {
    fn new(sizes: Sizes) -> Run {
        let maps = FakeMaps::default();
        let reconciler = Reconciler::new(maps.clone(), &sizes);
        Run { maps, reconciler, table: Table::default() }
    }

    /// Changes one service (`None`: removes it) and applies.
    fn change(&mut self, s: u8, backends: Option<&BTreeSet<u8>>) -> BTreeMap<Arc<str>, ApplyError> {
        self.table.generation += 1;
        let name: Arc<str> = format!("s{s}").into();
        let visible = |set: &BTreeSet<u8>| {
            [set.clone(), set.iter().copied().filter(|x| x % 5 != 4).collect::<BTreeSet<_>>()]
        };
        let after = visible(backends.unwrap_or(&BTreeSet::new()));
        {
            let mut model = self.maps.0.borrow_mut();
            let allowed = model.allowed.entry(s).or_default();
            allowed[0] = std::mem::replace(&mut allowed[1], after);
        }
        match backends {
            Some(backends) => {
                let service = service(s, backends, self.table.generation);
                self.table.services.insert(name, service);
            }
            None => drop(self.table.services.remove(&name)),
        }
        self.reconciler.apply(&self.table)
    }
}

fn set(xs: &[u8]) -> BTreeSet<u8> {
    xs.iter().copied().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn readers_never_see_a_mix(
        changes in prop::collection::vec(
            (0..5u8, prop::option::weighted(0.8, prop::collection::btree_set(0..12u8, 0..4))),
            1..120
        )
    ) {
        let mut run = Run::new(SIZES);
        for (s, backends) in changes {
            let errors = run.change(s, backends.as_ref());
            prop_assert!(errors.is_empty(), "{errors:?}");
            // A second application of the same table changes nothing.
            let n_waits = run.maps.0.borrow().n_waits;
            prop_assert!(run.reconciler.apply(&run.table).is_empty());
            prop_assert_eq!(run.maps.0.borrow().n_waits, n_waits);
        }
        // Removing all and recycling leaves nothing in use.
        for s in 0..5 {
            run.change(s, None);
        }
        run.reconciler.recycle();
        for (map, pressure) in run.reconciler.pressure() {
            prop_assert_eq!(pressure.used, 0, "{}", map);
        }
    }
}

#[test]
fn ordinary_changes_wait_for_nobody() {
    let mut run = Run::new(Sizes { slots: 1 << 16, backends: 4096, ..SIZES });
    run.change(1, Some(&set(&[0, 1])));
    for x in 2..50 {
        run.change(1, Some(&set(&[x - 1, x])));
    }
    run.change(1, None);
    assert_eq!(run.maps.0.borrow().n_waits, 0);
    // The kernel recycles deleted elements at once, so the next insertion has to wait.
    run.change(2, Some(&set(&[0])));
    assert_eq!(run.maps.0.borrow().n_waits, 1);
}

#[test]
fn a_full_map_is_one_services_error_and_the_former_state_serves() {
    let mut run = Run::new(Sizes { backends: 3, ..SIZES });
    assert!(run.change(1, Some(&set(&[0, 1]))).is_empty());
    let before = run.maps.0.borrow().services.clone();
    let errors = run.change(1, Some(&set(&[0, 1, 2, 3])));
    assert_eq!(
        errors["s1"].to_string(),
        "BACKENDS is full (3 entries): raise plane.max_backends in the configuration and restart"
    );
    assert_eq!(run.maps.0.borrow().services, before);
    let names = |errors: BTreeMap<Arc<str>, ApplyError>| errors.into_keys().collect::<Vec<_>>();
    assert_eq!(names(run.change(2, Some(&set(&[0])))), [Arc::from("s1")], "only s1 is at fault");
    assert!(run.change(2, None).contains_key("s1"));
    // `allowed` knows only the last two states; the one that serves is older.
    run.maps.0.borrow_mut().allowed.entry(1).or_default()[1] = [set(&[0, 1]), set(&[0, 1])];
    assert!(run.change(1, Some(&set(&[5]))).is_empty(), "room enough once the old ones are gone");
}

#[test]
fn what_the_kernel_refuses_is_tried_again() {
    let mut run = Run::new(SIZES);
    run.maps.0.borrow_mut().fail = true;
    let errors = run.change(1, Some(&set(&[0])));
    assert!(errors["s1"].to_string().contains("127.128.0.1:80"), "{errors:?}");
    assert!(run.reconciler.apply(&run.table).is_empty());
    assert_eq!(run.maps.0.borrow().frontends.len(), 1);
}

#[test]
fn too_many_backends_are_refused_by_number() {
    let mut run = Run::new(Sizes { backends: 10_000, slots: 16_384, ..SIZES });
    let all: BTreeSet<u8> = (0..=255).collect();
    let one = service(1, &all, 1);
    let mut many = Service::clone(&one);
    many.backends = one.backends.iter().cycle().take(4097).cloned().collect();
    run.table.services.insert("s1".into(), Arc::new(many));
    let errors = run.reconciler.apply(&run.table);
    assert_eq!(errors["s1"].to_string(), "it has 4097 healthy backends; a service can have 4096");
}
