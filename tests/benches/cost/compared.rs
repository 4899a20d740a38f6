//! The programs that nohop is compared with, attached to cgroups of their own.

use std::fs::File;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{
    CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramFd, SchedClassifier, SockOps,
    TcAttachType, Xdp, XdpMode,
};
use lb_userspace::config::cgroup;
use lb_userspace::datapath::Cost;
use testbed::tempdir;

/// The case, the program, and the one in whose cgroup it works: its own name, or that of
/// the program whose entries it releases.
pub const PROGRAMS: [(&str, &str, &str); 24] = [
    ("empty", "empty", "empty"),
    ("a word, shared", "word", "word"),
    ("a word, not shared", "word_unshared", "word_unshared"),
    ("two constants", "constants", "constants"),
    ("tgid", "tgid", "tgid"),
    ("netns cookie", "netns", "netns"),
    ("random number", "random", "random"),
    ("kernel's socket? 2 reads", "two_reads", "two_reads"),
    ("kernel's socket? 1 read", "one_read", "one_read"),
    ("storage: none there", "storage_absent", "storage_absent"),
    ("storage alone", "storage", "storage"),
    ("storage, from a value", "storage_filled", "storage_filled"),
    ("storage of 16 bytes", "storage_small", "storage_small"),
    ("storage in two maps", "storage_twice", "storage_twice"),
    ("hash by cookie", "hash", "hash"),
    ("hash: release", "hash_release", "hash"),
    ("LRU hash by cookie", "lru", "lru"),
    ("place by cookie", "place", "place"),
    ("place: release", "place_release", "place"),
    ("record by cookie", "record", "record"),
    ("record, callbacks asked for", "record_flagged", "record_flagged"),
    ("cookie", "cookie_alone", "cookie_alone"),
    ("cookie by type", "peek", "peek"),
    ("mark", "mark", "mark"),
];

/// The same of sockops programs, of which all runs for one connection are measured.
pub const SOCKOPS: [(&str, &str, &str); 2] = [
    ("sockops, empty", "sockops_empty", "sockops_empty"),
    ("sockops, empty, states", "sockops_states", "sockops_states"),
];

/// The program at the ingress of `lo` that does nothing.
pub const AT_INGRESS: &str = "tc_empty";
/// The program in the driver of an interface that does nothing.
pub const IN_DRIVER: &str = "xdp_empty";

/// They go with this, which has to happen outside their cgroups.
pub struct Compared {
    ebpf: Ebpf,
    cgroups: Vec<Cgroup>,
}

struct Cgroup {
    of: &'static str,
    path: PathBuf,
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.path);
    }
}

impl Compared {
    pub fn load(object: &Path) -> Compared {
        let ebpf = Ebpf::load_file(object).expect("the kernel takes the maps");
        let root = cgroup::find_cgroup2_root().expect("a cgroup v2 hierarchy is mounted");
        let mut cgroups = Vec::new();
        for (_, program, of) in PROGRAMS.into_iter().chain(SOCKOPS) {
            if program == of {
                let path = root.join(tempdir::name(of));
                std::fs::create_dir(&path).expect("root makes a cgroup");
                cgroups.push(Cgroup { of, path });
            }
        }
        let mut compared = Compared { ebpf, cgroups };
        for (_, program, of) in PROGRAMS.into_iter().chain(SOCKOPS) {
            compared.attach(program, of);
        }
        compared.attach_at_ingress();
        compared
    }

    fn attach_at_ingress(&mut self) {
        let program = self.ebpf.program_mut(AT_INGRESS).expect("the object has it");
        let program: &mut SchedClassifier = program.try_into().expect("it is of that kind");
        program.load().expect("the kernel takes the program");
        program.attach("lo", TcAttachType::Ingress).expect("the kernel attaches it");
    }

    fn attach(&mut self, program: &'static str, of: &'static str) {
        let cgroup = File::open(self.cgroup(of)).expect("the cgroup is there");
        let program = self.ebpf.program_mut(program).expect("the object has it");
        let mode = CgroupAttachMode::Single;
        match program {
            Program::CgroupSockAddr(program) => {
                program.load().and_then(|()| program.attach(cgroup, mode)).map(drop)
            }
            Program::CgroupSock(program) => {
                program.load().and_then(|()| program.attach(cgroup, mode)).map(drop)
            }
            Program::SockOps(program) => {
                program.load().and_then(|()| program.attach(cgroup, mode)).map(drop)
            }
            _ => unreachable!("they are of three kinds"),
        }
        .expect("the kernel takes the program");
    }

    pub fn cgroup(&self, of: &'static str) -> &Path {
        let cgroup = self.cgroups.iter().find(|cgroup| cgroup.of == of);
        &cgroup.expect("each has one").path
    }

    /// Attaches the empty program to the driver of an interface.
    pub fn attach_in_driver(&mut self, interface: &str) {
        let program = self.ebpf.program_mut(IN_DRIVER).expect("the object has it");
        let program: &mut Xdp = program.try_into().expect("it is of that kind");
        program.load().expect("the kernel takes the program");
        program.attach(interface, XdpMode::Driver).expect("the kernel attaches it");
    }

    /// A program at an interface.
    pub fn program(&self, name: &'static str) -> ProgramFd {
        let program = self.ebpf.program(name).expect("the object has it");
        program.fd().and_then(|fd| Ok(fd.try_clone()?)).expect("it is loaded")
    }

    pub fn cost(&self, program: &'static str) -> Cost {
        let program = self.ebpf.program(program).expect("the object has it");
        let info = match program {
            Program::CgroupSockAddr(program) => CgroupSockAddr::info(program),
            Program::CgroupSock(program) => CgroupSock::info(program),
            Program::SockOps(program) => SockOps::info(program),
            Program::SchedClassifier(program) => SchedClassifier::info(program),
            _ => unreachable!("they are of four kinds"),
        }
        .expect("the kernel reports it");
        Cost { n_runs: info.run_count(), run_time: info.run_time() }
    }
}
