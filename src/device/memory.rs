//! Disks in memory with a volatile and a durable half: the crash model of the simulator.
//!
//! A write lands in the volatile half when it is executed and in the durable half when a flush that
//! was *submitted* after its execution is executed. A crash keeps any choice of the unflushed
//! writes, sector by sector. Operations stay pending until the driver of the simulation executes
//! them, one by one in any order and with any result; without such a driver ([`MemoryDisks::manual`])
//! a poll executes what its queue has pending, so that the disks serve as plain devices.
//!
//! Everything that happens depends on nothing but the calls made.

mod half;

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::buffer::IoSlice;
use super::watch::Watches;
use super::{Completion, Device, DeviceIndex, Errno, Event, Op, OpKind, Reactor, Tag, Wait};
use crate::units::{SECTOR_SIZE, Sector, Time};
use half::Half;

const SECTOR: usize = 512;

/// What a failed read leaves in its buffer: says nothing, and looks like nothing.
const GARBAGE: u8 = 0xdb;

/// The fate of one sector of an unflushed write in a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// It reaches the medium, unless a later version of the sector does.
    Keep,
    /// It is lost.
    Drop,
}

/// An operation that has not been executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pending {
    /// The queue it was submitted to, numbered from 0 in the order of [`MemoryDisks::queue`]; `None`
    /// if that queue was dropped and the operation may still land.
    pub queue: Option<usize>,
    /// The submitter's name for it.
    pub tag: Tag,
    /// Where to.
    pub device: DeviceIndex,
    /// What to do.
    pub kind: OpKind,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

/// A handle to the disks of one volume; clones refer to the same disks.
#[derive(Clone, Debug)]
pub struct MemoryDisks(Arc<Mutex<World>>);

#[derive(Debug)]
struct World {
    disks: Vec<Disk>,
    logical_block: u64,
    manual: bool,
    /// In the order of submission.
    pending: Vec<Submitted>,
    /// What ended and was not yet reported, by queue.
    ended: Vec<Vec<Event>>,
    /// Grows with each crash: queues of an earlier epoch are dead.
    epoch: u32,
}

#[derive(Clone, Debug)]
struct Disk {
    /// What survives for sure.
    durable: Half,
    /// What reads see.
    current: Half,
    /// Executed and unflushed writes, in order.
    log: VecDeque<Logged>,
    /// Number of the next entry of `log`.
    log_end: u64,
    /// Where the halves may differ beside the log: a failed flush lost something there.
    differing: Vec<Range<usize>>,
    size: u64,
    gone: bool,
}

#[derive(Clone, Debug)]
struct Logged {
    number: u64,
    offset: usize,
    data: Vec<u8>,
    /// Sectors that never become durable: they did not land, or a failed flush lost them. Empty: none.
    excluded: Vec<bool>,
}

#[derive(Debug)]
struct Submitted {
    queue: Option<usize>,
    op: Op,
    /// The bytes to write, taken at submission: after a crash the submitter's memory is gone.
    data: Vec<u8>,
    /// For a flush: writes executed before this point become durable.
    log_end: u64,
}

impl MemoryDisks {
    /// Disks of these sizes, full of zeros, with logical blocks of 512 bytes.
    pub fn new(sizes: &[u64]) -> MemoryDisks {
        MemoryDisks::with_logical_block(sizes, SECTOR_SIZE)
    }

    /// The same with another logical block.
    ///
    /// # Panics
    /// If a size is not a multiple of it, or it is no multiple of a sector.
    pub fn with_logical_block(sizes: &[u64], logical_block: u64) -> MemoryDisks {
        assert!(logical_block > 0 && logical_block.is_multiple_of(SECTOR_SIZE));
        let disks = sizes.iter().map(|size| {
            assert!(size.is_multiple_of(logical_block), "a disk has whole blocks");
            let zeros = Half::zeros(to_usize(*size));
            Disk {
                durable: zeros.clone(),
                current: zeros,
                log: VecDeque::new(),
                log_end: 0,
                differing: Vec::new(),
                size: *size,
                gone: false,
            }
        });
        MemoryDisks(Arc::new(Mutex::new(World {
            disks: disks.collect(),
            logical_block,
            manual: false,
            pending: Vec::new(),
            ended: Vec::new(),
            epoch: 0,
        })))
    }

    /// A new queue of operations to these disks.
    pub fn queue(&self) -> MemoryDevice {
        let mut world = self.world();
        world.ended.push(Vec::new());
        MemoryDevice {
            disks: self.clone(),
            queue: world.ended.len() - 1,
            epoch: world.epoch,
            in_flight: 0,
            watches: None,
        }
    }

    /// Whether operations wait for [`MemoryDisks::complete`] and its kin instead of being executed by
    /// the next poll of their queue.
    pub fn manual(&self, manual: bool) {
        self.world().manual = manual;
    }

    /// Number of operations not yet executed.
    pub fn pending_len(&self) -> usize {
        self.world().pending.len()
    }

    /// The operation at `index`, in the order of submission.
    ///
    /// # Panics
    /// If there is none.
    pub fn pending(&self, index: usize) -> Pending {
        let world = self.world();
        let Submitted { queue, op, .. } = &world.pending[index];
        let Op { tag, device, kind, offset, len, .. } = *op;
        Pending { queue: *queue, tag, device, kind, offset, len }
    }

    /// Execute the operation at `index` as a good disk does.
    pub fn complete(&self, index: usize) {
        self.world().complete(index);
    }

    /// Execute everything in the order of submission.
    pub fn complete_all(&self) {
        let mut world = self.world();
        while !world.pending.is_empty() {
            world.complete(0);
        }
    }

    /// Execute the operation at `index` in part, and report `result` whatever happened: exactly the
    /// sectors that `lands` picks are transferred. For a flush that is to succeed, `lands` of sector 0
    /// tells whether it does anything; when one fails, unflushed sectors not picked are lost for good,
    /// though reads still see them. `lands` must not use these disks.
    pub fn complete_as(&self, index: usize, result: Result<(), Errno>, lands: impl FnMut(Sector) -> bool) {
        self.world().complete_as(index, result, lands);
    }

    /// Cut the power. Every sector of every unflushed write, executed or pending, is offered in the
    /// order of the writes, disk by disk; of several versions of a sector the last one kept wins. All
    /// queues are dead. `keep` must not use these disks.
    pub fn crash(&self, mut keep: impl FnMut(DeviceIndex, Sector) -> Keep) {
        let mut world = self.world();
        let pending = world.drop_everything();
        for (index, disk) in (0_u8..).zip(&mut world.disks) {
            let index = DeviceIndex(index);
            for write in pending.iter().filter(|write| write.op.device == index) {
                disk.log_pending(write);
            }
            disk.settle(|sector| keep(index, sector) == Keep::Keep);
        }
    }

    /// Kill the process: each sector of each pending write lands in the volatile half or never.
    /// Nothing executed is lost. All queues are dead. `keep` must not use these disks.
    pub fn kill(&self, mut keep: impl FnMut(DeviceIndex, Sector) -> Keep) {
        let mut world = self.world();
        for write in world.drop_everything() {
            let device = write.op.device;
            if let Some(disk) = world.disk(device) {
                disk.land(&write, |sector| keep(device, sector) == Keep::Keep);
            }
        }
    }

    /// A copy of the disks as they are, with the writes still pending but without queues.
    pub fn fork(&self) -> MemoryDisks {
        let world = self.world();
        let orphans = world.pending.iter().filter(|submitted| submitted.may_land());
        MemoryDisks(Arc::new(Mutex::new(World {
            disks: world.disks.clone(),
            logical_block: world.logical_block,
            manual: world.manual,
            pending: orphans.map(Submitted::orphan).collect(),
            ended: Vec::new(),
            epoch: 0,
        })))
    }

    /// What reads of `to.len()` bytes from `offset` see.
    ///
    /// # Panics
    /// If the range is not on the disk.
    pub fn peek(&self, device: DeviceIndex, offset: u64, to: &mut [u8]) {
        let world = self.world();
        let disk = &world.disks[usize::from(device.0)];
        disk.current.read(to_usize(offset), to);
    }

    /// Put `bytes` at `offset` of both halves, beside all rules: bit rot, foreign writes, set-up.
    ///
    /// # Panics
    /// If the range is not on the disk.
    pub fn poke(&self, device: DeviceIndex, offset: u64, bytes: &[u8]) {
        let mut world = self.world();
        let disk = &mut world.disks[usize::from(device.0)];
        disk.current.write(to_usize(offset), bytes);
        disk.durable.write(to_usize(offset), bytes);
    }

    /// Take the disk away or bring it back: while gone, every operation on it fails with ENODEV.
    pub fn set_gone(&self, device: DeviceIndex, gone: bool) {
        self.world().disks[usize::from(device.0)].gone = gone;
    }

    /// Make the disk claim another size, up to its real one.
    ///
    /// # Panics
    /// If it is larger than the real one.
    pub fn set_size(&self, device: DeviceIndex, size: u64) {
        let mut world = self.world();
        let disk = &mut world.disks[usize::from(device.0)];
        assert!(to_usize(size) <= disk.current.len(), "a disk grows by `extend`");
        disk.size = size;
    }

    /// Make the disk larger, for good; what is new are zeros.
    ///
    /// # Panics
    /// If the size is no multiple of a logical block, or smaller than before.
    pub fn extend(&self, device: DeviceIndex, size: u64) {
        let mut world = self.world();
        assert!(size.is_multiple_of(world.logical_block), "a disk has whole blocks");
        let disk = &mut world.disks[usize::from(device.0)];
        disk.current.extend(to_usize(size));
        disk.durable.extend(to_usize(size));
        disk.size = size;
    }

    fn world(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl World {
    fn disk(&mut self, device: DeviceIndex) -> Option<&mut Disk> {
        self.disks.get_mut(usize::from(device.0))
    }

    /// What the operation comes to on a good disk, before anything is done.
    fn check(&self, op: &Op) -> Result<(), Errno> {
        let disk = self.disks.get(usize::from(op.device.0)).filter(|disk| !disk.gone).ok_or(Errno(libc::ENODEV))?;
        match op.kind {
            OpKind::Flush => return Ok(()),
            OpKind::Identify if to_usize(disk.size) < disk.current.len() => return Err(Errno(libc::ENXIO)),
            OpKind::Identify => return Ok(()),
            OpKind::Read | OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. } => {}
        }
        if !op.offset.is_multiple_of(self.logical_block) || !op.len.is_multiple_of(self.logical_block) {
            return Err(Errno(libc::EINVAL));
        }
        match op.offset.checked_add(op.len) {
            Some(end) if end <= disk.size => Ok(()),
            _ => Err(Errno(if op.kind == OpKind::Read { libc::EIO } else { libc::ENOSPC })),
        }
    }

    fn complete(&mut self, index: usize) {
        let result = self.check(&self.pending[index].op);
        self.complete_as(index, result, |_| result.is_ok());
    }

    fn complete_as(&mut self, index: usize, result: Result<(), Errno>, mut lands: impl FnMut(Sector) -> bool) {
        let submitted = self.pending.remove(index);
        let executable = self.check(&submitted.op).is_ok();
        if executable && let Some(disk) = self.disk(submitted.op.device) {
            match submitted.op.kind {
                OpKind::Read => disk.read(submitted.op, lands),
                OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. } => disk.land(&submitted, lands),
                OpKind::Flush if result.is_err() => disk.lose(submitted.log_end, lands),
                OpKind::Flush if lands(Sector(0)) => disk.flush(submitted.log_end),
                OpKind::Flush | OpKind::Identify => {}
            }
        }
        if let Some(queue) = submitted.queue {
            self.ended[queue].push(Event::Done(Completion { tag: submitted.op.tag, result }));
        }
    }

    /// The end of the process: gives back the operations that may still land.
    fn drop_everything(&mut self) -> Vec<Submitted> {
        self.epoch += 1;
        self.ended.clear();
        let mut pending = std::mem::take(&mut self.pending);
        pending.retain(|submitted| submitted.may_land() && self.check(&submitted.op).is_ok());
        pending
    }
}

impl Submitted {
    /// Whether it changes sectors.
    fn may_land(&self) -> bool {
        matches!(self.op.kind, OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. })
    }

    fn orphan(&self) -> Submitted {
        let op = Op { data: IoSlice::EMPTY, ..self.op };
        Submitted { queue: None, op, data: self.data.clone(), log_end: self.log_end }
    }
}

impl Disk {
    fn read(&self, op: Op, mut lands: impl FnMut(Sector) -> bool) {
        let mut bytes = vec![0; to_usize(op.len)];
        self.current.read(to_usize(op.offset), &mut bytes);
        for (sector, piece) in (op.offset / SECTOR_SIZE..).zip(bytes.chunks_mut(SECTOR)) {
            if !lands(Sector(sector)) {
                piece.fill(GARBAGE);
            }
        }
        // SAFETY: a read is executed only while its queue lives and before its completion was reported,
        // and until then the submitter keeps the memory (contract of `Device::submit`).
        unsafe { scatter(op.data, &bytes) };
    }

    /// The write's log entry, with nothing excluded.
    fn entry(&mut self, write: &Submitted) -> Logged {
        let (offset, len) = (to_usize(write.op.offset), to_usize(write.op.len));
        let data = match write.op.kind {
            // Of a discarded range anything old or zero may be read: here, every other sector is zero.
            OpKind::Discard => {
                let mut data = vec![0; len];
                self.current.read(offset, &mut data);
                for (sector, piece) in (offset / SECTOR..).zip(data.chunks_mut(SECTOR)) {
                    if sector % 2 == 0 {
                        piece.fill(0);
                    }
                }
                data
            }
            OpKind::WriteZeroes { .. } => vec![0; len],
            _ => write.data.clone(),
        };
        self.log_end += 1;
        Logged { number: self.log_end - 1, offset, data, excluded: Vec::new() }
    }

    /// Execute a write in the sectors that land.
    fn land(&mut self, write: &Submitted, mut lands: impl FnMut(Sector) -> bool) {
        let mut entry = self.entry(write);
        for (index, piece) in entry.data.chunks(SECTOR).enumerate() {
            let offset = entry.offset + index * SECTOR;
            if lands(sector_at(offset)) {
                self.current.write(offset, piece);
            } else {
                exclude(&mut entry.excluded, entry.data.len(), index);
            }
        }
        self.log.push_back(entry);
    }

    /// Note a write that is about to be settled without having been executed.
    fn log_pending(&mut self, write: &Submitted) {
        let entry = self.entry(write);
        self.log.push_back(entry);
    }

    /// Make the entries before number `end` durable.
    fn flush(&mut self, end: u64) {
        let flushed = self.log.partition_point(|entry| entry.number < end);
        for entry in self.log.drain(..flushed) {
            entry.apply(&mut self.durable, |_| true);
            if !entry.excluded.is_empty() {
                self.differing.push(entry.range());
            }
        }
    }

    /// Entries before number `end` never become durable in the sectors not picked.
    fn lose(&mut self, end: u64, mut lands: impl FnMut(Sector) -> bool) {
        for entry in self.log.iter_mut().filter(|entry| entry.number < end) {
            for index in 0..entry.data.len() / SECTOR {
                if !lands(sector_at(entry.offset + index * SECTOR)) {
                    exclude(&mut entry.excluded, entry.data.len(), index);
                }
            }
        }
    }

    /// Decide on all unflushed sectors, after which both halves are the same.
    fn settle(&mut self, mut keep: impl FnMut(Sector) -> bool) {
        for entry in &self.log {
            entry.apply(&mut self.durable, &mut keep);
        }
        let ranges = self.log.drain(..).map(|entry| entry.range()).chain(self.differing.drain(..));
        for range in ranges {
            self.current.copy_from(&self.durable, range);
        }
    }
}

impl Logged {
    fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.data.len()
    }

    fn apply(&self, to: &mut Half, mut picked: impl FnMut(Sector) -> bool) {
        for (index, piece) in self.data.chunks(SECTOR).enumerate() {
            let offset = self.offset + index * SECTOR;
            if !self.excluded.get(index).is_some_and(|excluded| *excluded) && picked(sector_at(offset)) {
                to.write(offset, piece);
            }
        }
    }
}

fn exclude(excluded: &mut Vec<bool>, bytes: usize, index: usize) {
    excluded.resize(bytes / SECTOR, false);
    excluded[index] = true;
}

fn sector_at(offset: usize) -> Sector {
    Sector(u64::try_from(offset / SECTOR).expect("usize is at most 64 bits wide"))
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("disks in memory fit in memory")
}

/// # Safety
/// The array and the memory it names are valid, for `bytes.len()` bytes.
unsafe fn scatter(memory: IoSlice, mut bytes: &[u8]) {
    // SAFETY: the caller vouches for the array.
    for iovec in unsafe { memory.iovecs() } {
        let (piece, rest) = bytes.split_at(bytes.len().min(iovec.iov_len));
        // SAFETY: the caller vouches for the memory, which is not ours and so does not overlap.
        unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), iovec.iov_base.cast(), piece.len()) };
        bytes = rest;
    }
    assert!(bytes.is_empty(), "an operation's memory is shorter than its range");
}

/// # Safety
/// The array and the memory it names are valid.
unsafe fn gather(memory: IoSlice, len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::with_capacity(len);
    // SAFETY: the caller vouches for the array.
    for iovec in unsafe { memory.iovecs() } {
        bytes.reserve(iovec.iov_len);
        // SAFETY: the caller vouches for the memory, and the vector has room for as much beyond its
        // end; what it grows by was just written.
        unsafe {
            let end = bytes.as_mut_ptr().add(bytes.len());
            std::ptr::copy_nonoverlapping(iovec.iov_base.cast(), end, iovec.iov_len);
            bytes.set_len(bytes.len() + iovec.iov_len);
        }
    }
    assert_eq!(bytes.len(), len, "an operation's memory has another length than its range");
    bytes
}

/// One queue to the disks. Dropping it forgets its pending reads; its pending writes may still land.
pub struct MemoryDevice {
    disks: MemoryDisks,
    queue: usize,
    epoch: u32,
    in_flight: usize,
    watches: Option<Watches>,
}

impl Device for MemoryDevice {
    unsafe fn submit(&mut self, op: Op) {
        let mut world = self.disks.world();
        assert_eq!(world.epoch, self.epoch, "this queue died in a crash");
        let data = match op.kind {
            // SAFETY: the submitter keeps the memory until the completion, which is yet to come.
            OpKind::Write => unsafe { gather(op.data, to_usize(op.len)) },
            _ => Vec::new(),
        };
        let log_end = world.disk(op.device).map_or(0, |disk| disk.log_end);
        world.pending.push(Submitted { queue: Some(self.queue), op, data, log_end });
        self.in_flight += 1;
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Never waits for an operation: only the caller's thread could end one. Waits for watched
    /// descriptors, if there are any.
    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let start = events.len();
        let mut world = self.disks.world();
        if world.epoch != self.epoch {
            self.in_flight = 0;
            return;
        }
        if !world.manual {
            while let Some(index) = world.pending.iter().position(|op| op.queue == Some(self.queue)) {
                world.complete(index);
            }
        }
        events.append(&mut world.ended[self.queue]);
        drop(world);
        self.in_flight -= events.len() - start;
        if let Some(watches) = &mut self.watches {
            watches.wait(now, if events.len() > start { Wait::No } else { wait }, events);
        }
    }
}

impl Reactor for MemoryDevice {
    fn watch(&mut self, fd: RawFd, token: u64) {
        let watches =
            self.watches.get_or_insert_with(|| Watches::new().expect("a simulation has descriptors to spare"));
        watches.watch(fd, token);
    }

    fn unwatch(&mut self, token: u64) {
        if let Some(watches) = &mut self.watches {
            watches.unwatch(token);
        }
    }
}

impl Drop for MemoryDevice {
    fn drop(&mut self) {
        let mut world = self.disks.world();
        if world.epoch != self.epoch {
            return;
        }
        world.ended[self.queue].clear();
        let queue = Some(self.queue);
        world.pending.retain(|submitted| submitted.queue != queue || submitted.may_land());
        for submitted in world.pending.iter_mut().filter(|submitted| submitted.queue == queue) {
            submitted.queue = None;
        }
    }
}

#[cfg(test)]
mod tests;
