//! Programs of others that keep a hook for themselves.
//!
//! Links coexist, but only with programs that were attached with BPF_F_ALLOW_MULTI. One that was
//! attached without it, to the cgroup itself or to one above it, makes the kernel refuse ours with
//! EPERM (`hierarchy_allows_attach` and `__cgroup_bpf_attach` in kernel/bpf/cgroup.c), the same error
//! as for a missing capability.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use super::bpf::{AttachedPrograms, attached_programs, program_name};
use super::units::{AttachPoint, Hook};
use crate::config::cgroup;

const BPF_F_ALLOW_OVERRIDE: u32 = 1;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// A program that keeps ours from a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The cgroup that it is attached to.
    pub cgroup: PathBuf,
    /// Where, as bpftool names it.
    pub hook: &'static str,
    /// Its id.
    pub program_id: u32,
    /// Its name, if this process may query it.
    pub name: Option<String>,
}

impl Obstacle {
    /// The fix.
    pub fn fix(&self) -> String {
        let Obstacle { cgroup, hook, program_id, .. } = self;
        let cgroup = cgroup.display();
        format!(
            "have its owner attach it with BPF_F_ALLOW_MULTI, or detach it: bpftool cgroup detach \
             {cgroup} {hook} id {program_id}"
        )
    }
}

/// The problem.
impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Obstacle { cgroup, hook, program_id, name } = self;
        let name = name.as_ref().map(|name| format!("{name}, ")).unwrap_or_default();
        write!(
            f,
            "another program ({name}id {program_id}) holds the hook {hook} of {} exclusively, so \
             none can be attached there or below",
            cgroup.display()
        )
    }
}

/// Finds an obstacle to attaching to these hooks of `scope`; `None` if there is none. An existing link
/// always takes another program (BPF_LINK_UPDATE): `__cgroup_bpf_replace` checks no other attachment.
///
/// # Errors
/// When the kernel refuses the query, such as for lack of CAP_NET_ADMIN.
pub fn find<'a>(
    scope: &Path,
    hooks: impl IntoIterator<Item = &'a Hook>,
) -> io::Result<Option<Obstacle>> {
    let scope = std::fs::canonicalize(scope)?;
    let is_cgroup = |dir: &&Path| cgroup::is_cgroup2(dir).unwrap_or(false);
    let levels: Vec<&Path> = scope.ancestors().take_while(is_cgroup).collect();
    let opened = levels.iter().map(File::open).collect::<io::Result<Vec<_>>>()?;
    for hook in hooks {
        let AttachPoint::Cgroup(attach_type) = hook.target;
        let attached = opened
            .iter()
            .map(|cgroup| attached_programs(cgroup.as_fd(), attach_type))
            .collect::<io::Result<Vec<_>>>()?;
        if let Some(at) = refusing_level(&attached) {
            let program_id = attached[at].ids.first().copied().unwrap_or(0);
            return Ok(Some(Obstacle {
                cgroup: levels[at].into(),
                hook: attach_type.name,
                program_id,
                name: program_name(program_id).ok().filter(|name| !name.is_empty()),
            }));
        }
    }
    Ok(None)
}

/// The level whose programs let no link come, of the cgroup itself and those above it in turn.
fn refusing_level(levels: &[AttachedPrograms]) -> Option<usize> {
    let (own, above) = levels.split_first()?;
    for (level, attached) in above.iter().enumerate() {
        if attached.flags & BPF_F_ALLOW_MULTI != 0 {
            break;
        }
        if !attached.ids.is_empty() {
            if attached.flags & BPF_F_ALLOW_OVERRIDE == 0 {
                return Some(level + 1);
            }
            break;
        }
    }
    (!own.ids.is_empty() && own.flags & BPF_F_ALLOW_MULTI == 0).then_some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_level_that_refuses() {
        let attached = |flags, n: u32| AttachedPrograms { flags, ids: (1..=n).collect() };
        let (none, alone, overridable) = (attached(0, 0), attached(0, 1), attached(1, 1));
        let many = attached(BPF_F_ALLOW_MULTI, 2);
        let rows: [(&[&AttachedPrograms], Option<usize>); 12] = [
            (&[], None),
            (&[&none], None),
            (&[&many], None),
            (&[&alone], Some(0)),
            (&[&overridable], Some(0)),
            (&[&none, &many, &alone], None),
            (&[&none, &alone], Some(1)),
            (&[&many, &alone], Some(1)),
            (&[&none, &overridable], None),
            (&[&alone, &overridable], Some(0)),
            (&[&none, &none, &alone], Some(2)),
            (&[&none, &overridable, &alone], None),
        ];
        for (levels, expected) in rows {
            let levels: Vec<_> = levels.iter().map(|&level| level.clone()).collect();
            assert_eq!(refusing_level(&levels), expected, "{levels:?}");
        }
    }

    #[test]
    fn it_is_named_with_the_fix() {
        let obstacle = Obstacle {
            cgroup: "/sys/fs/cgroup/a".into(),
            hook: "connect4",
            program_id: 7,
            name: Some("cil_sock4".to_owned()),
        };
        assert_eq!(
            format!("{obstacle}; {}", obstacle.fix()),
            "another program (cil_sock4, id 7) holds the hook connect4 of /sys/fs/cgroup/a \
             exclusively, so none can be attached there or below; have its owner attach it with \
             BPF_F_ALLOW_MULTI, or detach it: bpftool cgroup detach /sys/fs/cgroup/a connect4 id 7"
        );
    }
}
