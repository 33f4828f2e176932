//! A worker of the framework's transport: takes chains out of vrings, drives a shard with what they ask for, and
//! answers.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use vhost_user_backend::{VringRwLock, VringState, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::Wait;
use crate::device::buffer::Iovecs;
use crate::engine::request::{Answer, Request, RequestOp, Status};
use crate::runtime::mailbox::Inbox;
use crate::runtime::worker::Worker;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::mpsc::{Sender, channel};
use crate::units::Time;
use crate::vhost::chain::{LocalMap, Scatter};
use crate::vhost::device::Settings;
use crate::vhost::drive::{Drive, TOKEN_FREE};
use crate::vhost::memory::{MemoryMap, RegionBits};
use crate::vhost::queue::HeadSet;
use crate::vhost::request::{Parsed, S_IOERR, S_OK, parse};
use crate::vhost::ring::{Descriptor, Head};
use crate::vhost::status::WorkerStatus;
use crate::vhost::tokens::{Taken, Tokens};
use crate::vhost::worker::{POOL_MAX, StopHow};

/// The reactor's name for the mailbox of orders.
const TOKEN_ORDERS: u64 = TOKEN_FREE;

/// A vring of one connection, shared between the daemon's thread that hears its kicks and the lane.
pub(super) struct Vring {
    /// Its number in the device.
    pub(super) number: u16,
    pub(super) vring: VringRwLock,
    pub(super) memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// The lane has been told to look and has not yet done so.
    pub(super) kicked: AtomicBool,
}

/// What a lane is asked for.
pub(super) enum Order {
    /// There may be something in the vring.
    Look(Arc<Vring>),
    /// Stop a queue; `reply` gets word when none of its requests is under way.
    Stop { queue: u16, how: StopHow, reply: Sender<()> },
    /// End the thread.
    Exit,
}

/// A vring that the lane has been told of.
struct Queue {
    vring: Arc<Vring>,
    heads: HeadSet,
    /// There may be something to take.
    look: bool,
    broken: bool,
    /// Chains were given back since the driver was last notified.
    given_back: bool,
    /// Who waits for it to stop.
    stops: Vec<Sender<()>>,
}

/// The queues of one thread and the shard that serves them.
pub(super) struct Lane {
    drive: Drive,
    settings: Arc<Settings>,
    status: Arc<WorkerStatus>,
    queues: BTreeMap<u16, Queue>,
    tokens: Tokens,
    /// The memory last looked at, in our words.
    memory: Option<(Arc<GuestMemoryMmap>, LocalMap)>,
    orders_wait: bool,
    // Buffers used again in every turn.
    scatter: Scatter,
    pool: Vec<Iovecs>,
    ready: Vec<u64>,
}

impl Lane {
    pub(super) fn new(worker: Worker, settings: Arc<Settings>, status: Arc<WorkerStatus>) -> Lane {
        Lane {
            drive: Drive::new(worker),
            settings,
            status,
            queues: BTreeMap::new(),
            tokens: Tokens::new(),
            memory: None,
            orders_wait: true,
            scatter: Scatter::default(),
            pool: Vec::new(),
            ready: Vec::new(),
        }
    }

    /// Take orders until told to exit.
    pub(super) fn run(mut self, mut inbox: Inbox<Order>) {
        self.drive.watch(inbox.as_raw_fd(), TOKEN_ORDERS);
        let mut orders = Vec::new();
        loop {
            if std::mem::take(&mut self.orders_wait) {
                inbox.drain(&mut orders);
                for order in orders.drain(..) {
                    match order {
                        Order::Look(vring) => self.look(vring),
                        Order::Stop { queue, how, reply } => self.stop(queue, how, reply),
                        Order::Exit => return,
                    }
                }
            }
            self.turn();
        }
    }

    fn look(&mut self, vring: Arc<Vring>) {
        // Cleared first: a kick that comes while the queue is looked at sends another order.
        vring.kicked.store(false, Ordering::Release);
        let shard = &mut self.drive.shard;
        let queue = self.queues.entry(vring.number).or_insert_with(|| {
            shard.resume(vring.number);
            let heads = HeadSet::new(u32::from(crate::vhost::QUEUE_SIZE_MAX));
            Queue { vring, heads, look: false, broken: false, given_back: false, stops: Vec::new() }
        });
        queue.look = true;
    }

    fn stop(&mut self, number: u16, how: StopHow, reply: Sender<()>) {
        let Some(queue) = self.queues.get_mut(&number) else {
            // The asker may have gone; nothing is to be done about that.
            let _ = reply.send(());
            return;
        };
        queue.stops.push(reply);
        // Nothing remembers requests that were given up, so GET_VRING_BASE waits for them.
        match how {
            StopHow::Drain | StopHow::Suspend => self.drive.shard.finish(number, &mut self.drive.out),
            StopHow::Leave | StopHow::Discard => self.drive.shard.withdraw(number, &mut self.drive.out),
        }
    }

    /// One round: take what is there, submit, wait if there is nothing to do, answer.
    fn turn(&mut self) {
        let now = self.drive.now();
        self.drive.hear_healer(now);
        self.take_all(now);
        self.deliver();
        // Whoever waits for a stop may be the caller itself: no sleep after one.
        let settled = self.settle();
        self.drive.tell(&self.status, &self.tokens);
        let busy = settled || self.drive.healer_wrote() || self.queues.values().any(|queue| queue.look);
        let mut ready = std::mem::take(&mut self.ready);
        self.drive.poll(now, if busy { Wait::No } else { Wait::Forever }, &mut ready);
        self.orders_wait |= ready.contains(&TOKEN_ORDERS);
        ready.clear();
        self.ready = ready;
        self.deliver();
    }

    fn take_all(&mut self, now: Time) {
        let numbers: Vec<u16> = self.queues.iter().filter(|(_, queue)| queue.look).map(|(number, _)| *number).collect();
        for number in numbers {
            let mut queue = self.queues.remove(&number).expect("just seen");
            queue.look = false;
            if !queue.broken
                && queue.stops.is_empty()
                && let Err(reason) = self.take(&mut queue, now)
            {
                queue.broken = true;
                log::warn!("queue {number} is broken until it is restarted: {reason}");
            }
            self.queues.insert(number, queue);
        }
    }

    /// Take what the driver offers. The vring is locked meanwhile, so that whoever has marked it as not ready
    /// knows that nothing is taken afterwards.
    ///
    /// # Errors
    /// When what the driver writes makes no sense.
    fn take(&mut self, queue: &mut Queue, now: Time) -> Result<(), String> {
        let memory = queue.vring.memory.memory().into_inner();
        let map = self.map_of(&memory);
        let shared = queue.vring.clone();
        let mut vring = shared.vring.get_mut();
        if !vring.is_enabled() || !vring.get_queue().ready() {
            return Ok(());
        }
        if !vring.get_queue().is_valid(&*memory) {
            return Err("the ring is not in guest memory".into());
        }
        let said = |error: virtio_queue::Error| error.to_string();
        vring.get_queue_mut().disable_notification(&*memory).map_err(said)?;
        for _ in 0..vring.get_queue().size() {
            let Some(chain) = vring.get_queue_mut().iter(&*memory).map_err(said)?.next() else { break };
            if let Err(reason) = self.serve(queue, &mut vring, chain, &map, now) {
                vring.get_queue_mut().go_to_previous_position();
                return Err(reason);
            }
        }
        queue.look = vring.get_queue_mut().enable_notification(&*memory).map_err(said)?;
        Ok(())
    }

    fn map_of(&mut self, memory: &Arc<GuestMemoryMmap>) -> LocalMap {
        if let Some((known, map)) = &self.memory
            && Arc::ptr_eq(known, memory)
        {
            return map.clone();
        }
        let map: LocalMap = Rc::new(Arc::new(MemoryMap::of_guest_memory(memory)));
        self.memory = Some((memory.clone(), map.clone()));
        map
    }

    /// Make a request of a chain, or give the chain back at once.
    fn serve(
        &mut self,
        queue: &mut Queue,
        vring: &mut VringState,
        chain: DescriptorChain<&GuestMemoryMmap>,
        map: &LocalMap,
        now: Time,
    ) -> Result<(), String> {
        let (head, number, size) = (chain.head_index(), queue.vring.number, vring.get_queue().size());
        if head >= size {
            return Err(format!("the driver offers descriptor {head} of {size}"));
        }
        if !queue.heads.insert(head) {
            return Err(format!("the driver offers descriptor {head} while the device holds it"));
        }
        let descriptors =
            chain.map(|it| Descriptor { addr: it.addr().0, len: it.len(), flags: it.flags(), next: it.next() });
        let chain = match self.scatter.gather(descriptors, map) {
            Ok(chain) => chain,
            Err(error) => {
                self.drive.reject(&self.status, number, head, false, &error.to_string());
                queue.give_back(vring, head, 0);
                return Ok(());
            }
        };
        let Some(status) = chain.status_byte(map) else {
            self.drive.reject(&self.status, number, head, false, "it has no room for a status");
            queue.give_back(vring, head, 0);
            return Ok(());
        };
        match parse(&chain, &self.drive.disk, &self.drive.shard.progress().reserve, &mut self.pool) {
            Parsed::Done { written } => {
                status.write(S_OK);
                queue.give_back(vring, head, written);
            }
            Parsed::Refused(refused) => {
                if refused.status == S_IOERR {
                    self.drive.reject(&self.status, number, head, true, refused.cause);
                }
                status.write(refused.status);
                queue.give_back(vring, head, 1);
            }
            Parsed::Submit { op, written } => {
                let regions = RegionBits::default();
                let head = Head::of_split(head);
                let (operation, position) = (op.operation(), None);
                let taken = Taken { operation, queue: number, head, position, status, written, started: now, regions };
                let token = self.tokens.insert(taken);
                let request = Request { token, queue: number, write_through: self.settings.write_through(), op };
                self.drive.shard.submit(now, request, &mut self.drive.out);
            }
        }
        Ok(())
    }

    /// Carry out what the shard asked for, then show the drivers their answers.
    fn deliver(&mut self) {
        self.drive.carry_out();
        let mut answers = std::mem::take(&mut self.drive.out.answers);
        for answer in answers.drain(..) {
            self.answer(answer);
        }
        self.drive.out.answers = answers;
        for request in self.drive.out.withdrawn.drain(..) {
            self.tokens.remove(request.token);
        }
        for queue in self.queues.values_mut().filter(|queue| queue.given_back) {
            queue.notify();
        }
    }

    fn answer(&mut self, answer: Answer) {
        let taken = self.tokens.remove(answer.request.token);
        self.drive.count(&answer, &taken);
        let (value, written) = match answer.status {
            Status::Ok => (S_OK, taken.written),
            Status::IoErr => (S_IOERR, 1),
        };
        taken.status.write(value);
        let queue = self.queues.get_mut(&taken.queue).expect("a queue stops only after its last answer");
        let shared = queue.vring.clone();
        queue.give_back(&mut shared.vring.get_mut(), taken.head.id, written);
        if let RequestOp::Read { mut data, .. } | RequestOp::Write { mut data, .. } = answer.request.op
            && self.pool.len() < POOL_MAX
        {
            data.clear();
            self.pool.push(data);
        }
    }

    /// Let go of queues that are to stop and have no request under way. Returns whether there were any.
    fn settle(&mut self) -> bool {
        let (shard, mut stopped) = (&self.drive.shard, Vec::new());
        self.queues.retain(|number, queue| {
            let stops = !queue.stops.is_empty() && shard.unanswered(*number) == 0;
            if stops {
                stopped.append(&mut queue.stops);
            }
            !stops
        });
        if self.queues.is_empty() {
            self.memory = None;
        }
        for reply in &stopped {
            // The asker may have gone; nothing is to be done about that.
            let _ = reply.send(());
        }
        !stopped.is_empty()
    }
}

impl Queue {
    /// Give a chain back; the driver is told with [`Queue::notify`].
    fn give_back(&mut self, vring: &mut VringState, head: u16, len: u32) {
        self.heads.remove(head);
        self.given_back = true;
        if let Err(error) = vring.add_used(head, len) {
            // Its memory has gone while the request was under way.
            log::debug!("queue {}: chain {head} cannot be given back: {error}", self.vring.number);
        }
    }

    /// Notify the driver, if it wants to be.
    fn notify(&mut self) {
        self.given_back = false;
        let mut vring = self.vring.vring.get_mut();
        if vring.needs_notification().unwrap_or(true) {
            // A full counter (EAGAIN) is a notification that is already there.
            let _ = vring.signal_used_queue();
        }
    }
}

impl Drop for Lane {
    /// The device holds addresses of requests: nothing is freed before it has returned them (O4).
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let (reply, _) = channel();
        for number in self.queues.keys().copied().collect::<Vec<_>>() {
            self.stop(number, StopHow::Leave, reply.clone());
        }
        while self.drive.in_flight() > 0 || !self.queues.is_empty() {
            self.turn();
        }
    }
}
