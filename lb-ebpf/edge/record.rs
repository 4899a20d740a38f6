//! A flow's record, field by field.

use core::intrinsics::{AtomicOrdering, atomic_xadd};
use lb_common::{FlowRecord, FlowWord, PROOF_GENERATION};

use crate::tables::add_one;

/// A flow's record.
#[derive(Clone, Copy)]
pub struct RecordPtr(pub *mut FlowRecord);

macro_rules! field {
    ($(#[$doc:meta])* $name:ident, $kind:ty $(, $set:ident)?) => {
        $(#[$doc])*
        #[inline(always)]
        pub fn $name(self) -> $kind {
            // SAFETY: an array's element stays, and this is an aligned field of it; volatile, because other
            // processors write it.
            unsafe { (&raw const (*self.0).$name).read_volatile() }
        }
        $(
            /// Sets it.
            #[inline(always)]
            pub fn $set(self, value: $kind) {
                // SAFETY: as above.
                unsafe { (&raw mut (*self.0).$name).write_volatile(value) }
            }
        )?
    };
}

macro_rules! address {
    ($name:ident) => {
        /// The address as it lies in memory: as a word, since four octets would be loaded one by one.
        #[inline(always)]
        pub fn $name(self) -> u32 {
            // SAFETY: an array's element stays, and this is four octets of it at a multiple of four.
            unsafe { (&raw const (*self.0).$name).cast::<u32>().read_volatile() }
        }
    };
}

/// See the fields of [`FlowRecord`].
impl RecordPtr {
    field!(claims, u32);

    /// What it is, by one load.
    #[inline(always)]
    pub fn word(self) -> FlowWord {
        // SAFETY: an array's element stays, and this is an aligned word of it; volatile, because other
        // processors write it.
        zerocopy::transmute!(unsafe { (&raw const (*self.0).word).cast::<u32>().read_volatile() })
    }

    field!(backend_idx, u32);
    field!(generation, u32);
    field!(last_ms, u32, set_last_ms);
    field!(begun_ms, u32);
    field!(client_port, u16);
    field!(vip_port, u16);
    field!(backend_port, u16);
    field!(source_port, u16);
    address!(client);
    address!(vip);
    address!(backend);
    address!(source);

    /// Adds to the claims.
    #[inline(always)]
    pub fn add_claims(self, n: i32) {
        // SAFETY: an array's element stays; this word of it is written by atomic addition only. The result
        // is unused, which makes this XADD: the verifier of 5.10 rejects a fetching addition.
        unsafe {
            let claims = &raw mut (*self.0).claims;
            atomic_xadd::<u32, u32, { AtomicOrdering::Relaxed }>(claims, n.cast_unsigned());
        }
    }

    /// Whether it is that of the daemon's proof.
    #[inline(always)]
    pub fn is_proof(self) -> bool {
        self.generation() == PROOF_GENERATION
    }

    /// Whether the flow has come to be over, or isn't one yet.
    #[inline(always)]
    pub fn is_none(self) -> bool {
        // SAFETY: an array's element stays, and this is a field of it.
        unsafe { (&raw const (*self.0).word.client).read_volatile() == 0 }
    }

    /// Makes it no flow's.
    #[inline(always)]
    pub fn clear(self) {
        // SAFETY: as above. Who claimed it alone does.
        unsafe { (&raw mut (*self.0).word.client).write_volatile(0) };
    }

    /// Makes it a flow's: the last step.
    #[inline(always)]
    pub fn begin(self) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).word.client).write_volatile(FlowWord::FIRST) };
    }

    /// Sets what a side has shown.
    #[inline(always)]
    pub fn set_shown(self, is_back: bool, shown: u8) {
        // SAFETY: as above; a byte of its own.
        unsafe {
            let word = &raw mut (*self.0).word;
            if is_back {
                (&raw mut (*word).backend).write_volatile(shown);
            } else {
                (&raw mut (*word).client).write_volatile(shown);
            }
        }
    }

    /// Sets the flags. Who claimed it alone does.
    #[inline(always)]
    pub fn set_flags(self, flags: u8) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).word.flags).write_volatile(flags) };
    }

    /// The upper half of its bytes, see [`FlowRecord::bytes`]: when its SYN was sent on, or what the client has to
    /// acknowledge.
    #[inline(always)]
    pub fn upper(self) -> u32 {
        // SAFETY: as above.
        unsafe { ((&raw const (*self.0).bytes).read_volatile() >> 32) as u32 }
    }

    /// Sets it. With 0 its bytes are bytes alone.
    #[inline(always)]
    pub fn set_upper(self, value: u32) {
        let upper = if cfg!(target_endian = "little") { 1 } else { 0 };
        // SAFETY: as above: half of an aligned word, which others add to whole.
        unsafe { (&raw mut (*self.0).bytes).cast::<u32>().add(upper).write_volatile(value) };
    }

    /// Their bytes: see [`FlowRecord::n_bytes`].
    #[inline(always)]
    pub fn bytes(self) -> u64 {
        // SAFETY: as above.
        let bytes = unsafe { (&raw const (*self.0).bytes).read_volatile() };
        if self.word().has_only_low_bytes() { bytes & u64::from(u32::MAX) } else { bytes }
    }

    /// The packets of both directions.
    #[inline(always)]
    pub fn packets(self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).packets).read_volatile() }
    }

    /// Adds a packet.
    #[inline(always)]
    pub fn add_packet(self, bytes: u32) {
        // SAFETY: as above.
        unsafe {
            add_one(&raw mut (*self.0).packets);
            let all = &raw mut (*self.0).bytes;
            atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(all, bytes.into());
        }
    }

    /// Sets the backend.
    #[inline(always)]
    pub fn set_backend(self, backend_idx: u32, generation: u32) {
        // SAFETY: an array's element stays, and these are aligned fields of it. Who claimed it alone
        // writes them.
        unsafe {
            (&raw mut (*self.0).backend_idx).write_volatile(backend_idx);
            (&raw mut (*self.0).generation).write_volatile(generation);
        }
    }

    /// Sets the ports: the client's, the VIP's, the backend's, and the source's.
    #[inline(always)]
    pub fn set_ports(self, [client, vip, backend, source]: [u16; 4]) {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.0).client_port).write_volatile(client);
            (&raw mut (*self.0).vip_port).write_volatile(vip);
            (&raw mut (*self.0).backend_port).write_volatile(backend);
            (&raw mut (*self.0).source_port).write_volatile(source);
        }
    }

    /// Sets the addresses, likewise.
    #[inline(always)]
    pub fn set_addresses(self, [client, vip, backend, source]: [u32; 4]) {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.0).client).cast::<u32>().write_volatile(client);
            (&raw mut (*self.0).vip).cast::<u32>().write_volatile(vip);
            (&raw mut (*self.0).backend).cast::<u32>().write_volatile(backend);
            (&raw mut (*self.0).source).cast::<u32>().write_volatile(source);
        }
    }

    /// Sets that it begins now. `sent_us` is 0 where it is never pending.
    #[inline(always)]
    pub fn set_begun(self, protocol: u8, flags: u8, now_ms: u32, sent_us: u32) {
        // SAFETY: as above.
        unsafe {
            (&raw mut (*self.0).word.backend).write_volatile(0);
            (&raw mut (*self.0).word.protocol).write_volatile(protocol);
            (&raw mut (*self.0).word.flags).write_volatile(flags);
            (&raw mut (*self.0).begun_ms).write_volatile(now_ms);
            (&raw mut (*self.0).last_ms).write_volatile(now_ms);
            (&raw mut (*self.0).packets).write_volatile(0);
            (&raw mut (*self.0).bytes).write_volatile(u64::from(sent_us) << 32);
        }
    }
}
