//! What a source has of a name, asked about when a person wants to know: all that is registered, routed
//! or not, with each check and its output. The catalog has none of that: outputs change all the time.

use std::sync::Arc;

/// The registrations of one name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspection {
    /// The source that reports them.
    pub source: &'static str,
    /// In the source's order, at most [`MAX_INSTANCES`].
    pub instances: Vec<InspectedInstance>,
    /// The number of instances beyond those.
    pub n_more: usize,
    /// Whether the token may read less than there is.
    pub is_filtered: bool,
}

/// The most instances of a name that are inspected.
pub const MAX_INSTANCES: usize = 1_000;

/// The most checks of an instance that are shown.
pub const MAX_CHECKS: usize = 32;

/// The longest output of a check that is shown, in characters.
pub const MAX_OUTPUT: usize = 200;

/// One registration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InspectedInstance {
    /// The name, as registered.
    pub service: String,
    /// The node.
    pub node: String,
    /// The id, unique within its node.
    pub id: String,
    /// Address and port.
    pub address: String,
    /// Whether it has the tag.
    pub is_tagged: bool,
    /// Why the source's rules take it out; `None` where they don't.
    pub out: Option<String>,
    /// Its checks and those of its node, at most [`MAX_CHECKS`].
    pub checks: Vec<InspectedCheck>,
}

/// One check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InspectedCheck {
    /// The name.
    pub name: String,
    /// `passing`, `warning` or `critical`.
    pub status: String,
    /// The first line of its output.
    pub output: String,
}

/// Why nothing is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    /// Too many inspections wait, or the source restarts.
    #[error("the source is busy: try again")]
    Busy,
    /// The source doesn't answer, with the fix.
    #[error("{0}")]
    Failed(Arc<str>),
}
