//! The flows, as they are in the mapped records: read without the datapath, whose lock changes wait for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use lb_common::FlowRecord;

use super::kernel::{FlowRecords, RawFlow, now_ms};
use super::status::{EdgeFlow, EdgeFlowState};
use crate::datapath::maps::FrontendKey;

/// Reads the flows of an edge.
#[derive(Debug)]
pub struct FlowReader {
    records: FlowRecords,
    /// The frontends, each with its service.
    frontends: Arc<BTreeMap<FrontendKey, Arc<str>>>,
}

impl FlowReader {
    /// Of these records.
    pub(super) fn new(
        records: FlowRecords,
        frontends: Arc<BTreeMap<FrontendKey, Arc<str>>>,
    ) -> FlowReader {
        FlowReader { records, frontends }
    }

    /// The flows, in no order.
    pub fn flows(&self) -> Vec<EdgeFlow> {
        let now_ms = now_ms();
        let flow = |raw: RawFlow| flow(&raw, &self.frontends, now_ms);
        self.records.flows().filter_map(flow).collect()
    }
}

/// A flow, with the service of its frontend; `None` if it isn't one any more.
pub(super) fn flow(
    raw: &RawFlow,
    frontends: &BTreeMap<FrontendKey, Arc<str>>,
    now_ms: u32,
) -> Option<EdgeFlow> {
    let FlowRecord { word, packets, begun_ms, last_ms, .. } = raw.record;
    let since = |ms: u32| {
        // Another processor's clock may be ahead.
        Duration::from_millis(u64::try_from(now_ms.wrapping_sub(ms) as i32).unwrap_or(0))
    };
    let (address, port, protocol) = (raw.vip.ip(), raw.vip.port(), word.protocol);
    Some(EdgeFlow {
        service: frontends.get(&FrontendKey { address, port, protocol }).cloned(),
        client: raw.client,
        vip: raw.vip,
        backend: raw.backend,
        source: raw.source,
        protocol,
        state: EdgeFlowState::of(word.state())?,
        packets,
        bytes: raw.record.n_bytes(),
        age: since(begun_ms),
        idle: since(last_ms),
    })
}
