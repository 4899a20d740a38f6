//! The proof that an edge's programs translate: packets of the daemon's own, which the programs are given as they are
//! attached.

use std::net::SocketAddr;
use std::time::Duration;

use aya::maps::{Array, Map, MapData};
use lb_userspace::datapath::{Datapath, EdgeOptions, Proof};

use crate::edge::{
    BACKEND, Network, PORT, count, flows, options, place, public, serve, serve_with, web,
};
use crate::netns::{inside, ip};

/// Of IPv4 and of IPv6.
fn proofs(datapath: &mut Datapath) -> [Proof; 2] {
    datapath.prove_edge_again();
    datapath.edge_status().unwrap().proofs
}

const PASSED: Proof = Some(Ok(()));

/// It passes where the programs translate; without a way on it fails, for the address families that have none.
pub fn passes_and_fails() {
    inside(|| {
        let (place, _network) = (place(), Network::new());
        // VIPs in an interface's own network, which are unreachable where they are announced.
        let vips: [SocketAddr; 2] = ["10.7.0.3:80", "[fd07::3]:80"].map(|vip| vip.parse().unwrap());
        let near = public("near", &[(BACKEND, PORT).into()], &vips);
        ip("route add unreachable 10.7.0.3");
        ip("route add unreachable fd07::3");
        let mut networks = options().networks;
        for network in ["10.7.0.3/32", "fd07::3/128"] {
            networks.push(network.parse().unwrap());
        }
        let mut datapath = serve_with(&place, vec![near], EdgeOptions { networks, ..options() });
        // As if no neighbour had been verified for long: that is left to packets that leave. One that has no hardware
        // address isn't verified anyway.
        let neighbours =
            [("198.51.100.3", "out"), ("fd51::3", "out"), ("10.7.0.2", "in"), ("fd07::2", "in")];
        for (address, device) in neighbours {
            ip(&format!(
                "neigh replace {address} lladdr 02:00:00:00:00:07 nud permanent dev {device}"
            ));
        }
        let pin = MapData::from_pin(place.pin("v3/maps/EDGE_NEIGHBOURS")).unwrap();
        let mut times: Array<_, u32> = Map::Array(pin).try_into().unwrap();
        (0..times.len()).for_each(|idx| times.set(idx, u32::MAX / 2, 0).unwrap());
        datapath.fix();
        assert!(times.iter().all(|time| time.unwrap() == u32::MAX / 2));
        assert_eq!(datapath.edge_status().unwrap().proofs, [PASSED, PASSED]);
        assert_eq!(flows(&datapath), []);
        // Two interfaces, two families, two directions.
        assert_eq!(count(&datapath, "forwarded"), 8, "{:?}", datapath.edge_counts());

        ip("route add unreachable fd51::/65");
        let [v4, v6] = proofs(&mut datapath);
        assert_eq!(v4, PASSED);
        let why = v6.unwrap().unwrap_err();
        assert!(
            why.starts_with("a proof of IPv6 by out has failed: a packet to a public"),
            "{why}"
        );
        let unit = datapath.unit_status().into_iter().find(|unit| unit.name == "edge").unwrap();
        assert_eq!(unit.reason.as_deref(), Some(&*why));
        ip("route del unreachable fd51::/65");
        ip("link set out down");
        let [v4, _] = proofs(&mut datapath);
        let why = v4.unwrap().unwrap_err();
        assert!(why.contains("by out has failed: a packet to a public VIP isn't sent on"), "{why}");
        // One that has failed is soon tried again.
        ip("link set out up");
        datapath.fix();
        assert_eq!(datapath.edge_status().unwrap().proofs[0], PASSED);
    });
}

/// A daemon that is killed in the middle of a proof leaves its flow, which stands in no later one's way.
pub fn of_a_killed_daemon() {
    inside(|| {
        let (place, _network) = (place(), Network::new());
        let mut datapath = serve(&place, vec![web()]);
        assert_eq!(proofs(&mut datapath), [PASSED, PASSED]);
        // Before the flow has a key; before a packet; before the keys are removed (linux/bpf.h).
        for (command, name) in
            [(2, "MAP_UPDATE_ELEM"), (10, "PROG_TEST_RUN"), (3, "MAP_DELETE_ELEM")]
        {
            prove_and_die(&mut datapath, command);
            assert_eq!(proofs(&mut datapath), [PASSED, PASSED], "{name}");
            assert_eq!(flows(&datapath), [], "{name}");
        }
        datapath.sweep_edge_after(Duration::from_secs(7_200));
        assert_eq!(datapath.edge_status().unwrap().n_flows, 0);
    });
}

/// Proves in another process, which the kernel kills at its first call of bpf() with this command.
fn prove_and_die(datapath: &mut Datapath, command: u32) {
    // SAFETY: the child has this thread alone; it allocates, which the C library allows, and needs no lock of others.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{}", std::io::Error::last_os_error());
    if child == 0 {
        kill_at_bpf(command);
        datapath.prove_edge_again();
        // SAFETY: it ends this process, without what the parent has to do at its end.
        unsafe { libc::_exit(0) }
    }
    let mut status = 0;
    // SAFETY: the status is this function's.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS, "{status:#x}");
}

/// Has the kernel kill this process at its first call of bpf() with this command.
fn kill_at_bpf(command: u32) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const UNLESS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let insn = |code, jf, k| libc::sock_filter { code, jt: 0, jf, k };
    // The number of the call and the low half of its first argument, in struct seccomp_data.
    let low = if cfg!(target_endian = "big") { 20 } else { 16 };
    let mut filter = [
        insn(LOAD, 0, 0),
        insn(UNLESS, 3, libc::SYS_bpf as u32),
        insn(LOAD, 0, low),
        insn(UNLESS, 1, command),
        insn(RETURN, 0, libc::SECCOMP_RET_KILL_PROCESS),
        insn(RETURN, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program is as long as it says, and lives until the call ends. Without a core file.
    let is_set = unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    };
    if !is_set {
        // SAFETY: as above.
        unsafe { libc::_exit(1) }
    }
}
