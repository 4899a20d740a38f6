//! The endpoint of a request.

use std::time::Duration;

use hyper::Method;

use super::page::{self, Asset};
use super::query::{decode, encode};
use super::trace::TraceFilter;

/// The routes, for the response to an unknown one.
pub(super) const ROUTES: &str = "\
GET /
GET /v1/status
GET /v1/services
GET /v1/services/NAME
GET /v1/stream
GET /v1/config
GET /v1/dns?name=NAME&type=TYPE
GET /v1/trace
GET /v1/flows
POST /v1/reload
GET /v1/drain
POST /v1/drain?target=TARGET
POST /v1/undrain?target=TARGET
GET /v1/log
POST /v1/log?filter=FILTER
GET /metrics
GET /healthz
GET /readyz
GET /readyz/edge
GET answers HEAD, too, except for /v1/dns, /v1/trace and /v1/stream. /v1/dns and POST are answered on the unix socket only, /v1/trace and /v1/flows
over TCP only with admin.trace = \"tcp\". On the others of /v1, ?after=REVISION (of X-Nohop-Revision,
or of `revision` in the status) answers once anything has changed since, or after &wait=SECONDS (60 by
default, at most 600; over TCP at most 60).
";

/// How long `?after=` waits without `wait`.
const DEFAULT_WAIT: Duration = Duration::from_secs(60);
/// The greatest `wait`, in seconds.
const MAX_WAIT_SECONDS: u64 = 600;

/// A resource or an action.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Endpoint {
    Status,
    Services,
    Explain(String),
    Stream,
    Config,
    /// A file of the page for browsers.
    Page(&'static Asset),
    LookUp {
        name: String,
        kind: String,
    },
    Trace(TraceFilter),
    Reload,
    Drains,
    Drain(String),
    Undrain(String),
    Log,
    SetLog(String),
    Metrics,
    Health,
    Ready,
    EdgeReady,
    Flows {
        by_bytes: bool,
        limit: usize,
    },
}

impl Endpoint {
    /// Whether its document is small, however many services and backends there are.
    pub(super) fn is_small(&self) -> bool {
        matches!(self, Endpoint::Status | Endpoint::Health | Endpoint::Ready | Endpoint::EdgeReady)
    }

    /// Whether it has effects: a lookup queries Consul and other resolvers, and ignores `dns.allow`.
    pub(super) fn has_effects(&self) -> bool {
        matches!(
            self,
            Endpoint::Reload
                | Endpoint::Drain(_)
                | Endpoint::Undrain(_)
                | Endpoint::SetLog(_)
                | Endpoint::LookUp { .. }
        )
    }

    /// Whether it shows who connects: a trace has programs report each connection, with its process.
    pub(super) fn shows_clients(&self) -> bool {
        matches!(self, Endpoint::Trace(_) | Endpoint::Flows { .. })
    }
}

/// When to answer: once something has changed since a revision (see [`super::At::is_past`]), or when
/// the time is over.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wait {
    pub(super) after: u64,
    pub(super) limit: Duration,
}

/// Why a request can't be answered.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum EndpointError {
    #[error("only {0} is allowed here")]
    Method(&'static str),
    #[error("not allowed over TCP: use the unix socket")]
    UnixOnly,
    #[error("not allowed over TCP: use the unix socket, or set admin.trace = \"tcp\" and reload")]
    Clients,
    #[error("no such path. The routes are:\n{ROUTES}")]
    Path,
    #[error("{name}: '{value}' is invalid; {fix}")]
    Query { name: String, value: String, fix: &'static str },
}

/// Reads method, path and query.
pub(super) fn route(
    method: &Method,
    path: &str,
    query: Option<&str>,
) -> Result<(Endpoint, Option<Wait>), EndpointError> {
    if let Some(asset) = page::find(path) {
        // The page keeps what it shows in the query.
        return match is_get(method) {
            true => Ok((Endpoint::Page(asset), None)),
            false => Err(EndpointError::Method("GET, HEAD")),
        };
    }
    let route = match path {
        "/v1/stream" if *method == Method::GET => return Ok((Endpoint::Stream, None)),
        "/v1/stream" => return Err(EndpointError::Method("GET")),
        "/v1/config" => Endpoint::Config,
        "/v1/status" => Endpoint::Status,
        "/v1/services" => Endpoint::Services,
        "/v1/dns" if *method == Method::GET => {
            return Ok((look_up(query.unwrap_or_default())?, None));
        }
        "/v1/trace" if *method == Method::GET => {
            let filter = TraceFilter::parse(query.unwrap_or_default());
            let wrong = |(name, value, fix)| EndpointError::Query { name, value, fix };
            return Ok((Endpoint::Trace(filter.map_err(wrong)?), None));
        }
        "/v1/flows" if is_get(method) => return Ok((flows(query.unwrap_or_default())?, None)),
        "/v1/dns" | "/v1/trace" => return Err(EndpointError::Method("GET")),
        "/v1/reload" => Endpoint::Reload,
        "/v1/drain" if *method == Method::POST => {
            return Ok((Endpoint::Drain(target(query)?), None));
        }
        "/v1/drain" => Endpoint::Drains,
        "/v1/undrain" if *method == Method::POST => {
            return Ok((Endpoint::Undrain(target(query)?), None));
        }
        "/v1/log" if *method == Method::POST => {
            return Ok((Endpoint::SetLog(filter(query)?), None));
        }
        "/v1/log" => Endpoint::Log,
        "/v1/undrain" => return Err(EndpointError::Method("POST")),
        "/metrics" => Endpoint::Metrics,
        "/healthz" => Endpoint::Health,
        "/readyz" => Endpoint::Ready,
        "/readyz/edge" => Endpoint::EdgeReady,
        "/v1/flows" => return Err(EndpointError::Method("GET, HEAD")),
        _ => match path.strip_prefix("/v1/services/") {
            Some(name) if !name.is_empty() && !name.contains('/') => {
                Endpoint::Explain(decode(name))
            }
            _ => return Err(EndpointError::Path),
        },
    };
    let (is_allowed, allowed) = match route {
        Endpoint::Drains | Endpoint::Log => (is_get(method), "GET, HEAD, POST"),
        Endpoint::Reload => (*method == Method::POST, "POST"),
        _ => (is_get(method), "GET, HEAD"),
    };
    if !is_allowed {
        return Err(EndpointError::Method(allowed));
    }
    if matches!(route, Endpoint::Metrics) {
        // Prometheus may be configured to add parameters.
        return Ok((route, None));
    }
    Ok((route, wait(query.unwrap_or_default())?))
}

fn is_get(method: &Method) -> bool {
    *method == Method::GET || *method == Method::HEAD
}

/// The longest target of a drain, in bytes: longer than any name that it could be of.
const MAX_TARGET: usize = 512;

/// The target of a drain or an undrain.
fn target(query: Option<&str>) -> Result<String, EndpointError> {
    let query = query.unwrap_or_default();
    let is_target = |target: &&str| target.len() <= MAX_TARGET && !target.contains('&');
    query.strip_prefix("target=").filter(is_target).map(decode).ok_or_else(|| {
        let fix = "write target=TARGET: a node, an address, an instance, an allocation or `edge`";
        EndpointError::Query { name: "query".into(), value: query.into(), fix }
    })
}

/// The filter of the log.
fn filter(query: Option<&str>) -> Result<String, EndpointError> {
    let query = query.unwrap_or_default();
    let is_filter = |filter: &&str| filter.len() <= MAX_TARGET && !filter.contains('&');
    query.strip_prefix("filter=").filter(is_filter).map(decode).ok_or_else(|| {
        let fix = "write filter=FILTER: a level, or MODULE=LEVEL, separated by commas";
        EndpointError::Query { name: "query".into(), value: query.into(), fix }
    })
}

/// The flows that one answer has without `limit`, and at most.
const FLOWS: usize = 100;
const MAX_FLOWS: usize = 10_000;

fn flows(query: &str) -> Result<Endpoint, EndpointError> {
    let (mut by_bytes, mut limit) = (false, FLOWS);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wrong = |fix| EndpointError::Query { name: name.into(), value: value.into(), fix };
        match (name, value) {
            ("by", "bytes") => by_bytes = true,
            ("by", "time") => by_bytes = false,
            ("by", _) => return Err(wrong("write bytes or time")),
            ("limit", number) => {
                let number = number.parse().ok().filter(|number| (1..=MAX_FLOWS).contains(number));
                limit = number.ok_or_else(|| wrong("write a number from 1 to 10000"))?;
            }
            _ => return Err(wrong("the query may hold by and limit")),
        }
    }
    Ok(Endpoint::Flows { by_bytes, limit })
}

fn look_up(query: &str) -> Result<Endpoint, EndpointError> {
    let (mut name, mut kind) = (None, "A".to_owned());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("name", value) => name = Some(decode(value)),
            ("type", value) => kind = decode(value),
            (name, value) => {
                let fix = "the query may hold name and type";
                return Err(EndpointError::Query { name: name.into(), value: value.into(), fix });
            }
        }
    }
    let fix = "write the name to look up";
    let name = name.ok_or(EndpointError::Query { name: "name".into(), value: "".into(), fix })?;
    Ok(Endpoint::LookUp { name, kind })
}

fn wait(query: &str) -> Result<Option<Wait>, EndpointError> {
    let (mut after, mut limit) = (None, DEFAULT_WAIT);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let wrong =
            |fix| EndpointError::Query { name: name.to_owned(), value: value.to_owned(), fix };
        let number = value.parse::<u64>();
        match name {
            "after" => after = Some(number.map_err(|_| wrong("write a revision"))?),
            "wait" => match number {
                Ok(seconds) if seconds <= MAX_WAIT_SECONDS => limit = Duration::from_secs(seconds),
                _ => return Err(wrong("write seconds, 0 to 600")),
            },
            _ => return Err(wrong("the query may hold after and wait")),
        }
    }
    Ok(after.map(|after| Wait { after, limit }))
}

/// The path that explains a name, whatever characters it has.
pub fn explain_path(name: &str) -> String {
    format!("/v1/services/{}", encode(name))
}

/// The path that looks a name up.
pub fn lookup_path(name: &str, kind: &str) -> String {
    format!("/v1/dns?name={}&type={}", encode(name), encode(kind))
}

/// The path that sets the filter of the log.
pub fn log_path(filter: &str) -> String {
    format!("/v1/log?filter={}", encode(filter))
}

/// The path that drains what a text names, or undrains it.
pub fn drain_path(is_drain: bool, target: &str) -> String {
    let change = if is_drain { "drain" } else { "undrain" };
    format!("/v1/{change}?target={}", encode(target))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn requests_and_their_endpoints() {
        let seconds = Duration::from_secs;
        let table = [
            ("/v1/status", None, Some((Endpoint::Status, None))),
            ("/v1/services", Some(""), Some((Endpoint::Services, None))),
            ("/v1/services/web", None, Some((Endpoint::Explain("web".into()), None))),
            ("/v1/services/a%20%c3%a9%", None, Some((Endpoint::Explain("a é%".into()), None))),
            (
                "/v1/dns",
                Some("name=web.service&type=SRV"),
                Some((Endpoint::LookUp { name: "web.service".into(), kind: "SRV".into() }, None)),
            ),
            (
                "/v1/dns",
                Some("name=a%2e"),
                Some((Endpoint::LookUp { name: "a.".into(), kind: "A".into() }, None)),
            ),
            ("/v1/trace", None, Some((Endpoint::Trace(TraceFilter::default()), None))),
            ("/v1/trace", Some("after=1"), None),
            ("/v1/dns", None, None),
            ("/v1/dns", Some("type=A"), None),
            ("/v1/dns", Some("name=a&after=1"), None),
            ("/metrics", None, Some((Endpoint::Metrics, None))),
            ("/metrics", Some("collect=all"), Some((Endpoint::Metrics, None))),
            ("/healthz", None, Some((Endpoint::Health, None))),
            ("/readyz", None, Some((Endpoint::Ready, None))),
            ("/readyz/edge", None, Some((Endpoint::EdgeReady, None))),
            ("/v1/flows", None, Some((Endpoint::Flows { by_bytes: false, limit: FLOWS }, None))),
            (
                "/v1/flows",
                Some("by=bytes&limit=20"),
                Some((Endpoint::Flows { by_bytes: true, limit: 20 }, None)),
            ),
            ("/v1/flows", Some("limit=0"), None),
            ("/v1/flows", Some("by=age"), None),
            (
                "/v1/status",
                Some("after=4"),
                Some((Endpoint::Status, Some(Wait { after: 4, limit: seconds(60) }))),
            ),
            (
                "/v1/services",
                Some("wait=600&after=0"),
                Some((Endpoint::Services, Some(Wait { after: 0, limit: seconds(600) }))),
            ),
            ("/v1/status", Some("wait=601"), None),
            ("/v1/status", Some("after=-1"), None),
            ("/v1/status", Some("after"), None),
            ("/v1/status", Some("since=3"), None),
            ("/v1/services/", None, None),
            ("/v1/services/a/b", None, None),
            ("/v1/stream", None, Some((Endpoint::Stream, None))),
            ("/v1/config", None, Some((Endpoint::Config, None))),
            ("/", None, page::find("/").map(|asset| (Endpoint::Page(asset), None))),
            ("/", Some("view=x"), page::find("/").map(|asset| (Endpoint::Page(asset), None))),
            ("/index.html", None, None),
            ("/vendor/", None, None),
            ("/vendor/../page.mjs", None, None),
            ("", None, None),
        ];
        for (path, query, expected) in table {
            let found = route(&Method::GET, path, query).ok();
            assert_eq!(found, expected, "{path}?{query:?}");
        }
    }

    #[test]
    fn each_path_has_one_method() {
        let only = |method| Err(EndpointError::Method(method));
        assert_eq!(route(&Method::POST, "/healthz", None), only("GET, HEAD"));
        assert_eq!(route(&Method::GET, "/v1/reload", None), only("POST"));
        assert_eq!(route(&Method::POST, "/v1/reload", None), Ok((Endpoint::Reload, None)));
        assert_eq!(route(&Method::HEAD, "/metrics", None), Ok((Endpoint::Metrics, None)));
        assert_eq!(route(&Method::POST, "/", None), only("GET, HEAD"));
        assert_eq!(route(&Method::HEAD, "/v1/stream", None), only("GET"));
        assert_eq!(route(&Method::HEAD, "/v1/dns", Some("name=a")), only("GET"));
        assert_eq!(route(&Method::GET, "/v1/log", None), Ok((Endpoint::Log, None)));
        let set = Endpoint::SetLog("info,a=b".into());
        assert_eq!(route(&Method::POST, "/v1/log", Some("filter=info%2Ca%3Db")), Ok((set, None)));
        assert!(route(&Method::POST, "/v1/log", None).is_err());
        assert_eq!(route(&Method::POST, "/nowhere", None), Err(EndpointError::Path));
    }

    #[test]
    fn methods_are_those_of_the_page() {
        let page = include_str!("../../../docs/api.md");
        let mut documented: BTreeMap<&str, String> = BTreeMap::new();
        for line in page.lines().filter(|line| line.starts_with("| `/")) {
            let [_, paths, methods, _] = line.splitn(4, '|').collect::<Vec<_>>()[..] else {
                panic!("{line}")
            };
            for path in paths.split('`').filter(|word| word.starts_with('/')) {
                let path = path.split('?').next().unwrap_or(path);
                *documented.entry(path).or_default() += methods;
            }
        }
        assert!(documented.len() > 15, "{documented:?}");
        for (path, methods) in documented {
            for method in [Method::GET, Method::HEAD, Method::POST, Method::DELETE] {
                let is_allowed =
                    !matches!(route(&method, path, None), Err(EndpointError::Method(_)));
                assert_eq!(is_allowed, methods.contains(method.as_str()), "{method} {path}");
            }
        }
    }

    #[test]
    fn any_name_has_a_path() {
        for name in ["web", "a b/c?d#e%41", "é", "\u{1b}[31m"] {
            let path = explain_path(name);
            let (found, _) = route(&Method::GET, &path, None).unwrap();
            assert_eq!(found, Endpoint::Explain(name.to_owned()));
            let path = lookup_path(name, "A");
            let (path, query) = path.split_once('?').unwrap();
            let (found, _) = route(&Method::GET, path, Some(query)).unwrap();
            assert_eq!(found, Endpoint::LookUp { name: name.to_owned(), kind: "A".into() });
        }
    }
}
