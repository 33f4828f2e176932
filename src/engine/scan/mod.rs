//! A scanner pass in plain data: what is asked for and how it stands. What is done is in
//! [`healer`](super::healer); [`plan`] has the order of it, [`pace`] its speed, [`window`] its times.

pub mod pace;
pub mod plan;
pub mod window;

use std::collections::BTreeSet;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::device::DeviceIndex;
use crate::units::{Block, Sector, SectorRange};

pub use pace::GuestLoad;
pub use window::Window;

/// What the operator chose of the scanner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanParams {
    /// Seconds from the end of a pass to the start of the next one; where absent, passes begin only by order.
    pub interval: Option<u64>,
    /// Bytes of a second read at most.
    pub rate: Option<u64>,
    /// When passes that were not ordered go on.
    pub window: Window,
    /// Whether weak blocks move to slots.
    pub move_weak: bool,
}

/// What a pass is to cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScanScope {
    /// Only these sectors, wherever they live; the whole volume, slots and metadata where absent.
    pub range: Option<SectorRange>,
    /// Only look: nothing is moved, healed or repaired.
    pub check_only: bool,
}

/// An operator's order to the scanner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanOrder {
    /// Begin a pass.
    Start(ScanScope),
    /// Stop reading, and keep the place.
    Pause,
    /// Go on.
    Resume,
    /// Give the pass up.
    Cancel,
}

/// What the scanner is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ScanState {
    /// There are no passes but by order.
    #[default]
    Off,
    /// The next pass has not begun.
    Waiting,
    /// A pass is under way.
    Running,
    /// A pass was paused by order.
    Paused,
    /// A pass goes on when its window opens.
    OutsideWindow,
    /// A pass goes on when a device is back, or the volume is written again.
    Held,
}

impl ScanState {
    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            ScanState::Off => "off",
            ScanState::Waiting => "waiting",
            ScanState::Running => "running",
            ScanState::Paused => "paused",
            ScanState::OutsideWindow => "outside-window",
            ScanState::Held => "held",
        }
    }
}

/// What a pass came upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Found {
    /// Blocks (4096 bytes) with sectors that could not be read.
    pub bad: u64,
    /// Blocks read only after retries.
    pub recovered: u64,
    /// Blocks far slower than their neighbours, also when they were read again.
    pub slow: u64,
    /// Sectors (512 bytes) that are lost, and stayed so.
    pub lost: u64,
    /// Lost sectors that read again, and rewritten blocks that were read.
    pub healed: u64,
    /// Blocks moved to a slot, or to another one.
    pub moved: u64,
    /// Blocks that the guest rewrote in place meanwhile after a failure.
    pub rewritten: u64,
    /// Damaged copies of metadata.
    pub metadata: u64,
}

impl Found {
    /// By their names.
    pub fn kinds(&self) -> [(&'static str, u64); 8] {
        let Found { bad, recovered, slow, lost, healed, moved, rewritten, metadata } = *self;
        [
            ("bad", bad),
            ("recovered", recovered),
            ("slow", slow),
            ("lost", lost),
            ("healed", healed),
            ("moved", moved),
            ("rewritten", rewritten),
            ("metadata", metadata),
        ]
    }

    /// What came since `earlier`.
    pub fn since(&self, earlier: &Found) -> Found {
        self.with(earlier, u64::saturating_sub)
    }

    /// Both together.
    pub fn plus(&self, more: &Found) -> Found {
        self.with(more, u64::saturating_add)
    }

    fn with(&self, other: &Found, of: fn(u64, u64) -> u64) -> Found {
        Found {
            bad: of(self.bad, other.bad),
            recovered: of(self.recovered, other.recovered),
            slow: of(self.slow, other.slow),
            lost: of(self.lost, other.lost),
            healed: of(self.healed, other.healed),
            moved: of(self.moved, other.moved),
            rewritten: of(self.rewritten, other.rewritten),
            metadata: of(self.metadata, other.metadata),
        }
    }
}

/// A part of a device that a pass could not look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// The device.
    pub device: DeviceIndex,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Why.
    pub why: String,
}

/// A pass that has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LastPass {
    /// Its number.
    pub pass: u64,
    /// When it began, seconds since the epoch.
    pub started: u64,
    /// When it ended, seconds since the epoch.
    pub ended: u64,
    /// Whether it was of the whole volume and skipped nothing.
    pub complete: bool,
    /// Whether it was given up by order.
    pub cancelled: bool,
    /// What it came upon.
    pub found: Found,
}

/// How the scanner stands. Where no pass is under way, what is said of one is said of the last one, how far it came and
/// what it skipped only until the volume is closed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScanStatus {
    /// What it is doing.
    pub state: ScanState,
    /// Why it does not go on, where it is held.
    pub held: Option<String>,
    /// The number of the pass that is under way; of the last one where none is.
    pub pass: u64,
    /// What that covers.
    pub scope: ScanScope,
    /// When that began, seconds since the epoch.
    pub started: u64,
    /// Bytes it has been over.
    pub covered: u64,
    /// Bytes it is to go over, as they are now.
    pub total: u64,
    /// Bytes read from devices for it, counted where operations are submitted.
    pub read: u64,
    /// Bytes of a second covered lately.
    pub speed_now: u64,
    /// Bytes of a second covered since it began or went on.
    pub speed_average: u64,
    /// Seconds it will take at its average speed; where it moves.
    pub eta_seconds: Option<u64>,
    /// What it has come upon.
    pub found: Found,
    /// What it could not look at: the first parts.
    pub skipped: Vec<Skipped>,
    /// Bytes of all such parts.
    pub skipped_bytes: u64,
    /// Blocks in slots whose old place on the primary was read well by this pass, since the volume was opened.
    pub releasable: u64,
    /// The pass that ended last.
    pub last: Option<LastPass>,
    /// When the last pass ended that was of the whole volume and skipped nothing, seconds since the epoch.
    pub last_complete: Option<u64>,
    /// When the next one begins by itself.
    pub next: Option<u64>,
    /// Blocks that were far slower than their neighbours when they were last read, the first so many.
    pub slow: Arc<BTreeSet<Block>>,
    /// What was read of the primary.
    pub scanned: Scanned,
}

/// What was read of the primary: the first so many units of a pass, in its order, but for what it skipped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scanned {
    /// The sectors that the pass goes over.
    pub extent: SectorRange,
    /// How far it came; see [`plan::Order`].
    pub position: u64,
    /// What it skipped.
    pub skipped: Vec<SectorRange>,
}

impl Scanned {
    /// Whether all of these sectors were.
    pub fn has(&self, range: SectorRange) -> bool {
        let is_skipped = |skipped: &SectorRange| skipped.start < range.end() && range.start < skipped.end();
        let is_outside = range.start < self.extent.start || range.end() > self.extent.end();
        if is_outside || self.skipped.iter().any(is_skipped) {
            return false;
        }
        let order = plan::Order::new(self.extent);
        let (first, last) = (order.unit_of(range.start), order.unit_of(Sector(range.end().0.saturating_sub(1))));
        self.position >= order.positions() || (first..=last).all(|unit| order.position_of(unit) < self.position)
    }
}
