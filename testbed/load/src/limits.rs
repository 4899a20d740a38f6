//! What arguments may be.

use std::ops::RangeInclusive;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Requests a second.
pub fn rate(text: &str) -> Result<f64, String> {
    number(text, 0.001..=10_000_000.0, "requests a second")
}

/// How long it runs.
pub fn seconds(text: &str) -> Result<f64, String> {
    number(text, 0.001..=3600.0, "seconds")
}

/// The target of an HTTP request.
pub fn path(text: &str) -> Result<String, String> {
    let is_plain = text.bytes().all(|byte| byte.is_ascii_graphic());
    if text.starts_with('/') && is_plain && text.len() <= 4096 {
        Ok(text.to_owned())
    } else {
        Err("give a path that begins with '/', without blanks, of at most 4096 bytes".to_owned())
    }
}

fn number(text: &str, range: RangeInclusive<f64>, unit: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("give {unit}, from {} to {}", range.start(), range.end()))
}

/// Allows as many open files as the machine lets this process have.
pub fn raise_files() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    // If it isn't allowed, sockets fail with EMFILE, which the report has.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_out_of_range_say_what_to_give() {
        assert_eq!(rate("80000"), Ok(80_000.0));
        assert_eq!(seconds("0.5"), Ok(0.5));
        for text in ["0", "-1", "NaN", "inf", "x", ""] {
            assert_eq!(
                seconds(text),
                Err("give seconds, from 0.001 to 3600".to_owned()),
                "{text:?}"
            );
        }
        assert_eq!(path("/a?b"), Ok("/a?b".to_owned()));
        for text in ["", "a", "/a b", "/a\r\nX: y"] {
            assert!(path(text).is_err(), "{text:?}");
        }
    }
}
