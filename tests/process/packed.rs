//! Packed rings (virtio 1.3 §2.8), by a driver that others wrote: the `virtio-driver` crate's, which says of a new ring
//! that it goes on at 0.

use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

use crate::guest::{Guest, Io};
use crate::model::{Model, Random, pattern};
use crate::server::Volume;

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
