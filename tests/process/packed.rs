//! Packed rings (virtio 1.3 §2.8): the half of our own driver that has them, and one that others wrote: the
//! `virtio-driver` crate's, which says of a new ring that it goes on at 0.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

use crate::frontend::{NEXT, Raw};
use crate::guest::{Guest, Io};
use crate::model::{Model, Random, pattern};
use crate::packed_ring::PackedDriver;
use crate::server::Volume;

/// A packed ring, and the descriptors written for chains to come.
pub(crate) struct Packed {
    pub(crate) driver: PackedDriver,
    written: RefCell<BTreeMap<u16, Raw>>,
}

impl Packed {
    pub(crate) fn new(driver: PackedDriver) -> Packed {
        Packed { driver, written: RefCell::default() }
    }

    /// Write a descriptor of a chain to come.
    pub(crate) fn write(&self, index: u16, descriptor: Raw) {
        self.written.borrow_mut().insert(index, descriptor);
    }

    /// Make a chain available; whether the device wants to be kicked for it.
    pub(crate) fn offer(&self, head: u16, event_idx: bool) -> bool {
        let (mut chain, mut at) = (Vec::new(), head);
        loop {
            let (addr, len, flags, next) = self.written.borrow()[&at];
            chain.push((addr, len, flags & !NEXT));
            if flags & NEXT == 0 {
                break;
            }
            at = next;
        }
        let before = self.driver.avail_place();
        self.driver.offer(head, &chain);
        // What the device asks for is read after it can see the chain.
        fence(Ordering::SeqCst);
        self.driver.wants_kick(before, event_idx)
    }

    /// The next used buffer, if it is there; otherwise a notification is asked for.
    pub(crate) fn next_used(&self, event_idx: bool) -> Option<(u32, u32)> {
        self.driver.want_interrupt(event_idx);
        // The device may use a buffer before it sees that; then it is there now.
        fence(Ordering::SeqCst);
        self.driver.take_used().map(|(id, len)| (u32::from(id), len))
    }
}

/// Many at a time and in any order, in chains of three descriptors and more, some of them for blocks that move.
#[test]
fn a_driver_with_packed_rings_is_served_like_any_other() {
    for events in [VirtioFeatureFlags::empty(), VirtioFeatureFlags::RING_EVENT_IDX] {
        let volume = Volume::create(32, 64);
        let server = volume.serve(&[]);
        let of_rings = events | VirtioFeatureFlags::RING_PACKED;
        let mut guest = Guest::connect_over(&server.socket, 2, VirtioBlkFeatureFlags::all(), of_rings);
        assert!(guest.features & VirtioFeatureFlags::RING_PACKED.bits() != 0, "{:x}", guest.features);
        let mut model = Model::written(&mut guest, 8192, 4096, 1);
        server.order(&["remap", "9216-9223"]);
        server.fault(&["--ops", "write", "--sectors", "9280-9287"]);
        let mut random = Random(34);
        for round in 0..60 {
            let queue = &mut guest.queues[round % 2];
            queue.shape.skew = [0, 512, 1][round % 3];
            queue.shape.pieces = [0, 4096, 1000][round / 3 % 3];
            // In blocks of their own, as the device may do them in any order.
            let writes = (0..32_u64).map(|number| {
                let (start, count) = (8192 + number * 128, 1 + random.below(64));
                let sector = start + random.below(128 - count);
                model.write(sector, pattern(sector, count, number + 100 * round as u64))
            });
            let mut ios: Vec<Io> = writes.collect();
            ios.push(Io::Flush);
            assert!(queue.run(&ios).iter().all(Result::is_ok), "{events:?}, round {round}");
            let other = &mut guest.queues[(round + 1) % 2];
            other.shape.pieces = 0;
            model.check_all(other);
        }
        assert_eq!(server.status().counters.guest_errors, 0);
        drop(guest);
        // And then one with split rings.
        model.check_all(server.guest(1).queue());
        assert!(server.blocks("remapped").contains(&9280));
    }
}
