//! A configuration file of an earlier version, with the names that keys have now.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::keys::RENAMED;

/// What became of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Migrated {
    /// The new text.
    pub text: String,
    /// What was changed, each with its line: `3: plane.max_services is datapath.max_services now`.
    pub changes: Vec<String>,
}

/// Gives the keys of a file their present names and leaves everything else, comments included, as it is.
/// What isn't TOML stays as it is: the parser of the configuration reports that.
pub fn migrate(text: &str) -> Migrated {
    let mut migrated = Migrated { text: text.to_owned(), changes: Vec::new() };
    // A table that is spread over several lines is one of the document: each time one line is found.
    for _ in 0..=text.lines().count() {
        let Some(Renaming { edits, old, new }) = next(&migrated.text) else { break };
        let first = edits.iter().map(|(at, _)| at.start).min().unwrap_or_default();
        let line = migrated.text.get(..first).unwrap_or_default().matches('\n').count() + 1;
        migrated.changes.push(format!("{line}: {old} is {new} now"));
        for (at, with) in edits {
            migrated.text.replace_range(at, &with);
        }
    }
    migrated
}

/// A name that is changed.
struct Renaming {
    /// Places in the text and what comes there, the last one first.
    edits: Vec<(Range<usize>, String)>,
    old: &'static str,
    new: &'static str,
}

fn next(text: &str) -> Option<Renaming> {
    let (document, errors) = DeTable::parse_recoverable(text);
    if !errors.is_empty() {
        return None;
    }
    let document = document.get_ref();
    RENAMED.iter().find_map(|(old, new)| match (old.split_once('.'), new.split_once('.')) {
        (None, None) => {
            let (key, _) = entry(document, old)?;
            Some(Renaming { edits: vec![(key, (*new).to_owned())], old, new })
        }
        // Keys whose section has another name are renamed with it.
        (Some((section, name)), Some((same, new_name))) if section == same => {
            let (_, table) = entry(document, section)?;
            let (key, value) = entry(table.get_ref().as_table()?, name)?;
            let mut edits = vec![(key, new_name.to_owned())];
            // The one key that became a list.
            if value.get_ref().is_str() {
                let written = text.get(value.span())?;
                edits.insert(0, (value.span(), format!("[{written}]")));
            }
            Some(Renaming { edits, old, new })
        }
        _ => None,
    })
}

/// The place of a key and its value.
fn entry<'a, 'i>(
    table: &'a DeTable<'i>,
    name: &str,
) -> Option<(Range<usize>, &'a Spanned<DeValue<'i>>)> {
    let (key, value) = table.iter().find(|(key, _)| key.get_ref() == name)?;
    Some((key.span(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_change_and_nothing_else_does() {
        let before = "\
# Our nodes.
shadow = true   # for now

[catalog]
source = \"file\" # static
file = '/etc/nohop/catalog.toml'
[plane]  # sizes
max_services = 5
exclude_cgroups = [\"plane.slice\"]
";
        let after = before
            .replace("source = \"file\"", "sources = [\"file\"]")
            .replace("[plane]", "[datapath]");
        let Migrated { text, changes } = migrate(before);
        assert_eq!(text, after);
        assert_eq!(
            changes,
            ["7: plane is datapath now", "5: catalog.source is catalog.sources now"]
        );
        assert_eq!(migrate(&text), Migrated { text, changes: Vec::new() });
    }

    #[test]
    fn each_way_to_write_a_key() {
        for (before, after) in [
            ("plane.max_services = 5", "datapath.max_services = 5"),
            (
                "plane.max_services = 5\nplane.max_backends = 6",
                "datapath.max_services = 5\ndatapath.max_backends = 6",
            ),
            ("plane = { max_services = 5 }", "datapath = { max_services = 5 }"),
            ("[ \"plane\" ]", "[ datapath ]"),
            ("catalog.source = 'consul'", "catalog.sources = ['consul']"),
            (
                "catalog = { source = \"\"\"consul\"\"\" }",
                "catalog = { sources = [\"\"\"consul\"\"\"] }",
            ),
            // Of the wrong type: the parser reports it by its new name.
            ("catalog.source = 5", "catalog.sources = 5"),
        ] {
            assert_eq!(migrate(before).text, after, "{before}");
        }
    }

    #[test]
    fn what_cant_be_read_stays() {
        for text in ["[plane", "", "\u{feff}", "plane = 1\nplane = 2", "é = 1"] {
            let Migrated { text: after, changes } = migrate(text);
            assert_eq!((after.as_str(), changes.len()), (text, 0));
        }
    }
}
