//! What went wrong, by name.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;

use rustix::io::Errno;
use serde_json::Value;

/// The name of a failure.
pub type Name = Cow<'static, str>;

/// No answer in time.
pub const TIMEOUT: Name = Cow::Borrowed("timeout");

/// The other side ended the connection in an orderly way before it had answered.
pub const CLOSED: Name = Cow::Borrowed("closed");

/// What came isn't an answer.
pub const MALFORMED: Name = Cow::Borrowed("malformed");

/// How often each failure came.
#[derive(Debug, Default)]
pub struct Failures(BTreeMap<Name, u64>);

impl Failures {
    /// None yet, and the usual ones are named even where they never come.
    pub fn of_streams() -> Failures {
        let names = ["closed", "refused", "reset", "timeout", "unreachable"];
        Failures(names.into_iter().map(|name| (name.into(), 0)).collect())
    }

    /// Counts one.
    pub fn add(&mut self, name: Name) {
        *self.0.entry(name).or_default() += 1;
    }

    /// How many of all names.
    pub fn total(&self) -> u64 {
        self.0.values().sum()
    }

    /// Numbers by name.
    pub fn to_json(&self) -> Value {
        self.0.iter().map(|(name, n)| (name.to_string(), Value::from(*n))).collect()
    }
}

/// The name of an answer with another status than 200.
pub fn of_status(status: u16) -> Name {
    format!("status_{status:03}").into()
}

/// The name of a kernel error.
pub fn of_errno(errno: Errno) -> Name {
    let name = match errno {
        Errno::CONNREFUSED => "refused",
        // To write to a connection that was reset is EPIPE.
        Errno::CONNRESET | Errno::PIPE => "reset",
        Errno::TIMEDOUT => "timeout",
        Errno::HOSTUNREACH | Errno::NETUNREACH => "unreachable",
        Errno::ACCESS => "other_EACCES",
        Errno::ADDRINUSE => "other_EADDRINUSE",
        Errno::ADDRNOTAVAIL => "other_EADDRNOTAVAIL",
        Errno::AGAIN => "other_EAGAIN",
        Errno::CONNABORTED => "other_ECONNABORTED",
        Errno::DESTADDRREQ => "other_EDESTADDRREQ",
        Errno::INVAL => "other_EINVAL",
        Errno::MFILE => "other_EMFILE",
        Errno::NFILE => "other_ENFILE",
        Errno::NOBUFS => "other_ENOBUFS",
        Errno::NOMEM => "other_ENOMEM",
        Errno::NOTCONN => "other_ENOTCONN",
        Errno::PERM => "other_EPERM",
        _ => return format!("other_{}", errno.raw_os_error()).into(),
    };
    name.into()
}

/// The name of an error of the standard library.
pub fn of_error(error: &io::Error) -> Name {
    // A blocking socket reports with these that its timeout passed.
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => TIMEOUT,
        _ => Errno::from_io_error(error).map_or(MALFORMED, of_errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_bears_the_name_that_users_read() {
        let table = [
            (Errno::CONNREFUSED, "refused"),
            (Errno::PIPE, "reset"),
            (Errno::CONNRESET, "reset"),
            (Errno::NETUNREACH, "unreachable"),
            (Errno::HOSTUNREACH, "unreachable"),
            (Errno::TIMEDOUT, "timeout"),
            (Errno::PERM, "other_EPERM"),
            (Errno::PROTO, "other_71"),
        ];
        for (errno, expected) in table {
            assert_eq!(of_errno(errno), expected);
        }
        assert_eq!(of_status(503), "status_503");
        assert_eq!(of_error(&io::ErrorKind::WouldBlock.into()), "timeout");
    }
}
