//! What moves a worker's shard along: the device it submits to and its mailboxes to and from the healer.

use std::os::fd::RawFd;
use std::sync::Arc;

use crate::device::{Event as DeviceEvent, Reactor, Wait};
use crate::engine::event::{Event, EventKind, Severity};
use crate::engine::message::{ToHealer, ToShard};
use crate::engine::request::{Answer, RequestOp, Status};
use crate::engine::shard::{Shard, ShardOut};
use crate::runtime::counters::WorkerCounters;
use crate::runtime::eventlog::EventLog;
use crate::runtime::mailbox::{Inbox, Outbox};
use crate::runtime::worker::{Clock, DiskInfo, Worker};
use crate::units::{SectorRange, Time};
use crate::vhost::status::WorkerStatus;
use crate::vhost::tokens::{Taken, Tokens};

/// The reactor's name for the healer's mailbox.
const TOKEN_HEALER: u64 = 0;
/// The first name that is free for others.
pub(crate) const TOKEN_FREE: u64 = 1;

/// A shard and all it works with, on the thread of its worker.
pub(crate) struct Drive {
    pub(crate) shard: Shard,
    /// What the shard asked for since the last [`Drive::carry_out`]; answers and withdrawn requests are for the
    /// worker to take.
    pub(crate) out: ShardOut,
    pub(crate) disk: Arc<DiskInfo>,
    reactor: Box<dyn Reactor>,
    inbox: Inbox<ToShard>,
    healer: Outbox<ToHealer>,
    clock: Clock,
    /// As last read: once when a turn begins, once when the device has been waited for.
    latest: Time,
    log: Arc<EventLog>,
    counters: Arc<WorkerCounters>,
    healer_wrote: bool,
    // Buffers used again in every turn.
    events: Vec<DeviceEvent>,
    messages: Vec<ToShard>,
}

impl Drive {
    pub(crate) fn new(worker: Worker) -> Drive {
        let Worker { shard, mut reactor, inbox, healer, clock, disk, log, counters, polling: _ } = worker;
        reactor.watch(inbox.as_raw_fd(), TOKEN_HEALER);
        Drive {
            shard,
            out: ShardOut::default(),
            disk,
            reactor,
            inbox,
            healer,
            clock,
            latest: clock.now(),
            log,
            counters,
            healer_wrote: true,
            events: Vec::new(),
            messages: Vec::new(),
        }
    }

    /// Read the clock.
    pub(crate) fn now(&mut self) -> Time {
        self.latest = self.clock.now();
        self.latest
    }

    /// Count a request that is answered.
    #[inline]
    pub(crate) fn count(&self, answer: &Answer, taken: &Taken) {
        let took_ns = self.latest.since_ns(taken.started);
        let bytes = match (&answer.request.op, answer.status) {
            (_, Status::IoErr) => None,
            // What matters first.
            (RequestOp::Read { data, .. } | RequestOp::Write { data, .. }, Status::Ok) => Some(data.len() as u64),
            (op, Status::Ok) => Some(op.bytes()),
        };
        self.counters.answered(taken.operation, took_ns, bytes);
    }

    /// Tell what is under way.
    #[inline]
    pub(crate) fn tell(&self, status: &WorkerStatus, tokens: &Tokens) {
        let under_way = tokens.under_way();
        self.counters.set_under_way(&under_way);
        let oldest = under_way.iter().filter_map(|(_, start)| *start).min();
        status.set(tokens.len(), oldest);
    }

    /// Count and report a request that was answered with an error before the engine saw it (P1), or a chain that
    /// was no request at all.
    #[cold]
    pub(crate) fn reject(&self, status: &WorkerStatus, queue: u16, head: u16, got_error: bool, cause: &str) {
        status.count_malformed();
        let (kind, action) = match got_error {
            true => (EventKind::GuestError, "the guest's request failed"),
            false => (EventKind::Malformed, "its chain was given back unread"),
        };
        self.log.push(Event {
            time: self.clock.now(),
            severity: Severity::Warn,
            kind,
            device: None,
            range: SectorRange::default(),
            cause: format!("queue {queue}, descriptor {head}: {cause}"),
            action: action.to_owned(),
        });
    }

    /// Have [`Drive::poll`] say `token` when `fd` is readable.
    pub(crate) fn watch(&mut self, fd: RawFd, token: u64) {
        self.reactor.watch(fd, token);
    }

    pub(crate) fn unwatch(&mut self, token: u64) {
        self.reactor.unwatch(token);
    }

    /// Operations that the device has not returned.
    pub(crate) fn in_flight(&self) -> usize {
        self.reactor.in_flight()
    }

    /// Whether the healer has sent something that the shard has not heard.
    pub(crate) fn healer_wrote(&self) -> bool {
        self.healer_wrote
    }

    /// Let the shard hear what the healer has sent.
    pub(crate) fn hear_healer(&mut self, now: Time) {
        if !std::mem::take(&mut self.healer_wrote) {
            return;
        }
        self.inbox.drain(&mut self.messages);
        for message in self.messages.drain(..) {
            self.shard.message(now, message, &mut self.out);
        }
    }

    /// Submit the shard's operations and send its messages.
    pub(crate) fn carry_out(&mut self) {
        for op in self.out.ops.drain(..) {
            self.counters.devices.submitted(&op);
            // SAFETY: an operation of the shard borrows memory of the request it belongs to (guest memory, which
            // the request's scatter list owns a reference to, and that list itself) or of a buffer beside it. The
            // shard keeps both until it has seen the operation's completion, the worker keeps the shard until
            // the device has returned everything (its Drop, and ours where it failed), and what the guest does
            // with its memory meanwhile is the guest's affair.
            unsafe { self.reactor.submit(op) };
        }
        for message in self.out.to_healer.drain(..) {
            self.healer.send(message);
        }
    }

    /// Submit and wait; tell the shard what has ended, and add the names of what is readable to `ready`.
    pub(crate) fn poll(&mut self, now: Time, wait: Wait, ready: &mut Vec<u64>) {
        self.reactor.poll(now, wait, &mut self.events);
        let now = self.clock.now();
        self.latest = now;
        for event in self.events.drain(..) {
            match event {
                DeviceEvent::Done(completion) => self.shard.completed(now, completion, &mut self.out),
                DeviceEvent::Ready(TOKEN_HEALER) => self.healer_wrote = true,
                DeviceEvent::Ready(token) => ready.push(token),
            }
        }
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        if std::thread::panicking() && self.reactor.in_flight() > 0 {
            // Unwinding would free memory under the kernel's hands.
            log::error!("a worker failed with requests under way");
            std::process::abort();
        }
    }
}
