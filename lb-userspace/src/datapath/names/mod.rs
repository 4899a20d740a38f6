//! The unit `names`: DNS queries about routed names are answered in the kernel, also while no daemon
//! runs.
//!
//! Its maps follow the table in the same step as those of the unit `connect`. What else the answers
//! depend on is in one record, [`NamesControl`].

mod kernel;
mod probe;
mod table;

use std::collections::HashMap;
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use aya::programs::{Program, SchedClassifier};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use ipnet::IpNet;
use lb_common::{
    Address, LAYOUT, ListenKey, MAX_ALLOWED, MAX_DOMAIN_LEN, MAX_LISTEN, NamesControl,
    NamesCounters, NamesMode, NamesZone,
};

use super::error::DatapathError;
use super::map_specs::{MapShape, NAMES, Sizes, names_shapes};
use super::object::{create_additional_maps, load_program, processed};
use super::pins::{PinnedLink, PinnedMaps, Pins, unpin};
use super::tc::{
    Attached, Direction, FilterHandle, Interface, Place, detach_filter, end_links, interface_names,
};
use super::units::{UnitHealth, UnitState};
use crate::causes;
use crate::config::KernelMode;
use crate::table::Table;
use kernel::{ClientNetworks, ControlWord, KernelNames, Listeners};
use probe::ProbeState;
pub use probe::{NamesProber, ProbedAnswer};
use table::NameTable;

/// The program's name in the object.
const PROGRAM: &str = "nohop_names";
/// The map that has a [`NamesControl`].
const CONTROL: &str = "NAMES_CONTROL";
/// The unit's name.
const UNIT: &str = "names";
/// Values of `NAMES_LISTEN`: a socket of the daemon's has the address, or one of the unspecified address.
const BOUND: u32 = ListenKey::BOUND;
const SHARED: u32 = ListenKey::SHARED;
/// The most names that are logged one by one at a time.
const MAX_LOGGED: usize = 1_000;
/// What pins of its links begin with.
pub const PIN_PREFIX: &str = "nohop_names_";

/// How names are answered, and for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamesSettings {
    /// When the kernel answers; `None` for never.
    pub mode: Option<KernelMode>,
    /// The zone, in lower case, without dots at the ends.
    pub domain: String,
    /// The time to live of addresses, in seconds.
    pub ttl: u32,
    /// The addresses at which the daemon answers, none unspecified.
    pub listen: Vec<SocketAddr>,
    /// Those at which it does by a socket of the unspecified address: another server may have a socket of
    /// the address itself, which receives in its place.
    pub listen_shared: Vec<SocketAddr>,
    /// The clients that are answered beside the host itself.
    pub allowed: Vec<IpNet>,
    /// The queries a second that a client may send; 0 for any number.
    pub client_rate: u32,
    /// The interfaces by which queries come.
    pub interfaces: Vec<Interface>,
    /// The settings of the host that are off, so that what comes by some of these interfaces is left to
    /// the daemon.
    pub missing_forwarding: Vec<String>,
    /// Whether it is logged how often each name was answered.
    pub is_logged: bool,
}

/// Names, and the number of queries about each that the kernel answered.
type Answered = Vec<(Arc<str>, u64)>;

/// The unit, as far as this kernel has it.
#[derive(Debug)]
pub struct Names {
    loaded: Result<LoadedNames, String>,
}

#[derive(Debug)]
struct LoadedNames {
    ebpf: Ebpf,
    table: NameTable<KernelNames>,
    control: ControlWord<NamesControl>,
    counters: ControlWord<NamesCounters>,
    /// What earlier daemons' programs had counted when this one was loaded.
    before: NamesCounters,
    /// Whether the map has had a whole table: an empty one must not replace one in use.
    is_filled: bool,
    listeners: Listeners,
    networks: ClientNetworks,
    settings: Option<NamesSettings>,
    is_shadow: bool,
    is_ready: bool,
    /// The index of the probe's record.
    probe_record: u32,
    probe_state: ProbeState,
    attached: Vec<(Interface, Attached)>,
    /// Another layout's, until this program is attached, or can't be.
    former: Vec<PinnedLink>,
    /// What tells our filters from those of others.
    handle: FilterHandle,
    /// Whether what earlier daemons attached is detached, except what is replaced.
    is_tidy: bool,
    /// The pins of the maps.
    pinned: PinnedMaps,
    /// Why it isn't attached everywhere.
    problem: Option<String>,
    /// Why some names aren't in the map.
    incomplete: Option<String>,
    /// What of the settings has no room, and is left to the daemon.
    left_out: Option<String>,
    /// Which interface's filter is verified next.
    turn: usize,
    /// The queries about each name at the last look.
    last_queries: HashMap<Arc<str>, u64>,
}

impl Names {
    /// Loads the program over the pinned maps, or over new ones. Nothing is attached yet: an earlier
    /// daemon's program goes on.
    /// `map_creator` is the program that creates the maps, so that they are charged to no memory cgroup.
    pub fn load(sizes: &Sizes, pins: &Pins, map_creator: Option<&Path>) -> Names {
        let loaded = LoadedNames::load(sizes, pins, map_creator);
        if let Err(reason) = &loaded {
            // An earlier daemon's program would go on by names that nothing keeps.
            end_earlier(pins);
            tracing::warn!(
                "the unit {UNIT} doesn't run, so the daemon answers all names: {reason}"
            );
        }
        Names { loaded }
    }

    /// A program of the unit's.
    pub fn program(&self, name: &str) -> Option<&Program> {
        self.loaded.as_ref().ok()?.ebpf.program(name)
    }

    /// Writes the time of a heartbeat, and again whether the daemon can answer: another one that tried to
    /// start has written that it can't.
    pub fn heartbeat(&self, now_ns: u64) {
        if let Ok(loaded) = &self.loaded {
            let is_ready = loaded.is_ready.into();
            loaded.control.update(|control| {
                (control.heartbeat_ns, control.is_ready) = (now_ns, is_ready);
            });
        }
    }

    /// Whether the daemon can answer from its table; at first it can't.
    pub fn set_ready(&mut self, is_ready: bool) {
        let Ok(loaded) = &mut self.loaded else { return };
        if std::mem::replace(&mut loaded.is_ready, is_ready) != is_ready {
            loaded.control.update(|control| control.is_ready = is_ready.into());
        }
    }

    /// Ends what earlier daemons attached, of any layout.
    pub fn end_earlier(&mut self, pins: &Pins) {
        if let Ok(loaded) = &mut self.loaded {
            loaded.end_earlier(pins);
        }
    }

    /// Has another layout's program answer until this one is attached.
    pub fn take_place_of(&mut self, former: Vec<PinnedLink>) {
        match &mut self.loaded {
            Ok(loaded) => loaded.former.extend(former),
            Err(_) => end_former(former),
        }
    }

    /// Updates the map of names to `table`.
    pub fn apply(&mut self, table: &Table, pins: &Pins) {
        let Ok(loaded) = &mut self.loaded else { return };
        loaded.control.update(|control| control.zone.serial = table.generation as u32);
        let incomplete = loaded.table.apply(table);
        loaded.set_incomplete(incomplete);
        if !std::mem::replace(&mut loaded.is_filled, true) {
            self.fix(pins);
        }
    }

    /// Sets how names are answered, and attaches the program.
    pub fn configure(&mut self, settings: NamesSettings, pins: &Pins) {
        let Ok(loaded) = &mut self.loaded else { return };
        if loaded.settings.as_ref() != Some(&settings) {
            let configured = loaded.configure(settings, pins).err();
            if configured.is_some() && loaded.settings.is_none() {
                // Former settings must not go on.
                loaded.control.update(|control| control.mode = NamesMode::Off as u32);
                if !loaded.is_tidy {
                    loaded.end_earlier(pins);
                }
            }
            loaded.set_problem(configured);
        }
    }

    /// Whether connections are only counted: then names aren't answered.
    pub fn set_shadow(&mut self, is_shadow: bool) {
        let Ok(loaded) = &mut self.loaded else { return };
        loaded.is_shadow = is_shadow;
        loaded.set_mode();
    }

    /// Whether a required hook was found detached: what the kernel is to answer is SERVFAIL then.
    pub fn set_detached(&mut self, is_detached: bool) {
        let Ok(loaded) = &mut self.loaded else { return };
        loaded.control.update(|control| control.is_detached = is_detached.into());
    }

    /// Attaches and pins again what isn't, tries names again that the kernel refused, and frees what was
    /// given up.
    pub fn fix(&mut self, pins: &Pins) {
        let Ok(loaded) = &mut self.loaded else { return };
        loaded.table.recycle();
        if loaded.table.is_behind() {
            let incomplete = loaded.table.retry();
            loaded.set_incomplete(incomplete);
        }
        if let Err(error) = loaded.pinned.fix() {
            tracing::debug!("the maps of the unit {UNIT} can't be pinned again: {error}");
        }
        if loaded.settings.is_some() {
            let fixed = loaded.attach(pins).err();
            loaded.set_problem(fixed);
        }
    }

    /// Sends probes that prove whether answers arrive on `lo`; `None` while there are none.
    pub fn prober(&self) -> Option<NamesProber> {
        let loaded = self.loaded.as_ref().ok()?;
        let settings = loaded.settings.as_ref()?;
        if loaded.mode() == NamesMode::Off || loaded.attached.is_empty() {
            return None;
        }
        let (domain, domain_len) = wire(&settings.domain)?;
        Some(NamesProber {
            servers: settings.listen.iter().chain(&settings.listen_shared).copied().collect(),
            domain: domain.get(..domain_len as usize)?.to_vec(),
            records: loaded.table.maps().records().clone(),
            record: loaded.probe_record,
        })
    }

    /// Takes over what probes resulted in: where answers don't arrive, queries pass.
    pub fn record_probes(&mut self, results: Vec<(u64, ProbedAnswer)>) {
        let Ok(loaded) = &mut self.loaded else { return };
        let before = loaded.probe_state.problem().map(str::to_owned);
        let passed = loaded.control.load().passed_on_loopback;
        let passed = loaded.probe_state.record(results, passed);
        loaded.control.update(|control| control.passed_on_loopback = passed);
        match (before, loaded.probe_state.problem()) {
            (None, Some(problem)) => tracing::warn!("{problem}"),
            (Some(_), None) => tracing::info!("the kernel's answers arrive on lo"),
            _ => {}
        }
    }

    /// How many instructions the verifier processed for the program, by its log.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn processed_instructions(
        &self,
        sizes: &Sizes,
        pins: &Pins,
    ) -> Result<(&'static str, Option<u32>), DatapathError> {
        let mut loader = loader(&names_shapes(sizes), pins);
        loader.verifier_log_level(VerifierLogLevel::STATS);
        let mut ebpf = loader.load(NAMES).map_err(DatapathError::Load)?;
        processed(&mut ebpf, PROGRAM)
    }

    /// Detaches the program.
    pub fn detach(&mut self, pins: &Pins) {
        let Ok(loaded) = &mut self.loaded else { return };
        let handle = loaded.handle;
        for (interface, ingress) in loaded.attached.drain(..) {
            let pin = pins.link(&pin_name(&interface));
            ingress.detach(&interface, Place { pin: &pin, handle, direction: Direction::Ingress });
        }
        loaded.settings = None;
        // An earlier daemon's, too.
        end_former(std::mem::take(&mut loaded.former));
        detach_filters(pins);
    }

    /// The unit's state.
    pub fn status(&self) -> UnitHealth {
        let (state, reason) = match &self.loaded {
            Err(reason) => (UnitState::Failed, Some(reason.clone())),
            Ok(LoadedNames { problem: Some(problem), .. }) => {
                (UnitState::Failed, Some(problem.clone()))
            }
            Ok(LoadedNames { settings: None, .. }) => {
                let reason = "this host's interfaces haven't been read";
                (UnitState::Waiting, Some(reason.to_owned()))
            }
            Ok(LoadedNames { is_filled: false, .. }) => {
                (UnitState::Waiting, Some("the first table is awaited".to_owned()))
            }
            Ok(loaded) if loaded.mode() == NamesMode::Off => {
                let reason = if loaded.is_shadow { "shadow mode" } else { "dns.kernel = false" };
                (UnitState::Off, Some(reason.to_owned()))
            }
            Ok(loaded) => {
                let problem = loaded.probe_state.problem().map(str::to_owned);
                let problem = problem.or_else(|| loaded.incomplete.clone());
                let problem = problem.or_else(|| loaded.left_out.clone());
                (UnitState::Attached, problem.or_else(|| loaded.missing_forwarding()))
            }
        };
        UnitHealth { name: UNIT, is_required: false, state, reason }
    }

    /// The names that the kernel answered since the last call. Logs how often, where that is wanted.
    pub fn active_since_last(&mut self) -> Vec<Arc<str>> {
        self.loaded.as_mut().map(LoadedNames::active_since_last).unwrap_or_default()
    }

    /// What programs did since this daemon's was loaded.
    pub fn counters(&self) -> NamesCounters {
        let Ok(loaded) = &self.loaded else { return NamesCounters::default() };
        let (now, before) = (loaded.counters.load(), loaded.before);
        NamesCounters {
            answered: now.answered.wrapping_sub(before.answered),
            failed: now.failed.wrapping_sub(before.failed),
            limited: now.limited.wrapping_sub(before.limited),
            broken: now.broken.wrapping_sub(before.broken),
            ..NamesCounters::default()
        }
    }
}

/// Has the kernel answer names as while no daemon runs, until the one that starts now can: before it binds
/// its sockets, since an earlier one's heartbeat may be fresh. `bpffs` is the directory of the pins.
pub fn announce_start(bpffs: &Path) {
    let pin = bpffs.join(format!("v{LAYOUT}/maps")).join(CONTROL);
    // Mostly there is one.
    if let Ok(control) = ControlWord::<NamesControl>::pinned(&pin, CONTROL) {
        control.store_field(offset_of!(NamesControl, is_ready), 0);
    }
}

impl LoadedNames {
    fn load(sizes: &Sizes, pins: &Pins, map_creator: Option<&Path>) -> Result<LoadedNames, String> {
        let shapes = names_shapes(sizes);
        // Maps of another size are replaced by empty ones, which the first table fills: names and their records
        // together, because an earlier daemon's program goes on by those that it has.
        pins.exist(&pins.maps(), &shapes).map_err(|error| error.to_string())?;
        let both = ["NAMES", "NAME_RECORDS"].map(|name| pins.maps().join(name));
        if both.iter().any(|pin| !pin.exists()) {
            both.iter().try_for_each(|pin| unpin(pin)).map_err(|error| error.to_string())?;
        }
        create_additional_maps(UNIT, &shapes, sizes, map_creator, pins);
        let failed = |error: DatapathError| causes::with_root(&error);
        let ebpf = loader(&shapes, pins).load(NAMES);
        let mut ebpf = ebpf.map_err(|error| failed(DatapathError::Load(error)))?;
        load_program(&mut ebpf, PROGRAM).map_err(failed)?;
        let mut names = KernelNames::take(&mut ebpf).map_err(failed)?;
        names
            .add_probe(sizes.services)
            .map_err(|error| format!("the kernel refused a name in the map NAMES: {error}"))?;
        let table = NameTable::adopt(names, sizes.services)
            .map_err(|error| format!("the map NAMES can't be read: {error}"))?;
        let counters: ControlWord<NamesCounters> =
            ControlWord::take(&mut ebpf, "NAMES_COUNTERS").map_err(failed)?;
        let queries =
            |(name, record): (&Arc<str>, u32)| (name.clone(), table.maps().queries(record));
        let last_queries: HashMap<_, _> = table.records().map(queries).collect();
        Ok(LoadedNames {
            is_filled: !last_queries.is_empty(),
            last_queries,
            before: counters.load(),
            table,
            control: ControlWord::take(&mut ebpf, CONTROL).map_err(failed)?,
            counters,
            listeners: Listeners::take(&mut ebpf).map_err(failed)?,
            networks: ClientNetworks::take(&mut ebpf).map_err(failed)?,
            ebpf,
            settings: None,
            is_shadow: false,
            is_ready: false,
            probe_record: sizes.services,
            probe_state: ProbeState::default(),
            attached: Vec::new(),
            former: Vec::new(),
            handle: FilterHandle::of(pins.dir()),
            is_tidy: false,
            pinned: PinnedMaps::open(shapes.iter().map(|shape| pins.maps().join(shape.name)))
                .map_err(|error| error.to_string())?,
            problem: None,
            incomplete: None,
            left_out: None,
            turn: 0,
        })
    }

    fn configure(&mut self, settings: NamesSettings, pins: &Pins) -> Result<(), String> {
        self.settings = None;
        let domain = wire(&settings.domain).ok_or_else(|| {
            format!(
                "dns.domain = {:?} is longer than {MAX_DOMAIN_LEN} octets in a query",
                settings.domain
            )
        })?;
        let (listen, allowed, left_out) = fit(&settings);
        let refused = |what: &str| {
            let what = what.to_owned();
            move |error: io::Error| format!("the kernel refused {what}: {error}")
        };
        self.listeners.set(&listen).map_err(refused("the addresses of dns.listen"))?;
        self.networks.set(allowed).map_err(refused("the networks of dns.allow"))?;
        const SECOND_NS: u64 = 1_000_000_000;
        let interval_ns = SECOND_NS.checked_div(settings.client_rate.into()).unwrap_or(0);
        let (octets, domain_len) = domain;
        self.control.update(|control| {
            let NamesZone { serial, .. } = control.zone;
            let ttl = settings.ttl;
            control.zone = NamesZone { domain: octets, domain_len, ttl, serial, padding: 0 };
            (control.interval_ns, control.burst_ns) = (interval_ns, SECOND_NS);
            if control.seed == 0 {
                control.seed = fastrand::u64(1..);
            }
        });
        self.left_out = left_out;
        self.settings = Some(settings);
        self.set_mode();
        self.attach(pins)
    }

    fn mode(&self) -> NamesMode {
        match &self.settings {
            Some(settings) if !self.is_shadow => match settings.mode {
                None => NamesMode::Off,
                Some(KernelMode::Always) => NamesMode::Always,
                Some(KernelMode::Standby) => NamesMode::Standby,
            },
            _ => NamesMode::Off,
        }
    }

    /// Why queries by some interfaces are left to the daemon.
    fn missing_forwarding(&self) -> Option<String> {
        let missing = &self.settings.as_ref()?.missing_forwarding;
        let what =
            "is 0, so queries of containers there are answered by the daemon, and not without it";
        (!missing.is_empty()).then(|| format!("{} {what}", missing.join(", ")))
    }

    fn set_mode(&mut self) {
        // Until this daemon has its settings, those of the last one hold.
        if self.settings.is_some() || self.is_shadow {
            let mode = self.mode() as u32;
            self.control.update(|control| control.mode = mode);
        }
    }

    /// Attaches the program to each interface, and detaches it from those that aren't wanted any more.
    fn attach(&mut self, pins: &Pins) -> Result<(), String> {
        let wanted = self.settings.as_ref().map(|settings| settings.interfaces.clone());
        let wanted = wanted.filter(|_| self.is_filled).unwrap_or_default();
        let (kept, gone): (Vec<_>, Vec<_>) =
            self.attached.drain(..).partition(|(interface, _)| wanted.contains(interface));
        self.attached = kept;
        let handle = self.handle;
        for (interface, ingress) in gone {
            let pin = pins.link(&pin_name(&interface));
            ingress.detach(&interface, Place { pin: &pin, handle, direction: Direction::Ingress });
        }
        if self.is_filled && !std::mem::replace(&mut self.is_tidy, true) {
            end_elsewhere(&wanted, pins, handle);
        }
        let mut problem = None;
        let n_interfaces = wanted.len();
        self.turn = self.turn.wrapping_add(1);
        for (idx, interface) in wanted.into_iter().enumerate() {
            let pin = pins.link(&pin_name(&interface));
            let place = Place { pin: &pin, handle, direction: Direction::Ingress };
            let program = program(&mut self.ebpf)?;
            let present = self.attached.iter_mut().find(|(attached, _)| *attached == interface);
            let attached = match present {
                Some((_, Attached::Clsact)) if !is_due(idx, n_interfaces, self.turn) => Ok(()),
                Some((_, ingress)) => ingress.fix(program, &interface, place),
                None => Attached::attach(program, &interface, place)
                    .map(|ingress| self.attached.push((interface.clone(), ingress))),
            };
            // An interface may be gone before that is known here.
            if let Err(error) = attached
                && error.raw_os_error() != Some(libc::ENODEV)
            {
                let why = format!("it can't be attached to {}: {error}", interface.name);
                problem.get_or_insert(why);
            }
        }
        if self.is_filled {
            end_former(std::mem::take(&mut self.former));
        }
        problem.map_or(Ok(()), Err)
    }

    fn end_earlier(&mut self, pins: &Pins) {
        end_former(std::mem::take(&mut self.former));
        end_earlier(pins);
        self.is_tidy = true;
    }

    fn set_incomplete(&mut self, incomplete: Option<String>) {
        if let Some(reason) = incomplete.as_ref().filter(|_| incomplete != self.incomplete) {
            tracing::warn!("not all names are answered by the kernel: {reason}");
        }
        self.incomplete = incomplete;
    }

    fn set_problem(&mut self, problem: Option<String>) {
        if let Some(new) = problem.as_ref().filter(|_| self.problem != problem) {
            tracing::warn!("the unit {UNIT} doesn't run: {new}");
        }
        self.problem = problem;
    }

    /// Logs how many queries about each name the kernel answered, if queries are logged.
    fn log(&self, answered: Answered) {
        let Some(settings) = self.settings.as_ref().filter(|settings| settings.is_logged) else {
            return;
        };
        let (logged, rest) = most_asked(answered);
        for (name, queries) in logged {
            let name = format_args!("{name}.{}.", settings.domain);
            tracing::info!(target: "nohop::query", %name, queries, "answered by the kernel");
        }
        if let Some((names, queries)) = rest {
            tracing::info!(target: "nohop::query", names, queries, "answered by the kernel");
        }
    }

    fn active_since_last(&mut self) -> Vec<Arc<str>> {
        let mut answered = Vec::new();
        let last = std::mem::take(&mut self.last_queries);
        for (name, record) in self.table.records() {
            let queries = self.table.maps().queries(record);
            if queries > 0 {
                // One that is new, or came again, is counted from 0.
                let before = last.get(name).copied().filter(|before| *before <= queries);
                if before != Some(queries) {
                    answered.push((name.clone(), queries - before.unwrap_or(0)));
                }
                self.last_queries.insert(name.clone(), queries);
            }
        }
        let mut active: Vec<_> = answered.iter().map(|(name, _)| name.clone()).collect();
        active.sort_unstable();
        self.log(answered);
        active
    }
}

/// The names with most queries, as many as are logged one by one, the first of them first; and how many others there
/// are, with all their queries.
fn most_asked(mut answered: Answered) -> (Answered, Option<(usize, u64)>) {
    answered.sort_unstable_by(|(name, queries), (other, of_other)| {
        of_other.cmp(queries).then_with(|| name.cmp(other))
    });
    let rest = answered.split_off(answered.len().min(MAX_LOGGED));
    let n_queries = rest.iter().map(|(_, queries)| queries).sum();
    (answered, (!rest.is_empty()).then_some((rest.len(), n_queries)))
}

/// The addresses and networks that the maps have room for, and what is left out: the daemon answers that.
fn fit(settings: &NamesSettings) -> (HashMap<ListenKey, u32>, &[IpNet], Option<String>) {
    let NamesSettings { listen, listen_shared, allowed, .. } = settings;
    let bound = listen.iter().map(|address| (address, BOUND));
    let shared = listen_shared.iter().filter(|address| !listen.contains(address));
    let all = bound.chain(shared.map(|address| (address, SHARED)));
    let key = |(address, value): (&SocketAddr, u32)| (listen_key(*address), value);
    let kept = all.clone().take(MAX_LISTEN).map(key).collect();
    let left_out = |what: String, n: usize, max: usize| {
        format!("{what} and {} more beyond {max} are left to the daemon", n - max - 1)
    };
    let mut notes = Vec::new();
    if let Some((address, _)) = all.clone().nth(MAX_LISTEN) {
        notes.push(left_out(format!("queries at {address}"), all.count(), MAX_LISTEN));
    }
    if let Some(network) = allowed.get(MAX_ALLOWED) {
        notes.push(left_out(format!("clients of {network}"), allowed.len(), MAX_ALLOWED));
    }
    let notes = (!notes.is_empty()).then(|| notes.join("; "));
    (kept, allowed.get(..MAX_ALLOWED).unwrap_or(allowed), notes)
}

/// Whether the filter of an interface is verified in this turn: that of the first, `lo`, always, and of the
/// others one after the other, as each takes the kernel two requests while nothing else can be changed.
fn is_due(interface_idx: usize, n_interfaces: usize, turn: usize) -> bool {
    let n_others = n_interfaces.saturating_sub(1).max(1);
    interface_idx == 0 || interface_idx == 1 + turn % n_others
}

/// Loads the object over its pinned maps.
fn loader(shapes: &[MapShape], pins: &Pins) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    for MapShape { name, max_entries, .. } in shapes {
        loader.map_max_entries(name, *max_entries).map_pin_path(name, pins.maps().join(name));
        if *name == "NAME_RECORDS" {
            loader.map_max_entries("NAME_LABELS", *max_entries);
        }
    }
    loader.map_pin_path("CONTROL", pins.maps().join("CONTROL"));
    loader
}

fn program(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, String> {
    let program = ebpf.program_mut(PROGRAM).ok_or("the object has no program nohop_names")?;
    program.try_into().map_err(|error: aya::programs::ProgramError| error.to_string())
}

/// Ends what a daemon of another layout attached.
fn end_former(former: Vec<PinnedLink>) {
    for PinnedLink { path, link, .. } in former {
        let detached = link.detach();
        if let Err(error) = unpin(&path).map_err(io::Error::other).and(detached) {
            tracing::debug!("{} couldn't be detached: {error}", path.display());
        }
    }
}

/// Ends what an earlier daemon attached.
fn end_earlier(pins: &Pins) {
    end_links(pins, PIN_PREFIX, |_| true);
    detach_filters(pins);
}

/// Ends what an earlier daemon attached to interfaces that aren't wanted.
fn end_elsewhere(wanted: &[Interface], pins: &Pins, handle: FilterHandle) {
    end_links(pins, PIN_PREFIX, |name| !wanted.iter().any(|interface| pin_name(interface) == name));
    let is_wanted = |name: &String| wanted.iter().any(|interface| interface.name == *name);
    interface_names().filter(|name| !is_wanted(name)).for_each(|name| {
        // Mostly there is none.
        let _ = detach_filter(&name, handle, Direction::Ingress);
    });
}

/// Removes the filters that no link holds. Returns how many there were.
pub fn detach_filters(pins: &Pins) -> usize {
    let handle = FilterHandle::of(pins.dir());
    interface_names().filter(|name| detach_filter(name, handle, Direction::Ingress).is_ok()).count()
}

/// Names of pins have no dots, so it is the interface's number.
fn pin_name(interface: &Interface) -> String {
    format!("{PIN_PREFIX}{}", interface.index)
}

fn listen_key(address: SocketAddr) -> ListenKey {
    let octets = match address.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    ListenKey { address: Address { octets }, port: address.port(), padding: [0; 6] }
}

/// A domain on the wire, filled up with zeros, and its length; `None` if it is too long.
fn wire(domain: &str) -> Option<([u8; 64], u32)> {
    let mut octets = [0; 64];
    let mut len = 0;
    for label in domain.split('.').filter(|label| !label.is_empty()) {
        octets.get_mut(len..=len + label.len())?[0] = u8::try_from(label.len()).ok()?;
        octets[len + 1..=len + label.len()].copy_from_slice(label.to_ascii_lowercase().as_bytes());
        len += 1 + label.len();
    }
    (len < MAX_DOMAIN_LEN).then_some((octets, len as u32 + 1))
}

/// The kernel's answer to a message, with the program's own functions; `None` where the daemon answers.
#[cfg(any(fuzzing, test))]
pub fn answered(
    message: &[u8],
    table: &Table,
    config: &crate::config::DnsConfig,
) -> Option<Vec<u8>> {
    use lb_common::{NameAddresses, NameKey, NameRecord, answer, answer_len, read_query};
    let (domain, domain_len) = wire(&config.domain)?;
    let (ttl, serial) = (config.ttl, table.generation as u32);
    let zone = NamesZone { domain, domain_len, ttl, serial, padding: 0 };
    let mut key = NameKey { octets: [0; 64] };
    let query = read_query(message, message.len() as u32, &zone, &mut key)?;
    let ((vip, vip6), flags) = table::answered(table.services.get(&*table::label(&key))?);
    if flags & NameRecord::COLD != 0 || !query.is_about_addresses(true) {
        return None;
    }
    let vip6 = (flags & NameRecord::HAS_VIP6 != 0).then(|| vip6.octets());
    let addresses = NameAddresses { vip: vip.octets(), vip6 };
    let mut answered = message.to_vec();
    answered.resize(answer_len(&query, &addresses) as usize, 0);
    answer(&mut answered[..], &query, &addresses, &zone);
    Some(answered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_named() {
        let mut settings = NamesSettings {
            mode: None,
            domain: "service".into(),
            ttl: 5,
            listen: (0..MAX_LISTEN as u16).map(|port| ([10, 0, 0, 1], port).into()).collect(),
            listen_shared: vec![([10, 0, 0, 1], 0).into()],
            allowed: (0..MAX_ALLOWED as u32).map(net).collect(),
            client_rate: 0,
            interfaces: Vec::new(),
            missing_forwarding: Vec::new(),
            is_logged: false,
        };
        let (listen, allowed, note) = fit(&settings);
        assert_eq!((listen.len(), allowed.len(), note), (MAX_LISTEN, MAX_ALLOWED, None));
        assert!(listen.values().all(|value| *value == BOUND));
        settings.listen_shared.extend([7, 8].map(|port| SocketAddr::from(([10, 0, 0, 2], port))));
        settings.allowed.push(net(MAX_ALLOWED as u32));
        let (listen, allowed, note) = fit(&settings);
        assert_eq!((listen.len(), allowed.len()), (MAX_LISTEN, MAX_ALLOWED));
        assert_eq!(
            note.as_deref(),
            Some(
                "queries at 10.0.0.2:7 and 1 more beyond 256 are left to the daemon; clients of \
                 10.4.0.0/24 and 0 more beyond 1024 are left to the daemon"
            )
        );
    }

    fn net(n: u32) -> IpNet {
        let address = std::net::Ipv4Addr::from(0x0a00_0000 + n * 256);
        IpNet::new(address.into(), 24).unwrap()
    }

    #[test]
    fn the_names_that_are_asked_for_most_are_logged() {
        let of = |n: usize| (0..n).map(|n| (format!("n{n}").into(), n as u64 + 1)).collect();
        let (logged, rest) = most_asked(of(MAX_LOGGED));
        assert_eq!((logged.len(), rest), (MAX_LOGGED, None));
        let (logged, rest) = most_asked(of(MAX_LOGGED + 2));
        assert_eq!((logged.len(), rest), (MAX_LOGGED, Some((2, 1 + 2))));
        assert_eq!(logged[0], ("n1001".into(), 1_002));
    }

    #[test]
    fn filters_are_verified_in_turn() {
        let due = |n_interfaces: usize, turn| -> Vec<usize> {
            (0..n_interfaces).filter(|&idx| is_due(idx, n_interfaces, turn)).collect()
        };
        assert_eq!([0, 1, 2, 3].map(|turn| due(4, turn)), [[0, 1], [0, 2], [0, 3], [0, 1]]);
        assert_eq!((due(1, 5), due(0, 5)), (vec![0], vec![]));
    }

    #[test]
    fn domains_on_the_wire() {
        let shown =
            |domain: &str| wire(domain).map(|(octets, len)| octets[..len as usize].to_vec());
        assert_eq!(shown("Service").as_deref(), Some(&b"\x07service\0"[..]));
        assert_eq!(shown("lb.example").as_deref(), Some(&b"\x02lb\x07example\0"[..]));
        let label = "a".repeat(61);
        assert_eq!(shown(&label).map(|wire| wire.len()), Some(63));
        assert_eq!(shown(&format!("{label}a")), None);
        assert_eq!(shown(&format!("{label}.{label}")), None);
    }
}
