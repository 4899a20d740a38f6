//! What the programs in the kernel report: their log, uses of services, ejections.

use aya_log::EbpfLogger;
use rustix::event::{PollFd, PollFlags};
use tokio::sync::mpsc;

use super::ejected;
use crate::capabilities;
use crate::catalog::UsageSender;
use crate::datapath::{Datapath, Report, Reports};

/// Starts the threads that forward the programs' log and events.
pub fn forward(
    datapath: &mut Datapath,
    usage: &UsageSender,
    changes: mpsc::Sender<ejected::EjectionChange>,
) {
    let start = |name: &str, forward: Box<dyn FnOnce() + Send>| {
        let thread = std::thread::Builder::new().name(name.to_owned());
        let work = move || {
            capabilities::none();
            forward();
        };
        if let Err(error) = thread.spawn(work) {
            tracing::warn!("can't start the thread {name}: {error}");
        }
    };
    if let Some(log) = datapath.take_logger() {
        start("bpf-log", Box::new(|| forward_log(log)));
    }
    match datapath.take_reports() {
        Ok(events) => {
            let usage = usage.clone();
            start("events", Box::new(move || forward_events(events, &usage, &changes)));
        }
        Err(error) => tracing::warn!("the programs' reports can't be read: {error}"),
    }
}

/// Forwards what the programs in the kernel log, for as long as the daemon lives.
fn forward_log(mut log: EbpfLogger<&'static dyn log::Log>) {
    loop {
        let mut readable = [PollFd::new(&log, PollFlags::IN)];
        match rustix::event::poll(&mut readable, None) {
            Ok(_) => log.flush(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::warn!("the programs' log can't be read: {error}"),
        }
    }
}

/// Reports to the source each connection to a service that it doesn't follow, and logs ejections and has
/// them probed, for as long as the daemon lives.
fn forward_events(
    mut events: Reports,
    usage: &UsageSender,
    changes: &mpsc::Sender<ejected::EjectionChange>,
) {
    loop {
        while let Some(report) = events.next_report() {
            match report {
                Report::Connected(name) => {
                    tracing::debug!("{name} is cold, and was connected to");
                    usage.used(&name);
                }
                Report::Ejection { service, backend, ejected } => {
                    let address = backend.address;
                    match ejected {
                        Some(ejected) => tracing::warn!("{service}: {address} is {ejected}"),
                        None => tracing::info!("{service}: {address} gets connections again"),
                    }
                    // A scan finds one that there is no room for.
                    let _ = changes.try_send(ejected::EjectionChange { service, backend });
                }
            }
        }
        let descriptors = events.descriptors();
        let mut readable: Vec<_> =
            descriptors.map(|ring| PollFd::from_borrowed_fd(ring, PollFlags::IN)).collect();
        match rustix::event::poll(&mut readable, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return tracing::warn!("the programs' reports can't be read: {error}"),
        }
    }
}
