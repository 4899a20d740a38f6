//! What the admin interface shows and does, as its server asks for it.

use hyper::body::Bytes;
use tokio::sync::{mpsc, watch};

use super::api;
use super::documents::At;
use super::trace::{TraceFilter, TraceRefusal};

/// The data of the admin interface.
pub trait View: Send + Sync + 'static {
    /// The daemon as a whole.
    fn status(&self) -> api::Status;
    /// Every service, by name.
    fn services(&self) -> Vec<api::ServiceStatus>;
    /// Every service in brief, by name.
    fn summaries(&self) -> Vec<api::ServiceSummary>;
    /// The configuration in force.
    fn settings(&self) -> Vec<api::SettingStatus>;
    /// The explanation of a name, a VIP or an instance's address, also of an unknown one. `may_ask` is
    /// whether the source may be asked for what isn't known here, such as the outputs of checks.
    fn explain(&self, what: &str, may_ask: bool) -> impl Future<Output = api::Explanation> + Send;
    /// DNS's answer for a name and a type, or why there is none.
    fn look_up(
        &self,
        name: &str,
        kind: &str,
    ) -> impl Future<Output = Result<api::DnsLookup, String>> + Send;
    /// Whether requests are logged.
    fn logs_access(&self) -> bool {
        false
    }
    /// The metrics, in the text format of Prometheus.
    fn metrics(&self) -> String;
    /// Lines of traced connections as they happen, until the receiver is dropped. It blocks for a moment.
    fn trace(&self, filter: TraceFilter) -> Result<mpsc::Receiver<Bytes>, TraceRefusal>;
    /// The table's generation and the status' revision, as they grow.
    fn at(&self) -> watch::Receiver<At>;
    /// Reloads the configuration.
    fn reload(&self) -> impl Future<Output = api::Reload> + Send;
    /// What is drained by hand.
    fn drains(&self) -> Vec<api::DrainStatus>;
    /// Why clients outside aren't to come to this node as an edge; `None` where they are.
    fn edge_obstacle(&self) -> Option<String>;
    /// The flows through this edge, by bytes or by the time of their last packet; `None` where it is none.
    fn flows(&self, by_bytes: bool, limit: usize) -> Option<api::FlowsDocument>;
    /// Drains what this text names, or undrains it.
    fn drain(&self, is_drain: bool, target: &str) -> impl Future<Output = api::DrainChange> + Send;
}
