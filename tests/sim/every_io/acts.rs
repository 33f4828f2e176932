//! What scenarios are made of: what is done, and what is made to fail.

use vhost_remap::engine::healer::Order;
use vhost_remap::engine::scan::{ScanOrder, ScanScope};
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::layout::{Home, Layout, Place};

use crate::disk::{Bad, Disk, Until};
use crate::guest::SECTOR;
use crate::world::World;

pub(super) fn blocks(first: u64, count: u64) -> SectorRange {
    SectorRange { start: Sector(first * 8), count: count * 8 }
}

pub(super) fn layout(world: &World) -> Layout {
    Layout::new(world.config.spare_bytes(), world.config.max_remaps).expect("the configuration is possible")
}

pub(super) fn make(world: &mut World) {
    world.create_once(None).expect("no crash was asked for").expect("healthy disks take a new volume");
    open(world);
    world.rewrite_all();
    world.close();
    assert!(world.engine.is_none());
}

pub(super) fn make_crowded(world: &mut World) {
    make(world);
    open_with_remaps(world, 0, 60);
    world.close();
    assert!(world.engine.is_none());
}

pub(super) fn open(world: &mut World) {
    world.open_once(false, None).expect("no crash was asked for").expect("a whole volume opens");
    world.settle_down();
}

/// Whether it opened.
pub(super) fn try_open(world: &mut World) -> bool {
    let opened = world.open_once(false, None).expect("no crash was asked for").is_ok();
    if opened {
        world.settle_down();
    }
    opened
}

/// With slots that hold other data than the blocks on the primary.
pub(super) fn open_with_remaps(world: &mut World, first: u64, count: u64) {
    open(world);
    order(world, Order::Remap(blocks(first, count)));
    assert_eq!(world.status().live as u64, count);
    write(world, blocks(first, count));
    flush(world);
}

pub(super) fn open_with_bad_blocks(world: &mut World, first: u64, count: u64) {
    open(world);
    bad_blocks(world, first, count);
}

pub(super) fn mark(disk: &mut Disk, sectors: std::ops::Range<u64>, read: bool) {
    let marks = if read { &mut disk.bad_reads } else { &mut disk.bad_writes };
    let bad = Bad { errno: libc::EIO, until: Until::Healed, fault: None };
    marks.extend(sectors.map(|sector| (usize::try_from(sector).expect("small"), bad)));
}

/// Reads of a sector of a device fail.
pub(super) fn bad_read(world: &mut World, device: usize, sector: u64, until: Until) {
    let bad = Bad { errno: libc::EIO, until, fault: None };
    world.disks[device].bad_reads.insert(usize::try_from(sector).expect("small"), bad);
}

pub(super) fn bad_blocks(world: &mut World, first: u64, count: u64) {
    mark(&mut world.disks[0], first * 8..(first + count) * 8, false);
}

pub(super) fn bad_slots(world: &mut World, first: u64, count: u64) {
    let start = layout(world).slots_start / SECTOR as u64;
    mark(&mut world.disks[1], start + first * 8..start + (first + count) * 8, false);
}

/// The table in these places does not take writes.
pub(super) fn bad_table(world: &mut World, places: &[Place]) {
    let layout = layout(world);
    for (place, home) in places.iter().flat_map(|place| Home::ALL.map(|home| (*place, home))) {
        let sector = layout.table(place, home, 0) / SECTOR as u64;
        mark(&mut world.disks[1], sector..sector + 8, false);
    }
}

pub(super) fn ask_write(world: &mut World, range: SectorRange) {
    world.ask_write(range);
}

pub(super) fn write(world: &mut World, range: SectorRange) {
    ask_write(world, range);
    world.settle_down();
}

pub(super) fn read(world: &mut World, range: SectorRange) {
    world.ask_read(range);
    world.settle_down();
}

pub(super) fn flush(world: &mut World) {
    world.ask_flush();
    world.settle_down();
}

pub(super) fn order(world: &mut World, order: Order) {
    world.order(order);
    world.settle_down();
}

/// One pass of the scanner, or as much of it as comes about.
pub(super) fn scan(world: &mut World) {
    world.order(Order::Scan(ScanOrder::Start(ScanScope::default())));
    world.scan_through();
}

/// Have the disk grow by so many blocks, and write where it has grown, if it has.
pub(super) fn grow_and_use(world: &mut World, count: u64) {
    world.resize(count);
    world.settle_down();
    world.ask_beyond(true, 0, 16, 0);
    world.settle_down();
    flush(world);
}
