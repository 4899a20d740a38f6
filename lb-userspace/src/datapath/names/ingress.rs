//! The program at the ingress of an interface: by tcx from Linux 6.6 on, whose link is pinned, by a
//! filter of clsact before, which stays by itself.

use std::io;
use std::path::Path;

use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, TcError, tc};

use super::super::bpf::{Link, PinnedObject};
use super::super::pins::unpin;

/// The place of our filter among those of clsact: the first. The handle tells it from others.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0x6e6f, 0x686f);

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
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
    /// Attaches the program, in the place of an earlier one: no packet meets neither, or both. `pin` is
    /// where the link is pinned.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(
        program: &mut SchedClassifier,
        interface: &Interface,
        pin: &Path,
    ) -> io::Result<Ingress> {
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
                attach_filter(program, interface)?;
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
        pin: &Path,
    ) -> io::Result<()> {
        match self {
            Ingress::Tcx(link) if link.ingress()? == Some(interface.index) => {
                if pin.exists() {
                    Ok(())
                } else {
                    link.pin(pin)
                }
            }
            Ingress::Tcx(_) => {
                *self = Ingress::attach(program, interface, pin)?;
                Ok(())
            }
            Ingress::Clsact => insert_filter(program, interface).map(drop),
        }
    }

    /// Detaches the program. What is detached already is no error.
    pub fn detach(self, interface: &Interface, pin: &Path) {
        let detached = match self {
            Ingress::Tcx(link) => link.detach().and_then(|()| unpin(pin).map_err(io::Error::other)),
            Ingress::Clsact => detach_filter(interface),
        };
        if let Err(error) = detached {
            tracing::debug!("nohop_names couldn't be detached from {}: {error}", interface.name);
        }
    }
}

/// Inserts the filter; returns whether there was none. The qdisc is made where it is missing.
fn insert_filter(program: &mut SchedClassifier, interface: &Interface) -> io::Result<bool> {
    match tc::qdisc_add_clsact(&interface.name).map_err(of_tc) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        _ => {}
    }
    let options = TcAttachOptions::Netlink(NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
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

fn attach_filter(program: &mut SchedClassifier, interface: &Interface) -> io::Result<()> {
    if !insert_filter(program, interface)? {
        let earlier = filter(interface)?;
        let id = program.attach_to_link(earlier).map_err(of_program)?;
        std::mem::forget(program.take_link(id).map_err(io::Error::other)?);
    }
    Ok(())
}

fn filter(interface: &Interface) -> io::Result<SchedClassifierLink> {
    let ingress = TcAttachType::Ingress;
    SchedClassifierLink::attached(&interface.name, ingress, PRIORITY, HANDLE, None)
}

/// Removes a filter of ours.
///
/// # Errors
/// When there is none, or the kernel refuses.
pub fn detach_filter(interface: &Interface) -> io::Result<()> {
    aya::programs::links::Link::detach(filter(interface)?).map_err(of_program)
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
