//! The healer's thread: opens the volume, then drives the healer with a reactor and mailboxes.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::counters::DeviceCounters;
use super::devices::Devices;
use super::eventlog::EventLog;
use super::load::LoadSource;
use super::mailbox::{Inbox, Outbox, mailbox};
use super::worker::Clock;
use crate::device::{Completion, Device, Event, Op, Reactor, Wait};
use crate::engine::healer::{Healer, HealerOut, HealerParams, Order, OrderId, Reply};
use crate::engine::message::{ToHealer, ToShard};
use crate::engine::open::{OpenError, Opening, VolumeFacts};
use crate::engine::view::{Geometry, Progress, View};
use crate::sync::mpsc::{SyncSender, sync_channel};
use crate::sync::thread::{self, JoinHandle};
use crate::units::Time;

const TOKEN_SHARDS: u64 = 0;
const TOKEN_ORDERS: u64 = 1;

/// An order on its way to the healer's thread.
pub enum Command {
    /// Carry it out and send the answer.
    Order(Order, SyncSender<Reply>),
    /// End the thread as soon as no device operation of its own is under way.
    Stop,
}

/// What the thread found when it had opened the volume.
pub struct OpenedVolume {
    /// Fixed facts.
    pub facts: VolumeFacts,
    /// For the shards.
    pub geometry: Geometry,
    /// For the shards.
    pub view: Arc<View>,
    /// Shared with the shards.
    pub progress: Arc<Progress>,
}

/// Why a volume is not served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The volume was refused.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host refused a thread, a ring or a descriptor.
    #[error("{0}")]
    Host(#[from] io::Error),
}

/// A healer's thread and the ways to reach it.
pub struct HealerThread {
    thread: Option<JoinHandle<()>>,
    /// For shards.
    pub shards: Outbox<ToHealer>,
    /// For orders.
    pub orders: Outbox<Command>,
}

/// What the thread needs.
pub struct HealerSetup {
    /// The devices.
    pub devices: Devices,
    /// The script that opens the volume; made on the thread.
    pub opening: Box<dyn FnOnce() -> Opening + Send>,
    /// For the healer.
    pub params: HealerParams,
    /// The volume's clock.
    pub clock: Clock,
    /// Where events go.
    pub log: Arc<EventLog>,
    /// To the shards, in their order.
    pub shards: Vec<Outbox<ToShard>>,
    /// Where it counts.
    pub counters: Arc<DeviceCounters>,
    /// How the guest is served, for the scanner.
    pub load: LoadSource,
}

impl HealerThread {
    /// Start the thread and wait until the volume is open.
    ///
    /// # Errors
    /// When it does not open.
    pub fn start(setup: HealerSetup) -> Result<(HealerThread, OpenedVolume), StartError> {
        let HealerSetup { devices, opening, params, clock, log, shards, counters, load } = setup;
        let reactor = Box::new(move || devices.reactor());
        HealerThread::start_on(reactor, opening, params, Surroundings { clock, log, shards, counters, load })
    }

    /// The same on any reactor, which is made on the thread.
    pub(crate) fn start_on(
        reactor: Box<dyn FnOnce() -> io::Result<Box<dyn Reactor>> + Send>,
        opening: Box<dyn FnOnce() -> Opening + Send>,
        params: HealerParams,
        surroundings: Surroundings,
    ) -> Result<(HealerThread, OpenedVolume), StartError> {
        let (shards, from_shards) = mailbox()?;
        let (orders, from_orders) = mailbox()?;
        let (opened, wait) = sync_channel(1);
        let thread = thread::Builder::new().name("healer".into()).spawn(move || {
            let Surroundings { clock, log, shards, counters, load } = surroundings;
            let (healer, reactor) = match open(reactor, opening, &params, &clock) {
                Ok((healer, facts, reactor)) => {
                    let (geometry, view, progress) = (healer.geometry(), healer.view(), healer.progress());
                    // A receiver that is gone has given up waiting; the thread then ends at its first order.
                    let _ = opened.send(Ok(OpenedVolume { facts, geometry, view, progress }));
                    (healer, reactor)
                }
                Err(error) => {
                    let _ = opened.send(Err(error));
                    return;
                }
            };
            Driver {
                healer,
                reactor,
                clock,
                log,
                shards,
                counters,
                load,
                from_shards,
                from_orders,
                waiting: BTreeMap::new(),
                next_order: 0,
                stopping: false,
            }
            .run();
        })?;
        let opened =
            wait.recv().map_err(|_| io::Error::other("the healer's thread ended before the volume was open"))??;
        Ok((HealerThread { thread: Some(thread), shards, orders }, opened))
    }
}

impl Drop for HealerThread {
    fn drop(&mut self) {
        self.orders.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Driver {
    healer: Healer,
    reactor: Box<dyn Reactor>,
    clock: Clock,
    log: Arc<EventLog>,
    shards: Vec<Outbox<ToShard>>,
    counters: Arc<DeviceCounters>,
    load: LoadSource,
    from_shards: Inbox<ToHealer>,
    from_orders: Inbox<Command>,
    waiting: BTreeMap<OrderId, SyncSender<Reply>>,
    next_order: u64,
    stopping: bool,
}

/// What the healer has to do with beside its devices.
pub(crate) struct Surroundings {
    pub(crate) clock: Clock,
    pub(crate) log: Arc<EventLog>,
    /// In their order.
    pub(crate) shards: Vec<Outbox<ToShard>>,
    pub(crate) counters: Arc<DeviceCounters>,
    /// How the guest is served.
    pub(crate) load: LoadSource,
}

fn open(
    reactor: impl FnOnce() -> io::Result<Box<dyn Reactor>>,
    opening: impl FnOnce() -> Opening,
    params: &HealerParams,
    clock: &Clock,
) -> Result<(Healer, VolumeFacts, Box<dyn Reactor>), StartError> {
    let mut reactor = reactor()?;
    let mut opening = opening();
    drive(&mut *reactor, clock, |now, completions, ops| {
        opening.step(now, completions, ops);
        opening.is_done()
    });
    let (healer, facts) = opening.finish(params)?;
    Ok((healer, facts, reactor))
}

/// Run a script of operations to its end: `step` takes completions, gives operations, and says when it
/// is done.
pub(crate) fn drive(
    reactor: &mut dyn Reactor,
    clock: &Clock,
    mut step: impl FnMut(Time, &[Completion], &mut Vec<Op>) -> bool,
) {
    let mut ops = Vec::new();
    let mut events = Vec::new();
    let mut completions = Vec::new();
    loop {
        let done = step(clock.now(), &completions, &mut ops);
        submit(reactor, &mut ops);
        if done && reactor.in_flight() == 0 {
            return;
        }
        completions.clear();
        reactor.poll(clock.now(), Wait::Forever, &mut events);
        completions.extend(events.drain(..).filter_map(|event| match event {
            Event::Done(completion) => Some(completion),
            Event::Ready(_) => None,
        }));
    }
}

fn submit(reactor: &mut dyn Reactor, ops: &mut Vec<Op>) {
    for op in ops.drain(..) {
        // SAFETY: the engine's table of operations owns the memory of each until it has been told of the
        // completion, and the engine lives as long as the reactor has operations under way.
        unsafe { reactor.submit(op) };
    }
}

impl Driver {
    fn run(mut self) {
        self.reactor.watch(self.from_shards.as_raw_fd(), TOKEN_SHARDS);
        self.reactor.watch(self.from_orders.as_raw_fd(), TOKEN_ORDERS);
        let mut events = Vec::new();
        let mut out = HealerOut::default();
        let mut messages = Vec::new();
        let mut commands = Vec::new();
        // Local time, before a window is looked at.
        self.healer.hear((self.load)(self.clock.now()));
        loop {
            let now = self.clock.now();
            if self.healer.wants_load() {
                self.healer.hear((self.load)(now));
            }
            self.healer.tick(now, &mut out);
            self.carry_out(&mut out);
            if self.stopping && self.healer.in_flight() == 0 {
                return;
            }
            let wait = self.healer.wake_at().map_or(Wait::Forever, Wait::Until);
            self.reactor.poll(self.clock.now(), wait, &mut events);
            let now = self.clock.now();
            for event in events.drain(..) {
                match event {
                    Event::Done(completion) => self.healer.completed(now, completion, &mut out),
                    Event::Ready(TOKEN_SHARDS) => {
                        self.from_shards.drain(&mut messages);
                        messages.drain(..).for_each(|message| self.healer.message(now, message, &mut out));
                    }
                    Event::Ready(_) => {
                        self.from_orders.drain(&mut commands);
                        commands.drain(..).for_each(|command| self.command(now, command, &mut out));
                    }
                }
            }
            self.carry_out(&mut out);
        }
    }

    fn command(&mut self, now: Time, command: Command, out: &mut HealerOut) {
        match command {
            Command::Order(order, reply) => {
                let id = OrderId(self.next_order);
                self.next_order += 1;
                self.waiting.insert(id, reply);
                self.healer.order(now, id, order, out);
            }
            Command::Stop => {
                self.stopping = true;
                self.healer.wind_down();
            }
        }
    }

    fn carry_out(&mut self, out: &mut HealerOut) {
        out.ops.iter().for_each(|op| self.counters.submitted(op));
        submit(&mut *self.reactor, &mut out.ops);
        for (shard, message) in out.to_shards.drain(..) {
            self.shards[shard].send(message);
        }
        out.events.drain(..).for_each(|event| self.log.push(event));
        for (id, reply) in out.replies.drain(..) {
            if let Some(waiting) = self.waiting.remove(&id) {
                // Whoever asked may have stopped waiting.
                let _ = waiting.try_send(reply);
            }
        }
    }
}
