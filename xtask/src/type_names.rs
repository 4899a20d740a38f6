//! A test: one name, one meaning. No two public types of the daemon's crate share a name.

use std::collections::{BTreeMap, BTreeSet};

use syn::visit::{self, Visit};

use crate::imports::read_files;

#[test]
fn no_public_types_share_a_name() {
    let mut files = BTreeMap::new();
    let folder = crate::repository::root().join("lb-userspace/src");
    read_files(&folder, &mut Vec::new(), &mut files);
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (module, file) in &files {
        let mut types = Types(BTreeSet::new());
        types.visit_file(file);
        for name in types.0 {
            found.entry(name).or_default().push(module.join("/"));
        }
    }
    found.retain(|_, modules| modules.len() > 1);
    assert!(found.is_empty(), "types that share a name: {found:?}");
}

/// The names of a file's public types.
struct Types(BTreeSet<String>);

impl<'ast> Visit<'ast> for Types {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let (visibility, name) = match item {
            syn::Item::Enum(item) => (&item.vis, &item.ident),
            syn::Item::Struct(item) => (&item.vis, &item.ident),
            syn::Item::Trait(item) => (&item.vis, &item.ident),
            syn::Item::Type(item) => (&item.vis, &item.ident),
            syn::Item::Mod(_) => return visit::visit_item(self, item),
            _ => return,
        };
        if !matches!(visibility, syn::Visibility::Inherited) {
            self.0.insert(name.to_string());
        }
    }
}
