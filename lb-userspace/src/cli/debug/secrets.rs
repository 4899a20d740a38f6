//! Secrets, and texts without them.

/// The parts of a variable's name by which its value is a secret.
const NAMES: [&str; 5] = ["TOKEN", "AUTH", "PASSWORD", "PASSWD", "SECRET"];

/// What stands where a secret was.
const REDACTED: &str = "(redacted)";

/// The shortest text that is taken for a secret: a shorter one would be found in many words.
const MIN_LENGTH: usize = 6;

/// Texts that must not be handed on.
#[derive(Clone, Debug, Default)]
pub struct Secrets(Vec<String>);

impl Secrets {
    /// Adds a secret. One that is a user with a password is one by its password as well.
    pub fn add(&mut self, secret: &str) {
        let password = secret.split_once(':').map(|(_, password)| password);
        let texts = [Some(secret.trim()), password].into_iter().flatten();
        self.0.extend(texts.filter(|text| text.len() >= MIN_LENGTH).map(str::to_owned));
    }

    /// Adds the value of a variable of the environment, if its name is one of a secret.
    pub fn add_variable(&mut self, name: &str, value: &str) {
        let name = name.to_uppercase();
        if !name.ends_with("_FILE") && NAMES.iter().any(|part| name.contains(part)) {
            self.add(value);
        }
    }

    /// The text without the secrets, and without the user and the password of any URL.
    pub fn redact(&self, text: &str) -> String {
        let mut text = without_users(text);
        // One may begin with another.
        let mut secrets: Vec<&String> = self.0.iter().collect();
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        for secret in secrets {
            // JSON may have escaped it.
            let quoted = serde_json::Value::from(secret.as_str()).to_string();
            text = text.replace(quoted.trim_matches('"'), REDACTED).replace(secret, REDACTED);
        }
        text
    }
}

/// `http://USER:PASSWORD@HOST` without the first two (RFC 3986, 3.2.1).
fn without_users(text: &str) -> String {
    let mut parts = text.split("://");
    let mut cleaned = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        cleaned.push_str("://");
        let is_end = |c: char| c.is_whitespace() || matches!(c, '/' | '?' | '#' | '"' | '\'');
        let authority = &part[..part.find(is_end).unwrap_or(part.len())];
        match authority.rfind('@') {
            Some(at) => {
                cleaned.push_str(REDACTED);
                cleaned.push_str(&part[at..]);
            }
            None => cleaned.push_str(part),
        }
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_replaced() {
        let mut secrets = Secrets::default();
        for (name, value) in [
            ("CONSUL_HTTP_TOKEN", "b1gs-cafe"),
            ("CONSUL_HTTP_AUTH", "user:pa\"ssword"),
            ("CONSUL_HTTP_TOKEN_FILE", "/etc/consul.token"),
            ("PATH", "/usr/bin"),
            ("MY_SECRET", "short"),
        ] {
            secrets.add_variable(name, value);
        }
        let json = serde_json::json!({ "why": "pa\"ssword" }).to_string();
        for (text, expected) in [
            ("token b1gs-cafe.", "token (redacted)."),
            ("user:pa\"ssword@", "(redacted)@"),
            ("of pa\"ssword", "of (redacted)"),
            (&json, r#"{"why":"(redacted)"}"#),
            ("/etc/consul.token /usr/bin short", "/etc/consul.token /usr/bin short"),
            ("'http://me:x@consul:8500/v1'", "'http://(redacted)@consul:8500/v1'"),
            ("https://a.b/c@d http://x@y", "https://a.b/c@d http://(redacted)@y"),
        ] {
            assert_eq!(secrets.redact(text), expected);
        }
    }
}
