//! The binaries, so that two builds of a commit are the same bytes, whatever folder they are made in.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::release::{Architecture, Release};
use crate::process;
use crate::repository;
use crate::setup::{self, toolchain};

/// What a binary is made for.
#[derive(Clone, Copy)]
pub struct Target {
    architecture: Architecture,
    libc: Libc,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Libc {
    Glibc,
    Musl,
}

impl Target {
    pub fn glibc(architecture: Architecture) -> Target {
        Target { architecture, libc: Libc::Glibc }
    }

    pub fn musl(architecture: Architecture) -> Target {
        Target { architecture, libc: Libc::Musl }
    }

    fn triple(self) -> String {
        let libc = if self.libc == Libc::Musl { "musl" } else { "gnu" };
        format!("{}-unknown-linux-{libc}", self.architecture.name())
    }

    /// Whether the stable toolchain has its standard library.
    fn is_native(self) -> bool {
        self.libc == Libc::Glibc && self.architecture.name() == std::env::consts::ARCH
    }

    /// The C compiler, which also links.
    fn compiler(self) -> String {
        match self.libc {
            _ if self.is_native() => "cc".to_owned(),
            Libc::Musl => "musl-gcc".to_owned(),
            Libc::Glibc => format!("{}-linux-gnu-gcc", self.architecture.name()),
        }
    }
}

/// Builds the daemon. Returns the stripped binary.
pub fn build(target: Target, release: &Release) -> Result<PathBuf> {
    let triple = target.triple();
    setup::dist::provide_compiler(&target.compiler())?;
    println!("== {triple}");
    // Another toolchain has a standard library of its own, so its dependencies are apart.
    let target_dir = release.work.join("build");
    let mut cargo = match target.is_native() {
        true => Command::new("cargo"),
        // Neither musl's nor other architectures' standard library is everywhere where rustup is.
        false => {
            let mut cargo = toolchain::command("cargo");
            cargo.arg("-Zbuild-std=std,panic_unwind");
            cargo
        }
    };
    cargo.args(["build", "--release", "--locked", "--package", "lb-userspace", "--bin", "nohop"]);
    cargo.args(["--target", &triple, "--target-dir"]).arg(&target_dir);
    cargo.current_dir(repository::root());
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags(target, release)?);
    cargo.env("SOURCE_DATE_EPOCH", &release.epoch).env("NOHOP_COMMIT", &release.commit);
    let remapped: Vec<_> = prefixes()?.iter().map(|(from, to)| format!("{from}={to}")).collect();
    cargo.env("NOHOP_REMAP", remapped.join("\x1f"));
    let variable = |name: &str| format!("{name}_{}", triple.replace('-', "_"));
    let compiler = target.compiler();
    let linker = match target.libc {
        Libc::Glibc => PathBuf::from(&compiler),
        Libc::Musl => linker(&release.work)?,
    };
    let name = triple.to_uppercase().replace('-', "_");
    cargo.env(format!("CARGO_TARGET_{name}_LINKER"), linker);
    let c_flags: Vec<_> =
        prefixes()?.iter().map(|(from, to)| format!("'-ffile-prefix-map={from}={to}'")).collect();
    cargo.env(variable("CC"), &compiler).env(variable("CFLAGS"), c_flags.join(" "));
    // A folder's name may have spaces.
    cargo.env("CC_SHELL_ESCAPED_FLAGS", "1");
    process::stream(&mut cargo)?;
    let built = target_dir.join(&triple).join("release/nohop");
    let stripped = release.work.join(format!("nohop-{triple}"));
    let strip = match target.architecture.name() {
        name if name == std::env::consts::ARCH => "strip".to_owned(),
        name => format!("{name}-linux-gnu-strip"),
    };
    // Its symbols stay: the log of a crash has names.
    process::output(Command::new(strip).arg("--strip-debug").arg("-o").arg(&stripped).arg(built))?;
    Ok(stripped)
}

/// Folders of this machine, and what a binary has in their place.
fn prefixes() -> Result<Vec<(String, &'static str)>> {
    let text = |path: PathBuf| path.into_os_string().into_string().map_err(unreadable);
    let cargo_home = match std::env::var_os("CARGO_HOME") {
        Some(home) => PathBuf::from(home),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME isn't set")?).join(".cargo"),
    };
    let sysroot = process::output(toolchain::command("rustc").args(["--print", "sysroot"]))?;
    Ok(vec![
        (text(repository::root().to_owned())?, "/nohop"),
        (text(cargo_home)?, "/cargo"),
        (format!("{}/lib/rustlib/src/rust", sysroot.trim()), "/rust"),
    ])
}

fn unreadable(path: OsString) -> anyhow::Error {
    anyhow::anyhow!("the path {} isn't UTF-8", path.display())
}

/// As CARGO_ENCODED_RUSTFLAGS has them, with a separator that no path has.
fn flags(target: Target, release: &Release) -> Result<String> {
    let mut flags: Vec<String> =
        prefixes()?.iter().map(|(from, to)| format!("--remap-path-prefix={from}={to}")).collect();
    if target.libc == Libc::Musl {
        let unwind = unwinder(&release.work, &target.compiler())?;
        flags.extend([
            "-Ctarget-feature=+crt-static".to_owned(),
            // Debian's musl has the objects that a program begins with.
            "-Clink-self-contained=no".to_owned(),
            format!("-Lnative={}", unwind.display()),
        ]);
    }
    Ok(flags.join("\x1f"))
}

/// GCC's unwinder asks glibc where an object's unwind tables are (`_dl_find_object`, GCC 12 and later). musl
/// lacks that; this asks `dl_iterate_phdr`, which both have.
const FIND_OBJECT: &str = r"#define _GNU_SOURCE
#include <link.h>
#include <pthread.h>

/* The unwinder refers to these by weak symbols, which take nothing out of a static library. */
__attribute__((used)) static const void *const needed[] = {
    pthread_once, pthread_key_create, pthread_getspecific, pthread_setspecific,
    pthread_mutex_lock, pthread_mutex_unlock,
};

struct dl_find_object {
    unsigned long long flags;
    void *map_start, *map_end;
    struct link_map *map;
    void *eh_frame;
    unsigned long long reserved[7];
};

struct search {
    ElfW(Addr) address;
    struct dl_find_object *found;
};

static int look(struct dl_phdr_info *info, size_t size, void *data)
{
    struct search *search = data;
    void *eh_frame = 0;
    int is_within = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        ElfW(Addr) start = info->dlpi_addr + header->p_vaddr;
        if (header->p_type == PT_LOAD && search->address - start < header->p_memsz) {
            is_within = 1;
            search->found->map_start = (void *)start;
            search->found->map_end = (void *)(start + header->p_memsz);
        } else if (header->p_type == PT_GNU_EH_FRAME) {
            eh_frame = (void *)start;
        }
    }
    search->found->eh_frame = eh_frame;
    return is_within && eh_frame;
}

int _dl_find_object(void *address, struct dl_find_object *found)
{
    struct search search = { (ElfW(Addr))address, found };
    found->flags = 0;
    found->map = 0;
    return dl_iterate_phdr(look, &search) ? 0 : -1;
}
";

/// Links as `musl-gcc` does, which knows no static program that can be loaded anywhere (static-pie).
const LINK: &str = r#"#!/bin/sh
musl=/usr/lib/$(uname -m)-linux-musl
exec gcc -nostartfiles "$musl/rcrt1.o" "$musl/crti.o" "$@" "-L$musl" "$musl/crtn.o"
"#;

/// Writes that program. By the end of its name the compiler knows how to call it.
fn linker(work: &Path) -> Result<PathBuf> {
    let file = work.join("static-gcc");
    fs::write(&file, LINK)
        .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("can't write {}", file.display()))?;
    Ok(file)
}

/// A folder with `libunwind.a`, by which name Rust's standard library wants the unwinder for musl.
fn unwinder(work: &Path, compiler: &str) -> Result<PathBuf> {
    let folder = work.join("unwind");
    fs::create_dir_all(&folder).with_context(|| format!("can't make {}", folder.display()))?;
    let library = process::output(Command::new("gcc").arg("-print-file-name=libgcc_eh.a"))?;
    let (source, object) = (folder.join("find_object.c"), folder.join("find_object.o"));
    fs::write(&source, FIND_OBJECT)?;
    let mut cc = Command::new(compiler);
    process::output(cc.args(["-O2", "-fPIC", "-c", "-o"]).arg(&object).arg(&source))?;
    let to = folder.join("libunwind.a");
    fs::copy(library.trim(), &to).context("gcc has no libgcc_eh.a")?;
    process::output(Command::new("ar").arg("rD").arg(&to).arg(&object))?;
    Ok(folder)
}
