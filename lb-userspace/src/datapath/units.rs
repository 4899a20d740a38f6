//! The units of the kernel side: programs, maps and attachments that load, fail and upgrade
//! together.
//!
//! Everything that attaches, watches, replaces, detaches or lists programs walks over a list of
//! units in its order, and over the hooks of each in theirs; detaching goes the other way round. The
//! maps are those of the unit's object. The pinned ones are shared by name among all units of a
//! layout, and so are the directories of pins: `DIR/vN/maps/MAP` and `DIR/vN/links/PROGRAM`.

use super::bpf::AttachType;
use super::map_specs;

/// Programs and attachments that load, fail and upgrade as a whole.
#[derive(Debug)]
pub struct Unit {
    /// Its name, as `nohop status` shows it.
    pub name: &'static str,
    /// Whether the daemon doesn't start without it. Another unit fails alone.
    pub is_required: bool,
    /// Where its programs are.
    pub object: Object,
    /// Its programs, in the order in which they are attached.
    pub hooks: &'static [Hook],
}

/// An object: the programs and maps that a build makes one file of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Object {
    /// The hooks that translate, and all maps.
    Connect,
    /// The sockops program. What it shares with the other it finds by the maps' pins.
    Outcomes,
}

impl Object {
    /// The file.
    pub fn bytes(self) -> &'static [u8] {
        match self {
            Object::Connect => map_specs::CONNECT,
            Object::Outcomes => map_specs::OUTCOMES,
        }
    }
}

/// A program and where it is attached.
#[derive(Clone, Copy, Debug)]
pub struct Hook {
    /// The program's name in the object, and of the link's pin.
    pub program: &'static str,
    /// Its attach point.
    pub target: AttachPoint,
}

/// Where a program can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachPoint {
    /// The served cgroup, at this hook of it.
    Cgroup(AttachType),
}

const fn cgroup(program: &'static str, attach_type: AttachType) -> Hook {
    Hook { program, target: AttachPoint::Cgroup(attach_type) }
}

/// The units, in the order in which they are attached. The first makes the maps of the table.
pub const UNITS: &[Unit] = &[CONNECT, OUTCOMES];

const CONNECT: Unit = Unit {
    name: "connect",
    is_required: true,
    object: Object::Connect,
    // Reverse translation (getpeername, recvmsg) comes before translation (sendmsg, connect), so
    // that no translated socket ever lacks it.
    hooks: &[
        cgroup("nohop_getpeer4", AttachType::GETPEERNAME4),
        cgroup("nohop_getpeer6", AttachType::GETPEERNAME6),
        cgroup("nohop_recvmsg4", AttachType::RECVMSG4),
        cgroup("nohop_recvmsg6", AttachType::RECVMSG6),
        cgroup("nohop_sendmsg4", AttachType::SENDMSG4),
        cgroup("nohop_sendmsg6", AttachType::SENDMSG6),
        cgroup("nohop_connect4", AttachType::CONNECT4),
        cgroup("nohop_connect6", AttachType::CONNECT6),
    ],
};

/// What counts connections in flight and failures.
pub const OUTCOMES: Unit = Unit {
    name: "outcomes",
    is_required: false,
    object: Object::Outcomes,
    hooks: &[cgroup("nohop_sockops", AttachType::SOCK_OPS)],
};

/// All hooks of these units, in the order in which they are attached.
pub fn hooks(units: &'static [Unit]) -> impl Iterator<Item = &'static Hook> {
    units.iter().flat_map(|unit| unit.hooks)
}

/// A unit's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitHealth {
    /// Its name.
    pub name: &'static str,
    /// Whether the daemon doesn't serve without it.
    pub is_required: bool,
    /// Whether its hooks run.
    pub state: UnitState,
    /// Why they don't; `None` while they do.
    pub reason: Option<String>,
}

/// Whether a unit's hooks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitState {
    /// All of them run this daemon's programs.
    Attached,
    /// They still run an earlier daemon's.
    Waiting,
    /// The kernel refused the unit, or a hook can't be attached again.
    Failed,
    /// It is switched off.
    Off,
}

impl UnitState {
    /// As `nohop status` shows it.
    pub fn name(self) -> &'static str {
        match self {
            UnitState::Attached => "attached",
            UnitState::Waiting => "waiting",
            UnitState::Failed => "failed",
            UnitState::Off => "off",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pins of all units share a directory.
    #[test]
    fn names_are_unique_and_the_first_unit_is_required() {
        assert!(UNITS[0].is_required);
        let unique = |names: Vec<&str>| {
            let n_names = names.len();
            names.into_iter().collect::<std::collections::BTreeSet<_>>().len() == n_names
        };
        assert!(unique(UNITS.iter().map(|unit| unit.name).collect()));
        assert!(unique(hooks(UNITS).map(|hook| hook.program).collect()));
    }
}
