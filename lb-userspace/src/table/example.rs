//! A service and a backend for tests: they set what they are about, and take the rest from here.

use std::net::SocketAddr;

use super::{Backend, BackendState, Ports, Protocols, Service, Watch};
use crate::config::BalanceAlgorithm;

impl Service {
    /// `web`, at TCP port 80 of 127.128.0.1, with these backends.
    pub fn example(backends: Vec<Backend>) -> Service {
        Service {
            name: "web".into(),
            vip: [127, 128, 0, 1].into(),
            vip6: None,
            ports: Ports::only([80]),
            protocols: Protocols::Tcp,
            algorithm: BalanceAlgorithm::Random,
            pin: None,
            public: Vec::new(),
            backends,
            excluded: Vec::new(),
            notes: Vec::new(),
            watch: Watch::Live,
            generation: 1,
        }
    }
}

impl Backend {
    /// A healthy one of a source without nodes and ids.
    pub fn example(address: SocketAddr) -> Backend {
        Backend {
            address: Some(address),
            shown_address: address.to_string(),
            node: String::new(),
            id: String::new(),
            weight: 1,
            state: BackendState::Healthy,
            group: 0,
            reason: None,
            host_only: false,
        }
    }
}
