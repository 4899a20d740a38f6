use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::table::{Ports, Protocols};

/// Maps of a few entries. Readers may know what they saw until a grace period is over.
#[derive(Debug, Default)]
struct Model {
    names: BTreeMap<[u8; 64], u32>,
    /// The names that are found faster.
    indexed: BTreeMap<[u8; 64], u32>,
    records: BTreeMap<u32, NameRecord>,
    /// Records that a reader may have found by a name that is gone.
    readers: BTreeSet<u32>,
    room: usize,
    /// Whether a name was removed and no grace period is over: an inserted one may take its element.
    has_removed: bool,
    n_waits: usize,
    fails: bool,
}

impl NameMaps for Model {
    fn insert(&mut self, key: NameKey, NameRef { record, .. }: NameRef) -> io::Result<()> {
        if self.fails || self.names.len() >= self.room {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        assert!(!self.has_removed, "a reader may find another name's element");
        assert!(self.records.contains_key(&record), "a name leads to a record that isn't written");
        assert_eq!(self.names.insert(key.octets, record), None, "inserted twice");
        self.index(&key, record);
        Ok(())
    }

    fn index(&mut self, key: &NameKey, record: u32) {
        assert_eq!(self.names.get(&key.octets), Some(&record), "another record");
        assert_eq!(self.indexed.insert(key.octets, record), None, "indexed twice");
    }

    fn remove(&mut self, key: &NameKey, record: u32) -> io::Result<()> {
        if self.fails {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let removed = self.names.remove(&key.octets);
        assert!(removed.is_none_or(|removed| removed == record), "of another record");
        self.indexed.remove(&key.octets);
        self.readers.extend(removed);
        self.has_removed = true;
        Ok(())
    }

    fn write(&mut self, record: u32, value: &NameRecord) {
        let is_known =
            self.readers.contains(&record) || self.names.values().any(|&it| it == record);
        assert!(!is_known, "a reader may know record {record}");
        self.records.insert(record, *value);
    }

    fn set_flags(&mut self, record: u32, flags: u32) {
        self.records.get_mut(&record).unwrap().flags = flags;
    }

    fn synchronize_rcu(&mut self) {
        self.readers.clear();
        self.has_removed = false;
        self.n_waits += 1;
    }

    fn all(&self) -> io::Result<Vec<(NameKey, NameRef)>> {
        let entry = |(octets, record): (&[u8; 64], &u32)| {
            (NameKey { octets: *octets }, NameRef { record: *record, padding: 0 })
        };
        Ok(self.names.iter().map(entry).collect())
    }

    fn record(&self, record: u32) -> NameRecord {
        self.records[&record]
    }
}

fn service(name: &str, last: u8, watch: Watch) -> (Arc<str>, Arc<Service>) {
    let name: Arc<str> = name.into();
    let service = Service {
        name: name.clone(),
        vip: [127, 128, 0, last].into(),
        vip6: (last % 2 == 1).then(|| [0xfd00, 0, 0, 0, 0, 0, 0, last.into()].into()),
        ports: Ports::Any,
        protocols: Protocols::Tcp,
        algorithm: Default::default(),
        pin: None,
        public: Vec::new(),
        backends: Vec::new(),
        excluded: Vec::new(),
        notes: Vec::new(),
        watch,
        generation: 1,
    };
    (name, Arc::new(service))
}

fn table(services: impl IntoIterator<Item = (Arc<str>, Arc<Service>)>) -> Table {
    Table { generation: 1, services: services.into_iter().collect(), ..Table::default() }
}

/// The names in the maps, each with its VIP and whether it is cold.
fn shown(names: &NameTable<Model>) -> Vec<String> {
    let entry = |(octets, record): (&[u8; 64], &u32)| {
        let NameRecord { vip: [.., last], flags, .. } = names.maps.records[record];
        let cold = if flags & NameRecord::COLD != 0 { " cold" } else { "" };
        let vip6 = if flags & NameRecord::HAS_VIP6 != 0 { " v6" } else { "" };
        format!("{} {last}{vip6}{cold}", label(&NameKey { octets: *octets }))
    };
    names.maps.names.iter().map(entry).collect()
}

fn new(room: u32) -> NameTable<Model> {
    NameTable::adopt(Model { room: room as usize, ..Model::default() }, room).unwrap()
}

#[test]
fn the_maps_follow_the_table() {
    let mut names = new(4);
    assert_eq!(
        names.apply(&table([service("a", 1, Watch::Live), service("b", 2, Watch::Cold)])),
        None
    );
    assert_eq!(shown(&names), ["a 1 v6", "b 2 cold"]);
    // A change of the flags alone is one store.
    names.apply(&table([service("a", 1, Watch::Cold), service("b", 2, Watch::Live)]));
    assert_eq!((shown(&names), names.maps.n_waits), (vec!["a 1 v6 cold".into(), "b 2".into()], 0));
    // Another VIP, a name that is gone and one that is new.
    names.apply(&table([service("a", 4, Watch::Live), service("c", 3, Watch::Live)]));
    assert_eq!(shown(&names), ["a 4", "c 3 v6"]);
    // No wait where nothing is given up.
    names.recycle();
    let n_waits = names.maps.n_waits;
    names.recycle();
    assert_eq!(names.maps.n_waits, n_waits);
}

#[test]
fn what_an_earlier_daemon_left_is_taken_over() {
    let mut names = new(4);
    names.apply(&table([service("a", 1, Watch::Live), service("b", 2, Watch::Live)]));
    let record = names.records().find(|(name, _)| ***name == *"a").unwrap().1;
    names.maps.indexed.clear();
    let mut names = NameTable::adopt(names.maps, 4).unwrap();
    assert_eq!((shown(&names), names.is_behind()), (vec!["a 1 v6".into(), "b 2".into()], false));
    names.apply(&table([service("a", 1, Watch::Live), service("c", 3, Watch::Live)]));
    assert_eq!(shown(&names), ["a 1 v6", "c 3 v6"]);
    assert_eq!(names.records().find(|(name, _)| ***name == *"a").unwrap().1, record);
}

#[test]
fn what_has_no_room_or_fails_is_tried_again() {
    let mut names = new(1);
    let both = table([service("a", 1, Watch::Live), service("b", 2, Watch::Live)]);
    let reason = names.apply(&both).unwrap();
    assert!(reason.starts_with("b: ") && reason.contains("datapath.max_services"), "{reason}");
    assert_eq!(shown(&names), ["a 1 v6"]);
    assert_eq!(names.apply(&table([service("b", 2, Watch::Live)])), None);
    assert_eq!(shown(&names), ["b 2"]);
    names.maps.fails = true;
    assert!(names.apply(&table([])).is_some() && names.is_behind());
    assert!(names.retry().is_some());
    names.maps.fails = false;
    assert_eq!((names.retry(), names.is_behind(), shown(&names)), (None, false, vec![]));
}

proptest! {
    /// Whatever the order of tables, restarts and failures: a name leads to its own record.
    #[test]
    fn names_lead_to_their_records(
        steps in prop::collection::vec(
            (prop::collection::btree_map(0u8..6, (1u8..9, any::<bool>()), 0..6), any::<(bool, bool)>()),
            1..20,
        ),
    ) {
        let mut names = new(5);
        for (services, (restarts, fails)) in steps {
            let wanted = table(services.iter().map(|(name, &(last, is_live))| {
                let watch = if is_live { Watch::Live } else { Watch::Cold };
                service(&format!("s{name}"), last, watch)
            }));
            names.maps.fails = fails;
            names.apply(&wanted);
            names.maps.fails = false;
            let n_waits = names.maps.n_waits;
            names.apply(&wanted);
            prop_assert!(names.maps.n_waits <= n_waits + 1, "one wait for all");
            let n_expected = services.len().min(5);
            prop_assert_eq!(names.maps.names.len(), n_expected);
            for line in shown(&names) {
                let (name, rest) = line[1..].split_once(' ').unwrap();
                let (last, is_live) = services[&name.parse::<u8>().unwrap()];
                let cold = if is_live { "" } else { " cold" };
                let vip6 = if last % 2 == 1 { " v6" } else { "" };
                prop_assert_eq!(rest, format!("{last}{vip6}{cold}"));
            }
            if restarts {
                prop_assert_eq!(&names.maps.indexed, &names.maps.names);
                // Readers are gone long before another daemon runs, which has an index of its own.
                names.maps.synchronize_rcu();
                names.maps.indexed.clear();
                names = NameTable::adopt(names.maps, 5).unwrap();
            }
        }
    }
}
