//! What an operator can ask of a running volume, as plain data: the control socket serves it as JSON,
//! the command line prints it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use strum::VariantNames;

use super::scan_report::ScanReport;
use crate::engine::event::EventKind;

/// Version of the JSON documents below; raised when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// The state of one volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatusReport {
    /// [`SCHEMA_VERSION`].
    pub schema: u32,
    /// Version of the server program.
    pub version: String,
    /// The volume's set UUID.
    pub volume: String,
    /// `ok`, or what is wrong, most serious first: `poisoned`, `primary-gone`, `spare-down`, `spare-full`,
    /// `read-only`; `away` while the volume is not open here, and then only what its superblock says is known.
    pub state: Vec<String>,
    /// One line for each entry of `state` that is not `ok`: the device, the number, what to do.
    pub messages: Vec<String>,
    /// Devices in order: the primary, then spares.
    pub devices: Vec<DeviceReport>,
    /// Size of the disk the guest sees, in 512-byte sectors.
    pub capacity_sectors: u64,
    /// Block numbers, 4096 bytes each.
    pub blocks: BlockReport,
    /// Since the server started, took the volume again, or was told to clear them.
    pub counters: Counters,
    /// Since the volume was created.
    pub lifetime: Counters,
    /// Seconds since the server started.
    pub uptime_seconds: u64,
    /// Start of the server, seconds since the epoch.
    pub started: u64,
    /// Way of device I/O: `io_uring` or `threads`, with the reason where it is not the first choice; `none` while the
    /// volume is away.
    pub io_engine: String,
    /// Cache mode: `none` or `writeback`.
    pub cache: String,
    /// Worker threads.
    pub workers: u32,
    /// Microseconds that each looks at its rings before it sleeps, at most.
    #[serde(default)]
    pub polling_us: u32,
    /// What speaks vhost-user: `own`, or `framework` for rust-vmm's daemon.
    #[serde(default)]
    pub transport: String,
    /// Whether a front-end is connected.
    pub connected: bool,
    /// Oldest request not yet answered, in milliseconds; 0 where there is none.
    pub oldest_in_flight_ms: u64,
    /// What the guest sent that was no valid request and was given back with an error: the guest's
    /// driver is broken or hostile. They have no event each.
    #[serde(default)]
    pub malformed_requests: u64,
    /// Events dropped because the log was full.
    pub events_dropped: u64,
    /// `OK`, `WATCH`, `AT_RISK` or `REPLACE`, see [`HealthReport`](super::health::HealthReport); empty while the volume
    /// is away.
    #[serde(default)]
    pub health: String,
    /// 0 to 100; 0 while the volume is away.
    #[serde(default)]
    pub health_score: u64,
    /// When `counters` and the devices' errors began, seconds since the epoch: at the start of the server, or when they
    /// were last cleared.
    #[serde(default)]
    pub counters_since: u64,
    /// The scanner.
    #[serde(default)]
    pub scan: ScanReport,
    /// From the taking of a request to its answer, in nanoseconds: the sum over the requests that `counters` has.
    #[serde(default)]
    pub request_ns: u64,
    /// The guest's writes that failed on the primary since one last succeeded there.
    #[serde(default)]
    pub failed_writes_in_a_row: u64,
}

impl StatusReport {
    /// Seconds that `counters` cover.
    pub fn counted_seconds(&self) -> u64 {
        self.started.saturating_add(self.uptime_seconds).saturating_sub(self.counters_since)
    }

    /// Mean time from the taking of a request to its answer, in nanoseconds; `None` where there were no requests.
    pub fn mean_latency_ns(&self) -> Option<u64> {
        self.request_ns.checked_div(self.counters.requests())
    }
}

/// One device of a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct DeviceReport {
    /// `primary` or `spare`.
    pub role: String,
    /// Absolute.
    pub path: String,
    /// `up`, `gone` (with the breaker open), `down`, `away`.
    pub state: String,
    /// Size in bytes.
    pub size: u64,
    /// Logical block size in bytes.
    pub logical_block: u32,
    /// Failed reads, writes and flushes, as the device reported them.
    pub read_errors: u64,
    /// See `read_errors`.
    pub write_errors: u64,
    /// See `read_errors`.
    pub flush_errors: u64,
}

/// Blocks by state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BlockReport {
    /// Live remapped blocks.
    pub remapped: u64,
    /// The most that can be remapped.
    pub remaps_max: u64,
    /// Slots free for use.
    pub slots_free: u64,
    /// Slots retired after a failed write.
    pub slots_retired: u64,
    /// Pending blocks.
    pub pending: u64,
    /// Lost sectors (512 bytes each).
    pub lost_sectors: u64,
    /// Blocks whose commit is in doubt.
    pub in_doubt: u64,
}

/// Things counted. Requests are the guest's; errors are failed device operations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Counters {
    /// Guest reads.
    pub reads: u64,
    /// Guest writes (zeroing included).
    pub writes: u64,
    /// Guest flushes.
    pub flushes: u64,
    /// Guest discards.
    pub discards: u64,
    /// Bytes the guest read.
    pub read_bytes: u64,
    /// Bytes the guest wrote.
    pub written_bytes: u64,
    /// Requests the guest got an error for.
    pub guest_errors: u64,
    /// Failed device operations.
    pub device_errors: u64,
    /// Blocks read only after retries.
    pub recovered_reads: u64,
    /// Blocks rewritten in place after a failure.
    pub rewritten: u64,
    /// Blocks moved to a slot.
    pub remaps: u64,
    /// Sectors recorded as lost.
    pub lost: u64,
    /// Lost sectors and rewritten blocks since proven readable.
    pub healed: u64,
    /// Completed scanner passes.
    pub health_scans: u64,
    /// Commits of the map.
    pub commits: u64,
    /// Damaged metadata copies rewritten at open.
    pub metadata_repairs: u64,
    /// Guest reads and writes that workers served with slots.
    #[serde(default)]
    pub slot_requests: u64,
}

impl Counters {
    /// Requests answered.
    pub fn requests(&self) -> u64 {
        [self.writes, self.flushes, self.discards].into_iter().fold(self.reads, u64::saturating_add)
    }

    /// What came since `earlier`.
    pub fn since(&self, earlier: &Counters) -> Counters {
        let of = |count: fn(&Counters) -> u64| count(self).saturating_sub(count(earlier));
        Counters {
            reads: of(|c| c.reads),
            writes: of(|c| c.writes),
            flushes: of(|c| c.flushes),
            discards: of(|c| c.discards),
            read_bytes: of(|c| c.read_bytes),
            written_bytes: of(|c| c.written_bytes),
            guest_errors: of(|c| c.guest_errors),
            device_errors: of(|c| c.device_errors),
            recovered_reads: of(|c| c.recovered_reads),
            rewritten: of(|c| c.rewritten),
            remaps: of(|c| c.remaps),
            lost: of(|c| c.lost),
            healed: of(|c| c.healed),
            health_scans: of(|c| c.health_scans),
            commits: of(|c| c.commits),
            metadata_repairs: of(|c| c.metadata_repairs),
            slot_requests: of(|c| c.slot_requests),
        }
    }
}

/// One row of `list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ListEntry {
    /// First sector of the block.
    pub sector: u64,
    /// Sectors in the block (8, fewer in a short last block).
    pub sectors: u32,
    /// `remapped`, `pending`, or both.
    pub state: Vec<String>,
    /// The slot, where remapped.
    pub slot: Option<u32>,
    /// Guest sectors of this block that are lost.
    pub lost: Vec<u64>,
    /// Guest sectors of this block that failed when they were last read, lost ones aside.
    #[serde(default)]
    pub pending: Vec<u64>,
    /// Whether what the primary holds of the lost sectors is older than what was lost.
    pub primary_stale: bool,
}

/// All that [`EventRecord::kind`] can be.
pub const EVENT_KINDS: &[&str] = EventKind::VARIANTS;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EventRecord {
    /// Number, from 1; gaps were dropped.
    pub seq: u64,
    /// Seconds since the epoch, with milliseconds.
    pub time: f64,
    /// `info`, `warn` or `error`.
    pub severity: String,
    /// What kind: one of [`EVENT_KINDS`].
    pub kind: String,
    /// `primary`, `spare`, or empty.
    pub device: String,
    /// First sector concerned, where there is one.
    pub sector: Option<u64>,
    /// Number of sectors concerned.
    pub sectors: u64,
    /// Why: the error number's text, the rule.
    pub cause: String,
    /// What was done.
    pub action: String,
}

/// A page of events.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct EventPage {
    /// Oldest first.
    pub events: Vec<EventRecord>,
    /// Ask for events after this number next time.
    pub last_seq: u64,
    /// Events dropped because the log was full, since the server started.
    pub dropped: u64,
    /// The primary's path.
    #[serde(default)]
    pub volume: String,
    /// Another one when the server was started again: the numbers of events then begin anew.
    #[serde(default)]
    pub run: String,
}

/// Which blocks `list` shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListFilter {
    /// Everything that is special.
    #[default]
    All,
    /// Blocks with lost sectors.
    Lost,
    /// Pending blocks.
    Pending,
}
