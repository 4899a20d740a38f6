//! The kernel side of nohop: cgroup socket-address programs, one file a hook.
//!
//! `xlate` is what the hooks that translate forward share, `revnat` and `flows` are what a socket
//! remembers for the hooks that translate back.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so `AtomicU64` lacks the addition that it does have.
#![feature(asm_experimental_arch, core_intrinsics)]
#![allow(internal_features)]

mod choice;
mod config;
mod connect4;
mod connect6;
mod conns;
mod context;
mod flows;
mod getpeername4;
mod getpeername6;
mod log;
mod maps;
mod random;
mod recvmsg4;
mod recvmsg6;
mod revnat;
mod sendmsg4;
mod sendmsg6;
mod tables;
mod trace;
mod xlate;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}
