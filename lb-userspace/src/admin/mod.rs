//! The admin interface: HTTP on a unix socket, and what it says.

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
