//! The units in the kernel: what attaches their programs, watches the links and hands them over.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;

use super::bpf::Link;
use super::error::DatapathError;
use super::object::program_fd;
use super::pins::{self, Collected, PinnedLink, Pins, unpin};
use super::units::{AttachPoint, Hook, UNITS, Unit, UnitHealth, UnitState, hooks};
use super::{cause, edge, names, obstacles};
use crate::causes;

/// The cgroup that is served.
#[derive(Debug)]
pub struct ServedCgroup {
    directory: File,
    cgroup_id: u64,
}

impl ServedCgroup {
    /// Opens it.
    ///
    /// # Errors
    /// When the directory can't be opened.
    pub fn open(scope: &Path) -> Result<ServedCgroup, DatapathError> {
        let error = |source| DatapathError::Cgroup { cgroup: scope.into(), source };
        let directory = File::open(scope).map_err(error)?;
        let cgroup_id = directory.metadata().map_err(error)?.st_ino();
        Ok(ServedCgroup { directory, cgroup_id })
    }

    /// Whether a link is attached to this hook's target.
    fn has(&self, link: &Link, hook: &Hook) -> io::Result<bool> {
        let AttachPoint::Cgroup(attach_type) = hook.target;
        Ok(link.info()?.is_some_and(|info| {
            info.cgroup_id == self.cgroup_id && info.attach_type == attach_type.number
        }))
    }
}

/// The hook that a pinned link has the name of.
fn hook_of(pinned: &PinnedLink) -> Option<(usize, &'static Hook)> {
    hooks(UNITS).enumerate().find(|(_, hook)| pinned.name == hook.program)
}

/// The programs among these links that are attached to their hook's target.
fn attached(links: &[PinnedLink], cgroup: &ServedCgroup) -> BTreeSet<&'static str> {
    let attached = |pinned: &PinnedLink| {
        let (_, hook) = hook_of(pinned)?;
        cgroup.has(&pinned.link, hook).unwrap_or(false).then_some(hook.program)
    };
    links.iter().filter_map(attached).collect()
}

/// Whether an earlier daemon's hooks serve this cgroup.
///
/// # Errors
/// When the pins can't be read.
pub fn are_attached(pins: &Pins, cgroup: &ServedCgroup) -> Result<bool, DatapathError> {
    Ok(!attached(&pins.all_links()?, cgroup).is_empty())
}

/// The programs of links pinned in `bpffs` that are attached to their hook of `scope`, as far as
/// that can be read.
pub fn find_attached(bpffs: &Path, scope: &Path) -> BTreeSet<&'static str> {
    let Ok(cgroup) = ServedCgroup::open(scope) else { return BTreeSet::new() };
    attached(&pins::links_in(bpffs).unwrap_or_default(), &cgroup)
}

/// Whether a link of this layout is that of a unit which replaces its own.
fn is_replaced_later(pinned: &PinnedLink, pins: &Pins) -> bool {
    let name = pinned.name.to_string_lossy();
    let prefixes = [names::PIN_PREFIX, edge::PIN_PREFIX];
    prefixes.iter().any(|prefix| name.starts_with(prefix)) && pinned.path == pins.link(&name)
}

/// The order of attaching reversed. A hook that this version doesn't know is a later version's, and
/// goes first.
fn sort_for_detaching(links: &mut [PinnedLink]) {
    links.sort_by_key(|pinned| Reverse(hook_of(pinned).map_or(usize::MAX, |(idx, _)| idx)));
}

/// Detaches every pinned link of every layout: what fails with one keeps none of the others attached. Returns
/// how many there were.
///
/// # Errors
/// The first one: the kernel refuses, or something that isn't a link lies where links are.
pub fn detach_pinned(pins: &Pins) -> Result<usize, DatapathError> {
    let Collected { mut links, problem } = pins.readable_links()?;
    sort_for_detaching(&mut links);
    let ended: Vec<_> = links.iter().map(end).collect();
    ended.into_iter().collect::<Result<(), _>>()?;
    problem.map_or(Ok(links.len()), |problem| Err(problem.into()))
}

/// Detaches what is pinned, and removes the pins. Returns the number of links.
///
/// # Errors
/// When the kernel refuses.
pub fn end_all(pins: &Pins) -> Result<usize, DatapathError> {
    let n_links = detach_pinned(pins);
    let n_filters = names::detach_filters(pins) + edge::detach_filters(pins);
    // A link that is left needs its pin.
    let n_links = n_links?;
    pins.remove_all()?;
    Ok(n_links + n_filters)
}

/// Detaches a pinned link and removes the pin. A later version's hook may be of a kind that can't be
/// detached: it ends with its pin.
fn end(PinnedLink { path, link, .. }: &PinnedLink) -> Result<(), DatapathError> {
    if let Err(source) = link.detach() {
        if link.info().is_ok_and(|info| info.is_some()) {
            return Err(DatapathError::Link { action: "detach", link: path.clone(), source });
        }
        tracing::debug!("{} ends with its pin: {source}", path.display());
    }
    Ok(unpin(path)?)
}

/// The result of a check of the hooks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// The programs of required units that were found detached. They are attached again unless there
    /// is a problem.
    pub lost: BTreeSet<&'static str>,
    /// Why hooks of a required unit couldn't be attached again.
    pub problem: Option<String>,
    /// Whether hooks of any unit were attached again, which missed what happened meanwhile.
    pub is_after_gap: bool,
}

impl Attachment {
    /// Whether all hooks of the required units run now.
    pub fn is_complete(&self) -> bool {
        self.problem.is_none()
    }
}

/// A unit of this daemon.
#[derive(Debug)]
struct LoadedUnit {
    unit: &'static Unit,
    /// Its programs; `None` where the kernel refused them.
    ebpf: Option<Ebpf>,
    /// Its links, in the order of its hooks; empty while it isn't attached.
    links: Vec<Link>,
    /// Why it isn't loaded or attached.
    problem: Option<String>,
}

/// The units of a datapath.
#[derive(Debug)]
pub struct Units {
    scope: PathBuf,
    units: Vec<LoadedUnit>,
    /// Whether the hooks run this datapath's programs, and not an earlier daemon's.
    are_switched: bool,
}

impl Units {
    /// Loads `units` for `scope`, of which the first is loaded already. Nothing is attached yet.
    ///
    /// # Errors
    /// When the kernel refuses a required one.
    pub fn load(
        scope: &Path,
        units: &'static [Unit],
        first: Ebpf,
        mut load: impl FnMut(&Unit) -> Result<Ebpf, DatapathError>,
    ) -> Result<Units, DatapathError> {
        let mut first = Some(first);
        let mut loaded = Vec::new();
        for unit in units {
            let ebpf = first.take().map_or_else(|| load(unit), Ok);
            let (ebpf, problem) = match ebpf {
                Ok(ebpf) => (Some(ebpf), None),
                Err(error) if unit.is_required => return Err(error),
                Err(error) => (None, Some(causes::with_root(&error))),
            };
            let mut this = LoadedUnit { unit, ebpf, links: Vec::new(), problem: None };
            this.set_problem(problem);
            loaded.push(this);
        }
        Ok(Units { scope: scope.into(), units: loaded, are_switched: false })
    }

    /// The cgroup that is served.
    pub fn scope(&self) -> &Path {
        &self.scope
    }

    /// Whether the hooks run this datapath's programs, and not an earlier daemon's.
    pub fn are_switched(&self) -> bool {
        self.are_switched
    }

    /// The names of the programs that are loaded.
    pub fn programs(&self) -> impl Iterator<Item = &'static str> {
        let loaded = self.units.iter().filter(|unit| unit.ebpf.is_some());
        loaded.flat_map(|unit| unit.unit.hooks).map(|hook| hook.program)
    }

    /// The programs and maps that are loaded, in the order of the units.
    pub fn loaded(&self) -> impl Iterator<Item = &Ebpf> {
        self.units.iter().filter_map(|unit| unit.ebpf.as_ref())
    }

    /// The same, to change.
    pub fn loaded_mut(&mut self) -> impl Iterator<Item = &mut Ebpf> {
        self.units.iter_mut().filter_map(|unit| unit.ebpf.as_mut())
    }

    /// Whether a unit's hooks run this datapath's programs.
    pub fn is_attached(&self, name: &str) -> bool {
        let is_it = |loaded: &LoadedUnit| loaded.unit.name == name && !loaded.links.is_empty();
        self.are_switched && self.units.iter().any(is_it)
    }

    /// How each unit does.
    pub fn status(&self) -> Vec<UnitHealth> {
        let status = |LoadedUnit { unit, problem, .. }: &LoadedUnit| {
            let (state, reason) = match problem {
                Some(problem) => (UnitState::Failed, Some(problem.clone())),
                None if !self.are_switched => {
                    let reason = "the hooks still run an earlier daemon's programs";
                    (UnitState::Waiting, Some(reason.to_owned()))
                }
                None => (UnitState::Attached, None),
            };
            let Unit { name, is_required, .. } = **unit;
            UnitHealth { name, is_required, state, reason }
        };
        self.units.iter().map(status).collect()
    }

    /// Makes the hooks run these programs: an earlier daemon's links get them in place, so that no
    /// connection is missed; others are made. Then nothing but these is left pinned. Returns whether hooks of any unit
    /// were made, which missed what happened before.
    ///
    /// Links of the unit `names` of other layouts, which answer until they are ended, go to `of_names`, also where
    /// there is an error.
    ///
    /// # Errors
    /// When the kernel refuses a required unit; the next call continues where this one stopped.
    pub fn switch(
        &mut self,
        pins: &Pins,
        of_names: &mut Vec<PinnedLink>,
    ) -> Result<bool, DatapathError> {
        let cgroup = ServedCgroup::open(&self.scope)?;
        let mut earlier = pins.all_links()?;
        let before = attached(&earlier, &cgroup);
        for unit in self.units.iter_mut().filter(|unit| unit.ebpf.is_some()) {
            match unit.attach(&self.scope, &cgroup, pins, &mut earlier) {
                Err(error) if unit.unit.is_required => return Err(error),
                attached => unit.set_problem(attached.err().map(|error| causes::with_root(&error))),
            }
        }
        self.are_switched = true;
        // Those of the units `names` and `edge` are replaced once these are configured.
        earlier.retain(|pinned| !is_replaced_later(pinned, pins));
        let is_of_names =
            |pinned: &mut PinnedLink| pinned.name.to_string_lossy().starts_with(names::PIN_PREFIX);
        of_names.extend(earlier.extract_if(.., is_of_names));
        // The rest, such as links to another cgroup, ends here.
        sort_for_detaching(&mut earlier);
        let attached = self.units.iter().filter(|unit| !unit.links.is_empty());
        let attached = attached.flat_map(|unit| unit.unit.hooks);
        let is_after_gap = attached.clone().any(|hook| !before.contains(hook.program));
        let own: BTreeSet<PathBuf> = attached.map(|hook| pins.link(hook.program)).collect();
        for pinned in earlier {
            // The pin is the new link's by now.
            if own.contains(&pinned.path) {
                if let Err(error) = pinned.link.detach() {
                    tracing::debug!("a link couldn't be detached: {error}");
                }
            } else {
                end(&pinned)?;
            }
        }
        pins.remove_other_layouts()?;
        Ok(is_after_gap)
    }

    /// Checks every link; attaches and pins again what isn't attached or pinned any more. A unit
    /// that couldn't be attached is tried again.
    pub fn fix(&mut self, pins: &Pins) -> Attachment {
        let mut attachment = Attachment::default();
        if !self.are_switched {
            return attachment;
        }
        let cgroup = ServedCgroup::open(&self.scope);
        // The kernel refused the programs, and would again.
        for unit in self.units.iter_mut().filter(|unit| unit.ebpf.is_some()) {
            let fixed = match &cgroup {
                Ok(cgroup) => unit.fix(&self.scope, cgroup, pins, &mut attachment),
                Err(error) => Err(error.to_string()),
            };
            unit.set_problem(fixed.err());
            if unit.unit.is_required && attachment.problem.is_none() {
                attachment.problem.clone_from(&unit.problem);
            }
        }
        attachment
    }

    /// Detaches the programs in the opposite order, and removes the links' pins. A link that is
    /// detached already is no error.
    pub fn detach(&mut self, pins: &Pins) {
        for unit in self.units.iter_mut().rev() {
            unit.detach(pins);
        }
        self.are_switched = false;
    }
}

impl LoadedUnit {
    /// Sets the reason why it doesn't run, and logs a new one of a unit that isn't required.
    fn set_problem(&mut self, problem: Option<String>) {
        if let Some(new) = problem.as_ref().filter(|_| self.problem != problem)
            && !self.unit.is_required
        {
            tracing::warn!("the unit {} doesn't run: {new}", self.unit.name);
        }
        self.problem = problem;
    }

    /// Attaches the unit, by links of `earlier` where there are any of its hooks. One that isn't
    /// required is detached as a whole where a hook of it can't be attached.
    fn attach(
        &mut self,
        scope: &Path,
        cgroup: &ServedCgroup,
        pins: &Pins,
        earlier: &mut Vec<PinnedLink>,
    ) -> Result<(), DatapathError> {
        let Some(ebpf) = &self.ebpf else { return Ok(()) };
        let mut attach = |hook: &Hook| -> Result<Link, DatapathError> {
            let is_this = |pinned: &PinnedLink| {
                pinned.name == hook.program && cgroup.has(&pinned.link, hook).unwrap_or(false)
            };
            let path = pins.link(hook.program);
            // Unused links stay among the earlier ones, which end.
            if let Some(at) = earlier.iter().position(is_this)
                && earlier[at].link.replace(program_fd(ebpf, hook.program)?).is_ok()
            {
                if earlier[at].path != path {
                    pin_at(&earlier[at].link, &path)?;
                }
                return Ok(earlier.swap_remove(at).link);
            }
            let link = attach_hook(ebpf, hook, scope, cgroup)?;
            pin_at(&link, &path)?;
            Ok(link)
        };
        let mut links = Vec::new();
        let attached = self.unit.hooks.iter().try_for_each(|hook| {
            links.push(attach(hook)?);
            Ok(())
        });
        if attached.is_ok() {
            self.links = links;
        } else if !self.unit.is_required {
            self.links = links;
            self.detach(pins);
        }
        attached
    }

    /// Attaches and pins again what isn't. A unit that isn't required is detached as a whole where a
    /// hook of it can't be attached.
    fn fix(
        &mut self,
        scope: &Path,
        cgroup: &ServedCgroup,
        pins: &Pins,
        attachment: &mut Attachment,
    ) -> Result<(), String> {
        let Some(ebpf) = &self.ebpf else { return Ok(()) };
        let Unit { name, is_required, .. } = *self.unit;
        let mut is_after_gap = self.links.is_empty();
        let fixed = if is_after_gap {
            self.attach(scope, cgroup, pins, &mut Vec::new())
        } else {
            self.links.iter_mut().zip(self.unit.hooks).try_for_each(|(link, hook)| {
                let path = pins.link(hook.program);
                // A kernel that doesn't answer is no reason to attach twice.
                let is_attached = cgroup.has(link, hook).unwrap_or(true);
                if !is_attached {
                    is_after_gap = true;
                    if is_required {
                        attachment.lost.insert(hook.program);
                    } else {
                        tracing::warn!("something detached {} of the unit {name}", hook.program);
                    }
                    *link = attach_hook(ebpf, hook, scope, cgroup)?;
                }
                if is_attached && path.exists() { Ok(()) } else { pin_at(link, &path) }
            })
        };
        attachment.is_after_gap |= is_after_gap && fixed.is_ok();
        if fixed.is_err() && !is_required {
            self.detach(pins);
        }
        fixed.map_err(|error| error.to_string())
    }

    fn detach(&mut self, pins: &Pins) {
        for (link, hook) in self.links.drain(..).zip(self.unit.hooks).rev() {
            if let Err(error) = link.detach() {
                tracing::debug!("a link couldn't be detached: {error}");
            }
            if let Err(error) = unpin(&pins.link(hook.program)) {
                tracing::warn!("{error}");
            }
        }
    }
}

/// Attaches a program to its hook's target by a new link.
fn attach_hook(
    ebpf: &Ebpf,
    hook: &Hook,
    scope: &Path,
    cgroup: &ServedCgroup,
) -> Result<Link, DatapathError> {
    let program = program_fd(ebpf, hook.program)?;
    let AttachPoint::Cgroup(attach_type) = hook.target;
    Link::attach(program, cgroup.directory.as_fd(), attach_type).map_err(|source| {
        // The kernel has one error for both a missing capability and another program's hook.
        if source.kind() == io::ErrorKind::PermissionDenied
            && let Ok(Some(obstacle)) = obstacles::find(scope, [hook])
        {
            return DatapathError::Obstacle(obstacle);
        }
        let fix = cause::Environment::read().fix(cause::Step::Attach, &source);
        DatapathError::Attach { program: hook.program, cgroup: scope.into(), source, fix }
    })
}

/// Pins a link, in the place of any link that is pinned there.
fn pin_at(link: &Link, path: &Path) -> Result<(), DatapathError> {
    unpin(path)?;
    link.pin(path).map_err(|source| DatapathError::Link {
        action: "pin",
        link: path.into(),
        source,
    })
}
