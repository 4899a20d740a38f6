//! The admin interface: HTTP on a unix socket, and what it says.

pub mod api;
mod bind;
pub mod client;
pub mod exposition;
pub mod http;
mod route;
mod server;

pub use bind::{BindError, Listener, bind};
pub use server::{View, serve};
