//! What `stats` shows: requests and device operations in numbers, and how long they took.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::counters::{Counters, DEVICE_OPERATIONS, OperationNumbers};
use super::latency::{Histogram, upper_bound};
use super::report::SCHEMA_VERSION;
use crate::device::DeviceIndex;
use crate::engine::healer::HealerStatus;
use crate::engine::request::Operation;
use crate::units::Time;

/// The statistics of one volume, since its server started.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatsReport {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// The volume's set UUID.
    pub volume: String,
    /// Start of the server, seconds since the epoch: all numbers began at 0 then.
    pub started: u64,
    /// Seconds since then.
    pub uptime_seconds: u64,
    /// The guest's requests, by kind: `read`, `write`, `flush`, `discard`, `write_zeroes`.
    pub operations: Vec<OperationReport>,
    /// What was sent to devices, by device and kind; what healing and metadata take is among it.
    pub devices: Vec<DeviceOperationReport>,
    /// What the guest sent that was no valid request and was given back with an error. Not among `operations`.
    pub malformed_requests: u64,
    /// When a block last moved to a slot, seconds since the epoch; absent where none has.
    pub last_remap: Option<f64>,
    /// When a device last failed, seconds since the epoch; absent where none has.
    pub last_error: Option<f64>,
}

/// The guest's requests of one kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct OperationReport {
    /// `read`, `write`, `flush`, `discard` or `write_zeroes`.
    pub operation: String,
    /// Answered, well or with an error.
    pub completed: u64,
    /// Answered with an error.
    pub failed: u64,
    /// Those by why: `medium`, `gone`, `space`, `spare` (down, full or in doubt), `flush` (one failed, now or before),
    /// `refused` (beyond the end, a write to a read-only disk), `other`. Since the volume was last opened here.
    pub errors: BTreeMap<String, u64>,
    /// Bytes of those answered well: read, written, discarded or zeroed.
    pub bytes: u64,
    /// Taken from the guest and not yet answered.
    pub in_flight: u64,
    /// Age of the oldest of those in nanoseconds; 0 where there is none.
    pub oldest_in_flight_ns: u64,
    /// From the taking of a request to its answer.
    pub latency: LatencyReport,
}

/// How long requests took, in nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LatencyReport {
    /// All together.
    pub sum_ns: u64,
    /// The longest.
    pub max_ns: u64,
    /// Half of them took no longer; absent where there are none. Quantiles are at most 6.25 % too high.
    pub p50_ns: Option<u64>,
    /// 99 in a hundred took no longer.
    pub p99_ns: Option<u64>,
    /// 999 in a thousand took no longer.
    pub p999_ns: Option<u64>,
    /// Those buckets that have any, shortest first.
    pub buckets: Vec<LatencyBucket>,
}

/// Requests that took longer than the bucket before allows, and no longer than this one does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LatencyBucket {
    /// The longest latency in nanoseconds; absent for the last bucket, which has no end (from 68.7 seconds).
    pub le_ns: Option<u64>,
    /// How many.
    pub count: u64,
}

/// Operations of one kind on one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceOperationReport {
    /// `primary` or `spare`.
    pub device: String,
    /// `read`, `write`, `flush`, `discard` or `write_zeroes`.
    pub operation: String,
    /// Sent to the device.
    pub submitted: u64,
    /// Bytes those were about.
    pub bytes: u64,
    /// Failed ones by what the error number means: `medium`, `io` (EIO: the medium or the device), `gone`, `space`,
    /// `unsupported`, `host` (ours), `other`. Those of discards and zeroing are counted as of writes. Since the volume
    /// was last opened here.
    pub errors: BTreeMap<String, u64>,
}

impl From<&Histogram> for LatencyReport {
    fn from(histogram: &Histogram) -> Self {
        let counted = histogram.counts.iter().enumerate().filter(|(_, count)| **count > 0);
        LatencyReport {
            sum_ns: histogram.sum_ns,
            max_ns: histogram.max_ns,
            p50_ns: histogram.quantile_ns(500_000),
            p99_ns: histogram.quantile_ns(990_000),
            p999_ns: histogram.quantile_ns(999_000),
            buckets: counted.map(|(at, count)| LatencyBucket { le_ns: upper_bound(at), count: *count }).collect(),
        }
    }
}

/// Where a report comes from, beside the counters.
pub(super) struct Source<'a> {
    pub(super) volume: String,
    pub(super) started: u64,
    pub(super) now: Time,
    pub(super) malformed_requests: u64,
    /// When a block last moved to a slot, seconds since the epoch.
    pub(super) last_remap: Option<f64>,
    pub(super) devices: &'a [DeviceIndex],
    /// Of an open volume.
    pub(super) healer: Option<&'a HealerStatus>,
}

/// Add up.
pub(super) fn report(counters: &Counters, source: &Source<'_>) -> StatsReport {
    let operations = Operation::ALL.map(|operation| operation_report(counters, source, operation));
    let kinds = DEVICE_OPERATIONS.iter().enumerate();
    let of_device = |device: &DeviceIndex| {
        kinds.clone().map(|(kind, name)| device_report(counters, source, *device, kind, name)).collect::<Vec<_>>()
    };
    StatsReport {
        schema: SCHEMA_VERSION,
        volume: source.volume.clone(),
        started: source.started,
        uptime_seconds: source.now.0 / 1_000_000_000,
        operations: operations.into(),
        devices: source.devices.iter().flat_map(of_device).collect(),
        malformed_requests: source.malformed_requests,
        last_remap: source.last_remap,
        last_error: source
            .healer
            .and_then(|healer| healer.last_error)
            .map(|at| source.started as f64 + at.0 as f64 / 1e9),
    }
}

fn operation_report(counters: &Counters, source: &Source<'_>, operation: Operation) -> OperationReport {
    let OperationNumbers { failed, bytes, under_way, oldest_start, latency } = counters.operation(operation);
    let errors = source.healer.iter().flat_map(|healer| &healer.guest_errors);
    OperationReport {
        operation: operation.name().into(),
        completed: latency.count(),
        failed,
        errors: errors
            .filter(|((of, _), _)| *of == operation)
            .map(|((_, class), count)| (class.name().to_owned(), *count))
            .collect(),
        bytes,
        in_flight: under_way,
        oldest_in_flight_ns: oldest_start.map_or(0, |start| source.now.since_ns(start)),
        latency: LatencyReport::from(&latency),
    }
}

fn device_report(
    counters: &Counters,
    source: &Source<'_>,
    device: DeviceIndex,
    kind: usize,
    name: &str,
) -> DeviceOperationReport {
    let [submitted, bytes] = counters.device(device, kind);
    let errors = source.healer.iter().flat_map(|healer| &healer.errors_by_class);
    DeviceOperationReport {
        device: device.to_string(),
        operation: name.into(),
        submitted,
        bytes,
        errors: errors
            .filter(|((on, of, _), _)| (*on, *of) == (device, name))
            .map(|((.., class), count)| (class.name().to_owned(), *count))
            .collect(),
    }
}
