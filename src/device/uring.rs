//! A reactor on io_uring: one ring for all devices of a volume and for everything its thread waits on.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, cqueue, opcode, types};

use super::open::{Ability, DeviceSet, Kind, OpenDevice};
use super::operation::{BouncePool, Memory, Operation, Progress, Step};
use super::pool::{Finished, Job, Pool};
use super::{Completion, Device, DeviceIndex, Errno, Event, Op, OpKind, Reactor, Tag, Wait};
use crate::units::Time;

/// Submission entries: fewer cost an enter in the middle of a batch, more cost locked memory.
const DEPTH_MIN: u32 = 4;
const DEPTH_MAX: u32 = 4096;

/// Completion entries for each submission entry. Operations on the ring are kept below three quarters
/// of them, so that the ring does not overflow even if every watched descriptor fires at once.
const COMPLETIONS_PER_SUBMISSION: u32 = 4;
const OPERATIONS_PER_SUBMISSION: u32 = 3;

/// Threads for what a ring cannot do without blocking: BLKDISCARD on older kernels, and asking a
/// device for its size. Two, so that the question does not wait behind one long discard.
const SLOW_THREADS: usize = 2;

/// `_IO(0x12, 0)`, `BLOCK_URING_CMD_DISCARD` of linux/blkdev.h (Linux 6.12).
const BLOCK_URING_CMD_DISCARD: u32 = 0x12 << 8;

/// What a completion is about: the upper bits of its user data.
const ABOUT_OPERATION: u64 = 0;
const ABOUT_WATCH: u64 = 1;
const ABOUT_SLOW: u64 = 2;
const ABOUT_NOTHING: u64 = 3;
const ABOUT_SHIFT: u32 = 56;
/// A watch's place in its lower bits and, so that a late report of an earlier watch is told from the
/// present one, its generation.
const PLACE_BITS: u32 = 24;

/// One thread's reactor on io_uring. It must be made, used and dropped on one thread.
///
/// Dropping it waits until the kernel has returned every operation.
pub struct UringReactor {
    ring: IoUring,
    devices: DeviceSet,
    files_registered: bool,
    /// Operations by slot; `None` is free, or with the slow threads.
    slots: Vec<Option<Operation>>,
    free: Vec<usize>,
    /// Slots whose next step is not on the ring yet, in order.
    queue: VecDeque<usize>,
    /// Slots that wait for a bounce buffer, in order.
    waiting: VecDeque<usize>,
    /// Polls to arm and to cancel.
    controls: VecDeque<Entry>,
    buffers: BouncePool,
    on_ring: u32,
    on_ring_max: u32,
    watches: Vec<Watch>,
    slow: Option<Pool>,
    finished: Vec<Finished>,
    completions: Vec<cqueue::Entry>,
    /// What ended outside of poll.
    ended: Vec<Event>,
    in_flight: usize,
}

#[derive(Debug)]
struct Watch {
    fd: RawFd,
    token: u64,
    generation: u32,
    active: bool,
}

impl UringReactor {
    /// A reactor whose ring takes `depth` operations in one system call.
    ///
    /// # Errors
    /// If the kernel has no io_uring, forbids it, or has one older than Linux 5.13: callers then take
    /// a [`super::threads::ThreadReactor`].
    pub fn new(devices: &DeviceSet, depth: u32) -> io::Result<UringReactor> {
        let depth = depth.clamp(DEPTH_MIN, DEPTH_MAX).next_power_of_two();
        let ring = build_ring(depth)?;
        let params = ring.params();
        // Multishot polls came with resource tags, which have a feature bit, in Linux 5.13.
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() || !params.is_feature_resource_tagging() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "io_uring of this kernel is older than Linux 5.13"));
        }
        let fds: Vec<RawFd> = devices.devices.iter().map(|device| device.file.as_raw_fd()).collect();
        let files_registered = ring.submitter().register_files(&fds).is_ok();
        Ok(UringReactor {
            ring,
            devices: devices.clone(),
            files_registered,
            slots: Vec::new(),
            free: Vec::new(),
            queue: VecDeque::new(),
            waiting: VecDeque::new(),
            controls: VecDeque::new(),
            buffers: BouncePool::default(),
            on_ring: 0,
            on_ring_max: depth * OPERATIONS_PER_SUBMISSION,
            watches: Vec::new(),
            slow: None,
            finished: Vec::new(),
            completions: Vec::new(),
            ended: Vec::new(),
            in_flight: 0,
        })
    }

    fn place(&mut self, operation: Operation) -> usize {
        if let Some(slot) = self.free.pop() {
            self.slots[slot] = Some(operation);
            return slot;
        }
        self.slots.push(Some(operation));
        self.slots.len() - 1
    }

    fn proceed(&mut self, slot: usize, progress: Progress, events: &mut Vec<Event>) {
        match progress {
            Progress::Next => self.queue.push_back(slot),
            Progress::NeedsBuffer => self.waiting.push_back(slot),
            Progress::Done(result) => {
                let mut operation = self.slots[slot].take().expect("an operation that ends is in its slot");
                if let Some(buffer) = operation.take_buffer() {
                    self.buffers.give_back(buffer);
                }
                self.free.push(slot);
                self.in_flight -= 1;
                events.push(done(operation.op().tag, result));
            }
        }
    }

    /// Put as much on the submission queue as fits.
    fn fill(&mut self) {
        while let Some(control) = self.controls.front() {
            // SAFETY: polls and cancellations name no memory.
            if unsafe { self.ring.submission().push(control) }.is_err() {
                return;
            }
            self.controls.pop_front();
        }
        while !self.waiting.is_empty() {
            let Some(buffer) = self.buffers.take() else { break };
            let slot = self.waiting.pop_front().expect("it is not empty");
            self.slots[slot].as_mut().expect("waiting operations are in their slots").lend(buffer);
            self.queue.push_back(slot);
        }
        while self.on_ring < self.on_ring_max
            && let Some(slot) = self.queue.front()
        {
            if !self.push(*slot) {
                return;
            }
            self.queue.pop_front();
        }
    }

    /// Start the next step of an operation; false if the submission queue is full.
    fn push(&mut self, slot: usize) -> bool {
        if self.ring.submission().is_full() {
            return false;
        }
        let operation = self.slots[slot].as_mut().expect("queued operations are in their slots");
        let op = *operation.op();
        let device = self.devices.get(op.device).expect("checked when it was submitted");
        let fd =
            if self.files_registered { types::Fd(i32::from(op.device.0)) } else { types::Fd(device.file.as_raw_fd()) };
        let Some(entry) = entry_of(operation, device, fd) else {
            self.run_slowly(slot);
            return true;
        };
        let flags = if self.files_registered { Flags::FIXED_FILE } else { Flags::empty() };
        let entry = entry.flags(flags).user_data(user_data(ABOUT_OPERATION, slot));
        // SAFETY: the operation's memory outlives it (promise to `Device::submit`); bounce buffers and
        // zeros are ours; the operation leaves its slot only after its completion.
        unsafe { self.ring.submission().push(&entry) }.expect("there was room");
        self.on_ring += 1;
        true
    }

    fn run_slowly(&mut self, slot: usize) {
        if self.slow.is_none() {
            match Pool::new(SLOW_THREADS) {
                Ok(pool) => {
                    self.controls.push_back(poll_of(pool.wake().as_raw_fd(), user_data(ABOUT_SLOW, 0)));
                    self.slow = Some(pool);
                }
                Err(error) => {
                    let errno = Errno(error.raw_os_error().unwrap_or(libc::EAGAIN));
                    let mut ended = std::mem::take(&mut self.ended);
                    self.proceed(slot, Progress::Done(Err(errno)), &mut ended);
                    self.ended = ended;
                    return;
                }
            }
        }
        let operation = self.slots[slot].take().expect("queued operations are in their slots");
        let device = Arc::clone(self.devices.get(operation.op().device).expect("checked when it was submitted"));
        self.slow.as_mut().expect("made above").submit(Job { slot, operation, device });
    }

    /// Handle all completions there are.
    fn reap(&mut self, events: &mut Vec<Event>) {
        events.append(&mut self.ended);
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion());
        for completion in completions.drain(..) {
            let (about, index) = split(completion.user_data());
            match about {
                ABOUT_OPERATION => self.completed(index, completion.result(), events),
                ABOUT_WATCH => self.reported(completion.user_data(), &completion, events),
                ABOUT_SLOW => self.collect_slow(&completion, events),
                _ => {}
            }
        }
        self.completions = completions;
    }

    fn completed(&mut self, slot: usize, result: i32, events: &mut Vec<Event>) {
        self.on_ring -= 1;
        let operation = self.slots[slot].as_mut().expect("operations on the ring are in their slots");
        let op = operation.op();
        let device = self.devices.get(op.device).expect("checked when it was submitted");
        let not_by_ring = [-libc::EOPNOTSUPP, -libc::EINVAL, -libc::ENOTTY].contains(&result);
        let progress = if op.kind == OpKind::Discard && device.geometry.kind == Kind::BlockDevice && not_by_ring {
            // The kernel may be too old for the command; the ioctl tells whether the device is.
            device.remember_lack(Ability::UringDiscard);
            Progress::Next
        } else {
            operation.advance(device, result)
        };
        self.proceed(slot, progress, events);
    }

    fn reported(&mut self, user_data: u64, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        let (place, generation) = split_watch(user_data);
        let Some(watch) = self.watches.get(place).filter(|watch| watch.active && watch.generation == generation) else {
            return;
        };
        events.push(Event::Ready(watch.token));
        let errno = -completion.result();
        // A poll that could not be armed would fail again at once; its owner learns of it by the
        // report. The others ended because of a lack of memory or of completion entries.
        if !cqueue::more(completion.flags())
            && matches!(errno, i32::MIN..=0 | libc::ENOMEM | libc::EAGAIN | libc::ECANCELED)
        {
            self.controls.push_back(poll_of(watch.fd, user_data));
        }
    }

    fn collect_slow(&mut self, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        let Some(slow) = &mut self.slow else { return };
        if !cqueue::more(completion.flags()) {
            self.controls.push_back(poll_of(slow.wake().as_raw_fd(), completion.user_data()));
        }
        slow.quiet();
        let mut finished = std::mem::take(&mut self.finished);
        slow.collect(&mut finished);
        for Finished { job, progress } in finished.drain(..) {
            self.slots[job.slot] = Some(job.operation);
            self.proceed(job.slot, progress, events);
        }
        self.finished = finished;
    }

    /// Hand the submission queue to the kernel and, if `wait` says so, wait for a completion.
    fn enter(&self, now: Time, wait: Wait) {
        let submitter = self.ring.submitter();
        let result = match wait {
            Wait::No => submitter.submit(),
            Wait::Forever => submitter.submit_and_wait(1),
            Wait::Until(until) => {
                let ns = until.since_ns(now);
                let nsec = u32::try_from(ns % 1_000_000_000).expect("below a second");
                let timeout = types::Timespec::new().sec(ns / 1_000_000_000).nsec(nsec);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timeout))
            }
        };
        let Err(error) = result else { return };
        match error.raw_os_error() {
            Some(libc::ETIME | libc::EINTR) => {}
            // Out of memory for requests, or of room for completions: the latter are reaped now, and what
            // was not taken stays in the submission queue.
            Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => std::thread::yield_now(),
            // No operation may be abandoned, so there is nothing left to do with a ring that fails.
            _ => panic!("io_uring_enter: {error}"),
        }
    }
}

fn build_ring(depth: u32) -> io::Result<IoUring> {
    let completions = depth * COMPLETIONS_PER_SUBMISSION;
    let mut newest = IoUring::builder();
    // DEFER_TASKRUN without TASKRUN_FLAG stalls: submit() asks for completions only if that flag says so.
    newest.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    let mut older = IoUring::builder();
    older.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    let mut oldest = IoUring::builder();
    let mut refused = None;
    for builder in [&mut newest, &mut older, &mut oldest] {
        match builder.setup_cqsize(completions).setup_clamp().build(depth) {
            Ok(ring) => return Ok(ring),
            // An unknown flag (DEFER_TASKRUN is of Linux 6.1, COOP_TASKRUN of 5.19): ask for less.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.expect("one of three tries ended the loop or was refused"))
}

/// The ring's word for the next step; `None` if the ring cannot do it without blocking.
fn entry_of(operation: &mut Operation, device: &OpenDevice, fd: types::Fd) -> Option<Entry> {
    let (start, len) = (operation.op().offset, operation.op().len);
    let entry = match operation.step() {
        Step::Transfer { write, memory: Memory::One(iovec), offset } => {
            let base = iovec.iov_base.cast::<u8>();
            let len = u32::try_from(iovec.iov_len).expect("a step moves less than 2 GiB");
            if write {
                opcode::Write::new(fd, base, len).offset(offset).build()
            } else {
                opcode::Read::new(fd, base, len).offset(offset).build()
            }
        }
        Step::Transfer { write, memory: Memory::Many(iovecs, count), offset } => {
            let count = u32::try_from(count).expect("at most 1024");
            if write {
                opcode::Writev::new(fd, iovecs, count).offset(offset).build()
            } else {
                opcode::Readv::new(fd, iovecs, count).offset(offset).build()
            }
        }
        Step::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Step::Allocate(mode) => {
            let mode = i32::try_from(mode.bits()).expect("fallocate modes are small");
            opcode::Fallocate::new(fd, len).offset(start).mode(mode).build()
        }
        Step::Discard if device.has(Ability::UringDiscard) => {
            // The command takes its start from `addr` and its length from `addr3`, which is where the
            // command's own bytes begin.
            let mut command = [0; 16];
            command[..8].copy_from_slice(&len.to_ne_bytes());
            opcode::UringCmd16::new(fd, BLOCK_URING_CMD_DISCARD).cmd(command).addr(Some(start)).build()
        }
        Step::Discard | Step::Identify => return None,
    };
    Some(entry)
}

fn poll_of(fd: RawFd, user_data: u64) -> Entry {
    let readable = u32::try_from(libc::POLLIN).expect("a small positive number");
    opcode::PollAdd::new(types::Fd(fd), readable).multi(true).build().user_data(user_data)
}

fn user_data(about: u64, index: usize) -> u64 {
    (about << ABOUT_SHIFT) | u64::try_from(index).expect("usize is at most 64 bits wide")
}

fn split(user_data: u64) -> (u64, usize) {
    let index = user_data & ((1 << ABOUT_SHIFT) - 1);
    (user_data >> ABOUT_SHIFT, usize::try_from(index).expect("it was made from a usize"))
}

fn watch_data(place: usize, generation: u32) -> u64 {
    user_data(ABOUT_WATCH, place) | (u64::from(generation) << PLACE_BITS)
}

fn split_watch(user_data: u64) -> (usize, u32) {
    let place = user_data & ((1 << PLACE_BITS) - 1);
    let generation = (user_data >> PLACE_BITS) & u64::from(u32::MAX);
    (usize::try_from(place).expect("24 bits"), u32::try_from(generation).expect("32 bits"))
}

fn done(tag: Tag, result: Result<(), Errno>) -> Event {
    Event::Done(Completion { tag, result })
}

impl Device for UringReactor {
    unsafe fn submit(&mut self, op: Op) {
        let Some(device) = self.devices.get(op.device) else {
            self.ended.push(done(op.tag, Err(Errno(libc::ENODEV))));
            return;
        };
        // SAFETY: the caller's promise is the one asked for.
        let (mut operation, mut progress) = unsafe { Operation::begin(op, device) };
        let is_transfer = matches!(op.kind, OpKind::Read | OpKind::Write);
        if progress == Progress::Next && is_transfer && device.geometry.in_memory {
            // A ring would hand it to a thread of the kernel's, as tmpfs has no transfers that fail rather than sleep.
            progress = operation.run(device);
        }
        self.in_flight += 1;
        let slot = self.place(operation);
        // Nothing overtakes what waits already, and at best nothing waits.
        if progress == Progress::Next && self.queue.is_empty() && self.on_ring < self.on_ring_max && self.push(slot) {
            return;
        }
        let mut ended = std::mem::take(&mut self.ended);
        self.proceed(slot, progress, &mut ended);
        self.ended = ended;
    }

    fn in_flight(&self) -> usize {
        // Ended operations count until they are reported; only these are kept in `ended`.
        self.in_flight + self.ended.len()
    }

    fn poll(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let start = events.len();
        let mut wait = match wait {
            Wait::Until(until) if until <= now => Wait::No,
            _ => wait,
        };
        let mut looked = false;
        loop {
            let before = events.len();
            self.reap(events);
            self.fill();
            events.append(&mut self.ended);
            if events.len() > start {
                wait = Wait::No;
            }
            let submission = self.ring.submission();
            let nothing_due = submission.is_empty() && !submission.cq_overflow();
            // An enter delivers at most 20 completions beyond those waited for; the flag stays up while
            // there are more. It may also stay up for nothing: the kernel raises it after it has queued
            // the work, which this thread may have run by then. So one look without a find is enough.
            let announced = submission.taskrun() && !(looked && events.len() == before);
            drop(submission);
            if nothing_due && !announced && wait == Wait::No {
                return;
            }
            looked = wait == Wait::No;
            self.enter(now, wait);
            if let Wait::Until(_) = wait {
                // The time may be over: only the caller's clock knows.
                wait = Wait::No;
            }
        }
    }
}

impl Reactor for UringReactor {
    fn watch(&mut self, fd: RawFd, token: u64) {
        let place = self.watches.iter().position(|watch| !watch.active).unwrap_or_else(|| {
            self.watches.push(Watch { fd, token, generation: 0, active: false });
            self.watches.len() - 1
        });
        assert!(place < 1 << PLACE_BITS, "there are fewer descriptors than that");
        let generation = self.watches[place].generation.wrapping_add(1);
        self.watches[place] = Watch { fd, token, generation, active: true };
        self.controls.push_back(poll_of(fd, watch_data(place, generation)));
    }

    fn unwatch(&mut self, token: u64) {
        for (place, watch) in self.watches.iter_mut().enumerate().filter(|(_, watch)| watch.active) {
            if watch.token == token {
                watch.active = false;
                let poll = watch_data(place, watch.generation);
                let cancel = opcode::PollRemove::new(poll).build().user_data(user_data(ABOUT_NOTHING, 0));
                self.controls.push_back(cancel);
            }
        }
    }
}

impl Drop for UringReactor {
    fn drop(&mut self) {
        let mut events = Vec::new();
        while self.in_flight > 0 {
            self.poll(Time(0), Wait::Forever, &mut events);
            events.clear();
        }
    }
}

const _: () = assert!(DeviceIndex::PRIMARY.0 == 0, "registered files are numbered like devices");
