//! A report's files: the data, the text and the pictures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::markdown::{self, Links};
use crate::report::Report;
use crate::svg;

/// Writes `DATE-SUITE.json`, `DATE-SUITE.md` and a picture for each name of a figure into a directory,
/// which it creates; returns their paths in that order. Each is written whole or not at all; those of
/// an earlier run of the day are replaced.
///
/// # Errors
/// Where the directory or a file can't be written.
pub fn write(report: &Report, dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| {
        format!("can't create {}: name a directory that you may write to", dir.display())
    })?;
    let stem = format!("{}-{}", report.date, report.suite);
    let json = serde_json::to_string_pretty(report)
        .with_context(|| format!("the report of {stem} can't be put as JSON"))?;
    let pictures = svg::pictures(report);
    let linked = pictures.iter().map(|picture| (picture.figure.clone(), file(&picture.stem)));
    let links = Links { pictures: linked.collect(), to_root: to_root(dir) };

    let mut files = vec![
        (format!("{stem}.json"), format!("{json}\n")),
        (format!("{stem}.md"), markdown::render(report, &links)),
    ];
    files.extend(pictures.into_iter().map(|picture| (file(&picture.stem), picture.svg)));
    let files = files.into_iter().map(|(name, text)| write_whole(&dir.join(name), &text));
    files.collect()
}

fn file(stem: &str) -> String {
    format!("{stem}.svg")
}

/// The relative path from a directory to the repository around it.
fn to_root(dir: &Path) -> Option<String> {
    let dir = fs::canonicalize(dir).ok()?;
    let depth = dir.ancestors().position(|ancestor| ancestor.join(".git").exists())?;
    Some("../".repeat(depth))
}

/// Writes a temporary file and renames it.
fn write_whole(path: &Path, text: &str) -> Result<PathBuf> {
    let new = path.with_added_extension("new");
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        // The rest is useless; the first failure is the reason.
        _ = fs::remove_file(&new);
    }
    written.with_context(|| {
        format!("can't write {}: see to the room and the rights there", path.display())
    })?;
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::sample;

    /// A directory of this test, which goes with it.
    struct TempDir(PathBuf);

    impl TempDir {
        fn new(name: &str) -> TempDir {
            TempDir(std::env::temp_dir().join(format!("nohop-bench-{name}-{}", std::process::id())))
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn all_files_are_there_and_nothing_else() {
        let tempdir = TempDir::new("write");
        let dir = tempdir.0.join("deep/er");
        fs::create_dir_all(tempdir.0.join(".git")).unwrap();
        for _ in 0..2 {
            let paths = write(&sample::small(), &dir).unwrap();
            let names =
                ["2026-11-25-http.json", "2026-11-25-http.md", "2026-11-25-http-keep-alive.svg"];
            assert_eq!(paths, names.map(|name| dir.join(name)));
            assert_eq!(fs::read_dir(&dir).unwrap().count(), names.len());
        }
        let text = fs::read_to_string(dir.join("2026-11-25-http.md")).unwrap();
        assert!(text.contains("](2026-11-25-http-keep-alive.svg)"), "{text}");
        assert!(text.contains("](../../bench/peers/haproxy-tcp.cfg)"), "{text}");
        let json = fs::read_to_string(dir.join("2026-11-25-http.json")).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["figures"][0]["rows"][1]["contender"], "nohop");
    }

    #[test]
    fn errors_name_the_path_and_the_fix() {
        let tempdir = TempDir::new("write-errors");
        fs::create_dir_all(&tempdir.0).unwrap();
        let file = tempdir.0.join("file");
        fs::write(&file, "").unwrap();
        let error = write(&sample::small(), &file).unwrap_err().to_string();
        let expected = format!("can't create {}: name a directory", file.display());
        assert!(error.starts_with(&expected), "{error}");

        fs::create_dir(tempdir.0.join("2026-11-25-http.md")).unwrap();
        let error = write(&sample::small(), &tempdir.0).unwrap_err().to_string();
        assert!(error.contains("2026-11-25-http.md: see to"), "{error}");
        assert!(!tempdir.0.join("2026-11-25-http.md.new").exists());
    }
}
