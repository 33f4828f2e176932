//! Watched file descriptors, by epoll.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

use super::{Event, Wait};
use crate::sync;
use crate::units::Time;

/// Most descriptors reported by one call; the others follow in the next.
const BATCH: usize = 64;

const NS_PER_MS: u64 = 1_000_000;

/// A set of watched descriptors and the wait for them.
pub(super) struct Watches {
    epoll: OwnedFd,
    /// Descriptor and token by place; the place is what epoll carries.
    places: Vec<Option<(RawFd, u64)>>,
    ready: Vec<epoll::Event>,
}

impl Watches {
    pub(super) fn new() -> io::Result<Watches> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        Ok(Watches { epoll, places: Vec::new(), ready: Vec::with_capacity(BATCH) })
    }

    /// Report `token` each time `fd` becomes readable, and now if it is.
    pub(super) fn watch(&mut self, fd: RawFd, token: u64) {
        let place = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        self.places[place] = Some((fd, token));
        let data = EventData::new_u64(u64::try_from(place).expect("usize is at most 64 bits wide"));
        // SAFETY: the contract of `Reactor::watch` has the caller keep the descriptor open.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        // Edge triggered: an eventfd then need not be read, and tells each of its writes.
        epoll::add(&self.epoll, fd, data, EventFlags::IN | EventFlags::ET)
            .expect("only a descriptor that is closed, watched already or not pollable is refused");
    }

    pub(super) fn unwatch(&mut self, token: u64) {
        for place in &mut self.places {
            if let Some((fd, _)) = place.take_if(|(_, watched)| *watched == token) {
                // SAFETY: the contract of `Reactor::watch` has the caller keep the descriptor open until now.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                epoll::delete(&self.epoll, fd).expect("it was added and is still open");
            }
        }
    }

    /// Wait as told for one of the descriptors and append what became readable.
    pub(super) fn wait(&mut self, now: Time, wait: Wait, events: &mut Vec<Event>) {
        let timeout = match wait {
            Wait::No => Some(Timespec { tv_sec: 0, tv_nsec: 0 }),
            Wait::Until(until) => Some(timeout(until.since_ns(now))),
            Wait::Forever => None,
        };
        self.ready.clear();
        match sync::wait(self.epoll.as_fd(), timeout.as_ref(), &mut self.ready) {
            Ok(()) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => unreachable!("an epoll descriptor of ours cannot fail to wait: {errno}"),
        }
        for event in &self.ready {
            let place = usize::try_from(event.data.u64()).expect("a place was put in");
            if let Some((_, token)) = self.places[place] {
                events.push(Event::Ready(token));
            }
        }
    }
}

/// Rounded up to milliseconds: what epoll_pwait takes, where sandboxes forbid epoll_pwait2.
fn timeout(ns: u64) -> Timespec {
    // A day is as good as any longer time: waits may end early.
    let ms = ns.div_ceil(NS_PER_MS).min(86_400_000);
    let tv_sec = i64::try_from(ms / 1000).expect("at most a day");
    let tv_nsec = i64::try_from(ms % 1000 * NS_PER_MS).expect("below a second");
    Timespec { tv_sec, tv_nsec }
}
