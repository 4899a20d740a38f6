//! A test: imports point one way. No two files of a crate use each other, directly or around a circle.
//!
//! A file uses another where code outside of tests names a path into it. `mod` and `pub use` don't count:
//! a module may list its parts, and offer them under its own name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use syn::visit::{self, Visit};

/// The folders of the crates' sources.
const CRATES: [&str; 6] =
    ["bench/src", "lb-common/src", "lb-ebpf/src", "lb-userspace/src", "testbed/src", "xtask/src"];

/// A file by the path of its module in the crate.
type Module = Vec<String>;

#[test]
fn no_files_import_each_other() {
    let mut circles = Vec::new();
    for folder in CRATES {
        let mut files = BTreeMap::new();
        read_files(&crate::repository::root().join(folder), &mut Vec::new(), &mut files);
        let named = circles_of(&files).into_iter().map(|circle| format!("{folder}: {circle}"));
        circles.extend(named);
    }
    assert!(circles.is_empty(), "files import each other:\n{}", circles.join("\n"));
}

/// Parses each file below `folder`, the module `at`; tests are left out.
pub fn read_files(folder: &Path, at: &mut Module, files: &mut BTreeMap<Module, syn::File>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if stem == "tests" || stem.ends_with("_tests") || stem == "bin" {
            continue;
        }
        let is_root = matches!(&*stem, "mod" | "lib" | "main");
        at.extend((!is_root).then_some(stem));
        if path.is_dir() {
            read_files(&path, at, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            let file = syn::parse_file(&text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            files.insert(at.clone(), file);
        }
        if !is_root {
            at.pop();
        }
    }
}

/// Each group of files that lead to each other, as text.
fn circles_of(files: &BTreeMap<Module, syn::File>) -> Vec<String> {
    let edges: BTreeMap<&Module, BTreeSet<Module>> = files
        .iter()
        .map(|(module, file)| {
            let inline = module.clone();
            let mut used = Used { module, inline, files, found: BTreeSet::new() };
            used.visit_file(file);
            (module, used.found)
        })
        .collect();
    let reachable: BTreeMap<&Module, BTreeSet<&Module>> =
        edges.keys().map(|module| (*module, reachable_from(module, &edges))).collect();
    let mut groups = BTreeSet::new();
    for (module, reached) in &reachable {
        let back = reached.iter().filter(|other| reachable[**other].contains(module));
        let group: BTreeSet<String> = back.map(|module| shown(module)).collect();
        if group.len() > 1 {
            groups.insert(group);
        }
    }
    groups.into_iter().map(|group| group.into_iter().collect::<Vec<_>>().join(" <-> ")).collect()
}

fn reachable_from<'a>(
    module: &Module,
    edges: &'a BTreeMap<&Module, BTreeSet<Module>>,
) -> BTreeSet<&'a Module> {
    let mut reached = BTreeSet::new();
    let mut open: Vec<&Module> = edges[module].iter().collect();
    while let Some(next) = open.pop() {
        if reached.insert(next) {
            open.extend(&edges[next]);
        }
    }
    reached
}

fn shown(module: &Module) -> String {
    if module.is_empty() { "(root)".to_owned() } else { module.join("/") }
}

/// Collects the files that a file uses.
struct Used<'a> {
    module: &'a Module,
    /// The module within the file that is being visited.
    inline: Module,
    files: &'a BTreeMap<Module, syn::File>,
    found: BTreeSet<Module>,
}

impl Used<'_> {
    /// Adds the file that a path such as `super::index::Cursor` leads to.
    fn add(&mut self, path: &[String]) {
        let mut segments = path.iter();
        let mut target = match path.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self") => self.inline.clone(),
            Some("super") => self.inline[..self.inline.len().saturating_sub(1)].to_vec(),
            _ => {
                segments = [].iter();
                let mut child = self.inline.clone();
                child.extend(path.first().cloned());
                if !self.files.contains_key(&child) {
                    return;
                }
                child
            }
        };
        segments.next();
        for segment in segments {
            if segment == "super" {
                target.pop();
                continue;
            }
            target.push(segment.clone());
            if !self.files.contains_key(&target) {
                target.pop();
                break;
            }
        }
        if target != *self.module && self.files.contains_key(&target) {
            self.found.insert(target);
        }
    }

    fn add_tree(&mut self, tree: &syn::UseTree, path: &mut Vec<String>) {
        match tree {
            syn::UseTree::Path(part) => {
                path.push(part.ident.to_string());
                self.add_tree(&part.tree, path);
                path.pop();
            }
            syn::UseTree::Group(group) => {
                group.items.iter().for_each(|item| self.add_tree(item, path));
            }
            syn::UseTree::Name(syn::UseName { ident })
            | syn::UseTree::Rename(syn::UseRename { ident, .. }) => {
                path.push(ident.to_string());
                self.add(path);
                path.pop();
            }
            syn::UseTree::Glob(_) => self.add(path),
        }
    }
}

impl<'ast> Visit<'ast> for Used<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if !is_test(attributes(item)) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.inline.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.inline.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if matches!(item.vis, syn::Visibility::Inherited) {
            self.add_tree(&item.tree, &mut Vec::new());
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let segments: Vec<String> =
                path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            self.add(&segments);
        }
        visit::visit_path(self, path);
    }
}

fn attributes(item: &syn::Item) -> &[syn::Attribute] {
    match item {
        syn::Item::Const(item) => &item.attrs,
        syn::Item::Fn(item) => &item.attrs,
        syn::Item::Impl(item) => &item.attrs,
        syn::Item::Mod(item) => &item.attrs,
        syn::Item::Struct(item) => &item.attrs,
        syn::Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether an item is compiled for tests only.
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && matches!(&attribute.meta, syn::Meta::List(list) if list.tokens.to_string().contains("test"))
    })
}

#[test]
fn a_circle_is_found() {
    let files = |texts: &[(&str, &str)]| -> BTreeMap<Module, syn::File> {
        texts
            .iter()
            .map(|(path, text)| {
                let module = path.split('/').filter(|part| !part.is_empty()).map(str::to_owned);
                (module.collect(), syn::parse_file(text).unwrap())
            })
            .collect()
    };
    /// Files as paths and texts, and the circles among them.
    type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str]);
    let cases: [Case; 6] = [
        (&[("a", "use crate::b::B;"), ("b", "")], &[]),
        (&[("a", "use crate::b::B;"), ("b", "fn f(_: super::a::A) {}")], &["a <-> b"]),
        (&[("", "mod a; pub use a::A;"), ("a", "use crate::X;")], &[]),
        (&[("", "mod a; fn f() { a::g() }"), ("a", "use super::{X, Y};")], &["(root) <-> a"]),
        (&[("a", "use crate::b::B;"), ("b", "#[cfg(test)] mod tests { use crate::a::A; }")], &[]),
        (&[("a", "use crate::a::b::B;"), ("a/b", "mod c { use super::D; }")], &[]),
    ];
    for (texts, expected) in cases {
        assert_eq!(circles_of(&files(texts)), expected, "{texts:?}");
    }
}
