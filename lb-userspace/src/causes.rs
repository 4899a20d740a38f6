//! An error with its causes, as text.

use std::error::Error;

/// The error and its causes in one line; a cause that is named already isn't named again, since some
/// messages have their causes in them.
pub fn text(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = text + ": " + &cause;
        }
    }
    text
}

/// The error and the cause at its root: those between may have a verifier's whole log.
pub fn with_root(error: &(dyn Error + 'static)) -> String {
    let text = error.to_string();
    match causes(error).last().map(ToString::to_string) {
        Some(root) if !text.contains(&root) => format!("{text}: {root}"),
        _ => text,
    }
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(error.source(), |&error: &&'a (dyn Error + 'static)| error.source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_cause_is_named_once() {
        let error = anyhow::anyhow!("no more files (os error 24)")
            .context("can't make it: no more files (os error 24)")
            .context("the unit doesn't run");
        let expected = "the unit doesn't run: can't make it: no more files (os error 24)";
        assert_eq!(text(error.as_ref()), expected);
        assert_eq!(with_root(error.as_ref()), "the unit doesn't run: no more files (os error 24)");
        let alone = std::fmt::Error;
        assert_eq!((text(&alone), with_root(&alone)), (alone.to_string(), alone.to_string()));
    }
}
