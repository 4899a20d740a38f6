//! Why sockets couldn't be examined or disconnected.

use std::io;
use std::time::Duration;

/// How long one call may enter namespaces and start rounds.
pub(super) const MAX_DURATION: Duration = Duration::from_secs(10);

/// Why sockets couldn't be examined or disconnected.
#[derive(Debug, thiserror::Error)]
pub enum DiagError {
    /// The processes can't be listed.
    #[error("can't list the processes in /proc: {0}")]
    Processes(#[source] io::Error),
    /// No thread to enter namespaces with.
    #[error("can't start a thread: {0}")]
    Thread(#[source] io::Error),
    /// A namespace can't be entered.
    #[error(
        "can't enter the network namespace net:[{namespace}]: {source}; it needs CAP_SYS_ADMIN"
    )]
    Enter {
        /// The namespace's inode.
        namespace: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// The sockets can't be listed.
    #[error(
        "can't list the UDP sockets of net:[{namespace}]: {source}; it needs the kernel module \
         udp_diag"
    )]
    List {
        /// The namespace's inode.
        namespace: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// There are threads whose network namespace can't be looked at.
    #[error("can't look at the network namespaces of all processes; it needs CAP_SYS_PTRACE")]
    Hidden,
    /// The TCP connections can't be listed.
    #[error(
        "can't list the TCP connections of net:[{namespace}]: {source}; it needs CAP_BPF, \
         CAP_NET_ADMIN and the kernel module tcp_diag"
    )]
    ListTcp {
        /// The namespace's inode.
        namespace: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A TCP connection can't be aborted.
    #[error(
        "can't close TCP connections: {source}; it needs CAP_NET_ADMIN and a kernel with \
         CONFIG_INET_DIAG_DESTROY"
    )]
    Abort {
        /// The namespace's inode.
        namespace: u64,
        /// The socket's cookie.
        cookie: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// `is_gone` failed.
    #[error("can't read the storage of the UDP socket {cookie:#x}: {source}")]
    Examine {
        /// The socket's cookie.
        cookie: u64,
        /// The error of `is_gone`.
        source: io::Error,
    },
    /// A socket can't be disconnected.
    #[error(
        "can't disconnect the UDP socket {cookie:#x} of net:[{namespace}]: {source}; it needs \
         CAP_NET_ADMIN and a kernel with CONFIG_INET_DIAG_DESTROY"
    )]
    Destroy {
        /// The namespace's inode.
        namespace: u64,
        /// The socket's cookie.
        cookie: u64,
        /// The kernel's error.
        source: io::Error,
    },
    /// Suspects are still connected: no process that has them could be found, or others with equal
    /// addresses and ports hide them.
    #[error(
        "{n_sockets} UDP sockets, such as {cookie:#x} of net:[{namespace}] to {destination}, \
         couldn't be reached{}; it needs CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH and \
         kernel.yama.ptrace_scope below 3",
        .refused.as_ref().map_or(String::new(), |refused| format!(": {refused}"))
    )]
    Unreached {
        /// How many there are.
        n_sockets: usize,
        /// The namespace of one of them.
        namespace: u64,
        /// The cookie of that one.
        cookie: u64,
        /// Its destination.
        destination: std::net::SocketAddr,
        /// The kernel's error for the last descriptor to be borrowed, if it refused.
        refused: Option<io::Error>,
    },
    /// The time was up.
    #[error("disconnecting UDP sockets stopped after {} s", MAX_DURATION.as_secs())]
    TimedOut,
}
