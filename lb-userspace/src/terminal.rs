//! External text (Consul's records, DNS, files) for a terminal, where some characters are commands.
//!
//! Node names, ids and notes of checks are free text in Consul, and any service may choose its own:
//! a line break in one would forge a line of `nohop explain`, an escape sequence does worse.

use std::fmt::Write;

use anyhow::Context;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Whether a character shows as itself and leaves what stands around it as it is. The others are
/// controls (C0, DEL and C1, line breaks included), line and paragraph separators, marks of
/// direction, which reorder what follows (UAX 9; CVE-2021-42574), and what has no width.
fn is_plain(character: char) -> bool {
    !(character.is_control()
        || matches!(character,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}'))
}

fn escape_but(text: &str, is_kept: impl Fn(char) -> bool) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) || is_kept(character) {
            escaped.push(character);
        } else {
            // `\n`, `\u{1b}`, as Rust's literals have it.
            escaped.extend(character.escape_default());
        }
    }
    escaped
}

/// One line: what isn't plain is escaped, line breaks, too.
pub fn escape(text: &str) -> String {
    escape_but(text, |_| false)
}

/// Lines whose breaks are our own.
pub fn escape_lines(text: &str) -> String {
    escape_but(text, |character| character == '\n')
}

/// One line with our own terminal sequences; its external text was escaped before.
pub fn escape_but_sequences(text: &str) -> String {
    escape_but(text, |character| character == '\u{1b}')
}

/// A JSON text that means the same and does nothing to a terminal: outside of strings JSON has plain
/// characters and line breaks alone, and inside them serde_json escapes C0 by itself.
pub fn escape_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        if is_plain(character) || character == '\n' {
            escaped.push(character);
            continue;
        }
        for unit in character.encode_utf16(&mut [0; 2]) {
            // Writing to a string can't fail.
            let _ = write!(escaped, "\\u{unit:04x}");
        }
    }
    escaped
}

/// A document as text for people: every string in it is escaped before `text` gets it, for every
/// command.
///
/// # Errors
/// When the document isn't what it is read from, which would be a defect.
pub fn show<T: Serialize + DeserializeOwned>(
    document: &T,
    text: impl Fn(&T) -> String,
) -> anyhow::Result<String> {
    Ok(text(&escape_document(document)?))
}

/// A document with every string in it escaped.
///
/// # Errors
/// As for [`show`].
pub fn escape_document<T: Serialize + DeserializeOwned>(document: &T) -> anyhow::Result<T> {
    let mut value = serde_json::to_value(document)?;
    escape_strings(&mut value);
    serde_json::from_value(value).context("can't show this document; please report it")
}

fn escape_strings(value: &mut Value) {
    match value {
        Value::String(text) if !text.chars().all(is_plain) => *text = escape(text),
        Value::Array(values) => values.iter_mut().for_each(escape_strings),
        Value::Object(fields) => {
            let entries = std::mem::take(fields).into_iter().map(|(name, mut value)| {
                escape_strings(&mut value);
                (escape(&name), value)
            });
            *fields = entries.collect();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_commands_a_terminal_is_escaped() {
        let table = [
            ("plain, with ä, 日本 and \\", "plain, with ä, 日本 and \\"),
            ("\u{1b}]0;title\u{7}", "\\u{1b}]0;title\\u{7}"),
            ("a\n  healthy 10.0.0.9:1", "a\\n  healthy 10.0.0.9:1"),
            ("\r\t\u{0}\u{7f}", "\\r\\t\\u{0}\\u{7f}"),
            ("\u{9b}31m", "\\u{9b}31m"),
            ("a\u{202e}b\u{2066}c\u{200f}", "a\\u{202e}b\\u{2066}c\\u{200f}"),
            ("\u{2028}\u{85}\u{feff}\u{e0041}", "\\u{2028}\\u{85}\\u{feff}\\u{e0041}"),
        ];
        for (text, expected) in table {
            assert_eq!(escape(text), expected);
        }
        assert_eq!(escape_lines("a\nb\r\u{9b}\n"), "a\nb\\r\\u{9b}\n");
        assert_eq!(
            escape_but_sequences("\u{1b}[32mINFO\u{1b}[0m a\nb"),
            "\u{1b}[32mINFO\u{1b}[0m a\\nb"
        );
    }

    #[test]
    fn json_means_the_same() {
        let document = serde_json::json!({ "a\u{9b}": ["\u{1b}[1m\n", "\u{202e}\u{e0041}ä"] });
        let text = serde_json::to_string_pretty(&document).unwrap();
        let escaped = escape_json(&text);
        assert!(escaped.chars().all(|character| is_plain(character) || character == '\n'));
        assert_eq!(serde_json::from_str::<Value>(&escaped).unwrap(), document);
        assert_eq!(escape_json("{\n  \"a\": 1\n}"), "{\n  \"a\": 1\n}");
    }
}
