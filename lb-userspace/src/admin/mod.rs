//! The admin interface: JSON and metrics over HTTP, on a unix socket and on TCP.

pub mod api;
mod bind;
mod body;
pub mod client;
mod documents;
pub mod http;
mod origin;
mod page;
pub mod prometheus;
mod query;
mod route;
mod server;
mod slow;
mod stream;
mod trace;
mod view;

pub use bind::{BindError, Listener, bind, exposed};
pub use documents::At;
pub use origin::TcpAccess;
pub use server::serve;
pub use trace::{OUTCOMES, TraceFilter, TraceRefusal};
pub use view::View;
