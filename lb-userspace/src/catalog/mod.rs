//! Discovery: what a source (Consul, or a file) says, turned into the table's input.
//!
//! A source never publishes less than it knows: an error, a time-out or an answer that can't be
//! read leaves the last catalog in place and changes only what [`Health`] says of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::table::Instance;

/// All that a source knows: the instances of each routed service, by the service's name.
///
/// A service whose instances are all unfit is there, with its instances; one that nobody tags any
/// more is not.
pub type Catalog = BTreeMap<Arc<str>, Arc<[Instance]>>;

/// How a source fares, for `status` and for logs.
#[derive(Clone, Debug)]
pub struct Health {
    /// The source's name: `consul` or `file`.
    pub source: &'static str,
    /// What is wrong now, with the mend; `None` while all is well.
    pub problem: Option<String>,
    /// When the source last answered, whether or not anything had changed. `None` before that.
    pub last_answer: Option<Instant>,
}
