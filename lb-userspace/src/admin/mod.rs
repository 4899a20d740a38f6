//! The admin interface: JSON and metrics over HTTP, on a unix socket and on TCP.

pub mod api;
mod bind;
mod body;
pub mod client;
mod documents;
pub mod http;
mod origin;
pub mod prometheus;
mod query;
mod route;
mod server;
mod slow;
mod trace;

pub use bind::{BindError, Listener, bind, exposed};
pub use documents::At;
pub use server::{View, serve};
pub use trace::{OUTCOMES, TraceFilter, TraceRefusal};
