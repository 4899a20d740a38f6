//! The connections to the agent: reqwest's, of which there are never more than the configuration
//! allows.
//!
//! The pool of a [`reqwest::Client`] can't be bounded: while it waits for a connection to become
//! idle it opens another, and keeps both. So each connection is a client of its own, whose connector
//! connects once, and a semaphore bounds how many there are.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{ClientBuilder, redirect, retry};
use rustls::pki_types::ServerName;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::filter::FilterLayer;

use super::error::QueryError;
use super::tls::Tls;
use crate::config::ConsulAddress;

/// Idle connections, and how many more there may be.
pub struct Pool {
    address: ConsulAddress,
    tls: Tls,
    connect_limit: Duration,
    idle: Mutex<Vec<reqwest::Client>>,
    permits: Arc<Semaphore>,
}

/// A connection that carries one request at a time. Dropping it closes it.
pub struct Connection {
    /// What sends requests over it.
    pub http: reqwest::Client,
    /// Whether it has carried another request, so that the agent may have closed it since.
    pub is_reused: bool,
    permit: Permit,
}

impl Pool {
    /// A pool of at most `max_connections` to `address`; TCP and TLS together have `connect_limit`
    /// for each.
    pub fn new(
        address: ConsulAddress,
        tls: Tls,
        connect_limit: Duration,
        max_connections: usize,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(max_connections));
        Pool { address, tls, connect_limit, idle: Mutex::default(), permits }
    }

    /// An idle connection, or else a new one, which connects with its first request. Waits while as
    /// many as there may be are in use.
    ///
    /// # Errors
    /// A TLS file that can't be used.
    pub async fn get(&self) -> Result<Connection, QueryError> {
        let permit = self.permits.clone().acquire_owned().await;
        let permit = Permit(Some(permit.expect("the semaphore is never closed")));
        // A new one only where none is idle: those in use and those idle are never too many together.
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        Ok(match idle {
            Some(http) => Connection { http, is_reused: true, permit },
            None => Connection { http: self.open()?, is_reused: false, permit },
        })
    }

    /// Keeps a connection whose response was read to its end.
    pub async fn put(&self, connection: Connection) {
        let Connection { http, mut permit, .. } = connection;
        // The end of a body wakes the task that puts the connection into reqwest's pool together
        // with this one.
        tokio::task::yield_now().await;
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(http);
        permit.0.take();
    }

    /// Where requests go, without a path: `http://HOST:PORT`. TLS asks for that host (SNI), so it is
    /// the name that the agent's certificate must have.
    pub fn origin(&self) -> String {
        match &self.address {
            ConsulAddress::Http(authority) => format!("http://{authority}"),
            ConsulAddress::Https(authority) => {
                match (self.tls.server_name(authority), authority.rsplit_once(':')) {
                    (Ok(ServerName::DnsName(name)), Some((_, port))) => {
                        format!("https://{}:{port}", name.as_ref())
                    }
                    _ => format!("https://{authority}"),
                }
            }
            ConsulAddress::Unix(_) => "http://localhost".into(),
        }
    }

    /// Reads the TLS files again for the next connection, since a handshake failed.
    pub fn invalidate_tls(&self) {
        self.tls.invalidate();
    }

    fn open(&self) -> Result<reqwest::Client, QueryError> {
        let tls = match &self.address {
            ConsulAddress::Https(authority) => {
                self.tls.server_name(authority).and_then(|_| self.tls.client())
            }
            // reqwest requires some, used or not.
            ConsulAddress::Http(_) | ConsulAddress::Unix(_) => Tls::unused(),
        };
        let tls = tls.map_err(|what| QueryError::TlsFile { what })?;
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured((*tls).clone())
            .user_agent(concat!("nohop/", env!("CARGO_PKG_VERSION")))
            .http1_only()
            .no_proxy()
            .redirect(redirect::Policy::none())
            .retry(retry::never())
            .connect_timeout(self.connect_limit)
            .pool_idle_timeout(None)
            .pool_max_idle_per_host(1)
            .connector_layer(FilterLayer::new(once()));
        let builder = match &self.address {
            ConsulAddress::Http(authority) | ConsulAddress::Https(authority) => {
                keep_alive(builder).dns_resolver(Arc::new(Authority(authority.clone())))
            }
            ConsulAddress::Unix(path) => builder.unix_socket(path.clone()),
        };
        builder
            .build()
            .map_err(|source| QueryError::BadRequest { address: self.address.to_string(), source })
    }
}

/// Has the kernel find out that the other host is gone, within 20 s: no response would show it.
fn keep_alive(builder: ClientBuilder) -> ClientBuilder {
    builder
        .tcp_keepalive(Duration::from_secs(10))
        .tcp_keepalive_interval(Duration::from_secs(3))
        .tcp_keepalive_retries(3)
        .tcp_user_timeout(Duration::from_secs(20))
}

/// Lets a connector connect once. A client whose connection ended isn't used again.
fn once<T: 'static>() -> impl Fn(T) -> Result<T, io::Error> + Clone + Send + Sync + 'static {
    let is_used = Arc::new(AtomicBool::new(false));
    move |destination| match is_used.swap(true, Ordering::Relaxed) {
        false => Ok(destination),
        true => Err(io::ErrorKind::NotConnected.into()),
    }
}

/// Resolves every name to the addresses of `HOST:PORT`: with `consul.tls_server_name` the URL has
/// another host than the one to connect to.
struct Authority(String);

impl Resolve for Authority {
    fn resolve(&self, _: Name) -> Resolving {
        let authority = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host(authority).await?;
            let addresses: Vec<_> = found.collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

/// One of the connections that there may be.
struct Permit(Option<OwnedSemaphorePermit>);

impl Drop for Permit {
    /// Gives it back once the connection is closed: that is done by a task that the drop of the
    /// client has woken, so it runs before one that is spawned now.
    fn drop(&mut self) {
        let Some(permit) = self.0.take() else { return };
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                tokio::task::yield_now().await;
                drop(permit);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::config::TlsConfig;

    #[tokio::test]
    async fn there_are_no_more_connections_than_allowed() {
        let address = ConsulAddress::Http("127.0.0.1:1".into());
        let pool = Pool::new(address, Tls::new(TlsConfig::default()), Duration::from_secs(1), 2);
        let (first, second) = (pool.get().await.unwrap(), pool.get().await.unwrap());
        assert!(!first.is_reused && !second.is_reused);
        assert!(pool.get().now_or_never().is_none());
        pool.put(first).await;
        let third = pool.get().await.unwrap();
        assert!(third.is_reused);
        drop(second);
        assert!(pool.get().now_or_never().is_none(), "it isn't closed yet");
        assert!(!pool.get().await.unwrap().is_reused);
    }

    #[test]
    fn a_connector_connects_once() {
        let connect = once();
        assert!(connect(()).is_ok() && connect.clone()(()).is_err());
    }
}
