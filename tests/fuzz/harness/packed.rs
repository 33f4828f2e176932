//! Packed rings (virtio 1.3 §2.8), read and written a second time, independently of the program. A place is an index
//! with the wrap counter above it.

use super::guest::{Guest, Offered, Ring};
use super::world::Queue;

const NEXT: u16 = 1;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const WRAP: u16 = 1 << 15;

/// Where drivers begin.
pub(crate) const START: u16 = WRAP;

/// So many descriptors further.
pub(crate) fn plus(place: u16, count: u16, size: u16) -> u16 {
    (0..count).fold(place, |place, _| {
        let next = (place & !WRAP) + 1;
        if next == size { (place & WRAP) ^ WRAP } else { (place & WRAP) | next }
    })
}

/// Descriptors from `start` to `end`; more than there are where neither lap leads from one to the other.
pub(crate) fn since(end: u16, start: u16, size: u16) -> u16 {
    (0..=size).find(|count| plus(start, *count, size) == end).unwrap_or(size + 1)
}

/// The ring's flags in a descriptor that a driver has made available, and in one that a device has used.
fn available(place: u16) -> u16 {
    if place & WRAP != 0 { AVAIL } else { USED }
}

fn used(place: u16) -> u16 {
    if place & WRAP != 0 { AVAIL | USED } else { 0 }
}

impl Guest {
    fn packed_at(&self, ring: Ring, place: u16) -> (u64, u32, u16, u16) {
        let (addr, len, id, flags) = self.ring_descriptor(ring, place & !WRAP);
        (addr, len, id, flags)
    }

    fn has(&self, ring: Ring, place: u16, wanted: u16) -> bool {
        self.packed_at(ring, place).3 & (AVAIL | USED) == wanted
    }

    /// Where a ring of that base goes on: next and used place, if there can be such a ring.
    pub(crate) fn packed_base(&self, ring: Ring, base: u32) -> Option<(u16, u16)> {
        let half = |shift: u32| u16::try_from(base >> shift & 0xffff).expect("masked");
        if base == 0 && self.packed_at(ring, 0).3 & USED == 0 {
            return Some((START, START));
        }
        let within = |place: u16| place & !WRAP < ring.size;
        let (next, used) = (half(0), half(16));
        (within(next) && within(used) && since(next, used, ring.size) <= ring.size).then_some((next, used))
    }

    /// Write a chain where the driver has got to, and make it available.
    pub(crate) fn offer_packed(&mut self, queue: &mut Queue, id: u16, chain: &[(u64, u32, u16)]) {
        for (index, (addr, len, flags)) in chain.iter().enumerate() {
            let more = if index + 1 < chain.len() { NEXT } else { 0 };
            let flags = flags | more | available(queue.driver);
            self.write_ring_descriptor(queue.ring, queue.driver & !WRAP, (*addr, *len, id, flags));
            queue.driver = plus(queue.driver, 1, queue.ring.size);
        }
    }

    /// Make available what is where the driver has got to.
    pub(crate) fn publish_packed(&mut self, queue: &mut Queue) {
        let (addr, len, id, flags) = self.packed_at(queue.ring, queue.driver);
        let flags = flags & !(AVAIL | USED) | available(queue.driver);
        self.write_ring_descriptor(queue.ring, queue.driver & !WRAP, (addr, len, id, flags));
        queue.driver = plus(queue.driver, 1, queue.ring.size);
    }

    /// Whether what the driver wrote where the device has taken chains looks as if the device had given them back.
    pub(crate) fn looks_used(&self, queue: &Queue) -> bool {
        let size = queue.ring.size;
        let under_way = since(queue.next_avail, queue.used, size);
        (0..under_way).map(|ahead| plus(queue.used, ahead, size)).any(|at| self.has(queue.ring, at, used(at)))
    }

    /// What the device takes in the turn that comes. Whether more may come of it than can be foreseen: a chain that is
    /// no request comes back at once, before the next is taken.
    pub(crate) fn take_packed(&self, queue: &mut Queue) -> bool {
        let (ring, mut confused) = (queue.ring, false);
        let held = queue.out.len();
        for _ in 0..ring.size {
            if !self.has(ring, queue.next_avail, available(queue.next_avail)) {
                break;
            }
            let room = ring.size - since(queue.next_avail, queue.used, ring.size);
            let places = (0..room).map(|ahead| self.packed_at(ring, plus(queue.next_avail, ahead, ring.size)));
            let mut list: Vec<_> = Vec::new();
            for descriptor in places {
                list.push(descriptor);
                if descriptor.3 & NEXT == 0 {
                    break;
                }
            }
            let last = list.last().filter(|last| last.3 & NEXT == 0);
            let taken = last.and_then(|last| queue.out.iter().position(|offered| offered.head == last.2));
            if last.is_none() || taken.is_some() {
                confused |= queue.out.len() > held && (last.is_none() || taken.is_some_and(|at| at >= held));
                queue.broken = true;
                break;
            }
            let offered = self.walk_list(&list);
            confused |= offered.over_rings();
            queue.next_avail = plus(queue.next_avail, offered.count, ring.size);
            queue.out.push(offered);
        }
        confused
    }

    /// The next chain that came back, with its length.
    pub(crate) fn see_used_packed(&self, queue: &mut Queue) -> Option<(Offered, u32)> {
        let (_, len, id, flags) = self.packed_at(queue.ring, queue.used);
        if queue.used == queue.next_avail || flags & (AVAIL | USED) != used(queue.used) {
            return None;
        }
        let at = queue.out.iter().position(|offered| offered.head == id);
        let offered = queue.out.remove(at.unwrap_or_else(|| panic!("buffer {id} was not offered, or is back already")));
        queue.used = plus(queue.used, offered.count, queue.ring.size);
        assert_eq!(flags & 2 != 0, len > 0, "the flag says whether something was written");
        Some((offered, len))
    }
}
