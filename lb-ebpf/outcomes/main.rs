//! The unit `outcomes`: a sockops program that follows TCP connections to VIPs from their SYN to
//! their end. An object of its own, so that a kernel that refuses it refuses it alone.
#![no_std]
#![no_main]
// The target has no compare-and-exchange, so the atomic types lack the addition that it does have.
#![feature(core_intrinsics)]
#![allow(internal_features)]

mod clients;
mod maps;
mod socket;
mod sockops;
mod trace;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // Never reached: nothing here panics, and the verifier rejects a program that could loop.
    loop {}
}
