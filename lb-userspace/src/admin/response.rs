//! Responses, and the headers that each has.

use std::fmt::Display;

use futures_util::stream::BoxStream;
use hyper::body::Bytes;
use hyper::header::{
    ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue,
    REFERRER_POLICY, RETRY_AFTER, X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
};
use hyper::{Response, StatusCode};
use serde::Serialize;

use super::body::ResponseBody;
use super::documents::{At, Document};
use super::http;
use super::origin::Foreign;
use super::page::Asset;
use super::route::EndpointError;
use crate::terminal;

/// What every response has: no copy stays anywhere, and no page but ours uses it. Ours runs no code and
/// no style but what is served as a file.
pub(super) const HEADERS: [(HeaderName, &str); 7] = [
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (X_FRAME_OPTIONS, "DENY"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (
        CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
];

/// The header with the generation of the table that a response shows.
pub(super) const GENERATION_HEADER: &str = "x-nohop-generation";

/// The header with the revision of the status that a response shows, for `?after=`.
pub(super) const REVISION_HEADER: &str = "x-nohop-revision";

/// A status, a media type and a body.
pub(super) type Rendered = (StatusCode, &'static str, Vec<u8>);

/// Adds what every response has.
pub(super) fn add_headers(response: &mut Response<ResponseBody>) {
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
}

/// A JSON document.
pub(super) fn json(status: StatusCode, document: &impl Serialize) -> Rendered {
    match serde_json::to_vec(document) {
        Ok(body) => (status, http::JSON, body),
        Err(error) => failure(&error),
    }
}

/// Lines for people, in whose terminal they may end.
pub(super) fn plain(status: StatusCode, lines: &str) -> Rendered {
    (status, "text/plain; charset=utf-8", terminal::escape_lines(lines).into_bytes())
}

/// The failure of a part of ours.
pub(super) fn failure(error: &dyn Display) -> Rendered {
    plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n"))
}

/// A document of the state at `at`.
pub(super) fn respond(
    Document { status, media_type, at, body }: Document,
) -> Response<ResponseBody> {
    let mut response = with_body(status, media_type, body.into());
    let headers = response.headers_mut();
    headers.insert(GENERATION_HEADER, at.generation.into());
    headers.insert(REVISION_HEADER, at.revision.into());
    response
}

/// As [`respond`], for what no other request shares.
pub(super) fn rendered((status, media_type, body): Rendered, at: At) -> Response<ResponseBody> {
    respond(Document { status, media_type, at, body: body.into() })
}

/// Lines for people.
pub(super) fn text(status: StatusCode, lines: &str) -> Response<ResponseBody> {
    let (status, media_type, body) = plain(status, lines);
    with_body(status, media_type, Bytes::from(body).into())
}

/// A file of the page.
pub(super) fn file(asset: &'static Asset) -> Response<ResponseBody> {
    with_body(StatusCode::OK, asset.media_type, Bytes::from_static(asset.body).into())
}

/// Lines or events as they come.
pub(super) fn stream(
    media_type: &'static str,
    parts: BoxStream<'static, Bytes>,
) -> Response<ResponseBody> {
    with_body(StatusCode::OK, media_type, ResponseBody::Stream(parts))
}

/// That a limit is reached.
pub(super) fn busy(why: &str) -> Response<ResponseBody> {
    let mut response = text(StatusCode::SERVICE_UNAVAILABLE, &format!("{why}: try again later\n"));
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}

/// Refuses what a page of another site may have sent.
pub(super) fn foreign(error: &Foreign) -> Response<ResponseBody> {
    // Once: a scraper that uses an unknown name should show, but a client must not fill the log.
    static REPORTED: std::sync::Once = std::sync::Once::new();
    REPORTED.call_once(|| tracing::warn!("a request to the admin interface is refused: {error}"));
    let status = match error {
        Foreign::NoHost => StatusCode::BAD_REQUEST,
        Foreign::Host(_) | Foreign::CrossSite => StatusCode::FORBIDDEN,
    };
    text(status, &format!("{error}\n"))
}

/// Refuses what no endpoint answers.
pub(super) fn refusal(error: &EndpointError) -> Response<ResponseBody> {
    let status = match error {
        EndpointError::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
        EndpointError::UnixOnly | EndpointError::Clients => StatusCode::FORBIDDEN,
        EndpointError::Path => StatusCode::NOT_FOUND,
        EndpointError::Query { .. } => StatusCode::BAD_REQUEST,
    };
    let mut response = text(status, &format!("{error}\n"));
    if let EndpointError::Method(allowed) = error {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    }
    response
}

fn with_body(
    status: StatusCode,
    media_type: &'static str,
    body: ResponseBody,
) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
    response
}
