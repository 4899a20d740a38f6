//! The kernel side of nohop: cgroup socket-address programs, one file a hook.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so `AtomicU64` lacks the addition that it does have.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod connect4;
mod getpeername4;
mod maps;
mod settings;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}
