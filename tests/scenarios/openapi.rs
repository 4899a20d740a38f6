//! docs/openapi.json against a running daemon: it has each route, and each answer is as its schema has
//! it, key by key. The schemas use few words of JSON Schema, so what reads them here is small.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use testbed::consul::program;
use testbed::http::{self, Answer};

use crate::cluster::Cluster;

const DOCUMENT: &str = include_str!("../../docs/openapi.json");

/// Requests, each with the path in the document and the status of the answer.
const REQUESTS: [(&str, &str, &str, u16); 29] = [
    ("GET", "/", "/", 200),
    ("GET", "/v1/config", "/v1/config", 200),
    ("GET", "/v1/status", "/v1/status", 200),
    ("GET", "/v1/services", "/v1/services", 200),
    ("GET", "/v1/services/{name}", "/v1/services/helloworld", 200),
    ("GET", "/v1/services/{name}", "/v1/services/nothing", 404),
    ("GET", "/v1/dns", "/v1/dns?name=helloworld.service", 200),
    ("GET", "/v1/dns", "/v1/dns?name=www.example.com&type=AAAA", 200),
    ("GET", "/v1/dns", "/v1/dns", 400),
    ("GET", "/v1/flows", "/v1/flows?by=bytes", 404),
    ("POST", "/v1/drain", "/v1/drain?target=helloworld-0", 200),
    ("POST", "/v1/drain", "/v1/drain?target=helloworld-9", 400),
    ("GET", "/v1/drain", "/v1/drain", 200),
    ("POST", "/v1/undrain", "/v1/undrain?target=helloworld-0", 200),
    ("POST", "/v1/undrain", "/v1/undrain?target=helloworld-9", 400),
    ("POST", "/v1/log", "/v1/log?filter=debug", 200),
    ("POST", "/v1/log", "/v1/log?filter=louder", 400),
    ("GET", "/v1/log", "/v1/log", 200),
    ("POST", "/v1/reload", "/v1/reload", 200),
    ("GET", "/metrics", "/metrics", 200),
    ("GET", "/healthz", "/healthz", 200),
    ("GET", "/readyz", "/readyz", 200),
    ("GET", "/readyz/edge", "/readyz/edge", 503),
    ("GET", "/v1/status", "/v1/status?after=1&wait=1", 200),
    ("GET", "/v1/status", "/v1/status?after=x", 400),
    ("GET", "/v1/flows", "/v1/flows?limit=0", 400),
    ("POST", "/v1/drain", "/v1/drain", 400),
    ("POST", "/v1/log", "/v1/log", 400),
    ("POST", "/v1/undrain", "/v1/undrain?target=%zz", 400),
];

pub fn run() -> Result<()> {
    let document: Value = serde_json::from_str(DOCUMENT)?;
    let cluster = Cluster::new(2)?;
    let nohop = &cluster.nohop;
    // One that is out, and connections.
    let maint = "maint -enable -service=helloworld-1 -reason=upgrade";
    cluster.nodes.backend.outside().run(program()?, maint)?;
    nohop.wait_for_backends("helloworld", 1)?;
    cluster.nodes.connect(cluster.vip("helloworld")?, 3)?;
    nohop.configure("dns.ttl = 7")?;

    let socket = nohop.admin().replace("unix:", "");
    let socket = Path::new(&socket);
    for (method, path, request, status) in REQUESTS {
        let answer = http::exchange(socket, method, request, "")?;
        let answered = check(&document, method, path, &answer);
        answered.with_context(|| format!("{method} {request}: {answer:?}"))?;
        ensure!(answer.status == status, "{method} {request}: {answer:?}");
    }
    ensure!(nohop.cli("log")?.stdout == b"debug\n", "the filter");

    // Each route of the daemon, and no other, has been tried; /v1/trace and /v1/stream don't end.
    let unknown = http::exchange(socket, "GET", "/nowhere", "")?.body;
    let routes =
        unknown.lines().filter(|line| line.starts_with("GET /") || line.starts_with("POST /"));
    let routes: BTreeSet<String> = routes
        .map(|line| line.split('?').next().unwrap_or(line).replace("NAME", "{name}"))
        .collect();
    let mut documented = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().context("paths")? {
        let methods = methods.as_object().context("methods")?.keys();
        documented.extend(methods.map(|method| format!("{} {path}", method.to_uppercase())));
    }
    ensure!(routes == documented, "{routes:?}\n{documented:?}");
    let tried = REQUESTS.iter().map(|(method, path, ..)| format!("{method} {path}"));
    let tried: BTreeSet<String> =
        tried.chain(["GET /v1/trace".to_owned(), "GET /v1/stream".to_owned()]).collect();
    ensure!(routes == tried, "{routes:?}\n{tried:?}");
    Ok(())
}

/// Checks an answer against what the document has for its status.
fn check(document: &Value, method: &str, path: &str, answer: &Answer) -> Result<()> {
    let operation = &document["paths"][path][method.to_lowercase()];
    let responses = operation["responses"].as_object().context("the route isn't documented")?;
    let response = responses.get(&answer.status.to_string()).or(responses.get("default"));
    let response = response.context("the status isn't documented")?;
    let response = match response["$ref"].as_str().and_then(|it| it.strip_prefix('#')) {
        Some(pointer) => document.pointer(pointer).with_context(|| format!("no {pointer}"))?,
        None => response,
    };
    let content = &response["content"];
    let head = answer.head.to_lowercase();
    let media_type = head.lines().find_map(|line| line.strip_prefix("content-type: "));
    let media_type = media_type.and_then(|it| it.split(';').next()).context("a media type")?;
    let schema =
        content.get(media_type).with_context(|| format!("{media_type} isn't documented"))?;
    let schema = &schema["schema"];
    match media_type {
        "application/json" => matches(document, schema, &serde_json::from_str(&answer.body)?, "$"),
        _ => Ok(()),
    }
}

/// Fails unless an answer to GET is as the document has it.
pub fn ensure_documented(path: &str, answer: &Value) -> Result<()> {
    let document: Value = serde_json::from_str(DOCUMENT)?;
    let content = &document["paths"][path]["get"]["responses"]["200"]["content"];
    matches(&document, &content["application/json"]["schema"], answer, "$")
}

/// Whether a value is as a schema has it (json-schema.org), at a path.
fn matches(document: &Value, schema: &Value, value: &Value, path: &str) -> Result<()> {
    let keywords = schema.as_object().with_context(|| format!("{path}: no schema"))?;
    for (keyword, wanted) in keywords {
        let list = || wanted.as_array().with_context(|| format!("{path}: {keyword}: no list"));
        let is_good = match keyword.as_str() {
            "$ref" => {
                let pointer = wanted.as_str().and_then(|it| it.strip_prefix('#'));
                let schema = document.pointer(pointer.unwrap_or_default());
                let schema = schema.with_context(|| format!("{path}: no {wanted}"))?;
                matches(document, schema, value, path)?;
                true
            }
            "allOf" => {
                for schema in list()? {
                    matches(document, schema, value, path)?;
                }
                true
            }
            "oneOf" => {
                let fits = |it: &&Value| matches(document, it, value, path).is_ok();
                list()?.iter().filter(fits).count() == 1
            }
            "enum" => list()?.contains(value),
            "type" => match wanted {
                Value::Array(types) => types.iter().any(|wanted| is_of_type(value, wanted)),
                wanted => is_of_type(value, wanted),
            },
            "minimum" => value.as_f64() >= wanted.as_f64() || !value.is_number(),
            "maximum" => value.as_f64() <= wanted.as_f64() || !value.is_number(),
            "items" => {
                for (idx, item) in value.as_array().into_iter().flatten().enumerate() {
                    matches(document, wanted, item, &format!("{path}[{idx}]"))?;
                }
                true
            }
            "required" => list()?.iter().all(|key| value.get(key.as_str().unwrap_or("")).is_some()),
            "properties" => {
                for (key, schema) in wanted.as_object().context("properties")? {
                    if let Some(value) = value.get(key) {
                        matches(document, schema, value, &format!("{path}.{key}"))?;
                    }
                }
                true
            }
            "additionalProperties" => {
                let known = schema["properties"].as_object();
                let is_known = |key: &str| known.is_some_and(|known| known.contains_key(key));
                let others = value.as_object().into_iter().flatten();
                for (key, value) in others.filter(|(key, _)| !is_known(key)) {
                    ensure!(wanted != false, "{path}: {key} isn't documented");
                    matches(document, wanted, value, &format!("{path}.{key}"))?;
                }
                true
            }
            "description" | "format" => true,
            _ => bail!("{path}: {keyword} isn't read here"),
        };
        ensure!(is_good, "{path}: {keyword} is {wanted}, and the value {value}");
    }
    Ok(())
}

fn is_of_type(value: &Value, wanted: &Value) -> bool {
    match wanted.as_str().unwrap_or_default() {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        _ => false,
    }
}
