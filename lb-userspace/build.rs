//! Builds the kernel object and hands it to the daemon as `$OUT_DIR/nohop-ebpf`.
//!
//! lb-ebpf is a workspace of its own: it needs a nightly compiler, the standard library's source
//! and a bpf-linker built against that nightly's LLVM. `cargo xtask setup` provides all three.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let object_dir = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("lb-ebpf");
    let linker = object_dir.with_file_name(".tools").join("bpf-linker");
    for watched in [
        "src",
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

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let target_dir = out_dir.join("object");
    let mut cargo = Command::new("rustup");
    cargo.args(["run", "nightly", "cargo", "build", "--release", "--locked"]);
    cargo.args(["--bin", "nohop-ebpf", "--target-dir"]);
    cargo.arg(&target_dir).current_dir(&object_dir);
    // What this build's cargo set for itself would reach the other one: its compiler, its flags.
    for inherited in [
        "CARGO",
        "CARGO_BUILD_TARGET",
        "CARGO_ENCODED_RUSTFLAGS",
        "RUSTC",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTFLAGS",
        "RUSTUP_TOOLCHAIN",
    ] {
        cargo.env_remove(inherited);
    }
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(_) => fail("the kernel object didn't build; `cargo xtask setup` fixes a missing tool"),
        Err(error) => {
            fail(&format!("can't run rustup ({error}): install it from https://rustup.rs"))
        }
    }

    let object = target_dir.join("bpfel-unknown-none/release/nohop-ebpf");
    if let Err(error) = std::fs::copy(&object, out_dir.join("nohop-ebpf")) {
        fail(&format!("can't copy {}: {error}", object.display()));
    }
}

fn fail(why: &str) -> ! {
    println!("cargo:warning={why}");
    std::process::exit(1);
}
