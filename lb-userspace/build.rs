//! Builds the kernel objects and hands them to the daemon as `$OUT_DIR/nohop-ebpf`,
//! `$OUT_DIR/nohop-outcomes`, `$OUT_DIR/nohop-names`, `$OUT_DIR/nohop-intercept` and `$OUT_DIR/nohop-edge`.
//!
//! lb-ebpf is a workspace of its own: it needs a nightly compiler, the standard library's source
//! and a bpf-linker built against that nightly's LLVM. `cargo xtask setup` provides all three.

#[path = "../xtask/src/setup/toolchain.rs"]
#[allow(dead_code)] // setup has more use for it
mod toolchain;

use std::env;
use std::path::PathBuf;

/// The objects: one a unit.
const OBJECTS: [&str; 5] =
    ["nohop-ebpf", "nohop-outcomes", "nohop-names", "nohop-intercept", "nohop-edge"];

fn main() {
    // As it runs, not as it was compiled: a target folder may be moved with its repository.
    let package = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let object_dir = package.with_file_name("lb-ebpf");
    let linker = object_dir.with_file_name(".tools").join("bpf-linker");
    for watched in [
        "src",
        "outcomes",
        "names",
        "intercept",
        "edge",
        "Cargo.toml",
        "Cargo.lock",
        ".cargo/config.toml",
        "rust-toolchain.toml",
        "../lb-common/src",
        "../lb-common/Cargo.toml",
    ] {
        println!("cargo:rerun-if-changed={}", object_dir.join(watched).display());
    }
    println!("cargo:rerun-if-changed={}", linker.display());
    if !linker.exists() {
        fail(&format!("{} isn't there: run `cargo xtask setup` first", linker.display()));
    }

    let name = toolchain::name();
    println!("cargo:rerun-if-env-changed=NOHOP_NIGHTLY");
    check_compiler(&name);

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target_dir = out_dir.join("object");
    let mut cargo = toolchain::command("cargo");
    cargo.args(["build", "--release", "--locked"]);
    cargo.args(OBJECTS.iter().flat_map(|object| ["--bin", object]));
    cargo.arg("--target-dir").arg(&target_dir).current_dir(&object_dir);
    // Otherwise aya-ebpf has the types of the machine that builds.
    let architecture = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets CARGO_CFG_TARGET_ARCH");
    if architecture != env::consts::ARCH {
        cargo.env("AYA_BPF_TARGET_ARCH", architecture);
    }
    // Packages are the same bytes wherever they are made: the objects name no folder of this machine.
    println!("cargo:rerun-if-env-changed=NOHOP_REMAP");
    if let Ok(prefixes) = env::var("NOHOP_REMAP") {
        let flags = prefixes.split('\x1f').map(|it| format!("'--remap-path-prefix={it}'"));
        let flags = flags.collect::<Vec<_>>().join(", ");
        cargo.arg("--config").arg(format!("build.rustflags=[{flags}]"));
        cargo.env("RUSTC_WRAPPER", object_dir.join("rustc-anywhere.sh"));
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(_) => fail("the kernel objects didn't build; `cargo xtask setup` fixes a missing tool"),
        Err(error) => no_rustup(&error),
    }

    for name in OBJECTS {
        let object = target_dir.join("bpfel-unknown-none/release").join(name);
        if let Err(error) = std::fs::copy(&object, out_dir.join(name)) {
            fail(&format!("can't copy {}: {error}", object.display()));
        }
    }
}

/// Fails where the nightly can't build the object, instead of far into its build.
fn check_compiler(name: &str) {
    let output = toolchain::command("rustc").arg("-vV").output().unwrap_or_else(|e| no_rustup(&e));
    if !output.status.success() {
        let printed = String::from_utf8_lossy(&output.stderr);
        let reason = printed.lines().next().unwrap_or_default();
        fail(&format!(
            "rustup has no `{name}` ({reason}): `rustup toolchain install {name} --profile minimal \
             --component rust-src`, then `cargo xtask setup`"
        ));
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    if let Err(why) = toolchain::Compiler::read(name, &printed) {
        fail(&why);
    }
}

fn no_rustup(error: &std::io::Error) -> ! {
    fail(&format!("can't run rustup ({error}): install it from https://rustup.rs"))
}

fn fail(why: &str) -> ! {
    println!("cargo:warning={why}");
    std::process::exit(1);
}
