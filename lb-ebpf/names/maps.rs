//! The maps. `NAMES`, `NAME_RECORDS`, `NAMES_CONTROL` and `NAMES_COUNTERS` are pinned; `CONTROL` is the
//! unit `connect`'s, by its pin. Each daemon fills the others before it attaches the program.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MMAPABLE};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, PerCpuArray};
use aya_ebpf::macros::btf_map;
use core::arch::asm;
use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{
    Address, Control, DEFAULT_MAX_SERVICES, FirstListener, IndexBucket, ListenKey, MAX_ALLOWED,
    MAX_LISTEN, N_CLIENT_ACCOUNTS, N_INDEX_BUCKETS, NameAddresses, NameIndexKey, NameKey,
    NameQuery, NameRecord, NameRef, NamesControl, NamesCounters, NamesMode, ZoneWords,
};

use crate::clock::Clock;
use crate::headers::Headers;
use crate::skb::Skb;

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const N_SERVICES: usize = DEFAULT_MAX_SERVICES as usize;

#[btf_map]
static NAMES: HashMap<NameKey, NameRef, N_SERVICES> = HashMap::new();
#[btf_map]
static NAME_RECORDS: Array<NameRecord, N_SERVICES, MMAPABLE> = Array::new();
/// The index of names: see `lb_common::NameIndexKey`. Each daemon makes one for the program that it loads.
#[btf_map]
static NAME_INDEX: Array<IndexBucket, { N_INDEX_BUCKETS as usize }, MMAPABLE> = Array::new();
/// The name that the index leads to, by its record.
#[btf_map]
static NAME_LABELS: Array<NameKey, N_SERVICES, MMAPABLE> = Array::new();
#[btf_map]
static NAMES_CONTROL: Array<NamesControl, 1, MMAPABLE> = Array::new();
#[btf_map]
static NAMES_COUNTERS: Array<NamesCounters, 1, MMAPABLE> = Array::new();
#[btf_map]
static CONTROL: Array<Control, 1, MMAPABLE> = Array::new();
/// Where the daemon listens.
#[btf_map]
static NAMES_LISTEN: HashMap<ListenKey, u32, MAX_LISTEN> = HashMap::new();
/// See [`FirstListener`].
#[btf_map]
static NAMES_LISTEN_FIRST: Array<FirstListener, 1, MMAPABLE> = Array::new();
/// The networks of the clients that are served: `dns.allow`, with 1. All of IPv4 has 0 where that isn't one.
#[btf_map]
static NAMES_ALLOWED: LpmTrie<[u8; 16], u32, { MAX_ALLOWED + 1 }> = LpmTrie::new();
/// When each account of clients is full again, in nanoseconds of CLOCK_MONOTONIC.
#[btf_map]
static NAMES_ACCOUNTS: Array<u64, N_CLIENT_ACCOUNTS, MMAPABLE> = Array::new();

/// Room that the stack lacks.
#[btf_map]
static NAMES_SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// What a program works on. It runs with bottom halves disabled, so the processor's is its own. The
/// verifier doesn't know what it keeps here, and so tells no cases apart by that afterwards.
#[repr(C, align(8))]
pub struct Scratch {
    pub clock: Clock,
    pub headers: Headers,
    pub key: NameKey,
    pub query: NameQuery,
    /// The length of the answer's datagram.
    pub answer_len: u32,
}

/// What is in [`Scratch`] is read again from here on: so the compiler has no copy, about which the verifier
/// would know more.
#[inline(always)]
pub fn forget() {
    // SAFETY: no instruction.
    unsafe { asm!("", options(nostack)) };
}

/// See [`Scratch`].
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    // SAFETY: the element stays, and nothing else has the processor's meanwhile.
    NAMES_SCRATCH.get_ptr_mut(0).map(|scratch| unsafe { &mut *scratch })
}

/// How the daemon listens there, if it does: [`ListenKey::BOUND`] or [`ListenKey::SHARED`].
#[inline(always)]
pub fn listener(address: &Address, port: u16) -> Option<u32> {
    let first = NAMES_LISTEN_FIRST.get_ptr(0)?.cast::<[u64; 3]>();
    // SAFETY: an array's element stays; the daemon writes the address while the last word is zero.
    let [first_high, first_low, rest] = unsafe { first.read_volatile() };
    let [first_port, how, common_port, _]: [u16; 4] = zerocopy::transmute!(rest);
    if common_port != 0 && port != common_port {
        return None;
    }
    let [high, low] = address.words();
    if how != 0 && port == first_port && low == first_low && high == first_high {
        return Some(how.into());
    }
    // As words: the compiler calls a function to make the padding zero.
    let key: ListenKey = zerocopy::transmute!([high, low, u64::from(port)]);
    // SAFETY: the element is a word, which is copied out at once.
    NAMES_LISTEN.get_ptr(key).map(|how| unsafe { how.read_volatile() })
}

/// Whether an address is in `dns.allow`.
#[inline(always)]
pub fn is_allowed(address: &Address) -> bool {
    NAMES_ALLOWED.get(&Key::new(128, address.octets)) == Some(&1)
}

/// An account of clients, by a hash.
#[inline(always)]
pub fn account(hash: u32) -> Option<*mut u64> {
    NAMES_ACCOUNTS.get_ptr_mut(hash % N_CLIENT_ACCOUNTS as u32)
}

/// What the daemon writes for all units, as far as it matters here. See [`Control`].
#[derive(Clone, Copy)]
pub struct DaemonState {
    pub heartbeat_ns: u64,
    pub table_ns: u64,
    pub max_age_ns: u64,
}

/// See [`DaemonState`].
#[inline(always)]
pub fn daemon() -> Option<DaemonState> {
    let control = CONTROL.get_ptr(0)?;
    // SAFETY: an array's element stays, and these are aligned words of it.
    Some(unsafe {
        DaemonState {
            heartbeat_ns: (&raw const (*control).heartbeat_ns).read_volatile(),
            table_ns: (&raw const (*control).table_ns).read_volatile(),
            max_age_ns: (&raw const (*control).max_age_ns).read_volatile(),
        }
    })
}

/// What the daemon writes for this unit.
#[derive(Clone, Copy)]
pub struct ControlPtr(*const NamesControl);

macro_rules! read {
    // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because the daemon
    // writes it.
    ($ptr:ident . $($field:tt)+) => {
        unsafe { (&raw const (*$ptr.0).$($field)+).read_volatile() }
    };
}

/// See [`ControlPtr`].
#[inline(always)]
pub fn control() -> Option<ControlPtr> {
    NAMES_CONTROL.get_ptr(0).map(ControlPtr)
}

impl ControlPtr {
    /// Whether the unit never answers.
    #[inline(always)]
    pub fn is_off(self) -> bool {
        read!(self.mode) == NamesMode::Off as u32
    }

    /// Whether the unit lets all pass but the probe, which comes by `lo` as the others do that this is
    /// about: on standby, and where answers don't arrive.
    #[inline(always)]
    pub fn passes(self, is_alive: bool, is_loopback: bool, is_ipv6: bool) -> bool {
        let family = if is_ipv6 { NamesControl::IPV6 } else { NamesControl::IPV4 };
        is_alive && read!(self.mode) == NamesMode::Standby as u32
            || is_loopback && read!(self.passed_on_loopback) & family != 0
    }

    /// When a daemon that keeps the names was last alive.
    #[inline(always)]
    pub fn heartbeat_ns(self) -> u64 {
        read!(self.heartbeat_ns)
    }

    /// Whether the daemon can answer from its table, if it is alive.
    #[inline(always)]
    pub fn is_ready(self) -> bool {
        read!(self.is_ready) != 0
    }

    /// Whether a required hook was found detached.
    #[inline(always)]
    pub fn is_detached(self) -> bool {
        read!(self.is_detached) != 0
    }

    /// See [`NamesControl`]: `interval_ns`, `burst_ns` and `seed`.
    #[inline(always)]
    pub fn limits(self) -> (u64, u64, u64) {
        (read!(self.interval_ns), read!(self.burst_ns), read!(self.seed))
    }
}

impl ZoneWords for ControlPtr {
    #[inline(always)]
    fn domain(self, idx: usize) -> u64 {
        // SAFETY: as above; the domain is eight words, and aligned.
        unsafe { (&raw const (*self.0).zone.domain).cast::<u64>().add(idx).read_volatile() }
    }

    #[inline(always)]
    fn domain_len(self) -> u32 {
        read!(self.zone.domain_len)
    }

    #[inline(always)]
    fn ttl(self) -> u32 {
        read!(self.zone.ttl)
    }

    #[inline(always)]
    fn serial(self) -> u32 {
        read!(self.zone.serial)
    }
}

/// A pointer to a record.
#[derive(Clone, Copy)]
pub struct RecordPtr(*mut NameRecord);

/// The record of the name in [`Scratch`].
#[inline(always)]
pub fn record(skb: &Skb, key: &NameKey) -> Option<RecordPtr> {
    let indexed = indexed(key);
    if indexed.is_some() {
        return indexed;
    }
    NAME_RECORDS.get_ptr_mut(nohop_names_record(skb.0) as u32).map(RecordPtr)
}

/// A name's record, by the index.
#[inline(always)]
fn indexed(key: &NameKey) -> Option<RecordPtr> {
    let hash = key.hash();
    let index_key = NameIndexKey::of(hash);
    let bucket = NAME_INDEX.get_ptr(index_key.bucket)?;
    // SAFETY: an array's element stays; the daemon replaces each word by one store, and the loads are aligned.
    let candidate = index_key.candidate(unsafe { bucket.read_volatile() });
    let label = NAME_LABELS.get_ptr(candidate)?.cast::<[u64; 8]>();
    let record = RecordPtr(NAME_RECORDS.get_ptr_mut(candidate)?);
    // SAFETY: as above. The daemon writes the name before anything leads to the record, and `check` with it, which it
    // takes back before it waits for the readers' end.
    let (label, check) =
        unsafe { (label.read_volatile(), (&raw const (*record.0).check).read_volatile()) };
    (check == hash && key.is(label)).then_some(record)
}

/// Where the record is of the name in [`Scratch`], by the hash; `u32::MAX` where there is none.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_names_record(ctx: *mut __sk_buff) -> u64 {
    // The compiler passes no argument that isn't used, and the verifier wants them all.
    let _ = Skb(ctx).len();
    let Some(Scratch { key, .. }) = scratch() else { return u32::MAX.into() };
    let Some(found) = NAMES.get_ptr(key) else { return u32::MAX.into() };
    // SAFETY: the kernel may recycle the element once it is deleted, so it is copied out at once, as
    // the one word that it is. The daemon inserts nothing between a deletion and the end of the readers
    // that may have seen the element, so the word is this name's.
    let found: NameRef = zerocopy::transmute!(unsafe { found.cast::<u64>().read_volatile() });
    found.record.into()
}

impl RecordPtr {
    /// See [`NameRecord::flags`].
    #[inline(always)]
    pub fn flags(self) -> u32 {
        // SAFETY: an array's element stays, and this is an aligned word of it.
        unsafe { (&raw const (*self.0).flags).read_volatile() }
    }

    /// The addresses.
    #[inline(always)]
    pub fn addresses(self) -> NameAddresses {
        // SAFETY: an array's element stays; these aren't written while a reader may know the record.
        let (vip, vip6) = unsafe {
            let vip = (&raw const (*self.0).vip).cast::<u32>().read_volatile();
            (vip, (&raw const (*self.0).vip6).cast::<[u64; 2]>().read_volatile())
        };
        let has_vip6 = self.flags() & NameRecord::HAS_VIP6 != 0;
        NameAddresses {
            vip: zerocopy::transmute!(vip),
            vip6: has_vip6.then(|| zerocopy::transmute!(vip6)),
        }
    }

    /// Counts a query.
    #[inline(always)]
    pub fn count(self, now_ns: u64) {
        // SAFETY: an array's element stays; of two times that are written at once either is right.
        unsafe {
            add_one(&raw mut (*self.0).queries);
            (&raw mut (*self.0).last_query_ns).write_volatile(now_ns);
        }
    }
}

/// What the unit did.
pub struct Counters(Option<*mut NamesCounters>);

/// See [`Counters`].
#[inline(always)]
pub fn counters() -> Counters {
    Counters(NAMES_COUNTERS.get_ptr_mut(0))
}

macro_rules! count {
    ($name:ident, $field:ident) => {
        #[inline(always)]
        pub fn $name(self) {
            if let Some(counters) = self.0 {
                // SAFETY: an array's element stays, and this is an aligned word of it.
                add_one(unsafe { &raw mut (*counters).$field });
            }
        }
    };
}

impl Counters {
    count!(count_answered, answered);
    count!(count_failed, failed);
    count!(count_limited, limited);
    count!(count_broken, broken);
}

#[inline(always)]
fn add_one(counter: *mut u64) {
    // SAFETY: the pointer is to an aligned u64 in an array map. The result is unused, which makes this
    // XADD: the verifier of 5.10 rejects a fetching addition.
    unsafe {
        atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(counter, 1);
    }
}
