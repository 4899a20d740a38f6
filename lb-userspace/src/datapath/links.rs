//! The hooks: what attaches the programs to the scope, looks after them and hands them over.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::Ebpf;

use super::DatapathError;
use super::bpf::{AttachType, CgroupLink};
use super::object::program;
use super::pins::{self, PinnedLink, Pins, unpin};
use super::{cause, obstacles};

/// A program and where it is attached.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// The program's name in the object.
    pub program: &'static str,
    /// Where it is attached.
    pub attach_type: AttachType,
}

/// The hooks, in the order in which they are attached: what translates back comes first, so that no
/// translated socket is ever without it. They are detached in the opposite order.
pub const HOOKS: [Hook; 8] = [
    Hook { program: "nohop_getpeer4", attach_type: AttachType::GetPeerName4 },
    Hook { program: "nohop_getpeer6", attach_type: AttachType::GetPeerName6 },
    Hook { program: "nohop_recvmsg4", attach_type: AttachType::RecvMsg4 },
    Hook { program: "nohop_recvmsg6", attach_type: AttachType::RecvMsg6 },
    Hook { program: "nohop_sendmsg4", attach_type: AttachType::SendMsg4 },
    Hook { program: "nohop_sendmsg6", attach_type: AttachType::SendMsg6 },
    Hook { program: "nohop_connect4", attach_type: AttachType::Connect4 },
    Hook { program: "nohop_connect6", attach_type: AttachType::Connect6 },
];

/// The cgroup that is served.
#[derive(Debug)]
pub struct Scope {
    directory: File,
    cgroup_id: u64,
}

/// Opens the cgroup that is served.
///
/// # Errors
/// When the directory can't be opened.
pub fn open_scope(scope: &Path) -> Result<Scope, DatapathError> {
    let error = |source| DatapathError::Cgroup { cgroup: scope.into(), source };
    let directory = File::open(scope).map_err(error)?;
    let cgroup_id = directory.metadata().map_err(error)?.st_ino();
    Ok(Scope { directory, cgroup_id })
}

/// Whether `link` is this hook's, and holds in `scope`.
fn holds(link: &CgroupLink, hook: &Hook, scope: &Scope) -> io::Result<bool> {
    let joined = link.joined()?;
    Ok(joined.is_some_and(|joined| {
        joined.cgroup_id == scope.cgroup_id && joined.attach_type == hook.attach_type as u32
    }))
}

fn hook_of(pinned: &PinnedLink) -> Option<usize> {
    HOOKS.iter().position(|hook| pinned.name.to_str() == Some(hook.program))
}

/// Whether an earlier daemon's hooks serve this scope.
///
/// # Errors
/// When the pins can't be read.
pub fn are_live(pins: &Pins, scope: &Scope) -> Result<bool, DatapathError> {
    let links = pins.all_links()?;
    Ok(links.iter().any(|pinned| {
        hook_of(pinned)
            .is_some_and(|hook| holds(&pinned.link, &HOOKS[hook], scope).unwrap_or(false))
    }))
}

/// The programs that a link pinned in `bpffs` holds at its hook of `scope`, as far as can be seen.
pub fn live(bpffs: &Path, scope: &Path) -> BTreeSet<&'static str> {
    let Ok(scope) = open_scope(scope) else { return BTreeSet::new() };
    let links = pins::links_in(bpffs).unwrap_or_default();
    let is_live = |pinned: &PinnedLink| {
        let hook = &HOOKS[hook_of(pinned)?];
        holds(&pinned.link, hook, &scope).unwrap_or(false).then_some(hook.program)
    };
    links.iter().filter_map(is_live).collect()
}

/// What translates back goes last; what this version doesn't know is some later hook.
fn sort_for_detaching(links: &mut [PinnedLink]) {
    links.sort_by_key(|pinned| std::cmp::Reverse(hook_of(pinned).unwrap_or(HOOKS.len())));
}

/// Detaches every link that is pinned, under whatever layout: what translates back goes last.
/// Returns how many there were.
///
/// # Errors
/// When the kernel refuses.
pub fn detach_pinned(pins: &Pins) -> Result<usize, DatapathError> {
    let mut links = pins.all_links()?;
    sort_for_detaching(&mut links);
    for link in &links {
        end(link)?;
    }
    Ok(links.len())
}

/// Detaches a pinned link and takes the pin away. A later version's hook may be of a kind that can't
/// be detached: it ends with its pin.
fn end(PinnedLink { path, link, .. }: &PinnedLink) -> Result<(), DatapathError> {
    if let Err(source) = link.detach() {
        if link.joined().is_ok_and(|joined| joined.is_some()) {
            return Err(DatapathError::Link { action: "detach", link: path.clone(), source });
        }
        tracing::debug!("{} ends with its pin: {source}", path.display());
    }
    Ok(unpin(path)?)
}

/// Whether the hooks are where they should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attachment {
    /// The programs that were found detached, which are attached again unless there is a problem.
    pub lost: BTreeSet<&'static str>,
    /// Why they couldn't be attached again.
    pub problem: Option<String>,
}

impl Attachment {
    /// Whether all hooks run now.
    pub fn holds(&self) -> bool {
        self.problem.is_none()
    }
}

/// The links of a datapath.
#[derive(Debug)]
pub struct Links {
    scope: PathBuf,
    /// In the order of [`HOOKS`]; empty while the hooks are still an earlier daemon's.
    links: Vec<CgroupLink>,
}

impl Links {
    /// None yet, for `scope`.
    pub fn new(scope: &Path) -> Links {
        Links { scope: scope.into(), links: Vec::new() }
    }

    /// The cgroup that is served.
    pub fn scope(&self) -> &Path {
        &self.scope
    }

    /// Whether the hooks run this datapath's programs.
    pub fn are_ours(&self) -> bool {
        !self.links.is_empty()
    }

    /// Makes the hooks run these programs: an earlier daemon's links get them in place, so that no
    /// connect finds a gap; others are made. Then nothing but these is left pinned.
    ///
    /// # Errors
    /// When the kernel refuses; the next call goes on where this one stopped.
    pub fn switch(&mut self, ebpf: &mut Ebpf, pins: &Pins) -> Result<(), DatapathError> {
        let scope = open_scope(&self.scope)?;
        let mut earlier = pins.all_links()?;
        let mut links = Vec::new();
        for hook in &HOOKS {
            let is_this = |pinned: &PinnedLink| {
                pinned.name == hook.program && holds(&pinned.link, hook, &scope).unwrap_or(false)
            };
            let found = earlier.iter().position(is_this).map(|at| earlier.swap_remove(at));
            let path = pins.link(hook.program);
            let link = match found {
                Some(PinnedLink { path: at, link, .. })
                    if self.replace(ebpf, hook, &link).is_ok() =>
                {
                    if at != path {
                        pin_at(&link, &path)?;
                    }
                    link
                }
                _ => {
                    let link = self.attach(ebpf, hook, &scope)?;
                    pin_at(&link, &path)?;
                    link
                }
            };
            links.push(link);
        }
        self.links = links;
        // What is left, such as the links to another cgroup, ends here, what translates back last.
        sort_for_detaching(&mut earlier);
        for pinned in earlier {
            let PinnedLink { name, path, link } = &pinned;
            let is_own =
                HOOKS.iter().any(|hook| name == hook.program && *path == pins.link(hook.program));
            if is_own {
                // Its pin is the new link's by now.
                if let Err(error) = link.detach() {
                    tracing::debug!("a link couldn't be detached: {error}");
                }
            } else {
                end(&pinned)?;
            }
        }
        Ok(pins.remove_other_layouts()?)
    }

    fn replace(
        &self,
        ebpf: &mut Ebpf,
        hook: &Hook,
        link: &CgroupLink,
    ) -> Result<(), DatapathError> {
        let attach_error = |source| self.attach_error(hook, source);
        let loaded = program(ebpf, hook.program)?.fd();
        let loaded =
            loaded.map_err(|source| DatapathError::Program { program: hook.program, source })?;
        link.replace(loaded.as_fd()).map_err(attach_error)
    }

    fn attach(
        &self,
        ebpf: &mut Ebpf,
        hook: &Hook,
        scope: &Scope,
    ) -> Result<CgroupLink, DatapathError> {
        let loaded = program(ebpf, hook.program)?.fd();
        let loaded =
            loaded.map_err(|source| DatapathError::Program { program: hook.program, source })?;
        CgroupLink::attach(loaded.as_fd(), scope.directory.as_fd(), hook.attach_type)
            .map_err(|source| self.attach_error(hook, source))
    }

    fn attach_error(&self, hook: &Hook, source: io::Error) -> DatapathError {
        // The kernel has one error for both a missing capability and another program's hook.
        if source.kind() == io::ErrorKind::PermissionDenied
            && let Ok(Some(obstacle)) =
                obstacles::find(&self.scope, |each| each.program == hook.program)
        {
            return DatapathError::Held(obstacle);
        }
        let fix = cause::Machine::look().fix(cause::Step::Attach, &source);
        DatapathError::Attach { program: hook.program, cgroup: self.scope.clone(), source, fix }
    }

    /// Looks at every link; attaches and pins again what isn't attached or pinned any more.
    pub fn fix(&mut self, ebpf: &mut Ebpf, pins: &Pins) -> Attachment {
        let mut attachment = Attachment::default();
        if let Err(error) = self.try_fix(ebpf, pins, &mut attachment.lost) {
            attachment.problem = Some(error.to_string());
        }
        attachment
    }

    fn try_fix(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        lost: &mut BTreeSet<&'static str>,
    ) -> Result<(), DatapathError> {
        let scope = open_scope(&self.scope)?;
        for (index, hook) in HOOKS.iter().enumerate().take(self.links.len()) {
            let path = pins.link(hook.program);
            // A kernel that doesn't say is no reason to attach twice.
            if !holds(&self.links[index], hook, &scope).unwrap_or(true) {
                lost.insert(hook.program);
                self.links[index] = self.attach(ebpf, hook, &scope)?;
                pin_at(&self.links[index], &path)?;
            } else if !path.exists() {
                pin_at(&self.links[index], &path)?;
            }
        }
        Ok(())
    }

    /// Detaches the programs, what translates back last, and takes the pins away. It is no error if
    /// somebody did already.
    pub fn detach(&mut self, pins: &Pins) {
        for (link, hook) in self.links.iter().zip(&HOOKS).rev() {
            if let Err(error) = link.detach() {
                tracing::debug!("a link couldn't be detached: {error}");
            }
            if let Err(error) = unpin(&pins.link(hook.program)) {
                tracing::warn!("{error}");
            }
        }
        self.links.clear();
    }
}

/// Pins a link, in the place of whatever link is pinned there.
fn pin_at(link: &CgroupLink, path: &Path) -> Result<(), DatapathError> {
    unpin(path)?;
    link.pin(path).map_err(|source| DatapathError::Link {
        action: "pin",
        link: path.into(),
        source,
    })
}
