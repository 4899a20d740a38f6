//! The program at the ingress of an interface: by tcx from Linux 6.6 on, whose link is pinned, by a
//! filter of clsact before, which stays by itself.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TcError, tc};

use super::super::bpf::{Link, PinnedObject};
use super::super::pins::unpin;

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
}

/// A filter's number, which follows from the directory of the pins: daemons with different ones may share
/// a network namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterHandle(u32);

impl FilterHandle {
    /// That of a daemon that has its pins in `dir`.
    pub fn of(dir: &Path) -> FilterHandle {
        // FNV-1a (RFC 9923), because it has to be the same for each version.
        let hash = dir.as_os_str().as_bytes().iter().fold(0x811c_9dc5u32, |hash, &octet| {
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
pub enum Ingress {
    /// A link.
    Tcx(Link),
    /// A filter.
    Clsact,
}

impl Ingress {
    /// Attaches the program, in the place of an earlier one: no packet meets neither, or both.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(
        program: &mut SchedClassifier,
        interface: &Interface,
        place: Place<'_>,
    ) -> io::Result<Ingress> {
        let pin = place.pin;
        let fd = program.fd().map_err(io::Error::other)?.try_clone().map_err(io::Error::other)?;
        let fd = std::os::fd::AsFd::as_fd(&fd);
        if let Ok(Some(PinnedObject::Link(link))) = Link::pinned(pin)
            && link.ingress().is_ok_and(|index| index == Some(interface.index))
            && link.replace(fd).is_ok()
        {
            return Ok(Ingress::Tcx(link));
        }
        match Link::attach_ingress(fd, interface.index) {
            Ok(link) => {
                unpin(pin).map_err(io::Error::other)?;
                link.pin(pin)?;
                Ok(Ingress::Tcx(link))
            }
            // A kernel that doesn't know tcx.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                attach_filter(program, interface, place.handle)?;
                Ok(Ingress::Clsact)
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
            Ingress::Tcx(link) if link.ingress()? == Some(interface.index) => {
                if place.pin.exists() { Ok(()) } else { link.pin(place.pin) }
            }
            Ingress::Tcx(_) => {
                *self = Ingress::attach(program, interface, place)?;
                Ok(())
            }
            Ingress::Clsact => insert_filter(program, interface, place.handle).map(drop),
        }
    }

    /// Detaches the program. What is detached already is no error.
    pub fn detach(self, interface: &Interface, place: Place<'_>) {
        let detached = match self {
            Ingress::Tcx(link) => {
                // A link whose interface is gone can't be detached any more.
                let detached = link.detach();
                unpin(place.pin).map_err(io::Error::other).and(detached)
            }
            Ingress::Clsact => detach_filter(&interface.name, place.handle),
        };
        if let Err(error) = detached {
            tracing::debug!("nohop_names couldn't be detached from {}: {error}", interface.name);
        }
    }
}

/// Inserts the filter; returns whether there was none. The qdisc is made where it is missing.
fn insert_filter(
    program: &mut SchedClassifier,
    interface: &Interface,
    handle: FilterHandle,
) -> io::Result<bool> {
    match tc::qdisc_add_clsact(&interface.name).map_err(of_tc) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: handle.number(),
        ..NlOptions::default()
    });
    match program.attach_with_options(&interface.name, TcAttachType::Ingress, options) {
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
    handle: FilterHandle,
) -> io::Result<()> {
    if !insert_filter(program, interface, handle)? {
        let earlier = filter(&interface.name, handle)?;
        let id = program.attach_to_link(earlier).map_err(of_program)?;
        std::mem::forget(program.take_link(id).map_err(io::Error::other)?);
    }
    Ok(())
}

fn filter(interface: &str, handle: FilterHandle) -> io::Result<SchedClassifierLink> {
    let ingress = TcAttachType::Ingress;
    SchedClassifierLink::attached(interface, ingress, PRIORITY, handle.number(), None)
}

/// Removes a filter of ours from the interface of this name.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn detach_filter(interface: &str, handle: FilterHandle) -> io::Result<()> {
    aya::programs::links::Link::detach(filter(interface, handle)?).map_err(of_program)
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
