//! How the kernel side starts: over the maps that an earlier daemon pinned or over new ones, in the
//! place of its programs; and how all of it is removed.

use std::io;
use std::path::Path;

use aya::Ebpf;
use lb_common::{BalanceSettings, ENTRIES_PER_BACKEND};

use super::activity::Usage;
use super::btf::SocketBits;
use super::conns::TcpConns;
use super::control::Datapath;
use super::edge::Edge;
use super::error::DatapathError;
use super::features::Features;
use super::former::FormerPins;
use super::in_flight::Recounter;
use super::intercept::Intercept;
use super::kernel::KernelMaps;
use super::links::{self, ServedCgroup, Units};
use super::map_specs::{Sizes, socket_shapes};
use super::names::Names;
use super::object::load;
use super::obstacles::{self, Obstacle};
use super::options::Options;
use super::pins::{PinnedMaps, Pins, ensure_bpffs};
use super::reconcile::adopt::AdoptError;
use super::reconcile::{Reconciler, Served};
use super::socket_terminator::SocketTerminator;
use super::tcp_terminator::TcpTerminator;
use super::units::{UNITS, Unit};
use crate::config::{DatapathConfig, cgroup};

impl Datapath {
    /// Loads the programs, over the maps that an earlier daemon pinned or over new ones, and
    /// attaches them, replacing earlier ones. New maps that replace
    /// others are used once [`Datapath::apply`] has filled them.
    ///
    /// Minimum kernel: 5.10.
    ///
    /// # Errors
    /// When another daemon has the pins, something else has their names, the scope is no cgroup v2
    /// directory, or the kernel refuses for lack of a feature or of privileges. Then an earlier
    /// daemon's datapath stays in use, and nothing new remains.
    pub fn start(options: &Options) -> Result<Datapath, DatapathError> {
        let note = cgroup::inspect(&options.scope)?;
        let cgroup = ServedCgroup::open(&options.scope)?;
        // Before anything is created. If the query fails, attaching reports the obstacle.
        if let Ok(Some(obstacle)) = obstacle(options.units, &options.scope, &options.bpffs) {
            return Err(DatapathError::Obstacle(obstacle));
        }
        let mut features = Features::probe()?;
        if !options.reads_btf {
            features.sockets = SocketBits::default();
        }
        if let Some(refusal) = options.refusal {
            features.refusal = refusal;
        }
        ensure_bpffs(&options.bpffs)?;
        let former = FormerPins::open(&options.scope, &options.bpffs)?;
        let pins = Pins::open(&options.bpffs, options.layout)?;
        let (was_empty, had_links) = (pins.is_empty()?, !pins.all_links()?.is_empty());
        let storages = pins.take_other_storages()?;
        let started = Datapath::start_over(pins, &cgroup, options, features).map(|mut datapath| {
            datapath.notes.extend(note);
            datapath.former = former;
            datapath
        });
        if started.is_err()
            && let Err(error) = undo_start(options, storages, had_links, was_empty)
        {
            // The first error is the one to report.
            tracing::warn!("what the failed start has made couldn't be taken away: {error}");
        }
        started
    }

    /// Starts with the pinned maps.
    fn start_over(
        pins: Pins,
        cgroup: &ServedCgroup,
        options: &Options,
        mut features: Features,
    ) -> Result<Datapath, DatapathError> {
        let first = first_unit(options)?;
        pins.make_directories()?;
        pins.exist(&pins.sockets(), &socket_shapes())?;
        let is_live = links::are_attached(&pins, cgroup)?;
        let Fitted { sizes, note, served, mut loaded } =
            Fitted::new(options, &pins, &mut features, is_live)?;

        if loaded.is_none() && pins.exist(&pins.maps(), &sizes.shapes())? {
            loaded = Loaded::over_earlier(options, &sizes, &pins, &mut features, is_live)?;
        }
        let is_adopted = loaded.is_some();
        // New maps are no reason to leave shadow mode before the source has answered.
        let is_shadow = options.is_shadow || !is_adopted && is_live && pins.are_in_shadow();
        let loaded = match loaded {
            Some(loaded) => loaded,
            None => {
                pins.remove_maps()?;
                Loaded::over_new(load(first, options, &sizes, &pins, &mut features)?, &sizes)?
            }
        };
        pins.pin_by_both_names()?;
        let Loaded { ebpf, mut reconciler } = loaded;
        if !is_adopted {
            reconciler.prefer_served(served);
        }
        let maps = reconciler.maps_mut();
        let (counters, control_block) = (maps.counters(), maps.control_block());
        let usage = Usage::begin(reconciler.service_indices(), counters.clone());
        let maps = reconciler.maps_mut();
        let conns = TcpConns::new(maps.records(), pins.sockets());
        let recounter = Recounter::new(counters.clone(), conns.clone(), options.layout);
        let tcp_terminator = TcpTerminator::new(conns);
        let socket_terminator = SocketTerminator::new(maps.generations(), pins.sockets());
        let map_names = sizes.shapes().into_iter().map(|shape| pins.maps().join(shape.name));
        let socket_names = socket_shapes().into_iter().map(|shape| pins.sockets().join(shape.name));
        let pinned_maps = PinnedMaps::open(map_names.chain(socket_names))?;
        let units = Units::load(&options.scope, options.units, ebpf, |unit| {
            load(unit, options, &sizes, &pins, &mut features)
        })?;
        let names = Names::load(&sizes, &pins, options.map_creator.as_deref());
        let intercept = Intercept::new(&options.vip, &sizes);
        let records = recounter.edge().clone();
        let edge = Edge::new(&sizes, options.map_creator.clone(), counters.clone(), records, &pins);
        let mut datapath = Datapath {
            reconciler,
            counters,
            usage,
            control_block,
            units,
            names,
            intercept,
            edge,
            pins,
            pinned_maps,
            former: FormerPins::default(),
            socket_terminator,
            recounter,
            balance: BalanceSettings::default(),
            tcp_terminator,
            features,
            excluded: options.datapath.exclude_cgroups.clone(),
            notes: note.into_iter().collect(),
            exclusions: Vec::new(),
            pool_network: options.vip.pool.network(),
            is_adopted,
        };
        // Before a connection can meet programs of ours.
        datapath.publish_identity(options.host_netns);
        datapath.configure_balance(&options.balance);
        if is_shadow {
            datapath.set_shadow(true);
        }
        datapath.resolve_bypass();
        // Empty maps must not replace those in use.
        if is_adopted || !is_live {
            let switched = datapath.switch();
            // The maps may be read on, and another process get our number.
            switched.inspect_err(|_| datapath.keep())?;
            if !is_adopted {
                // Until there is a table, what they answer leads nowhere.
                datapath.names.end_earlier(&datapath.pins);
            }
        }
        Ok(datapath)
    }
}

/// The sizes of the maps, and what follows from the maps of an earlier daemon.
struct Fitted {
    sizes: Sizes,
    /// Why the sizes aren't the configuration's.
    note: Option<String>,
    /// The services that the earlier maps serve, where these were looked at.
    served: Served,
    /// Over the earlier maps, where those are used on although other sizes are configured.
    loaded: Option<Loaded>,
}

impl Fitted {
    /// As configured, but where that has no room for what earlier maps serve: those keep their sizes.
    fn new(
        options: &Options,
        pins: &Pins,
        features: &mut Features,
        is_live: bool,
    ) -> Result<Fitted, DatapathError> {
        let wanted = Sizes::of(&options.datapath, &options.vip);
        let as_wanted = Fitted { sizes: wanted, note: None, served: Served::new(), loaded: None };
        let earlier = Sizes::pinned(&pins.maps()).filter(|earlier| is_live && *earlier != wanted);
        let Some(earlier) = earlier else { return Ok(as_wanted) };
        if !pins.exist(&pins.maps(), &earlier.shapes())? {
            return Ok(as_wanted);
        }
        let Some(loaded) = Loaded::over_earlier(options, &earlier, pins, features, is_live)? else {
            return Ok(as_wanted);
        };
        let (in_use, served) = (loaded.reconciler.in_use(), loaded.reconciler.served());
        let sizes = wanted.with_room_for(&in_use, &earlier);
        let note = too_small(options, &wanted, &sizes, &in_use);
        let loaded = (sizes == earlier).then_some(loaded);
        Ok(Fitted { sizes, note, served, loaded })
    }
}

/// The problem of sizes below what is in use.
fn too_small(options: &Options, wanted: &Sizes, kept: &Sizes, in_use: &Sizes) -> Option<String> {
    let DatapathConfig { max_services, max_backends, .. } = options.datapath;
    let said = |key: &str, value: u32, n: u32, of: &str, kept: u32| {
        format!(
            "datapath.{key} = {value} has no room for the {n} {of} that are served: the kernel keeps room \
             for {kept}, so that none is lost; raise the key, or restart once there are fewer"
        )
    };
    let (services, backends) = (("max_services", max_services), ("max_backends", max_backends));
    // Of backends and slots there is room for those that a change replaces, too.
    let maps = [
        (services, "services", [wanted, kept, in_use].map(|of| of.services), 1),
        (services, "frontends", [wanted, kept, in_use].map(|of| of.frontends), 1),
        (services, "IPv6 frontends", [wanted, kept, in_use].map(|of| of.frontends6), 1),
        (backends, "backends", [wanted, kept, in_use].map(|of| of.backends), ENTRIES_PER_BACKEND),
        (backends, "slots", [wanted, kept, in_use].map(|of| of.slots), 2),
    ];
    maps.into_iter().find(|(_, _, [wanted, kept, _], _)| kept > wanted).map(
        |((key, value), what, [_, kept, in_use], per)| said(key, value, in_use, what, kept / per),
    )
}

/// The unit that makes the maps of the table.
fn first_unit(options: &Options) -> Result<&'static Unit, DatapathError> {
    options.units.first().ok_or(DatapathError::Object { missing: "unit" })
}

/// That unit in the kernel, not yet attached.
struct Loaded {
    ebpf: Ebpf,
    reconciler: Reconciler<KernelMaps>,
}

impl Loaded {
    /// With the pinned maps; `None` if they can't be used and new ones are better.
    fn over_earlier(
        options: &Options,
        sizes: &Sizes,
        pins: &Pins,
        features: &mut Features,
        is_live: bool,
    ) -> Result<Option<Loaded>, DatapathError> {
        let mut ebpf = load(first_unit(options)?, options, sizes, pins, features)?;
        let maps = KernelMaps::take(&mut ebpf)?;
        // An earlier daemon died while it filled new maps; the hooks read the former ones.
        if is_live && maps.control_block().daemon().is_synced == 0 {
            return Ok(None);
        }
        match Reconciler::adopt(maps, sizes, fastrand::u32(..)) {
            Ok(reconciler) => Ok(Some(Loaded { ebpf, reconciler })),
            Err(error @ AdoptError::Inconsistent { .. }) => {
                tracing::warn!("{error}; new ones are created");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn over_new(mut ebpf: Ebpf, sizes: &Sizes) -> Result<Loaded, DatapathError> {
        let maps = KernelMaps::take(&mut ebpf)?;
        let reconciler = Reconciler::new(maps, sizes, fastrand::u32(..));
        Ok(Loaded { ebpf, reconciler })
    }
}

/// Takes away what a failed start has made, and pins again what it has set aside.
fn undo_start(
    options: &Options,
    storages: PinnedMaps,
    had_links: bool,
    was_empty: bool,
) -> Result<(), DatapathError> {
    let Some(pins) = Pins::open_existing(&options.bpffs)? else { return Ok(()) };
    storages.put_back()?;
    if !had_links {
        links::detach_pinned(&pins)?;
    }
    if was_empty {
        pins.remove_all()?;
    }
    Ok(())
}

/// Finds an obstacle to attaching to `scope`; `None` if there is none. Hooks with a link pinned in
/// `bpffs` need no new one.
///
/// # Errors
/// When the kernel refuses the query, such as for lack of CAP_NET_ADMIN.
pub fn find_obstacle(scope: &Path, bpffs: &Path) -> io::Result<Option<Obstacle>> {
    obstacle(UNITS, scope, bpffs)
}

fn obstacle(units: &'static [Unit], scope: &Path, bpffs: &Path) -> io::Result<Option<Obstacle>> {
    let attached = links::find_attached(bpffs, scope);
    let required = units.iter().filter(|unit| unit.is_required).flat_map(|unit| unit.hooks);
    obstacles::find(scope, required.filter(|hook| !attached.contains(hook.program)))
}

/// Detaches and removes whatever a daemon left pinned in `bpffs`. Returns the number of links.
///
/// # Errors
/// When a daemon still runs there, or the kernel refuses.
pub fn unload(bpffs: &Path) -> Result<usize, DatapathError> {
    unload_after(bpffs, || true)
}

/// [`unload`], after something that has to be done once it is known that no daemon runs there; if that returns false,
/// nothing is detached.
///
/// # Errors
/// See there.
pub fn unload_after(bpffs: &Path, first: impl FnOnce() -> bool) -> Result<usize, DatapathError> {
    let pins = Pins::open_existing(bpffs)?;
    if !first() {
        return Ok(0);
    }
    pins.map_or(Ok(0), |pins| links::end_all(&pins))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    /// The note names the keys that are too small.
    #[test]
    fn too_small_names_what_is_short() {
        let config = Config::default();
        let options = Options::of(&config, Path::new("/"));
        let wanted = Sizes { services: 4, frontends: 8, frontends6: 8, slots: 32, backends: 16 };
        let in_use = Sizes { services: 3, frontends: 9, frontends6: 10, slots: 40, backends: 7 };
        let table = [
            (
                Sizes { services: 5, ..wanted },
                "the 3 services that are served: the kernel keeps room for 5",
            ),
            (Sizes { frontends: 16, ..wanted }, "the 9 frontends that"),
            (Sizes { frontends6: 16, ..wanted }, "the 10 IPv6 frontends that"),
            (
                Sizes { slots: 128, ..wanted },
                "datapath.max_backends = 131072 has no room for the 40 slots",
            ),
            (Sizes { backends: 64, ..wanted }, "the 7 backends that"),
        ];
        for (kept, expected) in table {
            let note = too_small(&options, &wanted, &kept, &in_use).unwrap();
            assert!(note.contains(expected), "no {expected:?} in {note}");
        }
        assert_eq!(too_small(&options, &wanted, &wanted, &in_use), None);
    }
}
