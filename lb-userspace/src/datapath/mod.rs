//! The datapath: the kernel side, kept in step with the table.
//!
//! Only this part knows aya and lb-common, and byte order matters only here. It is made of
//! [units](UNITS). [`Datapath::start`] brings their programs into the kernel, or takes over what an
//! earlier daemon left there, [`Datapath::apply`] brings the maps to a table, and [`Datapath::fix`]
//! keeps the hooks attached.

mod activity;
mod bpf;
mod btf;
mod buddy;
mod bypass;
mod cause;
mod conns;
mod control;
pub mod diag;
mod edge;
mod ejected;
mod error;
mod events;
mod features;
mod former;
mod handle;
mod ids;
mod in_flight;
mod intercept;
mod kernel;
mod links;
mod map_specs;
mod maps;
mod memcg;
mod names;
mod netlink;
mod object;
mod obstacles;
mod options;
mod pins;
pub mod probe;
mod prog_stats;
pub mod public_routes;
mod reconcile;
pub mod route;
mod socket_terminator;
mod start;
mod tc;
mod tcp_terminator;
mod trace;
mod units;

pub use bpf::{AttachType, netns_cookie};
pub use control::{COUNTERS, Datapath, exclusion_problems};
pub use edge::{
    Device, EdgeFlow, EdgeFlowState, EdgeInterface, EdgeMode, EdgeOptions, EdgeStatus,
    EdgeTimeouts, FlowReader, Proof, interface_addresses, interfaces,
};
pub use ejected::{BackendRef, Ejected};
pub use error::DatapathError;
pub use events::{Report, Reports};
pub use features::{Features, Limit};
pub use handle::{HookHealth, Mode, SharedDatapath};
pub use in_flight::Recount;
pub use intercept::{InterceptSettings, intercept_problems};
pub use kernel::{Counters, ServiceCounters};
pub use lb_common::{
    BackendOutcomes, BalanceSettings, Cause, EventKind, LAYOUT, NamesCounters, RejectMethod, Sign,
    UdpConnects, is_sampled,
};
pub use links::Attachment;
pub use map_specs::fingerprints;
pub use memcg::{Charge, create_maps};
#[cfg(any(fuzzing, test))]
pub use names::answered as answered_by_kernel;
pub use names::{NamesSettings, ProbedAnswer, announce_start};
pub use obstacles::Obstacle;
pub use options::Options;
pub use pins::{
    PinError, Safety, are_charged, is_bpffs, look as look_at_pins, nearest as nearest_directory,
};
pub use prog_stats::{Cost, Measuring};
pub use reconcile::{BackendIndices, Indices, Pressure, ReconcileError};
pub use start::{find_obstacle, unload, unload_after};
pub use tc::Interface as IngressInterface;
pub use tcp_terminator::{TcpTerminator, VipConnection, VipConnections};
pub use trace::{
    Begun, FlowStep, TraceEvents, TraceStep, Traced, TracedFlow, now_ns as trace_now_ns,
};
pub use units::{AttachPoint, Hook, OUTCOMES, Object, UNITS, Unit, UnitHealth, UnitState, hooks};
