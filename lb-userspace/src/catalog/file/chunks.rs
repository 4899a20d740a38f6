//! A static catalog read service by service, so that an edit costs what it edits.
//!
//! TOML is a sequence of lines that each say something whole, and `[[service]]` at the beginning of
//! one starts the next service. Where every part of a text between two of these can be read by
//! itself, the parts together say what the whole text says. Where one can't (such a line may be
//! within a string of several lines), or has a mistake, the whole text is read at once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::parse::{Mistake, parse};
use crate::table::Instance;

const START: &str = "[[service]]";

/// The services of a static catalog, by name, in lower case.
pub type Services = BTreeMap<Arc<str>, Arc<[Instance]>>;

/// The services of the last text, by the part of it that says each.
#[derive(Debug, Default)]
pub struct Chunks(HashMap<Box<str>, (Arc<str>, Arc<[Instance]>)>);

impl Chunks {
    /// Reads a text. A service whose part of it is the same as in the last text is the same object.
    ///
    /// # Errors
    /// All mistakes, by line.
    pub fn read(&mut self, text: &str) -> Result<Services, Vec<Mistake>> {
        if let Some(services) = self.read_parts(text) {
            return Ok(services);
        }
        self.0.clear();
        let services = parse(text)?;
        Ok(services.into_iter().map(|(name, instances)| (name, instances.into())).collect())
    }

    /// Reads a text part by part; `None` where only the whole text tells what it says.
    fn read_parts(&mut self, text: &str) -> Option<Services> {
        let mut last = std::mem::take(&mut self.0);
        let (mut services, mut n_parts) = (Services::new(), 0);
        for part in parts(text)? {
            let (part, (name, instances)) = match last.remove_entry(part) {
                Some(known) => known,
                None => {
                    let (name, instances) = parse(part).ok()?.pop_first()?;
                    (part.into(), (name, instances.into()))
                }
            };
            services.insert(name.clone(), instances.clone());
            self.0.insert(part, (name, instances));
            n_parts += 1;
        }
        // Two of one name are a mistake, and so is a text without any service.
        (n_parts > 0 && services.len() == n_parts).then_some(services)
    }
}

/// The parts that begin with `[[service]]`; `None` where there is more before them than comments.
fn parts(text: &str) -> Option<impl Iterator<Item = &str>> {
    let mut starts = text
        .match_indices(START)
        .map(|(at, _)| at)
        .filter(|&at| at == 0 || text.as_bytes()[at - 1] == b'\n')
        .peekable();
    let head = &text[..*starts.peek()?];
    let is_comment = |line: &str| line.is_empty() || line.starts_with('#');
    head.lines().map(str::trim).all(is_comment).then(|| {
        std::iter::from_fn(move || {
            let start = starts.next()?;
            Some(&text[start..starts.peek().copied().unwrap_or(text.len())])
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "[[service]]\nname = \"a\"\n[[service.backend]]\naddress = \"10.0.0.1:80\"\n";
    const B: &str = "[[service]]\nname = \"b\" # [[service]]\n  [[service.backend]]\n  address = \"10.0.0.2:80\"";

    fn whole(text: &str) -> Result<Services, Vec<Mistake>> {
        let services = parse(text)?;
        Ok(services.into_iter().map(|(name, instances)| (name, instances.into())).collect())
    }

    #[test]
    fn parts_say_what_the_whole_text_says() {
        let a_twice = format!("{A}{A}");
        let both = format!("# ours\n\n{A}{B}");
        // The texts, and whether they can be read part by part.
        let table = [
            (A, true),
            (&*both, true),
            ("[[service]]\r\nname = \"a\"\r\n[[service]]\r\nname = \"b\"\r\n", true),
            (&a_twice, false),
            ("", false),
            ("service = []", false),
            ("[[service]]\nname = \"a\"\nports = \"\"\"\n[[service]]\nname = \"b\"\"\"\"", false),
            ("[[service]]\nname = 7\n[[service]]\nname = \"b\"", false),
            ("[[service]]\nname = \"a\"\n[top]\n[[service]]\nname = \"b\"", false),
            (" [[service]]\nname = \"a\"\n[[service]]\nname = \"b\"", false),
            ("[[ service ]]\nname = \"a\"", false),
            ("x = 1\n[[service]]\nname = \"a\"", false),
            ("[[service]]\nname = \"a\"\nbackend = [\n[[service]]\n]", false),
        ];
        for (text, in_parts) in table {
            let mut chunks = Chunks::default();
            assert_eq!(chunks.read_parts(text).is_some(), in_parts, "{text}");
            assert_eq!(Chunks::default().read(text), whole(text), "{text}");
        }
    }

    #[test]
    fn what_stays_the_same_is_the_same_object() {
        let mut chunks = Chunks::default();
        let first = chunks.read(&format!("{A}{B}")).unwrap();
        let edited = A.replace(":80", ":81");
        let second = chunks.read(&format!("{edited}{B}")).unwrap();
        assert!(Arc::ptr_eq(&first["b"], &second["b"]) && first["a"] != second["a"]);
        assert_eq!(chunks.0.len(), 2, "what is there no more is forgotten");
        assert!(chunks.read("[[service]]").is_err());
    }
}
