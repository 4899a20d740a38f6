//! The configuration file that packages bring: every key with its default, as a comment.

use std::fmt::Write as _;

use super::Config;
use super::keys::{KEYS, toml, values};

const HEAD: &str = "\
# The configuration of nohop. Every key stands here with its default; remove the # in front of one to
# change it. `nohop config check` reports mistakes, `nohop reload` applies changes, and nohop.toml(5) and
# docs/configuration.md have more on each.
";

/// The file: the sections are there, their keys are comments, so that it means the defaults.
pub fn template() -> String {
    let values = values(&Config::default());
    let mut text = HEAD.to_owned();
    let mut section = None;
    for (key, value) in KEYS.iter().zip(values.iter().map(|(_, value)| value)) {
        if key.section() != section {
            section = key.section();
            let _ = writeln!(text, "\n[{}]", section.unwrap_or_default());
        } else {
            text.push('\n');
        }
        let name = key.name.split_once('.').map_or(key.name, |(_, name)| name);
        let _ = write!(text, "# {}\n#{name} = {}\n", key.text, toml(value));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::LoadedConfig;

    fn config(text: &str) -> Config {
        let loaded = LoadedConfig::parse(Path::new("f"), text.as_bytes(), &[], &|_| None);
        loaded.expect("no problems").config
    }

    #[test]
    fn it_means_the_defaults() {
        assert_eq!(config(&template()), Config::default());
    }

    #[test]
    fn each_comment_of_a_key_can_be_removed() {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') => key.to_owned(),
            _ => line.to_owned(),
        };
        let all: Vec<String> = template().lines().map(line).collect();
        let keys = all.iter().filter(|line| line.contains(" = ") && !line.starts_with('#'));
        assert_eq!(keys.count(), KEYS.len());
        assert_eq!(config(&all.join("\n")), Config::default());
    }
}
