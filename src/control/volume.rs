//! What the control socket asks of a volume.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::api::LIST_LIMIT_MAX;
use crate::device::fault::FaultTable;
pub use crate::engine::scan::{ScanOrder, ScanScope, Scanned};
use crate::runtime::handle::Refused;
use crate::runtime::handover::HeldVolume;
use crate::runtime::health::HealthReport;
use crate::runtime::report::{EventPage, ListEntry, ListFilter, StatusReport};
use crate::runtime::stats::StatsReport;
use crate::runtime::surface::{self, SurfaceReport};
use crate::units::{Block, SectorRange};

/// A volume as an operator sees it: [`HeldVolume`], or a scripted one in the tests of this module.
///
/// The reports come from memory and never wait for a disk. The orders may.
pub trait Volume: Send + Sync {
    /// See [`HeldVolume::status`].
    fn status(&self) -> StatusReport;
    /// See [`HeldVolume::stats`].
    fn stats(&self) -> StatsReport;
    /// See [`HeldVolume::list`].
    ///
    /// # Errors
    /// When the volume is not open.
    fn list(&self, filter: ListFilter, from: u64, limit: usize) -> Result<Vec<ListEntry>, Refused>;
    /// See [`HeldVolume::health`].
    ///
    /// # Errors
    /// When the volume is not open.
    fn health(&self) -> Result<HealthReport, Refused>;
    /// The disk in at most so many cells.
    ///
    /// # Errors
    /// When the volume is not open.
    fn surface(&self, cells: u64) -> Result<SurfaceReport, Refused> {
        let mut surface = surface::empty(self.status().capacity_sectors, cells);
        let mut from = 0;
        loop {
            let page = self.list(ListFilter::All, from, LIST_LIMIT_MAX)?;
            page.iter().for_each(|entry| surface.add(entry));
            match page.last() {
                Some(last) if last.sector >= from => from = last.sector.saturating_add(8),
                _ => break,
            }
        }
        if let Some((slow, scanned)) = self.scanned() {
            surface.add_scan(&slow, &scanned);
        }
        Ok(surface)
    }
    /// Slow blocks, and what the scanner has read; see [`HeldVolume::scanned`].
    fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)>;
    /// See [`HeldVolume::events`].
    fn events(&self, after: u64, limit: usize) -> EventPage;
    /// See [`HeldVolume::faults`].
    fn faults(&self) -> Option<&Arc<FaultTable>>;
    /// Carry out an order; the answer is one line for a person.
    ///
    /// # Errors
    /// When the volume refuses it, with the reason.
    fn order(&self, order: Order) -> Result<String, Refused>;
}

/// Something an operator wants done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Lift the poison of a failed flush and close tripped breakers.
    Clear,
    /// Move blocks to slots.
    Remap(SectorRange),
    /// Move blocks back to the primary.
    Release(SectorRange),
    /// Write counters and the label's copy of the table.
    Save,
    /// Grow to so many bytes, or to what the primary has room for.
    Resize(Option<u64>),
    /// Begin the counters anew.
    ClearStats,
    /// To the scanner.
    Scan(ScanOrder),
}

impl Volume for HeldVolume {
    fn status(&self) -> StatusReport {
        HeldVolume::status(self)
    }

    fn stats(&self) -> StatsReport {
        HeldVolume::stats(self)
    }

    fn list(&self, filter: ListFilter, from: u64, limit: usize) -> Result<Vec<ListEntry>, Refused> {
        HeldVolume::list(self, filter, from, limit)
    }

    fn health(&self) -> Result<HealthReport, Refused> {
        HeldVolume::health(self)
    }

    fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)> {
        HeldVolume::scanned(self)
    }

    fn events(&self, after: u64, limit: usize) -> EventPage {
        HeldVolume::events(self, after, limit)
    }

    fn faults(&self) -> Option<&Arc<FaultTable>> {
        HeldVolume::faults(self)
    }

    fn order(&self, order: Order) -> Result<String, Refused> {
        let volume = self.open_volume()?;
        match order {
            Order::Clear => volume.clear(),
            Order::Remap(range) => volume.remap(range.start.0, range.count),
            Order::Release(range) => volume.release(range.start.0, range.count),
            Order::Save => volume.save(),
            Order::Resize(size) => volume.resize(size),
            Order::ClearStats => volume.clear_stats(),
            Order::Scan(order) => volume.scan(order),
        }
    }
}

#[cfg(test)]
pub(crate) mod scripted {
    //! A volume whose answers are set by the test.

    use std::collections::BTreeMap;
    use std::sync::mpsc::Receiver;
    use std::sync::{Mutex, PoisonError};

    use super::*;
    use crate::runtime::latency::{Histogram, bucket};
    use crate::runtime::report::{BlockReport, Counters, DeviceReport, EventRecord, SCHEMA_VERSION};
    use crate::runtime::scan_report::{Found, LastPass, ScanReport};
    use crate::runtime::stats::{DeviceOperationReport, LatencyReport, OperationReport};

    /// Answers what it was given and keeps the orders it got.
    pub(crate) struct ScriptedVolume {
        pub(crate) status: StatusReport,
        pub(crate) health: HealthReport,
        pub(crate) entries: Vec<ListEntry>,
        pub(crate) events: Mutex<Vec<EventRecord>>,
        pub(crate) faults: Option<Arc<FaultTable>>,
        pub(crate) orders: Mutex<Vec<Order>>,
        pub(crate) refuse: Option<&'static str>,
        /// Orders wait until the other end is gone.
        pub(crate) hold: Option<Mutex<Receiver<()>>>,
    }

    impl ScriptedVolume {
        pub(crate) fn new() -> ScriptedVolume {
            ScriptedVolume {
                status: sample_status(),
                health: sample_health(),
                entries: Vec::new(),
                events: Mutex::new(Vec::new()),
                faults: None,
                orders: Mutex::new(Vec::new()),
                refuse: None,
                hold: None,
            }
        }
    }

    impl Volume for ScriptedVolume {
        fn status(&self) -> StatusReport {
            self.status.clone()
        }

        fn stats(&self) -> StatsReport {
            sample_stats()
        }

        fn list(&self, filter: ListFilter, from: u64, limit: usize) -> Result<Vec<ListEntry>, Refused> {
            let wanted = |e: &&ListEntry| match filter {
                ListFilter::All => true,
                ListFilter::Lost => !e.lost.is_empty(),
                ListFilter::Pending => e.state.iter().any(|s| s == "pending"),
            };
            Ok(self.entries.iter().filter(|e| e.sector >= from).filter(wanted).take(limit).cloned().collect())
        }

        fn health(&self) -> Result<HealthReport, Refused> {
            Ok(self.health.clone())
        }

        fn scanned(&self) -> Option<(Arc<BTreeSet<Block>>, Scanned)> {
            None
        }

        fn events(&self, after: u64, limit: usize) -> EventPage {
            let all = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            let events: Vec<_> = all.iter().filter(|e| e.seq > after).take(limit).cloned().collect();
            let last_seq = events.last().map_or(after, |e| e.seq);
            EventPage { events, last_seq, run: "1".into(), ..EventPage::default() }
        }

        fn faults(&self) -> Option<&Arc<FaultTable>> {
            self.faults.as_ref()
        }

        fn order(&self, order: Order) -> Result<String, Refused> {
            if let Some(hold) = &self.hold {
                let _ = hold.lock().unwrap_or_else(PoisonError::into_inner).recv();
            }
            if let Some(reason) = self.refuse {
                return Err(Refused(reason.into()));
            }
            self.orders.lock().unwrap_or_else(PoisonError::into_inner).push(order);
            Ok("done as told".into())
        }
    }

    /// A volume at risk, as `sample_status` says.
    pub(crate) fn sample_health() -> HealthReport {
        let text = include_str!("volume/health.json");
        serde_json::from_str(text).expect("the document is kept up to date")
    }

    /// A remapped block at `sector`.
    pub(crate) fn entry(sector: u64, state: &str, lost: &[u64]) -> ListEntry {
        ListEntry {
            sector,
            sectors: 8,
            state: vec![state.into()],
            slot: (state == "remapped").then_some(7),
            lost: lost.to_vec(),
            pending: Vec::new(),
            primary_stale: false,
        }
    }

    /// Event number `seq`.
    pub(crate) fn event(seq: u64) -> EventRecord {
        EventRecord {
            seq,
            time: 1_767_225_600.25,
            severity: "warn".into(),
            kind: "remapped".into(),
            device: "primary".into(),
            sector: Some(8 * seq),
            sectors: 8,
            cause: "Input/output error (os error 5)".into(),
            action: "moved to slot 7".into(),
        }
    }

    /// Three reads, one of which failed after six seconds, and one under way.
    pub(crate) fn sample_stats() -> StatsReport {
        let status = sample_status();
        let idle = |name: &str| OperationReport { operation: name.into(), ..OperationReport::default() };
        let mut histogram = Histogram::new();
        for ns in [79_000, 80_000, 6_000_000_000] {
            histogram.counts[bucket(ns)] += 1;
            histogram.sum_ns += ns;
            histogram.max_ns = histogram.max_ns.max(ns);
        }
        let reads = OperationReport {
            completed: 3,
            failed: 1,
            errors: BTreeMap::from([("medium".into(), 1)]),
            bytes: 8192,
            in_flight: 1,
            oldest_in_flight_ns: 2_500_000,
            latency: LatencyReport::from(&histogram),
            ..idle("read")
        };
        let sent = DeviceOperationReport {
            device: "primary".into(),
            operation: "read".into(),
            submitted: 6,
            bytes: 24_576,
            errors: BTreeMap::from([("io".into(), 4)]),
        };
        StatsReport {
            schema: status.schema,
            volume: status.volume,
            started: status.started,
            uptime_seconds: status.uptime_seconds,
            operations: vec![reads, idle("write"), idle("flush"), idle("discard"), idle("write_zeroes")],
            devices: vec![sent],
            malformed_requests: 0,
            last_remap: Some(1_767_225_700.5),
            last_error: None,
        }
    }

    /// Its third pass, under way.
    pub(crate) fn sample_scan() -> ScanReport {
        let found = Found { bad: 3, slow: 2, lost: 2, moved: 1, ..Found::default() };
        let last = LastPass {
            pass: 2,
            started: 1_767_000_000,
            ended: 1_767_003_600,
            complete: true,
            cancelled: false,
            found: Found::default(),
        };
        ScanReport {
            state: "running".into(),
            interval_seconds: Some(14 * 86_400),
            window: "always".into(),
            pass: 3,
            started: 1_767_318_000,
            percent: 25.0,
            covered_bytes: 5 << 29,
            total_bytes: 10 << 30,
            read_bytes: 5 << 29,
            speed_now: 100 << 20,
            speed_average: 80 << 20,
            eta_seconds: Some(96),
            found,
            last: Some(last),
            last_complete: Some(1_767_003_600),
            next: Some(1_768_527_600),
            ..ScanReport::default()
        }
    }

    /// A volume in good health, with a few remaps.
    pub(crate) fn sample_status() -> StatusReport {
        let device = |role: &str, path: &str, size| DeviceReport {
            role: role.into(),
            path: path.into(),
            state: "up".into(),
            size,
            logical_block: 512,
            ..DeviceReport::default()
        };
        StatusReport {
            schema: SCHEMA_VERSION,
            version: "0.1.0".into(),
            volume: "6f1f4b1e-1f6c-4f0e-9b3e-3d5a9a1c2b3d".into(),
            state: vec!["ok".into()],
            messages: Vec::new(),
            devices: vec![
                device("primary", "/srv/disk.img", 10 << 30),
                device("spare", "/srv/disk.img.spare", 66 << 20),
            ],
            capacity_sectors: (10 << 30) / 512,
            blocks: BlockReport {
                remapped: 12,
                remaps_max: 16_384,
                slots_free: 16_371,
                slots_retired: 1,
                pending: 3,
                lost_sectors: 2,
                in_doubt: 0,
            },
            counters: Counters { reads: 1_204, writes: 377, device_errors: 4, ..Counters::default() },
            lifetime: Counters { reads: 998_877, writes: 54_321, device_errors: 40, ..Counters::default() },
            uptime_seconds: 93_784,
            started: 1_767_225_600,
            io_engine: "io_uring".into(),
            cache: "none".into(),
            workers: 2,
            polling_us: 0,
            transport: "own".into(),
            connected: true,
            oldest_in_flight_ms: 0,
            malformed_requests: 0,
            events_dropped: 0,
            health: "AT_RISK".into(),
            health_score: 75,
            counters_since: 1_767_225_600,
            scan: sample_scan(),
            request_ns: 158_100_000,
            failed_writes_in_a_row: 2,
        }
    }
}
