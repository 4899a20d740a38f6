//! The reconciler against maps that play the kernel: after every single step they let readers look,
//! fresh ones and ones that are half-way, and check what each would connect to.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::rc::Rc;

use lb_common::{N_GROUPS, Slot, SlotRange, maglev_slots};
use proptest::prelude::*;

use super::*;
use crate::datapath::map_specs::Sizes;
use crate::table::{Backend as TableBackend, BackendState, Protocols};

const NOW_MS: u32 = 1_000_000;

/// The address of backend `x` of service `s`: it tells whose it is. Some have IPv6 ones.
fn address(s: u8, x: u8) -> SocketAddr {
    let ip = match x % 4 {
        3 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, s.into(), x.into()).into(),
        _ => Ipv4Addr::new(10, 0, s, x).into(),
    };
    SocketAddr::new(ip, 80)
}

/// Whose backend has this address, and which it is.
fn identity(address: &Address) -> (u8, u8) {
    match address.to_v4() {
        Some([_, _, owner, x]) => (owner, x),
        None => (address.octets[13], address.octets[15]),
    }
}

fn is_host_only(x: u8) -> bool {
    x % 5 == 4
}

/// Service `s` has the VIP 127.128.0.s.
fn service(s: u8, backends: &BTreeSet<u8>, generation: u64) -> Arc<Service> {
    let backend = |&x: &u8| TableBackend {
        address: Some(address(s, x)),
        shown_address: String::new(),
        node: String::new(),
        id: String::new(),
        weight: u16::from(x) + 1,
        state: BackendState::Healthy,
        group: 0,
        reason: None,
        host_only: is_host_only(x),
    };
    Arc::new(Service {
        name: format!("s{s}").into(),
        vip: Ipv4Addr::new(127, 128, 0, s),
        vip6: s.is_multiple_of(2).then(|| Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, s.into())),
        ports: if s == 3 { Ports::Any } else { Ports::only([80]) },
        algorithm: Default::default(),
        protocols: if s == 4 { Protocols::Both } else { Protocols::Tcp },
        pin: None,
        public: Vec::new(),
        backends: backends.iter().map(backend).collect(),
        excluded: Vec::new(),
        notes: Vec::new(),
        watch: Default::default(),
        generation,
    })
}

/// What each of a service's ranges leads to, in their order.
type Visible = [BTreeSet<u8>; ServiceRanges::N];

/// With all of these backends in the first group.
fn visible(backends: &BTreeSet<u8>) -> Visible {
    visible_places(&backends.iter().map(|&x| (x, 0)).collect())
}

/// Backends, each with its group, or [`N_GROUPS`] for one that is drained.
type Places = BTreeMap<u8, usize>;

fn visible_places(places: &Places) -> Visible {
    let of = |place: usize| places.iter().filter(move |it| *it.1 == place).map(|it| *it.0);
    let mut visible: Visible = Default::default();
    let groups = (0..N_GROUPS).filter(|&group| of(group).next().is_some());
    for (group, place) in groups.enumerate() {
        let set = |from_host: bool, reach: fn(u8) -> bool| {
            let fits = |x: &u8| (from_host || !is_host_only(*x)) && reach(*x);
            of(place).filter(fits).collect()
        };
        let [ipv4, ipv6, all]: [fn(u8) -> bool; 3] = [|x| x % 4 != 3, |x| x % 4 == 3, |_| true];
        let kinds = [true, false].into_iter().flat_map(|from_host| {
            [ipv4, ipv6, all].into_iter().map(move |reach| set(from_host, reach))
        });
        let at = group * Group::N_RANGES;
        visible[at..].iter_mut().zip(kinds).for_each(|(to, reached)| *to = reached);
    }
    visible[ServiceRanges::N - 1] = of(N_GROUPS).collect();
    visible
}

/// The positions of the ranges that a kind of connection looks at, in order.
fn nths(kind: usize) -> impl Iterator<Item = usize> {
    (kind..ServiceRanges::N - 1).step_by(Group::N_RANGES)
}

#[derive(Default)]
struct Model {
    frontends: HashMap<FrontendKey, ServiceRef>,
    services: HashMap<u32, ServiceRanges>,
    flags: HashMap<u32, ServiceFlags>,
    /// When each backend began to ramp up.
    added_ms: HashMap<u32, u32>,
    names: HashMap<u32, ServiceName>,
    slots: HashMap<u32, Slot>,
    backends: HashMap<u32, Backend>,
    /// Readers that stopped after finding a target, or a region, with the service they are about.
    at_target: Vec<(FrontendKey, u8, ServiceRef)>,
    at_region: Vec<(u8, u32, SlotRange)>,
    /// Readers that stopped after reading a service's algorithm.
    at_algorithm: BTreeSet<(u32, u32)>,
    /// Readers of this table that found so many groups of a service without a backend for their kind.
    past_groups: BTreeSet<(u8, u32, usize, usize)>,
    /// What sockets remember of datagrams: the frontend, the index and generation of the backend, and
    /// whose backend that was.
    flows: BTreeSet<(FrontendKey, u32, u32, u8)>,
    /// What each service may show, set by the test before it applies a table: before and after.
    allowed: HashMap<u8, [Visible; 2]>,
    /// What was said of awaited connections, in order.
    awaited: Vec<(u32, bool)>,
    n_waits: usize,
    n_steps: usize,
    /// No reader looks: the test is about something else.
    is_blind: bool,
    /// The operations that fail, of those that the kernel may refuse, numbered from the next one on.
    fails: BTreeSet<usize>,
    n_fallible: usize,
    /// The number of steps until the daemon is killed: it does nothing any more.
    lives_for: Option<usize>,
}

impl Model {
    /// Whether the kernel refuses the operation that comes now.
    fn refuses(&mut self) -> bool {
        self.n_fallible += 1;
        self.fails.contains(&(self.n_fallible - 1))
    }

    /// Has these of the operations from now on fail, and no others.
    fn refuse(&mut self, fails: impl IntoIterator<Item = usize>) {
        self.n_fallible = 0;
        self.fails = fails.into_iter().collect();
    }

    /// What a socket may remember that sent to `frontend` while that led to `target`.
    fn remember(&mut self, frontend: FrontendKey, target: ServiceRef) {
        if frontend.protocol != IPPROTO_UDP {
            return;
        }
        for region in self.ranges(target.service).all() {
            for slot_idx in region.first_slot..region.first_slot + region.n_slots {
                let backend_idx = self.slots[&slot_idx].backend;
                let backend = self.backends[&backend_idx];
                let (owner, _) = identity(&backend.address);
                if backend.generation != 0 {
                    self.flows.insert((frontend, backend_idx, backend.generation, owner));
                }
            }
        }
    }

    /// Every socket that follows what it remembers goes where the frontend leads to now.
    fn check_flows(&self) {
        for &(frontend, backend_idx, generation, owner) in &self.flows {
            let backend = self.backends[&backend_idx];
            if backend.generation != generation {
                continue;
            }
            let target = self.frontends.get(&frontend);
            let target = target.unwrap_or_else(|| panic!("{frontend:?} is gone, yet followed"));
            let regions = self.ranges(target.service).all();
            let (of, x) = identity(&backend.address);
            assert_eq!(of, owner, "{backend_idx} is another service's now");
            let is_reached = regions.iter().any(|&region| self.reach(of, region).contains(&x));
            assert!(is_reached, "what was sent to {frontend:?} goes on to a backend of s{of}");
        }
    }

    /// All that a connection through `region` can reach; each has to be a backend of service `s`.
    fn reach(&self, s: u8, region: SlotRange) -> BTreeSet<u8> {
        let slots = region.first_slot..region.first_slot + region.n_slots;
        slots
            .flat_map(|slot_idx| {
                let slot = self.slots[&slot_idx];
                let alias = self.slots[&(region.first_slot + u32::from(slot.alias))];
                [slot.backend, alias.backend]
            })
            .map(|backend_idx| {
                let (owner, x) = identity(&self.backends[&backend_idx].address);
                assert_eq!(owner, s, "a connection to s{s} reached s{owner}");
                x
            })
            .collect()
    }

    fn ranges(&self, service_idx: u32) -> ServiceRanges {
        self.services.get(&service_idx).copied().unwrap_or_default()
    }

    fn flags(&self, service_idx: u32) -> ServiceFlags {
        self.flags.get(&service_idx).copied().unwrap_or_default()
    }

    /// A reader by this algorithm finds what it needs of a range.
    fn check_table(&self, region: SlotRange, algorithm: u32, n_samples: usize) {
        let n_slots = maglev_slots(region.n_slots);
        if algorithm != Algorithm::Maglev as u32 || n_slots == 0 {
            return;
        }
        let first_slot = region.first_slot + region.n_slots;
        let table = (first_slot..first_slot + n_slots).step_by(n_slots as usize / n_samples);
        for slot_idx in table {
            let slot = self.slots.get(&slot_idx).copied();
            let is_of_table = slot.is_some_and(|slot| slots::is_of_table(slot, region.n_slots));
            assert!(is_of_table, "slot {slot_idx} of the table of {region:?} is {slot:?}");
        }
    }

    /// Readers look for a group with a backend: none of them finds nothing where there is always one.
    fn look_through_groups(&mut self) {
        let at_first =
            self.frontends.iter().filter_map(|(frontend, target)| match frontend.address {
                IpAddr::V4(vip) if vip.octets()[1] == 128 => {
                    Some((vip.octets()[3], target.service))
                }
                _ => None,
            });
        let at_first = at_first.flat_map(|(s, service_idx)| {
            (0..Group::N_RANGES).map(move |kind| (s, service_idx, kind, 0))
        });
        let mut looking: Vec<_> = at_first.chain(self.past_groups.iter().copied()).collect();
        while let Some((s, service_idx, kind, n_groups)) = looking.pop() {
            let Some(nth) = nths(kind).nth(n_groups) else {
                let has_none = |visible: &Visible| nths(kind).all(|nth| visible[nth].is_empty());
                let is_right = self.allowed[&s].iter().any(has_none);
                assert!(is_right, "a connection of kind {kind} to s{s} found nothing");
                continue;
            };
            if self.ranges(service_idx).all()[nth].n_slots == 0 {
                let next = (s, service_idx, kind, n_groups + 1);
                self.past_groups.insert(next);
                looking.push(next);
            }
        }
    }

    fn look(&mut self) {
        self.look_through_groups();
        for (frontend, s, target) in self.at_target.clone() {
            for region in self.ranges(target.service).all() {
                self.reach(s, region);
            }
            self.remember(frontend, target);
        }
        for &(s, service_idx, region) in &self.at_region {
            self.reach(s, region);
            self.check_table(region, self.flags(service_idx).algorithm, 4);
        }
        for &(service_idx, algorithm) in &self.at_algorithm {
            let [selected @ .., _] = self.ranges(service_idx).all();
            selected.into_iter().for_each(|region| self.check_table(region, algorithm, 4));
        }
        for (frontend, target) in self.frontends.clone() {
            self.remember(frontend, target);
            let s = match frontend.address {
                // A pin, which isn't of the services' pools.
                IpAddr::V4(pin) if pin.octets()[1] != 128 => {
                    let octets = self.names[&target.service].octets;
                    self.at_target.push((frontend, octets[1] - b'0', target));
                    continue;
                }
                IpAddr::V4(vip) => vip.octets()[3],
                IpAddr::V6(vip) => vip.octets()[15],
            };
            let allowed = self.allowed[&s].clone();
            let n_selected = ServiceRanges::N - 1;
            self.at_algorithm.insert((target.service, self.flags(target.service).algorithm));
            for (kind, region) in self.ranges(target.service).all().into_iter().enumerate() {
                let reached = self.reach(s, region);
                assert!(
                    reached == allowed[0][kind] || reached == allowed[1][kind],
                    "s{s} shows {reached:?}, which is neither of {allowed:?}"
                );
                if kind < n_selected && region.n_slots > 0 {
                    self.at_region.push((s, target.service, region));
                }
            }
            self.at_target.push((frontend, s, target));
        }
        // Enough half-way readers to catch an early reuse, few enough to stay quick.
        let n_targets = self.at_target.len();
        self.at_target.drain(..n_targets.saturating_sub(30));
        let n_regions = self.at_region.len();
        self.at_region.drain(..n_regions.saturating_sub(30));
    }

    /// The backends that a socket which remembers them would find in the table.
    fn in_table(&self) -> BTreeSet<u32> {
        let in_table = self.backends.iter().filter(|(_, backend)| backend.generation != 0);
        in_table.map(|(&backend_idx, _)| backend_idx).collect()
    }
}

#[derive(Clone, Default)]
struct FakeMaps(Rc<RefCell<Model>>);

impl FakeMaps {
    fn step<R: Default>(&self, change: impl FnOnce(&mut Model) -> R) -> R {
        let mut model = self.0.borrow_mut();
        match &mut model.lives_for {
            Some(0) => return R::default(),
            Some(steps) => *steps -= 1,
            None => {}
        }
        let result = change(&mut model);
        model.n_steps += 1;
        if !model.is_blind {
            model.look();
        }
        result
    }
}

impl FakeMaps {
    fn step_that_may_fail(&self, change: impl FnOnce(&mut Model)) -> io::Result<()> {
        let is_refused = self.step(|model| {
            let is_refused = model.refuses();
            if !is_refused {
                change(model);
            }
            is_refused
        });
        if is_refused { Err(io::Error::from_raw_os_error(libc::ENOMEM)) } else { Ok(()) }
    }
}

impl Maps for FakeMaps {
    fn insert_frontend(&mut self, frontend: FrontendKey, target: ServiceRef) -> io::Result<()> {
        self.step_that_may_fail(|model| {
            model.frontends.insert(frontend, target);
        })
    }

    fn adopt_frontend(&mut self, _: FrontendKey, _: ServiceRef) {}

    fn remove_frontend(&mut self, frontend: &FrontendKey) -> io::Result<()> {
        self.step_that_may_fail(|model| {
            model.frontends.remove(frontend);
        })
    }

    fn write_backend(&mut self, backend_idx: u32, backend: Backend, added_ms: u32) {
        self.step(|model| {
            model.backends.insert(backend_idx, backend);
            model.added_ms.insert(backend_idx, added_ms);
        });
    }

    fn set_weight(&mut self, backend_idx: u32, weight: u16) {
        self.step(|model| model.backends.entry(backend_idx).or_default().weight = weight);
    }

    fn end_ramp(&mut self, backend_idx: u32) {
        self.step(|model| {
            model.added_ms.insert(backend_idx, 0);
        });
    }

    fn added_ms(&self, backend_idx: u32) -> u32 {
        self.0.borrow().added_ms.get(&backend_idx).copied().unwrap_or_default()
    }

    fn retire_backend(&mut self, backend_idx: u32) {
        self.step(|model| model.backends.entry(backend_idx).or_default().generation = 0);
    }

    fn renew_backend(&mut self, backend_idx: u32, generation: u32) {
        self.step(|model| model.backends.entry(backend_idx).or_default().generation = generation);
    }

    fn write_slots(&mut self, first_slot: u32, slots: &[Slot]) {
        // The slots one by one, and many of a Maglev table at once, as there are thousands.
        let chunks = if slots.len() < 100 { 1 } else { 1_500 };
        for (slot_idx, slots) in (first_slot..).step_by(chunks).zip(slots.chunks(chunks)) {
            self.step(|model| model.slots.extend((slot_idx..).zip(slots.iter().copied())));
        }
    }

    fn set_name(&mut self, service_idx: u32, name: ServiceName) {
        self.step(|model| {
            model.names.insert(service_idx, name);
        });
    }

    fn store_range(&mut self, service_idx: u32, nth: usize, range: SlotRange) {
        self.step(|model| {
            let ranges = model.services.entry(service_idx).or_default();
            match nth / Group::N_RANGES {
                N_GROUPS => ranges.unselected = range,
                group => {
                    let mut all = ranges.groups[group].ranges();
                    all[nth % Group::N_RANGES] = range;
                    ranges.groups[group] = Group::of(all);
                }
            }
        });
    }

    fn set_flags(&mut self, service_idx: u32, flags: ServiceFlags) {
        self.step(|model| {
            model.flags.insert(service_idx, flags);
            model.awaited.push((service_idx, flags.report_next != 0));
        });
    }

    fn synchronize_rcu(&mut self) {
        let mut model = self.0.borrow_mut();
        model.n_waits += 1;
        model.at_target.clear();
        model.at_region.clear();
        model.at_algorithm.clear();
        model.past_groups.clear();
    }

    fn frontends(&self) -> io::Result<Vec<(FrontendKey, ServiceRef)>> {
        Ok(self.0.borrow().frontends.iter().map(|(&key, &target)| (key, target)).collect())
    }

    fn flags(&self, service_idx: u32) -> ServiceFlags {
        self.0.borrow().flags(service_idx)
    }

    fn service(&self, service_idx: u32) -> ServiceRanges {
        self.0.borrow().services.get(&service_idx).copied().unwrap_or_default()
    }

    fn name(&self, service_idx: u32) -> ServiceName {
        self.0.borrow().names.get(&service_idx).copied().unwrap_or(ServiceName { octets: [0; 64] })
    }

    fn slot(&self, slot_idx: u32) -> Slot {
        self.0.borrow().slots.get(&slot_idx).copied().unwrap_or_default()
    }

    fn backend(&self, backend_idx: u32) -> Backend {
        self.0.borrow().backends.get(&backend_idx).copied().unwrap_or_default()
    }
}

const SIZES: Sizes = Sizes { services: 5, frontends: 6, frontends6: 5, slots: 4096, backends: 24 };

struct Run {
    maps: FakeMaps,
    reconciler: Reconciler<FakeMaps>,
    table: Table,
    n_restarts: u32,
}

impl Run {
    fn new(sizes: Sizes) -> Run {
        let maps = FakeMaps::default();
        let reconciler = Reconciler::new(maps.clone(), &sizes, 1);
        Run { maps, reconciler, table: Table::default(), n_restarts: 0 }
    }

    /// Changes one service (`None`: removes it) and applies.
    fn change(
        &mut self,
        s: u8,
        backends: Option<&BTreeSet<u8>>,
    ) -> BTreeMap<Arc<str>, ReconcileError> {
        self.table.generation += 1;
        let name: Arc<str> = format!("s{s}").into();
        let after = visible(backends.unwrap_or(&BTreeSet::new()));
        {
            let mut model = self.maps.0.borrow_mut();
            model.past_groups.clear();
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
        self.reconciler.apply(&self.table, NOW_MS)
    }

    /// Puts another daemon in the place of this one.
    fn restart(&mut self, sizes: &Sizes) {
        self.maps.0.borrow_mut().lives_for = None;
        self.n_restarts += 1;
        let first_generation = self.n_restarts * 10_000;
        self.reconciler = Reconciler::adopt(self.maps.clone(), sizes, first_generation).unwrap();
    }

    /// What the last table needs, and no more, is what the maps hold.
    fn check_exact(&self) {
        let model = self.maps.0.borrow();
        model.check_flows();
        let wanted: BTreeSet<_> =
            self.table.services.values().flat_map(|s| frontends(s, 0).into_keys()).collect();
        assert_eq!(model.frontends.keys().copied().collect::<BTreeSet<_>>(), wanted);
        let n_backends: usize =
            self.table.services.values().map(|service| service.backends.len()).sum();
        assert_eq!(model.in_table().len(), n_backends);
        let n_shown = model.services.values().filter(|s| **s != ServiceRanges::default()).count();
        let n_serving = self.table.services.values().filter(|s| !s.backends.is_empty()).count();
        assert_eq!(n_shown, n_serving);
        for (name, service) in self.table.services.iter() {
            let service_idx = self.reconciler.indices(name).unwrap().service;
            let algorithm = model.flags(service_idx).algorithm;
            assert_eq!(algorithm, number(service.algorithm) as u32, "{name}");
            let [selected @ .., _] = model.ranges(service_idx).all();
            for region in selected {
                model.check_table(region, algorithm, 1_024);
            }
        }
    }
}

fn set(xs: &[u8]) -> BTreeSet<u8> {
    xs.iter().copied().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
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
            run.check_exact();
            // A second application of the same table changes nothing.
            let n_waits = run.maps.0.borrow().n_waits;
            prop_assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// A daemon is killed after any step; the next one goes on from what it finds.
    #[test]
    fn a_daemon_may_be_killed_at_any_step(
        changes in prop::collection::vec(
            (
                0..5u8,
                prop::option::weighted(0.8, prop::collection::btree_set(0..12u8, 0..4)),
                prop::option::weighted(0.3, 0..20usize),
            ),
            1..60
        )
    ) {
        let mut run = Run::new(SIZES);
        for (s, backends, killed_after) in changes {
            run.maps.0.borrow_mut().lives_for = killed_after;
            let errors = run.change(s, backends.as_ref());
            prop_assert!(errors.is_empty(), "{errors:?}");
            if killed_after.is_some() {
                let before = indices(&run.reconciler);
                run.restart(&SIZES);
                let errors = run.reconciler.apply(&run.table, NOW_MS);
                prop_assert!(errors.is_empty(), "{errors:?}");
                for (name, after) in indices(&run.reconciler) {
                    let same = name == format!("s{s}") || before[&name] == after;
                    prop_assert!(same, "{name} had {:?}, has {after:?}", before[&name]);
                }
            }
            run.check_exact();
        }
        for s in 0..5 {
            run.change(s, None);
        }
        run.reconciler.recycle();
        for (map, pressure) in run.reconciler.pressure() {
            prop_assert_eq!(pressure.used, 0, "{}", map);
        }
    }
}

/// A service of both protocols, with the pin or without.
fn pinned(s: u8, backends: &BTreeSet<u8>, has_pin: bool) -> Service {
    let mut service = Service::clone(&service(s, backends, 1));
    service.protocols = Protocols::Both;
    service.pin = has_pin.then(|| "127.0.0.1:53".parse().unwrap());
    service
}

/// A change of a table: a service's backends and ports, and whose the pin is then.
#[derive(Clone, Debug)]
struct Change {
    s: u8,
    backends: Option<BTreeSet<u8>>,
    has_second_port: bool,
    pin_owner: u8,
    /// The operations that the kernel refuses meanwhile.
    refused: BTreeSet<usize>,
    /// After how many steps the daemon is killed.
    killed_after: Option<usize>,
    /// Whether the next table comes before what was refused was tried again.
    is_hasty: bool,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let backends = prop::option::weighted(0.8, prop::collection::btree_set(0..8u8, 0..4));
    let refused = prop::collection::btree_set(0..12usize, 0..4);
    let killed_after = prop::option::weighted(0.2, 0..30usize);
    let is_hasty = prop::bool::weighted(0.4);
    let change = (0..4u8, backends, any::<bool>(), 0..8u8, refused, killed_after, is_hasty);
    let change = change.prop_map(
        |(s, backends, has_second_port, pin_owner, refused, killed_after, is_hasty)| {
            let is_hasty = is_hasty && killed_after.is_none();
            Change { s, backends, has_second_port, pin_owner, refused, killed_after, is_hasty }
        },
    );
    prop::collection::vec(change, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    /// The kernel may refuse any operation, the pin may move with any table, and a daemon may be
    /// killed at any step: readers never see a mix, and what was refused comes with a later try. No
    /// socket follows what it remembers of a frontend to a service that hasn't got it any more.
    #[test]
    fn any_operation_may_fail(changes in changes()) {
        let sizes = Sizes { services: 4, frontends: 20, frontends6: 10, ..SIZES };
        let mut run = Run::new(sizes);
        let mut wanted = BTreeMap::<u8, (BTreeSet<u8>, bool)>::new();
        for change in changes {
            let Change { s, backends, has_second_port, pin_owner, refused, killed_after, is_hasty } =
                change;
            let before = wanted.get(&s).map(|(backends, _)| backends.clone()).unwrap_or_default();
            match backends {
                Some(backends) => drop(wanted.insert(s, (backends, has_second_port))),
                None => drop(wanted.remove(&s)),
            }
            let after = wanted.get(&s).map(|(backends, _)| backends.clone()).unwrap_or_default();
            for (&s, (backends, has_second_port)) in &wanted {
                let mut service = pinned(s, backends, s == pin_owner);
                if *has_second_port {
                    service.ports = Ports::only([80, 81]);
                }
                let is_same = run.table.services.get(&service.name).is_some_and(|last| {
                    (&last.pin, &last.ports, &last.backends)
                        == (&service.pin, &service.ports, &service.backends)
                });
                if !is_same {
                    run.table.services.insert(service.name.clone(), Arc::new(service));
                }
            }
            let names: Vec<Arc<str>> = run.table.services.keys().cloned().collect();
            for name in names.iter().filter(|name| !wanted.keys().any(|s| ***name == *format!("s{s}"))) {
                run.table.services.remove(name);
            }
            {
                let mut model = run.maps.0.borrow_mut();
                model.allowed.insert(s, [visible(&before), visible(&after)]);
                model.past_groups.clear();
                model.refuse(refused);
                model.lives_for = killed_after;
            }
            let errors = run.reconciler.apply(&run.table, NOW_MS);
            prop_assert!(errors.values().all(ReconcileError::is_transient), "{errors:?}");
            run.maps.0.borrow_mut().refuse([]);
            if is_hasty {
                continue;
            }
            if killed_after.is_some() {
                run.restart(&sizes);
            }
            let errors = run.reconciler.apply(&run.table, NOW_MS);
            prop_assert!(errors.is_empty(), "{errors:?}");
            run.check_exact();
        }
    }
}

proptest! {
    /// Whatever was refused in between, of a table after which nothing is, every backend has a
    /// generation, so that datagrams follow their flows.
    #[test]
    fn flows_hold_after_whatever_was_refused(
        changes in prop::collection::vec(
            (any::<bool>(), any::<bool>(), prop::option::of(0..4usize)),
            1..12
        )
    ) {
        let mut run = Run::new(Sizes { frontends: 12, frontends6: 8, ..SIZES });
        run.maps.0.borrow_mut().is_blind = true;
        for (has_second_port, has_pin, refused) in changes {
            let mut service = pinned(1, &set(&[0, 1]), has_pin);
            service.ports = Ports::only(if has_second_port { vec![80, 81] } else { vec![80] });
            run.table.services.insert(service.name.clone(), Arc::new(service));
            run.maps.0.borrow_mut().refuse(refused);
            let errors = run.reconciler.apply(&run.table, NOW_MS);
            if refused.is_none() {
                prop_assert!(errors.is_empty(), "{errors:?}");
                run.check_exact();
            }
        }
    }
}

/// A port that couldn't be taken away and is wanted again: flows hold again, as before.
#[test]
fn a_udp_port_that_is_wanted_again_is_not_given_up() {
    let backends = set(&[0]);
    let sizes = Sizes { frontends: 12, frontends6: 8, ..SIZES };
    // The kernel refuses the first removal of the two protocols' or the second.
    for refused in [0, 1] {
        let mut run = Run::new(sizes);
        run.maps.0.borrow_mut().allowed.insert(1, [visible(&set(&[])), visible(&backends)]);
        let mut upsert = |ports: Vec<u16>, refused: Option<usize>| {
            let mut service = pinned(1, &backends, false);
            service.ports = Ports::only(ports);
            run.table.services.insert(service.name.clone(), Arc::new(service));
            run.maps.0.borrow_mut().refuse(refused);
            let n_errors = run.reconciler.apply(&run.table, NOW_MS).len();
            assert_eq!(n_errors, usize::from(refused.is_some()));
            let backend_idx = run.reconciler.indices("s1").unwrap().backends[&address(1, 0)];
            run.maps.0.borrow().backends[&backend_idx].generation
        };
        upsert(vec![80, 81], None);
        assert_eq!(upsert(vec![80], Some(refused)), 0, "81 is still there, and given up");
        assert_ne!(upsert(vec![80, 81], None), 0, "the flows stay suspended: {refused}");
        run.check_exact();
        assert_eq!(run.reconciler.take_removed_udp(), RemovedUdp::default());
    }
}

/// Services that share an instance: only who came to it by the service that lost it is disconnected,
/// by whichever of its frontends, also one that goes with the same table; and whoever came by another
/// stays, though its backends' generations were renewed.
#[test]
fn a_backend_leaves_one_of_the_services_that_share_it() {
    let shared: SocketAddr = "10.0.0.9:80".parse().unwrap();
    let named = |s: u8, ports: &[u16], has_shared: bool| {
        let mut service = pinned(s, &set(&[0, 1]), false);
        service.ports = Ports::only(ports.iter().copied());
        service.vip6 = None;
        service.backends[0].address = Some(address(s, 0));
        service.backends[1].address = Some(shared);
        service.backends.truncate(if has_shared { 2 } else { 1 });
        (service.name.clone(), Arc::new(service))
    };
    let mut run = Run::new(Sizes { frontends: 12, ..SIZES });
    run.maps.0.borrow_mut().is_blind = true;
    let mut upsert = |services: Vec<(Arc<str>, Arc<Service>)>| {
        run.table.services = services.into_iter().collect();
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        let left = run.reconciler.take_removed_udp();
        assert_eq!(left.backends, HashSet::new(), "the service is known");
        left.frontends
    };
    let vip = |s: u8, port: u16| SocketAddr::from(([127, 128, 0, s], port));
    upsert(vec![named(1, &[53, 54], true), named(2, &[53, 54], true)]);
    let gave_up = upsert(vec![named(1, &[53], true), named(2, &[53, 54], true)]);
    assert_eq!(gave_up, HashSet::from([(vip(1, 54), shared), (vip(1, 54), address(1, 0))]));
    let left = upsert(vec![named(1, &[53], true), named(2, &[53], false)]);
    let expected = [(vip(2, 53), shared), (vip(2, 54), shared), (vip(2, 54), address(2, 0))];
    assert_eq!(left, HashSet::from(expected));
    // Ports that went earlier are no part of it.
    let left = upsert(vec![named(2, &[53], false)]);
    assert_eq!(left, HashSet::from([(vip(1, 53), shared), (vip(1, 53), address(1, 0))]));
}

/// Where a service's ports change between a list and any, who came by a port that it still has stays; and who
/// came by a pin that moves to another service with the same backend.
#[test]
fn who_came_by_a_port_that_leads_there_still_stays() {
    let shared: SocketAddr = "10.0.0.9:80".parse().unwrap();
    let named = |s: u8, ports: &Ports, has_pin: bool| {
        let mut service = pinned(s, &set(&[0]), has_pin);
        (service.ports, service.vip6) = (ports.clone(), None);
        service.backends[0].address = Some(shared);
        (service.name.clone(), Arc::new(service))
    };
    let (both, one, any) = (Ports::only([53, 54]), Ports::only([53]), Ports::Any);
    let vip = |port: u16| (SocketAddr::from(([127, 128, 0, 1], port)), shared);
    // Former ports, new ones, what is disconnected (0: any port), and except what.
    let rows: [(&Ports, &Ports, &[_], &[_]); 5] = [
        (&both, &any, &[], &[]),
        (&any, &both, &[vip(0)], &[vip(53), vip(54)]),
        (&any, &one, &[vip(0)], &[vip(53)]),
        (&both, &one, &[vip(54)], &[]),
        (&one, &both, &[], &[]),
    ];
    for (from, to, gone, kept) in rows {
        let mut run = Run::new(Sizes { frontends: 12, ..SIZES });
        run.maps.0.borrow_mut().is_blind = true;
        let mut upsert = |ports: &Ports, pin_owner: u8| {
            let services = [named(1, ports, pin_owner == 1), named(2, &one, pin_owner == 2)];
            run.table.services = services.into_iter().collect();
            assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
            run.reconciler.take_removed_udp()
        };
        assert_eq!(upsert(from, 1), RemovedUdp::default());
        assert_eq!(upsert(from, 2), RemovedUdp::default(), "the pin moved");
        let left = upsert(to, 2);
        assert_eq!(left.frontends, gone.iter().copied().collect(), "{from:?} to {to:?}");
        assert_eq!(left.kept, kept.iter().copied().collect(), "{from:?} to {to:?}");
    }
}

/// A pin of both protocols moves: no socket that remembers the former service's backends follows
/// them, and whoever is connected to one of them by the pin is disconnected; nobody else.
#[test]
fn a_moved_udp_pin_is_followed_by_nobody() {
    let backends = set(&[0]);
    for (from, to) in [(1, 2), (2, 1)] {
        let mut run = Run::new(Sizes { frontends: 12, frontends6: 8, ..SIZES });
        for s in [1, 2] {
            run.maps.0.borrow_mut().allowed.insert(s, [visible(&set(&[])), visible(&backends)]);
        }
        let mut upsert = |owner: u8| {
            for s in [1, 2] {
                let service = pinned(s, &backends, s == owner);
                run.table.services.insert(service.name.clone(), Arc::new(service));
            }
            assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
            run.check_exact();
            let name = format!("s{from}");
            let backend_idx = run.reconciler.indices(&name).unwrap().backends[&address(from, 0)];
            (
                run.maps.0.borrow().backends[&backend_idx].generation,
                run.reconciler.take_removed_udp(),
            )
        };
        let (before, nothing) = upsert(from);
        assert_eq!(nothing, RemovedUdp::default());
        let (after, left) = upsert(to);
        assert_ne!(before, after, "from s{from} to s{to}: the socket follows its flow");
        let pin = "127.0.0.1:53".parse().unwrap();
        assert_eq!(left.frontends, HashSet::from([(pin, address(from, 0))]));
        assert_eq!(left.backends, HashSet::new());
    }
}

/// What stops half-way is not taken for applied, whatever state is wanted next.
#[test]
fn a_half_applied_service_is_put_again() {
    let mut run = Run::new(SIZES);
    run.change(1, Some(&set(&[0])));
    let former = run.table.services["s1"].clone();
    let mut next = Service::clone(&service(1, &set(&[1]), 2));
    next.ports = Ports::only([80, 81]);
    run.maps.0.borrow_mut().allowed.insert(1, [visible(&set(&[0])), visible(&set(&[1]))]);
    run.maps.0.borrow_mut().refuse([0]);
    run.table.services.insert("s1".into(), Arc::new(next));
    assert!(run.reconciler.apply(&run.table, NOW_MS).contains_key("s1"));
    // The table goes back to the very state that was applied before.
    run.table.services.insert("s1".into(), former);
    assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
    run.check_exact();
    let service_idx = run.reconciler.indices("s1").unwrap().service;
    let region = run.maps.0.borrow().services[&service_idx].groups[0].host_netns.all;
    assert_eq!(run.maps.0.borrow().reach(1, region), set(&[0]));
}

fn indices(reconciler: &Reconciler<FakeMaps>) -> BTreeMap<String, Indices> {
    let names = reconciler.names().map(|(name, _)| name);
    names.map(|name| (name.to_string(), reconciler.indices(name).unwrap())).collect()
}

#[test]
fn a_connect_is_awaited_once_in_each_cold_spell() {
    let mut run = Run::new(SIZES);
    let live = |backends: &[u8]| (*service(0, &backends.iter().copied().collect(), 1)).clone();
    let cold = |backends: &[u8]| Service { watch: Watch::Cold, ..live(backends) };
    run.maps.0.borrow_mut().is_blind = true;
    let restarted = |run: &mut Run| {
        run.restart(&SIZES);
        cold(&[1])
    };
    // What comes next, and the word that is written for it: of which service, and whether it awaits.
    type Step<'a> = (&'a dyn Fn(&mut Run) -> Service, &'a [(u32, bool)]);
    let steps: [Step; 7] = [
        (&|_| cold(&[1]), &[(0, true)]),
        (&|_| cold(&[1, 2]), &[]),
        (&|_| live(&[1, 2]), &[(0, false)]),
        (&|_| live(&[1]), &[]),
        (&|_| cold(&[1]), &[(0, true)]),
        (&restarted, &[(0, true)]),
        (&|_| cold(&[]), &[]),
    ];
    for (step, (next, expected)) in steps.iter().enumerate() {
        let next = next(&mut run);
        run.table.services.insert(next.name.clone(), Arc::new(next));
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        let awaited = std::mem::take(&mut run.maps.0.borrow_mut().awaited);
        assert_eq!(awaited, *expected, "step {step}");
    }
}

#[test]
fn maps_that_something_else_wrote_to_are_not_taken_over() {
    type Spoil = fn(&mut Model);
    let spoils: [(&str, Spoil); 7] = [
        ("aren't its own", |model| {
            let beyond = SlotRange { first_slot: u32::MAX - 255, n_slots: 256 };
            model.services.values_mut().for_each(|ranges| ranges.groups[0].host_netns.all = beyond);
        }),
        ("isn't its own", |model| {
            model.slots.values_mut().for_each(|slot| slot.backend = 0);
        }),
        ("has no name", |model| model.names.clear()),
        ("isn't there", |model| model.backends.clear()),
        ("aren't its own", |model| {
            model.slots.values_mut().for_each(|slot| slot.alias = 9);
        }),
        ("aren't its own", |model| {
            let shown = model.services[&1];
            model.services.insert(2, shown);
        }),
        ("no service 7", |model| {
            model.frontends.values_mut().for_each(|target| target.service = 7);
        }),
    ];
    for (expected, spoil) in spoils {
        let mut run = Run::new(SIZES);
        run.change(1, Some(&set(&[0])));
        run.change(2, Some(&set(&[1])));
        spoil(&mut run.maps.0.borrow_mut());
        let error = Reconciler::adopt(run.maps.clone(), &SIZES, 1).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
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
        "BACKENDS is full (3 entries): raise datapath.max_backends in the configuration and restart"
    );
    assert_eq!(run.maps.0.borrow().services, before);
    let names = |errors: BTreeMap<Arc<str>, ReconcileError>| errors.into_keys().collect::<Vec<_>>();
    assert_eq!(names(run.change(2, Some(&set(&[0])))), [Arc::from("s1")], "only s1 is at fault");
    assert!(run.change(2, None).contains_key("s1"));
    // `allowed` knows only the last two states; the one that serves is older.
    run.maps.0.borrow_mut().allowed.entry(1).or_default()[1] = visible(&set(&[0, 1]));
    assert!(run.change(1, Some(&set(&[5]))).is_empty(), "room enough once the old ones are gone");
}

/// New maps take the place of former ones unless a service would be lost by it, whole or at a frontend.
#[test]
fn what_is_served_is_lost_only_where_the_new_maps_lead_nowhere() {
    let key =
        |port| FrontendKey { address: Ipv4Addr::new(127, 128, 0, 1).into(), port, protocol: 6 };
    let wants = |backends: &[u8], ports: &[u16], generation| {
        let mut service = Service::clone(&service(1, &set(backends), generation));
        service.ports = Ports::only(ports.iter().copied());
        Some(service)
    };
    // The tables one after the other, of which the last meets refusals: the service as each wants it,
    // the refused operations, whether something is lost.
    type Tables = Vec<Option<Service>>;
    let table: [(&str, Tables, &[usize], bool); 6] = [
        ("too large from the first", vec![wants(&[0, 1, 2, 4], &[80], 1)], &[], true),
        ("grew", vec![wants(&[0], &[80], 1), wants(&[0, 1, 2, 4], &[80], 2)], &[], false),
        ("a frontend that is served", vec![wants(&[0], &[80], 1)], &[0], true),
        ("a new frontend", vec![wants(&[0], &[80, 81], 1)], &[1], false),
        ("one that it gives up", vec![wants(&[0], &[81], 1)], &[0], false),
        ("a removal", vec![wants(&[0], &[80], 1), None], &[0], false),
    ];
    for (case, tables, refused, expected) in table {
        let mut run = Run::new(Sizes { backends: 3, ..SIZES });
        run.maps.0.borrow_mut().is_blind = true;
        run.reconciler.prefer_served(Served::from([("s1".into(), HashSet::from([key(80)]))]));
        let mut errors = BTreeMap::new();
        let last = tables.len() - 1;
        for (at, service) in tables.into_iter().enumerate() {
            run.table.services =
                service.into_iter().map(|s| (s.name.clone(), Arc::new(s))).collect();
            run.maps.0.borrow_mut().refuse(refused.iter().copied().filter(|_| at == last));
            errors = run.reconciler.apply(&run.table, NOW_MS);
        }
        assert_eq!(errors.len(), 1, "{case}");
        let unserved = run.reconciler.unserved(&run.table, &errors);
        assert_eq!(!unserved.is_empty(), expected, "{case}: {unserved:?}");
    }
}

#[test]
fn what_the_kernel_refuses_is_tried_again() {
    let mut run = Run::new(SIZES);
    run.maps.0.borrow_mut().refuse([0]);
    let errors = run.change(1, Some(&set(&[0])));
    assert!(errors["s1"].to_string().contains("127.128.0.1:80"), "{errors:?}");
    assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
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
    let errors = run.reconciler.apply(&run.table, NOW_MS);
    assert_eq!(errors["s1"].to_string(), "it has 4097 backends; a service can have 4096");
}

/// A pin that the configuration gives to another service, whichever of the two comes first.
#[test]
fn a_frontend_moves_between_services() {
    let pin = "127.0.0.1:80".parse().unwrap();
    let mut run = Run::new(SIZES);
    for s in [1, 2] {
        run.change(s, Some(&set(&[0])));
    }
    let pinned_to = |s: u8| {
        let mut service = Service::clone(&service(s, &set(&[0]), 1));
        service.pin = Some(pin);
        Arc::new(service)
    };
    for s in [2, 1, 2] {
        let other = 3 - s;
        run.table.services.insert("s1".into(), service(1, &set(&[0]), 1));
        run.table.services.insert("s2".into(), service(2, &set(&[0]), 1));
        run.table.services.insert(format!("s{s}").into(), pinned_to(s));
        let errors = run.reconciler.apply(&run.table, NOW_MS);
        assert!(errors.is_empty(), "{errors:?}");
        run.check_exact();
        let key = FrontendKey { address: pin.ip().to_owned().into(), port: 80, protocol: 6 };
        let owner = run.maps.0.borrow().frontends[&key].service;
        assert_eq!(owner, run.reconciler.indices(&format!("s{s}")).unwrap().service);
        assert_ne!(owner, run.reconciler.indices(&format!("s{other}")).unwrap().service);
    }
}

/// A full map is no reason to wait for readers again and again: nothing rests.
#[test]
fn what_stays_refused_waits_for_nobody() {
    let mut run = Run::new(Sizes { services: 1, ..SIZES });
    run.change(1, Some(&set(&[0])));
    assert_eq!(run.change(2, Some(&set(&[0]))).len(), 1);
    let n_waits = run.maps.0.borrow().n_waits;
    for _ in 0..10 {
        assert_eq!(run.reconciler.apply(&run.table, NOW_MS).len(), 1);
    }
    assert_eq!(run.maps.0.borrow().n_waits, n_waits);
}

/// What one service needs, another gives up in the same table.
#[test]
fn room_that_a_table_makes_is_room_for_it() {
    let mut run = Run::new(Sizes { services: 1, ..SIZES });
    run.change(2, Some(&set(&[0])));
    run.maps.0.borrow_mut().allowed.entry(1).or_default()[1] = visible(&set(&[0]));
    let leaves = [visible(&set(&[0])), visible(&set(&[]))];
    run.maps.0.borrow_mut().allowed.insert(2, leaves);
    run.table.services = [("s1".into(), service(1, &set(&[0]), 2))].into_iter().collect();
    assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
    run.check_exact();
}

/// The kernel's share of a change is the changed service's size, whatever the table's.
#[test]
fn a_change_costs_what_its_service_does() {
    let n_steps = |n_services: u16| {
        let sizes = Sizes {
            services: 16_384,
            frontends: 65_536,
            frontends6: 1,
            slots: 1 << 19,
            backends: 1 << 18,
        };
        let mut run = Run::new(sizes);
        run.maps.0.borrow_mut().is_blind = true;
        let of = |n: u16, backends: &[u8]| {
            let [high, low] = n.to_be_bytes();
            let mut service = Service::clone(&service(1, &set(backends), 1));
            service.name = format!("s{n}").into();
            service.vip = Ipv4Addr::new(127, 128, high, low);
            (service.name.clone(), Arc::new(service))
        };
        run.table.services = (0..n_services).map(|n| of(n, &[0, 1, 2])).collect();
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        let before = run.maps.0.borrow().n_steps;
        run.table.services.extend([of(7, &[0, 1, 4])]);
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        run.maps.0.borrow().n_steps - before
    };
    // A backend's entry, 3 slots for each of the 3 kinds of connection that differ (the new backend is
    // the host's), the service's 6 ranges, the retired backend.
    let few = n_steps(10);
    assert!(few < 20, "{few}");
    assert_eq!(n_steps(10_000), few);
}

/// However many services change their ports, the table waits for readers once.
#[test]
fn moved_ports_wait_once() {
    let mut run = Run::new(Sizes { frontends: 20, frontends6: 20, ..SIZES });
    let ported = |s: u8, port: u16| {
        let mut service = Service::clone(&service(s, &set(&[0]), port.into()));
        service.ports = Ports::only([port]);
        (service.name.clone(), Arc::new(service))
    };
    (1..5).for_each(|s| drop(run.change(s, Some(&set(&[0])))));
    for port in 81..85 {
        run.table.services = (1..5).map(|s| ported(s, port)).collect();
        let n_waits = run.maps.0.borrow().n_waits;
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        assert!(run.maps.0.borrow().n_waits <= n_waits + 1);
        run.check_exact();
    }
}

/// A service whose backends are in these places, with these weights.
fn placed(s: u8, places: &Places, weight: u16, algorithm: BalanceAlgorithm) -> Service {
    let backends = places.keys().copied().collect();
    let mut service = Service::clone(&service(s, &backends, weight.into()));
    service.algorithm = algorithm;
    for (backend, &place) in service.backends.iter_mut().zip(places.values()) {
        backend.weight = weight;
        (backend.state, backend.group) = match place {
            0 => (BackendState::Warning, 0),
            N_GROUPS => (BackendState::Draining, 0),
            group => (BackendState::Spare, group as u8),
        };
    }
    service
}

impl Run {
    /// As [`Run::change`], of a service with these backends.
    fn place(&mut self, s: u8, places: &Places, weight: u16, algorithm: BalanceAlgorithm) {
        {
            let mut model = self.maps.0.borrow_mut();
            model.past_groups.clear();
            let allowed = model.allowed.entry(s).or_default();
            allowed[0] = std::mem::replace(&mut allowed[1], visible_places(places));
        }
        let service = placed(s, places, weight, algorithm);
        self.table.services.insert(service.name.clone(), Arc::new(service));
        let errors = self.reconciler.apply(&self.table, NOW_MS);
        assert!(errors.is_empty(), "{errors:?}");
    }

    /// The entry of a backend, with its index and when it began to ramp up.
    fn entry(&self, s: u8, x: u8) -> (u32, Backend, u32) {
        let backend_idx =
            self.reconciler.indices(&format!("s{s}")).unwrap().backends[&address(s, x)];
        let model = self.maps.0.borrow();
        (backend_idx, model.backends[&backend_idx], model.added_ms[&backend_idx])
    }
}

const LARGE: Sizes =
    Sizes { services: 5, frontends: 6, frontends6: 5, slots: 1 << 19, backends: 64 };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// Groups, drains, weights and algorithms change with any table, and the daemon may be killed at any
    /// step: no reader sees a mix, none by Maglev meets slots without a table, and none finds nothing
    /// where there is always a backend.
    #[test]
    fn groups_and_algorithms_change_under_readers(
        changes in prop::collection::vec(
            (
                0..3u8,
                prop::collection::btree_map(0..8u8, 0..=N_GROUPS, 0..5),
                1..4u16,
                prop::sample::select(vec![
                    BalanceAlgorithm::Maglev, BalanceAlgorithm::Least, BalanceAlgorithm::Random,
                ]),
                prop::option::weighted(0.2, 0..40usize),
            ),
            1..25
        )
    ) {
        let mut run = Run::new(LARGE);
        for (s, places, weight, algorithm, killed_after) in changes {
            run.maps.0.borrow_mut().lives_for = killed_after;
            run.place(s, &places, weight, algorithm);
            if killed_after.is_some() {
                run.restart(&LARGE);
                let errors = run.reconciler.apply(&run.table, NOW_MS);
                prop_assert!(errors.is_empty(), "{errors:?}");
            }
            run.check_exact();
            for &x in places.keys() {
                prop_assert_eq!(run.entry(s, x).1.weight, weight);
            }
        }
        for s in 0..5 {
            run.change(s, None);
        }
        run.reconciler.recycle();
        for (map, pressure) in run.reconciler.pressure() {
            prop_assert_eq!(pressure.used, 0, "{}", map);
        }
    }
}

/// A backend that is drained, or has another weight or group, keeps its entry, so its connections are
/// still counted, and sockets that remember it follow.
#[test]
fn a_backend_keeps_its_entry_while_it_is_in_the_table() {
    let mut run = Run::new(SIZES);
    let places = |of_0: usize| Places::from([(0, of_0), (1, 0)]);
    run.place(1, &places(0), 1, BalanceAlgorithm::Least);
    let (idx, before, _) = run.entry(1, 0);
    for (place, weight) in [(N_GROUPS, 1), (N_GROUPS, 7), (0, 7), (1, 3), (2, 3), (0, 1)] {
        run.place(1, &places(place), weight, BalanceAlgorithm::Least);
        run.check_exact();
        let (same_idx, after, _) = run.entry(1, 0);
        assert_eq!((same_idx, after), (idx, Backend { weight, ..before }), "{place} {weight}");
        // A restart finds the drained ones, too.
        run.restart(&SIZES);
        assert_eq!(run.entry(1, 0).0, idx);
        run.reconciler.apply(&run.table, NOW_MS);
    }
    assert_eq!(run.reconciler.take_removed_udp(), RemovedUdp::default());
    run.place(1, &Places::from([(0, N_GROUPS)]), 1, BalanceAlgorithm::Least);
    let ranges = run.maps.0.borrow().services[&1];
    assert!(ranges.groups.iter().all(|group| *group == Group::default()), "none is selected");
}

/// Many services change between Maglev and others at once: the table waits twice at most.
#[test]
fn a_reload_of_the_algorithm_waits_for_readers_once() {
    let mut run = Run::new(LARGE);
    let places = Places::from([(0, 0), (1, 0)]);
    run.maps.0.borrow_mut().is_blind = true;
    for algorithm in [BalanceAlgorithm::Least, BalanceAlgorithm::Maglev, BalanceAlgorithm::Random] {
        run.table.services = (0..4)
            .map(|s| {
                let service = placed(s, &places, 1, algorithm);
                (service.name.clone(), Arc::new(service))
            })
            .collect();
        let n_waits = run.maps.0.borrow().n_waits;
        assert!(run.reconciler.apply(&run.table, NOW_MS).is_empty());
        let n_waits = run.maps.0.borrow().n_waits - n_waits;
        let expected = usize::from(algorithm != BalanceAlgorithm::Least);
        assert_eq!(n_waits, expected, "{algorithm}");
        run.check_exact();
    }
}

/// A reader may know the slots that a service had before it became empty, when Maglev comes.
#[test]
fn readers_of_former_slots_dont_meet_maglev() {
    let mut run = Run::new(LARGE);
    run.place(0, &Places::from([(0, 0)]), 1, BalanceAlgorithm::Least);
    run.place(0, &Places::new(), 1, BalanceAlgorithm::Least);
    let n_waits = run.maps.0.borrow().n_waits;
    run.place(0, &Places::new(), 1, BalanceAlgorithm::Maglev);
    assert_eq!(run.maps.0.borrow().n_waits, n_waits + 1);
    run.check_exact();
    run.place(1, &Places::from([(0, 0)]), 1, BalanceAlgorithm::Maglev);
    assert_eq!(run.maps.0.borrow().n_waits, n_waits + 1, "a new service has no readers");
}

const SLOW_START: Option<Duration> = Some(Duration::from_secs(10));
const SLOW_START_MS: u32 = 10_000;

/// Backends that are all in the first group.
fn first(xs: &[u8]) -> Places {
    xs.iter().map(|&x| (x, 0)).collect()
}

#[test]
fn a_backend_that_is_added_beside_others_ramps_up() {
    let mut run = Run::new(LARGE);
    run.reconciler.set_slow_start(SLOW_START);
    let least = BalanceAlgorithm::Least;
    let added = |run: &Run, x: u8| run.entry(1, x).2;
    run.place(1, &first(&[0, 1]), 1, least);
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS);
    run.place(1, &first(&[0, 5]), 1, least);
    assert_eq!((added(&run, 0), added(&run, 5)), (0, NOW_MS));
    run.place(1, &first(&[0, 5]), 9, least);
    assert_eq!(added(&run, 5), NOW_MS, "another weight changes nothing");
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS - 1);
    assert_eq!(added(&run, 5), NOW_MS);
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS);
    assert_eq!(added(&run, 5), 0);

    // Of a daemon that ended meanwhile; one at a time of another clock as well.
    run.place(1, &first(&[0, 5, 6]), 9, least);
    run.restart(&LARGE);
    run.reconciler.set_slow_start(SLOW_START);
    run.place(1, &first(&[0, 5, 6, 7]), 9, least);
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS - 1);
    assert_eq!((added(&run, 6), added(&run, 7)), (NOW_MS, NOW_MS), "0 and 5 are established");
    run.reconciler.end_ramps(NOW_MS - 1);
    assert_eq!((added(&run, 6), added(&run, 7)), (0, 0));

    // An entry that became another backend's.
    run.place(1, &first(&[0, 5, 8]), 9, least);
    let idx = run.entry(1, 8).0;
    run.place(1, &first(&[0, 5]), 9, least);
    run.reconciler.recycle();
    run.reconciler.set_slow_start(None);
    let others = [9, 10, 11, 12];
    run.place(1, &first(&[[0, 5].as_slice(), &others].concat()), 9, least);
    assert!(others.iter().any(|&x| run.entry(1, x).0 == idx));
    assert!(others.iter().all(|&x| added(&run, x) == 0));
    run.reconciler.end_ramps(NOW_MS);
    assert!(others.iter().all(|&x| added(&run, x) == 0));

    run.reconciler.set_slow_start(SLOW_START);
    run.place(1, &first(&[0, 5]), 9, BalanceAlgorithm::Maglev);
    run.place(1, &first(&[0, 5, 6]), 9, BalanceAlgorithm::Maglev);
    assert_eq!(added(&run, 6), 0, "with maglev a key's backend doesn't depend on time");
}

/// In a first deployment, and where a deployment replaces all within `slow_start`, each has its share.
#[test]
fn backends_ramp_up_only_beside_established_ones() {
    let mut run = Run::new(LARGE);
    run.reconciler.set_slow_start(SLOW_START);
    let least = BalanceAlgorithm::Least;
    let ramping = |run: &Run, places: &Places| -> Vec<u8> {
        places.keys().copied().filter(|&x| run.entry(1, x).2 != 0).collect()
    };
    let place = |run: &mut Run, places: Places, expected: &[u8]| {
        run.place(1, &places, 1, least);
        assert_eq!(ramping(run, &places), expected, "{places:?}");
    };
    // One after the other, in a young service.
    place(&mut run, first(&[0]), &[]);
    place(&mut run, first(&[0, 1]), &[]);
    place(&mut run, first(&[0, 1, 2]), &[]);
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS);
    // One after the other is replaced, until none of the established ones is left.
    place(&mut run, first(&[0, 1, 4]), &[4]);
    place(&mut run, first(&[0, 4, 5]), &[4, 5]);
    place(&mut run, first(&[4, 5, 6]), &[]);
    // All at once.
    place(&mut run, first(&[0, 1]), &[]);
    run.reconciler.end_ramps(NOW_MS + SLOW_START_MS);
    // The last established one is drained, or moves to a spare group: it isn't selected there.
    place(&mut run, first(&[0, 4]), &[4]);
    place(&mut run, first(&[0, 4, 5]), &[4, 5]);
    place(&mut run, Places::from([(0, N_GROUPS), (4, 0), (5, 0)]), &[]);
    place(&mut run, first(&[0, 4, 5, 6]), &[6]);
    place(&mut run, Places::from([(0, 1), (4, 0), (5, 0), (6, 0)]), &[]);
    // The first of its group.
    place(&mut run, Places::from([(0, 1), (1, 1), (2, 0)]), &[1]);
}

#[test]
fn all_nodes_know_a_backend_by_the_same_number() {
    let number = |text: &str| slots::number(text.parse().unwrap());
    assert_eq!(number("10.0.0.7:80"), number("[::ffff:10.0.0.7]:80"));
    // Another one would move the keys between nodes of different versions.
    assert_eq!(number("10.0.0.7:80"), 0x9a20bedb82bfd2d4);
}
