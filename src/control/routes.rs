//! Routes of the control socket: see [`super::api`] for the table.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State as Shared};
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::access::{self, Readers};
use super::api::{
    Done, EVENTS_LIMIT_MAX, EventsQuery, Failure, LIST_LIMIT_MAX, ListPage, ListQuery, LogLevel, Pong,
    REQUEST_BODY_MAX, Resize, SURFACE_CELLS_DEFAULT, ScanStart, Sectors, SurfaceQuery, WAIT_MAX_SECONDS,
};
use super::metrics::{self, Sample};
use super::server::{ServedVolume, wait_stopped};
use super::volume::{Order, ScanOrder, ScanScope, Volume};
use super::{faults, log_level, page, proc_text};
use crate::runtime::surface::CELLS_MAX;
use crate::units::{SECTOR_SIZE, Sector, SectorRange};

/// How often a waiting `/v1/events` looks for a new one: short for a person, rare enough to cost nothing.
const EVENTS_POLL: Duration = Duration::from_millis(200);

/// What all requests share.
#[derive(Clone)]
pub(super) struct State {
    pub(super) volumes: Arc<[ServedVolume]>,
    pub(super) orders: Arc<Semaphore>,
    pub(super) stopped: watch::Receiver<bool>,
}

/// All routes, for the control socket.
pub(super) fn control(state: State, readers: Readers) -> Router {
    let routes = reports().merge(orders()).route("/", get(page::over_socket));
    finished(routes, state).layer(middleware::from_fn_with_state(readers, access::readers_only_read))
}

/// Routes that only read, for whoever can reach the port.
pub(super) fn http(state: State) -> Router {
    let routes = reports().route("/", get(page::over_http));
    finished(routes, state).layer(middleware::from_fn(access::called_by_address))
}

fn reports() -> Router<State> {
    Router::new()
        .route("/v1/ping", get(ping))
        .route("/v1/status", get(status))
        .route("/v1/stats", get(stats))
        .route("/v1/list", get(list))
        .route("/v1/events", get(events))
        .route("/v1/faults", get(faults::list))
        .route("/proc", get(proc))
        .route("/metrics", get(metrics))
        .route("/metrics/dm-remap", get(dm_remap_metrics))
        .route("/v1/health", get(health))
        .route("/v1/surface", get(surface))
}

fn orders() -> Router<State> {
    Router::new()
        .route("/v1/faults", post(faults::add).delete(faults::clear_all))
        .route("/v1/faults/{id}", delete(faults::clear_one))
        .route("/v1/clear", post(clear))
        .route("/v1/save", post(save))
        .route("/v1/remap", post(remap))
        .route("/v1/release", post(release))
        .route("/v1/resize", post(resize))
        .route("/v1/scan/start", post(scan_start))
        .route("/v1/scan/pause", post(scan_pause))
        .route("/v1/scan/resume", post(scan_resume))
        .route("/v1/scan/cancel", post(scan_cancel))
        .route("/v1/log-level", post(set_log_level))
        .route("/v1/clear-stats", post(clear_stats))
}

fn finished(routes: Router<State>, state: State) -> Router {
    routes
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(REQUEST_BODY_MAX))
        .layer(middleware::map_response(not_guessed))
        .with_state(state)
}

/// No browser is to take a document for something that it runs (Fetch standard, "X-Content-Type-Options").
async fn not_guessed(mut response: Response) -> Response {
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A refusal on its way out: a status and one line.
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        // It may quote the client's own words, and those may have line breaks.
        let mut error = String::with_capacity(self.1.len());
        for c in self.1.chars() {
            if c.is_control() { error.extend(c.escape_default()) } else { error.push(c) }
        }
        json(self.0, &Failure { error })
    }
}

pub(super) type Answer = Result<Response, Refusal>;

fn json(status: StatusCode, document: &impl Serialize) -> Response {
    let body = serde_json::to_vec(document).expect("documents are plain data with string keys");
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

pub(super) fn ok(document: &impl Serialize) -> Answer {
    Ok(json(StatusCode::OK, document))
}

/// Which volume a request is about.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Which {
    volume: Option<String>,
}

impl State {
    pub(super) fn volume(&self, uri: &Uri) -> Result<Arc<dyn Volume>, Refusal> {
        let Which { volume: wanted } = query(uri)?;
        let names = || self.volumes.iter().map(|v| v.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = match wanted {
            Some(wanted) => self.volumes.iter().find(|v| v.name == wanted || v.uuid == wanted).ok_or_else(|| {
                Refusal(StatusCode::NOT_FOUND, format!("no volume {wanted:?}; there are: {}", names()))
            })?,
            None => match &*self.volumes {
                [only] => only,
                _ => return Err(Refusal(StatusCode::BAD_REQUEST, format!("say which volume: {}", names()))),
            },
        };
        Ok(found.volume.clone())
    }

    /// Ask for a report on a thread that may wait.
    async fn report<T: Send + 'static>(
        &self,
        uri: &Uri,
        ask: impl FnOnce(&dyn Volume) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let volume = self.volume(uri)?;
        on_a_thread(move || ask(&*volume)).await
    }

    /// Give an order, unless too many are under way.
    async fn order(&self, uri: &Uri, order: Order) -> Answer {
        let volume = self.volume(uri)?;
        let permit = self.orders.clone().try_acquire_owned().map_err(|_| {
            Refusal(StatusCode::SERVICE_UNAVAILABLE, "other orders are still under way; try again".into())
        })?;
        let answer = on_a_thread(move || {
            let _permit = permit;
            volume.order(order)
        });
        match answer.await? {
            Ok(message) => ok(&Done { message }),
            Err(refused) => Err(Refusal(StatusCode::CONFLICT, refused.to_string())),
        }
    }
}

impl State {
    /// Of all volumes: whoever scrapes wants one page for a server.
    async fn metrics(&self, render: fn(&[Sample]) -> String) -> Answer {
        let volumes = self.volumes.clone();
        let text = on_a_thread(move || {
            let sample =
                |v: &ServedVolume| Sample { name: v.name.clone(), status: v.volume.status(), stats: v.volume.stats() };
            render(&volumes.iter().map(sample).collect::<Vec<_>>())
        });
        Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text.await?).into_response())
    }
}

async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| Refusal(StatusCode::INTERNAL_SERVER_ERROR, format!("the server failed on this request: {e}")))
}

fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Refusal> {
    Ok(Query::try_from_uri(uri)?.0)
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        Refusal(rejection.status(), rejection.body_text())
    }
}

/// The body of a request.
pub(super) fn body<T: DeserializeOwned>(bytes: Result<Bytes, BytesRejection>) -> Result<T, Refusal> {
    let bytes = bytes.map_err(|e| match e.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Refusal(e.status(), format!("the request body is longer than {REQUEST_BODY_MAX} bytes"))
        }
        status => Refusal(status, e.body_text()),
    })?;
    serde_json::from_slice(&bytes).map_err(|e| Refusal(StatusCode::BAD_REQUEST, format!("bad request body: {e}")))
}

async fn no_such_route(method: Method, uri: Uri) -> Refusal {
    Refusal(StatusCode::NOT_FOUND, format!("no such route: {method} {}", uri.path()))
}

async fn no_such_method(method: Method, uri: Uri) -> Refusal {
    Refusal(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
}

async fn ping(Shared(state): Shared<State>) -> Answer {
    ok(&Pong {
        pong: true,
        version: env!("CARGO_PKG_VERSION").into(),
        volumes: state.volumes.iter().map(|v| v.name.clone()).collect(),
    })
}

async fn status(Shared(state): Shared<State>, uri: Uri) -> Answer {
    ok(&state.report(&uri, |volume| volume.status()).await?)
}

async fn stats(Shared(state): Shared<State>, uri: Uri) -> Answer {
    ok(&state.report(&uri, |volume| volume.stats()).await?)
}

async fn list(Shared(state): Shared<State>, uri: Uri) -> Answer {
    let ListQuery { volume: _, filter, from, limit } = query(&uri)?;
    let limit = limit.unwrap_or(LIST_LIMIT_MAX).clamp(1, LIST_LIMIT_MAX);
    let entries = state.report(&uri, move |volume| volume.list(filter, from, limit)).await?;
    let entries = entries.map_err(|refused| Refusal(StatusCode::CONFLICT, refused.to_string()))?;
    let next = match entries.last() {
        Some(last) if entries.len() == limit => last.sector.checked_add(u64::from(last.sectors)),
        _ => None,
    };
    ok(&ListPage { entries, next })
}

async fn events(Shared(state): Shared<State>, uri: Uri) -> Answer {
    let EventsQuery { volume: _, after, limit, wait } = query(&uri)?;
    let limit = limit.unwrap_or(EVENTS_LIMIT_MAX).clamp(1, EVENTS_LIMIT_MAX);
    let deadline = Instant::now() + Duration::from_secs(wait.min(WAIT_MAX_SECONDS));
    let mut stopped = state.stopped.clone();
    loop {
        let page = state.report(&uri, move |volume| volume.events(after, limit)).await?;
        let now = Instant::now();
        if !page.events.is_empty() || now >= deadline || *stopped.borrow() {
            return ok(&page);
        }
        // Woken early by the end of the server: what there is now is the answer.
        let nap = EVENTS_POLL.min(deadline - now);
        let _ = tokio::time::timeout(nap, wait_stopped(&mut stopped)).await;
    }
}

async fn health(Shared(state): Shared<State>, uri: Uri) -> Answer {
    let health = state.report(&uri, |volume| volume.health()).await?;
    ok(&health.map_err(|refused| Refusal(StatusCode::CONFLICT, refused.to_string()))?)
}

async fn surface(Shared(state): Shared<State>, uri: Uri) -> Answer {
    let SurfaceQuery { volume: _, cells } = query(&uri)?;
    let cells = cells.unwrap_or(SURFACE_CELLS_DEFAULT);
    if !(1..=CELLS_MAX).contains(&cells) {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("{cells} cells is not between 1 and {CELLS_MAX}")));
    }
    let surface = state.report(&uri, move |volume| volume.surface(cells)).await?;
    ok(&surface.map_err(|refused| Refusal(StatusCode::CONFLICT, refused.to_string()))?)
}

async fn clear_stats(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::ClearStats).await
}

async fn clear(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::Clear).await
}

async fn save(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::Save).await
}

async fn remap(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    state.order(&uri, Order::Remap(sectors(body(bytes)?)?)).await
}

async fn release(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    state.order(&uri, Order::Release(sectors(body(bytes)?)?)).await
}

async fn resize(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    let Resize { size } = body(bytes)?;
    if let Some(size) = size.filter(|size| *size == 0 || !size.is_multiple_of(SECTOR_SIZE)) {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("{size} bytes is no multiple of {SECTOR_SIZE}")));
    }
    state.order(&uri, Order::Resize(size)).await
}

async fn scan_start(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    let nothing = bytes.as_ref().is_ok_and(Bytes::is_empty);
    let ScanStart { range, check_only } = if nothing { ScanStart::default() } else { body(bytes)? };
    let range = range.map(sectors).transpose()?;
    state.order(&uri, Order::Scan(ScanOrder::Start(ScanScope { range, check_only }))).await
}

async fn scan_pause(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::Scan(ScanOrder::Pause)).await
}

async fn scan_resume(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::Scan(ScanOrder::Resume)).await
}

async fn scan_cancel(Shared(state): Shared<State>, uri: Uri) -> Answer {
    state.order(&uri, Order::Scan(ScanOrder::Cancel)).await
}

fn sectors(Sectors { start, count }: Sectors) -> Result<SectorRange, Refusal> {
    let range = SectorRange { start: Sector(start), count };
    if range.is_empty() || range.checked_end().is_none() {
        return Err(Refusal(StatusCode::BAD_REQUEST, format!("{count} sectors from {start} is no range")));
    }
    Ok(range)
}

async fn set_log_level(bytes: Result<Bytes, BytesRejection>) -> Answer {
    let wanted: LogLevel = body(bytes)?;
    let Some(filter) = log_level::filter(wanted.level) else {
        let error = format!("log level {} is not between 0 and {}", wanted.level, log_level::MAX);
        return Err(Refusal(StatusCode::BAD_REQUEST, error));
    };
    log::set_max_level(filter);
    ok(&wanted)
}

async fn proc(Shared(state): Shared<State>) -> Answer {
    let volumes = state.volumes.clone();
    let reports = on_a_thread(move || volumes.iter().map(|v| v.volume.status()).collect::<Vec<_>>()).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], proc_text::render(&reports)).into_response())
}

async fn metrics(Shared(state): Shared<State>) -> Answer {
    state.metrics(metrics::render).await
}

async fn dm_remap_metrics(Shared(state): Shared<State>) -> Answer {
    state.metrics(metrics::render_dm_remap).await
}
