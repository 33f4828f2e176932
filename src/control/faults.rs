//! Routes under `/v1/faults`.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State as Shared};
use axum::http::{StatusCode, Uri};

use super::api::{FaultAdded, FaultList, FaultsCleared};
use super::routes::{Answer, Refusal, State, body, ok};
use crate::device::fault::{FaultRule, FaultTable};

fn table(state: &State, uri: &Uri) -> Result<Arc<FaultTable>, Refusal> {
    state.volume(uri)?.faults().cloned().ok_or_else(|| {
        let error = "this server runs without fault injection; restart it with --fault-injection";
        Refusal(StatusCode::NOT_FOUND, error.into())
    })
}

pub(super) async fn list(Shared(state): Shared<State>, uri: Uri) -> Answer {
    ok(&FaultList { rules: table(&state, &uri)?.list() })
}

pub(super) async fn add(Shared(state): Shared<State>, uri: Uri, bytes: Result<Bytes, BytesRejection>) -> Answer {
    let table = table(&state, &uri)?;
    let rule: FaultRule = body(bytes)?;
    let id = table.add(rule).map_err(|e| Refusal(StatusCode::CONFLICT, e.to_string()))?;
    ok(&FaultAdded { id })
}

pub(super) async fn clear_all(Shared(state): Shared<State>, uri: Uri) -> Answer {
    ok(&FaultsCleared { cleared: table(&state, &uri)?.clear(None) })
}

pub(super) async fn clear_one(Shared(state): Shared<State>, uri: Uri, id: Result<Path<u64>, PathRejection>) -> Answer {
    let table = table(&state, &uri)?;
    let Path(id) = id.map_err(|e| Refusal(e.status(), e.body_text()))?;
    match table.clear(Some(id)) {
        0 => Err(Refusal(StatusCode::NOT_FOUND, format!("there is no fault rule {id}; see `fault list`"))),
        cleared => ok(&FaultsCleared { cleared }),
    }
}
