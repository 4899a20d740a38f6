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
    /// What a person has to change.
    pub conflict: Option<NameConflict>,
}

/// A name that can't be changed, since the new one is there, too.
#[derive(Debug, PartialEq, Eq)]
pub struct NameConflict {
    /// The line of the former name, from 1.
    pub line: usize,
    /// The problem, with the fix.
    pub what: String,
}

/// Gives the keys of a file their present names and leaves everything else, comments included, as it is.
/// What isn't TOML stays as it is: the parser of the configuration reports that.
pub fn migrate(text: &str) -> Migrated {
    let mut migrated = Migrated { text: text.to_owned(), changes: Vec::new(), conflict: None };
    // A table that is spread over several lines is one of the document: each time one line is found.
    for _ in 0..=text.lines().count() {
        let Some(Renaming { edits, old, new }) = next(&migrated.text) else { break };
        let first = edits.iter().map(|(at, _)| at.start).min().unwrap_or_default();
        let line = migrated.text.get(..first).unwrap_or_default().matches('\n').count() + 1;
        let mut changed = migrated.text.clone();
        for (at, with) in edits {
            changed.replace_range(at, &with);
        }
        let (_, errors) = DeTable::parse_recoverable(&changed);
        if !errors.is_empty() {
            let what = format!("{old} and {new} are both there; merge them by hand");
            migrated.conflict = Some(NameConflict { line, what });
            break;
        }
        migrated.text = changed;
        migrated.changes.push(format!("{line}: {old} is {new} now"));
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
        let Migrated { text, changes, conflict } = migrate(before);
        assert_eq!(text, after);
        assert_eq!(
            changes,
            ["7: plane is datapath now", "5: catalog.source is catalog.sources now"]
        );
        assert_eq!(conflict, None);
        assert_eq!(migrate(&text), Migrated { text, changes: Vec::new(), conflict });
    }

    #[test]
    fn each_way_to_write_a_key() {
        for (before, after) in [
            ("plane.max_services = 5", "datapath.max_services = 5"),
            (
                "plane.max_services = 5\nplane.max_backends = 6",
                "datapath.max_services = 5\ndatapath.max_backends = 6",
            ),
            (
                "plane.max_services = 5\ndatapath.max_backends = 6",
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
    fn two_names_of_one_thing_are_for_a_person() {
        for (text, line, names) in [
            ("shadow = true\n[plane]\n[datapath]", 2, "plane and datapath"),
            (
                "[catalog]\nsources = ['file']\nsource = 'consul'",
                3,
                "catalog.source and catalog.sources",
            ),
            ("plane.max_services = 5\ndatapath.max_services = 6", 1, "plane and datapath"),
        ] {
            let what = format!("{names} are both there; merge them by hand");
            let conflict = Some(NameConflict { line, what });
            assert_eq!(migrate(text), Migrated { text: text.into(), changes: vec![], conflict });
        }
    }

    #[test]
    fn what_cant_be_read_stays() {
        for text in ["[plane", "", "\u{feff}", "plane = 1\nplane = 2", "é = 1"] {
            let Migrated { text: after, changes, conflict } = migrate(text);
            assert_eq!((after.as_str(), changes.len(), conflict), (text, 0, None));
        }
    }
}
