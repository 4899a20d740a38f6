//! Programs at interfaces: by tcx from Linux 6.6 on, whose link is pinned, by a filter of clsact
//! before, which stays by itself.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TcError, tc};

use super::bpf::{Link, PinnedObject, TcxHook};
use super::pins::{Pins, unpin};

/// The place of our filter among those of clsact: the first.
const PRIORITY: u16 = 1;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
}

/// Where the program's attachments are kept.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Where a link is pinned.
    pub pin: &'a Path,
    /// What tells a filter from those of others.
    pub handle: FilterHandle,
    /// Which packets it is for.
    pub direction: Direction,
}

/// Which packets of an interface a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that come by it.
    Ingress,
    /// Those that leave by it.
    Egress,
}

impl Direction {
    fn attach_type(self) -> TcAttachType {
        match self {
            Direction::Ingress => TcAttachType::Ingress,
            Direction::Egress => TcAttachType::Egress,
        }
    }

    fn tcx(self) -> TcxHook {
        match self {
            Direction::Ingress => TcxHook::INGRESS,
            Direction::Egress => TcxHook::EGRESS,
        }
    }
}

/// A filter's number, which follows from the directory of the pins: daemons with different ones may share
/// a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterHandle(u32);

impl FilterHandle {
    /// That of a daemon that has its pins in `dir`.
    pub fn of(dir: &Path) -> FilterHandle {
        FilterHandle::of_unit(dir, "")
    }

    /// That of a unit that shares its directory with others.
    pub fn of_unit(dir: &Path, unit: &str) -> FilterHandle {
        // FNV-1a (RFC 9923), because it has to be the same for each version.
        let octets = dir.as_os_str().as_bytes().iter().chain(unit.as_bytes());
        let hash = octets.fold(0x811c_9dc5u32, |hash, &octet| {
            (hash ^ u32::from(octet)).wrapping_mul(0x0100_0193)
        });
        // Zero lets the kernel choose.
        FilterHandle(hash.max(1))
    }

    fn number(self) -> TcHandle {
        TcHandle::new((self.0 >> 16) as u16, self.0 as u16)
    }
}

/// The program's attachment to an interface.
#[derive(Debug)]
pub enum Attached {
    /// A link.
    Tcx(Link),
    /// A filter.
    Clsact,
}

impl Attached {
    /// Attaches the program, in the place of an earlier one: no packet meets neither, or both.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(
        program: &mut SchedClassifier,
        interface: &Interface,
        place: Place<'_>,
    ) -> io::Result<Attached> {
        let pin = place.pin;
        let fd = program.fd().map_err(io::Error::other)?.try_clone().map_err(io::Error::other)?;
        let fd = std::os::fd::AsFd::as_fd(&fd);
        if let Ok(Some(PinnedObject::Link(link))) = Link::pinned(pin)
            && link.tcx_interface().is_ok_and(|index| index == Some(interface.index))
            && link.replace(fd).is_ok()
        {
            return Ok(Attached::Tcx(link));
        }
        match Link::attach_tcx(fd, interface.index, place.direction.tcx()) {
            Ok(link) => {
                unpin(pin).map_err(io::Error::other)?;
                link.pin(pin)?;
                Ok(Attached::Tcx(link))
            }
            // A kernel that doesn't know tcx.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                attach_filter(program, interface, place)?;
                Ok(Attached::Clsact)
            }
            Err(error) => Err(error),
        }
    }

    /// Attaches the program again if it isn't attached, or pins it if it isn't pinned.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn fix(
        &mut self,
        program: &mut SchedClassifier,
        interface: &Interface,
        place: Place<'_>,
    ) -> io::Result<()> {
        match self {
            Attached::Tcx(link) if link.tcx_interface()? == Some(interface.index) => {
                if place.pin.exists() { Ok(()) } else { link.pin(place.pin) }
            }
            Attached::Tcx(_) => {
                *self = Attached::attach(program, interface, place)?;
                Ok(())
            }
            Attached::Clsact => insert_filter(program, interface, place).map(drop),
        }
    }

    /// Detaches the program. What is detached already is no error.
    pub fn detach(self, interface: &Interface, place: Place<'_>) {
        let detached = match self {
            Attached::Tcx(link) => {
                // A link whose interface is gone can't be detached any more.
                let detached = link.detach();
                unpin(place.pin).map_err(io::Error::other).and(detached)
            }
            // It may be renamed by now. With an interface its filters are gone.
            Attached::Clsact => match nix::net::if_::if_indextoname(interface.index) {
                Ok(name) => detach_filter(&name.to_string_lossy(), place.handle, place.direction),
                Err(_) => Ok(()),
            },
        };
        if let Err(error) = detached {
            tracing::debug!(
                "{} couldn't be detached from {}: {error}",
                place.pin.display(),
                interface.name
            );
        }
    }
}

/// Inserts the filter; returns whether there was none. The qdisc is made where it is missing.
fn insert_filter(
    program: &mut SchedClassifier,
    interface: &Interface,
    place: Place<'_>,
) -> io::Result<bool> {
    match tc::qdisc_add_clsact(&interface.name).map_err(of_tc) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: place.handle.number(),
        ..NlOptions::default()
    });
    match program.attach_with_options(&interface.name, place.direction.attach_type(), options) {
        Ok(id) => {
            // Dropping it would remove the filter.
            std::mem::forget(program.take_link(id).map_err(io::Error::other)?);
            Ok(true)
        }
        Err(error) => match of_program(error) {
            error if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            error => Err(error),
        },
    }
}

fn attach_filter(
    program: &mut SchedClassifier,
    interface: &Interface,
    place: Place<'_>,
) -> io::Result<()> {
    if !insert_filter(program, interface, place)? {
        let earlier = filter(&interface.name, place.handle, place.direction)?;
        let id = program.attach_to_link(earlier).map_err(of_program)?;
        std::mem::forget(program.take_link(id).map_err(io::Error::other)?);
    }
    Ok(())
}

fn filter(
    interface: &str,
    handle: FilterHandle,
    direction: Direction,
) -> io::Result<SchedClassifierLink> {
    let attach_type = direction.attach_type();
    SchedClassifierLink::attached(interface, attach_type, PRIORITY, handle.number(), None)
}

/// Removes a filter of ours from the interface of this name.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn detach_filter(
    interface: &str,
    handle: FilterHandle,
    direction: Direction,
) -> io::Result<()> {
    aya::programs::links::Link::detach(filter(interface, handle, direction)?).map_err(of_program)
}

fn of_program(error: ProgramError) -> io::Error {
    match error {
        ProgramError::TcError(error) => of_tc(error),
        ProgramError::SyscallError(error) => error.io_error,
        other => io::Error::other(other),
    }
}

fn of_tc(error: TcError) -> io::Error {
    match error {
        TcError::NetlinkError(error) => match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => io::Error::other(error),
        },
        TcError::IoError(error) => error,
        other => io::Error::other(other),
    }
}

/// The interfaces of this network namespace; loopback alone where they can't be listed.
pub fn interface_names() -> impl Iterator<Item = String> {
    let listed = nix::net::if_::if_nameindex();
    let names: Vec<String> = match &listed {
        Ok(listed) => listed.iter().map(|one| one.name().to_string_lossy().into_owned()).collect(),
        Err(_) => vec!["lo".to_owned()],
    };
    names.into_iter()
}

/// Ends a unit's links: those whose pins' names begin with its prefix and are such ones.
pub fn end_links(pins: &Pins, prefix: &str, is_one: impl Fn(&str) -> bool) {
    for pinned in pins.all_links().unwrap_or_default() {
        let name = pinned.name.to_string_lossy();
        if name.starts_with(prefix) && is_one(&name) {
            let detached = pinned.link.detach();
            if let Err(error) = unpin(&pinned.path).map_err(io::Error::other).and(detached) {
                tracing::debug!("{} couldn't be detached: {error}", pinned.path.display());
            }
        }
    }
}
