//! One operation on its way: which system call comes next, and what its result means.
//!
//! [`Operation`] makes no system call for a transfer itself. A driver performs the [`Step`] it asks
//! for, on a ring or on a thread, and feeds the result back; short transfers, limits of a call,
//! bouncing and the ladder of ways to zero a range are decided here, once for all drivers.

use std::os::fd::AsFd;
use std::sync::OnceLock;

use rustix::fs::FallocateFlags;

use super::buffer::{AlignedBuf, IoSlice};
use super::open::{Ability, Kind, OpenDevice};
use super::sys::{self, IOVECS_MAX, TRANSFER_MAX};
use super::{Errno, Op, OpKind};

/// Size of one bounce buffer; a longer operation is bounced in pieces of this.
pub(super) const BOUNCE_UNIT: usize = 256 << 10;

/// Bounce buffers of one reactor: 4 MiB, made when first needed. An operation holds at most one, so
/// that waiting for a buffer always ends.
const BOUNCE_BUFFERS: usize = 16;

/// Zeros are written in pieces of this size, so that nothing waits long behind them.
const ZERO_PIECE: usize = 1 << 20;

/// How often one place is tried again after EAGAIN or after a transfer that ended inside of a
/// logical block, before the operation fails. EINTR is not counted: each one has its signal.
const STALLS_MAX: u32 = 16;

const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// What the driver is to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Move bytes between memory and the device at `offset`.
    Transfer { write: bool, memory: Memory, offset: u64 },
    /// fdatasync.
    Sync,
    /// fallocate with `mode` over the operation's range.
    Allocate(FallocateFlags),
    /// Discard the operation's range of a block device.
    Discard,
    /// Compare the device with the one opened.
    Identify,
}

/// Where a transfer's bytes are.
#[derive(Debug)]
pub(super) enum Memory {
    /// One piece.
    One(libc::iovec),
    /// Several, at most [`IOVECS_MAX`].
    Many(*const libc::iovec, usize),
}

/// Where an operation stands after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There is a next step.
    Next,
    /// A bounce buffer is needed for it: [`Operation::lend`].
    NeedsBuffer,
    /// It ended.
    Done(Result<(), Errno>),
}

/// How the bytes travel.
#[derive(Debug)]
enum Way {
    /// From and to the memory of the operation.
    Direct { index: usize, skip: usize },
    /// Through a buffer of ours, once one was lent. `filled` says that a write's piece was copied.
    Bounced { buffer: Option<AlignedBuf>, filled: bool },
    /// Zeros from a shared buffer of ours.
    Zeros,
    /// No bytes travel: the file system or device is to punch or zero the range.
    Allocate(FallocateFlags),
    /// No bytes travel.
    Command,
}

/// An operation that has begun.
#[derive(Debug)]
pub(super) struct Operation {
    op: Op,
    way: Way,
    /// Bytes that are done, from the start of the operation.
    done: u64,
    stalls: u32,
}

// SAFETY: the raw pointers within (the iovec array of the caller and the memory it names) may be used
// from any thread: `Device::submit` has the caller vouch for them until the completion.
unsafe impl Send for Operation {}

fn zeros() -> &'static AlignedBuf {
    static ZEROS: OnceLock<AlignedBuf> = OnceLock::new();
    ZEROS.get_or_init(|| AlignedBuf::zeroed(ZERO_PIECE))
}

impl Operation {
    /// Check `op` and begin it.
    ///
    /// # Safety
    /// As for [`super::Device::submit`], until [`Progress::Done`].
    pub(super) unsafe fn begin(op: Op, device: &OpenDevice) -> (Operation, Progress) {
        let mut operation = Operation { op, way: Way::Command, done: 0, stalls: 0 };
        let progress = match op.kind {
            OpKind::Flush | OpKind::Identify => Progress::Next,
            OpKind::Read | OpKind::Write | OpKind::Discard | OpKind::WriteZeroes { .. } => {
                match Self::check_range(&op, device) {
                    Err(errno) => Progress::Done(Err(errno)),
                    Ok(()) if op.len == 0 => Progress::Done(Ok(())),
                    Ok(()) => operation.begin_range(device),
                }
            }
        };
        (operation, progress)
    }

    fn check_range(op: &Op, device: &OpenDevice) -> Result<(), Errno> {
        let unit = u64::from(device.geometry.logical_block);
        if !op.offset.is_multiple_of(unit) || !op.len.is_multiple_of(unit) {
            return Err(Errno(libc::EINVAL));
        }
        match op.offset.checked_add(op.len) {
            Some(end) if end <= device.size() => Ok(()),
            // A write beyond the end would make a file grow, so it must not reach the kernel.
            _ => Err(Errno(if op.kind == OpKind::Read { libc::EIO } else { libc::ENOSPC })),
        }
    }

    fn begin_range(&mut self, device: &OpenDevice) -> Progress {
        match self.op.kind {
            OpKind::Read | OpKind::Write => {
                if self.is_aligned(device) {
                    self.way = Way::Direct { index: 0, skip: 0 };
                    Progress::Next
                } else {
                    self.bounce()
                }
            }
            OpKind::Discard if !device.has(discard_ability(device)) || !device.geometry.discard => {
                Progress::Done(Err(Errno(libc::EOPNOTSUPP)))
            }
            OpKind::Discard if device.geometry.kind == Kind::File => {
                self.way = Way::Allocate(PUNCH_HOLE);
                Progress::Next
            }
            OpKind::WriteZeroes { unmap } => {
                self.way = if unmap && device.has(Ability::PunchHole) {
                    Way::Allocate(PUNCH_HOLE)
                } else if device.has(Ability::ZeroRange) {
                    Way::Allocate(ZERO_RANGE)
                } else {
                    Way::Zeros
                };
                Progress::Next
            }
            OpKind::Discard | OpKind::Flush | OpKind::Identify => Progress::Next,
        }
    }

    /// Whether the device can take the memory as it is.
    fn is_aligned(&self, device: &OpenDevice) -> bool {
        let geometry = &device.geometry;
        let len_mask = if geometry.direct { to_usize(u64::from(geometry.logical_block)) - 1 } else { 0 };
        let (mut bits, mut total) = (0, 0);
        for iovec in self.iovecs() {
            bits |= (iovec.iov_base.addr() & (geometry.mem_align - 1)) | (iovec.iov_len & len_mask);
            total += iovec.iov_len;
        }
        assert_eq!(total, to_usize(self.op.len), "an operation's memory has another length than its range");
        bits == 0
    }

    fn iovecs(&self) -> &[libc::iovec] {
        // SAFETY: whoever began the operation keeps the array alive until its end.
        unsafe { IoSlice::iovecs(self.op.data) }
    }

    fn bounce(&mut self) -> Progress {
        self.way = Way::Bounced { buffer: None, filled: false };
        Progress::NeedsBuffer
    }

    /// As submitted.
    pub(super) fn op(&self) -> &Op {
        &self.op
    }

    /// Lend a bounce buffer, after [`Progress::NeedsBuffer`].
    pub(super) fn lend(&mut self, lent: AlignedBuf) {
        match &mut self.way {
            Way::Bounced { buffer: buffer @ None, .. } => *buffer = Some(lent),
            _ => unreachable!("no buffer was asked for"),
        }
    }

    /// Take the bounce buffer back at the end.
    pub(super) fn take_buffer(&mut self) -> Option<AlignedBuf> {
        match &mut self.way {
            Way::Bounced { buffer, .. } => buffer.take(),
            _ => None,
        }
    }

    /// The next step. Its memory lives as long as the operation.
    pub(super) fn step(&mut self) -> Step {
        let write = self.op.kind != OpKind::Read;
        let (offset, left) = (self.op.offset + self.done, to_usize(self.op.len - self.done));
        match self.way {
            Way::Command => match self.op.kind {
                OpKind::Flush => Step::Sync,
                OpKind::Identify => Step::Identify,
                OpKind::Discard => Step::Discard,
                OpKind::Read | OpKind::Write | OpKind::WriteZeroes { .. } => {
                    unreachable!("these have ways of their own")
                }
            },
            Way::Allocate(mode) => Step::Allocate(mode),
            Way::Zeros => {
                let iov_len = left.min(ZERO_PIECE);
                let iov_base = zeros().as_ptr().cast_mut().cast();
                Step::Transfer { write, memory: Memory::One(libc::iovec { iov_base, iov_len }), offset }
            }
            Way::Bounced { .. } => {
                let memory = Memory::One(self.bounce_piece(write, left.min(BOUNCE_UNIT)));
                Step::Transfer { write, memory, offset }
            }
            Way::Direct { index, skip } => {
                let memory = self.direct_piece(index, skip);
                Step::Transfer { write, memory, offset }
            }
        }
    }

    fn direct_piece(&self, index: usize, skip: usize) -> Memory {
        let rest = &self.iovecs()[index..];
        // Continuing inside of a piece, that piece's rest goes alone: the array is not ours to change,
        // and the pieces after it follow as they are.
        if rest.len() == 1 || skip > 0 {
            let iov_base = rest[0].iov_base.wrapping_byte_add(skip);
            return Memory::One(libc::iovec { iov_base, iov_len: (rest[0].iov_len - skip).min(TRANSFER_MAX) });
        }
        Memory::Many(rest.as_ptr(), rest.len().min(IOVECS_MAX))
    }

    fn bounce_piece(&mut self, write: bool, len: usize) -> libc::iovec {
        let (data, done) = (self.op.data, to_usize(self.done));
        let Way::Bounced { buffer: Some(buffer), filled } = &mut self.way else {
            unreachable!("a step was asked for before a buffer was lent");
        };
        if write && !*filled {
            // SAFETY: whoever began the operation keeps the array and its memory alive until its end.
            unsafe { copy(data, done, &mut buffer[..len], Direction::FromMemory) };
            *filled = true;
        }
        libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: len }
    }

    /// What a step's result means: bytes or 0, or a negative error number.
    pub(super) fn advance(&mut self, device: &OpenDevice, result: i32) -> Progress {
        match result {
            _ if result == -libc::EINTR => Progress::Next,
            _ if result == -libc::EAGAIN => self.stalled(libc::EAGAIN),
            0.. if matches!(self.way, Way::Command | Way::Allocate(_)) => Progress::Done(Ok(())),
            0.. => self.moved(device, to_usize(u64::from(result.unsigned_abs()))),
            _ => self.failed(device, -result),
        }
    }

    fn stalled(&mut self, errno: i32) -> Progress {
        self.stalls += 1;
        if self.stalls > STALLS_MAX { Progress::Done(Err(Errno(errno))) } else { Progress::Next }
    }

    /// A transfer moved `bytes`, perhaps fewer than it was to.
    fn moved(&mut self, device: &OpenDevice, bytes: usize) -> Progress {
        if bytes == 0 {
            // The end of a file or device that has shrunk: never a success, never zeros.
            return Progress::Done(Err(Errno(libc::EIO)));
        }
        let done_before = self.done;
        let geometry = &device.geometry;
        // A direct transfer can only go on at a logical block.
        let block = if geometry.direct { to_usize(u64::from(geometry.logical_block)) } else { 1 };
        let whole = match self.way {
            // And within a piece of memory, only from an address as aligned as its start.
            Way::Direct { index, skip } => self.move_on(index, skip, bytes, block.max(geometry.mem_align)),
            _ => bytes / block * block,
        };
        self.done += to_u64(whole);
        if self.op.kind == OpKind::Read {
            self.bounce_out(done_before);
        }
        if self.done == done_before {
            return self.stalled(libc::EIO);
        }
        self.stalls = 0;
        if let Way::Bounced { filled, .. } = &mut self.way {
            *filled = false;
        }
        if self.done == self.op.len { Progress::Done(Ok(())) } else { Progress::Next }
    }

    /// Move the place in the scatter list on by `bytes`, rounded down to `unit` within a piece;
    /// returns by how many it was.
    fn move_on(&mut self, mut index: usize, mut skip: usize, bytes: usize, unit: usize) -> usize {
        let iovecs = self.iovecs();
        let (mut left, mut moved) = (bytes, 0);
        while left > 0 {
            let here = iovecs[index].iov_len - skip;
            if left < here {
                let whole = ((skip + left) / unit * unit).max(skip);
                moved += whole - skip;
                skip = whole;
                break;
            }
            left -= here;
            moved += here;
            index += 1;
            skip = 0;
        }
        self.way = Way::Direct { index, skip };
        moved
    }

    /// Hand the bytes of a bounced read over.
    fn bounce_out(&mut self, from: u64) {
        let (data, start, end) = (self.op.data, to_usize(from), to_usize(self.done));
        if let Way::Bounced { buffer: Some(buffer), .. } = &mut self.way {
            // SAFETY: whoever began the operation keeps the array and its memory alive until its end.
            unsafe { copy(data, start, &mut buffer[..end - start], Direction::ToMemory) };
        }
    }

    fn failed(&mut self, device: &OpenDevice, errno: i32) -> Progress {
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY);
        match (&self.way, self.op.kind) {
            // Drivers know more of the memory they cannot take than they tell: bouncing settles it.
            (Way::Direct { .. }, _) if errno == libc::EINVAL && device.geometry.direct => self.bounce(),
            (_, OpKind::Discard) if unsupported => {
                device.remember_lack(discard_ability(device));
                Progress::Done(Err(Errno(libc::EOPNOTSUPP)))
            }
            (Way::Allocate(mode), OpKind::WriteZeroes { .. }) if unsupported || errno == libc::EINVAL => {
                device.remember_lack(if *mode == PUNCH_HOLE { Ability::PunchHole } else { Ability::ZeroRange });
                self.begin_range(device)
            }
            // The target took the command and could not do it (E1): no verdict on the medium. Writes decide.
            (Way::Allocate(_), OpKind::WriteZeroes { .. }) if errno == libc::EREMOTEIO => {
                self.way = Way::Zeros;
                Progress::Next
            }
            _ => Progress::Done(Err(Errno(errno))),
        }
    }

    /// Perform steps in this thread until the end or until a buffer is needed.
    pub(super) fn run(&mut self, device: &OpenDevice) -> Progress {
        loop {
            let step = self.step();
            let result = self.perform(device, &step);
            match self.advance(device, result) {
                Progress::Next => {}
                progress => return progress,
            }
        }
    }

    fn perform(&self, device: &OpenDevice, step: &Step) -> i32 {
        let fd = device.file.as_fd();
        let (offset, len) = (self.op.offset, self.op.len);
        match step {
            Step::Transfer { write, memory, offset } => {
                let (iovecs, count) = match memory {
                    Memory::One(iovec) => (std::ptr::from_ref(iovec), 1),
                    Memory::Many(iovecs, count) => (*iovecs, *count),
                };
                let transfer = if *write { sys::pwritev } else { sys::preadv };
                // SAFETY: the array is `step`'s or the caller's, the memory is the caller's or our
                // buffer's; all of them outlive this synchronous call.
                unsafe { transfer(&device.file, iovecs, count, *offset) }
            }
            Step::Sync => as_result(rustix::fs::fdatasync(fd)),
            Step::Allocate(mode) => as_result(rustix::fs::fallocate(fd, *mode, offset, len)),
            Step::Discard => as_result(sys::block_device_discard(fd, offset, len)),
            Step::Identify => device.identify().map_or_else(|errno| -errno.0, |()| 0),
        }
    }
}

fn as_result(result: rustix::io::Result<()>) -> i32 {
    result.map_or_else(|errno| -errno.raw_os_error(), |()| 0)
}

fn discard_ability(device: &OpenDevice) -> Ability {
    match device.geometry.kind {
        Kind::File => Ability::PunchHole,
        Kind::BlockDevice => Ability::Discard,
    }
}

fn to_u64(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("usize is at most 64 bits wide")
}

fn to_usize(bytes: u64) -> usize {
    usize::try_from(bytes).expect("memory sizes fit in usize")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    FromMemory,
    ToMemory,
}

/// Copy between `ours` and the bytes from `offset` of a scatter list.
///
/// # Safety
/// The array and the memory it names are valid, for at least `offset + ours.len()` bytes.
unsafe fn copy(memory: IoSlice, mut offset: usize, ours: &mut [u8], direction: Direction) {
    let mut ours = ours;
    // SAFETY: the caller vouches for the array.
    for iovec in unsafe { memory.iovecs() } {
        if ours.is_empty() {
            return;
        }
        if offset >= iovec.iov_len {
            offset -= iovec.iov_len;
            continue;
        }
        let n = ours.len().min(iovec.iov_len - offset);
        let theirs = iovec.iov_base.cast::<u8>().wrapping_add(offset);
        let (piece, rest) = ours.split_at_mut(n);
        match direction {
            // SAFETY: the caller vouches for the memory; a buffer of ours does not overlap it.
            Direction::FromMemory => unsafe { std::ptr::copy_nonoverlapping(theirs, piece.as_mut_ptr(), n) },
            // SAFETY: as above.
            Direction::ToMemory => unsafe { std::ptr::copy_nonoverlapping(piece.as_ptr(), theirs, n) },
        }
        ours = rest;
        offset = 0;
    }
    assert!(ours.is_empty(), "a scatter list shorter than its operation");
}

/// The bounce buffers of one reactor.
#[derive(Debug, Default)]
pub(super) struct BouncePool {
    free: Vec<AlignedBuf>,
    made: usize,
}

impl BouncePool {
    pub(super) fn take(&mut self) -> Option<AlignedBuf> {
        if let Some(buffer) = self.free.pop() {
            return Some(buffer);
        }
        if self.made == BOUNCE_BUFFERS {
            return None;
        }
        self.made += 1;
        Some(AlignedBuf::zeroed(BOUNCE_UNIT))
    }

    pub(super) fn give_back(&mut self, buffer: AlignedBuf) {
        self.free.push(buffer);
    }
}

#[cfg(test)]
mod tests;
