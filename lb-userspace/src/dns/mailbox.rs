//! Wakes the threads of UDP sockets: to stop, to take up changes, and with queries that waited.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};

use super::query_log::Arrival;
use super::udp::LocalAddress;

/// A client's query that waited for the zone and is to be forwarded after all.
#[derive(Debug)]
pub(super) struct RequeuedQuery {
    pub(super) bytes: Vec<u8>,
    pub(super) arrival: Arrival,
    pub(super) to: LocalAddress,
    /// Whether it may be about a service.
    pub(super) is_unknown: bool,
}

/// Wakes one thread.
#[derive(Debug)]
pub(super) struct Mailbox {
    event: OwnedFd,
    is_stopped: AtomicBool,
    returned: Mutex<Vec<RequeuedQuery>>,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// Where the kernel has no more file descriptors.
    pub(super) fn new() -> io::Result<Mailbox> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { event, is_stopped: AtomicBool::new(false), returned: Mutex::default() })
    }

    /// Wakes the thread, which then checks everything again.
    pub(super) fn wake(&self) {
        // Only a counter that is full refuses, and then the thread is awake.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Has the thread stop reading, and end.
    pub(super) fn stop(&self) {
        self.is_stopped.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Gives a message back.
    pub(super) fn give_back(&self, returned: RequeuedQuery) {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner).push(returned);
        self.wake();
    }

    /// Resets the event. Returns the queries that were given back.
    pub(super) fn take(&self) -> Vec<RequeuedQuery> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        std::mem::take(&mut self.returned.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether the thread is to end.
    pub(super) fn is_stopped(&self) -> bool {
        self.is_stopped.load(Ordering::Relaxed)
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Wakes all threads.
#[derive(Clone, Debug, Default)]
pub(super) struct WorkerWakers(Arc<Mutex<Vec<Weak<Mailbox>>>>);

impl WorkerWakers {
    /// One more thread to wake.
    pub(super) fn add(&self, mailbox: &Arc<Mailbox>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(mailbox));
    }

    /// Wakes them.
    pub(super) fn ring(&self) {
        let mailboxes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mailboxes.iter().filter_map(Weak::upgrade).for_each(|mailbox| mailbox.wake());
    }
}
