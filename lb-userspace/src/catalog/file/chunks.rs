//! A static catalog read service by service, so that an edit costs what it edits.
//!
//! A line `[[service]]` starts the next service. Where every part of a text between two of these can be
//! read by itself, and has one service, the parts together mean the same as the whole text. Where one
//! can't (such a line may be within a string of several lines), has an error, or has further services (a
//! header may be indented, or have spaces in it), the whole text is read at once.
//!
//! That isn't for speed alone: the tree of a whole text of 6 MB takes more memory than all else.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use super::parse::{Diagnostic, parse, without_mark};
use crate::table::Catalog;
use crate::table::{Instance, ServiceId, ServiceRecord, Watch};

const START: &str = "[[service]]";

/// The last text, as far as it could be read part by part, and its catalog.
#[derive(Debug, Default)]
pub struct Chunks {
    /// The service of each part, by the part's hash, and the text that had it last.
    known: HashMap<u64, (ServiceId, u64)>,
    hasher: RandomState,
    catalog: Catalog,
    n_texts: u64,
}

impl Chunks {
    /// Reads a text. What is the same as in `last` is shared with it.
    ///
    /// # Errors
    /// All errors, by line.
    pub fn read(&mut self, text: &str, last: &Catalog) -> Result<Catalog, Vec<Diagnostic>> {
        let text = without_mark(text);
        if let Some(catalog) = self.read_parts(text, last) {
            self.catalog = catalog.sharing(last);
            return Ok(self.catalog.clone());
        }
        *self = Chunks::default();
        let services = parse(text)?;
        let entries = services.into_iter().map(|(name, instances)| entry(name, instances, last));
        Ok(entries.collect::<Catalog>().sharing(last))
    }

    /// Reads a text part by part: of the parts that the last text had as well nothing but the hash is
    /// compared, and only the others cost more. `None` where only the whole text can be read.
    fn read_parts(&mut self, text: &str, last: &Catalog) -> Option<Catalog> {
        self.n_texts += 1;
        let (mut new, mut n_parts) = (Vec::new(), 0);
        for part in parts(text)? {
            n_parts += 1;
            let hash = self.hasher.hash_one(part);
            match self.known.get_mut(&hash) {
                // There twice is an error.
                Some((_, read_in)) if *read_in == self.n_texts => return None,
                Some((_, read_in)) => *read_in = self.n_texts,
                None => {
                    let mut services = parse(part).ok()?;
                    let (name, instances) = services.pop_first()?;
                    if !services.is_empty() {
                        return None;
                    }
                    let (id, record) = entry(name, instances, last);
                    self.known.insert(hash, (id.clone(), self.n_texts));
                    new.push((id, record));
                }
            }
        }
        let mut catalog = self.catalog.clone();
        self.known.retain(|_, (id, read_in)| {
            let is_there = *read_in == self.n_texts;
            if !is_there {
                catalog.remove(id);
            }
            is_there
        });
        catalog.extend(new);
        // Two parts of one name are an error.
        (catalog.len() == n_parts).then_some(catalog)
    }
}

/// The entry of a catalog, that of the last one where it is equal.
fn entry(name: Arc<str>, instances: Vec<Instance>, last: &Catalog) -> (ServiceId, ServiceRecord) {
    let id = ServiceId::new(name);
    match last.get_key_value(&id) {
        Some((id, known)) if known.instances().eq(&instances) => (id.clone(), known.clone()),
        _ => (id, ServiceRecord::new(instances.into(), Watch::Live)),
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
    use proptest::prelude::*;

    use super::*;

    const A: &str = "[[service]]\nname = \"a\"\n[[service.backend]]\naddress = \"10.0.0.1:80\"\n";
    const B: &str = "[[service]]\nname = \"b\" # [[service]]\n  [[service.backend]]\n  address = \"10.0.0.2:80\"";

    fn whole(text: &str) -> Result<Catalog, Vec<Diagnostic>> {
        let none = Catalog::new();
        let services = parse(text)?.into_iter();
        Ok(services.map(|(name, instances)| entry(name, instances, &none)).collect())
    }

    #[test]
    fn parts_mean_what_the_whole_text_means() {
        let a_twice = format!("{A}{A}");
        let both = format!("# ours\n\n{A}{B}");
        let indented = format!("{A}  {B}");
        let spaced = format!("{A}{}", B.replacen("[[service]]", "[[ service ]]", 1));
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
            (&indented, false),
            (&spaced, false),
            ("x = 1\n[[service]]\nname = \"a\"", false),
            ("[[service]]\nname = \"a\"\nbackend = [\n[[service]]\n]", false),
        ];
        for (text, in_parts) in table {
            let mut chunks = Chunks::default();
            let none = Catalog::new();
            assert_eq!(chunks.read_parts(text, &none).is_some(), in_parts, "{text}");
            assert_eq!(Chunks::default().read(text, &none), whole(text), "{text}");
        }
    }

    /// One service, in one of the spellings that TOML has for it.
    fn service() -> impl Strategy<Value = String> {
        let head = prop::sample::select(vec![
            "[[service]]",
            "  [[service]]",
            "\t[[service]]",
            "[[ service ]]",
            "[[service]] # [[service]]",
            "[[\"service\"]]",
            "# [[service]]\n[['service']]",
        ]);
        let body = prop::sample::select(vec![
            "backend = [{ address = \"10.0.0.1:80\" }]",
            "[[service.backend]]\naddress = \"10.0.0.1:80\"",
            "  [[service.backend]]\n  address = '10.0.0.1:80'",
            "backend = [\n# [[service]]\n{ address = \"10.0.0.1:80\" },\n]",
            "ports = \"any\"",
            "",
            "\"\"\"\n[[service]]\nname = \"\"\"",
            "weight = 1",
        ]);
        (head, 0..20_u8, body)
            .prop_map(|(head, nth, body)| format!("{head}\nname = \"s{nth}\"\n{body}\n"))
    }

    proptest! {
        #[test]
        fn no_spelling_loses_a_service(
            services in prop::collection::vec(service(), 0..6),
            is_crlf: bool,
            has_mark: bool,
        ) {
            let mut text = services.concat();
            if is_crlf {
                text = text.replace('\n', "\r\n");
            }
            if has_mark {
                text.insert(0, '\u{feff}');
            }
            let none = Catalog::new();
            prop_assert_eq!(Chunks::default().read(&text, &none), whole(&text), "{}", text);
        }

        /// Whatever was read before, a text has the same services.
        #[test]
        fn edits_add_up_to_the_whole(
            texts in prop::collection::vec(prop::collection::vec((0..4_u8, 1..4_u8), 0..6), 1..8),
        ) {
            let (mut chunks, mut last) = (Chunks::default(), Catalog::new());
            for services in texts {
                let text: String = services
                    .iter()
                    .map(|(name, port)| A.replace("\"a\"", &format!("\"s{name}\"")).replace("80", &port.to_string()))
                    .collect();
                let catalog = chunks.read(&text, &last);
                prop_assert_eq!(&catalog, &whole(&text), "{}", text);
                last = catalog.unwrap_or(last);
            }
        }
    }

    #[test]
    fn what_stays_the_same_is_the_same_object() {
        let is_same = |one: &Catalog, other: &Catalog, name: &str| {
            Arc::ptr_eq(&one[name].groups, &other[name].groups)
        };
        let (mut chunks, text) = (Chunks::default(), format!("{A}{B}"));
        let first = chunks.read(&text, &Catalog::new()).unwrap();
        let edited = text.replacen(":80", ":81", 1);
        let second = chunks.read(&edited, &first).unwrap();
        assert!(is_same(&first, &second, "b") && first["a"] != second["a"]);
        assert_eq!(chunks.known.len(), 2, "what is there no more is forgotten");
        // Also where it was never read, or is written in another way.
        let third = Chunks::default().read(&format!("# new\n{edited}\n"), &second).unwrap();
        assert!(is_same(&second, &third, "a") && is_same(&second, &third, "b"));
        assert!(chunks.read("[[service]]", &third).is_err());
    }
}
