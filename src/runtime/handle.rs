//! The operator's side of a running volume.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::devices::Devices;
use super::healer::{Command, OpenedVolume};
use super::mailbox::Outbox;
use super::report::{BlockReport, Counters, DeviceReport, ListEntry, ListFilter, SCHEMA_VERSION, StatusReport};
use super::scan_report::ScanReport;
use super::volume::{Standing, degraded_list};
use crate::device::DeviceIndex;
use crate::engine::event::{Event, EventKind, Severity};
use crate::engine::healer::{HealerStatus, Order, PoisonReport, Reply, Tally};
use crate::engine::scan::{ScanOrder, ScanParams};
use crate::engine::view::{Geometry, PrimaryState};
use crate::sync::Mutex;
use crate::sync::mpsc::sync_channel;
use crate::units::{Sector, SectorRange};

/// The healer answers questions from memory; this much patience is for a machine in trouble.
pub(super) const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Orders that work on devices may take as long as the ladders behind them.
pub(super) const ORDER_TIMEOUT: Duration = Duration::from_secs(3600);
/// Requests older than this make `status` name them as hung.
const HUNG_MS: u64 = 5000;

/// What the front-end's side knows.
#[derive(Clone, Copy, Debug, Default)]
pub struct FrontEndState {
    /// A front-end is connected.
    pub connected: bool,
    /// Age of the oldest request not answered.
    pub oldest_in_flight_ms: u64,
    /// Requests so malformed that they were given back before the engine saw them.
    pub malformed_requests: u64,
}

/// What does not change while the volume is served.
pub(super) struct Served {
    pub(super) devices: Devices,
    pub(super) opened: OpenedVolume,
    pub(super) orders: Outbox<Command>,
    pub(super) standing: Arc<Standing>,
    pub(super) cache: &'static str,
    pub(super) workers: u32,
    pub(super) polling_us: u32,
    pub(super) transport: &'static str,
    pub(super) scan: ScanParams,
    /// Held by a resize: there is one at a time.
    pub(super) resizing: Mutex<()>,
    /// Where the counters began.
    pub(super) cleared: Mutex<Cleared>,
}

/// What was counted when somebody had the counters cleared.
#[derive(Clone, Debug, Default)]
pub(super) struct Cleared {
    /// Seconds since the epoch.
    pub(super) at: u64,
    counters: Counters,
    /// As [`HealerStatus::errors`].
    errors: [[u64; 3]; 2],
    /// How long requests had taken together.
    request_ns: u64,
}

impl Cleared {
    /// Of a volume that is opened then, in seconds since the epoch; requests before that had taken so long.
    pub(super) fn at(at: u64, request_ns: u64) -> Cleared {
        Cleared { at, request_ns, ..Cleared::default() }
    }
}

/// A cheap clone that any thread may ask. No report waits for a disk.
#[derive(Clone)]
pub struct VolumeHandle(pub(super) Arc<Served>);

/// Why an operator's order was not carried out: one line for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl VolumeHandle {
    /// The volume's UUID.
    pub fn set(&self) -> Uuid {
        self.0.opened.facts.set
    }

    /// The most blocks that can be remapped.
    pub fn remaps_max(&self) -> u32 {
        self.0.opened.geometry.slots
    }

    /// Whether anything has been written or dropped since it was opened.
    pub fn is_written(&self) -> bool {
        let progress = &self.0.opened.progress;
        progress.writes.load(Relaxed) + progress.discards.load(Relaxed) > 0
    }

    /// The volume's state now; nothing once it is being closed.
    pub fn status(&self) -> Option<StatusReport> {
        let healer = self.healer_status()?;
        let served = &*self.0;
        let standing = &*served.standing;
        let front_end = standing.front_end.get().map(|ask| ask()).unwrap_or_default();
        let (state, messages) = self.judge(&healer, front_end);
        let cleared = self.cleared();
        Some(StatusReport {
            schema: SCHEMA_VERSION,
            version: env!("CARGO_PKG_VERSION").into(),
            volume: self.set().to_string(),
            state,
            messages,
            devices: self.device_reports(&healer, &cleared),
            capacity_sectors: self.geometry().capacity,
            blocks: BlockReport {
                remapped: healer.remapped as u64,
                remaps_max: u64::from(served.opened.geometry.slots),
                // With passthrough there are some in a table that nobody has.
                slots_free: (healer.free as u64).min(u64::from(served.opened.geometry.slots)),
                slots_retired: healer.retired as u64,
                pending: healer.pending as u64,
                lost_sectors: healer.lost_sectors,
                in_doubt: healer.in_doubt,
            },
            counters: self.counters(&healer).since(&cleared.counters),
            lifetime: lifetime(&healer.lifetime, &healer),
            uptime_seconds: standing.clock.now().0 / 1_000_000_000,
            started: standing.epoch,
            io_engine: served.devices.engine.clone(),
            cache: served.cache.into(),
            workers: served.workers,
            polling_us: served.polling_us,
            transport: served.transport.into(),
            connected: front_end.connected,
            oldest_in_flight_ms: front_end.oldest_in_flight_ms,
            malformed_requests: front_end.malformed_requests,
            events_dropped: standing.log.dropped(),
            health: healer.health.state.name().into(),
            health_score: healer.health.score,
            counters_since: cleared.at,
            scan: ScanReport::of(&served.scan, healer.scan),
            request_ns: standing.counters.latency().sum_ns.saturating_sub(cleared.request_ns),
            failed_writes_in_a_row: healer.failed_writes_in_a_row as u64,
        })
    }

    /// What the healer knows of itself, errors by class among it; nothing once the volume is being closed.
    pub(super) fn healer_status(&self) -> Option<Box<HealerStatus>> {
        match self.ask(Order::Status, ANSWER_TIMEOUT) {
            Some(Reply::Status(healer)) => Some(healer),
            _ => None,
        }
    }

    /// Seconds since the epoch.
    pub(super) fn now_seconds(&self) -> u64 {
        let standing = &*self.0.standing;
        standing.epoch + standing.clock.now().0 / 1_000_000_000
    }

    /// Whether there is such a device.
    pub(super) fn has(&self, device: DeviceIndex) -> bool {
        self.0.devices.get(device).is_some()
    }

    /// Whether the healer and every worker answer now.
    pub(super) fn has_pulse(&self) -> bool {
        matches!(self.ask(Order::Pulse, ANSWER_TIMEOUT), Some(Reply::Done(Ok(_))))
    }

    fn judge(&self, healer: &HealerStatus, front_end: FrontEndState) -> (Vec<String>, Vec<String>) {
        let mut found: Vec<(&str, String)> = Vec::new();
        let path = |device| self.path(device);
        if let Some(poison) = &healer.poison {
            found.push(("poisoned", poison_message(poison, &path(poison.device))));
        }
        if healer.mode.primary == PrimaryState::Gone {
            let primary = path(DeviceIndex::PRIMARY);
            found.push(("primary-gone", format!("{primary} does not answer: reattach it; see `events` for the error")));
        }
        let degraded = self.0.opened.facts.degraded;
        if let Some(stamped) = degraded {
            let list = degraded_list(stamped, self.now_seconds());
            let primary = path(DeviceIndex::PRIMARY);
            found.push((
                "degraded",
                format!("{primary}: served without its spare: {list}; bring the spare back to have them again"),
            ));
        }
        if let Some(cause) = healer.spare_down.as_ref().filter(|_| degraded.is_none()) {
            let spare = path(DeviceIndex::SPARE);
            found.push((
                "spare-down",
                format!("{spare}: {cause}: {} remapped blocks cannot be used until it is back", healer.remapped),
            ));
        }
        if healer.free == 0 && healer.live + healer.retired > 0 {
            let slots = self.0.opened.geometry.slots;
            let then = if healer.held > 0 { format!("wait ({} do)", healer.held) } else { "fail".to_owned() };
            found.push((
                "spare-full",
                format!("all {slots} slots are used: writes to further bad blocks {then}; replace the primary"),
            ));
        }
        for place in &healer.retired_places {
            found.push((
                "place-retired",
                format!("metadata at the spare's {place} is retired: one copy is left; replace the spare"),
            ));
        }
        // Requests that are held wait for a reason that is named above.
        if front_end.oldest_in_flight_ms > HUNG_MS && healer.held == 0 {
            let seconds = front_end.oldest_in_flight_ms / 1000;
            let mut device = path(DeviceIndex::PRIMARY);
            if healer.remapped > 0 {
                device = format!("{device} or {}", path(DeviceIndex::SPARE));
            }
            found.push(("hung", format!("a request to {device} has been under way for {seconds} s")));
        }
        if healer.mode.read_only {
            found.push(("read-only", "nothing is written to either device".to_owned()));
        }
        if found.is_empty() {
            return (vec!["ok".into()], Vec::new());
        }
        found.into_iter().map(|(state, message)| (state.to_owned(), message)).unzip()
    }

    /// The measures of the disk as the guest may know it.
    fn geometry(&self) -> Geometry {
        let OpenedVolume { geometry, progress, .. } = &self.0.opened;
        Geometry { capacity: progress.capacity.load(SeqCst), ..*geometry }
    }

    pub(super) fn path(&self, device: DeviceIndex) -> String {
        let found = self.0.devices.get(device);
        found.map_or_else(|| device.to_string(), |device| device.path.display().to_string())
    }

    fn device_reports(&self, healer: &HealerStatus, cleared: &Cleared) -> Vec<DeviceReport> {
        let mode = healer.mode;
        let present = [DeviceIndex::PRIMARY, DeviceIndex::SPARE].into_iter();
        present
            .filter_map(|index| {
                let device = self.0.devices.get(index)?;
                let (now, then) = (healer.errors[usize::from(index.0)], cleared.errors[usize::from(index.0)]);
                let [reads, writes, flushes] = std::array::from_fn(|kind| now[kind].saturating_sub(then[kind]));
                let up = match index {
                    DeviceIndex::PRIMARY => mode.primary == PrimaryState::Up,
                    _ => mode.spare_up,
                };
                Some(DeviceReport {
                    role: index.to_string(),
                    path: std::path::absolute(&device.path)
                        .unwrap_or_else(|_| device.path.clone())
                        .display()
                        .to_string(),
                    state: match (up, index) {
                        (true, _) => "up",
                        (false, DeviceIndex::PRIMARY) => "gone",
                        (false, _) => "down",
                    }
                    .into(),
                    size: device.size(),
                    logical_block: device.geometry.logical_block,
                    read_errors: reads,
                    write_errors: writes,
                    flush_errors: flushes,
                })
            })
            .collect()
    }

    fn counters(&self, healer: &HealerStatus) -> Counters {
        let p = &self.0.opened.progress;
        let requests = [&p.reads, &p.writes, &p.flushes, &p.discards, &p.read_bytes, &p.written_bytes];
        let slot_requests = p.slot_requests.load(Relaxed);
        Counters { slot_requests, ..counters(requests.map(|counter| counter.load(Relaxed)), &healer.tally, healer) }
    }

    /// Blocks that are remapped, pending or hold lost sectors, by address, at most `limit` from sector `from`;
    /// nothing once the volume is being closed.
    pub fn list(&self, filter: ListFilter, from: u64, limit: usize) -> Option<Vec<ListEntry>> {
        const PAGE: usize = 4096;
        let mut entries = Vec::new();
        let mut from = Sector(from);
        loop {
            let Some(Reply::List(page)) = self.ask(Order::List { from, limit: PAGE }, ANSWER_TIMEOUT) else {
                return None;
            };
            let Some((last, _, _)) = page.last() else { return Some(entries) };
            from = Sector(last.start().0 + 8);
            for (block, state, pending) in page {
                let wanted = match filter {
                    ListFilter::All => true,
                    ListFilter::Lost => state.lost != 0,
                    ListFilter::Pending => state.pending,
                };
                if !wanted {
                    continue;
                }
                let exists = self.geometry().sectors_of(block);
                let sectors =
                    |mask: u8| (0..8).filter(|bit| mask >> bit & 1 == 1).map(|bit| block.start().0 + bit).collect();
                let names =
                    [(state.slot.is_some(), "remapped"), (state.pending, "pending"), (state.in_doubt, "in-doubt")];
                entries.push(ListEntry {
                    sector: block.start().0,
                    sectors: u32::try_from(exists.count).expect("at most 8"),
                    state: names.iter().filter(|(is, _)| *is).map(|(_, name)| (*name).to_owned()).collect(),
                    slot: state.slot.map(|slot| slot.0),
                    lost: sectors(state.lost),
                    pending: sectors(pending),
                    primary_stale: state.primary_stale,
                });
                if entries.len() >= limit {
                    return Some(entries);
                }
            }
        }
    }

    fn cleared(&self) -> Cleared {
        self.0.cleared.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Begin the counters, and the devices' errors, anew. The lifetime goes on, and so do the days that health is
    /// judged by, as nothing has become better.
    ///
    /// # Errors
    /// When the volume is being closed.
    pub fn clear_stats(&self) -> Result<String, Refused> {
        let path = self.path(DeviceIndex::PRIMARY);
        let Some(healer) = self.healer_status() else {
            return Err(Refused(format!("{path}: the volume did not answer: it is closing; see `status`")));
        };
        let now = Cleared {
            at: self.now_seconds(),
            counters: self.counters(&healer),
            errors: healer.errors,
            request_ns: self.0.standing.counters.latency().sum_ns,
        };
        let before =
            std::mem::replace(&mut *self.0.cleared.lock().unwrap_or_else(PoisonError::into_inner), now.clone());
        let counted = now.counters.since(&before.counters);
        let Counters { reads, writes, device_errors, .. } = counted;
        let standing = &*self.0.standing;
        standing.log.push(Event {
            time: standing.clock.now(),
            severity: Severity::Info,
            kind: EventKind::StatsCleared,
            device: None,
            range: SectorRange::default(),
            cause: "the operator's order".into(),
            action: format!("counters begin anew after {reads} reads, {writes} writes, {device_errors} device errors"),
        });
        Ok("counters since start begin anew; those of the lifetime, and the days that health is judged by, go on"
            .into())
    }

    /// Lift the poison of a failed flush and close tripped breakers.
    ///
    /// # Errors
    /// When there is nothing to clear, or the cleared state could not be made durable.
    pub fn clear(&self) -> Result<String, Refused> {
        self.order(Order::Clear)
    }

    /// Move the blocks of `sectors` (start, count) to slots.
    ///
    /// # Errors
    /// When a sector is beyond the end, the spare is full or the data cannot be read.
    pub fn remap(&self, start: u64, count: u64) -> Result<String, Refused> {
        self.order(Order::Remap(SectorRange { start: Sector(start), count }))
    }

    /// Copy the blocks of the sectors back to the primary and free their slots.
    ///
    /// # Errors
    /// When a block is not remapped, or the primary does not take it.
    pub fn release(&self, start: u64, count: u64) -> Result<String, Refused> {
        self.order(Order::Release(SectorRange { start: Sector(start), count }))
    }

    /// Write counters and the label's copy of the table now.
    ///
    /// # Errors
    /// When the spare does not take them.
    pub fn save(&self) -> Result<String, Refused> {
        self.order(Order::Save)
    }

    /// Begin a pass of the scanner, or do something with the one that is under way. A pass goes on in the background.
    ///
    /// # Errors
    /// When the scanner is not in a state for it.
    pub fn scan(&self, order: ScanOrder) -> Result<String, Refused> {
        self.order(Order::Scan(order))
    }

    pub(super) fn order(&self, order: Order) -> Result<String, Refused> {
        let result = match self.ask(order, ORDER_TIMEOUT) {
            Some(Reply::Done(result)) => result,
            _ => Err("the volume did not answer: it is closing, or a device hangs; see `status`".into()),
        };
        // Who has several servers wants to know which of their disks it is about.
        result.map_err(|why| Refused(format!("{}: {why}", self.path(DeviceIndex::PRIMARY))))
    }

    pub(super) fn ask(&self, order: Order, timeout: Duration) -> Option<Reply> {
        let (reply, answer) = sync_channel(1);
        self.0.orders.send(Command::Order(order, reply));
        answer.recv_timeout(timeout).ok()
    }
}

fn poison_message(poison: &PoisonReport, path: &str) -> String {
    let sectors: u64 = poison.ranges.iter().map(|(_, count)| count).sum();
    let ranges: Vec<String> = poison
        .ranges
        .iter()
        .take(4)
        .map(|(start, count)| format!("{start}-{}", start + count.saturating_sub(1)))
        .collect();
    let more = if poison.ranges.len() > 4 { ", …" } else { "" };
    let persistent = if poison.persistent { "" } else { " (not persistent: no device took the note)" };
    let concerns = if ranges.is_empty() {
        "nothing was written since the last good one".to_owned()
    } else {
        let list = ranges.join(", ");
        format!("of {sectors} sectors written since the last good one nobody knows ({list}{more}); check them")
    };
    format!("{path}: a flush failed ({}){persistent}: {concerns}, then `clear`", poison.errno)
}

fn counters(requests: [u64; 6], tally: &Tally, healer: &HealerStatus) -> Counters {
    let [reads, writes, flushes, discards, read_bytes, written_bytes] = requests;
    Counters {
        reads,
        writes,
        flushes,
        discards,
        read_bytes,
        written_bytes,
        guest_errors: tally.guest_errors,
        device_errors: healer.errors.iter().flatten().sum(),
        recovered_reads: tally.recovered_reads,
        rewritten: tally.rewritten,
        remaps: tally.remaps,
        lost: tally.lost,
        healed: tally.healed,
        health_scans: tally.health_scans,
        commits: tally.commits,
        metadata_repairs: tally.metadata_repairs,
        slot_requests: 0,
    }
}

/// The saved counters, in their order on the spare.
fn lifetime(values: &[u64], healer: &HealerStatus) -> Counters {
    let at = |i: usize| values.get(i).copied().unwrap_or(0);
    let tally = Tally {
        guest_errors: at(6),
        recovered_reads: at(7),
        rewritten: at(8),
        remaps: at(9),
        lost: at(10),
        healed: at(11),
        health_scans: at(12),
        commits: at(13),
        metadata_repairs: at(14),
    };
    Counters { slot_requests: at(15), ..counters(std::array::from_fn(at), &tally, healer) }
}
