//! The answer to a request: whether its client may ask, and what the endpoint does or shows.

use std::net::IpAddr;
use std::sync::Arc;

use futures_util::stream::{StreamExt as _, unfold};
use hyper::body::Incoming;
use hyper::header::HOST;
use hyper::{Request, Response, StatusCode};
use tokio::sync::watch;

use super::api;
use super::body::ResponseBody;
use super::documents::At;
use super::http;
use super::limits::ListenerLimits;
use super::origin::{Foreign, check_host, check_site, is_navigation};
use super::page;
use super::prometheus;
use super::response::{
    Rendered, busy, failure, file, foreign, json, plain, refusal, rendered, respond, stream, text,
};
use super::route::{Endpoint, EndpointError, Wait, route};
use super::trace::{TraceFilter, TraceRefusal};
use super::view::View;
use crate::dns::check_question;
use crate::{logging, terminal};

/// Answers a request. `local` is the address that its client has connected to, `None` on a unix socket.
/// The answer to HEAD is the one to GET, of which hyper sends the head alone.
pub(super) async fn answer<V: View>(
    request: &Request<Incoming>,
    local: Option<IpAddr>,
    limits: &ListenerLimits,
    view: Arc<V>,
) -> Response<ResponseBody> {
    if let Err(error) = check_origin(request, local, limits) {
        return foreign(&error);
    }
    let uri = request.uri();
    let (endpoint, wait) = match route(request.method(), uri.path(), uri.query()) {
        Ok(asked) => asked,
        Err(error) => return refusal(&error),
    };
    if endpoint.has_effects() && !limits.may_change {
        return refusal(&EndpointError::UnixOnly);
    }
    if endpoint.shows_clients() && local.is_some() && !limits.tcp.borrow().may_trace {
        return refusal(&EndpointError::Clients);
    }
    match endpoint {
        Endpoint::Page(asset) => file(asset),
        Endpoint::Trace(filter) => trace(filter, limits, view).await,
        Endpoint::Stream => match limits.waiting.clone().try_acquire_owned() {
            Ok(place) => stream(http::EVENTS, limits.feed.watch(&view, place)),
            Err(_) => too_many_wait(),
        },
        Endpoint::Reload | Endpoint::Drain(_) | Endpoint::Undrain(_) | Endpoint::SetLog(_) => {
            let changed = change(&endpoint, &*view).await;
            rendered(changed, *view.at().borrow())
        }
        _ => {
            let mut at = view.at();
            if let Some(wait) = wait
                && !wait_for_change(&wait, &mut at, limits).await
            {
                return too_many_wait();
            }
            let at = *at.borrow();
            show(endpoint, at, limits, view).await
        }
    }
}

/// Refuses what a page of another site may have sent.
fn check_origin(
    request: &Request<Incoming>,
    local: Option<IpAddr>,
    limits: &ListenerLimits,
) -> Result<(), Foreign> {
    let headers = request.headers();
    if local.is_some() || headers.contains_key(HOST) {
        check_host(request, local, &limits.tcp.borrow().hosts)?;
    }
    // A link on another site's page may lead to the page, which has no data in it.
    match request.uri().path() == page::PATH && is_navigation(headers) {
        true => Ok(()),
        false => check_site(headers),
    }
}

async fn trace<V: View>(
    filter: TraceFilter,
    limits: &ListenerLimits,
    view: Arc<V>,
) -> Response<ResponseBody> {
    match limits.ask(move || view.trace(filter)).await {
        Ok(Ok(lines)) => {
            let lines = unfold(lines, |mut lines| async { Some((lines.recv().await?, lines)) });
            stream(http::JSON_LINES, lines.boxed())
        }
        Ok(Err(refusal @ TraceRefusal::Forbidden)) => {
            text(StatusCode::FORBIDDEN, &format!("{refusal}\n"))
        }
        Ok(Err(refusal)) => text(StatusCode::SERVICE_UNAVAILABLE, &format!("{refusal}\n")),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error}\n")),
    }
}

/// Changes something, and reports the outcome.
async fn change<V: View>(endpoint: &Endpoint, view: &V) -> Rendered {
    let status = |ok| if ok { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    match endpoint {
        Endpoint::Drain(target) | Endpoint::Undrain(target) => {
            let is_drain = matches!(endpoint, Endpoint::Drain(_));
            let change = view.drain(is_drain, target).await;
            json(status(change.ok), &change)
        }
        Endpoint::SetLog(filter) => {
            let changed = logging::set_filter(filter);
            if changed.is_ok() {
                tracing::warn!("the log's filter is {} from now on", logging::current_filter());
            }
            json(status(changed.is_ok()), &log_status(changed.err()))
        }
        _ => {
            let reload = view.reload().await;
            // Without a problem of the configuration, the present state doesn't allow it.
            let status = match !reload.ok && reload.problems.is_empty() {
                true => StatusCode::CONFLICT,
                false => status(reload.ok),
            };
            json(status, &reload)
        }
    }
}

/// Waits for a change or the end of the time: then the answer is the present state. Returns whether there
/// was a place to wait.
async fn wait_for_change(
    wait: &Wait,
    at: &mut watch::Receiver<At>,
    limits: &ListenerLimits,
) -> bool {
    let start = *at.borrow_and_update();
    if start.is_past(wait.after, start) {
        return true;
    }
    let Ok(_place) = limits.waiting.try_acquire() else { return false };
    let is_past = at.wait_for(|at| at.is_past(wait.after, start));
    let _ = tokio::time::timeout(wait.limit.min(limits.max_wait), is_past).await;
    true
}

fn too_many_wait() -> Response<ResponseBody> {
    busy("too many requests wait for changes (?after=, /v1/stream)")
}

/// Shows the present state, which was read at `at` or later.
async fn show<V: View>(
    endpoint: Endpoint,
    at: At,
    limits: &ListenerLimits,
    view: Arc<V>,
) -> Response<ResponseBody> {
    let documents = match &endpoint {
        // The health of this server alone: it waits for no view.
        Endpoint::Health => return text(StatusCode::OK, "ok\n"),
        Endpoint::LookUp { name, kind } => {
            return match view.look_up(name, kind).await {
                Ok(lookup) => rendered(json(StatusCode::OK, &lookup), at),
                Err(why) => {
                    let is_valid = check_question(name, kind).is_ok();
                    let status =
                        if is_valid { StatusCode::BAD_GATEWAY } else { StatusCode::BAD_REQUEST };
                    text(status, &format!("{why}\n"))
                }
            };
        }
        Endpoint::Metrics => &limits.metrics,
        _ => &limits.documents,
    };
    let document = documents.get(&endpoint, at, || async {
        if let Endpoint::Explain(what) = &endpoint {
            let (what, may_ask) = (what.clone(), limits.may_change);
            let explain = async move { view.explain(&what, may_ask).await };
            return match limits.work.spawn(explain).await {
                Ok(explanation) if explanation.is_routed() => json(StatusCode::OK, &explanation),
                Ok(explanation) => json(StatusCode::NOT_FOUND, &explanation),
                Err(error) => failure(&error),
            };
        }
        let endpoint = endpoint.clone();
        // A view waits for the datapath's lock, and a large one takes a while to render: the threads that
        // answer DNS must not be blocked.
        let document = limits.ask(move || render(&endpoint, &*view)).await;
        document.unwrap_or_else(|error| failure(&error))
    });
    match document.await {
        Some(document) => respond(document),
        None => busy("too many answers are being read"),
    }
}

fn render<V: View>(endpoint: &Endpoint, view: &V) -> Rendered {
    match endpoint {
        Endpoint::Status => json(StatusCode::OK, &view.status()),
        Endpoint::Services => json(StatusCode::OK, &view.services()),
        Endpoint::Metrics => (StatusCode::OK, prometheus::MEDIA_TYPE, view.metrics().into_bytes()),
        Endpoint::Ready => {
            let status = view.status();
            if status.ready {
                return plain(StatusCode::OK, "ready\n");
            }
            let problems: Vec<String> =
                status.problems.iter().map(|problem| terminal::escape(problem)).collect();
            let problems = problems.join("\n");
            plain(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready\n{problems}\n"))
        }
        Endpoint::EdgeReady => match view.edge_obstacle() {
            None => plain(StatusCode::OK, "ready\n"),
            Some(why) => plain(StatusCode::SERVICE_UNAVAILABLE, &format!("not ready\n{why}\n")),
        },
        Endpoint::Flows { by_bytes, limit } => match view.flows(*by_bytes, *limit) {
            Some(flows) => json(StatusCode::OK, &flows),
            None => plain(
                StatusCode::NOT_FOUND,
                "this node is no edge: set edge.interfaces and edge.source in its configuration\n",
            ),
        },
        Endpoint::Config => json(StatusCode::OK, &view.settings()),
        Endpoint::Drains => json(StatusCode::OK, &view.drains()),
        Endpoint::Log => json(StatusCode::OK, &log_status(None)),
        Endpoint::Health
        | Endpoint::Reload
        | Endpoint::Drain(_)
        | Endpoint::Undrain(_)
        | Endpoint::SetLog(_)
        | Endpoint::LookUp { .. }
        | Endpoint::Explain(_)
        | Endpoint::Stream
        | Endpoint::Page(_)
        | Endpoint::Trace(_) => plain(StatusCode::OK, "ok\n"),
    }
}

fn log_status(problem: Option<String>) -> api::LogStatus {
    api::LogStatus { ok: problem.is_none(), problem, filter: logging::current_filter() }
}
