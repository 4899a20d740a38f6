//! The binary `nohop`.
#![forbid(unsafe_code)]

fn main() -> std::process::ExitCode {
    lb_userspace::cli::main()
}
