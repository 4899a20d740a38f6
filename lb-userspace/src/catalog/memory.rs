//! What outlives one life of a source: its last good catalog, and how old each part of it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crate::table::Instance;

/// What a source knew, for the next one to begin with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Memory {
    /// Whom it asked, and for what. Of another origin only the uses count.
    pub origin: String,
    /// The name of this node, where the source had it.
    pub node: Option<String>,
    /// Whether nothing was to be translated.
    pub off: bool,
    /// When the list of names was answered last; `None` where it never was.
    pub names_at: Option<Instant>,
    /// Every name of the list, and what is known of it.
    pub services: BTreeMap<Arc<str>, Remembered>,
}

/// What is remembered of one service.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Remembered {
    /// Its instances; none where they were never known.
    pub instances: Arc<[Instance]>,
    /// When the source last answered for them.
    pub answered_at: Option<Instant>,
    /// When somebody on this node last used it.
    pub used_at: Option<Instant>,
}
