//! Devices: where reads, writes and flushes go.
//!
//! A [`Device`] is one thread's queue of operations to *all* devices of one volume (the primary, the
//! spare). There is one implementation per way of reaching them: [`uring`] (io_uring), [`threads`]
//! (a thread pool, for hosts that forbid io_uring), [`memory`] (two disks in memory with a volatile
//! and a durable half, the crash model) and [`fault`], which wraps any of these and fails what its
//! rules say. Nothing here knows what a slot, a map or a guest is.

pub mod buffer;
mod errno;
pub mod fault;
mod lock;
pub mod memory;
pub mod open;
mod operation;
mod pool;
mod sys;
pub mod threads;
pub mod uring;
mod watch;

use std::fmt;
use std::os::fd::RawFd;

use crate::units::Time;
use buffer::IoSlice;
pub use errno::{Errno, UnknownErrno};

/// Which device of the volume an operation goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub u8);

impl DeviceIndex {
    /// The device that holds guest data.
    pub const PRIMARY: DeviceIndex = DeviceIndex(0);
    /// The device that holds metadata and slots.
    pub const SPARE: DeviceIndex = DeviceIndex(1);
}

impl fmt::Display for DeviceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DeviceIndex::PRIMARY => f.write_str("primary"),
            DeviceIndex::SPARE => f.write_str("spare"),
            DeviceIndex(n) => write!(f, "device {n}"),
        }
    }
}

/// What an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OpKind {
    /// Fill the buffers from the device.
    Read,
    /// Write the buffers to the device.
    Write,
    /// Make everything completed before durable (fdatasync; a block device's FLUSH CACHE).
    Flush,
    /// Drop the range: later reads of it may return anything old or zero.
    Discard,
    /// Make the range read as zeros; `unmap` allows the device to release its space.
    WriteZeroes {
        /// Whether the space may be released.
        unmap: bool,
    },
    /// Ask whether the device is still the one that was opened, at its size. No medium access, no write.
    Identify,
}

/// The submitter's name for an operation; it comes back in the [`Completion`]. The upper bit is
/// reserved for devices that wrap others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u64);

/// One operation. `offset` and `len` are in bytes; `data` has exactly `len` bytes for reads and
/// writes and is empty otherwise.
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// Comes back in the completion.
    pub tag: Tag,
    /// Where to.
    pub device: DeviceIndex,
    /// What to do.
    pub kind: OpKind,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
    /// The memory, borrowed until the completion: see [`Device::submit`].
    pub data: IoSlice,
}

/// The end of an operation: all of it was done, or it failed (and then says nothing about any byte).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// As submitted.
    pub tag: Tag,
    /// Success, or why not.
    pub result: Result<(), Errno>,
}

/// How long [`Device::poll`] may wait for something to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Not at all.
    No,
    /// Until that time at the latest.
    Until(Time),
    /// For ever.
    Forever,
}

/// What [`Device::poll`] reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// An operation ended.
    Done(Completion),
    /// A watched file descriptor became readable (edge-like: an eventfd need not be read).
    Ready(u64),
}

/// One thread's queue of operations to the devices of a volume.
///
/// Contract, checked for every implementation by `tests/conformance.rs`:
/// - each submitted operation completes exactly once, in any order;
/// - short transfers are continued inside; a completion with `Ok` means every byte;
/// - a read beyond the end of the device fails with EIO rather than returning less;
/// - memory that does not meet the device's alignment is bounced inside, from a bounded pool;
///   offsets and lengths must be multiples of the device's logical block (else EINVAL);
/// - an operation is never abandoned: there is no cancel, and none completes before the kernel has
///   let go of its memory.
pub trait Device {
    /// Queue an operation. It may start at once or at the next [`Device::poll`].
    ///
    /// # Safety
    /// The memory behind `op.data`, and the iovec array itself, stay valid and unmoved until the
    /// completion has been returned by [`Device::poll`]; for reads nobody else relies on its content.
    unsafe fn submit(&mut self, op: Op);

    /// Operations submitted and not yet reported.
    fn in_flight(&self) -> usize;

    /// Start what is queued, wait as told if nothing is ready, and append what happened to `events`.
    /// `now` is the current time of the caller's clock. A wait may end early with nothing to report.
    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>);
}

/// A [`Device`] that is also what its thread sleeps on.
pub trait Reactor: Device {
    /// Report [`Event::Ready`] with `token` whenever `fd` becomes readable. The descriptor must stay
    /// open until [`Reactor::unwatch`]. Data already pending is reported too.
    fn watch(&mut self, fd: RawFd, token: u64);

    /// Stop reporting `token`. A report already on its way may still arrive.
    fn unwatch(&mut self, token: u64);
}

impl<D: Device + ?Sized> Device for Box<D> {
    unsafe fn submit(&mut self, op: Op) {
        // SAFETY: the caller's promise is passed on unchanged.
        unsafe { (**self).submit(op) }
    }

    fn in_flight(&self) -> usize {
        (**self).in_flight()
    }

    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        (**self).poll(now, wait, events);
    }
}

impl<R: Reactor + ?Sized> Reactor for Box<R> {
    fn watch(&mut self, fd: RawFd, token: u64) {
        (**self).watch(fd, token);
    }

    fn unwatch(&mut self, token: u64) {
        (**self).unwatch(token);
    }
}
