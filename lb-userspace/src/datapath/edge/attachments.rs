//! Where the unit's programs are attached.

use std::collections::HashMap;
use std::io;

use aya::Ebpf;
use aya::programs::SchedClassifier;

use super::super::pins::Pins;
use super::super::tc::{
    Attached, Direction, FilterHandle, Interface, Place, detach_filter, end_links, interface_names,
};
use super::options::UNIT;
use super::status::{EdgeInterface, EdgeMode};
use super::xdp::{self, Fast, PIN_PREFIX};

/// The programs of TC, in the order in which they are attached: the way back first.
pub const PROGRAMS: [(&str, Direction); 2] =
    [("nohop_edge_out", Direction::Egress), ("nohop_edge", Direction::Ingress)];

/// The unit's programs at the configured interfaces.
#[derive(Debug)]
pub struct Attachments {
    attached: Vec<AttachedTo>,
    fast: Fast,
    handle: FilterHandle,
    interfaces: Vec<EdgeInterface>,
}

#[derive(Debug)]
struct AttachedTo {
    interface: Interface,
    /// In the order of [`PROGRAMS`].
    programs: Vec<Attached>,
}

impl Attachments {
    /// None yet.
    pub fn new(fast: Fast, pins: &Pins) -> Attachments {
        let handle = FilterHandle::of_unit(pins.dir(), UNIT);
        Attachments { attached: Vec::new(), fast, handle, interfaces: Vec::new() }
    }

    /// The configured interfaces, in order.
    pub fn interfaces(&self) -> &[EdgeInterface] {
        &self.interfaces
    }

    /// The interfaces with programs, and whether one of XDP is among them.
    pub fn all(&self) -> impl Iterator<Item = (&Interface, bool)> {
        let interfaces = self.attached.iter().map(|attached| &attached.interface);
        interfaces.map(|interface| (interface, self.fast.is_attached(interface.index)))
    }

    /// Detaches them.
    pub fn detach(mut self, pins: &Pins) {
        self.fast.detach(pins);
        for attached in self.attached {
            attached.detach(self.handle, pins);
        }
    }

    /// Attaches the programs of an object where they aren't, and detaches them from interfaces that aren't `wanted`.
    pub fn attach(&mut self, ebpf: &mut Ebpf, wanted: &[String], pins: &Pins) {
        let indices = interface_indices();
        let wanted: Vec<(&String, Option<Interface>)> = wanted
            .iter()
            .map(|name| {
                let index = indices.get(name).copied();
                (name, index.map(|index| Interface { name: name.clone(), index }))
            })
            .collect();
        let is_wanted = |attached: &AttachedTo| {
            wanted.iter().any(|(_, interface)| interface.as_ref() == Some(&attached.interface))
        };
        let (kept, gone): (Vec<_>, Vec<_>) = self.attached.drain(..).partition(is_wanted);
        self.attached = kept;
        for attached in gone {
            attached.detach(self.handle, pins);
        }
        let is_own = |name: &str| {
            let interfaces = wanted.iter().filter_map(|(_, interface)| interface.as_ref());
            let mut names = interfaces.flat_map(|interface| {
                let programs = PROGRAMS.map(|(program, _)| pin_name(program, interface));
                programs.into_iter().chain([xdp::pin_name(interface.index)])
            });
            names.any(|own| own == name)
        };
        end_links(pins, PIN_PREFIX, |name| !is_own(name));
        let mut results = Vec::new();
        for (name, interface) in &wanted {
            results.push(match interface {
                None => Err(format!("there is no interface {name}")),
                Some(_) if !has_ethernet(name) => Err(format!(
                    "packets of {name} have no Ethernet header; name the interface below it, or one of Ethernet"
                )),
                Some(interface) => {
                    self.attach_to(interface, ebpf, pins).map_err(|error| error.to_string())
                }
            });
        }
        let by_tc = wanted.iter().zip(&results).filter(|(_, result)| result.is_ok());
        let by_tc: Vec<_> = by_tc.filter_map(|((_, interface), _)| interface.as_ref()).collect();
        let reasons = self.fast.attach(ebpf, &by_tc, pins);
        let mut interfaces = Vec::new();
        for ((name, interface), result) in wanted.iter().zip(results) {
            let index = interface.as_ref().map_or(0, |interface| interface.index);
            let (mode, message) = match result {
                Ok(mode) if self.fast.is_attached(index) => (Some(mode.with_xdp()), None),
                Ok(mode) => (Some(mode), reasons.get(&index).cloned()),
                Err(message) => (None, Some(message)),
            };
            let interface = EdgeInterface { name: (*name).clone(), mode, message };
            let is_new = !self.interfaces.contains(&interface);
            match (&interface, is_new) {
                (EdgeInterface { mode: Some(mode), message, .. }, true) => {
                    let message = message.as_deref().map(|text| format!(": {text}"));
                    let message = message.unwrap_or_default();
                    tracing::info!("edge: attached to {name} by {}{message}", mode.name());
                }
                (EdgeInterface { message: Some(message), .. }, true) => {
                    tracing::warn!("edge: not attached to {name}: {message}");
                }
                _ => {}
            }
            interfaces.push(interface);
        }
        self.interfaces = interfaces;
    }

    fn attach_to(
        &mut self,
        interface: &Interface,
        ebpf: &mut Ebpf,
        pins: &Pins,
    ) -> io::Result<EdgeMode> {
        let nth = self.attached.iter().position(|attached| attached.interface == *interface);
        let nth = nth.unwrap_or_else(|| {
            let programs = Vec::new();
            self.attached.push(AttachedTo { interface: interface.clone(), programs });
            self.attached.len() - 1
        });
        let mut mode = EdgeMode::Tcx;
        for (idx, (name, direction)) in PROGRAMS.into_iter().enumerate() {
            let program = ebpf.program_mut(name).ok_or(io::ErrorKind::NotFound)?;
            let program: &mut SchedClassifier = program.try_into().map_err(io::Error::other)?;
            let pin = pins.link(&pin_name(name, interface));
            let place = Place { pin: &pin, handle: self.handle, direction };
            let Some(AttachedTo { programs, .. }) = self.attached.get_mut(nth) else { continue };
            match programs.get_mut(idx) {
                Some(attached) => attached.fix(program, interface, place)?,
                None => programs.push(Attached::attach(program, interface, place)?),
            }
            if matches!(programs.get(idx), Some(Attached::Clsact)) {
                mode = EdgeMode::Clsact;
            }
        }
        Ok(mode)
    }
}

impl AttachedTo {
    fn detach(self, handle: FilterHandle, pins: &Pins) {
        for ((name, direction), attached) in PROGRAMS.into_iter().zip(self.programs).rev() {
            let pin = pins.link(&pin_name(name, &self.interface));
            attached.detach(&self.interface, Place { pin: &pin, handle, direction });
        }
    }
}

/// Whether an interface's packets begin with an Ethernet header, as those of WireGuard and PPP don't; also
/// where that can't be read.
fn has_ethernet(name: &str) -> bool {
    // ARPHRD_ETHER and ARPHRD_LOOPBACK (linux/if_arp.h).
    let kind = std::fs::read_to_string(format!("/sys/class/net/{name}/type"));
    kind.map_or(true, |kind| matches!(kind.trim(), "1" | "772"))
}

/// Removes the filters that no link holds. Returns how many there were.
pub fn detach_filters(pins: &Pins) -> usize {
    detach_filters_but(pins, &[])
}

/// The same, but for those of some interfaces.
pub fn detach_filters_but(pins: &Pins, kept: &[String]) -> usize {
    let handle = FilterHandle::of_unit(pins.dir(), UNIT);
    let detach = |name: &String| {
        let directions = [Direction::Ingress, Direction::Egress].into_iter();
        directions.filter(|direction| detach_filter(name, handle, *direction).is_ok()).count()
    };
    interface_names().filter(|name| !kept.contains(name)).map(|name| detach(&name)).sum()
}

/// The interfaces of this network namespace, by name.
fn interface_indices() -> HashMap<String, u32> {
    let index = |name: String| Some((name.clone(), nix::net::if_::if_nametoindex(&*name).ok()?));
    interface_names().filter_map(index).collect()
}

/// Names of pins have no dots, so it has the interface's number.
fn pin_name(program: &str, interface: &Interface) -> String {
    let direction = if program.ends_with("_out") { "out" } else { "in" };
    format!("{PIN_PREFIX}{direction}_{}", interface.index)
}
