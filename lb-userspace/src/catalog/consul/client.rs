//! One question to the Consul agent, and its answer: HTTP, tokens, limits, errors.

use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{ACCEPT, HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::index::Ask;
use crate::config::{ConsulConfig, Token};

/// The largest answer that is read: a few times that of 4,096 instances with five checks each.
const BODY_LIMIT: usize = 64 << 20;

/// A client of one Consul agent, with a limit on its connections.
///
/// An HTTP/1 connection carries one question at a time, and a blocking query holds it for minutes;
/// so there are as many connections as questions under way, and they are used again.
pub struct Client {
    address: String,
    token: Option<Token>,
    datacenter: String,
    connect_limit: Duration,
    shared: Semaphore,
    idle: Mutex<Vec<Connection>>,
}

struct Connection {
    sender: SendRequest<Empty<Bytes>>,
    /// The task that moves the bytes; it ends with the connection.
    _driver: JoinSet<()>,
}

/// What to ask.
#[derive(Clone, Debug)]
pub struct Question {
    /// The path, percent-encoded.
    pub path: String,
    /// Where in Consul's history.
    pub ask: Ask,
    /// How long Consul may hold a question that asks for what comes [`Ask::After`] an index.
    pub wait: Duration,
    /// Whether the question has a connection of its own; the others take turns, first come first
    /// served.
    pub is_reserved: bool,
}

/// What Consul said.
#[derive(Clone, Debug)]
pub struct Answer<T> {
    /// X-Consul-Index.
    pub index: Option<u64>,
    /// The body.
    pub body: T,
}

/// Why there is no answer, with the mend.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// No connection.
    #[error(
        "can't reach Consul at {address} ({source}): start its agent, or mend consul.address or \
         CONSUL_HTTP_ADDR"
    )]
    Unreachable {
        /// Where it should be.
        address: String,
        /// What the system says.
        source: io::Error,
    },
    /// The connection ended before an answer began.
    #[error("the connection to Consul at {address} was lost ({source})")]
    Lost {
        /// Where Consul is.
        address: String,
        /// What the HTTP side says.
        source: hyper::Error,
    },
    /// The answer didn't come in time.
    #[error("Consul at {address} gave no answer within {limit:?}: look at its agent's log")]
    Hung {
        /// Where Consul is.
        address: String,
        /// How long it had.
        limit: Duration,
    },
    /// 403.
    #[error(
        "Consul denies access (403, `{said}`): the token needs service:read and node:read; see \
         consul.token_file and CONSUL_HTTP_TOKEN"
    )]
    Denied {
        /// The first line of the body.
        said: String,
    },
    /// 429 or 503.
    #[error("Consul is busy ({code}, `{said}`): asking again more slowly")]
    Busy {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        said: String,
    },
    /// Another status that isn't 200.
    #[error("Consul failed ({code}, `{said}`): look at its agent's log")]
    Status {
        /// The status.
        code: StatusCode,
        /// The first line of the body.
        said: String,
    },
    /// An answer of an agent that hears no leader: of any age, perhaps empty.
    #[error("Consul's servers have no leader: look at `consul operator raft list-peers`")]
    NoLeader,
    /// The body ended early.
    #[error("Consul's answer was cut short ({source})")]
    Cut {
        /// What the HTTP side says.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The body is larger than what is read.
    #[error("Consul's answer is larger than {limit} bytes")]
    TooLarge {
        /// The most that is read.
        limit: usize,
    },
    /// The body isn't what this version understands.
    #[error("Consul's answer has another shape than expected: {source}")]
    Shape {
        /// Where in the document, and what is there.
        source: serde_path_to_error::Error<serde_json::Error>,
    },
    /// The token file can't be read.
    #[error("can't read the Consul token from {path} ({source}): mend consul.token_file")]
    TokenFile {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The token is empty or has bytes that no header may have.
    #[error("the Consul token is empty or holds bytes that a token can't")]
    BadToken,
    /// The address or the path makes no HTTP request.
    #[error("consul.address `{address}` can't be asked ({source})")]
    BadRequest {
        /// Where Consul is.
        address: String,
        /// What the HTTP side says.
        source: hyper::http::Error,
    },
}

impl Client {
    /// A client that connects within `connect_limit` or gives up.
    pub fn new(config: &ConsulConfig, connect_limit: Duration) -> Self {
        Client {
            address: config.address.clone(),
            token: config.token.clone(),
            datacenter: config.datacenter.clone(),
            connect_limit,
            shared: Semaphore::new(config.max_connections.saturating_sub(1).max(1)),
            idle: Mutex::default(),
        }
    }

    /// Asks, and waits at most `limit` for all of the answer, not counting the wait for a turn.
    ///
    /// # Errors
    /// Every way in which the answer isn't a whole 200 with a body of the right shape.
    pub async fn get<T: DeserializeOwned>(
        &self,
        question: &Question,
        limit: Duration,
    ) -> Result<Answer<T>, QueryError> {
        let _turn = match question.is_reserved {
            true => None,
            false => Some(self.shared.acquire().await.expect("the semaphore is never closed")),
        };
        tokio::time::timeout(limit, self.exchange(question))
            .await
            .unwrap_or_else(|_| Err(QueryError::Hung { address: self.address.clone(), limit }))
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        question: &Question,
    ) -> Result<Answer<T>, QueryError> {
        let (response, connection) = self.send(question).await?;
        let (head, body) = response.into_parts();
        let body = read(body).await?;
        self.keep(connection);
        // A key that isn't there has an index all the same, so that one can wait for it.
        let is_absent =
            head.status == StatusCode::NOT_FOUND && question.path.starts_with("/v1/kv/");
        let body = if is_absent { Bytes::from_static(b"null") } else { body };
        if !is_absent {
            check_status(head.status, &body)?;
        }
        check_leader(&head.headers)?;
        let index = header(&head.headers, "x-consul-index").and_then(|text| text.parse().ok());
        let body = parse(&body).map_err(|source| QueryError::Shape { source })?;
        Ok(Answer { index, body })
    }

    async fn send(
        &self,
        question: &Question,
    ) -> Result<(Response<Incoming>, Connection), QueryError> {
        let token = self.token().await?;
        loop {
            let (mut connection, is_reused) = match self.idle() {
                Some(connection) => (connection, true),
                None => (self.connect().await?, false),
            };
            let request = self.request(question, token.clone())?;
            let sent = match connection.sender.ready().await {
                Ok(()) => connection.sender.send_request(request).await,
                Err(error) => Err(error),
            };
            match sent {
                Ok(response) => return Ok((response, connection)),
                // Consul may have closed it meanwhile, and a GET can be asked twice.
                Err(_) if is_reused => {}
                Err(source) => {
                    return Err(QueryError::Lost { address: self.address.clone(), source });
                }
            }
        }
    }

    async fn connect(&self) -> Result<Connection, QueryError> {
        let unreachable =
            |source| QueryError::Unreachable { address: self.address.clone(), source };
        let stream = tokio::time::timeout(self.connect_limit, TcpStream::connect(&self.address))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(unreachable)?;
        stream.set_nodelay(true).map_err(unreachable)?;
        keep_alive(&stream).map_err(|errno| unreachable(errno.into()))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|source| QueryError::Lost { address: self.address.clone(), source })?;
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            // Its failure reaches whoever waits for the answer.
            let _ = connection.await;
        });
        Ok(Connection { sender, _driver: driver })
    }

    fn idle(&self) -> Option<Connection> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn keep(&self, connection: Connection) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
    }

    fn request(
        &self,
        question: &Question,
        token: Option<HeaderValue>,
    ) -> Result<Request<Empty<Bytes>>, QueryError> {
        let mut request = Request::get(self.path_and_query(question))
            .header(HOST, &self.address)
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, concat!("nohop/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = token {
            request = request.header("X-Consul-Token", token);
        }
        request
            .body(Empty::new())
            .map_err(|source| QueryError::BadRequest { address: self.address.clone(), source })
    }

    fn path_and_query(&self, question: &Question) -> String {
        let mut parameters = Vec::new();
        match question.ask {
            Ask::Now => {}
            Ask::Consistently => parameters.push("consistent".into()),
            Ask::After(index) => {
                parameters.push(format!("index={index}&wait={}ms", question.wait.as_millis()));
            }
        }
        if !self.datacenter.is_empty() {
            parameters.push(format!("dc={}", percent_encode(&self.datacenter)));
        }
        match parameters.is_empty() {
            true => question.path.clone(),
            false => format!("{}?{}", question.path, parameters.join("&")),
        }
    }

    /// The token; a file is read anew for each question, so that a rotated token counts at once.
    async fn token(&self) -> Result<Option<HeaderValue>, QueryError> {
        let token = match &self.token {
            None => return Ok(None),
            Some(Token::Literal(token)) => token.clone(),
            Some(Token::File(path)) => tokio::fs::read_to_string(path)
                .await
                .map_err(|source| QueryError::TokenFile { path: path.clone(), source })?,
        };
        // An empty file is one that is being written; asking without a token could get less.
        let token = token.trim();
        let mut value = HeaderValue::from_str(token).map_err(|_| QueryError::BadToken)?;
        if token.is_empty() {
            return Err(QueryError::BadToken);
        }
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// Encodes all but the unreserved characters of RFC 3986.
pub fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

async fn read(body: Incoming) -> Result<Bytes, QueryError> {
    match Limited::new(body, BODY_LIMIT).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(QueryError::TooLarge { limit: BODY_LIMIT })
        }
        Err(source) => Err(QueryError::Cut { source }),
    }
}

fn parse<T: DeserializeOwned>(
    body: &[u8],
) -> Result<T, serde_path_to_error::Error<serde_json::Error>> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut json)?;
    // A body with more behind its end isn't what it seems.
    let at_root = serde_path_to_error::Track::new().path();
    json.end().map_err(|error| serde_path_to_error::Error::new(at_root, error))?;
    Ok(parsed)
}

fn check_status(code: StatusCode, body: &[u8]) -> Result<(), QueryError> {
    if code == StatusCode::OK {
        return Ok(());
    }
    let text = String::from_utf8_lossy(body);
    let said = text.lines().next().unwrap_or_default().trim().chars().take(200).collect();
    Err(match code {
        StatusCode::FORBIDDEN => QueryError::Denied { said },
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            QueryError::Busy { code, said }
        }
        _ => QueryError::Status { code, said },
    })
}

/// Refuses the answer of an agent that hears no leader, which `discovery_max_stale` can bring.
/// Streamed answers always say so, leader or not (Consul's issue 9776).
fn check_leader(headers: &HeaderMap) -> Result<(), QueryError> {
    let is_streamed = header(headers, "x-consul-query-backend") == Some("streaming");
    match header(headers, "x-consul-knownleader") {
        Some("false") if !is_streamed => Err(QueryError::NoLeader),
        _ => Ok(()),
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Has the kernel find out that the other host is gone, within 20 s: no answer would say so.
fn keep_alive(stream: &TcpStream) -> rustix::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(10))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(3))?;
    sockopt::set_tcp_keepcnt(stream, 3)?;
    sockopt::set_tcp_user_timeout(stream, 20_000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_percent_encoded() {
        for (text, expected) in
            [("web-1.x_y~", "web-1.x_y~"), ("a b/c?d", "a%20b%2Fc%3Fd"), ("ü", "%C3%BC")]
        {
            assert_eq!(percent_encode(text), expected);
        }
    }

    #[test]
    fn asks_with_index_wait_and_datacenter() {
        let table = [
            ("", Ask::Now, "/p"),
            ("", Ask::Consistently, "/p?consistent"),
            ("", Ask::After(7), "/p?index=7&wait=300000ms"),
            ("eu 1", Ask::Now, "/p?dc=eu%201"),
            ("eu", Ask::After(7), "/p?index=7&wait=300000ms&dc=eu"),
        ];
        for (datacenter, ask, expected) in table {
            let config = ConsulConfig {
                address: "127.0.0.1:8500".into(),
                token: None,
                datacenter: datacenter.into(),
                max_connections: 2,
            };
            let question = Question {
                path: "/p".into(),
                ask,
                wait: Duration::from_secs(300),
                is_reserved: true,
            };
            let client = Client::new(&config, Duration::from_secs(2));
            assert_eq!(client.path_and_query(&question), expected);
        }
    }

    #[test]
    fn a_leaderless_answer_is_refused_unless_it_was_streamed() {
        for (leader, backend, is_fine) in [
            (None, None, true),
            (Some("true"), None, true),
            (Some("false"), None, false),
            (Some("false"), Some("blocking-query"), false),
            (Some("false"), Some("streaming"), true),
        ] {
            let mut headers = HeaderMap::new();
            if let Some(leader) = leader {
                headers.insert("X-Consul-KnownLeader", HeaderValue::from_static(leader));
            }
            if let Some(backend) = backend {
                headers.insert("X-Consul-Query-Backend", HeaderValue::from_static(backend));
            }
            assert_eq!(check_leader(&headers).is_ok(), is_fine, "{leader:?} {backend:?}");
        }
    }
}
