//! The object: its constants, from the kernel's features and the configuration, and how it is loaded.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader, VerifierLogLevel};
use ipnet::IpNet;
use lb_common::{Address, MAX_CLIENT_SOURCES, N_PUBLIC_NETWORKS};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::btf::Bit;
use super::cause::is_transient;
use super::error::DatapathError;
use super::features::{Features, Limit, N_ATTEMPTS};
use super::map_specs::{MapShape, Sizes, socket_shapes};
use super::memcg;
use super::options::Options;
use super::pins::Pins;
use super::units::{Object, Unit};
use crate::config::{MAX_PUBLIC_NETWORKS, VipConfig};

const _: () = assert!(MAX_PUBLIC_NETWORKS == N_PUBLIC_NETWORKS);

/// Loads a unit's programs over the maps in `pins`, and creates the maps that aren't there. The
/// constants follow from `features`, so there is one attempt, and an error of it is an error.
///
/// # Errors
/// When the kernel refuses, for lack of a feature, of memory or of privileges.
pub fn load(
    unit: &Unit,
    options: &Options,
    sizes: &Sizes,
    pins: &Pins,
    features: &mut Features,
) -> Result<Ebpf, DatapathError> {
    let log_level = VerifierLogLevel::default();
    let mut ebpf = open(unit.object, options, sizes, pins, features, log_level)?;
    for hook in unit.hooks {
        load_program(&mut ebpf, hook.program)?;
    }
    Ok(ebpf)
}

/// The programs of all units, each with how many instructions the verifier processed, by its log;
/// `None` where it has no such line. aya returns the log of a failure alone, so the loads fail, after
/// the verifier, for lack of a file descriptor (`bpf_prog_new_fd` in kernel/bpf/syscall.c). No other
/// thread may open files meanwhile.
///
/// # Errors
/// As for [`load`].
pub fn processed_instructions(
    options: &Options,
    sizes: &Sizes,
    pins: &Pins,
    features: &mut Features,
) -> Result<Vec<(&'static str, Option<u32>)>, DatapathError> {
    let mut all = Vec::new();
    for unit in options.units {
        let log_level = VerifierLogLevel::STATS;
        let mut ebpf = open(unit.object, options, sizes, pins, features, log_level)?;
        for hook in unit.hooks {
            all.push(processed(&mut ebpf, hook.program)?);
        }
    }
    Ok(all)
}

/// The same of one program.
///
/// # Errors
/// When the object has none of this name, or the kernel refuses it.
pub fn processed(
    ebpf: &mut Ebpf,
    name: &'static str,
) -> Result<(&'static str, Option<u32>), DatapathError> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::Object { missing: name })?;
    let log = match without_descriptors(|| load_once(program)) {
        Err(ProgramError::LoadError { io_error, verifier_log }) if is_accepted(&io_error) => {
            verifier_log.to_string()
        }
        Err(source) => return Err(DatapathError::Program { program: name, source }),
        Ok(()) => String::new(),
    };
    // `processed 14216 insns (limit 1000000) max_states_per_insn ...`
    let (_, count) = log.rsplit_once("processed ").unwrap_or_default();
    Ok((name, count.split(' ').next().and_then(|count| count.parse().ok())))
}

/// Whether a load without file descriptors failed for lack of one, so after the verifier.
fn is_accepted(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc::EMFILE)
}

/// Runs `work` while this process can open nothing more.
fn without_descriptors<T>(work: impl FnOnce() -> T) -> T {
    let before = getrlimit(Resource::Nofile);
    let lowest_free = std::fs::File::open("/dev/null").map(|file| file.as_raw_fd() as u64);
    let limited = Rlimit { current: lowest_free.ok().or(before.current), ..before };
    // Where the limit can't be set, the load succeeds, and there is no log.
    let _ = setrlimit(Resource::Nofile, limited);
    let result = work();
    let _ = setrlimit(Resource::Nofile, before);
    result
}

/// Creates the maps of a unit that come in addition to those of the first one, as [`memcg::create_uncharged`] does.
/// Where that fails, or there is no program for it, loading creates them.
pub fn create_additional_maps(
    unit: &str,
    shapes: &[MapShape],
    sizes: &Sizes,
    program: Option<&Path>,
    pins: &Pins,
) {
    let Some(program) = program else { return };
    // With those of the first unit, which are there: the mark is about all of them.
    let all = sizes.shapes().into_iter().chain(shapes.iter().copied());
    let all: Vec<_> = all.map(|shape| (pins.maps().join(shape.name), shape.max_entries)).collect();
    if let Err(reason) = memcg::create_uncharged(program, &all, &pins.charged()) {
        tracing::debug!("the maps of the unit {unit} are charged: {reason}");
    }
}

/// Opens an object over the maps in `pins`.
fn open(
    object: Object,
    options: &Options,
    sizes: &Sizes,
    pins: &Pins,
    features: &mut Features,
    log_level: VerifierLogLevel,
) -> Result<Ebpf, DatapathError> {
    let pools = PoolConstants::of(&options.vip);
    let (pins_network, pins_mask) = network_around(options.vip.pins.values().map(|pin| *pin.ip()));
    let Bit { offset, mask: kernel_socket_mask } = features.sockets.kernel.unwrap_or_default();
    let Bit { offset: subflow_offset, .. } = features.sockets.subflow.unwrap_or_default();
    let ipv6_only = features.sockets.ipv6_only.unwrap_or_default();
    let has_mptcp = u32::from(features.sockets.has_mptcp);
    let layout = u32::from(options.layout);
    let has_bypass = u32::from(!options.datapath.exclude_cgroups.is_empty());
    let mut loader = EbpfLoader::new();
    loader.verifier_log_level(log_level);
    let refusal = features.refusal as u32;
    let shapes = sizes.shapes();
    let maps = shapes.iter().map(|shape| (pins.maps().join(shape.name), shape.max_entries));
    let storages = socket_shapes();
    let storages =
        storages.iter().map(|shape| (pins.sockets().join(shape.name), shape.max_entries));
    let pinned: Vec<(PathBuf, u32)> = maps.chain(storages).collect();
    if let Some(program) = &options.map_creator
        && let Err(reason) = memcg::create_uncharged(program, &pinned, &pins.charged())
    {
        let limit = Limit::Charged(reason);
        if !features.limits.iter().any(|limit| matches!(limit, Limit::Charged(_))) {
            features.limits.push(limit);
        }
    }
    for shape in &shapes {
        loader.map_max_entries(shape.name, shape.max_entries);
        loader.map_pin_path(shape.name, pins.maps().join(shape.name));
    }
    for shape in socket_shapes() {
        loader.map_pin_path(shape.name, pins.sockets().join(shape.name));
    }
    loader.override_global("MAP_LAYOUT", &layout, true);
    let error_offset = features.sockets.error.map_or(0, |Bit { offset, .. }| offset);
    let cookie_offset = features.sockets.cookie.map_or(0, |Bit { offset, .. }| offset);
    loader.override_global("COOKIE_OFFSET", &cookie_offset, true);
    let mut trusted = [0u32; MAX_CLIENT_SOURCES];
    for (word, source) in trusted.iter_mut().zip(&options.datapath.client_address_from) {
        *word = u32::from_ne_bytes(source.octets());
    }
    loader.override_global("HAS_MPTCP", &has_mptcp, true);
    if object == Object::Outcomes {
        loader.override_global("CLIENT_ADDRESS_FROM", &trusted, true);
        loader.override_global("SOCKET_ERROR_OFFSET", &error_offset, true);
        return loader.load(object.bytes()).map_err(DatapathError::Load);
    }
    let storage_offset = features.sockets.storage.map_or(0, |Bit { offset, .. }| offset);
    loader.override_global("STORAGE_OFFSET", &storage_offset, true);
    pools.set(&mut loader);
    pools.set_public(&mut loader);
    loader.override_global("PINS_NETWORK", &pins_network, true);
    loader.override_global("PINS_MASK", &pins_mask, true);
    loader.override_global("REFUSAL", &refusal, true);
    loader.override_global("HAS_BYPASS", &has_bypass, true);
    loader.override_global("KERNEL_SOCKET_OFFSET", &offset, true);
    loader.override_global("KERNEL_SOCKET_MASK", &kernel_socket_mask, true);
    loader.override_global("SUBFLOW_OFFSET", &subflow_offset, true);
    loader.override_global("IPV6_ONLY_OFFSET", &ipv6_only.offset, true);
    loader.override_global("IPV6_ONLY_MASK", &ipv6_only.mask, true);
    loader.load(object.bytes()).map_err(DatapathError::Load)
}

/// The pools of VIPs, as programs have them in their constants.
#[derive(Debug)]
pub struct PoolConstants {
    network: u32,
    mask: u32,
    network6: [u64; 2],
    mask6: [u64; 2],
    /// Those of `vip.public`, each with its netmask, those of a family one after the other; the rest are
    /// zeros.
    public: [[u32; N_PUBLIC_NETWORKS]; 2],
    public6: [[[u64; 2]; N_PUBLIC_NETWORKS]; 2],
}

impl PoolConstants {
    /// Those of a configuration.
    pub fn of(vip: &VipConfig) -> PoolConstants {
        let pool6 = vip.pool6.map(|pool| [pool.network().octets(), pool.netmask().octets()]);
        let pool6 = pool6.unwrap_or_default().map(|octets| Address { octets }.words());
        let [network6, mask6] = pool6;
        let (network, mask) = (u32::from(vip.pool.network()), u32::from(vip.pool.netmask()));
        let (mut public, mut public6) = <([[u32; _]; 2], [[[u64; 2]; _]; 2])>::default();
        let (mut n_v4, mut n_v6) = (0, 0);
        for network in vip.public.iter().take(N_PUBLIC_NETWORKS) {
            match network {
                IpNet::V4(network) => {
                    public[0][n_v4] = network.network().into();
                    public[1][n_v4] = network.netmask().into();
                    n_v4 += 1;
                }
                IpNet::V6(network) => {
                    let words = |address: Ipv6Addr| Address { octets: address.octets() }.words();
                    public6[0][n_v6] = words(network.network());
                    public6[1][n_v6] = words(network.netmask());
                    n_v6 += 1;
                }
            }
        }
        PoolConstants { network, mask, network6, mask6, public, public6 }
    }

    /// Sets those of public VIPs, which the connect hook alone has.
    pub fn set_public<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.override_global("PUBLIC_NETWORKS", &self.public[0], true);
        loader.override_global("PUBLIC_MASKS", &self.public[1], true);
        loader.override_global("PUBLIC6_NETWORKS", &self.public6[0], true);
        loader.override_global("PUBLIC6_MASKS", &self.public6[1], true);
    }

    /// Sets those of the pools.
    pub fn set<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        loader.override_global("POOL_NETWORK", &self.network, true);
        loader.override_global("POOL_MASK", &self.mask, true);
        loader.override_global("POOL6_NETWORK_HIGH", &self.network6[0], true);
        loader.override_global("POOL6_NETWORK_LOW", &self.network6[1], true);
        loader.override_global("POOL6_MASK_HIGH", &self.mask6[0], true);
        loader.override_global("POOL6_MASK_LOW", &self.mask6[1], true);
    }
}

/// Loads a program; what a signal interrupts (EAGAIN from `bpf_check`) is tried again.
pub fn load_program(ebpf: &mut Ebpf, name: &'static str) -> Result<(), DatapathError> {
    let program = ebpf.program_mut(name).ok_or(DatapathError::Object { missing: name })?;
    let mut n_left = N_ATTEMPTS;
    loop {
        n_left -= 1;
        match load_once(program) {
            Err(ProgramError::LoadError { io_error, .. })
                if n_left > 0 && is_transient(&io_error) => {}
            result => {
                return result.map_err(|source| DatapathError::Program { program: name, source });
            }
        }
    }
}

fn load_once(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::Xdp(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// A loaded program of the object.
///
/// # Errors
/// When the object has none of this name, or it isn't loaded.
pub fn program_fd<'a>(ebpf: &'a Ebpf, name: &'static str) -> Result<BorrowedFd<'a>, DatapathError> {
    let program = ebpf.program(name).ok_or(DatapathError::Object { missing: name })?;
    let fd = program.fd().map_err(|source| DatapathError::Program { program: name, source })?;
    Ok(fd.as_fd())
}

/// The smallest network that these addresses are in, and its netmask; 0 of 32 bits for none.
fn network_around(addresses: impl Iterator<Item = Ipv4Addr>) -> (u32, u32) {
    let networks = addresses.map(|address| (u32::from(address), u32::MAX));
    let around = networks.reduce(|(network, mask), (address, _)| {
        let n_differing = 32 - (network ^ (address & mask)).leading_zeros();
        let mask = mask & u32::MAX.checked_shl(n_differing).unwrap_or(0);
        (network & mask, mask)
    });
    around.unwrap_or((0, u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_around_pins() {
        let around = |addresses: &[[u8; 4]]| {
            let (network, mask) = network_around(addresses.iter().map(|&octets| octets.into()));
            (Ipv4Addr::from(network).octets(), mask.count_ones())
        };
        assert_eq!(around(&[]), ([0; 4], 32));
        assert_eq!(around(&[[127, 0, 0, 1]]), ([127, 0, 0, 1], 32));
        assert_eq!(around(&[[127, 0, 0, 1], [127, 0, 0, 2], [127, 0, 0, 1]]), ([127, 0, 0, 0], 30));
        assert_eq!(around(&[[10, 0, 0, 1], [10, 255, 0, 1], [10, 0, 3, 0]]), ([10, 0, 0, 0], 8));
        assert_eq!(around(&[[10, 0, 0, 1], [200, 0, 0, 1]]), ([0; 4], 0));
    }
}
