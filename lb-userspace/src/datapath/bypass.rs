//! The cgroups that are bypassed, as the kernel knows them.

use std::collections::{BTreeMap, BTreeSet};
use std::os::linux::fs::MetadataExt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use lb_common::{BypassCgroup, BypassLevel, MAX_BYPASS_CGROUPS, N_BYPASS_LEVELS};

use crate::config::cgroup::{self, Mount};

/// As many of the cgroups in a list as a message names.
const N_NAMED: usize = 3;

/// An entry of `BYPASS`.
type Entry = (BypassCgroup, BypassLevel);

/// The result of one search of the hierarchy.
#[derive(Debug, Default)]
pub struct Found {
    /// The cgroups that exist and are matched, in the order of the patterns and, of one pattern, by
    /// path.
    cgroups: Vec<(PathBuf, Entry)>,
    /// Notes for the operator: patterns that match nothing, and why.
    pub problems: Vec<String>,
}

/// Looks for the cgroups that `patterns` match: full paths, or paths below the hierarchy as it is
/// mounted. In a segment of a path `*` stands for any characters and `?` for one; no segment spans a
/// `/`. The kernel knows a cgroup by its inode, so one that was made again has to be looked up again.
pub fn find(patterns: &[PathBuf]) -> Found {
    find_in(&cgroup::mounts(), patterns)
}

fn find_in(mounts: &[Mount], patterns: &[PathBuf]) -> Found {
    let mut found = Found::default();
    let mut known = BTreeSet::new();
    for pattern in patterns {
        match matches(mounts, pattern) {
            Ok(matches) if matches.is_empty() => {
                let is_shells = |byte: &u8| matches!(byte, b'[' | b'{');
                let hint = match pattern.as_os_str().as_bytes().iter().any(is_shells) {
                    true => "; of patterns only * and ? are known, brackets stand for themselves",
                    false => "",
                };
                found.problems.push(format!(
                    "datapath.exclude_cgroups: no cgroup matches '{}' now; nothing is excluded by it{hint}",
                    pattern.display()
                ));
            }
            Ok(matches) => {
                for (path, excluded) in matches {
                    let (_, BypassLevel { level }) = excluded;
                    if level >= N_BYPASS_LEVELS.into() {
                        found.problems.push(format!(
                            "datapath.exclude_cgroups: {} is {level} levels deep, and {} at most can be \
                             excluded: exclude a cgroup that it is below",
                            path.display(),
                            N_BYPASS_LEVELS - 1
                        ));
                    } else if known.insert(excluded) {
                        found.cgroups.push((path, excluded));
                    }
                }
            }
            Err(problem) => found.problems.push(problem),
        }
    }
    found
}

/// The cgroups that one pattern matches, by path.
fn matches(mounts: &[Mount], pattern: &Path) -> Result<Vec<(PathBuf, Entry)>, String> {
    let problem = |what: String| {
        format!("datapath.exclude_cgroups: '{}' excludes nothing: {what}", pattern.display())
    };
    let Located { mount, n_levels, cgroups } = locate(mounts, pattern).map_err(problem)?;
    let depth =
        cgroup::depth(mount).ok_or_else(|| problem(cgroup::ScopeError::Depth.to_string()))?;
    let level = (depth + n_levels) as u64;
    let excluded = |(path, cgroup_id)| (path, (BypassCgroup { cgroup_id }, BypassLevel { level }));
    Ok(cgroups.into_iter().map(excluded).collect())
}

/// The cgroups that a pattern matches.
pub(super) struct Located<'a> {
    /// The mount that the pattern is below.
    mount: &'a Mount,
    /// The levels of the pattern below it.
    n_levels: usize,
    /// Each with its id, by path.
    pub(super) cgroups: Vec<(PathBuf, u64)>,
}

/// Looks for the cgroups that a pattern matches.
///
/// # Errors
/// Why there can be none.
pub(super) fn locate<'a>(mounts: &'a [Mount], pattern: &Path) -> Result<Located<'a>, String> {
    // The mount that a full path is below. Segments of a mount's path are never patterns.
    let whole = match pattern.is_absolute() {
        true => canonical(pattern),
        false => pattern.to_owned(),
    };
    let below = |mount: &Mount| match whole.is_absolute() {
        true => whole.strip_prefix(&mount.point).ok().map(Path::to_owned),
        false => Some(whole.clone()),
    };
    let mut candidates = mounts.iter().filter_map(|mount| Some((mount, below(mount)?)));
    let chosen = match whole.is_absolute() {
        true => candidates.max_by_key(|(mount, _)| mount.point.components().count()),
        false => candidates.next(),
    };
    let Some((mount, below)) = chosen else {
        let mounted: Vec<_> =
            mounts.iter().map(|mount| mount.point.display().to_string()).collect();
        return Err(match mounted.is_empty() {
            true => "no cgroup v2 hierarchy is mounted".to_owned(),
            false => format!("it isn't below a cgroup v2 mount ({})", mounted.join(", ")),
        });
    };
    let mut paths = vec![mount.point.clone()];
    let mut n_levels = 0;
    for part in below.components() {
        let Component::Normal(part) = part else { continue };
        n_levels += 1;
        paths = paths.iter().flat_map(|path| children(path, part.as_bytes())).collect();
    }
    paths.sort();
    let cgroup = |path: PathBuf| {
        let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_dir)?;
        let is_cgroup = cgroup::is_cgroup2(&path).unwrap_or(false);
        is_cgroup.then(|| (path, metadata.st_ino()))
    };
    Ok(Located { mount, n_levels, cgroups: paths.into_iter().filter_map(cgroup).collect() })
}

/// The path without symbolic links, as far as it exists.
fn canonical(path: &Path) -> PathBuf {
    path.ancestors()
        .find_map(|ancestor| {
            let existing = std::fs::canonicalize(ancestor).ok()?;
            Some(existing.join(path.strip_prefix(ancestor).ok()?))
        })
        .unwrap_or_else(|| path.to_owned())
}

/// The directories in `path` whose name `pattern` matches.
fn children(path: &Path, pattern: &[u8]) -> Vec<PathBuf> {
    if !is_pattern(pattern) {
        let child = path.join(std::ffi::OsStr::from_bytes(pattern));
        return if child.is_dir() { vec![child] } else { Vec::new() };
    }
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter(|entry| is_match(pattern, entry.file_name().as_bytes()))
        .map(|entry| entry.path())
        .collect()
}

fn is_pattern(segment: &[u8]) -> bool {
    segment.iter().any(|byte| matches!(byte, b'*' | b'?'))
}

/// Whether a pattern of one segment matches a whole name.
fn is_match(pattern: &[u8], name: &[u8]) -> bool {
    // After the last `*`: the position in the pattern, and how much of the name that `*` matched.
    let mut retry: Option<(usize, usize)> = None;
    let (mut at, mut name_at) = (0, 0);
    while name_at < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                retry = Some((at + 1, name_at));
                at += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[name_at] => {
                (at, name_at) = (at + 1, name_at + 1);
            }
            _ => {
                let Some((after, taken)) = retry else { return false };
                retry = Some((after, taken + 1));
                (at, name_at) = (after, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|&byte| byte == b'*')
}

impl Found {
    /// The entries of `BYPASS` for these cgroups, where `present` are its entries now: cgroups bypassed
    /// already stay, others fill the free entries. Notes those beyond the capacity.
    pub fn fit(
        &mut self,
        present: &BTreeMap<BypassCgroup, BypassLevel>,
    ) -> BTreeMap<BypassCgroup, BypassLevel> {
        let is_present = |(cgroup, level): &Entry| present.get(cgroup) == Some(level);
        let (mut cgroups, new): (Vec<_>, Vec<_>) =
            self.cgroups.iter().partition(|(_, entry)| is_present(entry));
        cgroups.extend(new);
        let left_out = cgroups.split_off(cgroups.len().min(MAX_BYPASS_CGROUPS));
        if !left_out.is_empty() {
            let n_more = left_out.len().saturating_sub(N_NAMED);
            let named = left_out.iter().take(N_NAMED).map(|(path, _)| path.display().to_string());
            let named = named.collect::<Vec<_>>().join(", ");
            let more = if n_more > 0 { format!(" and {n_more} more") } else { String::new() };
            self.problems.push(format!(
                "datapath.exclude_cgroups matches {} cgroups, and {MAX_BYPASS_CGROUPS} at most can be \
                 excluded: connections from {named}{more} are translated; exclude a cgroup that they are \
                 below",
                self.cgroups.len()
            ));
        }
        cgroups.into_iter().map(|(_, entry)| *entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_of_a_segment() {
        let table = [
            ("*", "a", true),
            ("*.scope", "39e2.envoy-web.scope", true),
            ("*.envoy-*.scope", "39e2.envoy-web.scope", true),
            ("*.envoy-*.scope", "39e2.web.scope", false),
            ("*.envoy-*.scope", "39e2.envoy-web.scope.d", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*b*c", "aXbXbc", true),
            ("a**", "a", true),
            ("?", "", false),
            // systemd escapes names by backslashes, and brackets are ordinary.
            (r"dev-mapper-a\x2db*", r"dev-mapper-a\x2db.slice", true),
            ("[a]*", "[a]b", true),
            ("[a]*", "ab", false),
            ("ABC", "abc", false),
        ];
        for (pattern, name, expected) in table {
            assert_eq!(is_match(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn what_is_no_cgroup_is_a_problem_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let point = dir.path().join("mount");
        std::fs::create_dir_all(point.join("a.slice")).unwrap();
        let mounts = [Mount { point: point.clone(), root: "/".into() }];
        let table = [
            ("gone.slice", "no cgroup matches 'gone.slice'"),
            ("*/nothing", "no cgroup matches '*/nothing'"),
            // A directory that isn't of the hierarchy.
            ("a.slice", "no cgroup matches 'a.slice'"),
            ("/elsewhere/a", "isn't below a cgroup v2 mount"),
            ("a[bc].slice", "only * and ? are known, brackets stand for themselves"),
            ("{a,b}.slice", "brackets stand for themselves"),
        ];
        for (pattern, expected) in table {
            let found = find_in(&mounts, &[pattern.into()]);
            assert_eq!(found.cgroups, [], "{pattern}");
            assert!(found.problems[0].contains(expected), "{:?}", found.problems);
        }
        let unmounted = find_in(&[], &["a".into()]);
        assert!(unmounted.problems[0].contains("no cgroup v2 hierarchy"), "{unmounted:?}");
    }

    fn some(ids: impl IntoIterator<Item = u64>) -> Found {
        let cgroup = |cgroup_id| (PathBuf::from(format!("c{cgroup_id}")), entry(cgroup_id));
        Found { cgroups: ids.into_iter().map(cgroup).collect(), problems: Vec::new() }
    }

    fn entry(cgroup_id: u64) -> Entry {
        (BypassCgroup { cgroup_id }, BypassLevel { level: 2 })
    }

    /// A bypassed cgroup stays bypassed, whatever comes before it in the list.
    #[test]
    fn the_bypassed_stay_while_they_are_there() {
        let max = MAX_BYPASS_CGROUPS as u64;
        let present: BTreeMap<_, _> = (11..11 + max).map(entry).collect();
        assert_eq!(some(11..11 + max).fit(&BTreeMap::new()), present);
        let mut more = some(1..=max + 14);
        assert_eq!(more.fit(&present), present);
        let [problem] = &more.problems[..] else { panic!("{:?}", more.problems) };
        for part in ["matches 1038 cgroups", "1024 at most", "from c1, c2, c3 and 11 more are"] {
            assert!(problem.contains(part), "no {part:?} in {problem}");
        }
        // One goes: another takes its place.
        let mut fewer = some((1..=max + 14).filter(|&id| id != 13));
        let mut expected = present.clone();
        expected.remove(&entry(13).0);
        expected.extend([entry(1)]);
        assert_eq!(fewer.fit(&present), expected);
        // All but two go.
        let mut two = some([26, 12]);
        assert_eq!(two.fit(&present), BTreeMap::from([entry(12), entry(26)]));
        assert!(two.problems.is_empty());
    }

    /// The limit of the configuration is that of the map.
    #[test]
    fn the_limit_is_the_maps() {
        assert_eq!(crate::config::MAX_EXCLUDED_CGROUPS, MAX_BYPASS_CGROUPS);
    }
}
