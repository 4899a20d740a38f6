//! Epoll with timeouts in nanoseconds.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;

use crate::clock::SECOND_NS;

/// Events taken at once.
const N_EVENTS: usize = 256;

/// Everything about a stream, each change once.
pub const STREAM: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// The events of a stream that the other side closed or that broke.
pub const ENDED: EventFlags = EventFlags::RDHUP.union(EventFlags::HUP).union(EventFlags::ERR);

/// An epoll instance and the events of its last wait.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<Event>,
}

impl Poller {
    /// With nothing in it.
    ///
    /// # Errors
    /// When there are too many files open.
    pub fn new() -> io::Result<Poller> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Poller { epoll, events: Vec::with_capacity(N_EVENTS) })
    }

    /// Watches a source until it's closed. Its events bear the token.
    pub fn add(&self, source: impl AsFd, token: u64, flags: EventFlags) -> Result<(), Errno> {
        epoll::add(&self.epoll, source, EventData::new_u64(token), flags)
    }

    /// Waits for events, for no longer than so many nanoseconds (`None`: for ever), and returns how
    /// many there are.
    ///
    /// # Errors
    /// On kernels before 5.11.
    pub fn wait(&mut self, timeout_ns: Option<u64>) -> io::Result<usize> {
        self.events.clear();
        let timeout = timeout_ns.map(timespec);
        let waited = epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout.as_ref());
        match waited {
            Ok(n) => Ok(n),
            Err(Errno::INTR) => Ok(0),
            Err(Errno::NOSYS) => {
                Err(io::Error::other("this needs epoll_pwait2: run it on Linux 5.11 or later"))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// One of the events of the last wait: its token, and what happened.
    pub fn event(&self, event_idx: usize) -> (u64, EventFlags) {
        let Event { data, flags, .. } = self.events[event_idx];
        (data.u64(), flags)
    }
}

/// So many nanoseconds, as the kernel takes them.
pub fn timespec(ns: u64) -> Timespec {
    Timespec { tv_sec: (ns / SECOND_NS) as i64, tv_nsec: (ns % SECOND_NS) as i64 }
}
