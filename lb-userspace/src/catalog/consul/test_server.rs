//! A Consul in the test's process, which answers blocking queries and fails on demand.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What goes wrong with a path.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status and body.
    Status(u16, &'static str),
    /// A connection that closes in the middle of the body.
    Cut,
    /// This status and body, without a header of Consul's.
    Bare(u16, &'static str),
    /// A good answer with this body instead.
    Body(&'static str),
    /// No answer at all.
    Hang,
    /// A connection that closes before any answer.
    Close,
    /// A body without an end.
    Endless,
    /// A body of a byte a second.
    Drip,
    /// A good answer with this header before the others.
    Header(&'static str),
}

/// The state after a request.
enum Then {
    /// The next request.
    Next,
    /// The connection's end.
    Close,
    /// More, for ever, with a pause after each piece.
    More(&'static [u8], Duration),
}

/// What it knows, and how it behaves.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The index of each path.
    index: BTreeMap<String, u64>,
    body: BTreeMap<String, Value>,
    fault: BTreeMap<String, Fault>,
    /// How many questions each path had, with all their parameters.
    pub asked: HashMap<String, usize>,
    pub n_connections: usize,
    pub most_connections: usize,
}

pub struct Fake {
    pub address: SocketAddr,
    pub state: watch::Sender<State>,
    _tasks: JoinSet<()>,
}

pub const NAMES: &str = "/v1/catalog/services";
pub const AGENT: &str = "/v1/agent/self";

pub fn service(name: &str) -> String {
    format!("/v1/health/service/{name}")
}

/// A record of a passing instance with the tag, at 10.0.0.1.
pub fn instance(node: &str, id: &str, port: u16) -> Value {
    json!({
        "Node": {"Node": node, "Address": "10.0.0.1"},
        "Service": {"ID": id, "Tags": ["routed"], "Port": port},
        "Checks": [{"CheckID": "c", "Name": "web", "Status": "passing", "Publisher": "fine"}],
    })
}

impl State {
    fn fault_of(&self, question: &str, path: &str) -> Option<Fault> {
        self.fault.get(question).or_else(|| self.fault.get(path)).cloned()
    }
}

impl Fake {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = watch::Sender::new(State::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, state.clone()));
        let fake = Fake { address, state, _tasks: tasks };
        fake.set(NAMES, 10, json!({}));
        fake.set(AGENT, 1, json!({"Config": {"NodeName": "n1"}}));
        fake
    }

    /// Sets the response of a path, and ends the requests that wait for it.
    pub fn set(&self, path: &str, index: u64, body: Value) {
        self.state.send_modify(|state| {
            state.index.insert(path.into(), index);
            state.body.insert(path.into(), body);
        });
    }

    /// The names, all with the tag.
    pub fn set_names(&self, index: u64, names: &[&str]) {
        let names: BTreeMap<_, _> = names.iter().map(|name| (*name, ["routed"])).collect();
        self.set(NAMES, index, json!(names));
    }

    /// As [`Fake::set`], of an answer that says that something is left out for the token's sake, which
    /// it says until [`Fake::break_path`] ends that.
    pub fn set_filtered(&self, path: &str, index: u64, body: Value) {
        self.state.send_modify(|state| {
            state.index.insert(path.into(), index);
            state.body.insert(path.into(), body);
            let header = Fault::Header("X-Consul-Results-Filtered-By-ACLs: true");
            state.fault.insert(path.into(), header);
        });
    }

    pub fn break_path(&self, path: &str, fault: Option<Fault>) {
        self.state.send_modify(|state| {
            match fault {
                Some(fault) => state.fault.insert(path.into(), fault),
                None => state.fault.remove(path),
            };
        });
    }

    /// As [`Fake::break_path`], of one request with all its parameters, which overrides the path's.
    pub fn break_question(&self, question: &str, fault: Option<Fault>) {
        self.break_path(question, fault);
    }

    pub fn n_asked(&self, question: &str) -> usize {
        self.state.borrow().asked.get(question).copied().unwrap_or(0)
    }
}

async fn accept(listener: TcpListener, state: watch::Sender<State>) {
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let state = state.clone();
        connections.spawn(async move {
            state.send_modify(|state| {
                state.n_connections += 1;
                state.most_connections = state.most_connections.max(state.n_connections);
            });
            // An error is a client that left.
            let _ = serve(stream, &state).await;
            state.send_modify(|state| state.n_connections -= 1);
        });
    }
}

async fn serve(mut stream: TcpStream, state: &watch::Sender<State>) -> std::io::Result<()> {
    let mut seen = Vec::new();
    while stream.read_buf(&mut seen).await? > 0 {
        if !seen.ends_with(b"\r\n\r\n") {
            continue;
        }
        let head = String::from_utf8(std::mem::take(&mut seen)).unwrap();
        let question = head.split(' ').nth(1).unwrap();
        state.send_modify(|state| *state.asked.entry(question.into()).or_default() += 1);
        let answer = tokio::select! {
            answer = answer(question, state) => answer,
            // A client that waits sends nothing, so this is one that left.
            _ = stream.readable() => return Ok(()),
        };
        let Some((answer, then)) = answer else { return Ok(()) };
        stream.write_all(answer.as_bytes()).await?;
        match then {
            Then::Next => {}
            Then::Close => return Ok(()),
            Then::More(piece, pause) => loop {
                stream.write_all(piece).await?;
                tokio::time::sleep(pause).await;
            },
        }
    }
    Ok(())
}

/// The bytes to send; `None` closes the connection.
async fn answer(question: &str, state: &watch::Sender<State>) -> Option<(String, Then)> {
    let (path, query) = question.split_once('?').unwrap_or((question, ""));
    let parameter =
        |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    let index: u64 = parameter("index").map_or(0, |index| index.parse().unwrap());
    let wait =
        parameter("wait").map_or(0, |wait| wait.strip_suffix("ms").unwrap().parse().unwrap());
    let mut state = state.subscribe();
    let is_news =
        |state: &State| state.fault.contains_key(path) || state.index.get(path) != Some(&index);
    // At the end of the wait, the present state is the response.
    let _ = tokio::time::timeout(Duration::from_millis(wait), state.wait_for(is_news)).await;
    let (index, body, fault) = {
        let state = state.borrow();
        let body = state.body.get(path).cloned().unwrap_or(json!([])).to_string();
        (state.index.get(path).copied().unwrap_or(1), body, state.fault_of(question, path))
    };
    let headers = |code: u16, more: &str| {
        format!(
            "HTTP/1.1 {code} Said\r\n{more}X-Consul-Index: {index}\r\nX-Consul-Knownleader: true\r\n"
        )
    };
    let say = |code: u16, body: &str| {
        let length = format!("Content-Length: {}\r\n", body.len());
        Some((format!("{}\r\n{body}", headers(code, &length)), Then::Next))
    };
    match fault {
        None => say(200, &body),
        Some(Fault::Status(code, body)) => say(code, body),
        Some(Fault::Bare(code, body)) => {
            let length = body.len();
            let said = format!("HTTP/1.1 {code} Said\r\nContent-Length: {length}\r\n\r\n{body}");
            Some((said, Then::Next))
        }
        Some(Fault::Body(body)) => say(200, body),
        Some(Fault::Cut) => {
            let said = headers(200, "Content-Length: 1000\r\n") + "\r\n[{\"Node\"";
            Some((said, Then::Close))
        }
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Close) => None,
        Some(Fault::Endless) => {
            Some((headers(200, "") + "\r\n", Then::More(&[b' '; 65_536], Duration::ZERO)))
        }
        Some(Fault::Drip) => {
            Some((headers(200, "") + "\r\n", Then::More(b" ", Duration::from_secs(1))))
        }
        Some(Fault::Header(header)) => {
            let length = match header.starts_with("Content-Length") {
                true => String::new(),
                false => format!("Content-Length: {}\r\n", body.len()),
            };
            let said = headers(200, &format!("{header}\r\n{length}")) + "\r\n" + &body;
            Some((said, Then::Next))
        }
    }
}

/// The requests to the test server, a line each, for a failed assertion.
impl std::fmt::Debug for Fake {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#?}", self.state.borrow().asked)
    }
}
