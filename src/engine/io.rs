//! Device operations and timers of the healer's tasks.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::errors::{Class, class_of};
use super::task::{Permits, Promise, Spawner, promise};
use crate::device::buffer::{AlignedBuf, IoSlice, Iovecs};
use crate::device::{Completion, DeviceIndex, Errno, Op, OpKind, Tag};
use crate::units::Time;
use crate::volume::layout::PAGE;

/// Operations the healer has under way on one device, at most: repairs on the primary never keep the
/// spare waiting, since each device counts for itself.
const OPS_PER_DEVICE: usize = 32;
/// Times an operation is tried that failed for want of something of ours (memory, alignment, a busy host).
const OUR_TRIES: u32 = 4;

/// Memory of an operation under way: the table owns it, so that nothing a task does can free it early.
enum Memory {
    None,
    Read(AlignedBuf),
    Write(Iovecs),
}

struct Pending {
    promise: Promise<(Result<(), Errno>, Memory)>,
    memory: Memory,
}

/// How long an operation took, as its submitter saw it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Took(pub(super) u64);

/// What the healer's tasks use to reach devices and clock.
pub(super) struct Io {
    now: Cell<Time>,
    ops: RefCell<Vec<Option<Pending>>>,
    free: RefCell<Vec<usize>>,
    out: RefCell<Vec<Op>>,
    timers: RefCell<BTreeMap<(Time, u64), Promise<()>>>,
    next_timer: Cell<u64>,
    permits: [Permits; 2],
    pub(super) spawner: Spawner,
    /// Failed operations by device: reads, writes (discards and zeroing too), flushes.
    pub(super) errors: RefCell<[[u64; 3]; 2]>,
    /// The same by what they mean.
    pub(super) errors_by_class: RefCell<BTreeMap<(DeviceIndex, &'static str, Class), u64>>,
    /// When one failed last.
    pub(super) last_error: Cell<Option<Time>>,
}

impl Io {
    pub(super) fn new(spawner: Spawner) -> Io {
        Io {
            now: Cell::new(Time(0)),
            ops: RefCell::default(),
            free: RefCell::default(),
            out: RefCell::default(),
            timers: RefCell::default(),
            next_timer: Cell::new(0),
            permits: [Permits::new(OPS_PER_DEVICE), Permits::new(OPS_PER_DEVICE)],
            spawner,
            errors: RefCell::default(),
            errors_by_class: RefCell::default(),
            last_error: Cell::new(None),
        }
    }

    pub(super) fn now(&self) -> Time {
        self.now.get()
    }

    /// Move the clock on and wake whoever waited for it.
    pub(super) fn set_now(&self, now: Time) {
        self.now.set(self.now.get().max(now));
        loop {
            let due = {
                let mut timers = self.timers.borrow_mut();
                match timers.first_key_value() {
                    Some(((when, _), _)) if *when <= now => timers.pop_first(),
                    _ => None,
                }
            };
            match due {
                Some((_, promise)) => promise.keep(()),
                None => return,
            }
        }
    }

    /// When the next timer is due.
    pub(super) fn next_timer(&self) -> Option<Time> {
        self.timers.borrow().first_key_value().map(|((when, _), _)| *when)
    }

    /// Operations to submit.
    pub(super) fn take_ops(&self, out: &mut Vec<Op>) {
        out.append(&mut self.out.borrow_mut());
    }

    /// Operations under way.
    pub(super) fn in_flight(&self) -> usize {
        self.ops.borrow().iter().flatten().count()
    }

    /// Count a failed operation of a shard with our own.
    pub(super) fn count_error(&self, device: DeviceIndex, kind: OpKind, errno: Errno) {
        let (column, name) = match kind {
            OpKind::Read => (0, "read"),
            OpKind::Flush => (2, "flush"),
            OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. } => (1, "write"),
            OpKind::Identify => return,
        };
        self.last_error.set(Some(self.now()));
        self.errors.borrow_mut()[usize::from(device.0)][column] += 1;
        *self.errors_by_class.borrow_mut().entry((device, name, class_of(errno))).or_default() += 1;
    }

    /// An operation ended.
    ///
    /// # Panics
    /// If none of that tag is under way.
    pub(super) fn completed(&self, completion: Completion) {
        let index = usize::try_from(completion.tag.0).expect("tags are indices");
        let pending = self.ops.borrow_mut()[index].take().expect("a completion for an operation under way");
        self.free.borrow_mut().push(index);
        pending.promise.keep((completion.result, pending.memory));
    }

    async fn run(
        &self,
        device: DeviceIndex,
        kind: OpKind,
        offset: u64,
        len: usize,
        mut memory: Memory,
    ) -> (Result<(), Errno>, Memory, Took) {
        self.permits[usize::from(device.0)].acquire().await;
        let started = self.now();
        let mut tries = OUR_TRIES;
        let result = loop {
            let result;
            (result, memory) = self.submit(device, kind, offset, len, memory).await;
            tries -= 1;
            match result {
                Err(errno) if tries > 0 && class_of(errno) == Class::Ours && kind != OpKind::Flush => {}
                result => break result,
            }
        };
        if let Err(errno) = result {
            self.count_error(device, kind, errno);
        }
        self.permits[usize::from(device.0)].release();
        (result, memory, Took(self.now().since_ns(started)))
    }

    async fn submit(
        &self,
        device: DeviceIndex,
        kind: OpKind,
        offset: u64,
        len: usize,
        memory: Memory,
    ) -> (Result<(), Errno>, Memory) {
        let (promise, awaited) = promise();
        let data = match &memory {
            Memory::None => IoSlice::EMPTY,
            Memory::Read(buf) => buf.as_io(),
            Memory::Write(iovecs) => iovecs.as_io(),
        };
        let pending = Pending { promise, memory };
        let index = {
            let mut ops = self.ops.borrow_mut();
            if let Some(index) = self.free.borrow_mut().pop() {
                ops[index] = Some(pending);
                index
            } else {
                ops.push(Some(pending));
                ops.len() - 1
            }
        };
        self.out.borrow_mut().push(Op { tag: Tag(index as u64), device, kind, offset, len: len as u64, data });
        awaited.await
    }

    /// Read `len` bytes at `offset`.
    pub(super) async fn read(&self, device: DeviceIndex, offset: u64, len: usize) -> (Result<AlignedBuf, Errno>, Took) {
        let (result, buf, took) = self.read_into(device, offset, AlignedBuf::zeroed(len)).await;
        (result.map(|()| buf), took)
    }

    /// Read as much as `into` takes; it comes back however the read went.
    pub(super) async fn read_into(
        &self,
        device: DeviceIndex,
        offset: u64,
        into: AlignedBuf,
    ) -> (Result<(), Errno>, AlignedBuf, Took) {
        let len = into.len();
        let (result, memory, took) = self.run(device, OpKind::Read, offset, len, Memory::Read(into)).await;
        let Memory::Read(buf) = memory else { unreachable!("the memory comes back as it went") };
        (result, buf, took)
    }

    /// Read a page of metadata whose copies need not agree, and of which a passing failure must not hide the
    /// newest: tried three times.
    pub(super) async fn read_page(&self, device: DeviceIndex, offset: u64) -> Result<AlignedBuf, Errno> {
        const TRIES: usize = 3;
        for _ in 1..TRIES {
            if let (Ok(page), _) = self.read(device, offset, PAGE).await {
                return Ok(page);
            }
        }
        self.read(device, offset, PAGE).await.0
    }

    /// Write `len` bytes of `data` from `from` on at `offset`.
    pub(super) async fn write_part(
        &self,
        device: DeviceIndex,
        offset: u64,
        data: &Arc<AlignedBuf>,
        from: usize,
        len: usize,
    ) -> (Result<(), Errno>, Took) {
        let memory = Memory::Write(Iovecs::of_buffer(data, from, len));
        let (result, _, took) = self.run(device, OpKind::Write, offset, len, memory).await;
        (result, took)
    }

    /// Write all of `bytes` at `offset`.
    pub(super) async fn write(&self, device: DeviceIndex, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let data = Arc::new(AlignedBuf::copy_of(bytes));
        self.write_part(device, offset, &data, 0, bytes.len()).await.0
    }

    /// Write zeros over a range, in pieces, without giving up its space.
    pub(super) async fn write_zeroes(&self, device: DeviceIndex, offset: u64, len: u64) -> Result<(), Errno> {
        const PIECE: u64 = 64 << 20;
        let end = offset + len;
        for start in (offset..end).step_by(usize::try_from(PIECE).expect("64 MiB")) {
            let piece = usize::try_from(PIECE.min(end - start)).expect("64 MiB");
            let kind = OpKind::WriteZeroes { unmap: false };
            self.run(device, kind, start, piece, Memory::None).await.0?;
        }
        Ok(())
    }

    /// Make completed writes durable. Only the flush coordinator and opening code call this.
    pub(super) async fn flush(&self, device: DeviceIndex) -> Result<(), Errno> {
        self.run(device, OpKind::Flush, 0, 0, Memory::None).await.0
    }

    /// Ask whether the device is still the one that was opened.
    pub(super) async fn identify(&self, device: DeviceIndex) -> Result<(), Errno> {
        self.run(device, OpKind::Identify, 0, 0, Memory::None).await.0
    }

    /// Wait until `when`.
    pub(super) async fn sleep_until(&self, when: Time) {
        if when <= self.now() {
            return;
        }
        let (promise, awaited) = promise();
        let number = self.next_timer.get();
        self.next_timer.set(number + 1);
        self.timers.borrow_mut().insert((when, number), promise);
        awaited.await;
    }
}
