//! The fast path of one worker: requests in, device operations and answers out.
//!
//! A request whose blocks are plain goes to the primary with the guest's own iovecs. One over remapped
//! blocks is cut into runs. Everything else (failures, pending and lost sectors, refusals) is handed to
//! the healer, which owns it until it comes back. A request that touches a fenced block submits none of
//! its runs and waits at the fence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use super::message::{Cursor, FenceId, Handed, Outcome, Refusal, ToHealer, ToShard, Why};
use super::request::{Answer, Request, RequestOp, Status};
use super::view::{PrimaryState, Progress, Run, View, runs};
use crate::device::buffer::{IoSlice, Iovecs};
use crate::device::{Completion, DeviceIndex, Errno, Op, OpKind, Tag};
use crate::units::{BlockRange, SectorRange, Time};

/// Longest piece of a zeroing or discard, in sectors (8 MiB): nothing behind it waits long.
const PIECE_SECTORS: u64 = 16_384;

/// What a step of a [`Shard`] asks its driver to do.
#[derive(Debug, Default)]
pub struct ShardOut {
    /// Operations to submit to the worker's device, in order.
    pub ops: Vec<Op>,
    /// Messages for the healer.
    pub to_healer: Vec<ToHealer>,
    /// Requests that ended.
    pub answers: Vec<Answer>,
    /// Requests given back without effect, after [`Shard::withdraw`].
    pub withdrawn: Vec<Request>,
}

/// A request with device operations under way.
#[derive(Debug)]
struct Active {
    request: Request,
    cursor: Cursor,
    outstanding: u32,
    failed: Option<(DeviceIndex, Errno)>,
    /// Whether some of its operations write to slots.
    slots: bool,
    /// [`Progress::spare_flush_failures`] when they were submitted.
    flush_failures: u64,
    /// Scatter lists of its runs, alive until the operations have ended.
    parts: Vec<Iovecs>,
}

#[derive(Debug)]
struct Fence {
    id: FenceId,
    range: BlockRange,
    /// Requests with device operations that overlap; the healer hears of it when there is none.
    overlapping: usize,
    parked: VecDeque<(Request, Cursor)>,
}

/// The fast path of one worker.
#[derive(Debug)]
pub struct Shard {
    index: usize,
    view: Arc<View>,
    progress: Arc<Progress>,
    active: Vec<Option<Active>>,
    free: Vec<usize>,
    fences: Vec<Fence>,
    unanswered: Vec<usize>,
    /// Queues being stopped: what comes back from the healer unserved is given back, not served.
    stopping: Vec<u16>,
    /// Queues opened again, of which the healer hears with their next request.
    resumed: Vec<u16>,
}

impl Shard {
    /// A shard of its own number, on a first view.
    pub fn new(index: usize, view: Arc<View>, progress: Arc<Progress>) -> Shard {
        Shard {
            index,
            view,
            progress,
            active: Vec::new(),
            free: Vec::new(),
            fences: Vec::new(),
            unanswered: Vec::new(),
            stopping: Vec::new(),
            resumed: Vec::new(),
        }
    }

    /// What it shares with the healer.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Take a request. Zero-length reads and writes succeed at once.
    pub fn submit(&mut self, _now: Time, request: Request, out: &mut ShardOut) {
        let queue = usize::from(request.queue);
        if self.unanswered.len() <= queue {
            self.unanswered.resize(queue + 1, 0);
        }
        self.unanswered[queue] += 1;
        if let Some(at) = self.resumed.iter().position(|resumed| *resumed == request.queue) {
            self.resumed.swap_remove(at);
            out.to_healer.push(ToHealer::Resumed { shard: self.index, queue: request.queue });
        }
        if let Some(refusal) = self.refusal(&request) {
            return self.hand_over(request, Cursor::default(), Why::Refused(refusal), out);
        }
        match first_piece(&request) {
            Some(cursor) => self.serve(request, cursor, out),
            None => self.conclude(request, out),
        }
    }

    /// A device operation of this shard ended.
    ///
    /// # Panics
    /// If no operation of that tag is under way.
    pub fn completed(&mut self, _now: Time, completion: Completion, out: &mut ShardOut) {
        let index = usize::try_from(completion.tag.0 >> 8).expect("tags are made from indices");
        let device = DeviceIndex(u8::try_from(completion.tag.0 & 0xff).expect("masked to a byte"));
        let active = self.active[index].as_mut().expect("a completion for an operation under way");
        match completion.result {
            Err(errno) => active.failed = active.failed.or(Some((device, errno))),
            Ok(()) if device == DeviceIndex::PRIMARY && is_write(&active.request) => {
                self.progress.primary_writes_ok.fetch_add(1, Relaxed);
            }
            Ok(()) => {}
        }
        active.outstanding -= 1;
        if active.outstanding > 0 {
            return;
        }
        let ended = self.active[index].take().expect("just used");
        self.free.push(index);
        let blocks = ended.cursor.piece.blocks();
        if ended.slots && ended.failed.is_none() {
            self.progress.slot_requests.fetch_add(1, Relaxed);
        }
        if ended.slots && is_write(&ended.request) {
            // Counted before the answer, so that a flush after it sees the spare dirty.
            self.progress.slot_writes.fetch_add(1, SeqCst);
        }
        // Read after the count above, as a failing flush counts itself before it looks at that: one sees the other.
        let flush_failed = ended.slots
            && is_write(&ended.request)
            && self.progress.spare_flush_failures.load(SeqCst) != ended.flush_failures;
        if !self.fences.is_empty() {
            self.leave_fences(blocks, out);
        }
        match ended.failed {
            Some((_, Errno(libc::EOPNOTSUPP))) if matches!(ended.request.op, RequestOp::Discard { .. }) => {
                // A discard is advice (virtio 1.3 §5.2.6.2): a device that has none has taken it.
                self.advance(ended.request, ended.cursor, out);
            }
            Some((device, errno)) => self.hand_over(ended.request, ended.cursor, Why::Failed(device, errno), out),
            None if flush_failed => {
                self.hand_over(ended.request, ended.cursor, Why::Refused(Refusal::SpareDown), out);
            }
            None if self.view.mode.poisoned && is_write(&ended.request) => {
                self.hand_over(ended.request, ended.cursor, Why::Refused(Refusal::Poisoned), out);
            }
            None => self.advance(ended.request, ended.cursor, out),
        }
    }

    /// A message from the healer.
    pub fn message(&mut self, _now: Time, message: ToShard, out: &mut ShardOut) {
        match message {
            ToShard::Fence { fence, range } => {
                let overlapping =
                    self.active.iter().flatten().filter(|a| a.cursor.piece.blocks().overlaps(range)).count();
                self.fences.push(Fence { id: fence, range, overlapping, parked: VecDeque::new() });
                if overlapping == 0 {
                    out.to_healer.push(ToHealer::Clear { shard: self.index, fence });
                }
            }
            ToShard::Publish { view, lift, ack } => {
                self.view = view;
                let (lifted, kept) = std::mem::take(&mut self.fences).into_iter().partition(|f| lift.contains(&f.id));
                self.fences = kept;
                for (request, cursor) in lifted.into_iter().flat_map(|fence: Fence| fence.parked) {
                    self.serve(request, cursor, out);
                }
                if let Some(ack) = ack {
                    out.to_healer.push(ToHealer::Adopted { shard: self.index, ack });
                }
            }
            ToShard::Handled { request, cursor, outcome } => match outcome {
                Outcome::Served if self.view.mode.poisoned && is_write(&request) => {
                    // It ended after the flush that failed: nobody will vouch for it any more.
                    self.hand_over(request, cursor, Why::Refused(Refusal::Poisoned), out);
                }
                Outcome::Served => self.advance(request, cursor, out),
                Outcome::Durable => self.answer(request, Status::Ok, out),
                Outcome::Failed => self.answer(request, Status::IoErr, out),
            },
            ToShard::Withdrawn { request } => self.give_back(request, out),
        }
    }

    /// Requests taken from `queue` and neither answered nor given back.
    pub fn unanswered(&self, queue: u16) -> usize {
        self.unanswered.get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// Stop a queue: give back, without effect, its requests that no device works on. Those parked here
    /// come at once in [`ShardOut::withdrawn`]; those waiting at the healer come later, through
    /// [`Shard::message`]. Requests with operations under way are answered as ever. The queue is stopped
    /// when [`Shard::unanswered`] is 0; [`Shard::resume`] opens it again.
    pub fn withdraw(&mut self, queue: u16, out: &mut ShardOut) {
        self.note_stopping(queue);
        let mut given_back = Vec::new();
        for fence in &mut self.fences {
            let parked = std::mem::take(&mut fence.parked);
            for (request, cursor) in parked {
                // A request of several pieces that has begun is not without effect: it goes on.
                if request.queue == queue && Some(cursor) == first_piece(&request) {
                    given_back.push(request);
                } else {
                    fence.parked.push_back((request, cursor));
                }
            }
        }
        for request in given_back {
            self.give_back(request, out);
        }
        if self.unanswered(queue) > 0 {
            out.to_healer.push(ToHealer::Withdraw { shard: self.index, queue });
        }
    }

    /// Serve requests of a queue that is stopping to their end, where they can be left nowhere: all of them, or
    /// those that come back from [`Shard::withdraw`]. What is held, or would be, is answered with an error.
    pub fn finish(&mut self, queue: u16, out: &mut ShardOut) {
        self.note_stopping(queue);
        out.to_healer.push(ToHealer::Finish { shard: self.index, queue });
    }

    fn note_stopping(&mut self, queue: u16) {
        self.resumed.retain(|resumed| *resumed != queue);
        if !self.stopping.contains(&queue) {
            self.stopping.push(queue);
        }
    }

    /// Take requests of a queue again after [`Shard::withdraw`] or [`Shard::finish`].
    pub fn resume(&mut self, queue: u16) {
        let before = self.stopping.len();
        self.stopping.retain(|stopping| *stopping != queue);
        if self.stopping.len() < before && !self.resumed.contains(&queue) {
            self.resumed.push(queue);
        }
    }

    fn refusal(&self, request: &Request) -> Option<Refusal> {
        let geometry = &self.view.geometry;
        let inside = match &request.op {
            RequestOp::Read { range, .. } | RequestOp::Write { range, .. } => geometry.contains(*range),
            RequestOp::Discard { ranges } => ranges.iter().all(|range| geometry.contains(*range)),
            RequestOp::WriteZeroes { ranges } => ranges.iter().all(|(range, _)| geometry.contains(*range)),
            RequestOp::Flush => true,
        };
        let mode = &self.view.mode;
        let changes = !matches!(request.op, RequestOp::Read { .. } | RequestOp::Flush);
        if !inside {
            Some(Refusal::BeyondEnd)
        } else if mode.read_only && changes {
            Some(Refusal::ReadOnly)
        } else if mode.poisoned && !matches!(request.op, RequestOp::Read { .. }) {
            Some(Refusal::Poisoned)
        } else {
            None
        }
    }

    /// Start the piece at `cursor`: park it, hand it over, or submit its operations.
    fn serve(&mut self, request: Request, cursor: Cursor, out: &mut ShardOut) {
        let blocks = cursor.piece.blocks();
        if let Some(fence) = self.fences.iter_mut().find(|fence| fence.range.overlaps(blocks)) {
            fence.parked.push_back((request, cursor));
            return;
        }
        if let Some(refusal) = self.refusal(&request) {
            // The mode may have changed since the request came.
            return self.hand_over(request, cursor, Why::Refused(refusal), out);
        }
        if self.view.mode.primary == PrimaryState::Up
            && self.view.map.is_plain(blocks)
            && self.view.geometry.is_aligned(cursor.piece)
            && !(is_write(&request) && self.view.is_dense(blocks))
        {
            self.start_plain(request, cursor, out);
        } else {
            self.start_runs(request, cursor, out);
        }
    }

    /// The fast path proper: one operation on the primary with the guest's own memory.
    fn start_plain(&mut self, request: Request, cursor: Cursor, out: &mut ShardOut) {
        let (kind, data) = op_of(&request, &cursor);
        let index = self.occupy(request, cursor);
        out.ops.push(Op {
            tag: tag(index, DeviceIndex::PRIMARY),
            device: DeviceIndex::PRIMARY,
            kind,
            offset: cursor.piece.start.bytes(),
            len: cursor.piece.bytes(),
            data,
        });
        self.active[index].as_mut().expect("just occupied").outstanding = 1;
    }

    /// The slower path: look at each block, then submit one operation for each run.
    fn start_runs(&mut self, request: Request, cursor: Cursor, out: &mut ShardOut) {
        if matches!(request.op, RequestOp::Discard { .. }) {
            return self.start_discard(request, cursor, out);
        }
        let write = is_write(&request);
        if let Some(why) = self.obstacle(&cursor, write) {
            return self.hand_over(request, cursor, why, out);
        }
        if matches!(request.op, RequestOp::WriteZeroes { .. }) && !self.view.map.is_plain(cursor.piece.blocks()) {
            // Zeros for a slot need memory, which the healer has.
            return self.hand_over(request, cursor, Why::Special, out);
        }
        let runs = runs(&self.view.map, &self.view.geometry, cursor.piece);
        let (kind, _) = op_of(&request, &cursor);
        let mut parts = Vec::with_capacity(runs.len());
        for run in &runs {
            let from = (run.range.start.0 - cursor.piece.start.0) * crate::units::SECTOR_SIZE;
            let data = data_of(&request).expect("only reads and writes come here with runs on slots");
            parts.push(data.slice(fits(from), fits(run.range.bytes())));
        }
        let index = self.occupy(request, cursor);
        for (run, part) in runs.iter().zip(&parts) {
            out.ops.push(op(tag(index, run.device), *run, kind, part.as_io()));
        }
        let active = self.active[index].as_mut().expect("just occupied");
        active.outstanding = u32::try_from(runs.len()).expect("bounded by the sectors of a request");
        active.flush_failures = self.progress.spare_flush_failures.load(SeqCst);
        active.slots = runs.iter().any(|run| run.device != DeviceIndex::PRIMARY);
        active.parts = parts;
    }

    /// Why the piece cannot be served by plain operations, if so.
    fn obstacle(&self, cursor: &Cursor, write: bool) -> Option<Why> {
        let dense = write && self.view.is_dense(cursor.piece.blocks());
        let mut special = dense || !self.view.geometry.is_aligned(cursor.piece);
        let mut primary = false;
        for block in cursor.piece.blocks().iter() {
            let state = self.view.map.get(block);
            let mask = cursor.piece.mask_in(block);
            primary |= state.slot.is_none();
            if state.in_doubt && (write || state.doubt & mask != 0) {
                return Some(Why::Refused(Refusal::InDoubt));
            }
            if state.slot.is_some() && !self.view.mode.spare_up {
                return Some(Why::Refused(Refusal::SpareDown));
            }
            special |= state.pending || state.lost & mask != 0;
        }
        if primary && self.view.mode.primary == PrimaryState::Gone {
            return Some(Why::Refused(Refusal::PrimaryGone));
        }
        special.then_some(Why::Special)
    }

    /// Discards skip every block that is not plain (W6).
    fn start_discard(&mut self, request: Request, cursor: Cursor, out: &mut ShardOut) {
        let plain: Vec<Run> = if self.view.mode.primary == PrimaryState::Up {
            runs(&self.view.map, &self.view.geometry, cursor.piece)
                .into_iter()
                .filter(|run| run.device == DeviceIndex::PRIMARY)
                .flat_map(|run| plain_parts(&self.view, run))
                .filter(|run| self.view.geometry.is_aligned(run.range))
                .collect()
        } else {
            Vec::new()
        };
        if plain.is_empty() {
            return self.advance(request, cursor, out);
        }
        let index = self.occupy(request, cursor);
        for run in &plain {
            out.ops.push(op(tag(index, run.device), *run, OpKind::Discard, IoSlice::EMPTY));
        }
        let active = self.active[index].as_mut().expect("just occupied");
        active.outstanding = u32::try_from(plain.len()).expect("bounded by the sectors of a piece");
    }

    fn occupy(&mut self, request: Request, cursor: Cursor) -> usize {
        let (failed, slots, flush_failures, parts) = (None, false, 0, Vec::new());
        let active = Active { request, cursor, outstanding: 0, failed, slots, flush_failures, parts };
        if let Some(index) = self.free.pop() {
            self.active[index] = Some(active);
            index
        } else {
            self.active.push(Some(active));
            self.active.len() - 1
        }
    }

    /// The piece at `cursor` is done: start the next one, or end the request.
    fn advance(&mut self, request: Request, cursor: Cursor, out: &mut ShardOut) {
        if is_write(&request) {
            self.view.written.note(cursor.piece);
        }
        match next_piece(&request, &cursor) {
            Some(next) => self.serve(request, next, out),
            None => self.conclude(request, out),
        }
    }

    /// Every piece is done: answer, or see to durability first.
    fn conclude(&mut self, request: Request, out: &mut ShardOut) {
        if matches!(request.op, RequestOp::Flush) || (request.write_through && is_write(&request)) {
            return self.hand_over(request, Cursor::default(), Why::Durability, out);
        }
        self.answer(request, Status::Ok, out);
    }

    fn hand_over(&mut self, request: Request, cursor: Cursor, why: Why, out: &mut ShardOut) {
        out.to_healer.push(ToHealer::Handed(Handed { shard: self.index, request, cursor, why }));
    }

    fn answer(&mut self, request: Request, status: Status, out: &mut ShardOut) {
        self.unanswered[usize::from(request.queue)] -= 1;
        let progress = &self.progress;
        let bytes = |data: &Iovecs| if status == Status::Ok { data.len() as u64 } else { 0 };
        match &request.op {
            RequestOp::Read { data, .. } => {
                progress.reads.fetch_add(1, Relaxed);
                progress.read_bytes.fetch_add(bytes(data), Relaxed);
            }
            RequestOp::Write { data, .. } => {
                progress.writes.fetch_add(1, Relaxed);
                progress.written_bytes.fetch_add(bytes(data), Relaxed);
            }
            RequestOp::WriteZeroes { .. } => _ = progress.writes.fetch_add(1, Relaxed),
            RequestOp::Discard { .. } => _ = progress.discards.fetch_add(1, Relaxed),
            RequestOp::Flush => _ = progress.flushes.fetch_add(1, Relaxed),
        }
        out.answers.push(Answer { request, status });
    }

    fn give_back(&mut self, request: Request, out: &mut ShardOut) {
        self.unanswered[usize::from(request.queue)] -= 1;
        out.withdrawn.push(request);
    }

    fn leave_fences(&mut self, blocks: BlockRange, out: &mut ShardOut) {
        for fence in &mut self.fences {
            if fence.overlapping > 0 && fence.range.overlaps(blocks) {
                fence.overlapping -= 1;
                if fence.overlapping == 0 {
                    out.to_healer.push(ToHealer::Clear { shard: self.index, fence: fence.id });
                }
            }
        }
    }
}

/// An operation's tag: the place of its request and, in the low byte, its device.
fn tag(index: usize, device: DeviceIndex) -> Tag {
    Tag((index as u64) << 8 | u64::from(device.0))
}

fn op(tag: Tag, run: Run, kind: OpKind, data: IoSlice) -> Op {
    Op { tag, device: run.device, kind, offset: run.offset, len: run.range.bytes(), data }
}

fn fits(bytes: u64) -> usize {
    usize::try_from(bytes).expect("lengths of requests fit in memory")
}

fn is_write(request: &Request) -> bool {
    matches!(request.op, RequestOp::Write { .. } | RequestOp::WriteZeroes { .. })
}

fn data_of(request: &Request) -> Option<&Iovecs> {
    match &request.op {
        RequestOp::Read { data, .. } | RequestOp::Write { data, .. } => Some(data),
        RequestOp::Flush | RequestOp::Discard { .. } | RequestOp::WriteZeroes { .. } => None,
    }
}

fn op_of(request: &Request, cursor: &Cursor) -> (OpKind, IoSlice) {
    match &request.op {
        RequestOp::Read { data, .. } => (OpKind::Read, data.as_io()),
        RequestOp::Write { data, .. } => (OpKind::Write, data.as_io()),
        RequestOp::Discard { .. } => (OpKind::Discard, IoSlice::EMPTY),
        RequestOp::WriteZeroes { ranges } => (OpKind::WriteZeroes { unmap: ranges[cursor.segment].1 }, IoSlice::EMPTY),
        RequestOp::Flush => (OpKind::Flush, IoSlice::EMPTY),
    }
}

fn segment(request: &Request, index: usize) -> Option<SectorRange> {
    match &request.op {
        RequestOp::Read { range, .. } | RequestOp::Write { range, .. } => (index == 0).then_some(*range),
        RequestOp::Discard { ranges } => ranges.get(index).copied(),
        RequestOp::WriteZeroes { ranges } => ranges.get(index).map(|(range, _)| *range),
        RequestOp::Flush => None,
    }
}

/// The first `PIECE_SECTORS` of `rest`, or all of it for a request that carries data.
fn piece(request: &Request, rest: SectorRange) -> SectorRange {
    if data_of(request).is_some() {
        return rest;
    }
    // Up to the next multiple, so that pieces stay aligned to blocks.
    let limit = PIECE_SECTORS - rest.start.0 % PIECE_SECTORS;
    SectorRange { start: rest.start, count: rest.count.min(limit) }
}

/// Where a request starts; `None` where it has nothing to do on a device.
pub(super) fn first_piece(request: &Request) -> Option<Cursor> {
    let mut index = 0;
    while let Some(range) = segment(request, index) {
        if !range.is_empty() {
            return Some(Cursor { segment: index, piece: piece(request, range) });
        }
        index += 1;
    }
    None
}

fn next_piece(request: &Request, cursor: &Cursor) -> Option<Cursor> {
    let range = segment(request, cursor.segment)?;
    let start = cursor.piece.end();
    let rest = SectorRange { start, count: range.end().0 - start.0 };
    if !rest.is_empty() {
        return Some(Cursor { segment: cursor.segment, piece: piece(request, rest) });
    }
    let mut index = cursor.segment + 1;
    while let Some(range) = segment(request, index) {
        if !range.is_empty() {
            return Some(Cursor { segment: index, piece: piece(request, range) });
        }
        index += 1;
    }
    None
}

/// The parts of a run on the primary whose blocks are plain.
fn plain_parts(view: &View, run: Run) -> Vec<Run> {
    let mut parts: Vec<Run> = Vec::new();
    for block in run.range.blocks().iter().filter(|block| view.map.get(*block).is_plain()) {
        let part = run.range.within(block);
        match parts.last_mut() {
            Some(last) if last.range.end() == part.start => last.range.count += part.count,
            _ => parts.push(Run { range: part, device: run.device, offset: part.start.bytes() }),
        }
    }
    parts
}
