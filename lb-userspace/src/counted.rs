//! A number of things, as text.

use std::fmt::Display;

/// `1 backend`, `2 backends`: the noun is a regular one, in the singular.
pub fn counted<N: Display + PartialEq + From<u8>>(n: N, noun: &str) -> String {
    let ending = if n == N::from(1) { "" } else { "s" };
    format!("{n} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_singular() {
        let shown = [0_u64, 1, 2].map(|n| counted(n, "backend"));
        assert_eq!(shown, ["0 backends", "1 backend", "2 backends"]);
        assert_eq!(counted(1_usize, "more service"), "1 more service");
    }
}
