//! Two disks in memory with bad places, and the scripts that make and open a volume on them.

use uuid::Uuid;
use vhost_remap::device::memory::{Keep, MemoryDevice, MemoryDisks, Pending};
use vhost_remap::device::{self, Completion, Device, DeviceIndex, Errno, Op, OpKind, Wait};
use vhost_remap::engine::create::{CreateParams, Creation};
use vhost_remap::engine::healer::{Healer, HealerParams, OnLoss, Policy};
use vhost_remap::engine::open::{DeviceFacts, LabelSearch, OldLabel, OpenError, OpenParams, Opening};
use vhost_remap::engine::scan::ScanParams;
use vhost_remap::units::{Sector, SectorRange, Time};
use vhost_remap::volume::layout::{Home, LabelLayout, Layout, Place, label_size, spare_size};

use super::engine::Engine;

pub(crate) const PRIMARY: DeviceIndex = DeviceIndex::PRIMARY;
pub(crate) const SPARE: DeviceIndex = DeviceIndex::SPARE;
/// Sectors in a block.
pub(crate) const BLOCK: u64 = 8;
/// The volumes' clock starts at this second of the epoch.
pub(crate) const EPOCH: u64 = 1_700_000_000;

/// When the primary was last changed, as far as anybody says here.
pub(crate) const MTIME: u64 = 1_700_000_123_456_789_000;

/// The power went: so many operations were allowed, and no more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Cut;

/// How large a volume is, and how it was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) capacity: u64,
    pub(crate) max_remaps: u32,
    /// Created with a label, or adopted without.
    pub(crate) labelled: bool,
}

impl Shape {
    pub(crate) fn sizes(&self) -> [u64; 2] {
        let label = if self.labelled { label_size(self.max_remaps) } else { 0 };
        [self.capacity * 512 + label, spare_size(self.max_remaps)]
    }

    pub(crate) fn layout(&self) -> Layout {
        Layout::new(self.sizes()[1], self.max_remaps).expect("a spare of the size it needs")
    }

    pub(crate) fn label(&self) -> Option<LabelLayout> {
        LabelLayout::new(self.sizes()[0], self.max_remaps).filter(|_| self.labelled)
    }

    pub(crate) fn facts(&self) -> [DeviceFacts; 2] {
        let wwn = if self.labelled { "" } else { "naa.5000c500a1b2c3d4" };
        self.sizes().map(|size| DeviceFacts { size, logical_block: 512, inode: 7, wwn: wwn.into(), mtime_ns: MTIME })
    }

    pub(crate) fn create_params(&self) -> CreateParams {
        let [primary, spare] = self.facts();
        CreateParams {
            primary,
            spare,
            capacity: self.capacity,
            labelled: self.labelled,
            max_remaps: self.max_remaps,
            set: Uuid::from_u128(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            devices: [Uuid::from_u128(0xa), Uuid::from_u128(0xb)],
            serial: *b"golden-serial-000001",
            now: EPOCH,
        }
    }
}

/// Bytes of a device that fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bad {
    pub(crate) device: DeviceIndex,
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) reads: Reads,
    pub(crate) writes: bool,
}

/// How reads of a bad range fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reads {
    Good,
    /// A write that succeeds makes it readable again.
    UntilWritten,
    Never,
    /// So many more times.
    Times(u32),
}

/// Disks with what goes wrong on them.
pub(crate) struct Rig {
    pub(crate) shape: Shape,
    pub(crate) disks: MemoryDisks,
    /// Of the script or the healer, and of the shard.
    queues: [MemoryDevice; 2],
    pub(crate) bad: Vec<Bad>,
    /// Flushes that fail, by device, and with what.
    pub(crate) bad_flushes: [u32; 2],
    pub(crate) flush_errno: Errno,
    /// What fails is done in part: of so many sectors one lands, or is not lost with a flush.
    pub(crate) torn: Option<u64>,
    /// Bytes of a device to which writes are lost: they succeed and nothing comes of them.
    pub(crate) lost: Option<(DeviceIndex, std::ops::Range<u64>)>,
    /// Table pages of which writes wait, as long as there is anything else to do.
    pub(crate) held_page: Option<u32>,
    /// The same for writes of that byte.
    pub(crate) held: Option<(DeviceIndex, u64)>,
    /// The same for reads from that byte on.
    pub(crate) held_read: Option<(DeviceIndex, u64)>,
    /// The same for flushes of that device.
    pub(crate) held_flush: Option<DeviceIndex>,
    /// Operations of the spare that fail, counted from 0: the first of them, and how many.
    pub(crate) fails: Option<(u64, u64)>,
    /// Seconds that a read takes to fail, or to succeed in `slow`.
    pub(crate) failing_seconds: u64,
    pub(crate) slow: Option<(DeviceIndex, std::ops::Range<u64>)>,
    /// What operations fail with on `bad`.
    pub(crate) bad_errno: Errno,
    /// Operations that may still be performed before the power goes.
    pub(crate) left: Option<u64>,
    /// What the next opening's scanner does by itself.
    pub(crate) scan: ScanParams,
    /// Performed since the last start, in order.
    pub(crate) performed: Vec<Pending>,
    spare_ops: u64,
}

impl Rig {
    /// Blank disks.
    pub(crate) fn new(shape: Shape) -> Rig {
        Rig::on(shape, MemoryDisks::new(&shape.sizes()))
    }

    pub(crate) fn on(shape: Shape, disks: MemoryDisks) -> Rig {
        disks.manual(true);
        Rig {
            shape,
            queues: [disks.queue(), disks.queue()],
            disks,
            bad: Vec::new(),
            bad_flushes: [0; 2],
            flush_errno: Errno(libc::EIO),
            torn: None,
            lost: None,
            held_page: None,
            held: None,
            held_read: None,
            held_flush: None,
            fails: None,
            failing_seconds: 0,
            slow: None,
            bad_errno: Errno(libc::EIO),
            left: None,
            scan: ScanParams::default(),
            performed: Vec::new(),
            spare_ops: 0,
        }
    }

    /// The same disks in a world of their own, without faults.
    pub(crate) fn fork(&self) -> Rig {
        Rig::on(self.shape, self.disks.fork())
    }

    pub(crate) fn peek(&self, device: DeviceIndex, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.disks.peek(device, offset, &mut bytes);
        bytes
    }

    /// Cut the power: `keep` says for each unflushed sector whether it lands. No faults are left.
    pub(crate) fn crash(&mut self, keep: impl FnMut(DeviceIndex, Sector) -> Keep) {
        self.disks.crash(keep);
        self.restart();
    }

    /// Kill the process: what the devices have not performed never lands.
    pub(crate) fn kill(&mut self) {
        self.disks.kill(|_, _| Keep::Drop);
        self.restart();
    }

    fn restart(&mut self) {
        self.queues = [self.disks.queue(), self.disks.queue()];
        (self.fails, self.left, self.bad_flushes) = (None, None, [0; 2]);
        self.performed.clear();
        self.spare_ops = 0;
    }

    /// Whether something was written, or tried to be, since the last start.
    pub(crate) fn was_written(&self) -> bool {
        self.performed.iter().any(|op| !matches!(op.kind, OpKind::Read | OpKind::Identify))
    }

    pub(crate) fn submit(&mut self, queue: usize, ops: &mut Vec<Op>) {
        for op in ops.drain(..) {
            let same = |other: &Pending| {
                other.kind == OpKind::Write && (other.device, other.offset, other.len) == (op.device, op.offset, op.len)
            };
            // Nobody could say which of the two is there in the end.
            let twice = queue == 0
                && op.kind == OpKind::Write
                && (0..self.disks.pending_len()).any(|at| same(&self.disks.pending(at)));
            assert!(!twice, "two writes to one place at once: {op:?}");
            let flushes = |other: &Pending| (other.kind, other.device) == (OpKind::Flush, op.device);
            let twice =
                op.kind == OpKind::Flush && (0..self.disks.pending_len()).any(|at| flushes(&self.disks.pending(at)));
            assert!(!twice, "F2: two flushes of a device at a time");
            // SAFETY: whoever emitted the operation keeps its memory until told of its end, or is dropped after
            // a `Cut`, since which nothing is performed any more; the crash that follows forgets the reads.
            unsafe { self.queues[queue].submit(op) };
        }
    }

    /// Whether what was performed last is a read in `slow`.
    pub(crate) fn was_slow(&self) -> bool {
        let Some(((device, bytes), op)) = self.slow.as_ref().zip(self.performed.last()) else { return false };
        op.kind == OpKind::Read && op.device == *device && op.offset < bytes.end && bytes.start < op.offset + op.len
    }

    fn errno(&mut self, op: &Pending) -> Option<Errno> {
        if op.device == SPARE {
            self.spare_ops += 1;
            let failing =
                |(first, count): (u64, u64)| (first..first.saturating_add(count)).contains(&(self.spare_ops - 1));
            if self.fails.is_some_and(failing) {
                return Some(Errno(libc::EIO));
            }
        }
        let flushes = &mut self.bad_flushes[usize::from(op.device.0)];
        if op.kind == OpKind::Flush && *flushes > 0 {
            *flushes -= 1;
            return Some(self.flush_errno);
        }
        let struck = |bad: &Bad| {
            let fails = match bad.reads {
                _ if op.kind != OpKind::Read => bad.writes,
                Reads::Good | Reads::Times(0) => false,
                Reads::UntilWritten | Reads::Never | Reads::Times(_) => true,
            };
            fails && bad.device == op.device && op.offset < bad.to && bad.from < op.offset + op.len
        };
        let bad = self.bad.iter_mut().find(|bad| struck(bad))?;
        if let Reads::Times(times) = &mut bad.reads
            && op.kind == OpKind::Read
        {
            *times -= 1;
        }
        Some(self.bad_errno)
    }

    /// Whether it is a write of that page of the table.
    fn writes_page(&self, op: &Pending, page: u32) -> bool {
        let layout = self.shape.layout();
        let mut homes = Place::ALL.into_iter().flat_map(|place| Home::ALL.map(|home| (place, home)));
        op.device == SPARE
            && op.kind == OpKind::Write
            && homes.any(|(place, home)| layout.table(place, home, page) == op.offset)
    }

    /// Whether writes of the table's first page are under way, or were since the last start.
    pub(crate) fn has_page_writes(&self) -> bool {
        let under_way = (0..self.disks.pending_len()).map(|at| self.disks.pending(at));
        self.performed.iter().copied().chain(under_way).any(|op| self.writes_page(&op, 0))
    }

    /// The same for slots.
    pub(crate) fn has_slot_writes(&self) -> bool {
        let layout = self.shape.layout();
        let slots = layout.slots_start..layout.tail_start;
        let under_way = (0..self.disks.pending_len()).map(|at| self.disks.pending(at));
        let mut ops = self.performed.iter().copied().chain(under_way);
        ops.any(|op| op.device == SPARE && op.kind == OpKind::Write && slots.contains(&op.offset))
    }

    fn is_held(&self, op: &Pending) -> bool {
        let covers = |(device, byte): (DeviceIndex, u64)| {
            op.kind == OpKind::Write && op.device == device && (op.offset..op.offset + op.len).contains(&byte)
        };
        let flushes = op.kind == OpKind::Flush && self.held_flush == Some(op.device);
        let reads = op.kind == OpKind::Read && self.held_read == Some((op.device, op.offset));
        flushes
            || reads
            || self.held_page.is_some_and(|page| self.writes_page(op, page))
            || self.held.is_some_and(covers)
    }

    /// The oldest operation under way that is not held.
    pub(crate) fn next_op(&self) -> Option<usize> {
        (0..self.disks.pending_len()).find(|at| !self.is_held(&self.disks.pending(*at)))
    }

    /// Perform the oldest operation under way that need not wait; whose it was, and how it ended.
    pub(crate) fn perform(&mut self) -> Result<(usize, Completion), Cut> {
        match &mut self.left {
            Some(0) => return Err(Cut),
            Some(left) => *left -= 1,
            None => {}
        }
        let at = self.next_op().unwrap_or(0);
        let op = self.disks.pending(at);
        self.performed.push(op);
        let is_lost = |(device, bytes): &(DeviceIndex, std::ops::Range<u64>)| {
            op.kind == OpKind::Write && op.device == *device && bytes.contains(&op.offset)
        };
        let torn = self.torn;
        match self.errno(&op) {
            Some(errno) => {
                self.disks.complete_as(at, Err(errno), |sector| torn.is_some_and(|of| sector.0.is_multiple_of(of)))
            }
            None if self.lost.as_ref().is_some_and(is_lost) => self.disks.complete_as(at, Ok(()), |_| false),
            None => {
                self.disks.complete(at);
                let mended = |bad: &Bad| {
                    let covered = bad.device == op.device && op.offset <= bad.from && bad.to <= op.offset + op.len;
                    covered && op.kind == OpKind::Write && bad.reads == Reads::UntilWritten
                };
                self.bad.retain(|bad| !mended(bad));
            }
        }
        let queue = op.queue.expect("queues live as long as the rig");
        let mut events = Vec::new();
        self.queues[queue].poll(Time(0), Wait::No, &mut events);
        match events[..] {
            [device::Event::Done(completion)] => Ok((queue, completion)),
            _ => panic!("one operation was performed, and {events:?} came of it"),
        }
    }

    fn script(&mut self, mut step: impl FnMut(&[Completion], &mut Vec<Op>) -> bool) -> Result<(), Cut> {
        let (mut ops, mut completions) = (Vec::new(), Vec::new());
        loop {
            let done = step(&completions, &mut ops);
            self.submit(0, &mut ops);
            if done {
                assert_eq!(self.disks.pending_len(), 0, "a script leaves nothing under way");
                return Ok(());
            }
            assert_ne!(self.disks.pending_len(), 0, "a script that is not done has operations under way");
            completions = vec![self.perform()?.1];
        }
    }

    pub(crate) fn create(&mut self) -> Result<Result<(), OpenError>, Cut> {
        self.create_as(self.shape.create_params())
    }

    pub(crate) fn create_as(&mut self, params: CreateParams) -> Result<Result<(), OpenError>, Cut> {
        self.make(Creation::new(params))
    }

    pub(crate) fn make(&mut self, mut creation: Creation) -> Result<Result<(), OpenError>, Cut> {
        let mut result = None;
        self.script(|completions, ops| {
            creation.step(Time(0), completions, ops);
            result = creation.result();
            result.is_some()
        })?;
        Ok(result.expect("done"))
    }

    /// The label of the primary as it is found without a spare.
    pub(crate) fn find_label(&mut self) -> Result<Option<OldLabel>, Cut> {
        let [primary, _] = self.shape.facts();
        let mut search = LabelSearch::new(primary);
        let mut result = None;
        self.script(|completions, ops| {
            search.step(Time(0), completions, ops);
            result = search.result();
            result.is_some()
        })?;
        Ok(result.expect("done").expect("of this version"))
    }

    pub(crate) fn open_params(&self) -> OpenParams {
        let [primary, spare] = self.shape.facts();
        OpenParams { primary, spare, read_only: false, accept_external: false }
    }

    /// Open as if there were no spare.
    pub(crate) fn open_degraded(&mut self) -> Result<Engine, OpenError> {
        let [primary, _] = self.shape.facts();
        self.run_opening(Opening::degraded(primary)).expect("no end was set").map(Engine::new)
    }

    /// Go through with an opening, within the operations that are left.
    pub(crate) fn run_opening(&mut self, mut opening: Opening) -> Result<Result<Healer, OpenError>, Cut> {
        self.script(|completions, ops| {
            opening.step(Time(0), completions, ops);
            opening.is_done()
        })?;
        let policy = Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false };
        let params = HealerParams { shards: 1, policy, epoch: EPOCH, scan: self.scan.clone() };
        Ok(opening.finish(&params).map(|(healer, _)| healer))
    }

    /// Open, within the operations that are left.
    pub(crate) fn try_open(&mut self, params: OpenParams) -> Result<Result<Engine, OpenError>, Cut> {
        Ok(self.run_opening(Opening::new(params))?.map(Engine::new))
    }

    /// Open, and do what an open volume does by itself.
    pub(crate) fn open(&mut self) -> Result<Engine, OpenError> {
        let mut engine = self.try_open(self.open_params()).expect("no end was set")?;
        engine.start(self);
        Ok(engine)
    }
}

pub(crate) fn range_of(sector: u64, bytes: usize) -> SectorRange {
    SectorRange { start: Sector(sector), count: bytes as u64 / 512 }
}

/// `count` sectors of which each says where it belongs and which write it is of.
pub(crate) fn pattern(sector: u64, count: u64, write: u64) -> Vec<u8> {
    let sectors = (sector..sector + count).flat_map(|sector| {
        let word = (sector << 16 | write).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        (0..64_u64).flat_map(move |index| word.rotate_left(u32::try_from(index).expect("small")).to_le_bytes())
    });
    sectors.collect()
}

/// Seeded chance: xorshift64*.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}
