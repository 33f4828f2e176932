//! Routes under `/v1/faults`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State as Shared};
use axum::http::{StatusCode, Uri};

use super::api::FaultSpec;
use super::routes::{Answer, Refusal, State, body};
use crate::device::fault::FaultTable;

fn table(state: &State, uri: &Uri) -> Result<Arc<FaultTable>, Refusal> {
    state.volume(uri)?.faults().cloned().ok_or_else(|| {
        let error = "this server runs without fault injection; restart it with --fault-injection";
        Refusal(StatusCode::NOT_FOUND, error.into())
    })
}

fn not_built() -> Refusal {
    Refusal(StatusCode::NOT_IMPLEMENTED, "this build has no fault rules".into())
}

pub(super) async fn list(Shared(state): Shared<State>, uri: Uri) -> Answer {
    table(&state, &uri)?;
    Err(not_built())
}

pub(super) async fn add(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    table(&state, &uri)?;
    let _spec: FaultSpec = body(bytes)?;
    Err(not_built())
}

pub(super) async fn clear_all(Shared(state): Shared<State>, uri: Uri) -> Answer {
    table(&state, &uri)?;
    Err(not_built())
}

pub(super) async fn clear_one(Shared(state): Shared<State>, uri: Uri, id: Result<Path<u64>, PathRejection>) -> Answer {
    table(&state, &uri)?;
    let Path(_id) = id.map_err(|e| Refusal(e.status(), e.body_text()))?;
    Err(not_built())
}
