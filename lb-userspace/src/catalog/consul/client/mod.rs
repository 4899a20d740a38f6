//! One request to the Consul agent, and its response: HTTP, TLS, tokens, limits, errors.

mod error;
mod pool;
mod response;
mod stats;
#[cfg(test)]
mod tests;
mod tls;

use std::net::IpAddr;
use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::{ACCEPT, AUTHORIZATION, HOST, HeaderMap, HeaderValue};
use serde::de::DeserializeOwned;
use tokio::sync::Semaphore;

use super::index::ReadMode;
use super::token;
use crate::catalog::publisher::Publisher;
use crate::config::{BasicAuth, ConsulAddress, ConsulConfig, Token};
pub use error::QueryError;
use pool::{Connection, Pool};
use stats::ResponseStats;
use tls::Tls;

/// How long the body of a response may take after its head. Consul holds a blocking query before the
/// head.
const BODY_TIME: Duration = Duration::from_secs(10);

/// A client of one Consul agent, with a limit on its connections.
///
/// An HTTP/1 connection carries one request at a time, and a blocking query holds it for minutes;
/// so there are as many connections as requests under way, and they are used again.
pub struct Client {
    address: ConsulAddress,
    origin: String,
    pool: Pool,
    token: Option<Token>,
    /// What each request has.
    headers: HeaderMap,
    /// Query parameters of each request, such as `dc=eu`.
    scope: Vec<String>,
    body_limit: Duration,
    large: Semaphore,
    stats: ResponseStats,
}

/// A request to the API.
#[derive(Clone, Debug)]
pub struct ApiRequest {
    /// The path, percent-encoded.
    pub path: String,
    /// The consistency mode, or the index of a blocking query.
    pub mode: ReadMode,
    /// How long Consul may hold a [`ReadMode::Blocking`] request.
    pub wait: Duration,
}

/// Consul's response.
#[derive(Clone, Debug)]
pub struct ApiResponse<T> {
    /// X-Consul-Index.
    pub index: Option<u64>,
    /// The body.
    pub body: T,
    /// Its bytes.
    pub n_bytes: usize,
    /// Whether Consul reported that it left out what the token may not read.
    pub is_filtered: bool,
    /// The address of the agent; `None` for a unix socket.
    pub peer: Option<IpAddr>,
}

impl Client {
    /// A client that connects within `connect_limit` or gives up, and counts in the output's
    /// [`Stats`](crate::catalog::Stats).
    pub fn new(config: &ConsulConfig, connect_limit: Duration, output: Publisher) -> Self {
        let scope = [
            ("dc", &config.datacenter),
            ("ns", &config.namespace),
            ("partition", &config.partition),
        ];
        let scope = scope.into_iter().filter(|(_, value)| !value.is_empty());
        let pool = Pool::new(
            config.address.clone(),
            Tls::new(config.tls.clone()),
            connect_limit,
            config.max_connections,
        );
        Client {
            address: config.address.clone(),
            origin: pool.origin(),
            pool,
            token: config.token.clone(),
            headers: headers(&config.address, config.auth.as_ref()),
            scope: scope.map(|(key, value)| format!("{key}={}", percent_encode(value))).collect(),
            body_limit: BODY_TIME,
            large: Semaphore::new(response::N_LARGE),
            stats: ResponseStats::new(output),
        }
    }

    /// Sends a request, and waits at most `limit` for the whole response.
    ///
    /// # Errors
    /// Every way in which the response isn't a whole 200 with a body of the right shape. A key of the
    /// key-value store that isn't there is no error but null.
    pub async fn get<T: DeserializeOwned>(
        &self,
        request: &ApiRequest,
        limit: Duration,
    ) -> Result<ApiResponse<T>, QueryError> {
        let answer = tokio::time::timeout(limit, self.exchange(request))
            .await
            .unwrap_or_else(|_| Err(QueryError::Hung { address: self.address.to_string(), limit }));
        self.stats.count(&answer);
        if let Err(QueryError::Tls { .. }) = answer {
            self.pool.invalidate_tls();
        }
        answer.map(|(_, answer)| answer)
    }

    async fn exchange<T: DeserializeOwned>(
        &self,
        request: &ApiRequest,
    ) -> Result<(StatusCode, ApiResponse<T>), QueryError> {
        // Dropped in the other order, so that the connection is closed before another may be opened.
        let (connection, response) = self.send(request).await?;
        let (status, headers) = (response.status(), response.headers().clone());
        let peer = response.remote_addr().map(|peer| peer.ip().to_canonical());
        let limit = self.body_limit;
        let body = tokio::time::timeout(limit, response::read(response, &self.large))
            .await
            .unwrap_or_else(|_| {
                Err(QueryError::Slow { address: self.address.to_string(), limit })
            })?;
        self.stats.count_bytes(body.len());
        self.pool.put(connection).await;
        let is_absent =
            request.path.starts_with("/v1/kv/") && response::is_absent_key(status, &headers, &body);
        let body = if is_absent { b"null".to_vec() } else { body };
        if !is_absent {
            let has_auth = self.headers.contains_key(AUTHORIZATION);
            let asked = (&self.address, &*request.path);
            response::check_status(status, &headers, &body, asked, has_auth)?;
        }
        response::check_leader(&headers)?;
        let is_filtered = response::is_filtered(&headers);
        self.stats.note(&request.path, is_filtered, Instant::now());
        let index = response::index(&headers);
        let n_bytes = body.len();
        let body = response::parse(&body, &self.address)?;
        Ok((status, ApiResponse { index, body, n_bytes, is_filtered, peer }))
    }

    async fn send(
        &self,
        request: &ApiRequest,
    ) -> Result<(Connection, reqwest::Response), QueryError> {
        let token = self.token().await?;
        let url = format!("{}{}", self.origin, self.path_and_query(request));
        loop {
            let connection = self.pool.get().await?;
            let mut builder = connection.http.get(&url).headers(self.headers.clone());
            if let Some(token) = &token {
                builder = builder.header("X-Consul-Token", token);
            }
            match builder.send().await {
                Ok(response) => return Ok((connection, response)),
                // Consul may have closed it meanwhile, and a GET can be sent twice.
                Err(_) if connection.is_reused => {}
                Err(source) => return Err(QueryError::of_failed(self.address.to_string(), source)),
            }
        }
    }

    fn path_and_query(&self, request: &ApiRequest) -> String {
        let mut parameters = Vec::new();
        match request.mode {
            ReadMode::Plain => {}
            ReadMode::Consistent => parameters.push("consistent".into()),
            ReadMode::Blocking(index) => {
                parameters.push(format!("index={index}&wait={}ms", request.wait.as_millis()));
            }
        }
        parameters.extend(self.scope.iter().cloned());
        match parameters.is_empty() {
            true => request.path.clone(),
            false => format!("{}?{}", request.path, parameters.join("&")),
        }
    }

    /// The token; a file is read again for each request, so that a rotated token takes effect at once.
    async fn token(&self) -> Result<Option<HeaderValue>, QueryError> {
        let (token, place) = match &self.token {
            None => return Ok(None),
            Some(Token::Literal(token)) => (token.clone(), "as the token".to_owned()),
            Some(Token::File(path)) => {
                let text = token::read(path).await;
                let text =
                    text.map_err(|source| QueryError::TokenFile { path: path.clone(), source })?;
                (text, format!("to {}", path.display()))
            }
        };
        let token = token::of_text(&token);
        let is_token = !token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic());
        let value = is_token.then(|| HeaderValue::from_str(token).ok()).flatten();
        let Some(mut value) = value else {
            let what = match token {
                // Such a file is being written; asking without a token could get less.
                "" => "is empty",
                _ => "has a blank, a line break or another character that no token has",
            };
            return Err(QueryError::BadToken { what, place });
        };
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

fn headers(address: &ConsulAddress, auth: Option<&BasicAuth>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    // The URL may have another host: see `Pool::origin`.
    if let ConsulAddress::Https(authority) = address
        && let Ok(host) = HeaderValue::from_str(authority)
    {
        headers.insert(HOST, host);
    }
    if let Some(auth) = auth
        && let Ok(mut value) = HeaderValue::try_from(auth.header())
    {
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
    headers
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
