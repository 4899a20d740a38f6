//! What the verifier goes through to accept the programs: docs/verifier.md has it for each kernel.

use crate::bed::Bed;

/// `cargo xtask vm` and `cargo xtask test` read these lines.
pub fn instructions_are_told() {
    let bed = Bed::new();
    let kernel = crate::running_kernel();
    let (major, minor) = kernel;
    println!();
    for (program, n_instructions) in bed.plane.verified_instructions().unwrap() {
        assert_eq!(n_instructions.is_some(), kernel >= (5, 16), "{program}");
        let told = n_instructions.map_or("-".to_owned(), |n| n.to_string());
        println!("verifier: {major}.{minor} {program} {told}");
    }
}
