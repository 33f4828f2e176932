//! The requests a worker has taken and not yet answered.

use super::chain::StatusByte;
use super::memory::RegionBits;
use super::ring::Head;
use crate::engine::request::{Operation, Token};
use crate::units::Time;

/// No entry: the end of a list.
const NONE: u32 = u32::MAX;
/// Requests looked at for the oldest of each kind; there may be thousands in front of the one.
const LOOKED_AT_MAX: usize = 64;

/// A request taken from a queue.
#[derive(Debug)]
pub(crate) struct Taken {
    /// What it asks for.
    pub(crate) operation: Operation,
    /// Queue of the device.
    pub(crate) queue: u16,
    /// Its chain.
    pub(crate) head: Head,
    /// Its place in what the driver offered; `None` where it was found in the in-flight region.
    pub(crate) position: Option<u16>,
    /// Where its status goes.
    pub(crate) status: StatusByte,
    /// The used length if it ends well.
    pub(crate) written: u32,
    /// When it was taken.
    pub(crate) started: Time,
    /// Regions that it, or its ring, lies in.
    pub(crate) regions: RegionBits,
}

#[derive(Debug)]
struct Entry {
    taken: Option<Taken>,
    serial: u64,
    previous: u32,
    next: u32,
}

/// A table of requests by token, which also knows their order.
#[derive(Debug)]
pub(crate) struct Tokens {
    entries: Vec<Entry>,
    free: u32,
    oldest: u32,
    newest: u32,
    /// By kind.
    len: [u32; Operation::COUNT],
    serial: u64,
}

impl Tokens {
    pub(crate) fn new() -> Tokens {
        Tokens { entries: Vec::new(), free: NONE, oldest: NONE, newest: NONE, len: [0; Operation::COUNT], serial: 0 }
    }

    /// Requests in the table.
    pub(crate) fn len(&self) -> usize {
        self.len.iter().map(|len| usize::try_from(*len).expect("32 bits fit in a usize")).sum()
    }

    /// Number that the next request gets: those in the table have smaller ones.
    pub(crate) fn next_serial(&self) -> u64 {
        self.serial
    }

    /// By kind: requests in the table, and when the oldest was taken. That of a kind which comes far behind others is
    /// known once those have ended.
    #[inline]
    pub(crate) fn under_way(&self) -> [(u32, Option<Time>); Operation::COUNT] {
        let mut under_way = self.len.map(|len| (len, None));
        let mut missing = self.len.iter().filter(|len| **len > 0).count();
        let mut at = self.oldest;
        for _ in 0..LOOKED_AT_MAX {
            let Some(entry) = self.get(at).filter(|_| missing > 0) else { break };
            if let Some(taken) = &entry.taken {
                let oldest = &mut under_way[taken.operation.index()].1;
                missing -= usize::from(oldest.is_none());
                oldest.get_or_insert(taken.started);
            }
            at = entry.next;
        }
        under_way
    }

    /// Add a request.
    #[inline]
    pub(crate) fn insert(&mut self, taken: Taken) -> Token {
        // Bounded as the table is.
        let len = &mut self.len[taken.operation.index()];
        *len = len.wrapping_add(1);
        let index = if self.free == NONE {
            // Bounded by the sizes of all queues: a head is taken once.
            self.entries.push(Entry { taken: None, serial: 0, previous: NONE, next: NONE });
            u32::try_from(self.entries.len() - 1).expect("64 queues of 32768 entries fit")
        } else {
            let index = self.free;
            self.free = self.at(index).next;
            index
        };
        let (serial, newest) = (self.serial, self.newest);
        *self.at(index) = Entry { taken: Some(taken), serial, previous: newest, next: NONE };
        self.link(newest, |entry| &mut entry.next, index);
        self.newest = index;
        if self.oldest == NONE {
            self.oldest = index;
        }
        self.serial += 1;
        Token(index)
    }

    /// Take a request out.
    ///
    /// # Panics
    /// If there is none of that token: the engine answers once.
    #[inline]
    pub(crate) fn remove(&mut self, token: Token) -> Taken {
        let free = self.free;
        let entry = self.at(token.0);
        let taken = entry.taken.take().expect("the engine answers each request once");
        let (previous, next) = (entry.previous, entry.next);
        entry.next = free;
        self.free = token.0;
        self.link(previous, |entry| &mut entry.next, next);
        self.link(next, |entry| &mut entry.previous, previous);
        if self.oldest == token.0 {
            self.oldest = next;
        }
        if self.newest == token.0 {
            self.newest = previous;
        }
        let len = &mut self.len[taken.operation.index()];
        *len = len.wrapping_sub(1);
        taken
    }

    /// The request of that token.
    pub(crate) fn taken(&self, token: Token) -> Option<&Taken> {
        self.get(token.0)?.taken.as_ref()
    }

    /// Whether a request older than number `before` touches one of `regions`.
    pub(crate) fn touch(&self, regions: RegionBits, before: u64) -> bool {
        let mut at = self.oldest;
        while let Some(entry) = self.get(at).filter(|entry| entry.serial < before) {
            if entry.taken.as_ref().is_some_and(|taken| taken.regions.intersects(regions)) {
                return true;
            }
            at = entry.next;
        }
        false
    }

    fn get(&self, index: u32) -> Option<&Entry> {
        self.entries.get(usize::try_from(index).ok()?)
    }

    fn at(&mut self, index: u32) -> &mut Entry {
        &mut self.entries[usize::try_from(index).expect("32 bits fit in a usize")]
    }

    fn link(&mut self, index: u32, field: impl FnOnce(&mut Entry) -> &mut u32, to: u32) {
        if index != NONE {
            *field(self.at(index)) = to;
        }
    }
}
