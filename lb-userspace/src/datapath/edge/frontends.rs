//! The maps of public frontends: which service each leads to.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use aya::Ebpf;
use lb_common::{EdgeServiceRef, Frontend, Frontend6};

use super::super::bpf::ProgramWait;
use super::super::kernel::{Hash, Plain, io_error, take_hash, wait_for_programs};
use super::super::maps::FrontendKey;
use super::super::reconcile::Pressure;
use crate::causes;

/// No service.
pub const NO_SERVICE: EdgeServiceRef = EdgeServiceRef { service: u32::MAX, shows_client: 0 };

/// The maps, and what is in them.
#[derive(Debug)]
pub struct Frontends {
    v4: Hash<Frontend, EdgeServiceRef>,
    v6: Hash<Frontend6, EdgeServiceRef>,
    capacity: u32,
    present: BTreeMap<FrontendKey, EdgeServiceRef>,
    program_wait: Option<ProgramWait>,
    /// Whether elements were removed that a program may still read.
    is_dirty: bool,
    problem: Option<String>,
}

impl Frontends {
    /// Takes the maps of a loaded object, of this capacity each, with what an earlier daemon has left in them.
    ///
    /// # Errors
    /// Why they can't be had or read.
    pub fn take(ebpf: &mut Ebpf, capacity: u32) -> Result<Frontends, String> {
        let taken = |error| causes::with_root(&error);
        let mut frontends = Frontends {
            v4: take_hash(ebpf, "EDGE_FRONTENDS").map_err(taken)?,
            v6: take_hash(ebpf, "EDGE_FRONTENDS6").map_err(taken)?,
            capacity,
            present: BTreeMap::new(),
            program_wait: ProgramWait::new().ok(),
            is_dirty: false,
            problem: None,
        };
        frontends
            .read()
            .map_err(|error| format!("the map EDGE_FRONTENDS can't be read: {error}"))?;
        Ok(frontends)
    }

    /// What is in them, each with the index of its service.
    pub fn present(&self) -> &BTreeMap<FrontendKey, EdgeServiceRef> {
        &self.present
    }

    /// The index of the service that a frontend leads to.
    pub fn service(&self, key: &FrontendKey) -> Option<u32> {
        self.present.get(key).map(|found| found.service)
    }

    /// Why not all that should be there are.
    pub fn problem(&self) -> Option<&String> {
        self.problem.as_ref()
    }

    /// Whether so many fit.
    pub fn have_room_for(&self, wanted: &BTreeMap<FrontendKey, EdgeServiceRef>) -> bool {
        let n_v6 = wanted.keys().filter(|key| key.address.is_ipv6()).count();
        n_v6.max(wanted.len() - n_v6) <= self.capacity as usize
    }

    /// How full they are.
    pub fn pressure(&self) -> Vec<(&'static str, Pressure)> {
        let n_v6 = self.present.keys().filter(|key| key.address.is_ipv6()).count();
        let n_v4 = self.present.len() - n_v6;
        let pressure = |n: usize, capacity| Pressure { used: n as u32, capacity };
        vec![
            ("EDGE_FRONTENDS", pressure(n_v4, self.capacity)),
            ("EDGE_FRONTENDS6", pressure(n_v6, self.capacity)),
        ]
    }

    /// Makes them as `wanted`, as far as there is room: services first.
    pub fn update(&mut self, wanted: &BTreeMap<FrontendKey, EdgeServiceRef>) {
        if *wanted == self.present {
            self.problem = None;
            return;
        }
        // What no service has any more stays, for none.
        let is_kept = |(key, present): &(&FrontendKey, &EdgeServiceRef)| {
            let is_same = |wanted: &EdgeServiceRef| wanted.service == present.service;
            wanted.get(*key).is_some_and(|wanted| is_same(wanted) || *wanted == NO_SERVICE)
        };
        let gone: Vec<_> =
            self.present.iter().filter(|one| !is_kept(one)).map(|(key, _)| *key).collect();
        gone.iter().for_each(|key| self.remove(key));
        let (rest, services): (Vec<_>, Vec<_>) = wanted
            .iter()
            .filter(|(key, service)| self.present.get(key) != Some(service))
            .partition(|(_, service)| **service == NO_SERVICE);
        let (n_wanted, mut n_refused, mut reason) = (wanted.len(), 0, None);
        for (key, service) in services.into_iter().chain(rest) {
            if let Err(error) = self.insert(*key, *service) {
                n_refused += 1;
                reason.get_or_insert(error);
            }
        }
        let problem = reason.map(|error| self.explain(n_refused, n_wanted, &error));
        if let Some(problem) = problem.as_ref().filter(|_| problem != self.problem) {
            tracing::error!("{problem}");
        }
        self.problem = problem;
    }

    fn explain(&self, n_refused: usize, n_wanted: usize, error: &io::Error) -> String {
        let missing =
            format!("edge: {n_refused} of {n_wanted} public frontends aren't in the kernel");
        if error.raw_os_error() != Some(nix::libc::E2BIG) {
            return format!("{missing}: {error}");
        }
        let capacity = self.capacity;
        format!(
            "{missing}: EDGE_FRONTENDS has room for {capacity} of an address family, and each VIP takes two for its \
             other ports; have fewer VIPs or ports in edge.vips"
        )
    }

    /// Makes frontends lead to no service. They are removed first, so that their elements are waited for once and
    /// not one by one; meanwhile those of other ports answer for them.
    pub fn give_up(&mut self, keys: &[FrontendKey]) {
        let present: Vec<_> =
            keys.iter().filter(|key| self.present.contains_key(key)).copied().collect();
        present.iter().for_each(|key| self.remove(key));
        for key in present {
            if let Err(error) = self.insert(key, NO_SERVICE) {
                tracing::debug!("EDGE_FRONTENDS: {error}");
            }
        }
    }

    /// Inserts a frontend, or makes it lead to another service.
    fn insert(&mut self, key: FrontendKey, service: EdgeServiceRef) -> io::Result<()> {
        // The kernel reuses a removed element at once.
        if std::mem::take(&mut self.is_dirty) {
            wait_for_programs(self.program_wait.as_ref());
        }
        let target = Plain(service);
        let FrontendKey { port, protocol, .. } = key;
        match key.address {
            IpAddr::V4(ip) => {
                let address = ip.octets();
                let key = Plain(Frontend { address, port, protocol, padding: 0 });
                self.v4.insert(key, target, 0).map_err(io_error)
            }
            IpAddr::V6(ip) => {
                let address = ip.octets();
                let key = Plain(Frontend6 { address, port, protocol, padding: 0 });
                self.v6.insert(key, target, 0).map_err(io_error)
            }
        }?;
        // One that was there already: the kernel uses the element of its former value for the next one, as after a
        // removal.
        self.is_dirty = self.present.insert(key, service).is_some();
        Ok(())
    }

    /// Removes a frontend; one that is absent is no error.
    pub fn remove(&mut self, key: &FrontendKey) {
        let &FrontendKey { address, port, protocol } = key;
        let removed = match address {
            IpAddr::V4(ip) => {
                let address = ip.octets();
                self.v4.remove(&Plain(Frontend { address, port, protocol, padding: 0 }))
            }
            IpAddr::V6(ip) => {
                let address = ip.octets();
                self.v6.remove(&Plain(Frontend6 { address, port, protocol, padding: 0 }))
            }
        };
        self.is_dirty = true;
        match removed.map_err(io_error) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!("EDGE_FRONTENDS: {error}");
            }
            _ => {
                self.present.remove(key);
            }
        }
    }

    fn read(&mut self) -> io::Result<()> {
        for found in self.v4.iter() {
            let (Plain(Frontend { address, port, protocol, .. }), Plain(target)) =
                found.map_err(io_error)?;
            self.present.insert(FrontendKey { address: address.into(), port, protocol }, target);
        }
        for found in self.v6.iter() {
            let (Plain(Frontend6 { address, port, protocol, .. }), Plain(target)) =
                found.map_err(io_error)?;
            self.present.insert(FrontendKey { address: address.into(), port, protocol }, target);
        }
        Ok(())
    }
}
