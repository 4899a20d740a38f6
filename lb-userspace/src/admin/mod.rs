//! The admin interface: JSON and metrics over HTTP, on a unix socket and on TCP.

mod answer;
pub mod api;
mod bind;
mod body;
pub mod client;
mod connection;
mod documents;
pub mod http;
mod limits;
mod origin;
mod page;
pub mod prometheus;
mod query;
mod response;
mod route;
mod server;
mod slow;
mod stream;
#[cfg(test)]
mod tests;
mod trace;
mod view;

pub use bind::{BindError, Listener, WaitingListener, bind, exposed, try_bind, waiting};
pub use documents::At;
pub use origin::TcpAccess;
pub use server::serve;
pub use trace::{OUTCOMES, TraceFilter, TraceRefusal};
pub use view::View;
