//! The share of the requests that new instances get from clients that keep their connections.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::backends::Instance;
use super::site::Site;
use crate::generators;

/// The instances before, and as many new ones.
pub const N_INSTANCES: usize = 3;

/// The connections of the clients' pool, and their requests a second.
pub const N_CONNECTIONS: usize = 60;
const RATE: u32 = 600;

/// How long requests come before the new instances do, and then until they count.
const LEAD: Duration = Duration::from_millis(500);
const SETTLING: Duration = Duration::from_millis(500);

/// The new ones' share of all answers over so long, in percent, and the number of requests that failed.
///
/// # Errors
/// When Consul refuses a change, or nothing can be measured.
pub fn measure(site: &mut Site, counted: Duration) -> Result<(f64, f64)> {
    site.replace(N_INSTANCES)?;
    let new = site.start_more(N_INSTANCES)?;
    let warmup = LEAD + SETTLING;
    let arguments = format!(
        "http {} --rate {RATE} --seconds {} --warmup-ms {} --connections {N_CONNECTIONS}",
        site.address,
        (warmup + counted).as_secs_f64(),
        warmup.as_millis()
    );
    let (found, done) = thread::scope(|scope| {
        let load = scope.spawn(|| generators::load(site.node.client_place(), &arguments));
        thread::sleep(LEAD);
        let done = new.instances.iter().try_for_each(|instance| site.register(instance));
        (load.join(), done)
    });
    // The next round begins with the instances from before.
    new.instances.iter().try_for_each(|instance| site.deregister(&instance.name))?;
    done?;
    let found = found.ok().context("the load's thread panicked")??;
    Ok((share(&found, &new.instances)?, generators::number(&found, "/n_failed")?))
}

fn share(found: &Value, new: &[Instance]) -> Result<f64> {
    let servers = found["servers"].as_object().context("nohop-load reports no servers")?;
    let count = |answer: &str| servers.get(answer).and_then(Value::as_u64).unwrap_or(0);
    let n_new: u64 = new.iter().map(|instance| count(&instance.answer())).sum();
    let n_all: u64 = servers.values().filter_map(Value::as_u64).sum();
    ensure!(n_all > 0, "nothing was answered: {found}");
    Ok(100.0 * n_new as f64 / n_all as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_in_percent() {
        let new = [Instance::fake("c"), Instance::fake("d")];
        let found = serde_json::json!({ "servers": {
            "hello from a": 60, "hello from c": 30, "hello from d": 10, "(others)": 0,
        } });
        assert_eq!(share(&found, &new).expect("it can be read"), 40.0);
        assert!(share(&serde_json::json!({ "servers": {} }), &new).is_err());
    }
}
