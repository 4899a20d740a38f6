//! The name under which people know an instance.

/// The prefix of Nomad's ids of instances (`makeAllocServiceID` in nomad's
/// command/agent/consul/service_client.go); an allocation's UUID follows.
const PREFIX: &str = "_nomad-task-";

/// The length of a UUID's text.
const UUID: usize = 36;

/// `alloc 39e25890 web`, the allocation's short id and its group or task, for an instance of
/// `service` that Nomad registered; the id of other instances.
///
/// The parts of an id are joined by hyphens and may contain hyphens, so the service's name separates
/// them.
pub fn display_name(id: &str, service: &str) -> String {
    nomad(id, service).unwrap_or_else(|| id.to_owned())
}

/// A text about instances of `service`, such as a reason, with that name in the place of each of Nomad's
/// ids.
pub fn with_display_names(text: &str, service: &str) -> String {
    let (mut named, mut rest) = (String::new(), text);
    let is_end =
        |character: char| matches!(character, '`' | ',' | ';') || character.is_whitespace();
    while let Some(begin) = rest.find(PREFIX) {
        let (before, id) = rest.split_at(begin);
        let (id, after) = id.split_at(id.find(is_end).unwrap_or(id.len()));
        named += before;
        named += &display_name(id, service);
        rest = after;
    }
    named + rest
}

/// The short id of an allocation, as Nomad's own tools show it: the first eight digits.
pub fn short_allocation(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

/// The UUID of the allocation that registered an instance of this id.
pub fn allocation(id: &str) -> Option<&str> {
    parts(id).map(|(uuid, _)| uuid)
}

/// The UUID of an allocation, and what follows it and a hyphen.
fn parts(id: &str) -> Option<(&str, &str)> {
    let (uuid, rest) = id.strip_prefix(PREFIX)?.split_at_checked(UUID)?;
    Some((uuid, rest.strip_prefix('-')?)).filter(|_| is_uuid(uuid))
}

/// Whether a text is a UUID, as of an allocation.
pub fn is_uuid(text: &str) -> bool {
    text.len() == UUID
        && text.bytes().enumerate().all(|(at, octet)| match at {
            8 | 13 | 18 | 23 => octet == b'-',
            _ => octet.is_ascii_hexdigit(),
        })
}

fn nomad(id: &str, service: &str) -> Option<String> {
    let (alloc, rest) = parts(id)?;
    let short = short_allocation(alloc);
    // A group's service, or one of a task that may be called `group` itself.
    let owner = rest
        .strip_prefix("group-")
        .and_then(|rest| before_service(rest, service))
        .or_else(|| before_service(rest, service));
    Some(match owner {
        Some(owner) => format!("alloc {short} {owner}"),
        None => format!("alloc {short}"),
    })
}

/// The part before `-SERVICE-PORT`; the service's name in any case, the port's label may be empty.
fn before_service<'a>(text: &'a str, service: &str) -> Option<&'a str> {
    let wanted = format!("-{}-", service.to_ascii_lowercase());
    let at = text.to_ascii_lowercase().rfind(&wanted)?;
    text.get(..at).filter(|owner| !owner.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_within_texts_are_named_too() {
        let [one, two] =
            ["39e25890-23fb-7513-b98f-97a5310046ad", "0fb48a2c-23fb-7513-b98f-97a5310046ad"]
                .map(|alloc| format!("{PREFIX}{alloc}-group-web-hello-http"));
        let rows = [
            (
                format!("also registered as `c1/{one}`, `c2/{two}`"),
                "also registered as `c1/alloc 39e25890 web`, `c2/alloc 0fb48a2c web`",
            ),
            (
                format!("the ports given by `{one}` and 2 more are ignored: no"),
                "the ports given by `alloc 39e25890 web` and 2 more are ignored: no",
            ),
            (format!("{one} is odd"), "alloc 39e25890 web is odd"),
            (format!("as instance:n1/{one}; too"), "as instance:n1/alloc 39e25890 web; too"),
            (one.clone(), "alloc 39e25890 web"),
            (format!("`{PREFIX}` and `web-1`"), "`_nomad-task-` and `web-1`"),
            (String::new(), ""),
        ];
        for (text, expected) in rows {
            assert_eq!(with_display_names(&text, "hello"), expected);
        }
    }

    #[test]
    fn instances_of_nomad_are_allocations() {
        const ALLOC: &str = "39e25890-23fb-7513-b98f-97a5310046ad";
        for (rest, service, expected) in [
            ("group-web-helloworld-http", "helloworld", "alloc 39e25890 web"),
            ("group-web-api-hello-world-http", "hello-world", "alloc 39e25890 web-api"),
            ("group-api-api-api", "api", "alloc 39e25890 api"),
            ("group-web-HelloWorld-http", "helloworld", "alloc 39e25890 web"),
            ("group-web-helloworld-", "helloworld", "alloc 39e25890 web"),
            ("server-redis-db", "redis", "alloc 39e25890 server"),
            ("group-web-http", "web", "alloc 39e25890 group"),
            ("group-web-other-http", "helloworld", "alloc 39e25890"),
            ("group-wéb-helloworld-http", "helloworld", "alloc 39e25890 wéb"),
        ] {
            let id = format!("_nomad-task-{ALLOC}-{rest}");
            assert_eq!(display_name(&id, service), expected, "{id}");
        }
        for id in [
            "web-1",
            "",
            "_nomad-task-",
            "_nomad-task-39e25890",
            "_nomad-task-39e25890-23fb-7513-b98f-97a5310046ad",
            "_nomad-task-39e25890x23fb-7513-b98f-97a5310046ad-group-web-web-http",
            "_nomad-task-39e25890-23fb-7513-b98f-97a531004\u{e9}d-group-web-web-http",
            "_nomad-server-abcdefgh-nomad-http",
        ] {
            assert_eq!(display_name(id, "web"), id);
        }
    }
}
