//! What became of the requests.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::clock::{SECOND_NS, seconds};
use crate::errors::{Failures, Name};
use crate::latency::Latency;

/// The most servers that are distinguished.
const MAX_SERVERS: usize = 1024;

/// Stands for the servers beyond those.
const OTHERS: &[u8] = b"(others)";

/// Counts of requests by their results. Requests due before `start_ns` are warm-up.
pub struct Tally {
    start_ns: u64,
    slow_ns: u64,
    n_requests: u64,
    n_warmup: u64,
    n_answered: u64,
    n_slow: u64,
    failures: Failures,
    most_behind_ns: u64,
    latency: Latency,
    servers: HashMap<Vec<u8>, u64>,
    by_second: Vec<Second>,
    last_answer_ns: u64,
    last_ns: u64,
}

#[derive(Clone, Default)]
struct Second {
    n_requests: u64,
    n_failed: u64,
    n_slow: u64,
}

impl Tally {
    /// Of nothing yet.
    ///
    /// # Errors
    /// Never.
    pub fn new(start_ns: u64, slow_ns: u64) -> anyhow::Result<Tally> {
        Ok(Tally {
            start_ns,
            slow_ns,
            n_requests: 0,
            n_warmup: 0,
            n_answered: 0,
            n_slow: 0,
            failures: Failures::of_streams(),
            most_behind_ns: 0,
            latency: Latency::coarse()?,
            servers: HashMap::new(),
            by_second: Vec::new(),
            last_answer_ns: start_ns,
            last_ns: start_ns,
        })
    }

    /// A request was taken from the schedule.
    pub fn due(&mut self, due_ns: u64) {
        match self.second(due_ns) {
            Some(second) => {
                second.n_requests += 1;
                self.n_requests += 1;
            }
            None => self.n_warmup += 1,
        }
    }

    /// It is about to be sent.
    pub fn sent(&mut self, due_ns: u64, now_ns: u64) {
        if due_ns >= self.start_ns {
            self.most_behind_ns = self.most_behind_ns.max(now_ns.saturating_sub(due_ns));
        }
    }

    /// It was answered, by the server of this name.
    pub fn answered(&mut self, due_ns: u64, now_ns: u64, server: &[u8]) {
        let took_ns = now_ns.saturating_sub(due_ns);
        let is_slow = took_ns > self.slow_ns;
        let Some(second) = self.second(due_ns) else { return };
        second.n_slow += u64::from(is_slow);
        self.n_slow += u64::from(is_slow);
        self.n_answered += 1;
        self.latency.record(took_ns);
        self.last_answer_ns = now_ns;
        self.last_ns = now_ns;
        if let Some(n) = self.servers.get_mut(server) {
            *n += 1;
        } else {
            let server = if self.servers.len() < MAX_SERVERS { server } else { OTHERS };
            *self.servers.entry(server.to_vec()).or_default() += 1;
        }
    }

    /// It failed.
    pub fn failed(&mut self, due_ns: u64, now_ns: u64, name: Name) {
        let Some(second) = self.second(due_ns) else { return };
        second.n_failed += 1;
        self.failures.add(name);
        self.last_ns = now_ns;
    }

    /// The second in which it was due; `None` while warming up.
    fn second(&mut self, due_ns: u64) -> Option<&mut Second> {
        let second_idx = (due_ns.checked_sub(self.start_ns)? / SECOND_NS) as usize;
        if second_idx >= self.by_second.len() {
            self.by_second.resize(second_idx + 1, Second::default());
        }
        self.by_second.get_mut(second_idx)
    }

    /// The report.
    pub fn to_json(&self) -> Value {
        let answering_s = seconds(self.last_answer_ns - self.start_ns);
        let rate = if answering_s > 0.0 { self.n_answered as f64 / answering_s } else { 0.0 };
        let mut servers = serde_json::Map::new();
        for (server, n) in &self.servers {
            let entry = servers.entry(String::from_utf8_lossy(server)).or_insert(0.into());
            *entry = (entry.as_u64().unwrap_or_default() + n).into();
        }
        let by_second = self.by_second.iter().map(
            |Second { n_requests, n_failed, n_slow }| {
                json!({ "requests": n_requests, "failed": n_failed, "slow": n_slow })
            },
        );
        json!({
            "requests": self.n_requests,
            "requests_warmup": self.n_warmup,
            "answered": self.n_answered,
            "failed": self.failures.to_json(),
            "n_failed": self.failures.total(),
            "n_slow": self.n_slow,
            "rate": rate,
            "behind_us": self.most_behind_ns as f64 / 1000.0,
            "latency_us": self.latency.to_json_us(),
            "servers": servers,
            "by_second": by_second.collect::<Value>(),
            "took_s": seconds(self.last_ns - self.start_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::MILLISECOND_NS;
    use crate::errors;
    use crate::pacer::Schedule;

    #[test]
    fn requests_due_while_the_server_stalls_count_their_waiting() {
        let mut schedule = Schedule::new(0, 1000.0, 2.0);
        let mut tally = Tally::new(0, 100 * MILLISECOND_NS).unwrap();
        // One connection; the server answers in no time, but stands still from 0.5 s to 1 s.
        let mut now_ns = 0;
        while let Some(next_ns) = schedule.next_due_ns() {
            now_ns = now_ns.max(next_ns);
            let due_ns = schedule.take(now_ns).unwrap();
            tally.due(due_ns);
            tally.sent(due_ns, now_ns);
            if due_ns == 500 * MILLISECOND_NS {
                now_ns = 1000 * MILLISECOND_NS;
            }
            tally.answered(due_ns, now_ns, b"b1");
        }
        let report = tally.to_json();
        assert_eq!(report["requests"], 2000);
        assert_eq!(report["answered"], 2000);
        // Of the 500 due meanwhile, those of the first 400 ms waited for more than 100 ms.
        assert_eq!(report["n_slow"], 400);
        assert_eq!(report["by_second"][0]["slow"], 400);
        assert_eq!(report["by_second"][1]["slow"], 0);
        assert_eq!(report["behind_us"], 499_000.0);
        let p90_us = report["latency_us"]["p90"].as_f64().unwrap();
        assert!((p90_us - 300_000.0).abs() < 1500.0, "{p90_us}");
        assert_eq!(report["latency_us"]["p50"].as_f64().unwrap().round(), 1.0);
    }

    #[test]
    fn what_warms_up_is_not_counted() {
        let mut tally = Tally::new(SECOND_NS, MILLISECOND_NS).unwrap();
        for due_ns in [0, SECOND_NS - 1] {
            tally.due(due_ns);
            tally.sent(due_ns, 3 * SECOND_NS);
        }
        tally.failed(0, SECOND_NS, errors::CLOSED);
        tally.answered(SECOND_NS - 1, SECOND_NS, b"b1");
        tally.due(SECOND_NS);
        tally.failed(SECOND_NS, 2 * SECOND_NS, errors::of_status(503));
        let report = tally.to_json();
        assert_eq!((&report["requests"], &report["requests_warmup"]), (&json!(1), &json!(2)));
        assert_eq!((&report["answered"], &report["n_failed"]), (&json!(0), &json!(1)));
        assert_eq!(report["failed"]["status_503"], 1);
        assert_eq!(report["failed"]["closed"], 0);
        assert_eq!(report["by_second"], json!([{ "requests": 1, "failed": 1, "slow": 0 }]));
        assert_eq!(report["behind_us"], 0.0);
        assert_eq!(report["latency_us"]["max"], Value::Null);
    }
}
