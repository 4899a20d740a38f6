//! The kill switch, the key `nohop/off` in Consul's key-value store: while it is set, nothing is
//! translated.

use serde::Deserialize;

/// Its path.
pub const PATH: &str = "/v1/kv/nohop/off";

/// The body of the response: an entry, or `null` where there is no such key.
pub type KvEntries = Option<Vec<KvEntry>>;

/// The key in the response.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct KvEntry {
    /// Base64; `null` where it is empty.
    value: Option<String>,
}

/// Whether translation is switched off: the key is set, and its value isn't `false`, `0` or `no`. Any
/// other value switches it off, since it is set in an emergency.
pub fn is_off(entries: &KvEntries) -> bool {
    let Some(entry) = entries.iter().flatten().next() else { return false };
    let encoded = entry.value.as_deref().unwrap_or_default();
    let value = data_encoding::BASE64.decode(encoded.as_bytes()).unwrap_or_default();
    let value = String::from_utf8_lossy(&value).trim().to_ascii_lowercase();
    !matches!(value.as_str(), "false" | "0" | "no")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_clear_no_keeps_translation_on() {
        let table = [
            ("null", false),
            ("[]", false),
            (r#"[{"Key":"nohop/off","Value":null}]"#, true),
            (r#"[{"Value":""}]"#, true),
            (r#"[{"Value":"dHJ1ZQ=="}]"#, true),  // true
            (r#"[{"Value":"ZmFsc2U="}]"#, false), // false
            (r#"[{"Value":"RkFMU0UK"}]"#, false), // FALSE and a newline
            (r#"[{"Value":"MA=="}]"#, false),     // 0
            (r#"[{"Value":"bm8="}]"#, false),     // no
            (r#"[{"Value":"MQ=="}]"#, true),      // 1
            (r#"[{"Value":"not base64"}]"#, true),
        ];
        for (json, expected) in table {
            assert_eq!(is_off(&serde_json::from_str(json).unwrap()), expected, "{json}");
        }
    }
}
