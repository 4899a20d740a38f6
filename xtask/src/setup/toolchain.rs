//! Which compilers build the kernel object. `lb-userspace/build.rs` includes this file, too.

use std::ops::RangeInclusive;
use std::process::Command;

/// The nightly that CI installs, which is known to work.
pub const CI_NIGHTLY: &str = include_str!("../../../lb-ebpf/nightly").trim_ascii();

/// The LLVM versions that bpf-linker can be built against: it reads the compiler's bitcode.
pub const LLVM_MAJORS: RangeInclusive<u32> = 21..=23;

/// The oldest compiler: the `rust-version` of lb-common, of which the object has a copy.
const MIN_VERSION: (u32, u32) = (1, 95);

/// rustup's name of the compiler: `NOHOP_NIGHTLY`, or else `nightly`.
pub fn name() -> String {
    let given = std::env::var("NOHOP_NIGHTLY").ok().filter(|name| !name.is_empty());
    given.unwrap_or_else(|| "nightly".to_owned())
}

/// The nightly's `program`, without what the cargo that runs this set for itself: its compiler and
/// its flags.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", &name(), program]);
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
        command.env_remove(inherited);
    }
    command
}

/// What `rustc -vV` reports of a compiler.
#[derive(Debug, PartialEq, Eq)]
pub struct Compiler {
    pub release: String,
    pub commit: String,
    pub llvm_major: u32,
}

impl Compiler {
    /// Reads what the compiler called `name` printed for `rustc -vV`.
    ///
    /// # Errors
    /// When it isn't that, or the compiler can't build the object: what was found, what is needed,
    /// and the command that gets it.
    pub fn read(name: &str, printed: &str) -> Result<Self, String> {
        let field = |key: &str| {
            let value = printed.lines().find_map(|line| line.strip_prefix(key));
            value.map(str::trim).ok_or_else(|| format!("`rustc -vV` has no {key:?}: {printed}"))
        };
        let (release, llvm) = (field("release:")?, field("LLVM version:")?);
        let number = |text: &str, n: usize| -> Option<u32> { text.split('.').nth(n)?.parse().ok() };
        let version = number(release, 0).zip(number(release, 1));
        let llvm_major = number(llvm, 0);
        let wrong = match (version, llvm_major) {
            (Some(version), _) if version < MIN_VERSION => "it is too old",
            (_, Some(major)) if !LLVM_MAJORS.contains(&major) => {
                "bpf-linker has no support for its LLVM"
            }
            (_, Some(_)) if !release.contains("nightly") && !release.contains("dev") => {
                "it is no nightly, and building `core` is an unstable feature"
            }
            (Some(_), Some(llvm_major)) => {
                let (release, commit) = (release.to_owned(), field("commit-hash:")?.to_owned());
                return Ok(Self { release, commit, llvm_major });
            }
            _ => "its version can't be read",
        };
        let (major, minor) = MIN_VERSION;
        Err(format!(
            "`{name}` is rustc {release} with LLVM {llvm}, which can't build the kernel object: \
             {wrong}. It takes a nightly of rustc {major}.{minor} or later with LLVM {} to {}. To \
             fix it: `rustup toolchain install {CI_NIGHTLY} --profile minimal --component rust-src` \
             and NOHOP_NIGHTLY={CI_NIGHTLY}",
            LLVM_MAJORS.start(),
            LLVM_MAJORS.end(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::{CI_NIGHTLY, Compiler};

    #[test]
    fn a_compiler_that_cannot_build_the_object_is_named_with_the_fix() {
        let table = [
            ("1.97.0-nightly", "22.1.4", Ok(22)),
            ("1.95.0-nightly", "21.1.8", Ok(21)),
            ("2.1.0-nightly", "23.0.0", Ok(23)),
            ("1.97.0-dev", "22.1.4", Ok(22)),
            ("1.94.0-nightly", "21.1.8", Err("it is too old")),
            ("1.99.0-nightly", "24.1.0", Err("bpf-linker has no support for its LLVM")),
            ("1.97.0", "22.1.2", Err("it is no nightly")),
            ("nightly", "22.1.2", Err("its version can't be read")),
            ("1.97.0-nightly", "git", Err("its version can't be read")),
        ];
        for (release, llvm, expected) in table {
            let printed = format!(
                "rustc {release} (e50aa6fba 2026-05-19)\nbinary: rustc\ncommit-hash: e50aa\n\
                 host: x86_64-unknown-linux-gnu\nrelease: {release}\nLLVM version: {llvm}\n"
            );
            let read = Compiler::read("nightly", &printed);
            match (&read, expected) {
                (Ok(read), Ok(llvm_major)) => {
                    assert_eq!((&*read.commit, read.llvm_major), ("e50aa", llvm_major));
                }
                (Err(error), Err(wrong)) => {
                    let found = format!("`nightly` is rustc {release} with LLVM {llvm}");
                    let fix = format!("rustup toolchain install {CI_NIGHTLY}");
                    for part in [&found, wrong, "rustc 1.95 or later with LLVM 21 to 23", &fix] {
                        assert!(error.contains(part), "{part:?} isn't in: {error}");
                    }
                }
                _ => panic!("{release} with LLVM {llvm}: {read:?}"),
            }
        }
    }
}
