//! What the TCP sockets of this host connected by VIPs: what their records have, or their storage.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aya::maps::MapData;
use lb_common::{ConnRecord, NOT_COUNTED, RevNat};
use zerocopy::FromBytes;

use super::diag::{self, Stored};
use super::kernel::ConnRecords;

/// The same for a connection that the unit `outcomes` follows: it releases the record itself, unless it was
/// detached at the end. A socket that lives where this process can't list it keeps its record for longer.
const COUNTED_ABANDONED_AFTER: Duration = Duration::from_secs(60 * 60);

/// For how long a record has to stay as it is, and its socket unlisted, until it is free: a socket that is
/// about to send its SYN isn't listed either.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// Reads what TCP sockets remember.
#[derive(Clone, Debug)]
pub struct TcpConns {
    records: ConnRecords,
    /// Where the sockets' storages are pinned.
    storages: PathBuf,
}

/// The TCP connections of this host by VIPs.
#[derive(Debug)]
pub struct TcpConnList {
    /// Each with what its socket remembers, whatever layout the maps had when it connected. None that
    /// goes to its peer itself, also where its socket was connected by a VIP once.
    pub conns: Vec<(Stored, RevNat)>,
    /// The records of sockets that aren't listed.
    pub unlisted: Vec<ConnRecord>,
}

impl TcpConns {
    /// Reads records, and the storage that is pinned in `storages`.
    pub fn new(records: ConnRecords, storages: PathBuf) -> TcpConns {
        TcpConns { records, storages }
    }

    /// The connections. Blocks: see [`diag::stored_tcp`].
    ///
    /// # Errors
    /// Why some couldn't be listed.
    pub fn list(&self) -> Result<TcpConnList, String> {
        let storage = self.storage()?;
        let mut records = self.records.all();
        let (sockets, errors) =
            diag::stored_tcp(storage.fd().as_fd(), |cookie| records.contains_key(&cookie));
        if let Some(error) = errors.first() {
            return Err(error.to_string());
        }
        let conns = sockets.into_values().filter_map(|socket| {
            let revnat = remembered(records.remove(&socket.cookie).as_ref(), &socket)?;
            Some((socket, revnat))
        });
        let conns = conns.collect();
        Ok(TcpConnList { conns, unlisted: records.into_values().collect() })
    }

    /// Aborts the connections for which `is_chosen` is true, by what their sockets remember. Returns how
    /// many, and what failed. Blocks: see [`diag::abort_tcp`].
    pub fn abort(&self, is_chosen: impl Fn(&RevNat) -> bool + Sync) -> (usize, Option<String>) {
        let storage = match self.storage() {
            Ok(storage) => storage,
            Err(error) => return (0, Some(error)),
        };
        let records = self.records.all();
        let (n_aborted, errors) = diag::abort_tcp(
            storage.fd().as_fd(),
            |cookie| records.contains_key(&cookie),
            |socket| {
                remembered(records.get(&socket.cookie), socket)
                    .is_some_and(|revnat| is_chosen(&revnat))
            },
        );
        (n_aborted, errors.first().map(ToString::to_string))
    }

    /// Frees the records of sockets that are gone.
    pub fn sweep(&self, unlisted: &[ConnRecord], suspects: &mut Suspects, now: Instant) {
        suspects.take_gone(unlisted, now).iter().for_each(|record| self.records.abandon(record));
    }

    /// The number of records that are in use.
    pub fn n_records(&self) -> usize {
        self.records.all().len()
    }

    fn storage(&self) -> Result<MapData, String> {
        MapData::from_pin(self.storages.join("SK_REVNAT"))
            .map_err(|error| format!("can't read what sockets connected to: {error}"))
    }
}

/// What a socket remembers of the connection that it has.
fn remembered(record: Option<&ConnRecord>, socket: &Stored) -> Option<RevNat> {
    let recorded = record.map(|record| record.revnat);
    let stored = || RevNat::read_from_bytes(socket.storage.as_ref()?).ok();
    let is_its = |revnat: &RevNat| {
        let backend = SocketAddr::from((revnat.backend.octets, revnat.backend_port));
        canonical(backend) == canonical(socket.destination)
    };
    recorded.filter(is_its).or_else(|| stored().filter(is_its))
}

/// With an IPv4 address as what it is, also where a socket has it in IPv6's form.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The records of sockets that weren't listed, each with its writes and since when.
#[derive(Debug, Default)]
pub struct Suspects(BTreeMap<u64, (u16, Instant)>);

impl Suspects {
    /// The records of sockets that are gone, of these that aren't listed now.
    fn take_gone(&mut self, unlisted: &[ConnRecord], now: Instant) -> Vec<ConnRecord> {
        let former = std::mem::take(&mut self.0);
        let mut gone = Vec::new();
        for record in unlisted {
            let ConnRecord { cookie, claim, .. } = *record;
            // One that was written is another connection's of the same socket.
            let known = former.get(&cookie).filter(|(writes, _)| *writes == claim.writes);
            let since = known.map_or(now, |(_, since)| *since);
            let is_counted = record.revnat.naming != NOT_COUNTED;
            let limit = if is_counted { COUNTED_ABANDONED_AFTER } else { ABANDONED_AFTER };
            if now.saturating_duration_since(since) >= limit {
                gone.push(*record);
            } else {
                self.0.insert(cookie, (claim.writes, since));
            }
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use lb_common::ConnClaim;

    use super::*;

    #[test]
    fn a_record_is_free_after_a_minute_unlisted() {
        let record = |cookie, writes| {
            let claim = ConnClaim { writes, ..ConnClaim::default() };
            ConnRecord { cookie, claim, ..ConnRecord::default() }
        };
        let start = Instant::now();
        let mut suspects = Suspects::default();
        // After how many seconds which records are unlisted, and which of these are free.
        let table: [(u64, &[ConnRecord], &[u64]); 6] = [
            (0, &[record(1, 1), record(2, 1), record(3, 1)], &[]),
            // The second was written, the third listed in between.
            (30, &[record(1, 1), record(2, 2)], &[]),
            (59, &[record(1, 1), record(2, 2), record(3, 1)], &[]),
            (60, &[record(1, 1), record(2, 2), record(3, 1)], &[1]),
            (90, &[record(2, 2), record(3, 1)], &[2]),
            (119, &[record(3, 1), record(1, 2)], &[3]),
        ];
        for (seconds, unlisted, expected) in table {
            let gone = suspects.take_gone(unlisted, start + Duration::from_secs(seconds));
            let cookies: Vec<u64> = gone.iter().map(|record| record.cookie).collect();
            assert_eq!(cookies, expected, "after {seconds} s");
        }
    }
}
