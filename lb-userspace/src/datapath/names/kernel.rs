//! The unit's maps.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::MapData;
use aya::maps::lpm_trie::{Key, LpmTrie};
use ipnet::IpNet;
use lb_common::{
    FirstListener, IndexBucket, ListenKey, NameIndexKey, NameKey, NameRecord, NameRef,
    PROBE_ADDRESS, PROBE_LABEL,
};
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
    index: NameIndex,
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
            index: NameIndex {
                buckets: AtomicArray::take(ebpf, "NAME_INDEX")?,
                labels: AtomicArray::take(ebpf, "NAME_LABELS")?,
            },
            program_wait: ProgramWait::new().ok(),
        })
    }

    /// How often a record's name was answered.
    pub fn queries(&self, record: u32) -> u64 {
        queries(&self.records, record)
    }

    /// The records.
    pub fn records(&self) -> &Arc<AtomicArray<NameRecord>> {
        &self.records
    }

    /// Has the name of the daemon's probes answered, by this record.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_probe(&mut self, record: u32) -> io::Result<()> {
        let Some(key) = NameKey::of(PROBE_LABEL) else { return Ok(()) };
        let (vip, flags) = (PROBE_ADDRESS, NameRecord::PROBE);
        self.write(record, &NameRecord { vip, flags, ..NameRecord::default() });
        self.insert(key, NameRef { record, padding: 0 })
    }
}

/// The index of names, and the names that it leads to.
#[derive(Debug)]
struct NameIndex {
    buckets: Arc<AtomicArray<IndexBucket>>,
    labels: Arc<AtomicArray<NameKey>>,
}

impl NameIndex {
    /// Inserts a name that isn't there, if there is room.
    fn insert(&self, key: &NameKey, record: u32) {
        self.replace(key, 0, NameIndexKey::of(key.hash()).word(record));
    }

    /// Removes a name, if it is there.
    fn remove(&self, key: &NameKey, record: u32) {
        self.replace(key, NameIndexKey::of(key.hash()).word(record), 0);
    }

    /// Replaces a word of a name's bucket by one store.
    fn replace(&self, key: &NameKey, old: u64, new: u64) {
        let NameIndexKey { bucket, .. } = NameIndexKey::of(key.hash());
        let words = self.buckets.load(bucket).words;
        if let Some(way) = words.iter().position(|&word| word == old) {
            self.buckets.store_field(bucket, way * size_of::<u64>(), &new);
        }
    }
}

/// How often a record's name was answered.
pub fn queries(records: &AtomicArray<NameRecord>, record: u32) -> u64 {
    records.load_field(record, offset_of!(NameRecord, queries))
}

impl NameMaps for KernelNames {
    fn insert(&mut self, key: NameKey, target: NameRef) -> io::Result<()> {
        self.names.insert(Plain(key), Plain(target), 0).map_err(io_error)?;
        self.index(&key, target.record);
        Ok(())
    }

    fn index(&mut self, key: &NameKey, record: u32) {
        self.index.labels.store(record, key);
        self.records.store_field(record, offset_of!(NameRecord, check), &key.hash());
        self.index.insert(key, record);
    }

    fn remove(&mut self, key: &NameKey, record: u32) -> io::Result<()> {
        // First the ways that end with this daemon: without them the name is found by the hash. The check is for an
        // earlier daemon's program, which has an index of its own.
        self.records.store_field(record, offset_of!(NameRecord, check), &0u64);
        self.index.remove(key, record);
        match self.names.remove(&Plain(*key)).map_err(io_error) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
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

    /// Opens a map by its pin.
    ///
    /// # Errors
    /// When it isn't there, or is another one.
    pub fn pinned(pin: &Path, name: &'static str) -> Result<ControlWord<T>, DatapathError> {
        AtomicArray::pinned(pin, name).map(ControlWord)
    }

    /// Writes the word at `offset`.
    pub fn store_field(&self, offset: usize, word: u64) {
        self.0.store_field(0, offset, &word);
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
pub struct Listeners {
    all: Hash<ListenKey, u32>,
    first: Arc<AtomicArray<FirstListener>>,
    program_wait: Option<ProgramWait>,
}

impl Listeners {
    /// Takes the map of a loaded object.
    ///
    /// # Errors
    /// When it isn't there.
    pub fn take(ebpf: &mut Ebpf) -> Result<Listeners, DatapathError> {
        Ok(Listeners {
            all: take_hash(ebpf, "NAMES_LISTEN")?,
            first: AtomicArray::take(ebpf, "NAMES_LISTEN_FIRST")?,
            program_wait: ProgramWait::new().ok(),
        })
    }

    /// Answers at these, and no others.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, wanted: &HashMap<ListenKey, u32>) -> io::Result<()> {
        let first = first_listener(wanted);
        let is_changed = self.first.load(0) != first;
        if is_changed {
            // Until the end the programs look them all up.
            self.first.store_field(0, offset_of!(FirstListener, port), &0u64);
            wait_for_programs(self.program_wait.as_ref());
        }
        let present: Result<Vec<_>, _> = self.all.keys().collect();
        for Plain(key) in present.map_err(io_error)? {
            if !wanted.contains_key(&key) {
                self.all.remove(&Plain(key)).map_err(io_error)?;
            }
        }
        let mut insert = |(key, how): (&ListenKey, &u32)| {
            self.all.insert(Plain(*key), Plain(*how), 0).map_err(io_error)
        };
        wanted.iter().try_for_each(&mut insert)?;
        if is_changed {
            let [high, low, rest]: [u64; 3] = zerocopy::transmute!(first);
            self.first.store_field(0, offset_of!(FirstListener, address), &[high, low]);
            self.first.store_field(0, offset_of!(FirstListener, port), &rest);
        }
        Ok(())
    }
}

/// The one that most queries are for, by a guess: one of loopback.
fn first_listener(listeners: &HashMap<ListenKey, u32>) -> FirstListener {
    let is_loopback =
        |key: &ListenKey| Ipv6Addr::from(key.address.octets).to_canonical().is_loopback();
    let order = |(key, _): &(&ListenKey, &u32)| (!is_loopback(key), key.address.octets, key.port);
    let Some((first, &how)) = listeners.iter().min_by_key(order) else {
        return FirstListener::default();
    };
    let has_one_port = listeners.keys().all(|key| key.port == first.port);
    FirstListener {
        address: first.address.words(),
        port: first.port,
        how: how as u16,
        common_port: if has_one_port { first.port } else { 0 },
        padding: 0,
    }
}

/// The networks whose clients are answered.
#[derive(Debug)]
pub struct ClientNetworks {
    map: LpmTrie<MapData, [u8; 16], u32>,
    present: BTreeMap<(u32, [u8; 16]), u32>,
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
        Ok(ClientNetworks { map, present: BTreeMap::new() })
    }

    /// Answers clients in these, and no others.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set(&mut self, wanted: &[IpNet]) -> io::Result<()> {
        let wanted = prefixes(wanted);
        for (&(len, octets), &is_allowed) in &wanted {
            if self.present.get(&(len, octets)) != Some(&is_allowed) {
                self.map.insert(&Key::new(len, octets), is_allowed, 0).map_err(io_error)?;
            }
        }
        for &(len, octets) in self.present.keys().filter(|key| !wanted.contains_key(key)) {
            self.map.remove(&Key::new(len, octets)).map_err(io_error)?;
        }
        self.present = wanted;
        Ok(())
    }
}

/// Networks as prefixes of IPv6 addresses, IPv4 in `::ffff:0:0/96`, each with 1; and with 0 all of IPv4, which
/// no network of IPv6 has.
fn prefixes(networks: &[IpNet]) -> BTreeMap<(u32, [u8; 16]), u32> {
    const IPV4: u32 = 96;
    let mapped = |ip: Ipv4Addr| ip.to_ipv6_mapped().octets();
    let mut all = BTreeMap::from([((IPV4, mapped(Ipv4Addr::UNSPECIFIED)), 0)]);
    for network in networks {
        let len = u32::from(network.prefix_len());
        let prefix = match network.network() {
            IpAddr::V4(ip) => (len + IPV4, mapped(ip)),
            IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() && len >= IPV4 => continue,
            IpAddr::V6(ip) => (len, ip.octets()),
        };
        all.insert(prefix, 1);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_listener_is_of_loopback() {
        let listeners = |all: &[&str]| -> HashMap<ListenKey, u32> {
            let key = |address: &&str| {
                let address: std::net::SocketAddr = address.parse().unwrap();
                let octets = match address.ip() {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
                    IpAddr::V6(ip) => ip.octets(),
                };
                let address_of = lb_common::Address { octets };
                let key = ListenKey { address: address_of, port: address.port(), padding: [0; 6] };
                (key, ListenKey::BOUND)
            };
            all.iter().map(key).collect()
        };
        let first = |all: &[&str]| {
            let FirstListener { address, port, how, common_port, .. } =
                first_listener(&listeners(all));
            let octets: [u8; 16] = zerocopy::transmute!(address);
            (Ipv6Addr::from(octets).to_canonical().to_string(), port, how, common_port)
        };
        assert_eq!(first(&[]), ("::".into(), 0, 0, 0), "nothing is passed by its port");
        let both = ["10.0.0.1:53", "127.0.0.1:53"];
        assert_eq!(first(&both), ("127.0.0.1".into(), 53, 1, 53));
        let ports = ["10.0.0.1:53", "[::1]:5353"];
        assert_eq!(first(&ports), ("::1".into(), 5353, 1, 0), "another port isn't passed");
    }

    /// The longest prefix of an address, as the kernel finds it, decides as the daemon does.
    #[test]
    fn prefixes_admit_what_the_networks_contain() {
        let addresses = ["10.0.0.7", "192.0.2.7", "fd00::7", "2001:db8::7"]
            .map(|ip| ip.parse::<IpAddr>().unwrap());
        let tables = [
            "",
            "0.0.0.0/0",
            "::/0",
            "::ffff:0:0/96",
            "::ffff:10.0.0.0/104",
            "10.0.0.0/8",
            "::/0 10.0.0.0/8",
            "fd00::/8 192.0.2.0/24",
            "::/64 0.0.0.0/0",
            "::ffff:0:0/95",
        ];
        for table in tables {
            let networks: Vec<IpNet> =
                table.split_whitespace().map(|network| network.parse().unwrap()).collect();
            let prefixes = prefixes(&networks);
            for address in addresses {
                let mapped = match address {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                let is_in = |(len, octets): &(u32, [u8; 16])| {
                    let shift = 128u32.saturating_sub(*len);
                    let [a, b] = [u128::from(mapped), u128::from_be_bytes(*octets)];
                    (a ^ b).checked_shr(shift).unwrap_or(0) == 0
                };
                let found =
                    prefixes.iter().filter(|(key, _)| is_in(key)).max_by_key(|(key, _)| key.0);
                let expected = networks.iter().any(|network| network.contains(&address));
                assert_eq!(found.is_some_and(|(_, &one)| one == 1), expected, "{table}: {address}");
            }
        }
    }
}
