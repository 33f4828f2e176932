//! How the scanner stands, as plain data.

use std::collections::BTreeSet;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::handle::VolumeHandle;
pub use crate::engine::scan::{Found, LastPass};
use crate::engine::scan::{ScanParams, ScanStatus, Scanned, Skipped};
use crate::units::Block;

/// The scanner: what it was told, and how its pass stands. Where none is under way, `started` to `skipped_bytes` are of
/// the last one: how far it came, and what it skipped, until the volume is closed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ScanReport {
    /// `off` (passes begin only by order, and none is under way), `waiting` (for the time of the next one), `running`,
    /// `paused` (by order), `outside-window`, or `held` (see `held`); empty while the volume is away.
    pub state: String,
    /// Why the pass does not go on, where it is held.
    #[serde(default)]
    pub held: Option<String>,
    /// Seconds from the end of a pass to the start of the next one; absent where they begin only by order.
    #[serde(default)]
    pub interval_seconds: Option<u64>,
    /// Bytes of a second read at most, where there is a limit.
    #[serde(default)]
    pub rate_limit: Option<u64>,
    /// When passes that were not ordered go on, by local time: `always`, or as typed.
    pub window: String,
    /// Whether weak blocks move to slots.
    pub move_weak: bool,
    /// The number of the pass that is under way; of the last one where none is; 0 before the first.
    pub pass: u64,
    /// The sectors that it covers, or covered; absent where that is the whole volume, with slots and metadata.
    #[serde(default)]
    pub range: Option<ScanRange>,
    /// Whether it only looks: nothing is moved, healed or repaired.
    pub check_only: bool,
    /// When it began, seconds since the epoch.
    pub started: u64,
    /// How much of it is done, 0 to 100.
    pub percent: f64,
    /// Bytes it has been over.
    pub covered_bytes: u64,
    /// Bytes it is to go over, as they are now.
    pub total_bytes: u64,
    /// Bytes read from devices for it; more than covered where something was read again.
    pub read_bytes: u64,
    /// Bytes of a second covered lately.
    pub speed_now: u64,
    /// Bytes of a second covered since it began or went on.
    pub speed_average: u64,
    /// Seconds it will take at its average speed; absent where it does not move.
    #[serde(default)]
    pub eta_seconds: Option<u64>,
    /// What it has come upon.
    pub found: Found,
    /// What it could not look at: the first parts.
    pub skipped: Vec<SkippedReport>,
    /// Bytes of all such parts.
    pub skipped_bytes: u64,
    /// Blocks in slots whose old place on the primary was read well, by this pass and since the volume was opened:
    /// `release` may bring them back and free their slots.
    #[serde(default)]
    pub releasable: u64,
    /// The pass that ended last.
    #[serde(default)]
    pub last: Option<LastPass>,
    /// When the last pass ended that was of the whole volume and skipped nothing, seconds since the epoch.
    #[serde(default)]
    pub last_complete: Option<u64>,
    /// When the next one begins by itself, seconds since the epoch.
    #[serde(default)]
    pub next: Option<u64>,
}

/// Sectors (512 bytes each) of the guest's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ScanRange {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u64,
}

/// A part of a device that a pass could not look at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SkippedReport {
    /// `primary` or `spare`.
    pub device: String,
    /// Its first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub why: String,
}

impl From<&Skipped> for SkippedReport {
    fn from(skipped: &Skipped) -> Self {
        let Skipped { device, offset, len, why } = skipped;
        SkippedReport { device: device.to_string(), offset: *offset, len: *len, why: why.clone() }
    }
}

impl ScanReport {
    /// Of a scanner that was told this.
    pub(super) fn of(params: &ScanParams, status: ScanStatus) -> ScanReport {
        let percent = match status.total {
            0 => 0.0,
            total => (status.covered as f64 / total as f64 * 100.0).min(100.0),
        };
        ScanReport {
            state: status.state.name().into(),
            held: status.held,
            interval_seconds: params.interval,
            rate_limit: params.rate,
            window: params.window.to_string(),
            move_weak: params.move_weak,
            pass: status.pass,
            range: status.scope.range.map(|range| ScanRange { start: range.start.0, count: range.count }),
            check_only: status.scope.check_only,
            started: status.started,
            percent,
            covered_bytes: status.covered,
            total_bytes: status.total,
            read_bytes: status.read,
            speed_now: status.speed_now,
            speed_average: status.speed_average,
            eta_seconds: status.eta_seconds,
            found: status.found,
            skipped: status.skipped.iter().map(SkippedReport::from).collect(),
            skipped_bytes: status.skipped_bytes,
            releasable: status.releasable,
            last: status.last,
            last_complete: status.last_complete,
            next: status.next,
        }
    }

    /// Whether a pass is under way, be it that it stands still.
    pub fn is_under_way(&self) -> bool {
        ["running", "paused", "outside-window", "held"].contains(&self.state.as_str())
    }
}

impl VolumeHandle {
    /// Slow blocks, and what the scanner has read; nothing once the volume is being closed.
    pub fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)> {
        let scan = self.healer_status()?.scan;
        Some((scan.slow, scan.scanned))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceIndex;
    use crate::engine::scan::{ScanScope, ScanState};
    use crate::units::{Sector, SectorRange};

    #[test]
    fn a_report_says_what_the_scanner_says() {
        let params = ScanParams { interval: Some(3600), rate: None, ..ScanParams::default() };
        let range = SectorRange { start: Sector(8), count: 16 };
        let status = ScanStatus {
            state: ScanState::Held,
            held: Some("the primary is gone".into()),
            scope: ScanScope { range: Some(range), check_only: true },
            covered: 1,
            total: 3,
            found: Found { bad: 1, lost: 2, ..Found::default() },
            skipped: vec![Skipped { device: DeviceIndex::SPARE, offset: 4096, len: 512, why: "gone".into() }],
            ..ScanStatus::default()
        };
        let report = ScanReport::of(&params, status);
        assert!(report.is_under_way() && (report.percent - 33.3).abs() < 0.1, "{report:?}");
        assert_eq!((report.range, report.check_only), (Some(ScanRange { start: 8, count: 16 }), true));
        assert_eq!((report.skipped[0].device.as_str(), report.window.as_str()), ("spare", "always"));
        assert_eq!(report.found.kinds().iter().map(|(_, count)| count).sum::<u64>(), 3);
        let empty = ScanReport::of(&params, ScanStatus::default());
        assert!((empty.percent, empty.is_under_way()) == (0.0, false), "{empty:?}");
        // Covered more than there is, as the map has shrunk meanwhile.
        let over = ScanReport::of(&params, ScanStatus { covered: 5, total: 4, ..ScanStatus::default() });
        assert!(over.percent <= 100.0, "{over:?}");
    }
}
