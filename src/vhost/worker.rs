//! A worker: takes requests from its queues, drives a shard and its device with them, and answers.
//!
//! [`DataPlane`] is the work itself, one [`DataPlane::turn`] at a time; [`spawn`] runs it on a thread that
//! sleeps on nothing but the reactor and takes [`Command`]s. A worker outlives connections.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use super::chain::{ChainError, LocalMap, Scatter};
use super::device::Settings;
use super::memory::{MemoryMap, RegionBits};
use super::queue::{Kick, Queue, Stop};
use super::request::{Parsed, S_IOERR, S_OK, parse};
use super::ring::RingAddresses;
use super::slots::{Slots, Taken};
use super::status::WorkerStatus;
use crate::device::buffer::Iovecs;
use crate::device::{Event, Wait};
use crate::engine::message::ToShard;
use crate::engine::request::{Answer, Request, RequestOp, Status};
use crate::engine::shard::ShardOut;
use crate::runtime::mailbox::{Inbox, Outbox, mailbox};
use crate::runtime::worker::{Worker, WorkerPort};
use crate::units::Time;

pub use super::queue::{Kick as QueueKick, StartQueue, StopHow};

/// The reactor's name for the command mailbox, the healer's mailbox and the first kick.
const TOKEN_COMMANDS: u64 = 0;
const TOKEN_HEALER: u64 = 1;
const TOKEN_KICKS: u64 = 2;

/// How often queues without a kick eventfd are looked at.
const POLL_INTERVAL_NS: u64 = 1_000_000;

/// Empty scatter lists kept for reuse: more than this many requests at once are rare, and each list holds a
/// few hundred bytes.
const POOL_MAX: usize = 1024;

/// An order to a worker. None waits for the disk; stops and memory changes are answered when they are done.
#[derive(Debug)]
pub enum Command {
    /// Serve a queue.
    Start(Box<StartQueue>),
    /// Serve a queue no more; answered with its next avail entry when the device has returned its requests.
    Stop {
        /// The queue.
        queue: u16,
        /// What becomes of requests that no device works on.
        how: StopHow,
        /// The answer.
        reply: Sender<u16>,
    },
    /// Take requests of a queue, or not.
    Enable {
        /// The queue.
        queue: u16,
        /// Whether to.
        enabled: bool,
    },
    /// Another kick for a live queue.
    Kick {
        /// The queue.
        queue: u16,
        /// Its kick.
        kick: Kick,
    },
    /// Another call eventfd for a live queue.
    Call {
        /// The queue.
        queue: u16,
        /// The eventfd.
        call: Option<OwnedFd>,
    },
    /// Another error eventfd for a live queue.
    Err {
        /// The queue.
        queue: u16,
        /// The eventfd.
        err: Option<OwnedFd>,
    },
    /// The ring of a live queue moved.
    Addresses {
        /// The queue.
        queue: u16,
        /// Its place.
        addresses: RingAddresses,
    },
    /// The guest's memory changed; answered when nothing uses `removed` any more.
    Memory {
        /// The new memory.
        map: Arc<MemoryMap>,
        /// Regions that are gone.
        removed: RegionBits,
        /// The answer.
        done: Sender<()>,
    },
    /// End the thread when the device has returned everything.
    Exit,
}

/// A memory change whose requests have not all ended.
struct Removal {
    regions: RegionBits,
    /// Requests with smaller numbers are older than the change.
    before: u64,
    done: Sender<()>,
}

/// A worker's queues and what serves them.
pub struct DataPlane {
    worker: Worker,
    settings: Arc<Settings>,
    status: Arc<WorkerStatus>,
    memory: LocalMap,
    /// By the queue's number in the device.
    queues: Vec<Option<Box<Queue>>>,
    /// Numbers of the started queues.
    started: Vec<u16>,
    slots: Slots,
    removals: Vec<Removal>,
    next_token: u64,
    healer_wrote: bool,
    commands_wait: bool,
    // Buffers used again in every turn.
    scatter: Scatter,
    pool: Vec<Iovecs>,
    out: ShardOut,
    events: Vec<Event>,
    messages: Vec<ToShard>,
}

impl DataPlane {
    /// A worker without queues.
    pub fn new(mut worker: Worker, settings: Arc<Settings>, status: Arc<WorkerStatus>) -> DataPlane {
        worker.reactor.watch(worker.inbox.as_raw_fd(), TOKEN_HEALER);
        DataPlane {
            worker,
            settings,
            status,
            memory: Rc::new(Arc::new(MemoryMap::new())),
            queues: Vec::new(),
            started: Vec::new(),
            slots: Slots::new(),
            removals: Vec::new(),
            next_token: TOKEN_KICKS,
            healer_wrote: true,
            commands_wait: false,
            scatter: Scatter::default(),
            pool: Vec::new(),
            out: ShardOut::default(),
            events: Vec::new(),
            messages: Vec::new(),
        }
    }

    /// Start a queue. One that cannot be started is reported and not served.
    pub fn start(&mut self, start: StartQueue) {
        let index = start.index;
        assert!(self.queue(index).is_none(), "queue {index} is started already");
        match Queue::start(&self.memory, start) {
            Ok(mut queue) => {
                self.worker.shard.resume(index);
                self.watch_kick(&mut queue);
                if !queue.resubmit.is_empty() {
                    log::info!("queue {index}: {} requests are resubmitted", queue.resubmit.len());
                }
                let slot = usize::from(index);
                if self.queues.len() <= slot {
                    self.queues.resize_with(slot + 1, || None);
                }
                self.queues[slot] = Some(Box::new(queue));
                self.started.push(index);
            }
            Err(error) => log::error!("queue {index} is not served: {error}"),
        }
    }

    /// Begin to stop a queue; `reply` gets the next avail entry when it has stopped. Nothing comes for a queue
    /// that is not started.
    pub fn stop(&mut self, index: u16, how: StopHow, reply: Sender<u16>) {
        let Some(queue) = self.queue(index) else { return };
        if how == StopHow::Discard {
            for head in std::mem::take(&mut queue.resubmit) {
                queue.forget(head);
            }
        }
        queue.stop = Some(Stop { how, withdrawn: Vec::new(), reply });
        self.worker.shard.withdraw(index, &mut self.out);
    }

    /// Look at a queue in the next turn, as after a kick.
    pub fn kick(&mut self, index: u16) {
        if let Some(queue) = self.queue(index) {
            queue.armed = false;
        }
    }

    /// Whether nothing is under way and queue `index` has nothing to take, or takes nothing.
    pub fn is_quiet(&mut self, index: u16) -> bool {
        self.slots.len() == 0 && self.queue(index).is_none_or(|queue| queue.armed || !queue.is_running())
    }

    /// Requests taken and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.slots.len()
    }

    /// Use other memory; `done` is told when no request uses `removed` any more.
    pub fn set_memory(&mut self, map: &MemoryMap, removed: RegionBits, done: Sender<()>) {
        // A map of this worker's own: its reference count, touched by every request, is on no other worker's
        // cache line.
        self.memory = Rc::new(Arc::new(map.clone()));
        for index in &self.started {
            if let Some(queue) = self.queues[usize::from(*index)].as_mut() {
                queue.publish();
                queue.remap(&self.memory, queue.ring.addresses());
            }
        }
        self.removals.push(Removal { regions: removed, before: self.slots.next_serial(), done });
    }

    /// One round: take what is there, submit, wait (if `may_wait` and there is nothing to do), answer.
    pub fn turn(&mut self, may_wait: bool) {
        let now = self.worker.clock.now();
        self.hear_healer(now);
        self.take_all(now);
        self.deliver();
        // Whoever waits for a stop may be the caller itself: no sleep after one.
        let settled = self.settle(now);
        self.deliver();
        self.status.set(self.slots.len(), self.slots.oldest_start());
        let wait = if self.arm() || settled || !may_wait { Wait::No } else { self.patience(now) };
        let mut events = std::mem::take(&mut self.events);
        self.worker.reactor.poll(now, wait, &mut events);
        let now = self.worker.clock.now();
        for event in events.drain(..) {
            match event {
                Event::Done(completion) => self.worker.shard.completed(now, completion, &mut self.out),
                Event::Ready(TOKEN_HEALER) => self.healer_wrote = true,
                Event::Ready(TOKEN_COMMANDS) => self.commands_wait = true,
                Event::Ready(token) => self.kicked(token),
            }
        }
        self.events = events;
        self.deliver();
    }

    fn queue(&mut self, index: u16) -> Option<&mut Queue> {
        self.queues.get_mut(usize::from(index))?.as_deref_mut()
    }

    fn watch_kick(&mut self, queue: &mut Queue) {
        queue.armed = false;
        if let Some(fd) = queue.kick_fd() {
            // A new name each time: a report for a kick that is gone must not be taken for the new one's.
            queue.token = self.next_token;
            self.next_token += 1;
            self.worker.reactor.watch(fd, queue.token);
        }
    }

    fn unwatch_kick(&mut self, queue: &Queue) {
        if queue.kick_fd().is_some() {
            self.worker.reactor.unwatch(queue.token);
        }
    }

    fn kicked(&mut self, token: u64) {
        for index in &self.started {
            if let Some(queue) = self.queues[usize::from(*index)].as_mut().filter(|queue| queue.token == token) {
                queue.armed = false;
                return;
            }
        }
    }

    fn hear_healer(&mut self, now: Time) {
        if !std::mem::take(&mut self.healer_wrote) {
            return;
        }
        let mut messages = std::mem::take(&mut self.messages);
        self.worker.inbox.drain(&mut messages);
        for message in messages.drain(..) {
            self.worker.shard.message(now, message, &mut self.out);
        }
        self.messages = messages;
    }

    /// Take what the drivers offer on queues that may have something.
    fn take_all(&mut self, now: Time) {
        for at in 0..self.started.len() {
            let slot = usize::from(self.started[at]);
            let Some(mut queue) = self.queues[slot].take() else { continue };
            if queue.is_running() && !queue.armed {
                self.take(&mut queue, now);
            }
            self.queues[slot] = Some(queue);
        }
    }

    fn take(&mut self, queue: &mut Queue, now: Time) {
        queue.ring.disarm();
        while let Some(head) = queue.resubmit.pop_front() {
            if queue.begin(head) {
                self.serve(queue, head, None, now);
            }
        }
        for _ in 0..queue.available() {
            let Some((head, position)) = queue.take() else { break };
            self.serve(queue, head, Some(position), now);
        }
    }

    /// Make a request of a chain, or give the chain back at once.
    #[inline]
    fn serve(&mut self, queue: &mut Queue, head: u16, position: Option<u16>, now: Time) {
        let chain = match self.scatter.walk(&queue.ring, &self.memory, head) {
            Ok(chain) => chain,
            Err(error) => {
                reject(&self.status, queue.index, head, Some(error));
                return queue.give_back(head, 0);
            }
        };
        let Some(status) = chain.status_byte(&self.memory) else {
            reject(&self.status, queue.index, head, None);
            return queue.give_back(head, 0);
        };
        let regions = chain.regions().union(queue.ring.regions());
        match parse(&chain, &self.worker.disk, &mut self.pool) {
            Parsed::Done { status: value, written } => {
                if value == S_IOERR {
                    reject(&self.status, queue.index, head, None);
                }
                status.write(value);
                queue.give_back(head, written);
            }
            Parsed::Submit { op, written } => {
                let taken = Taken { queue: queue.index, head, position, status, written, started: now, regions };
                let request = Request {
                    token: self.slots.insert(taken),
                    queue: queue.index,
                    write_through: self.settings.write_through(),
                    op,
                };
                self.worker.shard.submit(now, request, &mut self.out);
            }
        }
    }

    /// Carry out what the shard asked for, then show the drivers their answers.
    fn deliver(&mut self) {
        for op in self.out.ops.drain(..) {
            // SAFETY: an operation of the shard borrows memory of the request it belongs to (guest memory, which
            // the request's scatter list owns a reference to, and that list itself) or of a buffer beside it. The
            // shard keeps both until it has seen the operation's completion, this worker keeps the shard until
            // the device has returned everything (Drop), and what the guest does with its memory meanwhile is
            // the guest's affair.
            unsafe { self.worker.reactor.submit(op) };
        }
        for message in self.out.to_healer.drain(..) {
            self.worker.healer.send(message);
        }
        let mut answers = std::mem::take(&mut self.out.answers);
        for answer in answers.drain(..) {
            self.answer(answer);
        }
        self.out.answers = answers;
        let mut withdrawn = std::mem::take(&mut self.out.withdrawn);
        for request in withdrawn.drain(..) {
            let stop = self.queue(request.queue).and_then(|queue| queue.stop.as_mut());
            stop.expect("requests are withdrawn for a queue that stops").withdrawn.push(request);
        }
        self.out.withdrawn = withdrawn;
        for index in &self.started {
            if let Some(queue) = self.queues[usize::from(*index)].as_mut() {
                queue.publish();
            }
        }
    }

    #[inline]
    fn answer(&mut self, answer: Answer) {
        let taken = self.slots.remove(answer.request.token);
        let (value, written) = match answer.status {
            Status::Ok => (S_OK, taken.written),
            Status::IoErr => (S_IOERR, 1),
        };
        taken.status.write(value);
        let queue = self.queue(taken.queue).expect("a queue stops only after its last answer");
        queue.give_back(taken.head, written);
        if let RequestOp::Read { mut data, .. } | RequestOp::Write { mut data, .. } = answer.request.op
            && self.pool.len() < POOL_MAX
        {
            data.clear();
            self.pool.push(data);
        }
    }

    /// Finish stops and memory changes that nothing holds up any more. Returns whether there were stops.
    fn settle(&mut self, now: Time) -> bool {
        let mut settled = false;
        let mut at = 0;
        while at < self.started.len() {
            let index = self.started[at];
            let slot = usize::from(index);
            if self.queues[slot].as_ref().is_none_or(|queue| queue.stop.is_none())
                || self.worker.shard.unanswered(index) > 0
            {
                at += 1;
                continue;
            }
            let mut queue = self.queues[slot].take().expect("just seen");
            settled = true;
            if self.dispose_of_withdrawn(&mut queue, now) {
                self.queues[slot] = Some(queue);
                at += 1;
            } else {
                self.started.remove(at);
                self.finish_stop(*queue);
            }
        }
        let slots = &self.slots;
        self.removals.retain(|removal| {
            let busy = slots.touch(removal.regions, removal.before);
            if !busy {
                // The asker may have gone; nothing is to be done about that.
                let _ = removal.done.send(());
            }
            busy
        });
        settled
    }

    /// See to the withdrawn requests of a queue none of whose requests is under way. Returns whether some had
    /// to be submitted again.
    fn dispose_of_withdrawn(&mut self, queue: &mut Queue, now: Time) -> bool {
        let stop = queue.stop.as_mut().expect("only stopping queues come here");
        let (how, mut withdrawn) = (stop.how, std::mem::take(&mut stop.withdrawn));
        if how == StopHow::Drain {
            self.rewind(queue, &mut withdrawn);
            if !queue.is_tracked() && !withdrawn.is_empty() {
                self.worker.shard.resume(queue.index);
                for request in withdrawn {
                    self.worker.shard.submit(now, request, &mut self.out);
                }
                return true;
            }
        }
        for request in withdrawn {
            let taken = self.slots.remove(request.token);
            if how == StopHow::Discard {
                queue.forget(taken.head);
            }
        }
        false
    }

    /// Take back the last requests of the avail ring, as if they had never been taken: as long as the newest
    /// one is among `withdrawn`. The others stay in the list, oldest first.
    fn rewind(&mut self, queue: &mut Queue, withdrawn: &mut Vec<Request>) {
        let place = |slots: &Slots, request: &Request| slots.taken(request.token).and_then(|taken| taken.position);
        let end = queue.ring.next_avail();
        // Distance back from the end; requests from the in-flight region have no place and are never rewound.
        withdrawn.sort_by_key(|request| match place(&self.slots, request) {
            Some(position) => std::cmp::Reverse(u32::from(end.wrapping_sub(position))),
            None => std::cmp::Reverse(u32::MAX),
        });
        while let Some(request) = withdrawn.last() {
            let last = queue.ring.next_avail().wrapping_sub(1);
            if place(&self.slots, request) != Some(last) {
                break;
            }
            let taken = self.slots.remove(request.token);
            queue.forget(taken.head);
            queue.ring.set_next_avail(last);
            withdrawn.pop();
        }
    }

    fn finish_stop(&mut self, mut queue: Queue) {
        queue.publish();
        self.unwatch_kick(&queue);
        let stop = queue.stop.take().expect("only stopping queues come here");
        // The asker may have gone; nothing is to be done about that.
        let _ = stop.reply.send(queue.ring.next_avail());
    }

    /// Ask the drivers to kick. Returns whether there is something to take instead of waiting.
    fn arm(&mut self) -> bool {
        let mut more = false;
        for index in &self.started {
            let Some(queue) = self.queues[usize::from(*index)].as_mut() else { continue };
            if queue.is_running() && !queue.armed {
                queue.armed = !queue.ring.arm();
                more |= !queue.armed;
            }
        }
        more || self.healer_wrote || self.commands_wait
    }

    /// How long to sleep. Adaptive polling would return [`Wait::No`] here for some time after the last request.
    fn patience(&mut self, now: Time) -> Wait {
        let mut polled = false;
        for index in &self.started {
            let Some(queue) = self.queues[usize::from(*index)].as_mut() else { continue };
            if matches!(queue.kick, Kick::Polled) {
                queue.armed = false;
                polled = true;
            }
        }
        if polled { Wait::Until(now.plus_ns(POLL_INTERVAL_NS)) } else { Wait::Forever }
    }

    fn obey(&mut self, command: Command) -> bool {
        match command {
            Command::Start(start) => self.start(*start),
            Command::Stop { queue, how, reply } => self.stop(queue, how, reply),
            Command::Enable { queue: index, enabled } => {
                if let Some(queue) = self.queue(index) {
                    queue.enabled = enabled;
                    queue.armed = false;
                }
            }
            Command::Kick { queue: index, kick } => self.replace_kick(index, kick),
            Command::Call { queue: index, call } => {
                if let Some(queue) = self.queue(index) {
                    queue.set_call(call);
                }
            }
            Command::Err { queue: index, err } => {
                if let Some(queue) = self.queue(index) {
                    queue.set_err(err);
                }
            }
            Command::Addresses { queue: index, addresses } => {
                let memory = self.memory.clone();
                if let Some(queue) = self.queue(index) {
                    queue.publish();
                    queue.remap(&memory, addresses);
                }
            }
            Command::Memory { map, removed, done } => self.set_memory(&map, removed, done),
            Command::Exit => return false,
        }
        true
    }

    fn replace_kick(&mut self, index: u16, kick: Kick) {
        let slot = usize::from(index);
        if let Some(mut queue) = self.queues.get_mut(slot).and_then(Option::take) {
            self.unwatch_kick(&queue);
            queue.kick = kick;
            self.watch_kick(&mut queue);
            self.queues[slot] = Some(queue);
        }
    }

    fn run(mut self, mut commands: Inbox<Command>) {
        self.worker.reactor.watch(commands.as_raw_fd(), TOKEN_COMMANDS);
        let mut orders = Vec::new();
        self.commands_wait = true;
        loop {
            if std::mem::take(&mut self.commands_wait) {
                commands.drain(&mut orders);
                for order in orders.drain(..) {
                    if !self.obey(order) {
                        return;
                    }
                }
            }
            self.turn(true);
        }
    }
}

impl Drop for DataPlane {
    /// The device holds addresses of requests: nothing is freed before it has returned them (O4).
    fn drop(&mut self) {
        if std::thread::panicking() {
            if self.worker.reactor.in_flight() > 0 {
                // Unwinding would free memory under the kernel's hands.
                log::error!("a worker failed with requests under way");
                std::process::abort();
            }
            return;
        }
        let (reply, _) = std::sync::mpsc::channel();
        for index in self.started.clone() {
            self.stop(index, StopHow::Leave, reply.clone());
        }
        while self.worker.reactor.in_flight() > 0 || !self.started.is_empty() {
            self.turn(true);
        }
    }
}

fn reject(status: &WorkerStatus, queue: u16, head: u16, error: Option<ChainError>) {
    status.count_malformed();
    match error {
        Some(error) => log::debug!("queue {queue}: chain {head} is given back unread: {error}"),
        None => log::debug!("queue {queue}: chain {head} is no request that can be served"),
    }
}

/// A running worker thread.
pub struct WorkerThread {
    /// Takes its orders.
    pub commands: Outbox<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.commands.send(Command::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a worker thread panicked");
        }
    }
}

/// Run a worker on a thread of its own.
///
/// # Errors
/// When the thread or its reactor cannot be made.
pub fn spawn(
    index: usize,
    port: WorkerPort,
    settings: Arc<Settings>,
    status: Arc<WorkerStatus>,
) -> io::Result<WorkerThread> {
    let (commands, inbox) = mailbox()?;
    let (opened, is_open) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let worker = match port.open() {
            Ok(worker) => worker,
            Err(error) => {
                let _ = opened.send(Err(error));
                return;
            }
        };
        let plane = DataPlane::new(worker, settings, status);
        // The starter waits for this message.
        let _ = opened.send(Ok(()));
        plane.run(inbox);
    })?;
    let worker = WorkerThread { commands, thread: Some(thread) };
    is_open.recv().unwrap_or_else(|_| Err(io::Error::other("the worker thread ended before it began")))?;
    Ok(worker)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, TryRecvError, channel};

    use super::*;
    use crate::engine::message::FenceId;
    use crate::engine::view::{Mode, PrimaryState, View};
    use crate::units::{Block, BlockRange};
    use crate::vhost::inflight::InflightRegion;
    use crate::vhost::memory::RegionAddress;
    use crate::vhost::testing::{Bench, CAPACITY, DATA, chain_from, readable, writable};
    use crate::volume::map::Map;

    const FENCED_SECTOR: u64 = 80;
    const FREE_SECTOR: u64 = 0;

    /// Offer a read of a sector, as chain `number` with buffers of its own.
    fn offer_read(bench: &Bench, number: u16, sector: u64, data: u64) {
        let at = DATA + u64::from(number) * 0x1000;
        bench.guest.write(at, &0_u32.to_le_bytes());
        bench.guest.write(at + 8, &sector.to_le_bytes());
        bench.guest.write(at + 16, &[0xee]);
        let buffers = [readable(at, 16), writable(data, 512), writable(at + 16, 1)];
        bench.guest.offer(chain_from(&bench.guest, number * 3, &buffers));
    }

    fn offer(bench: &Bench, number: u16, sector: u64) {
        offer_read(bench, number, sector, DATA + 0x8_0000 + u64::from(number) * 0x1000);
    }

    fn status(bench: &Bench, number: u16) -> u8 {
        bench.guest.read::<1>(DATA + u64::from(number) * 0x1000 + 16)[0]
    }

    fn fence(bench: &mut Bench) {
        let range = BlockRange::one(Block(FENCED_SECTOR / 8));
        bench.to_shard.send(ToShard::Fence { fence: FenceId(1), range });
        bench.step();
    }

    fn lift(bench: &mut Bench) {
        let mode = Mode { poisoned: false, primary: PrimaryState::Up, spare_up: true, read_only: false };
        let view = Arc::new(View { map: Map::new(CAPACITY / 8), mode, dense: Arc::default() });
        bench.to_shard.send(ToShard::Publish { view, lift: vec![FenceId(1)], ack: None });
        bench.step();
    }

    fn used(bench: &Bench) -> Vec<u32> {
        std::iter::from_fn(|| bench.guest.take_used()).map(|(head, _)| head / 3).collect()
    }

    fn tracked() -> Arc<InflightRegion> {
        let (file, len) = InflightRegion::create(1, 64).unwrap();
        Arc::new(InflightRegion::map(&file, 0, len, 1, 64).unwrap())
    }

    fn waits<T: std::fmt::Debug + PartialEq>(receiver: &Receiver<T>) {
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
    }

    #[test]
    fn a_stop_waits_for_the_device_and_shows_the_answers() {
        let mut bench = Bench::new(64);
        bench.start();
        bench.disks.manual(true);
        offer(&bench, 0, FREE_SECTOR);
        bench.step();
        let stopped = bench.begin_stop(StopHow::Drain);
        offer(&bench, 1, FREE_SECTOR);
        bench.step();
        waits(&stopped);
        assert_eq!(used(&bench), [0_u32; 0]);
        bench.disks.complete_all();
        bench.step();
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(1), vec![0]));
        assert_eq!((status(&bench, 0), status(&bench, 1)), (0, 0xee));
    }

    #[test]
    fn a_stop_rewinds_the_ring_over_parked_requests() {
        let mut bench = Bench::new(64);
        bench.start();
        fence(&mut bench);
        bench.disks.manual(true);
        offer(&bench, 0, FREE_SECTOR);
        offer(&bench, 1, FENCED_SECTOR);
        offer(&bench, 2, FENCED_SECTOR);
        bench.step();
        assert_eq!((bench.plane.in_flight(), bench.disks.pending_len()), (3, 1));
        let stopped = bench.begin_stop(StopHow::Drain);
        waits(&stopped);
        bench.disks.complete_all();
        bench.disks.manual(false);
        bench.step();
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(1), vec![0]));
        lift(&mut bench);
        assert_eq!(used(&bench), [0_u32; 0], "what was given up never lands");
        bench.set_next_avail(1);
        bench.start();
        bench.step();
        assert_eq!(used(&bench), [1, 2]);
    }

    #[test]
    fn without_a_region_a_stop_waits_for_requests_it_cannot_rewind() {
        let mut bench = Bench::new(64);
        bench.start();
        fence(&mut bench);
        offer(&bench, 0, FENCED_SECTOR);
        offer(&bench, 1, FREE_SECTOR);
        bench.step();
        assert_eq!(used(&bench), [1]);
        let stopped = bench.begin_stop(StopHow::Drain);
        waits(&stopped);
        lift(&mut bench);
        assert_eq!((stopped.try_recv(), used(&bench)), (Ok(2), vec![0]));
    }

    #[test]
    fn with_a_region_they_stay_there_and_are_resubmitted_once() {
        for how in [StopHow::Drain, StopHow::Leave] {
            let region = tracked();
            let mut bench = Bench::new(64);
            bench.start_with(Some(region.clone()));
            fence(&mut bench);
            offer(&bench, 0, FENCED_SECTOR);
            offer(&bench, 1, FREE_SECTOR);
            offer(&bench, 2, FENCED_SECTOR);
            bench.step();
            // Request 2 is the newest: a drain rewinds over it.
            let base = if how == StopHow::Drain { 2 } else { 3 };
            assert_eq!(bench.stop(how), Some(base), "{how:?}");
            lift(&mut bench);
            assert_eq!(used(&bench), [1], "{how:?}");
            bench.set_next_avail(0x1234);
            bench.start_with(Some(region.clone()));
            bench.step();
            assert_eq!(used(&bench), [0, 2], "{how:?}");
            offer(&bench, 3, FREE_SECTOR);
            bench.step();
            assert_eq!(used(&bench), [3], "{how:?}");
            assert_eq!(bench.stop(StopHow::Drain), Some(4), "{how:?}");
        }
    }

    #[test]
    fn a_reset_forgets_what_was_parked() {
        let region = tracked();
        let mut bench = Bench::new(64);
        bench.start_with(Some(region.clone()));
        fence(&mut bench);
        offer(&bench, 0, FENCED_SECTOR);
        bench.step();
        assert_eq!(bench.stop(StopHow::Discard), Some(1));
        lift(&mut bench);
        bench.guest.restart_at(0);
        bench.start_with(Some(region));
        bench.step();
        assert_eq!((used(&bench), status(&bench, 0)), (Vec::new(), 0xee));
    }

    #[test]
    fn memory_goes_when_the_requests_into_it_have_ended() {
        const SECOND: u64 = 0x20_0000;
        let mut bench = Bench::new(64);
        bench.start();
        bench.disks.manual(true);
        offer_read(&bench, 0, FREE_SECTOR, SECOND + 0x1000);
        bench.step();
        let second = RegionAddress { guest: SECOND, user: SECOND, len: SECOND, offset: 0 };
        let (map, gone) = bench.guest.map().without_region(second).unwrap();
        let (done, ended) = channel();
        bench.plane.set_memory(&map, gone, done);
        // Requests elsewhere hold nobody up.
        offer(&bench, 1, FREE_SECTOR);
        bench.step();
        waits(&ended);
        bench.disks.complete(0);
        bench.step();
        assert_eq!((ended.try_recv(), used(&bench), bench.plane.in_flight()), (Ok(()), vec![0], 1));
        bench.disks.manual(false);
        offer_read(&bench, 2, FREE_SECTOR, SECOND + 0x1000);
        bench.step();
        assert_eq!((status(&bench, 0), status(&bench, 2)), (0, 1));
    }

    #[test]
    fn a_ring_without_memory_waits_for_it() {
        let mut bench = Bench::new(64);
        bench.start();
        let (done, ended) = channel();
        bench.plane.set_memory(&MemoryMap::new(), RegionBits(u64::MAX), done.clone());
        offer(&bench, 0, FREE_SECTOR);
        bench.step();
        assert_eq!((ended.try_recv(), used(&bench)), (Ok(()), Vec::new()));
        bench.plane.set_memory(&bench.guest.map(), RegionBits::default(), done);
        bench.step();
        assert_eq!((used(&bench), status(&bench, 0)), (vec![0], 0));
    }

    #[test]
    fn write_through_follows_the_driver() {
        let bench = Bench::new(4);
        let settings = bench.device.settings();
        assert!(!settings.write_through());
        bench.device.write_config(32, &[0]).unwrap();
        assert!(settings.write_through());
        bench.device.write_config(32, &[1]).unwrap();
        bench.device.negotiated(0);
        assert!(settings.write_through(), "a driver that cannot flush");
    }
}
