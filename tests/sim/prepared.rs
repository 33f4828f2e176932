//! Volumes with many slots in use, each made once: by an operator, on devices without faults.

use std::sync::OnceLock;

use vhost_remap::engine::healer::Order;
use vhost_remap::units::{Sector, SectorRange};

use crate::config::{Config, SHAPES};
use crate::disk::Disk;
use crate::model::Model;
use crate::rng::Rng;
use crate::world::World;

/// The write that every sector is of.
const VALUE: u32 = 1;

/// Give `world` the devices of a volume of that shape, closed cleanly, in place of its own.
pub(crate) fn take(world: &mut World, shape: usize) {
    static DISKS: [OnceLock<[Disk; 2]>; SHAPES.len()] = [const { OnceLock::new() }; SHAPES.len()];
    let disks = DISKS[shape].get_or_init(|| prepare(shape));
    for (own, disk) in world.disks.iter_mut().zip(disks) {
        let Disk { no_zeroes, no_discard, .. } = *own;
        own.clone_from(disk);
        (own.no_zeroes, own.no_discard) = (no_zeroes, no_discard);
    }
    world.model = Model::new(VALUE);
    world.model.ends_at(world.config.capacity);
    world.next_value = VALUE + 1;
}

fn prepare(shape: usize) -> [Disk; 2] {
    let shape = SHAPES[shape];
    let config = Config::without_faults(1, shape.capacity, shape.max_remaps, shape.labelled);
    let mut world = World::with(Config { logical: shape.logical, ..config }, Rng::new(7), false);
    world.create();
    world.open_once(false, None).expect("no crash was asked for").expect("a new volume opens");
    assert_eq!(world.next_value, VALUE);
    world.ask_write(SectorRange { start: Sector(0), count: shape.capacity });
    world.settle_down();
    world.order(Order::Remap(SectorRange { start: Sector(0), count: shape.used * 8 }));
    world.close();
    let [primary, spare] = world.disks;
    [primary, spare]
}
