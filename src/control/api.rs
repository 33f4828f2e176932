//! What server and client say to each other, beside the documents of [`crate::runtime::report`].
//!
//! | route | answer |
//! |---|---|
//! | `GET /v1/ping` | [`Pong`] |
//! | `GET /v1/status` | [`StatusReport`](crate::runtime::report::StatusReport) |
//! | `GET /v1/stats` | [`StatsReport`](crate::runtime::stats::StatsReport) |
//! | `GET /v1/list?filter=all\|lost\|pending&from=SECTOR&limit=N` | [`ListPage`] |
//! | `GET /v1/events?after=SEQ&limit=N&wait=SECONDS` | [`EventPage`](crate::runtime::report::EventPage) |
//! | `GET /v1/faults` | [`FaultList`] |
//! | `POST /v1/faults` with a [`FaultRule`](crate::device::fault::FaultRule) | [`FaultAdded`] |
//! | `DELETE /v1/faults`, `DELETE /v1/faults/ID` | [`FaultsCleared`] |
//! | `POST /v1/clear`, `POST /v1/save` | [`Done`] |
//! | `POST /v1/remap`, `POST /v1/release` with [`Sectors`] | [`Done`] |
//! | `POST /v1/resize` with [`Resize`] | [`Done`] |
//! | `POST /v1/scan/start` with a [`ScanStart`], or nothing | [`Done`] |
//! | `POST /v1/scan/pause`, `POST /v1/scan/resume`, `POST /v1/scan/cancel` | [`Done`] |
//! | `POST /v1/log-level` with [`LogLevel`] | [`LogLevel`] |
//! | `GET /` | a page for browsers that shows what the other routes say, see `control::page` |
//! | `GET /proc` | plain text |
//! | `GET /v1/health` | [`HealthReport`](crate::runtime::health::HealthReport) |
//! | `GET /v1/surface?cells=N` | [`SurfaceReport`](crate::runtime::surface::SurfaceReport) |
//! | `POST /v1/clear-stats` | [`Done`] |
//! | `GET /metrics` | all volumes in Prometheus' text format, see [`metrics`](super::metrics) |
//! | `GET /metrics/dm-remap` | the same under dm-remap's names |
//!
//! Over TCP (`serve --http-listen`) there are only the `GET` routes, for callers that name the server by an address or
//! as `localhost`. Members of `serve --control-group` may ask for these on the control socket, and give no orders.
//!
//! Every failure is a [`Failure`] with a status of 400 and up. Where a server has several volumes,
//! `volume=NAME` or `volume=UUID` in the query says which.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::fault::FaultReport;
use crate::runtime::report::{ListEntry, ListFilter};

/// The most rows of `list` in one answer.
pub const LIST_LIMIT_MAX: usize = 4096;
/// Cells of `/v1/surface`, where nobody said how many.
pub const SURFACE_CELLS_DEFAULT: u64 = 1024;
/// The most events in one answer.
pub const EVENTS_LIMIT_MAX: usize = 4096;
/// The longest an answer to `/v1/events` is put off, in seconds.
pub const WAIT_MAX_SECONDS: u64 = 60;
/// The largest request body. The longest legal one, a fault rule with many ranges, is far smaller.
pub const REQUEST_BODY_MAX: usize = 64 << 10;

/// A request that was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// One line for a person.
    pub error: String,
}

/// The server is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// Always true.
    pub pong: bool,
    /// Version of the server program.
    pub version: String,
    /// Names of the volumes served.
    pub volumes: Vec<String>,
}

/// The query of `/v1/list`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ListQuery {
    /// Name or UUID of the volume, where there are several.
    pub volume: Option<String>,
    /// Which blocks.
    pub filter: ListFilter,
    /// From this sector on.
    pub from: u64,
    /// At most so many rows; [`LIST_LIMIT_MAX`] where absent or more.
    pub limit: Option<usize>,
}

/// A page of `list`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ListPage {
    /// By address.
    pub entries: Vec<ListEntry>,
    /// Ask from this sector for more; absent on the last page.
    pub next: Option<u64>,
}

/// The query of `/v1/events`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EventsQuery {
    /// Name or UUID of the volume, where there are several.
    pub volume: Option<String>,
    /// Events after this number.
    pub after: u64,
    /// At most so many; [`EVENTS_LIMIT_MAX`] where absent or more.
    pub limit: Option<usize>,
    /// Where there is none yet, wait so many seconds for one, at most [`WAIT_MAX_SECONDS`].
    pub wait: u64,
}

/// The query of `/v1/surface`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SurfaceQuery {
    /// Name or UUID of the volume, where there are several.
    pub volume: Option<String>,
    /// At most so many cells, up to [`CELLS_MAX`](crate::runtime::surface::CELLS_MAX); [`SURFACE_CELLS_DEFAULT`] where
    /// absent.
    pub cells: Option<u64>,
}

/// The sectors an order is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sectors {
    /// First sector.
    pub start: u64,
    /// Number of sectors.
    pub count: u64,
}

/// How large the disk is to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// Bytes, a multiple of 512; all that the primary has room for where absent.
    #[serde(default)]
    pub size: Option<u64>,
}

/// What a pass of the scanner is to cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScanStart {
    /// Only these sectors; the whole volume, slots and metadata where absent.
    pub range: Option<Sectors>,
    /// Only look: nothing is moved, healed or repaired.
    pub check_only: bool,
}

/// An order was carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// One line for a person.
    pub message: String,
}

/// A debug level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogLevel {
    /// 0 warn, 1 info, 2 debug, 3 trace.
    pub level: u8,
}

/// A rule was added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultAdded {
    /// Its number.
    pub id: u64,
}

/// The fault rules.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FaultList {
    /// In the order in which they are asked.
    pub rules: Vec<FaultReport>,
}

/// Rules were removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FaultsCleared {
    /// How many.
    pub cleared: usize,
}
