//! The admin interface: HTTP on a unix socket, and what it says.

pub mod api;
