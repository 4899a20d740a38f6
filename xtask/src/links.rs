//! A test: each relative link in the repository's Markdown has a file, and its heading, as target.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Folders that aren't part of the repository.
const FOREIGN: [&str; 5] = [".git", ".tools", "found", "results", "target"];

#[test]
fn every_link_leads_somewhere() {
    let mut pages = Vec::new();
    find_pages(crate::repository::root(), &mut pages);
    assert!(pages.len() > 10, "only {} pages found", pages.len());
    let broken: Vec<String> = pages.iter().flat_map(|page| broken_links(page)).collect();
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

fn find_pages(folder: &Path, pages: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let is_foreign = FOREIGN.iter().any(|name| path.ends_with(name));
        if path.is_dir() && !path.is_symlink() && !is_foreign {
            find_pages(&path, pages);
        } else if path.extension().is_some_and(|extension| extension == "md") {
            pages.push(path);
        }
    }
}

fn broken_links(page: &Path) -> Vec<String> {
    let text = fs::read_to_string(page).unwrap();
    let shown = page.strip_prefix(crate::repository::root()).unwrap_or(page).display();
    let mut broken = Vec::new();
    for (line, target) in targets(&text) {
        let (path, anchor) = target.split_once('#').unwrap_or((&target, ""));
        let file = match path {
            "" => page.to_owned(),
            path => page.with_file_name("").join(path),
        };
        let headings = || headings(&fs::read_to_string(&file).unwrap());
        let wrong = if !file.exists() {
            "no such file"
        } else if !anchor.is_empty() && file.is_file() && !headings().contains(anchor) {
            "no such heading"
        } else {
            continue;
        };
        broken.push(format!("{shown}:{line}: {target}: {wrong}"));
    }
    broken
}

/// The targets of a page's inline links and pictures, `[text](target)`, that are paths or anchors,
/// each with its line. Code isn't looked at.
fn targets(page: &str) -> Vec<(usize, String)> {
    let mut targets = Vec::new();
    for (n, line) in prose(page) {
        let mut rest = &*without_code_spans(line);
        while let Some((_, after)) = rest.split_once("](") {
            let end = after.find([')', ' ']).unwrap_or(after.len());
            let target = &after[..end];
            if !target.contains("://") && !target.starts_with("mailto:") {
                targets.push((n, target.to_owned()));
            }
            rest = &after[end..];
        }
    }
    targets
}

/// The anchors that GitHub makes of a page's headings: in lower case, without punctuation, with `-`
/// for a space, and numbered from the second of the same name on.
fn headings(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for (_, line) in prose(page) {
        let title = line.trim_start_matches('#');
        if title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let kept = title.trim().chars().flat_map(char::to_lowercase).filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || "-_".contains(c) => Some(c),
            _ => None,
        });
        let anchor: String = kept.collect();
        let numbered = (1..).map(|n| format!("{anchor}-{n}"));
        let mut names = [anchor.clone()].into_iter().chain(numbered);
        names.find(|name| anchors.insert(name.clone()));
    }
    anchors
}

/// The lines outside of fenced code, numbered from 1.
fn prose(page: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut in_code = false;
    page.lines().enumerate().filter_map(move |(n, line)| {
        let is_fence = line.trim_start().starts_with("```");
        in_code ^= is_fence;
        (!is_fence && !in_code).then_some((n + 1, line))
    })
}

fn without_code_spans(line: &str) -> String {
    line.split('`').step_by(2).collect::<Vec<_>>().join("`")
}

#[test]
fn links_and_headings_are_found() {
    let page = "# A page\n[a](b.md#c) and ![d](e.svg \"f\"), [g](https://h/) `[i](j)`\n\
                ```\n[k](l)\n# No heading\n```\n## `m()`, or n_o?\n## A page\n[p](#a-page-1)\n";
    let found: Vec<String> = targets(page).into_iter().map(|(_, target)| target).collect();
    assert_eq!(found, ["b.md#c", "e.svg", "#a-page-1"]);
    let expected = ["a-page", "a-page-1", "m-or-n_o"].map(str::to_owned);
    assert_eq!(headings(page), BTreeSet::from(expected));
}
