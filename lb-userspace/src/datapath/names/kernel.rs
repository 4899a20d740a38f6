//! The unit's maps.
#![allow(unsafe_code)]

use std::collections::BTreeSet;
use std::io;
use std::mem::offset_of;
use std::net::IpAddr;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ipnet::IpNet;
use lb_common::{ListenKey, NameKey, NameRecord, NameRef};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::super::bpf::ProgramWait;
use super::super::error::DatapathError;
use super::super::kernel::{AtomicArray, Hash, Plain, io_error, take_hash, wait_for_programs};
use super::table::NameMaps;

/// The names and their records.
#[derive(Debug)]
pub struct KernelNames {
    names: Hash<NameKey, NameRef>,
    records: Arc<AtomicArray<NameRecord>>,
    program_wait: Option<ProgramWait>,
}

impl KernelNames {
    /// Takes the maps of a loaded object.
    ///
    /// # Errors
    /// When one isn't there.
    pub fn take(ebpf: &mut Ebpf) -> Result<KernelNames, DatapathError> {
        Ok(KernelNames {
            names: take_hash(ebpf, "NAMES")?,
            records: AtomicArray::take(ebpf, "NAME_RECORDS")?,
            program_wait: ProgramWait::new().ok(),
        })
    }

    /// How often a record's name was answered.
    pub fn queries(&self, record: u32) -> u64 {
        self.records.load_field(record, offset_of!(NameRecord, queries))
    }
}

impl NameMaps for KernelNames {
    fn insert(&mut self, key: NameKey, target: NameRef) -> io::Result<()> {
        self.names.insert(Plain(key), Plain(target), 0).map_err(io_error)
    }

    fn remove(&mut self, key: &NameKey) -> io::Result<()> {
        match self.names.remove(&Plain(*key)).map_err(io_error) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }

    fn write(&mut self, record: u32, value: &NameRecord) {
        self.records.store(record, value);
    }

    fn set_flags(&mut self, record: u32, flags: u32) {
        let NameRecord { vip, .. } = self.records.load(record);
        // The first word.
        let word: u64 = zerocopy::transmute!([vip, flags.to_ne_bytes()]);
        self.records.store_field(record, 0, &word);
    }

    fn synchronize_rcu(&mut self) {
        wait_for_programs(self.program_wait.as_ref());
    }

    fn all(&self) -> io::Result<Vec<(NameKey, NameRef)>> {
        let entry = |(Plain(key), Plain(target))| (key, target);
        self.names.iter().map(|found| found.map(entry).map_err(io_error)).collect()
    }

    fn record(&self, record: u32) -> NameRecord {
        self.records.load(record)
    }
}

/// The only value of an array, which is changed by words.
#[derive(Debug)]
pub struct ControlWord<T>(Arc<AtomicArray<T>>);

impl<T: FromBytes + IntoBytes + Immutable> ControlWord<T> {
    /// Takes a map of a loaded object.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<ControlWord<T>, DatapathError> {
        AtomicArray::take(ebpf, name).map(ControlWord)
    }

    /// The value.
    pub fn load(&self) -> T {
        self.0.load(0)
    }

    /// Changes the value.
    pub fn update(&self, change: impl FnOnce(&mut T)) {
        let mut value = self.load();
        change(&mut value);
        self.0.store(0, &value);
    }
}

/// The addresses at which names are answered.
#[derive(Debug)]
pub struct Listeners(Hash<ListenKey, u32>);

impl Listeners {
    /// Takes the map of a loaded object.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn take(ebpf: &mut Ebpf) -> Result<Listeners, DatapathError> {
        take_hash(ebpf, "NAMES_LISTEN").map(Listeners)
    }

    /// Answers at these, and no others.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, wanted: impl Iterator<Item = ListenKey>) -> io::Result<()> {
        let wanted: Vec<ListenKey> = wanted.collect();
        let present: Result<Vec<_>, _> = self.0.keys().collect();
        for Plain(key) in present.map_err(io_error)? {
            if !wanted.contains(&key) {
                self.0.remove(&Plain(key)).map_err(io_error)?;
            }
        }
        wanted
            .into_iter()
            .try_for_each(|key| self.0.insert(Plain(key), Plain(1), 0).map_err(io_error))
    }
}

/// The networks whose clients are answered.
#[derive(Debug)]
pub struct ClientNetworks {
    map: LpmTrie<MapData, [u8; 16], u32>,
    present: BTreeSet<(u32, [u8; 16])>,
}

impl ClientNetworks {
    /// Takes the map of a loaded object.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn take(ebpf: &mut Ebpf) -> Result<ClientNetworks, DatapathError> {
        const NAME: &str = "NAMES_ALLOWED";
        let map = ebpf.take_map(NAME).ok_or(DatapathError::Object { missing: NAME })?;
        let map = LpmTrie::try_from(map).map_err(|source| DatapathError::Map { source })?;
        Ok(ClientNetworks { map, present: BTreeSet::new() })
    }

    /// Answers clients in these, and no others.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, wanted: &[IpNet]) -> io::Result<()> {
        let wanted: BTreeSet<_> = wanted.iter().map(prefix).collect();
        for &(len, octets) in wanted.difference(&self.present) {
            self.map.insert(&Key::new(len, octets), 1, 0).map_err(io_error)?;
        }
        for &(len, octets) in self.present.difference(&wanted) {
            self.map.remove(&Key::new(len, octets)).map_err(io_error)?;
        }
        self.present = wanted;
        Ok(())
    }
}

/// A network as a prefix of an IPv6 address; IPv4 as `::ffff:0:0/96`.
fn prefix(network: &IpNet) -> (u32, [u8; 16]) {
    match network.network() {
        IpAddr::V4(ip) => (u32::from(network.prefix_len()) + 96, ip.to_ipv6_mapped().octets()),
        IpAddr::V6(ip) => (network.prefix_len().into(), ip.octets()),
    }
}
