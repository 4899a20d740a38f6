//! `nohop dns query`: shows a response and its origin.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::Context;
use hickory_proto::op::ResponseCode;

use super::target::ZoneServer;
use crate::admin::{api, client};
use crate::cli::args::ClientArguments;
use crate::daemon::view::lookup_document;
use crate::dns;

/// Queries the daemon, or the given server.
///
/// # Errors
/// When there is no response, or the name or the type is invalid.
pub fn query(
    name: &str,
    kind: &str,
    server: Option<SocketAddr>,
    arguments: &ClientArguments,
) -> anyhow::Result<api::DnsLookup> {
    dns::check_question(name, kind)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        if let Some(server) = server {
            let answer = dns::ask(server, name, kind).await?;
            return Ok(lookup_document(&answer, None));
        }
        let address = client::find(arguments.admin.as_deref(), &crate::cli::process::environment)?;
        Ok(client::get(&address, &client::lookup_path(name, kind)).await?)
    })
}

/// Verifies that nohop answers where a resolver is going to query it for the zone: it does from its
/// start, if only with SERVFAIL, and other resolvers have no such zone.
///
/// # Errors
/// When no server answers there, or another one.
pub(super) fn ask_zone(target: &ZoneServer) -> anyhow::Result<()> {
    let ZoneServer { local, domain, .. } = target;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let answer = runtime
        .block_on(dns::ask(*local, domain, "SOA"))
        .context("nothing was changed: start nohop first, or fix dns.listen")?;
    let code = answer.metadata.response_code;
    anyhow::ensure!(
        matches!(code, ResponseCode::NoError | ResponseCode::ServFail),
        "nothing was changed: {local} answers {code} for the zone {domain}, so it isn't nohop: see \
         who it is with ss -ulpn 'sport = :{}', and fix dns.listen",
        local.port()
    );
    Ok(())
}

/// The response as text: the records as `dig` shows them, and below them their meaning.
pub fn text(lookup: &api::DnsLookup) -> String {
    let mut text = String::new();
    // Writing to a string can't fail.
    let _ = writeln!(text, "{}  {}", lookup.question, lookup.code);
    for (section, records) in [
        ("answer", &lookup.answers),
        ("authority", &lookup.authorities),
        ("additional", &lookup.additionals),
    ] {
        for record in records {
            let _ = writeln!(text, "  {section:<10}  {record}");
        }
    }
    if let Some(origin) = &lookup.origin {
        let from = match (origin, &lookup.upstream, &lookup.reason) {
            (api::Origin::Kernel, ..) => "the kernel, from the table".to_owned(),
            (api::Origin::Table, _, Some(reason)) => format!("this server itself: {reason}"),
            (api::Origin::Table, ..) => "this server itself, from its table".to_owned(),
            (api::Origin::Upstream, Some(upstream), _) => format!("{upstream}, forwarded"),
            (api::Origin::Upstream, None, _) => "forwarded".to_owned(),
            (api::Origin::Nowhere, _, reason) => {
                format!("nowhere: {}", reason.as_deref().unwrap_or("not forwarded"))
            }
        };
        let _ = writeln!(text, "  from        {from}");
    }
    let name = lookup.question.split_once(". ").map_or("", |(name, _)| name);
    if lookup.answers.is_empty() && !["", "localhost"].contains(&name) && !name.contains('.') {
        let _ = writeln!(text, "  note        for a service query {name}.service (dns.domain)");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zone_without_a_server() {
        // A port that was free a moment ago, of an address that is otherwise unused.
        let socket = std::net::UdpSocket::bind("127.91.53.53:0").unwrap();
        let mut target =
            ZoneServer::of(&crate::config::Config::default(), std::path::Path::new("/"));
        target.local = socket.local_addr().unwrap();
        drop(socket);
        let error = format!("{:#}", ask_zone(&target).unwrap_err());
        assert!(error.contains("nothing was changed: start nohop first"), "{error}");
        assert!(error.contains("no server listens there"), "{error}");
    }

    #[test]
    fn for_people() {
        let lookup = |origin, upstream: Option<&str>, reason: Option<&str>| api::DnsLookup {
            question: "web.service. IN A".to_owned(),
            code: "NOERROR".to_owned(),
            answers: vec!["web.service. 30 IN A 127.128.0.1".to_owned()],
            authorities: Vec::new(),
            additionals: Vec::new(),
            origin,
            upstream: upstream.map(str::to_owned),
            reason: reason.map(str::to_owned),
        };
        let head = "web.service. IN A  NOERROR\n  answer      web.service. 30 IN A 127.128.0.1\n";
        let rows = [
            (lookup(None, None, None), ""),
            (
                lookup(Some(api::Origin::Table), None, None),
                "  from        this server itself, from its table\n",
            ),
            (
                lookup(Some(api::Origin::Table), None, Some("Consul hangs")),
                "  from        this server itself: Consul hangs\n",
            ),
            (
                lookup(Some(api::Origin::Upstream), Some("192.0.2.1:53"), None),
                "  from        192.0.2.1:53, forwarded\n",
            ),
            (
                lookup(Some(api::Origin::Nowhere), None, Some("too many")),
                "  from        nowhere: too many\n",
            ),
        ];
        for (lookup, expected) in rows {
            assert_eq!(text(&lookup), format!("{head}{expected}"));
        }
        let bare = api::DnsLookup {
            question: "web. IN A".to_owned(),
            answers: Vec::new(),
            ..lookup(None, None, None)
        };
        assert!(
            text(&bare).ends_with("  note        for a service query web.service (dns.domain)\n")
        );
    }
}
