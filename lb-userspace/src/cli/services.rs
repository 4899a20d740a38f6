//! `nohop services`: all of them or some, once or as they change.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::runtime::Runtime;

use super::args::{ClientArguments, ServicesArguments};
use super::columns::Palette;
use super::format;
use super::process::{
    ANSWER, LONGEST_WAIT, end_when_unread, environment, print, print_error, runtime, show_line,
};
use crate::admin::api::{ServiceStatus, Status};
use crate::admin::client::{self, ClientError};
use crate::config::AdminAddress;
use crate::counted::counted;

/// The least time between two readings of all services, however often some change.
const PAUSE: Duration = Duration::from_millis(200);

/// How long the daemon may be away, as for a restart.
const RESTART: Duration = Duration::from_secs(30);

/// Lists the services, and with `--watch` follows them until the output is closed or the daemon stays away.
pub fn run(arguments: &ServicesArguments, client: &ClientArguments) -> anyhow::Result<()> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let runtime = runtime()?;
    let palette = Palette::of_stdout(arguments.text.color);
    if arguments.watch {
        return watch(arguments, client.json, palette, &address, &runtime);
    }
    let services: Vec<ServiceStatus> = runtime.block_on(client::get(&address, "/v1/services"))?;
    let n_all = services.len();
    let services = chosen(services, arguments);
    print(client, &services, |services| match services.is_empty() && n_all > 0 {
        true => format!("none of {} matches\n", counted(n_all, "service")),
        false => format::services(services, palette),
    })
}

/// The services that the arguments are for, with the backends that they are for.
fn chosen(services: Vec<ServiceStatus>, arguments: &ServicesArguments) -> Vec<ServiceStatus> {
    let is_chosen = |service: &ServiceStatus| match &arguments.pattern {
        Some(pattern) => matches(&pattern.to_lowercase(), &service.name.to_lowercase()),
        None => true,
    };
    let with_backends = |mut service: ServiceStatus| {
        if let Some(state) = &arguments.state {
            service.backends.retain(|backend| format::state_name(backend.state) == *state);
        }
        (arguments.state.is_none() || !service.backends.is_empty()).then_some(service)
    };
    services.into_iter().filter(is_chosen).filter_map(with_backends).collect()
}

/// Whether a pattern matches: `*` stands for any text and `?` for one character; without either the
/// pattern may be any part of the name.
fn matches(pattern: &str, name: &str) -> bool {
    if !pattern.contains(['*', '?']) {
        return name.contains(pattern);
    }
    // The pattern from each `*` on is tried at later and later places.
    let (pattern, name): (Vec<_>, Vec<_>) = (pattern.chars().collect(), name.chars().collect());
    let (mut at, mut of_name, mut star) = (0, 0, None);
    while of_name < name.len() {
        match pattern.get(at) {
            Some('*') => {
                at += 1;
                star = Some((at, of_name));
            }
            Some(&character) if character == '?' || character == name[of_name] => {
                (at, of_name) = (at + 1, of_name + 1);
            }
            _ => match star {
                Some((after, start)) => {
                    (at, of_name) = (after, start + 1);
                    star = Some((after, start + 1));
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|character| *character == '*')
}

/// What is followed of a service: all but its counters and countdowns.
fn lasting(service: &ServiceStatus) -> ServiceStatus {
    let mut lasting = ServiceStatus { generation: 0, ..service.without_counts() };
    for backend in &mut lasting.backends {
        backend.reason = backend.reason.as_deref().map(without_times);
    }
    lasting
}

/// A reason without the times in it, such as `ejected for 3 s more`.
fn without_times(reason: &str) -> String {
    let mut words = reason.split(' ').peekable();
    let mut lasting = String::with_capacity(reason.len());
    while let Some(word) = words.next() {
        let is_number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        let unit = words.peek().map(|next| next.trim_end_matches([':', ';', ',', ')']));
        if is_number && matches!(unit, Some("s" | "ms" | "seconds")) {
            words.next();
            continue;
        }
        lasting += word;
        lasting.push(' ');
    }
    lasting
}

/// Prints the services, and again those that changed, each time some do.
fn watch(
    arguments: &ServicesArguments,
    json: bool,
    palette: Palette,
    address: &AdminAddress,
    runtime: &Runtime,
) -> anyhow::Result<()> {
    end_when_unread();
    let mut known: Option<BTreeMap<String, ServiceStatus>> = None;
    let mut path = "/v1/status".to_owned();
    let mut lost_since = None;
    loop {
        let (status, services) = match runtime.block_on(next(address, &path)) {
            Ok(read) => read,
            Err(error) if known.is_some() && error.is_transient() => {
                let since = *lost_since.get_or_insert_with(|| {
                    print_error(&format!("{error}; trying again for {} s", RESTART.as_secs()));
                    Instant::now()
                });
                if since.elapsed() >= RESTART {
                    return Err(error.into());
                }
                path = "/v1/status".to_owned();
                // There is no event for a socket that doesn't exist yet.
                std::thread::sleep(PAUSE);
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        lost_since = None;
        path = format!("/v1/status?after={}&wait={}", status.revision, LONGEST_WAIT.as_secs());
        let services = chosen(services, arguments);
        let now: BTreeMap<_, _> =
            services.iter().map(|service| (service.name.clone(), lasting(service))).collect();
        let before = known.replace(now);
        let now = known.as_ref().context("what was just read")?;
        let is_first = before.is_none();
        let before = before.unwrap_or_default();
        let changed: Vec<ServiceStatus> = services
            .into_iter()
            .filter(|service| before.get(&service.name) != now.get(&service.name))
            .collect();
        let gone: Vec<String> = before.into_keys().filter(|name| !now.contains_key(name)).collect();
        let change = Change { services: changed, gone };
        let is_change = is_first || !change.services.is_empty() || !change.gone.is_empty();
        if is_change && !show_line(json, &change, |change| text(change, palette))? {
            return Ok(());
        }
        std::thread::sleep(PAUSE);
    }
}

/// What changed at a time.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Change {
    /// The services that are new or changed.
    services: Vec<ServiceStatus>,
    /// The names that are no longer among those.
    gone: Vec<String>,
}

fn text(change: &Change, palette: Palette) -> String {
    let mut text = match change.services.is_empty() && !change.gone.is_empty() {
        true => String::new(),
        false => format::services(&change.services, palette),
    };
    text.extend(change.gone.iter().map(|name| format!("{name}  no longer listed\n")));
    text
}

/// The status once it has changed, or after [`LONGEST_WAIT`], and the services as they are then.
async fn next(
    address: &AdminAddress,
    path: &str,
) -> Result<(Status, Vec<ServiceStatus>), ClientError> {
    let status = client::get_within(address, path, LONGEST_WAIT + ANSWER).await?;
    Ok((status, client::get(address, "/v1/services").await?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn countdowns_are_no_change() {
        let one = "ejected for 4 s more: 1 refused connect";
        for (other, is_same) in [
            ("ejected for 3 s more: 1 refused connect", true),
            ("ejected for 200 ms more: 1 refused connect", true),
            ("ejected for 4 s more: 2 refused connects", false),
            ("ejected until the next connection succeeds: 1 refused connect", false),
        ] {
            assert_eq!(without_times(one) == without_times(other), is_same, "{other}");
        }
    }

    #[test]
    fn patterns_match_names() {
        for (pattern, name, expected) in [
            ("web", "web", true),
            ("eb", "my-web-1", true),
            ("web", "api", false),
            ("web*", "web-1", true),
            ("web*", "my-web", false),
            ("*web", "my-web", true),
            ("*web", "web-1", false),
            ("w?b", "web", true),
            ("w?b", "weeb", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b*", "xxbxxaxx", false),
            ("*ab", "aab", true),
            ("*", "", true),
            ("?", "", false),
            ("ä?", "äö", true),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
