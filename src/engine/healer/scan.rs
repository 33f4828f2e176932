//! The scanner: reads everything from time to time, so that trouble is met while it can be helped.
//!
//! A pass is one task at a time. It reads without a fence, for what is read well is not looked at; only blocks in
//! trouble are fenced and seen to like a guest's request. `due` is when it begins, `pass` how it stands, `read` how it
//! reads, `examine` what becomes of a block in trouble, `metadata` looks at the pages of places and label, `saved` is
//! what a restart leaves, `status` what is said of it.

mod due;
mod examine;
mod metadata;
mod narrow;
mod pass;
mod read;
mod saved;
mod status;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::{Core, EventKind, Severity};
use crate::device::DeviceIndex;
use crate::device::buffer::AlignedBuf;
use crate::engine::scan::pace::Pace;
use crate::engine::scan::plan::{Order, UNIT_SLOTS};
use crate::engine::scan::{
    Found, GuestLoad, LastPass, ScanOrder, ScanParams, ScanScope, ScanState, ScanStatus, Skipped, Window,
};
use crate::units::{Block, SECTOR_SIZE, SECTORS_PER_BLOCK, Sector, SectorRange};

use pass::{Pass, Stage};
use saved::Record;
pub(super) use saved::{SAVED_AT, WORDS};

/// What keeps a pass from going on is looked at again after so many seconds.
const HELD_SECONDS: u64 = 1;
/// Rewritten blocks that wait for a pass, at most: those beyond are never called healed.
const UNPROVEN_MAX: usize = 65_536;
/// Slow blocks that are remembered, and blocks that may be released, at most.
const REMEMBERED_MAX: usize = 4096;
/// Pages of metadata looked at in one step.
const PAGES_A_STEP: usize = 64;

/// One of the tasks that work at passes after each other. A task whose turn is over stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn(u64);

/// A pass was paused or given up, or the volume is being closed.
struct Stopped;

/// How far a step came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// All of it was read, or listed as skipped.
    Done,
    /// A device went, or the pass is at its end: to be taken again, if at all.
    Again,
}

/// State of everything here.
pub(super) struct Scanner {
    params: ScanParams,
    load: Cell<GuestLoad>,
    pass: RefCell<Option<Pass>>,
    record: RefCell<Record>,
    turn: Cell<Turn>,
    /// As fast as a pass may go now.
    pace: RefCell<Option<Pace>>,
    /// Usual times of reads of a device, of pieces as they are read beside an idle guest and beside a busy one.
    usual_ns: [[Cell<u64>; 2]; 2],
    /// Blocks rewritten in place that no pass has read since, with the number of the last rewrite of each.
    unproven: RefCell<BTreeMap<Block, u64>>,
    /// Times that any block was rewritten in place.
    rewritten: Cell<u64>,
    /// How the pass stood that ended last.
    over: RefCell<ScanStatus>,
    /// Blocks that were slow when they were last read, the first so many.
    slow: RefCell<Arc<BTreeSet<Block>>>,
    /// Blocks in slots whose old place on the primary was read well by this pass or the last one, the first so many.
    releasable: RefCell<BTreeSet<Block>>,
    /// Memory to read into.
    buffers: RefCell<Vec<AlignedBuf>>,
    /// When the volume was opened, seconds since the epoch.
    opened: Cell<u64>,
}

impl Scanner {
    pub(super) fn new(params: &ScanParams, saved: &[u64]) -> Scanner {
        let (record, pass) = saved::decode(saved);
        Scanner {
            params: params.clone(),
            load: Cell::default(),
            pass: RefCell::new(pass),
            record: RefCell::new(record),
            turn: Cell::new(Turn(0)),
            pace: RefCell::default(),
            usual_ns: std::array::from_fn(|_| std::array::from_fn(|_| Cell::new(0))),
            unproven: RefCell::default(),
            rewritten: Cell::new(0),
            over: RefCell::default(),
            slow: RefCell::default(),
            releasable: RefCell::default(),
            buffers: RefCell::default(),
            opened: Cell::new(0),
        }
    }

    pub(super) fn hear(&self, load: GuestLoad) {
        self.load.set(load);
    }

    pub(super) fn wants_load(&self) -> bool {
        self.pass.borrow().as_ref().is_some_and(|pass| !pass.paused)
    }

    pub(super) fn is_running(&self) -> bool {
        self.pass.borrow().as_ref().is_some_and(|pass| !pass.paused && pass.waits.is_none())
    }

    /// A block was rewritten in place after a failure: it is healed once a pass has read it (W1).
    pub(super) fn was_rewritten(&self, block: Block) {
        self.rewritten.set(self.rewritten.get() + 1);
        let mut unproven = self.unproven.borrow_mut();
        let is_new = !unproven.contains_key(&block);
        if is_new && unproven.len() >= UNPROVEN_MAX {
            return;
        }
        unproven.insert(block, self.rewritten.get());
        if is_new && let Some(pass) = self.pass.borrow_mut().as_mut() {
            pass.found.rewritten += 1;
        }
    }

    /// The block has moved: what it was rewritten to does not matter.
    pub(super) fn has_moved(&self, block: Block) {
        self.unproven.borrow_mut().remove(&block);
        self.not_slow(block);
    }

    /// So many slots are in use now: weak blocks have no more than those.
    pub(super) fn weak_are_among(&self, live: u64) {
        let mut record = self.record.borrow_mut();
        record.weak_slots = record.weak_slots.min(live);
    }

    /// Which blocks are slow is about to be seen again.
    fn not_slow(&self, block: Block) {
        let mut slow = self.slow.borrow_mut();
        // Somebody may be looking at them.
        if slow.contains(&block) {
            Arc::make_mut(&mut slow).remove(&block);
        }
    }

    /// A pass that was under way goes on only by order: it cannot be saved how far it came.
    pub(super) fn wait_for_order(&self) {
        if let Some(pass) = self.pass.borrow_mut().as_mut() {
            pass.paused = true;
        }
    }

    /// What is to be saved.
    pub(super) fn values(&self) -> [u64; WORDS] {
        saved::encode(&self.record.borrow(), self.pass.borrow().as_ref())
    }
}

impl Core {
    /// See that a pass that the last close interrupted fits the disk.
    pub(super) fn fit_pass(&self) {
        if let Some(pass) = self.scan.pass.borrow_mut().as_mut() {
            // A volume only ever grows; what a damaged page says is not believed.
            let (start, end) = (pass.extent.start.0, pass.extent.end().0);
            let whole_blocks = start.is_multiple_of(SECTORS_PER_BLOCK)
                && (end.is_multiple_of(SECTORS_PER_BLOCK) || end == self.geometry().capacity);
            if pass.extent.is_empty() || !self.geometry().contains(pass.extent) || !whole_blocks {
                let paused = pass.paused;
                *pass = Pass::new(pass.number, ScanScope { range: None, ..pass.scope }, pass.ordered, pass.started);
                pass.paused = paused;
                pass.extent = self.whole();
            }
        }
    }

    /// Go on with a pass that the last close interrupted, and begin those that are due.
    pub(super) fn begin_scanning(self: &Rc<Self>) {
        let now = self.wall_seconds();
        self.scan.opened.set(now);
        // An end in the future was told by a clock that was wrong: passes would not begin until then.
        let ended = self.scan.record.borrow().whole_ended.min(now);
        self.scan.record.borrow_mut().whole_ended = ended;
        self.scan.weak_are_among(self.table.borrow().live() as u64);
        if self.scan.wants_load() {
            self.work_at_pass();
        }
        if self.scan.params.interval.is_some() {
            let core = self.clone();
            self.spawn(async move { core.scan_when_due().await });
        }
    }

    /// What the operator wants of the scanner.
    pub(super) async fn scan_order(self: &Rc<Self>, order: ScanOrder) -> Result<String, String> {
        self.refuse_closing()?;
        if self.policy.passthrough {
            return Err("a volume served with --passthrough is not scanned: nothing could be done for it".into());
        }
        let mode = self.mode.get();
        if matches!(order, ScanOrder::Start(_)) && mode.read_only && !mode.spare_up {
            return Err("the spare is not there: serve the volume with it first".into());
        }
        match order {
            ScanOrder::Start(scope) => self.start_scan(scope).await,
            ScanOrder::Pause => self.pause_scan().await,
            ScanOrder::Resume => self.resume_scan().await,
            ScanOrder::Cancel => self.cancel_scan().await,
        }
    }

    async fn start_scan(self: &Rc<Self>, scope: ScanScope) -> Result<String, String> {
        if let Some(pass) = self.scan.pass.borrow().as_ref() {
            let how = if pass.paused { "paused: `scan resume` or `scan cancel` it" } else { "under way" };
            return Err(format!("pass {} is {how}", pass.number));
        }
        let mut scope = scope;
        if let Some(range) = scope.range {
            let blocks = self.blocks_of(range)?;
            let (start, end) = (blocks.start.start(), Sector(blocks.end.start().0.min(self.geometry().capacity)));
            scope.range = Some(SectorRange { start, count: end.0 - start.0 });
        }
        // What serves a volume that it must not write looks only.
        scope.check_only |= self.mode.get().read_only;
        let number = self.begin_pass(scope, true);
        let unsaved = self.keep_place().await;
        Ok(format!("pass {number} has begun; see `scan wait` or `status`{unsaved}"))
    }

    fn begin_pass(self: &Rc<Self>, scope: ScanScope, ordered: bool) -> u64 {
        let number = {
            let mut record = self.scan.record.borrow_mut();
            record.pass += 1;
            record.pass
        };
        let mut pass = Pass::new(number, scope, ordered, self.wall_seconds());
        pass.extent = scope.range.unwrap_or_else(|| self.whole());
        *self.scan.pass.borrow_mut() = Some(pass);
        self.scan.releasable.borrow_mut().clear();
        let cause = if ordered { "the operator's order" } else { "it was due" };
        self.scan_event(Severity::Info, cause, format!("pass {number} began"));
        self.work_at_pass();
        number
    }

    async fn pause_scan(self: &Rc<Self>) -> Result<String, String> {
        let number = match self.scan.pass.borrow_mut().as_mut() {
            None => return Err("no pass is under way".into()),
            Some(pass) if pass.paused => return Err(format!("pass {} is paused already", pass.number)),
            Some(pass) => {
                pass.paused = true;
                pass.number
            }
        };
        self.end_turn();
        let unsaved = self.keep_place().await;
        Ok(format!("pass {number} is paused, also over a restart; `scan resume` goes on with it{unsaved}"))
    }

    async fn resume_scan(self: &Rc<Self>) -> Result<String, String> {
        let number = match self.scan.pass.borrow_mut().as_mut() {
            None => return Err("no pass is paused".into()),
            Some(pass) if !pass.paused => return Err(format!("pass {} is not paused", pass.number)),
            Some(pass) => {
                pass.paused = false;
                pass.number
            }
        };
        self.work_at_pass();
        let unsaved = self.keep_place().await;
        Ok(format!("pass {number} goes on{unsaved}"))
    }

    async fn cancel_scan(self: &Rc<Self>) -> Result<String, String> {
        let Some(pass) = self.take_pass() else { return Err("no pass is under way".into()) };
        let number = pass.number;
        self.record_end(&pass, false, true);
        self.scan_event(Severity::Info, "the operator's order", format!("pass {number} was given up"));
        let unsaved = self.keep_place().await;
        Ok(format!("pass {number} was given up{unsaved}"))
    }

    /// The pass that was under way, which is so no more.
    fn take_pass(&self) -> Option<Pass> {
        let status = self.scan_status();
        let pass = self.scan.pass.borrow_mut().take()?;
        *self.scan.over.borrow_mut() = status;
        self.end_turn();
        Some(pass)
    }

    /// Save where a pass stands; why not, for a person, if that fails. It is saved from time to time anyway.
    async fn keep_place(self: &Rc<Self>) -> String {
        let saved = match self.may_write() {
            Ok(()) => self.save_counters().await.map_err(|failure| failure.cause),
            Err(why) => Err(why),
        };
        saved.map_or_else(|why| format!("; that cannot be saved now: {why}"), |()| String::new())
    }

    fn end_turn(&self) -> Turn {
        let next = Turn(self.scan.turn.get().0 + 1);
        self.scan.turn.set(next);
        next
    }

    /// Start the task of a pass.
    fn work_at_pass(self: &Rc<Self>) {
        let turn = self.end_turn();
        let now = self.io.now();
        let (total, seconds, requests) = (self.scan_total(), self.seconds_left(), self.requests_answered());
        if let Some(pass) = self.scan.pass.borrow_mut().as_mut() {
            let left = total.saturating_sub(pass.covered);
            *self.scan.pace.borrow_mut() = Some(Pace::new(now, left, seconds, self.scan.params.rate, requests));
            pass.goes_on(now);
        }
        let core = self.clone();
        self.spawn(async move {
            if core.work(turn).await.is_ok() {
                core.end_pass().await;
            }
        });
    }

    async fn work(self: &Rc<Self>, turn: Turn) -> Result<(), Stopped> {
        loop {
            self.may_go_on(turn).await?;
            let (cursor, is_at_its_end) = self.of_pass(turn, |pass| (pass.cursor, pass.is_at_its_end()))?;
            if is_at_its_end {
                return self.leave_out_the_rest(turn, cursor);
            }
            let (step, next) = match cursor.stage {
                Stage::Primary => self.read_units(turn).await?,
                Stage::Slots => {
                    self.of_pass(turn, |pass| pass.begin_step(0))?;
                    (self.read_slots(turn, cursor.position).await?, cursor.position + 1)
                }
                Stage::Metadata => {
                    self.of_pass(turn, |pass| pass.begin_step(0))?;
                    let step = self.read_metadata(turn, cursor.position).await?;
                    (step, cursor.position + PAGES_A_STEP as u64)
                }
            };
            if step == Step::Again {
                self.of_pass(turn, Pass::has_to_go_back)?;
                continue;
            }
            let over = match cursor.stage {
                Stage::Primary => next >= self.scan_order_of(turn)?.positions(),
                Stage::Slots => next >= u64::from(self.geometry().slots.div_ceil(UNIT_SLOTS)),
                // Where a place has gone meanwhile, there are others than those that were counted.
                Stage::Metadata => self.counts_all_pages(turn)? && next >= self.metadata_pages(),
            };
            let goes_on = self.of_pass(turn, |pass| {
                if cursor.stage != Stage::Primary {
                    pass.end_step(next, std::iter::empty());
                }
                !(over && pass.urgent.is_empty()) || pass.next_stage()
            })?;
            if !goes_on {
                return Ok(());
            }
        }
    }

    /// Whether the pages of metadata are those that the pass counted.
    fn counts_all_pages(&self, turn: Turn) -> Result<bool, Stopped> {
        let pages = self.metadata_pages();
        self.of_pass(turn, |pass| pass.pages as u64 == pages)
    }

    /// Do something with the pass, as long as it is this task's.
    fn of_pass<T>(&self, turn: Turn, with: impl FnOnce(&mut Pass) -> T) -> Result<T, Stopped> {
        let mut pass = self.scan.pass.borrow_mut();
        match pass.as_mut() {
            Some(pass) if turn == self.scan.turn.get() && !self.closing.get() => Ok(with(pass)),
            _ => Err(Stopped),
        }
    }

    /// Wait until the window is open, and the device is there that is read next.
    async fn may_go_on(self: &Rc<Self>, turn: Turn) -> Result<(), Stopped> {
        let mut waited = false;
        loop {
            let (stage, ordered) = self.of_pass(turn, |pass| (pass.cursor.stage, pass.ordered))?;
            let local = self.wall_seconds().saturating_add_signed(self.scan.load.get().local_offset);
            let mut devices = match stage {
                Stage::Primary => [DeviceIndex::PRIMARY].iter(),
                Stage::Slots => [DeviceIndex::SPARE].iter(),
                // The label's are there too.
                Stage::Metadata => [DeviceIndex::SPARE, DeviceIndex::PRIMARY].iter(),
            };
            let (waits, seconds) = if !ordered && !self.scan.params.window.is_open(local) {
                let why = format!("its window is {}", self.scan.params.window);
                (Some((ScanState::OutsideWindow, why)), Window::until_next_minute(local))
            } else if let Some(device) = devices.find(|device| self.refuse_gone(**device).is_err()) {
                (Some((ScanState::Held, format!("the {device} cannot be used"))), HELD_SECONDS)
            } else {
                (None, 0)
            };
            let now = self.io.now();
            let goes_on = waits.is_none();
            self.of_pass(turn, |pass| {
                pass.waits = waits;
                if goes_on && waited {
                    pass.goes_on(now);
                }
            })?;
            if goes_on {
                return Ok(());
            }
            waited = true;
            self.io.sleep_until(now.plus_secs(seconds)).await;
        }
    }

    /// The order in which a pass reads the primary.
    fn scan_order_of(&self, turn: Turn) -> Result<Order, Stopped> {
        self.of_pass(turn, |pass| Order::new(pass.extent))
    }

    fn whole(&self) -> SectorRange {
        SectorRange { start: Sector(0), count: self.geometry().capacity }
    }

    async fn end_pass(self: &Rc<Self>) {
        if let Some(pass) = self.scan.pass.borrow_mut().as_mut()
            && pass.scope.range.is_none()
            && pass.extent != self.whole()
        {
            let (from, to) = (bytes_of(pass.extent), bytes_of(self.whole()));
            let why = "the disk has grown since the pass began".to_owned();
            pass.skip(Skipped { device: DeviceIndex::PRIMARY, offset: from, len: to.saturating_sub(from), why });
        }
        let Some(pass) = self.take_pass() else { return };
        self.scan.buffers.borrow_mut().clear();
        let complete = pass.scope.range.is_none() && pass.skipped_bytes == 0;
        if complete {
            self.tally.borrow_mut().health_scans += 1;
        }
        self.record_end(&pass, complete, false);
        let Found { bad, recovered, slow, lost, healed, moved, rewritten, metadata } = pass.found;
        let is_well = bad + recovered + slow + lost + metadata == 0 && pass.skipped_bytes == 0;
        let severity = if is_well { Severity::Info } else { Severity::Warn };
        let cause = format!(
            "found {bad} bad, {recovered} read after retries, {slow} slow blocks, {lost} lost sectors, \
             {metadata} damaged copies of metadata; {healed} healed, {moved} moved, {rewritten} rewritten"
        );
        let number = pass.number;
        let action = match pass.skipped_bytes {
            0 if complete => format!("pass {number} ended"),
            0 => format!("pass {number} over a range ended"),
            bytes => format!("pass {number} ended and does not count: {bytes} bytes were skipped"),
        };
        self.scan_event(severity, cause, action);
        self.keep_place().await;
    }

    fn record_end(&self, pass: &Pass, complete: bool, cancelled: bool) {
        let ended = self.wall_seconds();
        let mut record = self.scan.record.borrow_mut();
        let Pass { number, started, found, .. } = *pass;
        record.last = LastPass { pass: number, started, ended, complete, cancelled, found };
        if pass.scope.range.is_none() {
            record.whole_ended = ended;
        }
        if complete {
            (record.complete_ended, record.complete_capacity) = (ended, pass.extent.count);
        }
    }

    fn scan_event(&self, severity: Severity, cause: impl Into<String>, action: impl Into<String>) {
        self.event(severity, EventKind::Scan, None, SectorRange::default(), cause, action);
    }

    fn requests_answered(&self) -> u64 {
        let p = &self.progress;
        [&p.reads, &p.writes, &p.flushes, &p.discards].into_iter().map(|counter| counter.load(Relaxed)).sum()
    }
}

/// Bytes of so many sectors.
fn bytes_of(range: SectorRange) -> u64 {
    range.count * SECTOR_SIZE
}
