//! `nohop drain`, `nohop undrain`

use std::process::ExitCode;

use super::args::ClientArguments;
use super::process::{FAILURE, environment, print, print_error, runtime};
use crate::admin::api::{DrainChange, DrainStatus};
use crate::admin::client;
use crate::counted::counted;

/// Lists what is drained.
pub fn list(client: &ClientArguments) -> anyhow::Result<()> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let drains: Vec<DrainStatus> = runtime()?.block_on(client::get(&address, "/v1/drain"))?;
    print(client, &drains, |drains| text(drains))
}

/// Drains what is named, or undrains it, and shows the result.
pub fn change(is_drain: bool, target: &str, client: &ClientArguments) -> anyhow::Result<ExitCode> {
    let address = client::find(client.admin.as_deref(), &environment)?;
    let path = client::drain_path(is_drain, target);
    let change: DrainChange = runtime()?.block_on(client::post(&address, &path))?;
    if client.json || change.ok {
        print(client, &change, |change| sentence(change) + "\n")?;
    }
    if !client.json {
        let problem = change.problem.iter().map(|problem| format!("error: {problem}"));
        let warnings = change.warnings.iter().map(|warning| format!("warning: {warning}"));
        problem.chain(warnings).for_each(|line| print_error(&line));
    }
    Ok(if change.ok { ExitCode::SUCCESS } else { ExitCode::from(FAILURE) })
}

fn text(drains: &[DrainStatus]) -> String {
    if drains.is_empty() {
        return "nothing is drained by hand\n".to_owned();
    }
    let lines = drains.iter().map(|drain| {
        let DrainStatus { kind, name, since, services, backends, in_flight } = drain;
        let covers = match (backends, &services[..]) {
            (0, _) => "no backend now".to_owned(),
            (n, [service]) => format!("{} of {service}", counted(*n, "backend")),
            (n, services) => format!("{} of {} services", counted(*n, "backend"), services.len()),
        };
        let open = in_flight.map(|n| format!(", {} open", counted(n, "connection")));
        if kind == "edge" {
            return format!("edge  since {since}  its public VIPs aren't announced\n");
        }
        format!("{kind}:{name}  since {since}  {covers}{}\n", open.unwrap_or_default())
    });
    lines.collect()
}

fn sentence(change: &DrainChange) -> String {
    let what =
        [&change.kind, &change.name].map(|part| part.as_deref().unwrap_or_default()).join(" ");
    let since = change.since.as_deref().unwrap_or_default();
    if change.kind.as_deref() == Some("edge") {
        return match (change.drained, change.changed) {
            (true, true) => {
                "this edge no longer announces its public VIPs; open flows continue, see \
                             `nohop flows`"
                    .to_owned()
            }
            (true, false) => format!("this edge is drained already, since {since}"),
            (false, true) => "this edge announces its public VIPs again".to_owned(),
            (false, false) => "this edge isn't drained".to_owned(),
        };
    }
    let (backends, services) =
        (counted(change.backends, "backend"), counted(change.services, "service"));
    match (change.drained, change.changed) {
        (true, true) => {
            format!("{what} is drained: no new connections from here to {backends} of {services}")
        }
        (true, false) => format!("{what} is drained already, since {since}"),
        (false, true) => format!("{what} isn't drained any more: {backends} of {services}"),
        (false, false) => format!("{what} isn't drained"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drains_are_one_line_each() {
        assert_eq!(text(&[]), "nothing is drained by hand\n");
        let drain = DrainStatus {
            kind: "node".into(),
            name: "n1".into(),
            since: "2026-11-29T10:30:00Z".into(),
            services: vec!["web".into()],
            backends: 1,
            in_flight: Some(3),
        };
        let two = DrainStatus {
            services: vec!["web".into(), "api".into()],
            backends: 2,
            in_flight: None,
            ..drain.clone()
        };
        let gone =
            DrainStatus { services: vec![], backends: 0, in_flight: Some(0), ..drain.clone() };
        let since = "node:n1  since 2026-11-29T10:30:00Z  ";
        assert_eq!(
            text(&[drain, two, gone]),
            format!(
                "{since}1 backend of web, 3 connections open\n\
                 {since}2 backends of 2 services\n\
                 {since}no backend now, 0 connections open\n"
            )
        );
    }

    #[test]
    fn a_change_is_one_sentence() {
        let change = |changed, drained| DrainChange {
            ok: true,
            changed,
            drained,
            kind: Some("instance".into()),
            name: Some("n1/web".into()),
            since: Some("2026-11-29T10:30:00Z".into()),
            services: 1,
            backends: 2,
            ..DrainChange::default()
        };
        for (changed, drained, expected) in [
            (true, true, "is drained: no new connections from here to 2 backends of 1 service"),
            (false, true, "is drained already, since 2026-11-29T10:30:00Z"),
            (true, false, "isn't drained any more: 2 backends of 1 service"),
            (false, false, "isn't drained"),
        ] {
            assert_eq!(sentence(&change(changed, drained)), format!("instance n1/web {expected}"));
        }
    }
}
