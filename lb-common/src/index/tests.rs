use std::collections::HashMap;
use std::vec::Vec;

use super::*;
use crate::{IPPROTO_TCP, IPPROTO_UDP};

/// The index, and how often it was stored to.
struct Array {
    words: Vec<u64>,
    stores: Vec<(usize, u64)>,
}

impl Array {
    fn new() -> Array {
        let n_words = N_INDEX_BUCKETS as usize * INDEX_WAYS;
        Array { words: std::vec![0; n_words], stores: Vec::new() }
    }

    /// As a program looks, at whatever is there now.
    fn find(&self, frontend: &Frontend) -> Option<u32> {
        let key = IndexKey::of(frontend);
        (0..INDEX_WAYS).find_map(|way| key.service_of(self.load(key.bucket, way)))
    }
}

impl Index for Array {
    fn load(&self, bucket: u32, way: usize) -> u64 {
        self.words[bucket as usize * INDEX_WAYS + way]
    }

    fn store(&mut self, bucket: u32, way: usize, word: u64) {
        let at = bucket as usize * INDEX_WAYS + way;
        self.words[at] = word;
        self.stores.push((at, word));
    }
}

fn random(state: &mut u64) -> u32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    (*state >> 33) as u32
}

fn frontend(address: u32, port: u16, protocol: u8) -> Frontend {
    Frontend { address: address.to_be_bytes(), port, protocol, padding: 0 }
}

/// Any frontend of a pool; of few addresses and ports, or of many.
fn any_frontend(state: &mut u64, is_narrow: bool) -> Frontend {
    let (address, port) = (random(state), random(state) as u16);
    let protocol = if random(state).is_multiple_of(2) { IPPROTO_TCP } else { IPPROTO_UDP };
    match is_narrow {
        true => frontend(0x7f80_0000 | (address % 8) << 14, port % 3, protocol),
        false => frontend(0x7f00_0000 | address >> 8, port, protocol),
    }
}

fn target(service: u32) -> ServiceRef {
    ServiceRef { service, host_only: 0 }
}

/// Frontends that are all in one bucket.
fn of_one_bucket(n: usize) -> Vec<Frontend> {
    let bucket = IndexKey::of(&frontend(0x7fc8_0001, 80, IPPROTO_TCP)).bucket;
    let all = (0x7fc8_0001..).map(|address| frontend(address, 80, IPPROTO_TCP));
    all.filter(|frontend| IndexKey::of(frontend).bucket == bucket).take(n).collect()
}

/// Bit by bit: a word in a bucket is that of one frontend.
#[test]
fn no_two_frontends_have_the_same_word_in_the_same_bucket() {
    let mut state = 1;
    for _ in 0..20_000 {
        let one = any_frontend(&mut state, false);
        let key = IndexKey::of(&one);
        let word = key.word(target(7)).unwrap();
        assert_eq!(key.service_of(word), Some(7));
        let bits = u32::from_be_bytes(one.address);
        let others = (0..32)
            .map(|bit| Frontend { address: (bits ^ 1 << bit).to_be_bytes(), ..one })
            .chain((0..16).map(|bit| Frontend { port: one.port ^ 1 << bit, ..one }))
            .chain([Frontend { protocol: one.protocol ^ IPPROTO_TCP ^ IPPROTO_UDP, ..one }])
            .chain([any_frontend(&mut state, false)]);
        for other in others.filter(|other| *other != one) {
            let other_key = IndexKey::of(&other);
            let is_found = other_key.bucket == key.bucket && other_key.service_of(word).is_some();
            assert!(!is_found, "{one:?} {other:?}");
        }
    }
    // The frontend follows from bucket and word.
    let mut seen = HashMap::new();
    for n in 0..200_000 {
        let one = any_frontend(&mut state, n % 2 == 0);
        let key = IndexKey::of(&one);
        let former = seen.insert((key.bucket, key.word(target(0))), one);
        assert!(former.is_none_or(|former| former == one), "{former:?} {one:?}");
    }
}

#[test]
fn services_and_targets_that_have_no_word() {
    let key = IndexKey::of(&frontend(0x7f80_0001, 80, IPPROTO_TCP));
    assert_eq!(key.word(ServiceRef { service: 1, host_only: 1 }), None);
    let most = (SERVICE_LIMIT - 2) as u32;
    assert_eq!(key.service_of(key.word(target(most)).unwrap()), Some(most));
    for service in [most + 1, most + 2, u32::MAX] {
        assert_eq!(key.word(target(service)), None, "{service}");
    }
    // An empty place is no frontend's, also not of the one whose bits are all zero.
    for empty in [key, IndexKey::of(&frontend(0, 0, IPPROTO_TCP))] {
        assert_eq!(empty.service_of(0), None);
    }
}

/// What the index has at any moment, `FRONTENDS` has as well: random insertions, removals and moves, as
/// `KernelMaps` makes them, each store looked at on its own.
#[test]
fn the_index_never_has_what_the_table_lacks() {
    let mut state = 42;
    for is_narrow in [true, false] {
        let (mut index, mut table) = (Array::new(), HashMap::new());
        let mut known: Vec<Frontend> = of_one_bucket(INDEX_WAYS + 3);
        known.extend((0..200).map(|_| any_frontend(&mut state, is_narrow)));
        for _ in 0..20_000 {
            let frontend = known[random(&mut state) as usize % known.len()];
            let check = |index: &Array, table: &HashMap<Frontend, u32>| {
                let found = index.find(&frontend);
                assert!(found.is_none() || found == table.get(&frontend).copied(), "{frontend:?}");
            };
            index.stores.clear();
            index.remove(&frontend);
            check(&index, &table);
            assert_eq!(index.find(&frontend), None);
            if random(&mut state).is_multiple_of(3) {
                table.remove(&frontend);
            } else {
                let service = random(&mut state) % 1_000;
                table.insert(frontend, service);
                check(&index, &table);
                index.insert(&frontend, target(service));
            }
            check(&index, &table);
            // A word is replaced by none, and none by a word: no reader sees another's place change.
            assert!(index.stores.len() <= 2);
        }
        for frontend in &known {
            let found = index.find(frontend);
            assert!(found.is_none() || found == table.get(frontend).copied(), "{frontend:?}");
        }
        let n_words = index.words.iter().filter(|word| **word != 0).count();
        let n_found = known.iter().collect::<std::collections::HashSet<_>>().into_iter();
        assert_eq!(n_words, n_found.filter(|frontend| index.find(frontend).is_some()).count());
    }
}

/// A bucket that is full keeps what it has; the others are in `FRONTENDS` alone.
#[test]
fn a_full_bucket_takes_no_more() {
    let mut index = Array::new();
    let frontends = of_one_bucket(INDEX_WAYS + 2);
    for (service, frontend) in (0..).zip(&frontends) {
        index.insert(frontend, target(service));
    }
    let found = |index: &Array| frontends.iter().map(|one| index.find(one)).collect::<Vec<_>>();
    assert_eq!(found(&index), [Some(0), Some(1), Some(2), Some(3), None, None]);
    index.remove(&frontends[1]);
    index.insert(&frontends[5], target(5));
    assert_eq!(found(&index), [Some(0), None, Some(2), Some(3), None, Some(5)]);
}

/// How many frontends don't fit, at VIPs that are hashes of names.
#[test]
fn nearly_all_frontends_of_full_maps_fit() {
    let mut state = 7;
    for (n_services, n_ports, most) in [(10_000, 1, 0.005), (16_384, 1, 0.02), (16_384, 2, 0.06)] {
        let mut index = Array::new();
        let mut frontends = std::collections::HashSet::new();
        while frontends.len() < n_services * n_ports {
            let address = 0x7f80_0000 | random(&mut state) >> 8;
            let at = |port| frontend(address, port, IPPROTO_TCP);
            frontends.extend((0..n_ports as u16).map(|n| at(80 + n * 363)));
        }
        frontends.iter().for_each(|frontend| index.insert(frontend, target(1)));
        let n_without = frontends.iter().filter(|one| index.find(one).is_none()).count();
        let part = n_without as f64 / frontends.len() as f64;
        assert!(part <= most, "{part} of {n_services} services of {n_ports} ports");
    }
}
