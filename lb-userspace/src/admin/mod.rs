//! The admin interface: JSON and metrics over HTTP, on a unix socket and on TCP.

pub mod api;
mod bind;
pub mod client;
mod documents;
pub mod http;
mod origin;
pub mod prometheus;
mod route;
mod server;
mod slow;

pub use bind::{BindError, Listener, bind, exposed};
pub use documents::At;
pub use server::{View, serve};
