//! What a registration declares of its service: `nohop-KEY` in its Meta, or the tag `nohop.KEY=VALUE`.

use std::collections::BTreeMap;

use crate::table::ServiceMeta;

/// How the keys begin in Meta, and in tags.
const META_PREFIX: &str = "nohop-";
const TAG_PREFIX: &str = "nohop.";

/// The most problems that are kept of one registration: Consul bounds neither number nor length of tags.
const MAX_PROBLEMS: usize = 4;

/// The most characters of a tag or a value that a problem shows.
const MAX_SHOWN: usize = 64;

/// The field of a declaration that has the value of a key.
type Field = fn(&mut ServiceMeta) -> &mut Option<String>;

/// Each key with its field.
const KEYS: [(&str, Field); 5] = [
    ("ports", |meta| &mut meta.ports),
    ("protocol", |meta| &mut meta.protocol),
    ("algorithm", |meta| &mut meta.algorithm),
    ("weight", |meta| &mut meta.weight),
    ("public", |meta| &mut meta.public),
];

/// The declarations of one registration. Where Meta and a tag have the same key, Meta applies; where
/// two tags have it, the first one. What doesn't apply is among the problems.
pub fn declarations(tags: &[String], mut meta: BTreeMap<String, Option<String>>) -> ServiceMeta {
    let mut declared = ServiceMeta::default();
    let mut given_as = BTreeMap::new();
    let fields = KEYS.map(|(key, field)| (key, field, meta.remove(&format!("{META_PREFIX}{key}"))));
    for (key, field, value) in fields {
        if let Some(value) = value.flatten() {
            given_as.insert(key, format!("`{META_PREFIX}{key} = {}` in its Meta", shown(&value)));
            *field(&mut declared) = Some(value);
        }
    }
    // Such as a key that is misspelt.
    let unknown = meta.keys().filter(|key| key.to_ascii_lowercase().starts_with(META_PREFIX));
    declared.problems.extend(unknown.take(MAX_PROBLEMS).map(|key| {
        let keys = KEYS.map(|(key, _)| format!("`{META_PREFIX}{key}`")).join(", ");
        format!(
            "`{}` in its Meta is ignored: there is no such key; the keys are {keys}",
            shown(key)
        )
    }));
    for tag in tags {
        let Some(declaration) = tag.strip_prefix(TAG_PREFIX) else { continue };
        if let Err(problem) = apply_tag(declaration, &mut declared, &mut given_as)
            && declared.problems.len() < MAX_PROBLEMS
        {
            declared.problems.push(format!("the tag `{}` is ignored: {problem}", shown(tag)));
        }
    }
    declared
}

/// Applies a tag, without its prefix, where nothing else has given its key.
fn apply_tag(
    declaration: &str,
    declared: &mut ServiceMeta,
    given_as: &mut BTreeMap<&'static str, String>,
) -> Result<(), String> {
    let (key, value) = declaration
        .split_once('=')
        .ok_or_else(|| format!("write it as `{TAG_PREFIX}KEY=VALUE`"))?;
    let known = KEYS.into_iter().find(|(known, _)| *known == key);
    let (key, field) = known.ok_or_else(|| {
        let keys = KEYS.map(|(key, _)| format!("`{key}`")).join(", ");
        format!("there is no such key; the keys are {keys}")
    })?;
    let field = field(declared);
    match field {
        Some(applied) if applied.trim() == value.trim() => Ok(()),
        Some(_) => Err(format!("{} applies", given_as[key])),
        None => {
            *field = Some(value.to_owned());
            given_as.insert(key, format!("the tag `{TAG_PREFIX}{key}={}`", shown(value)));
            Ok(())
        }
    }
}

/// A text, or its beginning.
fn shown(text: &str) -> String {
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn declared(tags: &[&str], meta: &[(&str, &str)]) -> ServiceMeta {
        let tags: Vec<String> = tags.iter().map(|tag| (*tag).to_owned()).collect();
        let entry = |(key, value): &(&str, &str)| ((*key).to_owned(), Some((*value).to_owned()));
        declarations(&tags, meta.iter().map(entry).collect())
    }

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn a_tag_equals_the_meta_of_its_key() {
        let rows = [
            ("ports", "80,5432"),
            ("ports", "any"),
            ("protocol", "both"),
            ("algorithm", "maglev"),
            ("weight", "7"),
            ("public", "203.0.113.10:443"),
            ("algorithm", "a=b"),
            ("weight", ""),
        ];
        for (key, value) in rows {
            let by_tag = declared(&["routed", &format!("nohop.{key}={value}")], &[]);
            let by_meta = declared(&["routed"], &[(&format!("nohop-{key}"), value)]);
            assert_eq!(by_tag, by_meta, "{key}={value}");
            assert_ne!(by_tag, ServiceMeta::default(), "{key}={value}");
        }
    }

    #[test]
    fn tags_that_do_not_apply_are_problems() {
        let ignored = |tag: &str, why: &str| format!("the tag `{tag}` is ignored: {why}");
        let no_key = "there is no such key; the keys are `ports`, `protocol`, `algorithm`, `weight`, `public`";
        let form = "write it as `nohop.KEY=VALUE`";
        let long = format!("nohop.{}", "x".repeat(100));
        for (tags, weight, problems) in [
            (&["nohop", "nohop-weight=1", "Nohop.weight=1"][..], None, vec![]),
            (&["nohop.weight=1", "nohop.weight= 1"], some("1"), vec![]),
            (
                &["nohop.weight=1", "nohop.weight=2"],
                some("1"),
                vec![ignored("nohop.weight=2", "the tag `nohop.weight=1` applies")],
            ),
            (&["nohop.weigth=1"], None, vec![ignored("nohop.weigth=1", no_key)]),
            (&["nohop.=1"], None, vec![ignored("nohop.=1", no_key)]),
            (&["nohop.weight"], None, vec![ignored("nohop.weight", form)]),
            (&["nohop."], None, vec![ignored("nohop.", form)]),
            (&[&*long], None, vec![ignored(&format!("{}...", &long[..MAX_SHOWN]), form)]),
        ] {
            let declared = declared(tags, &[]);
            assert_eq!((declared.weight, declared.problems), (weight, problems), "{tags:?}");
        }
        let many: Vec<String> = (0..100).map(|n| format!("nohop.{n}")).collect();
        assert_eq!(declarations(&many, BTreeMap::new()).problems.len(), MAX_PROBLEMS);
    }

    #[test]
    fn unknown_keys_of_meta_are_problems() {
        let keys = "the keys are `nohop-ports`, `nohop-protocol`, `nohop-algorithm`, `nohop-weight`, \
                    `nohop-public`";
        for key in ["nohop-prots", "Nohop-Ports", "nohop-"] {
            let problem = format!("`{key}` in its Meta is ignored: there is no such key; {keys}");
            assert_eq!(
                declared(&[], &[(key, "81"), ("nohop", "1"), ("ports", "81")]).problems,
                [problem]
            );
        }
        let many: Vec<String> = (0..100).map(|n| format!("nohop-{n}")).collect();
        let many: Vec<_> = many.iter().map(|key| (&**key, "1")).collect();
        assert_eq!(declared(&["nohop.x=1"], &many).problems.len(), MAX_PROBLEMS);
    }

    #[test]
    fn meta_applies_where_a_tag_differs() {
        let meta = [("nohop-algorithm", "maglev"), ("nohop-weight", "3")];
        let declared =
            declared(&["nohop.algorithm=least", "nohop.weight=3", "nohop.ports=81"], &meta);
        assert_eq!((declared.algorithm, declared.weight), (some("maglev"), some("3")));
        assert_eq!(declared.ports, some("81"));
        assert_eq!(
            declared.problems,
            ["the tag `nohop.algorithm=least` is ignored: `nohop-algorithm = maglev` in its Meta \
              applies"]
        );
    }
}
