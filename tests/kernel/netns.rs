//! Network namespaces of trials' own.

use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the calling thread to a network namespace of its own, with loopback up.
pub fn leave() {
    // SAFETY: the flag shares and unshares no file descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
    ip("link set lo up");
}

/// Runs a trial on a thread in a network namespace of its own.
pub fn inside(trial: impl FnOnce() + Send + 'static) {
    let moved = std::thread::spawn(move || {
        leave();
        trial();
    });
    if let Err(panic) = moved.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs a command of iproute2 in this thread's network namespace.
pub fn ip(command: &str) {
    let status = Command::new("ip").args(command.split(' ')).status().unwrap();
    assert!(status.success(), "ip {command}");
}
