//! The way out: what has dials only counted, so that every application dials as it would without
//! nohop.

use std::path::PathBuf;

use crate::config::Config;
use crate::plane::Mode;

/// All that can say that nothing is to be translated, but for the source. One of them is enough.
#[derive(Debug)]
pub struct WayOut {
    /// `--shadow`
    is_configured: bool,
    /// The file that says so by being there.
    file: PathBuf,
    is_file_there: bool,
    /// Whether an earlier daemon left it so, for a reason that the source may still have.
    is_inherited: bool,
}

impl WayOut {
    /// Looks for the file once.
    pub fn new(config: &Config) -> WayOut {
        let file = config.state_dir.join("off");
        let mut way_out = WayOut {
            is_configured: config.shadow,
            file,
            is_file_there: false,
            is_inherited: false,
        };
        way_out.look();
        way_out
    }

    /// Takes what the configuration says now.
    pub fn configure(&mut self, shadow: bool) {
        self.is_configured = shadow;
    }

    /// Looks for the file. Where that can't be told, what was seen last counts.
    pub fn look(&mut self) {
        self.is_file_there = self.file.try_exists().unwrap_or(self.is_file_there);
    }

    /// Takes it that an earlier daemon left dials only counted, until the source was heard.
    pub fn inherit(&mut self) {
        self.is_inherited = true;
    }

    /// Takes it that the source was heard: what it says is all there is to its reasons.
    pub fn hear(&mut self) {
        self.is_inherited = false;
    }

    /// What is to become of dials, by these reasons and by what the source says.
    pub fn mode(&self, is_source_off: bool) -> Mode {
        let file = self.file.display();
        let reasons = [
            (self.is_configured, "`shadow` is set by --shadow or the configuration".to_owned()),
            (self.is_file_there, format!("{file} is there; remove it to translate again")),
            (
                is_source_off,
                "Consul's key nohop/off is there; delete it to translate again".to_owned(),
            ),
            (
                self.is_inherited,
                "the daemon before this one left it so, and discovery hasn't said yet whether that \
                 holds"
                    .to_owned(),
            ),
        ];
        let reasons: Vec<String> =
            reasons.into_iter().filter_map(|(holds, why)| holds.then_some(why)).collect();
        if reasons.is_empty() {
            return Mode::Translate;
        }
        Mode::Shadow { why: reasons.join("; ") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_reason_is_enough_and_each_is_named() {
        let cases: [(bool, bool, bool, bool, &[&str]); 6] = [
            (false, false, false, false, &[]),
            (true, false, false, false, &["--shadow"]),
            (false, true, false, false, &["/state/off"]),
            (false, false, true, false, &["nohop/off"]),
            (false, false, false, true, &["the daemon before"]),
            (true, true, true, true, &["--shadow", "/state/off", "nohop/off", "the daemon before"]),
        ];
        for (is_configured, is_file_there, is_source_off, is_inherited, named) in cases {
            let file = "/state/off".into();
            let way_out = WayOut { is_configured, file, is_file_there, is_inherited };
            match way_out.mode(is_source_off) {
                Mode::Translate => assert!(named.is_empty(), "{way_out:?}"),
                Mode::Shadow { why } => {
                    assert!(!named.is_empty(), "{why}");
                    assert!(named.iter().all(|part| why.contains(part)), "{why}");
                    assert_eq!(why.matches("--shadow").count(), usize::from(is_configured));
                }
            }
        }
    }

    #[test]
    fn the_file_is_looked_for() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config { state_dir: dir.path().into(), ..Config::default() };
        let mut way_out = WayOut::new(&config);
        assert_eq!(way_out.mode(false), Mode::Translate);
        std::fs::write(dir.path().join("off"), "").unwrap();
        assert_ne!(WayOut::new(&config).mode(false), Mode::Translate);
        way_out.look();
        assert_ne!(way_out.mode(false), Mode::Translate);
        std::fs::remove_file(dir.path().join("off")).unwrap();
        way_out.look();
        assert_eq!(way_out.mode(false), Mode::Translate);
    }

    #[test]
    fn what_was_inherited_holds_until_the_source_was_heard() {
        let mut way_out = WayOut::new(&Config::default());
        way_out.inherit();
        assert_ne!(way_out.mode(false), Mode::Translate);
        way_out.hear();
        assert_ne!(way_out.mode(true), Mode::Translate);
        assert_eq!(way_out.mode(false), Mode::Translate);
    }
}
