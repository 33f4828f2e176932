//! The healer: everything rare. One for each volume; it owns map, table and devices' health, and the
//! requests that shards hand to it.
//!
//! Each kind of work has its file: `fence` keeps shards away from blocks under repair, `flush` is the
//! only one to flush, `commit` the only one to write table pages, `place` and `label` the other metadata,
//! `breaker` tells a bad medium from a gone device, `read` and `write` are the two ladders,
//! `operator` does what people ask for, `resize` among it, `health` judges, `scan` reads all of it from time to
//! time.

mod breaker;
mod commit;
mod failure;
mod fence;
mod flush;
mod health;
mod label;
mod ladder;
mod operator;
mod pending;
mod place;
mod read;
mod resize;
mod scan;
mod write;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use uuid::Uuid;

pub use super::errors::Class;
use super::errors::class_of;
use super::event::{Event, EventKind, Severity};
use super::io::Io;
use super::message::{Cursor, FenceId, Handed, Outcome, ToHealer, ToShard, Why};
use super::request::{Operation, Request, RequestOp};
use super::scan::{GuestLoad, ScanParams};
use super::shard::first_piece;
use super::task::Executor;
use super::view::{Geometry, Mode, PrimaryState, Progress, View};
use crate::device::{Completion, DeviceIndex, Errno, Op, OpKind};
use crate::units::{Block, SectorRange, Time};
use crate::volume::layout::{LabelLayout, Layout};
use crate::volume::map::Map;
use crate::volume::sidecar::Poison;
use crate::volume::superblock::Superblock;
use crate::volume::table::Table;

use failure::Failure;
pub use failure::FailureClass;
pub use flush::PoisonReport;
use ladder::Budget;
pub use operator::{HealerStatus, Order, OrderId, Reply, Work};
pub use resize::NotResized;

/// Repairs under way at a time, at most. Others wait in order; each holds at most [`CHUNK_SECTORS`] of
/// data, so this bounds the healer's memory too.
const JOBS_MAX: usize = 64;
/// Longest part of a request repaired at a time, in sectors (1 MiB).
const CHUNK_SECTORS: u64 = 2048;

/// What to do while a device cannot serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnLoss {
    /// Answer with an error at once.
    Fail,
    /// Keep the request for so many seconds, then answer with an error.
    Hold(u64),
}

/// What the operator chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// While the primary is gone.
    pub primary_gone: OnLoss,
    /// While a write needs a slot and there is none.
    pub spare_full: OnLoss,
    /// Serve the primary as it is: nothing is ever remapped.
    pub passthrough: bool,
}

/// What the healer counts; kept on the spare across restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests answered with an error.
    pub guest_errors: u64,
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
    /// Scanner passes over the whole volume that skipped nothing.
    pub health_scans: u64,
    /// Commits of the map.
    pub commits: u64,
    /// Damaged metadata copies rewritten.
    pub metadata_repairs: u64,
}

/// What a step of a [`Healer`] asks its driver to do.
#[derive(Debug, Default)]
pub struct HealerOut {
    /// Operations to submit to the healer's device, in order.
    pub ops: Vec<Op>,
    /// Messages for shards, by their numbers.
    pub to_shards: Vec<(usize, ToShard)>,
    /// Answers to the operator's orders.
    pub replies: Vec<(OrderId, Reply)>,
    /// What happened.
    pub events: Vec<Event>,
}

/// The parts of an open volume, as `open` found them.
pub(super) struct Opened {
    pub(super) geometry: Geometry,
    pub(super) layout: Layout,
    pub(super) label: Option<LabelLayout>,
    pub(super) superblock: Superblock,
    /// Bytes that the primary has.
    pub(super) primary_size: u64,
    pub(super) table: Table,
    pub(super) map: Map,
    pub(super) superseded: Vec<crate::units::Slot>,
    pub(super) poison: Poison,
    pub(super) saved: Vec<u64>,
    pub(super) saved_sequence: u64,
    pub(super) read_only: bool,
    /// There is no spare, and what has moved is known from a label written then (seconds since the epoch).
    pub(super) stamped: Option<u64>,
    /// The superblock's generation before this opening began a new one.
    pub(super) found_generation: u64,
    /// What the last close said of its guest's cache, where there was one.
    pub(super) closed_write_through: Option<bool>,
    pub(super) tally: Tally,
    pub(super) events: Vec<Event>,
}

impl Opened {
    /// With nothing beside the map that was found.
    pub(super) fn new(geometry: Geometry, layout: Layout, superblock: Superblock, table: Table, map: Map) -> Opened {
        Opened {
            geometry,
            layout,
            label: None,
            found_generation: superblock.generation,
            closed_write_through: superblock.closed_write_through(),
            primary_size: superblock.primary_size,
            superblock,
            table,
            map,
            superseded: Vec::new(),
            poison: Poison::default(),
            saved: Vec::new(),
            saved_sequence: 0,
            read_only: false,
            stamped: None,
            tally: Tally::default(),
            events: Vec::new(),
        }
    }
}

/// State shared by the healer's tasks, all on one thread.
pub(super) struct Core {
    pub(super) io: Rc<Io>,
    geometry: Cell<Geometry>,
    layout: Layout,
    label: Cell<Option<LabelLayout>>,
    set: Uuid,
    policy: Policy,
    /// Seconds since the epoch at time 0 of the clock.
    epoch: u64,
    shards: usize,
    progress: Arc<Progress>,
    superblock: RefCell<Superblock>,
    table: RefCell<Table>,
    map: RefCell<Map>,
    mode: Cell<Mode>,
    view: RefCell<Arc<View>>,
    view_stale: Cell<bool>,
    fences: fence::Fences,
    adoptions: fence::Adoptions,
    flushes: flush::Flushes,
    commits: commit::Commits,
    breaker: breaker::Breaker,
    places: place::Places,
    health: health::Health,
    scan: scan::Scanner,
    pending: RefCell<pending::PendingSectors>,
    /// Blocks rewritten in place after a failure, with the sectors that were (bit mask).
    rewritten: RefCell<BTreeMap<Block, u8>>,
    /// Percent of the slots whose use the operator was told of last.
    told_used: Cell<u64>,
    tally: RefCell<Tally>,
    /// Requests answered with an error since the start, by what they were and why.
    guest_errors: RefCell<BTreeMap<(Operation, FailureClass), u64>>,
    waiting: RefCell<VecDeque<Handed>>,
    held: RefCell<Vec<Held>>,
    /// Queues that stop, by shard.
    stopping: RefCell<BTreeMap<(usize, u16), Stopping>>,
    running: Cell<usize>,
    to_shards: RefCell<Vec<(usize, ToShard)>>,
    /// The volume is being closed.
    closing: Cell<bool>,
    replies: RefCell<Vec<(OrderId, Reply)>>,
    events: RefCell<Vec<Event>>,
}

/// A request kept while a device is away or the spare is full. It holds no fence.
struct Held {
    handed: Handed,
    deadline: Time,
    failure: Failure,
}

/// What becomes of requests of a stopping queue that would be held.
#[derive(Clone, Copy, Debug)]
enum Stopping {
    /// They go back to their shard.
    Withdraw,
    /// They fail: their shard can leave them nowhere.
    Finish,
}

/// The healer of one volume: a state machine like the shards.
pub struct Healer {
    core: Rc<Core>,
    executor: Executor,
}

/// What the runtime gives a healer beside the open volume.
#[derive(Clone, Debug)]
pub struct HealerParams {
    /// Number of shards it serves.
    pub shards: usize,
    /// The operator's choices.
    pub policy: Policy,
    /// Seconds since the epoch at time 0 of the clock.
    pub epoch: u64,
    /// Of the scanner.
    pub scan: ScanParams,
}

impl Healer {
    pub(super) fn new(executor: Executor, io: Rc<Io>, opened: Opened, params: &HealerParams) -> Healer {
        let Opened { geometry, layout, label, superblock, primary_size, table, map, superseded, .. } = opened;
        let mode = Mode {
            poisoned: opened.poison.poisoned,
            primary: PrimaryState::Up,
            spare_up: opened.stamped.is_none(),
            read_only: opened.read_only,
        };
        let flushes = flush::Flushes::new(opened.poison, geometry.capacity);
        let written = flushes.written();
        let health = health::Health::new(&opened.saved, &map);
        let scan = scan::Scanner::new(&params.scan, &opened.saved);
        let view = Arc::new(View { geometry, map: map.clone(), mode, dense: Arc::default(), written });
        let core = Rc::new(Core {
            geometry: Cell::new(geometry),
            layout,
            label: Cell::new(label),
            set: superblock.set,
            policy: params.policy,
            epoch: params.epoch,
            shards: params.shards,
            progress: Progress::new(geometry.capacity),
            superblock: RefCell::new(superblock),
            table: RefCell::new(table),
            map: RefCell::new(map),
            mode: Cell::new(mode),
            view: RefCell::new(view),
            view_stale: Cell::new(false),
            fences: fence::Fences::default(),
            adoptions: fence::Adoptions::default(),
            flushes,
            commits: commit::Commits::default(),
            breaker: breaker::Breaker::default(),
            places: place::Places::new(opened.saved, opened.saved_sequence),
            health,
            scan,
            pending: RefCell::default(),
            rewritten: RefCell::default(),
            told_used: Cell::new(0),
            tally: RefCell::new(opened.tally),
            guest_errors: RefCell::default(),
            closing: Cell::new(false),
            waiting: RefCell::default(),
            held: RefCell::default(),
            stopping: RefCell::default(),
            running: Cell::new(0),
            to_shards: RefCell::default(),
            replies: RefCell::default(),
            events: RefCell::new(opened.events),
            io,
        });
        core.start(superseded, primary_size);
        core.tell_reserve();
        core.begin_health();
        Healer { core, executor }
    }

    /// The volume's measures.
    pub fn geometry(&self) -> Geometry {
        self.core.geometry()
    }

    /// The first view, for the shards.
    pub fn view(&self) -> Arc<View> {
        self.core.view.borrow().clone()
    }

    /// The counters shared with the shards.
    pub fn progress(&self) -> Arc<Progress> {
        self.core.progress.clone()
    }

    /// A message from a shard.
    pub fn message(&mut self, now: Time, message: ToHealer, out: &mut HealerOut) {
        self.core.io.set_now(now);
        match message {
            ToHealer::Handed(handed) => self.core.take(handed),
            ToHealer::Clear { shard: _, fence } => self.core.fences.clear(fence),
            ToHealer::Adopted { shard: _, ack } => self.core.adoptions.adopted(ack),
            ToHealer::Withdraw { shard, queue } => self.core.withdraw(shard, queue),
            ToHealer::Finish { shard, queue } => self.core.finish(shard, queue),
            ToHealer::Resumed { shard, queue } => _ = self.core.stopping.borrow_mut().remove(&(shard, queue)),
        }
        self.turn(out);
    }

    /// A device operation of the healer ended.
    pub fn completed(&mut self, now: Time, completion: Completion, out: &mut HealerOut) {
        self.core.io.set_now(now);
        self.core.io.completed(completion);
        self.turn(out);
    }

    /// An order of the operator; the answer comes as a [`Reply`] with the same number.
    pub fn order(&mut self, now: Time, id: OrderId, order: Order, out: &mut HealerOut) {
        self.core.io.set_now(now);
        self.core.order(id, order);
        self.turn(out);
    }

    /// How the guest is served: to be told before a [`Healer::tick`] while [`Healer::wants_load`].
    pub fn hear(&mut self, load: GuestLoad) {
        self.core.scan.hear(load);
    }

    /// Nothing new of its own is to begin: its thread ends as soon as nothing is under way.
    pub fn wind_down(&mut self) {
        self.core.closing.set(true);
    }

    /// Whether a pass of the scanner is under way.
    pub fn wants_load(&self) -> bool {
        self.core.scan.wants_load()
    }

    /// Whether a pass of the scanner goes on: it is not paused, and waits for nothing.
    pub fn is_scanning(&self) -> bool {
        self.core.scan.is_running()
    }

    /// Time has passed; see [`Healer::wake_at`].
    pub fn tick(&mut self, now: Time, out: &mut HealerOut) {
        self.core.io.set_now(now);
        self.turn(out);
    }

    /// When to call [`Healer::tick`] at the latest.
    pub fn wake_at(&self) -> Option<Time> {
        self.core.io.next_timer()
    }

    /// Whether nothing is under way or waiting but timers.
    pub fn is_idle(&self) -> bool {
        self.core.running.get() == 0 && self.core.waiting.borrow().is_empty() && self.core.io.in_flight() == 0
    }

    /// What it is busy with.
    pub fn work(&self) -> Work {
        self.core.present_work()
    }

    /// Device operations submitted and not completed: none of them may be abandoned.
    pub fn in_flight(&self) -> usize {
        self.core.io.in_flight()
    }

    fn turn(&mut self, out: &mut HealerOut) {
        self.executor.run();
        // Before the answers that tell of it.
        self.core.tell_reserve();
        self.core.watch_health();
        self.core.io.take_ops(&mut out.ops);
        out.to_shards.append(&mut self.core.to_shards.borrow_mut());
        out.replies.append(&mut self.core.replies.borrow_mut());
        out.events.append(&mut self.core.events.borrow_mut());
    }
}

/// Slots that no block can move to: in use, or retired.
fn used_slots(table: &Table) -> u64 {
    u64::from(table.max_remaps()) - table.available() as u64
}

impl Core {
    /// Background work of a freshly opened volume.
    fn start(self: &Rc<Self>, superseded: Vec<crate::units::Slot>, primary_size: u64) {
        self.fit_pass();
        if self.mode.get().read_only || self.policy.passthrough {
            self.scan.wait_for_order();
            return;
        }
        if !superseded.is_empty() {
            self.free_later(superseded, false);
        }
        let core = self.clone();
        self.spawn(async move { core.keep_sidecars_fresh().await });
        let core = self.clone();
        self.spawn(async move { core.finish_resize(primary_size).await });
        self.begin_scanning();
    }

    fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    fn tell_reserve(&self) {
        let used = used_slots(&self.table.borrow());
        self.progress.reserve.set_used((used * 100).checked_div(u64::from(self.geometry().slots)));
    }

    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.io.spawner.spawn(task);
    }

    fn event(
        &self,
        severity: Severity,
        kind: EventKind,
        device: Option<DeviceIndex>,
        range: SectorRange,
        cause: impl Into<String>,
        action: impl Into<String>,
    ) {
        self.events.borrow_mut().push(Event {
            time: self.io.now(),
            severity,
            kind,
            device,
            range,
            cause: cause.into(),
            action: action.into(),
        });
    }

    /// Seconds since the epoch.
    fn wall_seconds(&self) -> u64 {
        self.epoch + self.io.now().0 / 1_000_000_000
    }

    /// A request came from a shard.
    fn take(self: &Rc<Self>, handed: Handed) {
        if let Why::Failed(device, errno) = handed.why
            && class_of(errno) != Class::Ours
        {
            let kind = if reads(&handed.request) { OpKind::Read } else { OpKind::Write };
            self.io.count_error(device, kind, errno);
            self.health.met_error(device, self.io.now());
        }
        match handed.why {
            Why::Durability => {
                let core = self.clone();
                self.spawn(async move { core.make_durable(handed).await });
            }
            Why::Refused(refusal) => {
                let failure = Failure::refused(refusal);
                self.fail_or_hold(handed, failure);
            }
            Why::Failed(..) | Why::Special => {
                self.waiting.borrow_mut().push_back(handed);
                self.dispatch();
            }
        }
    }

    /// Start repairs that wait, as many as may run.
    fn dispatch(self: &Rc<Self>) {
        while self.running.get() < JOBS_MAX {
            let Some(handed) = self.waiting.borrow_mut().pop_front() else { return };
            self.running.set(self.running.get() + 1);
            let core = self.clone();
            self.spawn(async move {
                core.repair(handed).await;
                core.running.set(core.running.get() - 1);
                core.dispatch();
            });
        }
    }

    /// Serve a piece of a request by the ladders, a chunk at a time.
    async fn repair(self: &Rc<Self>, handed: Handed) {
        let piece = handed.cursor.piece;
        let zeroing = matches!(handed.request.op, RequestOp::WriteZeroes { .. });
        let failed = match handed.why {
            // The disk is not to blame: our own operations try again, and zeros go as ordinary writes.
            Why::Failed(_, errno) if class_of(errno) == Class::Ours => None,
            Why::Failed(_, Errno(libc::EOPNOTSUPP)) if zeroing => None,
            // A discard is advice: that it fails says nothing of the medium's taking writes.
            Why::Failed(device, errno) => {
                let write = writes(&handed.request);
                let mut diagnosed = self.diagnose(device, errno, !write, piece).await;
                if diagnosed.is_ok() && write && device == DeviceIndex::PRIMARY {
                    diagnosed = self.count_failed_write(errno, piece);
                }
                match diagnosed {
                    Ok(()) => Some(write::Failed { device, errno, request: piece }),
                    Err(failure) => return self.fail_or_hold(handed, failure),
                }
            }
            _ => None,
        };
        // Of the whole request: what one of its chunks has used up, the next has no more.
        let budget = if reads(&handed.request) { Budget::of_read() } else { Budget::of_write() };
        let mut start = piece.start;
        while start < piece.end() {
            let limit = CHUNK_SECTORS - start.0 % CHUNK_SECTORS;
            let chunk = SectorRange { start, count: (piece.end().0 - start.0).min(limit) };
            let from = usize::try_from(chunk.start.0 - piece.start.0).expect("within a request in memory") * 512;
            let done = match &handed.request.op {
                RequestOp::Read { data, .. } => {
                    let failed = failed.filter(|_| chunk == piece);
                    self.read_chunk(chunk, data, from, failed, &budget).await
                }
                RequestOp::Write { data, .. } => self.write_chunk(chunk, Some((data, from)), failed, &budget).await,
                RequestOp::WriteZeroes { .. } => self.write_chunk(chunk, None, failed, &budget).await,
                // Advice that failed on the medium was heard; the event below says so.
                RequestOp::Discard { .. } => Ok(()),
                RequestOp::Flush => unreachable!("a flush has no piece to repair"),
            };
            if let Err(failure) = done {
                return self.fail_or_hold(handed, failure);
            }
            start = chunk.end();
        }
        self.hand_back(handed, Outcome::Served);
    }

    /// A request that cannot be served now: kept, where the operator wants that, or answered.
    fn fail_or_hold(self: &Rc<Self>, handed: Handed, failure: Failure) {
        let policy = match failure.hold {
            failure::Hold::Never => OnLoss::Fail,
            failure::Hold::PrimaryGone => self.policy.primary_gone,
            failure::Hold::SpareFull => self.policy.spare_full,
        };
        let stopping = self.stopping.borrow().get(&(handed.shard, handed.request.queue)).copied();
        match (policy, stopping) {
            (OnLoss::Fail, _) | (_, Some(Stopping::Finish)) => self.fail(handed, &failure),
            (_, Some(Stopping::Withdraw)) => {
                self.send(handed.shard, ToShard::Withdrawn { request: handed.request });
            }
            (OnLoss::Hold(seconds), None) => {
                let core = self.clone();
                let deadline = self.io.now().plus_secs(seconds);
                self.held.borrow_mut().push(Held { handed, deadline, failure });
                self.spawn(async move {
                    core.io.sleep_until(deadline).await;
                    core.fail_held();
                });
            }
        }
    }

    /// Answer the requests that were held for as long as the policy says.
    fn fail_held(self: &Rc<Self>) {
        let now = self.io.now();
        let (over, kept) =
            std::mem::take(&mut *self.held.borrow_mut()).into_iter().partition(|held: &Held| now >= held.deadline);
        *self.held.borrow_mut() = kept;
        for held in over {
            self.fail(held.handed, &held.failure);
        }
    }

    /// The reason to hold requests is gone: serve them, in their order.
    fn resume_held(self: &Rc<Self>, reason: failure::Hold) {
        let (resumed, kept) = std::mem::take(&mut *self.held.borrow_mut())
            .into_iter()
            .partition(|held: &Held| held.failure.hold == reason);
        *self.held.borrow_mut() = kept;
        for held in resumed {
            let mut handed: Handed = held.handed;
            if matches!(handed.request.op, RequestOp::Flush) || handed.why == Why::Durability {
                handed.why = Why::Durability;
            } else {
                handed.why = Why::Special;
                if handed.cursor == Cursor::default() {
                    handed.cursor = first_piece(&handed.request).unwrap_or_default();
                }
            }
            self.take(handed);
        }
    }

    /// Answer with an error, and say so.
    fn fail(&self, handed: Handed, failure: &Failure) {
        self.tally.borrow_mut().guest_errors += 1;
        let counted = (handed.request.op.operation(), failure.class);
        *self.guest_errors.borrow_mut().entry(counted).or_default() += 1;
        let range = if handed.cursor.piece.is_empty() {
            first_piece(&handed.request).map(|cursor| cursor.piece).unwrap_or_default()
        } else {
            handed.cursor.piece
        };
        let action = format!("the guest's {} failed", verb(&handed.request));
        self.event(
            Severity::Error,
            EventKind::GuestError,
            failure.device,
            failure.range.unwrap_or(range),
            &failure.cause,
            action,
        );
        self.hand_back(handed, Outcome::Failed);
    }

    fn hand_back(&self, handed: Handed, outcome: Outcome) {
        let Handed { shard, request, cursor, .. } = handed;
        self.send(shard, ToShard::Handled { request, cursor, outcome });
    }

    fn send(&self, shard: usize, message: ToShard) {
        self.to_shards.borrow_mut().push((shard, message));
    }

    /// A queue stops: what has not begun goes back to its shard.
    fn withdraw(&self, shard: usize, queue: u16) {
        self.stopping.borrow_mut().insert((shard, queue), Stopping::Withdraw);
        let not_begun = |handed: &Handed| {
            handed.shard == shard
                && handed.request.queue == queue
                && (handed.cursor == Cursor::default() || first_piece(&handed.request) == Some(handed.cursor))
                && !matches!(handed.why, Why::Failed(..))
        };
        let (mut back, kept): (Vec<Handed>, Vec<Handed>) =
            std::mem::take(&mut *self.waiting.borrow_mut()).into_iter().partition(not_begun);
        *self.waiting.borrow_mut() = kept.into();
        back.extend(self.take_held(shard, queue).into_iter().map(|held| held.handed));
        for handed in back {
            self.send(shard, ToShard::Withdrawn { request: handed.request });
        }
    }

    /// A queue stops whose requests can be left nowhere: those that are held fail.
    fn finish(&self, shard: usize, queue: u16) {
        self.stopping.borrow_mut().insert((shard, queue), Stopping::Finish);
        for held in self.take_held(shard, queue) {
            self.fail(held.handed, &held.failure);
        }
    }

    fn take_held(&self, shard: usize, queue: u16) -> Vec<Held> {
        let (taken, kept) = std::mem::take(&mut *self.held.borrow_mut())
            .into_iter()
            .partition(|held: &Held| held.handed.shard == shard && held.handed.request.queue == queue);
        *self.held.borrow_mut() = kept;
        taken
    }
}

fn reads(request: &Request) -> bool {
    matches!(request.op, RequestOp::Read { .. })
}

fn writes(request: &Request) -> bool {
    matches!(request.op, RequestOp::Write { .. } | RequestOp::WriteZeroes { .. })
}

fn verb(request: &Request) -> &'static str {
    match request.op {
        RequestOp::Read { .. } => "read",
        RequestOp::Write { .. } => "write",
        RequestOp::Flush => "flush",
        RequestOp::Discard { .. } => "discard",
        RequestOp::WriteZeroes { .. } => "write of zeros",
    }
}
