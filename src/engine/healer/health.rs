//! What the healer knows, for the rules of [`crate::engine::health`]; and an event when a device's state changes.

use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering::Relaxed;

use super::{Core, EventKind, Severity, scan, used_slots};
use crate::device::DeviceIndex;
use crate::engine::health::history::{Day, History, Totals, WORDS};
use crate::engine::health::{Assessment, Burst, DeviceInputs, HealthState, Inputs, Part, assess};
use crate::engine::view::PrimaryState;
use crate::units::{Block, SectorRange, Time};
use crate::volume::map::Map;
use crate::volume::sidecar::COUNTERS_MAX;

/// Where the days begin among the saved counters.
pub(super) const HISTORY_AT: usize = 48;
const _: () = assert!(HISTORY_AT + WORDS == COUNTERS_MAX);
const _: () = assert!(scan::SAVED_AT + scan::WORDS == HISTORY_AT);

const SECONDS_A_DAY: u64 = 86_400;

/// What changes, when a rule may.
type Signs = [u64; 11];

/// State of everything here.
pub(super) struct Health {
    history: RefCell<History>,
    /// Sectors that are lost now.
    lost_sectors: Cell<u64>,
    /// Blocks moved for nothing that the primary did: by order, from slot to slot, or for being slow.
    moved_otherwise: Cell<u64>,
    /// Blocks of slots that were read only after retries.
    recovered_in_slots: Cell<u64>,
    /// The devices as last judged. The volume is as its worse one.
    devices: Cell<[HealthState; 2]>,
    /// Requests that met an error of a device lately.
    bursts: RefCell<[Burst; 2]>,
    /// All that did since the volume was opened.
    requests_in_error: Cell<u64>,
    signs: Cell<Signs>,
}

impl Health {
    pub(super) fn new(saved: &[u64], map: &Map) -> Health {
        let lost = map.iter_from(Block(0)).map(|(_, state)| u64::from(state.lost.count_ones())).sum();
        Health {
            history: RefCell::new(History::decode(saved.get(HISTORY_AT..).unwrap_or_default())),
            lost_sectors: Cell::new(lost),
            moved_otherwise: Cell::new(0),
            recovered_in_slots: Cell::new(0),
            devices: Cell::default(),
            bursts: RefCell::default(),
            requests_in_error: Cell::new(0),
            signs: Cell::default(),
        }
    }

    /// A block that had `before` lost sectors has `after`.
    pub(super) fn lost_changed(&self, before: u32, after: u32) {
        self.lost_sectors.set(self.lost_sectors.get() + u64::from(after) - u64::from(before));
    }

    /// A request met an error of a device. What the ladders try again after that is the same trouble.
    pub(super) fn met_error(&self, device: DeviceIndex, now: Time) {
        self.found_error(device, now);
        self.requests_in_error.set(self.requests_in_error.get() + 1);
    }

    /// A pass found a block that does not read, and was not pending before.
    pub(super) fn found_error(&self, device: DeviceIndex, now: Time) {
        self.bursts.borrow_mut()[usize::from(device.0)].note(now);
    }

    /// A block was moved by an operator's order, from one slot to another, or for being slow: no sector of the primary
    /// failed for that.
    pub(super) fn moved_for_other_reasons(&self) {
        self.moved_otherwise.set(self.moved_otherwise.get() + 1);
    }

    /// So many blocks of slots were read only after retries.
    pub(super) fn recovered_in_slots(&self, blocks: u64) {
        self.recovered_in_slots.set(self.recovered_in_slots.get() + blocks);
    }
}

fn index_of(part: Part) -> DeviceIndex {
    match part {
        Part::Primary => DeviceIndex::PRIMARY,
        Part::Spare => DeviceIndex::SPARE,
    }
}

impl Core {
    fn today(&self) -> u64 {
        self.wall_seconds() / SECONDS_A_DAY
    }

    /// Put down what came since the last time.
    fn note_day(&self) {
        let tally = self.tally.borrow();
        let errors = self.io.errors.borrow();
        let totals = Totals {
            remaps: tally.remaps - self.health.moved_otherwise.get(),
            lost: tally.lost,
            used: used_slots(&self.table.borrow()),
            read_errors: errors.iter().map(|[reads, ..]| reads).sum(),
            write_errors: errors.iter().map(|[_, writes, _]| writes).sum(),
            flush_errors: errors.map(|[.., flushes]| flushes),
        };
        self.health.history.borrow_mut().note(self.today(), totals);
    }

    /// The days, as they are kept.
    pub(super) fn days_to_save(&self) -> Vec<u64> {
        self.note_day();
        self.health.history.borrow().encode()
    }

    /// The days up to now.
    pub(super) fn days(&self) -> Vec<Day> {
        self.health.history.borrow().days().to_vec()
    }

    /// Judge now.
    pub(super) fn assess(&self) -> Assessment {
        self.note_day();
        let (mode, table, tally) = (self.mode.get(), self.table.borrow(), self.tally.borrow());
        let now = self.io.now();
        let poisoned = self.poison_report().map(|report| report.device);
        let bursts = self.health.bursts.borrow();
        let pending = self.pending.borrow().by_device();
        let in_slots = self.health.recovered_in_slots.get();
        let recovered = [tally.recovered_reads - in_slots, in_slots];
        let device = |part: Part, up: bool| {
            let index = index_of(part);
            DeviceInputs {
                burst: bursts[usize::from(index.0)].count(now),
                pending: pending[usize::from(index.0)],
                recovered_reads: recovered[usize::from(index.0)],
                gone: !up,
                poisoned: poisoned == Some(index),
            }
        };
        // Without metadata there is no spare that could be missed.
        let spare_up = mode.spare_up || self.policy.passthrough;
        let progress = &self.progress;
        assess(&Inputs {
            today: self.today(),
            days: self.health.history.borrow().days(),
            devices: [device(Part::Primary, mode.primary == PrimaryState::Up), device(Part::Spare, spare_up)],
            remapped: table.live() as u64,
            lost_sectors: self.health.lost_sectors.get(),
            slots: u64::from(self.geometry().slots),
            slots_used: used_slots(&table),
            slots_retired: table.retired() as u64,
            places_retired: 2 - self.live_places().len() as u64,
            requests: progress.reads.load(Relaxed) + progress.writes.load(Relaxed),
            requests_in_error: self.health.requests_in_error.get(),
        })
    }

    /// How it is when the volume is opened is no change.
    pub(super) fn begin_health(&self) {
        self.health.devices.set(self.assess().devices);
        self.health.signs.set(self.signs());
    }

    fn signs(&self) -> Signs {
        let (mode, table, tally) = (self.mode.get(), self.table.borrow(), self.tally.borrow());
        let bits = [mode.poisoned, mode.primary == PrimaryState::Up, mode.spare_up];
        [
            self.pending.borrow().len() as u64,
            table.live() as u64,
            table.retired() as u64,
            used_slots(&table),
            tally.remaps,
            tally.lost,
            tally.recovered_reads,
            self.health.lost_sectors.get(),
            self.io.errors.borrow().iter().flatten().sum(),
            u64::from(self.superblock.borrow().retired),
            bits.iter().fold(0, |all, bit| all << 1 | u64::from(*bit)),
        ]
    }

    /// Judge again if something happened that a rule looks at.
    pub(super) fn watch_health(&self) {
        let signs = self.signs();
        if self.health.signs.replace(signs) != signs {
            self.judge_health();
        }
    }

    /// Judge again, and say of each device whose state is another one so. The volume's does not change without one; the
    /// first of them says it too.
    pub(super) fn judge_health(&self) {
        let found = self.assess();
        let before = self.health.devices.replace(found.devices);
        let volume = before.into_iter().max().unwrap_or_default();
        let mut of_volume = match volume == found.state {
            true => String::new(),
            false => format!("; the volume: {} -> {}", volume.name(), found.state.name()),
        };
        for (part, before) in Part::ALL.into_iter().zip(before) {
            let now = found.of(part);
            if now == before {
                continue;
            }
            let severity = match now {
                _ if now < before => Severity::Info,
                HealthState::Replace => Severity::Error,
                _ => Severity::Warn,
            };
            let (cause, advice) = match found.findings.iter().find(|finding| finding.part == part) {
                Some(worst) => (
                    format!("rule {}: {}: {} (from {} on)", worst.rule, worst.what, worst.value, worst.limit),
                    worst.advice,
                ),
                None => ("no rule holds any more".to_owned(), "nothing to do"),
            };
            let action = format!("{} -> {}: {advice}{}", before.name(), now.name(), std::mem::take(&mut of_volume));
            self.event(severity, EventKind::Health, Some(index_of(part)), SectorRange::default(), cause, action);
        }
    }
}
