//! A rolling deploy: instance by instance is replaced, while requests come at a fixed rate.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::backends::Instance;
use super::site::Site;
use crate::generators;
use crate::node::CpuTimes;

/// The instances at any time, or one more.
pub const N_INSTANCES: usize = 10;

/// From one change to the next: 20 a second.
pub const PAUSE: Duration = Duration::from_millis(50);

/// From an instance's deregistration to its end, as Nomad's `shutdown_delay` has it.
pub const SHUTDOWN_DELAY: Duration = Duration::from_millis(500);

/// Requests a second.
pub const RATE: u32 = 500;

/// How long requests come before the first change, and after the last one.
const LEAD: Duration = Duration::from_millis(300);
const TAIL: Duration = Duration::from_millis(500);

/// A deploy's steps.
#[derive(Debug)]
enum Act<'a> {
    Register(&'a Instance),
    Deregister(&'a Instance),
    Kill(&'a Instance),
}

/// A deploy's result.
pub struct Deploy {
    /// What `nohop-load http` found.
    pub found: Value,
    /// The processor time meanwhile.
    pub cpu: CpuTimes,
}

/// Replaces one instance after the other, in so many changes.
///
/// # Errors
/// When Consul refuses a change, or nothing can be measured.
pub fn measure(site: &mut Site, n_changes: usize) -> Result<Deploy> {
    ensure!(n_changes / 2 >= N_INSTANCES, "too few changes to replace all instances");
    site.replace(N_INSTANCES)?;
    let mut new = site.start_more(n_changes / 2)?;
    let seconds = LEAD + PAUSE * n_changes as u32 + SHUTDOWN_DELAY + TAIL;
    let arguments = format!(
        "http {} --rate {RATE} --seconds {} --connections 64 --timeout-ms 2000 --close",
        site.address,
        seconds.as_secs_f64()
    );
    let acts = schedule(&site.batch.instances, &new.instances);
    let before = site.node.cpu_times()?;
    let (found, done) = thread::scope(|scope| {
        let load = scope.spawn(|| generators::load(site.node.client_place(), &arguments));
        thread::sleep(LEAD);
        let done = play(site, &acts);
        (load.join(), done)
    });
    let cpu = site.node.cpu_times()?.since(before);
    let n_gone = new.instances.len() - N_INSTANCES;
    if done.is_err() {
        // The next one is to begin with the same instances as if all had gone well.
        for instance in site.batch.instances.iter().chain(&new.instances[..n_gone]) {
            let _ = site.deregister(&instance.name);
        }
        for instance in &new.instances[n_gone..] {
            let _ = site.register(instance);
        }
    }
    new.instances.drain(..n_gone).for_each(|instance| instance.kill());
    site.batch = new;
    done?;
    let found = found.ok().context("the load's thread panicked")??;
    Ok(Deploy { found, cpu })
}

/// When to do what: the oldest leaves whenever a new one has come.
fn schedule<'a>(old: &'a [Instance], new: &'a [Instance]) -> Vec<(Duration, Act<'a>)> {
    let mut acts = Vec::new();
    for (nth, (coming, leaving)) in new.iter().zip(old.iter().chain(new)).enumerate() {
        let at = PAUSE * 2 * nth as u32;
        acts.push((at, Act::Register(coming)));
        acts.push((at + PAUSE, Act::Deregister(leaving)));
        acts.push((at + PAUSE + SHUTDOWN_DELAY, Act::Kill(leaving)));
    }
    acts.sort_by_key(|(at, _)| *at);
    acts
}

fn play(site: &Site, acts: &[(Duration, Act)]) -> Result<()> {
    let start = Instant::now();
    for (at, act) in acts {
        thread::sleep((start + *at).saturating_duration_since(Instant::now()));
        match act {
            Act::Register(instance) => site.register(instance)?,
            Act::Deregister(instance) => site.deregister(&instance.name)?,
            Act::Kill(instance) => instance.kill(),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_leaves_when_a_new_one_has_come() {
        let instances = |names: &[&str]| -> Vec<Instance> {
            names.iter().map(|name| Instance::fake(name)).collect()
        };
        let (old, new) = (instances(&["a"]), instances(&["b", "c", "d"]));
        let acts = schedule(&old, &new);
        let texts: Vec<String> = acts
            .iter()
            .map(|(at, act)| match act {
                Act::Register(instance) => format!("{} +{}", at.as_millis(), instance.name),
                Act::Deregister(instance) => format!("{} -{}", at.as_millis(), instance.name),
                Act::Kill(instance) => format!("{} x{}", at.as_millis(), instance.name),
            })
            .collect();
        let expected =
            ["0 +b", "50 -a", "100 +c", "150 -b", "200 +d", "250 -c", "550 xa", "650 xb", "750 xc"];
        assert_eq!(texts, expected);
    }
}
