//! The route that keeps a VIP from reaching anything where no hook translates it.
//!
//! Without it, 127.128.0.1 is as much this host as 127.0.0.1 is, and a server on 0.0.0.0:80 accepts
//! a dial to it. An IPv6 VIP would leave by the default route. Hooked dials are rewritten before the
//! kernel looks for a route.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use rtnetlink::packet_route::route::{RouteMessage, RouteType};
use rtnetlink::{Handle, RouteMessageBuilder};

/// Why the route couldn't be changed.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// No netlink socket.
    #[error("can't open a netlink socket: {0}")]
    Socket(#[source] std::io::Error),
    /// The kernel refused.
    #[error(
        "can't {action} the route `unreachable {pool} table local`: {source}; run as root, or \
         with CAP_NET_ADMIN"
    )]
    Refused {
        /// `add` or `remove`.
        action: &'static str,
        /// The destination.
        pool: IpNet,
        /// What the kernel said.
        source: Box<rtnetlink::Error>,
    },
}

/// Makes `pool` unreachable in this network namespace. Returns whether the route had to be added.
///
/// # Errors
/// When the kernel refuses.
pub async fn add_unreachable(pool: IpNet) -> Result<bool, RouteError> {
    with_handle(async |handle| {
        tolerate(handle.route().add(message(pool)).execute().await, libc::EEXIST, "add", pool)
    })
    .await
}

/// Removes the route again. Returns whether it was there.
///
/// # Errors
/// When the kernel refuses.
pub async fn remove_unreachable(pool: IpNet) -> Result<bool, RouteError> {
    with_handle(async |handle| {
        tolerate(handle.route().del(message(pool)).execute().await, libc::ESRCH, "remove", pool)
    })
    .await
}

async fn with_handle(
    work: impl AsyncFnOnce(Handle) -> Result<bool, RouteError>,
) -> Result<bool, RouteError> {
    let (connection, handle, _) = rtnetlink::new_connection().map_err(RouteError::Socket)?;
    let connection = tokio::spawn(connection);
    let result = work(handle).await;
    connection.abort();
    result
}

fn message(pool: IpNet) -> RouteMessage {
    match pool {
        IpNet::V4(pool) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(pool.network(), pool.prefix_len())
            .table_id(libc::RT_TABLE_LOCAL.into())
            .kind(RouteType::Unreachable)
            .build(),
        IpNet::V6(pool) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(pool.network(), pool.prefix_len())
            .table_id(libc::RT_TABLE_LOCAL.into())
            .kind(RouteType::Unreachable)
            .build(),
    }
}

fn tolerate(
    result: Result<(), rtnetlink::Error>,
    errno: i32,
    action: &'static str,
    pool: IpNet,
) -> Result<bool, RouteError> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -errno => Ok(false),
        Err(source) => Err(RouteError::Refused { action, pool, source: Box::new(source) }),
        Ok(()) => Ok(true),
    }
}
