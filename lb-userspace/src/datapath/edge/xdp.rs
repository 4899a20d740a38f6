//! The fast path at XDP: where it is attached, and by which interfaces its packets may leave.
//!
//! It runs in the driver or not at all: in the kernel's generic mode it would have to copy the packets that
//! the kernel has joined.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::Xdp;
use lb_common::{EdgeInterface as Entry, N_EDGE_INTERFACES};

use super::super::bpf::{Link, PinnedObject, program_name};
use super::super::kernel::AtomicArray;
use super::super::pins::{Pins, unpin};
use super::super::tc::Interface;
use super::device::{self, Device};

/// What pins of the unit's links begin with.
pub const PIN_PREFIX: &str = "nohop_edge_";

/// The program.
pub const PROGRAM: &str = "nohop_edge_xdp";

/// The program's attachments.
#[derive(Debug)]
pub struct Fast {
    entries: Arc<AtomicArray<Entry>>,
    /// By the interface's index.
    links: BTreeMap<u32, Link>,
    /// Why the kernel doesn't take the program.
    refusal: Option<String>,
    /// Which drivers refused it, why, and when: some reset the card for each try, or log it.
    refused: BTreeMap<u32, (Device, String, Instant)>,
}

/// After how long a driver that refused the program is asked again.
const AGAIN: Duration = Duration::from_secs(300);

impl Fast {
    /// That of a loaded object. `refusal` is why its program couldn't be loaded.
    pub fn new(entries: Arc<AtomicArray<Entry>>, refusal: Option<String>) -> Fast {
        Fast { entries, links: BTreeMap::new(), refusal, refused: BTreeMap::new() }
    }

    /// Attaches the program to these interfaces where it isn't, and detaches it from others. Returns for each
    /// that it isn't attached to the reason, by its index.
    pub fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        interfaces: &[&Interface],
        pins: &Pins,
    ) -> BTreeMap<u32, String> {
        let is_wanted = |index: &u32| interfaces.iter().any(|interface| interface.index == *index);
        let gone: Vec<u32> = self.links.keys().filter(|index| !is_wanted(index)).copied().collect();
        gone.into_iter().for_each(|index| self.detach_from(index, pins));
        let mut reasons = BTreeMap::new();
        let devices = match (&self.refusal, device::all()) {
            (None, Ok(devices)) => devices,
            (Some(reason), _) => {
                let reason = reason.clone();
                // Those of an earlier version.
                interfaces.iter().for_each(|interface| self.detach_from(interface.index, pins));
                self.forget_others();
                let all = interfaces.iter().map(|interface| (interface.index, reason.clone()));
                return all.collect();
            }
            (None, Err(error)) => {
                let reason = format!("the interfaces can't be listed: {error}");
                let all = interfaces.iter().map(|interface| (interface.index, reason.clone()));
                return all.collect();
            }
        };
        for interface in interfaces {
            let index = interface.index;
            if let Err(reason) = self.attach_to(ebpf, index, &devices, pins) {
                self.detach_from(index, pins);
                reasons.insert(index, reason);
            }
        }
        self.refused.retain(|index, _| devices.contains_key(index));
        self.forget_others();
        // What drivers offer may follow from programs at other interfaces.
        for (index, device) in &devices {
            if self.links.contains_key(index) {
                let entry = entry(*index, device);
                if self.entries.load(slot(*index)) != entry {
                    self.entries.store(slot(*index), &entry);
                }
            }
        }
        reasons
    }

    /// Whether the program is attached to an interface.
    pub fn is_attached(&self, index: u32) -> bool {
        self.links.contains_key(&index)
    }

    /// Detaches it from all.
    pub fn detach(&mut self, pins: &Pins) {
        let all: Vec<u32> = self.links.keys().copied().collect();
        all.into_iter().for_each(|index| self.detach_from(index, pins));
    }

    fn attach_to(
        &mut self,
        ebpf: &mut Ebpf,
        index: u32,
        devices: &BTreeMap<u32, Device>,
        pins: &Pins,
    ) -> Result<(), String> {
        let device = devices.get(&index).ok_or("it isn't there any more")?;
        if let Some((name, _)) = device::vlan_of(index, devices) {
            return Err(format!(
                "TC alone: its driver may take the VLAN tags of {name} off before XDP sees them"
            ));
        }
        if device.kind == "bond" {
            return Err("TC alone: XDP has the packets of its members".to_owned());
        }
        if !device.sends_back() && !device.takes_redirected() {
            let reason =
                "its peer has neither an XDP program nor GRO, so it would drop what XDP sends";
            return Err(format!("TC alone: {reason}"));
        }
        let others = self.links.keys().any(|other| *other != index && slot(*other) == slot(index));
        if others {
            return Err("an interface with a like number has its place".to_owned());
        }
        let pin = pins.link(&pin_name(index));
        if let Some(link) = self.links.get(&index)
            && link.xdp_interface().is_ok_and(|attached| attached == Some(index))
        {
            return match pin.exists() {
                true => Ok(()),
                false => link.pin(&pin).map_err(|error| format!("it can't be pinned: {error}")),
            };
        }
        let program = ebpf.program_mut(PROGRAM).ok_or("the object lacks the program")?;
        let program: &mut Xdp = program.try_into().map_err(|error| format!("{error}"))?;
        let fd =
            program.fd().and_then(|fd| Ok(fd.try_clone()?)).map_err(|error| error.to_string())?;
        let earlier = match Link::pinned(&pin) {
            Ok(Some(PinnedObject::Link(link)))
                if link.xdp_interface().is_ok_and(|attached| attached == Some(index)) =>
            {
                Some(link).filter(|link| link.replace(fd.as_fd()).is_ok())
            }
            _ => None,
        };
        let link = match earlier {
            Some(link) => link,
            None => {
                if let Some(id) = device.program {
                    return Err(format!("TC alone: {}", other_program(id)));
                }
                if let Some((refused, reason, when)) = self.refused.get(&index)
                    && refused == device
                    && when.elapsed() < AGAIN
                {
                    return Err(reason.clone());
                }
                let link = match Link::attach_xdp(fd.as_fd(), index) {
                    Ok(link) => link,
                    Err(error) => {
                        let is_final =
                            matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL));
                        let reason = device::reason(fd.as_fd(), index, error);
                        if is_final {
                            let refused = (device.clone(), reason.clone(), Instant::now());
                            self.refused.insert(index, refused);
                        }
                        return Err(reason);
                    }
                };
                unpin(&pin).map_err(|error| error.to_string())?;
                link.pin(&pin).map_err(|error| format!("it can't be pinned: {error}"))?;
                link
            }
        };
        self.links.insert(index, link);
        Ok(())
    }

    /// Clears the entries of interfaces that the program isn't attached to: those of an earlier daemon, too.
    fn forget_others(&self) {
        for nth in 0..N_EDGE_INTERFACES {
            let index = self.entries.load(nth).index;
            if index != 0 && !self.links.contains_key(&index) {
                self.entries.store(nth, &Entry::default());
            }
        }
    }

    /// Detaches the program, also where an earlier daemon attached it.
    fn detach_from(&mut self, index: u32, pins: &Pins) {
        let pin = pins.link(&pin_name(index));
        let link = self.links.remove(&index).or_else(|| match Link::pinned(&pin) {
            Ok(Some(PinnedObject::Link(link)))
                if link.xdp_interface().is_ok_and(|attached| attached == Some(index)) =>
            {
                Some(link)
            }
            _ => None,
        });
        let Some(link) = link else { return };
        if self.entries.load(slot(index)).index == index {
            self.entries.store(slot(index), &Entry::default());
        }
        // A link whose interface is gone can't be detached any more.
        let detached = link.detach();
        if let Err(error) = unpin(&pin).map_err(io::Error::other).and(detached) {
            tracing::debug!("{} couldn't be detached: {error}", pin.display());
        }
    }
}

/// Where an interface's entry is.
fn slot(index: u32) -> u32 {
    index % N_EDGE_INTERFACES
}

/// What the program knows of an interface that it is attached to.
fn entry(index: u32, device: &Device) -> Entry {
    let flag = |has_it, flag| if has_it { flag } else { 0 };
    let flags = flag(device.sends_back(), Entry::SENDS_BACK)
        | flag(device.takes_redirected(), Entry::TAKES_REDIRECTED)
        | flag(device.redirects(), Entry::REDIRECTS);
    Entry { mac: device.mac, flags, index, padding: 0 }
}

/// A program of others, as it is shown.
fn other_program(id: u32) -> String {
    let name = program_name(id).ok().filter(|name| !name.is_empty());
    let name = name.map_or_else(String::new, |name| format!(" {name}"));
    format!("another XDP program is attached to it:{name} (id {id})")
}

/// The name of a link's pin.
pub fn pin_name(index: u32) -> String {
    format!("{PIN_PREFIX}xdp_{index}")
}
