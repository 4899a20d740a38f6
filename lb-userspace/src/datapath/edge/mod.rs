//! The unit `edge`: packets from outside for public VIPs are sent to backends, by translation of both
//! addresses.

mod status;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::units::{UnitHealth, UnitState};
pub use status::{EdgeFlow, EdgeFlowState, EdgeInterface, EdgeMode, EdgeStatus};

/// The unit's name.
const UNIT: &str = "edge";

/// What an edge does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EdgeOptions {
    /// The interfaces by which clients and backends send their packets here.
    pub interfaces: Vec<String>,
    /// This host's addresses from which packets go to backends, at most
    /// four of each address family.
    pub sources: Vec<IpAddr>,
    /// How many flows there are room for.
    pub max_flows: u32,
    /// After how long without a packet flows end.
    pub timeouts: EdgeTimeouts,
}

/// After how long without a packet a flow ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EdgeTimeouts {
    /// An established TCP connection.
    pub established: Duration,
    /// One that one side has closed.
    pub half_closed: Duration,
    /// One that both have closed or that was reset, and one that isn't established yet.
    pub closed: Duration,
    /// UDP.
    pub udp: Duration,
}

impl Default for EdgeTimeouts {
    fn default() -> EdgeTimeouts {
        EdgeTimeouts {
            established: Duration::from_secs(3_600),
            half_closed: Duration::from_secs(120),
            closed: Duration::from_secs(60),
            udp: Duration::from_secs(60),
        }
    }
}

/// The unit.
#[derive(Debug, Default)]
pub struct Edge {
    options: Option<EdgeOptions>,
    public: HashMap<Arc<str>, Vec<SocketAddr>>,
}

impl Edge {
    /// Sets what it does; `None` for nothing.
    pub fn configure(&mut self, options: Option<EdgeOptions>) {
        self.options = options;
    }

    /// Sets the public addresses of services, which the next table applies.
    pub fn set_public(&mut self, public: HashMap<Arc<str>, Vec<SocketAddr>>) {
        self.public = public;
    }

    /// How it does; `None` where it isn't configured.
    pub fn status(&self) -> Option<EdgeStatus> {
        let options = self.options.as_ref()?;
        let interface = |name: &String| EdgeInterface {
            name: name.clone(),
            mode: None,
            message: Some("this version attaches nothing yet".to_owned()),
        };
        Some(EdgeStatus {
            interfaces: options.interfaces.iter().map(interface).collect(),
            n_flows: 0,
            max_flows: options.max_flows,
            problems: Vec::new(),
        })
    }

    /// The flows, in no order.
    pub fn flows(&self) -> Vec<EdgeFlow> {
        Vec::new()
    }

    /// What was decided on packets, by name.
    pub fn counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// The unit's state; `None` where it isn't configured.
    pub fn health(&self) -> Option<UnitHealth> {
        let reason = self.status()?.interfaces.into_iter().find_map(|one| one.message);
        Some(UnitHealth { name: UNIT, is_required: false, state: UnitState::Failed, reason })
    }
}
