//! Why the kernel side can't be had.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::programs::ProgramError;

use super::cause::{self, Environment, Step};
use super::obstacles::Obstacle;
use super::pins::PinError;
use super::reconcile::adopt::AdoptError;
use crate::config::cgroup::ScopeError;

/// Why the kernel side can't be had.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The kernel didn't take the object.
    #[error("the kernel refused the eBPF object; {fix}", fix = fix_of_load(.0))]
    Load(#[source] EbpfError),
    /// The kernel didn't take a program of a few instructions that shows what it offers.
    #[error("the kernel refused a program that shows what it offers: {source}; {fix}{}", after(.log))]
    Probe {
        /// The kernel's error.
        source: io::Error,
        /// The fix.
        fix: String,
        /// The verifier's log.
        log: String,
    },
    /// The kernel didn't take a program.
    #[error("the kernel refused the program {program}; {fix}", fix = fix_of_program(source))]
    Program {
        /// The program.
        program: &'static str,
        /// The kernel's error.
        source: ProgramError,
    },
    /// The object isn't the one that this daemon was built with.
    #[error("the eBPF object has no {missing}: build the daemon again")]
    Object {
        /// The map or program.
        missing: &'static str,
    },
    /// A map can't be used.
    #[error("can't use a map: {source}")]
    Map {
        /// aya's error.
        source: aya::maps::MapError,
    },
    /// A map can't be mapped into memory.
    #[error("can't map {map} into memory: {source}")]
    Mmap {
        /// The map.
        map: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// New maps hold less than those that they are to replace, which serve on.
    #[error(
        "the new maps don't hold {n_services} of the services that are served, such as {name}: {reason}"
    )]
    HoldsLess {
        /// How many services they lack.
        n_services: usize,
        /// One of them.
        name: String,
        /// Why it isn't in them.
        reason: String,
    },
    /// The cgroup can't be served.
    #[error(transparent)]
    Scope(#[from] ScopeError),
    /// The pins can't be used.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The maps of an earlier daemon can't be read.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// The cgroup can't be attached to.
    #[error("can't open the cgroup {cgroup}: {source}; name a cgroup v2 directory with --cgroup")]
    Cgroup {
        /// The directory.
        cgroup: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// The directory isn't a cgroup v2 one, or the process may not attach to it.
    #[error("can't attach {program} to {cgroup}: {source}; {fix}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The directory.
        cgroup: PathBuf,
        /// The kernel's error.
        source: io::Error,
        /// The fix.
        fix: String,
    },
    /// Another program holds a hook exclusively.
    #[error("{}; {}", .0, .0.fix())]
    Obstacle(Obstacle),
    /// A link can't be pinned or detached.
    #[error("can't {action} the link {link}: {source}")]
    Link {
        /// `pin`, `read` or `detach`.
        action: &'static str,
        /// The pin.
        link: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

fn fix_of_load(error: &EbpfError) -> String {
    let step = match error {
        EbpfError::MapError(_) => Step::Map,
        _ => Step::Program { has_log: false },
    };
    fix(step, error)
}

fn fix_of_program(error: &ProgramError) -> String {
    let has_log = match error {
        ProgramError::LoadError { verifier_log, .. } => !verifier_log.to_string().is_empty(),
        _ => false,
    };
    fix(Step::Program { has_log }, error)
}

fn fix(step: Step, error: &(dyn std::error::Error + 'static)) -> String {
    match cause::root_cause(error) {
        Some(error) => Environment::read().fix(step, error),
        None => "please report this".to_owned(),
    }
}

fn after(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("\n{log}") }
}
