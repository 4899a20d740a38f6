//! The choice of a backend, for the objects that choose one: the tables as `decide` and `choose` read
//! them, and the parts of it that the verifier follows once each.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use lb_common::{
    Address, BackendWords, ChoiceReason, ControlWords, Draw, EjectionWord, EventKind, Family,
    Frontend, Frontend6, INCONSISTENT, NO_BACKEND, Netns, PackedChoice, Question, Reach, Sample,
    Scan, ServiceRef, Sign, Slot, State, Tables, Walk, choose_among, draw_for, sample_of, state_of,
    unpack,
};

use crate::maps;
use crate::tables::{self, BackendPtr, ControlPtr, ServicePtr};
use crate::{config, random};

/// The maps and the configuration.
pub struct Kernel;

impl Tables for Kernel {
    type Control = ControlPtr;
    type Service = ServicePtr;
    type Backend = BackendPtr;

    #[inline(always)]
    fn in_pool(&self, address: [u8; 4]) -> bool {
        config::in_pool(address)
    }

    #[inline(always)]
    fn in_pool6(&self, address: [u8; 16]) -> bool {
        config::in_pool6(&Address { octets: address })
    }

    #[inline(always)]
    fn is_probe_address(&self, address: [u8; 4]) -> bool {
        config::is_probe_address(address)
    }

    #[inline(always)]
    fn control(&self) -> Option<ControlPtr> {
        tables::control()
    }

    #[inline(always)]
    fn frontend(&self, frontend: &Frontend) -> Option<ServiceRef> {
        // The index has no pins and no public VIPs.
        if config::in_pool(frontend.address) {
            maps::indexed_frontend(frontend)
        } else {
            maps::frontend(frontend)
        }
    }

    #[inline(always)]
    fn frontend6(&self, frontend: &Frontend6) -> Option<ServiceRef> {
        maps::frontend6(frontend)
    }

    #[inline(always)]
    fn service(&self, service: u32) -> Option<ServicePtr> {
        tables::service(service)
    }

    #[inline(always)]
    fn slot(&self, slot: u32) -> Option<Slot> {
        tables::slot(slot)
    }

    #[inline(always)]
    fn backend(&self, backend: u32) -> Option<BackendPtr> {
        tables::backend(backend)
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: the helper has no preconditions.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        random::next()
    }

    #[inline(always)]
    fn choose_for(&self, question: Question) -> PackedChoice {
        let Question { service, reach, group, range, key, is_udp_connect, is_tcp } = question;
        let how = u64::from(reach.netns as u8)
            | u64::from(reach.family as u8) << 8
            | u64::from(group as u8) << 24
            | u64::from(is_udp_connect) << 32
            | u64::from(is_tcp) << 40;
        let drawn = nohop_draw(service.into(), how, zerocopy::transmute!(range), key);
        // Not below `nohop_draw`, as the stack is too short for both.
        let packed = match Draw::walk(drawn) {
            Some(walk) => self.choose_among(service, reach, walk),
            None => drawn,
        };
        let (backend_idx, reason) = unpack(packed);
        if is_tcp && reason == ChoiceReason::TRIAL {
            nohop_change_ejection(service.into(), backend_idx.into(), 1);
        }
        packed
    }

    #[inline(always)]
    fn choose_among(&self, service: u32, reach: Reach, walk: Walk) -> PackedChoice {
        let how = u64::from(reach.netns as u8)
            | u64::from(reach.family as u8) << 8
            | u64::from(walk.may_leave) << 24
            | u64::from(walk.ramps) << 32;
        nohop_choose_in_order(service.into(), how, walk.seed.into(), walk.zero)
    }

    #[inline(always)]
    fn state_of(&self, backend_idx: u32, now_ns: u64, ramps: bool) -> State {
        State(nohop_backend_state(backend_idx.into(), now_ns, ramps.into()))
    }

    #[inline(always)]
    fn sample_of(&self, scan: Scan) -> Sample {
        let range: u64 = zerocopy::transmute!(scan.range);
        let (seed, ramps) = (scan.seed.into(), scan.ramps.into());
        Sample(nohop_sample(range, scan.now_ns, seed, ramps, scan.zero))
    }
}

/// [`draw_for`] as a function of its own, which takes and returns words, as BPF functions do: the verifier
/// follows it once, rather than for each way that leads there. By TCP a backend that was found silent is
/// ejected.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_draw(service: u64, how: u64, range: u64, key: u64) -> u64 {
    let question = Question {
        service: service as u32,
        reach: unpack_reach(how),
        group: (how >> 24) as u8 as usize,
        range: zerocopy::transmute!(range),
        key,
        is_udp_connect: how >> 32 & 1 != 0,
        is_tcp: how >> 40 & 1 != 0,
    };
    let Ok(Draw { found, silent }) = draw_for(&Kernel, question) else { return INCONSISTENT };
    if question.is_tcp && silent != NO_BACKEND {
        nohop_change_ejection(service, silent.into(), 0);
    }
    Draw::pack(found)
}

#[inline(always)]
fn unpack_reach(how: u64) -> Reach {
    let netns = if how & 1 == 0 { Netns::Host } else { Netns::Other };
    let family = match how >> 8 & 0xff {
        0 => Family::Ipv4,
        1 => Family::Ipv6,
        _ => Family::All,
    };
    Reach { netns, family }
}

/// [`choose_among`], likewise.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_choose_in_order(service: u64, how: u64, seed: u64, zero: u64) -> PackedChoice {
    let reach = unpack_reach(how);
    let walk =
        Walk { seed: seed as u32, may_leave: how >> 24 & 1 != 0, ramps: how >> 32 & 1 != 0, zero };
    choose_among(&Kernel, service as u32, reach, walk)
}

/// [`state_of`], likewise.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_backend_state(backend_idx: u64, now_ns: u64, ramps: u64) -> u64 {
    state_of(&Kernel, backend_idx as u32, now_ns, ramps != 0).0
}

/// [`sample_of`], likewise.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_sample(range: u64, now_ns: u64, seed: u64, ramps: u64, zero: u64) -> u64 {
    let range = zerocopy::transmute!(range);
    let scan = Scan { range, now_ns, seed: seed as u32, ramps: ramps != 0, zero };
    sample_of(&Kernel, scan).0
}

/// Ejects a backend for its silence, or claims its trial, by one load and one store, unless another
/// connection did so, or an answer came, since it was looked at. Rare, so a function of its own. Returns
/// nothing of use: a global function has to return a number.
#[inline(never)]
#[unsafe(no_mangle)]
extern "C" fn nohop_change_ejection(service: u64, backend_idx: u64, is_trial: u64) -> u64 {
    let backend_idx = backend_idx as u32;
    let (Some(control), Some(backend)) = (tables::control(), tables::backend(backend_idx)) else {
        return 0;
    };
    let (now_ns, limits) = (Kernel.now_ns(), control.balance().limits());
    let before = backend.ejection();
    let state = State(nohop_backend_state(backend_idx.into(), now_ns, 0));
    if if is_trial != 0 { !state.awaits_trial() } else { !state.is_silent() } {
        return 0;
    }
    if is_trial != 0 {
        let claimed = before.at(now_ns).claim_trial(now_ns, &limits);
        backend.set_ejection(EjectionWord::of(claimed));
        return 0;
    }
    let (after, event) = before.after(Sign::Silence, now_ns, &limits);
    backend.set_ejection(after);
    if event.is_some() {
        let generation = backend.backend().generation;
        maps::emit_ejection(EventKind::Ejected, service as u32, backend_idx, generation);
    }
    0
}
