//! Which processor a program runs on, and whether it sleeps.

use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use testbed::process::Process;

/// The processor that a server has for itself, by its place among those that this run may use.
pub const SERVER: usize = 0;
/// The client's processor.
pub const CLIENT: usize = 1;

/// Has all that `act` starts run on one processor only, as by `taskset`: a program sees from its start
/// how many it may use, and makes as many threads.
///
/// # Errors
/// When `act` fails, or there is no such processor.
pub fn on<T>(core: usize, act: impl FnOnce() -> Result<T>) -> Result<T> {
    let all = sched_getaffinity(None).context("ask for the processors of this thread")?;
    let cpu = number(core)?;
    let mut one = CpuSet::new();
    one.set(cpu);
    sched_setaffinity(None, &one).with_context(|| format!("run on processor {cpu} only"))?;
    let done = act();
    sched_setaffinity(None, &all).context("run on all processors again")?;
    done
}

/// Moves threads, such as the kernel's, to a processor, by its place among those that this run may use.
///
/// # Errors
/// When one is gone, or there is no such processor.
pub fn move_to(core: usize, threads: &[Pid]) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(number(core)?);
    let mut moved = threads.iter().map(|thread| sched_setaffinity(Some(*thread), &one));
    moved.try_for_each(|moved| moved.context("move a thread to a processor"))
}

/// The number that the kernel gives to a processor, by its place among those that this run may use.
///
/// # Errors
/// When there is no such processor.
pub fn number(core: usize) -> Result<usize> {
    let all = sched_getaffinity(None).context("ask for the processors of this thread")?;
    let usable = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).nth(core);
    usable.with_context(|| format!("this run may not use {} processors", core + 1))
}

/// Keeps the processors that this run may use from going to sleep, as the kernel's `idle=poll` does, for as long
/// as the result lives: each runs a loop of the policy SCHED_IDLE, before which everything else comes. A virtual
/// machine's processor takes tens of microseconds to wake up, which says nothing of the program that it runs then.
///
/// # Errors
/// When a loop can't be started.
pub fn keep_awake() -> Result<Vec<Process>> {
    let cores = (0..).take_while(|core| number(*core).is_ok());
    let spin = |core| {
        let mut command = Command::new("chrt");
        command.args(["--idle", "0", "sh", "-c", "while :; do :; done"]);
        on(core, || Process::spawn("a loop", command))
    };
    cores.map(spin).collect()
}

#[cfg(test)]
mod tests {
    use std::thread::available_parallelism;

    use super::*;

    #[test]
    fn one_processor_and_then_all_again() {
        let before = available_parallelism().expect("a number");
        let within = on(SERVER, || Ok(available_parallelism()?.get())).expect("it can be pinned");
        assert_eq!(within, 1);
        assert_eq!(available_parallelism().expect("a number"), before);
        assert!(on(CpuSet::MAX_CPU, || Ok(())).is_err());
    }
}
