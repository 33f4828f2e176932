//! A worker: takes requests from its queues, drives a shard and its device with them, and answers.
//!
//! [`DataPlane`] is the work itself, one [`DataPlane::turn`] at a time; [`spawn`] runs it on a thread that
//! sleeps on nothing but the reactor and takes [`Command`]s. A worker outlives connections.

use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::chain::{LocalMap, Scatter};
use super::device::Settings;
use super::dirty::MaybeLog;
use super::drive::{Drive, TOKEN_FREE};
use super::memory::{MemoryMap, RegionBits};
use super::polling::Polling;
use super::queue::{Kick, Queue, Stop};
use super::request::{Parsed, S_IOERR, S_OK, parse};
use super::ring::{Head, Ring};
use super::status::WorkerStatus;
use super::thread::spawn_worker;
use super::tokens::{Taken, Tokens};
use crate::device::Wait;
use crate::device::buffer::Iovecs;
use crate::engine::request::{Answer, Request, RequestOp, Status};
use crate::runtime::mailbox::Inbox;
use crate::runtime::worker::{Worker, WorkerPort};
use crate::sync::mpsc::{Sender, channel};
use crate::units::Time;

pub use super::command::Command;
pub use super::queue::{Kick as QueueKick, StartQueue, StopHow};
pub use super::thread::WorkerThread;

/// The reactor's name for the command mailbox and the first kick.
const TOKEN_COMMANDS: u64 = TOKEN_FREE;
const TOKEN_KICKS: u64 = TOKEN_FREE + 1;

/// A worker submits, and shows the driver what has ended, when it has taken half of what a queue has and no less than
/// so many bytes: reads from the page cache end while they are submitted, and a driver that hears of the first ones
/// early prepares the next meanwhile.
const BATCH_BYTES: u64 = 64 << 10;

/// How often queues without a kick eventfd are looked at.
const POLL_INTERVAL_NS: u64 = 1_000_000;

/// Empty scatter lists kept for reuse: more than this many requests at once are rare, and each list holds a
/// few hundred bytes.
pub(super) const POOL_MAX: usize = 1024;

/// A memory change whose requests have not all ended.
struct Removal {
    regions: RegionBits,
    /// Requests with smaller numbers are older than the change.
    before: u64,
    done: Sender<()>,
}

/// A worker's queues and what serves them.
pub struct DataPlane {
    drive: Drive,
    settings: Arc<Settings>,
    status: Arc<WorkerStatus>,
    memory: LocalMap,
    /// Where writes to guest memory are noted, during a live migration.
    log: MaybeLog,
    /// By the queue's number in the device.
    queues: Vec<Option<Box<Queue>>>,
    /// Numbers of the started queues.
    started: Vec<u16>,
    tokens: Tokens,
    polling: Polling,
    removals: Vec<Removal>,
    next_token: u64,
    commands_wait: bool,
    // Buffers used again in every turn.
    scatter: Scatter,
    pool: Vec<Iovecs>,
    ready: Vec<u64>,
}

impl DataPlane {
    /// A worker without queues.
    pub fn new(worker: Worker, settings: Arc<Settings>, status: Arc<WorkerStatus>) -> DataPlane {
        DataPlane {
            polling: Polling::new(worker.polling),
            drive: Drive::new(worker),
            settings,
            status,
            memory: Rc::new(Arc::new(MemoryMap::new())),
            log: None,
            queues: Vec::new(),
            started: Vec::new(),
            tokens: Tokens::new(),
            removals: Vec::new(),
            next_token: TOKEN_KICKS,
            commands_wait: false,
            scatter: Scatter::default(),
            pool: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Start a queue. One that cannot be started is reported and not served.
    pub fn start(&mut self, start: StartQueue) {
        let index = start.index;
        assert!(self.queue(index).is_none(), "queue {index} is started already");
        match Queue::start(&self.memory, start) {
            Ok(mut queue) => {
                self.drive.shard.resume(index);
                self.watch_kick(&mut queue);
                queue.log.clone_from(&self.log);
                if !queue.resubmit.is_empty() {
                    log::info!("queue {index}: {} requests are resubmitted", queue.resubmit.len());
                }
                let number = usize::from(index);
                if self.queues.len() <= number {
                    self.queues.resize_with(number + 1, || None);
                }
                self.queues[number] = Some(Box::new(queue));
                self.started.push(index);
            }
            Err(error) => log::error!("queue {index} is not served: {error}"),
        }
    }

    /// Begin to stop a queue; `reply` gets the place where it goes on (GET_VRING_BASE) when it has stopped. Nothing
    /// comes for a queue that is not started.
    pub fn stop(&mut self, index: u16, how: StopHow, reply: Sender<u32>) {
        let Some(queue) = self.queue(index) else { return };
        if how == StopHow::Discard {
            for head in std::mem::take(&mut queue.resubmit) {
                queue.forget(head);
            }
        }
        queue.stop = Some(Stop { how, withdrawn: Vec::new(), reply });
        self.drive.shard.withdraw(index, &mut self.drive.out);
    }

    /// Look at a queue in the next turn, as after a kick.
    pub fn kick(&mut self, index: u16) {
        if let Some(queue) = self.queue(index) {
            queue.armed = false;
        }
    }

    /// Requests taken and not yet answered.
    pub fn in_flight(&self) -> usize {
        self.tokens.len()
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
        self.removals.push(Removal { regions: removed, before: self.tokens.next_serial(), done });
    }

    /// Note writes to guest memory in `log` from now on, those of requests under way included.
    pub fn set_log(&mut self, log: &MaybeLog) {
        self.log.clone_from(log);
        for queue in self.queues.iter_mut().flatten() {
            queue.log.clone_from(log);
        }
    }

    /// One round: take what is there, submit, wait (if `may_wait` and there is nothing to do), answer.
    pub fn turn(&mut self, may_wait: bool) {
        let now = self.drive.now();
        self.drive.hear_healer(now);
        self.take_all(now);
        self.deliver();
        // Whoever waits for a stop may be the caller itself: no sleep after one.
        let settled = self.settle(now);
        self.deliver();
        self.drive.tell(&self.status, &self.tokens);
        let wait = if settled || !may_wait || self.looks_on(now) || self.arm() { Wait::No } else { self.patience(now) };
        let mut ready = std::mem::take(&mut self.ready);
        self.drive.poll(now, wait, &mut ready);
        for token in ready.drain(..) {
            match token {
                TOKEN_COMMANDS => self.commands_wait = true,
                kick => self.kicked(kick),
            }
        }
        self.ready = ready;
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
            self.drive.watch(fd, queue.token);
        }
    }

    fn unwatch_kick(&mut self, queue: &Queue) {
        if queue.kick_fd().is_some() {
            self.drive.unwatch(queue.token);
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

    /// Take what the drivers offer on queues that may have something.
    fn take_all(&mut self, now: Time) {
        for at in 0..self.started.len() {
            let number = usize::from(self.started[at]);
            let Some(mut queue) = self.queues[number].take() else { continue };
            if queue.is_running() && !queue.armed {
                self.take(&mut queue, now);
            }
            self.queues[number] = Some(queue);
        }
    }

    fn take(&mut self, queue: &mut Queue, now: Time) {
        queue.disarm();
        while let Some(head) = queue.resubmit.pop_front() {
            if queue.take_again(head) {
                self.serve(queue, head, None, now);
            }
        }
        let available = queue.available();
        let mut bytes = 0;
        for taken in 0..available {
            if bytes >= BATCH_BYTES && taken >= available / 2 {
                break;
            }
            let Some((head, position)) = queue.take() else { break };
            bytes += self.serve(queue, head, Some(position), now);
        }
    }

    /// Make a request of a chain, or give the chain back at once. Returns how many bytes are to be moved.
    #[inline]
    fn serve(&mut self, queue: &mut Queue, head: Head, position: Option<u16>, now: Time) -> u64 {
        let chain = match queue.walk(&mut self.scatter, &self.memory, head) {
            Ok(chain) => chain,
            Err(error) => {
                self.drive.reject(&self.status, queue.index, head.id, false, &error.to_string());
                queue.give_back(head, 0);
                return 0;
            }
        };
        let Some(status) = chain.status_byte(&self.memory) else {
            self.drive.reject(&self.status, queue.index, head.id, false, "it has no room for a status");
            queue.give_back(head, 0);
            return 0;
        };
        let regions = chain.regions().union(queue.ring.regions());
        match parse(&chain, &self.drive.disk, &self.drive.shard.progress().reserve, &mut self.pool) {
            Parsed::Done { written } => {
                status.write(S_OK);
                if let Some(log) = &self.log {
                    chain.mark_written(log);
                }
                queue.give_back(head, written);
                0
            }
            Parsed::Refused(refused) => {
                if refused.status == S_IOERR {
                    self.drive.reject(&self.status, queue.index, head.id, true, refused.cause);
                }
                status.write(refused.status);
                if let Some(log) = &self.log {
                    status.mark(None, log);
                }
                queue.give_back(head, 1);
                0
            }
            Parsed::Submit { op, written } => {
                let (operation, queue_index) = (op.operation(), queue.index);
                let taken =
                    Taken { operation, queue: queue_index, head, position, status, written, started: now, regions };
                let request = Request {
                    token: self.tokens.insert(taken),
                    queue: queue.index,
                    write_through: self.settings.write_through(),
                    op,
                };
                let bytes = match &request.op {
                    RequestOp::Read { range, .. } | RequestOp::Write { range, .. } => range.bytes(),
                    _ => 0,
                };
                self.drive.shard.submit(now, request, &mut self.drive.out);
                bytes
            }
        }
    }

    /// Carry out what the shard asked for, then show the drivers their answers.
    fn deliver(&mut self) {
        self.drive.carry_out();
        let mut answers = std::mem::take(&mut self.drive.out.answers);
        for answer in answers.drain(..) {
            self.answer(answer);
        }
        self.drive.out.answers = answers;
        let mut withdrawn = std::mem::take(&mut self.drive.out.withdrawn);
        for request in withdrawn.drain(..) {
            let stop = self.queue(request.queue).and_then(|queue| queue.stop.as_mut());
            stop.expect("requests are withdrawn for a queue that stops").withdrawn.push(request);
        }
        self.drive.out.withdrawn = withdrawn;
        for index in &self.started {
            if let Some(queue) = self.queues[usize::from(*index)].as_mut() {
                queue.publish();
            }
        }
    }

    #[inline]
    fn answer(&mut self, answer: Answer) {
        let taken = self.tokens.remove(answer.request.token);
        self.drive.count(&answer, &taken);
        let (value, written) = match answer.status {
            Status::Ok => (S_OK, taken.written),
            Status::IoErr => (S_IOERR, 1),
        };
        taken.status.write(value);
        if let Some(log) = &self.log {
            // What a read that failed has left in its buffers is the guest's to see, too.
            let data = match &answer.request.op {
                RequestOp::Read { data, .. } => Some(data),
                _ => None,
            };
            taken.status.mark(data, log);
        }
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
            let number = usize::from(index);
            if self.queues[number].as_ref().is_none_or(|queue| queue.stop.is_none())
                || self.drive.shard.unanswered(index) > 0
            {
                at += 1;
                continue;
            }
            let mut queue = self.queues[number].take().expect("just seen");
            settled = true;
            if self.dispose_of_withdrawn(&mut queue, now) {
                self.queues[number] = Some(queue);
                at += 1;
            } else {
                self.started.remove(at);
                self.finish_stop(*queue);
            }
        }
        let tokens = &self.tokens;
        self.removals.retain(|removal| {
            let busy = tokens.touch(removal.regions, removal.before);
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
        if matches!(how, StopHow::Drain | StopHow::Suspend) {
            self.rewind(queue, &mut withdrawn);
            // A guest that is migrated takes its memory along, and the in-flight region only if that was agreed upon.
            let is_left_behind = queue.is_tracked() && (how == StopHow::Suspend || self.log.is_none());
            if !is_left_behind && !withdrawn.is_empty() {
                self.drive.shard.finish(queue.index, &mut self.drive.out);
                for request in withdrawn {
                    self.drive.shard.submit(now, request, &mut self.drive.out);
                }
                return true;
            }
        }
        for request in withdrawn {
            let taken = self.tokens.remove(request.token);
            if how == StopHow::Discard {
                queue.forget(taken.head);
            }
        }
        false
    }

    /// Take back the last requests that the driver offered, as if they had never been taken: as long as the newest
    /// one is among `withdrawn`. The others stay in the list, oldest first.
    fn rewind(&mut self, queue: &mut Queue, withdrawn: &mut Vec<Request>) {
        // How far back a request begins, and how far it reaches; those from the in-flight region have no place and are
        // never rewound.
        let extent = |tokens: &Tokens, ring: &Ring, request: &Request| {
            let taken = tokens.taken(request.token)?;
            Some((ring.ahead_of(taken.position?), taken.head.len))
        };
        withdrawn.sort_by_key(|request| match extent(&self.tokens, &queue.ring, request) {
            Some((back, _)) => std::cmp::Reverse(u32::from(back)),
            None => std::cmp::Reverse(u32::MAX),
        });
        while let Some(request) = withdrawn.last() {
            if extent(&self.tokens, &queue.ring, request).is_none_or(|(back, len)| back != len) {
                break;
            }
            let taken = self.tokens.remove(request.token);
            queue.forget(taken.head);
            queue.ring.set_next_avail(taken.position.expect("it has an extent"));
            withdrawn.pop();
        }
    }

    fn finish_stop(&mut self, mut queue: Queue) {
        queue.publish();
        self.unwatch_kick(&queue);
        let stop = queue.stop.take().expect("only stopping queues come here");
        // The asker may have gone; nothing is to be done about that.
        let _ = stop.reply.send(queue.ring.base());
    }

    /// Ask the drivers to kick. Returns whether there is something to take instead of waiting.
    fn arm(&mut self) -> bool {
        let mut more = false;
        for index in &self.started {
            let Some(queue) = self.queues[usize::from(*index)].as_mut() else { continue };
            if queue.is_running() && !queue.armed {
                queue.armed = !queue.arm();
                more |= !queue.armed;
            }
        }
        more || self.drive.healer_wrote() || self.commands_wait
    }

    /// Whether to look at the rings again without asking the drivers to kick.
    fn looks_on(&mut self, now: Time) -> bool {
        let looks_on = self.polling.goes_on(now, (self.tokens.next_serial(), self.tokens.len()));
        if looks_on {
            std::hint::spin_loop();
        }
        looks_on
    }

    /// How long to sleep.
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
            Command::DirtyLog { log, done } => {
                self.set_log(&log);
                // The asker may have gone; nothing is to be done about that.
                let _ = done.send(());
            }
            Command::Exit => return false,
        }
        true
    }

    fn replace_kick(&mut self, index: u16, kick: Kick) {
        let number = usize::from(index);
        if let Some(mut queue) = self.queues.get_mut(number).and_then(Option::take) {
            self.unwatch_kick(&queue);
            queue.kick = kick;
            self.watch_kick(&mut queue);
            self.queues[number] = Some(queue);
        }
    }

    fn run(mut self, mut commands: Inbox<Command>) {
        self.drive.watch(commands.as_raw_fd(), TOKEN_COMMANDS);
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
            return;
        }
        let (reply, _) = channel();
        for index in self.started.clone() {
            self.stop(index, StopHow::Leave, reply.clone());
        }
        while self.drive.in_flight() > 0 || !self.started.is_empty() {
            self.turn(true);
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
) -> io::Result<WorkerThread<Command>> {
    spawn_worker(index, port, Command::Exit, move |worker, commands| {
        DataPlane::new(worker, settings, status).run(commands);
    })
}

#[cfg(test)]
mod tests;
