//! The table: what is done while one operation after the other fails.

use vhost_remap::engine::healer::{OnLoss, Order, Policy};
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::layout::{Home, Layout, Place};

use crate::config::Config;
use crate::disk::{Bad, Disk, Until};
use crate::guest::SECTOR;
use crate::world::World;

/// A row of the table.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Blocks of the volume.
    blocks: u64,
    labelled: bool,
    /// Makes the volume, unless the scenario does, and ends with nothing open.
    pub(crate) prepare: fn(&mut World),
    /// Opens it, and sees to what is not to be disturbed.
    pub(crate) begin: fn(&mut World),
    /// What is to be disturbed. It takes refusals and errors as they come.
    pub(crate) act: fn(&mut World),
    /// It makes the volume itself: before that has come to its end there need not be any.
    pub(crate) creates: bool,
    /// It loses a sector that no device reads.
    pub(crate) loses: bool,
    /// It begins with damage, or does some, beyond which not every further trouble leaves a whole copy.
    pub(crate) damaged: bool,
}

/// A volume of 16 blocks with a label, made, written in full and closed.
const PLAIN: Scenario = Scenario {
    name: "",
    blocks: 16,
    labelled: true,
    prepare: make,
    begin: open,
    act: |_| {},
    creates: false,
    loses: false,
    damaged: false,
};

pub(crate) const TABLE: [Scenario; 20] = [
    Scenario {
        name: "first remap",
        begin: |world| open_with_bad_blocks(world, 2, 1),
        act: |world| {
            write(world, blocks(2, 1));
            flush(world);
            read(world, blocks(1, 3));
        },
        ..PLAIN
    },
    Scenario {
        name: "second remap in the same page",
        begin: |world| {
            open_with_bad_blocks(world, 2, 2);
            write(world, blocks(2, 1));
        },
        act: |world| {
            write(world, blocks(3, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "slot failure",
        begin: |world| {
            open_with_bad_blocks(world, 2, 1);
            bad_slots(world, 0, 2);
        },
        act: |world| {
            write(world, blocks(2, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "move of a block",
        begin: |world| {
            open_with_remaps(world, 2, 1);
            bad_slots(world, 0, 1);
        },
        act: |world| {
            write(world, SectorRange { start: Sector(18), count: 3 });
            write(world, blocks(2, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "release",
        begin: |world| open_with_remaps(world, 2, 2),
        act: |world| {
            order(world, Order::Release(blocks(2, 2)));
            write(world, blocks(3, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "group commit",
        begin: |world| open_with_bad_blocks(world, 2, 6),
        act: |world| {
            for block in [2, 4, 5, 7] {
                ask_write(world, blocks(block, 1));
            }
            world.ask_flush();
            world.settle_down();
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "exhaustion",
        blocks: 20,
        begin: |world| {
            open_with_remaps(world, 0, 15);
            bad_blocks(world, 16, 2);
        },
        act: |world| {
            write(world, blocks(16, 1));
            write(world, blocks(17, 1));
            write(world, blocks(18, 1));
            flush(world);
            read(world, blocks(14, 4));
        },
        ..PLAIN
    },
    Scenario {
        name: "discard of a remapped block",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            world.ask_discard(vec![blocks(1, 3), blocks(9, 1)]);
            world.settle_down();
            world.ask_zeroes(blocks(2, 2));
            world.settle_down();
            flush(world);
            read(world, blocks(1, 3));
        },
        ..PLAIN
    },
    Scenario {
        name: "part of a block with a lost sector",
        loses: true,
        begin: |world| {
            open_with_bad_blocks(world, 2, 1);
            mark(&mut world.disks[0], 16 + 5..16 + 6, true);
        },
        act: |world| {
            write(world, SectorRange { start: Sector(16), count: 2 });
            write(world, SectorRange { start: Sector(16 + 4), count: 2 });
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "rewrite in place",
        begin: |world| {
            open(world);
            let bad = Bad { errno: libc::EIO, until: Until::Times(1), fault: None };
            world.disks[0].bad_writes.insert(20, bad);
        },
        act: |world| {
            write(world, blocks(2, 2));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "creation",
        creates: true,
        prepare: |_| {},
        begin: |_| {},
        act: |world| {
            if matches!(world.create_once(None), Some(Ok(()))) && try_open(world) {
                write(world, blocks(0, 2));
                flush(world);
            }
        },
        ..PLAIN
    },
    Scenario {
        name: "adoption",
        labelled: false,
        creates: true,
        prepare: |world| {
            make(world);
            world.disks[1] = Disk::new("spare", world.config.spare_bytes(), 512);
        },
        begin: |_| {},
        act: |world| {
            if matches!(world.create_once(None), Some(Ok(()))) && try_open(world) {
                read(world, blocks(0, 16));
            }
        },
        ..PLAIN
    },
    Scenario {
        name: "open with repair",
        damaged: true,
        prepare: |world| {
            make(world);
            open_with_remaps(world, 2, 2);
            // Killed, then damaged at the tail: a superblock and both homes of the table.
            world.model.crash(crate::model::Crash::Kill);
            world.stop();
            let layout = layout(world);
            let pages = [
                layout.superblock(Place::Tail, 0),
                layout.table(Place::Tail, Home::A, 0),
                layout.table(Place::Tail, Home::B, 0),
            ];
            for page in pages {
                let sector = usize::try_from(page).expect("small") / SECTOR;
                world.disks[1].damage(sector, &mut world.rng);
            }
        },
        begin: |_| {},
        act: |world| {
            if try_open(world) {
                read(world, blocks(1, 4));
                write(world, blocks(2, 1));
                flush(world);
            }
        },
        ..PLAIN
    },
    Scenario {
        name: "degraded open",
        prepare: |world| {
            make(world);
            open_with_remaps(world, 2, 2);
            world.close();
        },
        begin: |world| world.disks[1].gone = true,
        act: |world| {
            if world.open_degraded().is_ok() {
                read(world, blocks(0, 2));
                read(world, blocks(2, 1));
                read(world, blocks(3, 13));
            }
        },
        ..PLAIN
    },
    Scenario {
        name: "place retirement",
        damaged: true,
        begin: |world| {
            open_with_bad_blocks(world, 2, 2);
            bad_table(world, &[Place::Tail]);
        },
        act: |world| {
            write(world, blocks(2, 1));
            write(world, blocks(3, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "commit in doubt and its resolution",
        damaged: true,
        begin: |world| {
            open_with_bad_blocks(world, 2, 1);
            bad_table(world, &Place::ALL);
        },
        act: |world| {
            write(world, blocks(2, 1));
            write(world, blocks(4, 1));
            world.disks[1].bad_writes.clear();
            world.let_pass(3);
            write(world, blocks(2, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "spare down and back",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            world.disks[1].gone = true;
            write(world, blocks(2, 1));
            write(world, blocks(4, 1));
            flush(world);
            world.disks[1].gone = false;
            world.let_pass(3);
            write(world, blocks(2, 1));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "failed flush and its clearing",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            write(world, blocks(2, 3));
            world.disks[0].bad_flushes = 1;
            flush(world);
            world.plan.as_mut().expect("planned").clearing = true;
            order(world, Order::Clear);
            write(world, blocks(2, 3));
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "clean close and reopening",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            write(world, blocks(1, 3));
            world.close();
            if world.engine.is_none() && try_open(world) {
                read(world, blocks(1, 3));
            }
        },
        ..PLAIN
    },
    Scenario {
        name: "bad read, then a rewrite",
        begin: |world| {
            open(world);
            let bad = Bad { errno: libc::EIO, until: Until::Written, fault: None };
            world.disks[0].bad_reads.insert(20, bad);
        },
        act: |world| {
            read(world, blocks(2, 1));
            write(world, blocks(2, 1));
            read(world, blocks(2, 1));
            flush(world);
        },
        ..PLAIN
    },
];

impl Scenario {
    pub(crate) fn config(&self) -> Config {
        let mut rng = crate::rng::Rng::new(7);
        Config {
            shards: 2,
            capacity: self.blocks * 8,
            logical: [512, 512],
            max_remaps: 16,
            labelled: self.labelled,
            policy: Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false },
            faults: Vec::new(),
            write_through: false,
            no_zeroes: false,
            no_discard: false,
            ..Config::of(&mut rng)
        }
    }
}

fn blocks(first: u64, count: u64) -> SectorRange {
    SectorRange { start: Sector(first * 8), count: count * 8 }
}

fn layout(world: &World) -> Layout {
    Layout::new(world.config.spare_bytes(), world.config.max_remaps).expect("the configuration is possible")
}

fn make(world: &mut World) {
    world.create_once(None).expect("no crash was asked for").expect("healthy disks take a new volume");
    open(world);
    world.rewrite_all();
    world.close();
    assert!(world.engine.is_none());
}

fn open(world: &mut World) {
    world.open_once(false, None).expect("no crash was asked for").expect("a whole volume opens");
    world.settle_down();
}

/// Whether it opened.
fn try_open(world: &mut World) -> bool {
    let opened = world.open_once(false, None).expect("no crash was asked for").is_ok();
    if opened {
        world.settle_down();
    }
    opened
}

/// With slots that hold other data than the blocks on the primary.
fn open_with_remaps(world: &mut World, first: u64, count: u64) {
    open(world);
    order(world, Order::Remap(blocks(first, count)));
    assert_eq!(world.status().live as u64, count);
    write(world, blocks(first, count));
    flush(world);
}

fn open_with_bad_blocks(world: &mut World, first: u64, count: u64) {
    open(world);
    bad_blocks(world, first, count);
}

fn mark(disk: &mut Disk, sectors: std::ops::Range<u64>, read: bool) {
    let marks = if read { &mut disk.bad_reads } else { &mut disk.bad_writes };
    let bad = Bad { errno: libc::EIO, until: Until::Healed, fault: None };
    marks.extend(sectors.map(|sector| (usize::try_from(sector).expect("small"), bad)));
}

fn bad_blocks(world: &mut World, first: u64, count: u64) {
    mark(&mut world.disks[0], first * 8..(first + count) * 8, false);
}

fn bad_slots(world: &mut World, first: u64, count: u64) {
    let start = layout(world).slots_start / SECTOR as u64;
    mark(&mut world.disks[1], start + first * 8..start + (first + count) * 8, false);
}

/// The table in these places does not take writes.
fn bad_table(world: &mut World, places: &[Place]) {
    let layout = layout(world);
    for (place, home) in places.iter().flat_map(|place| Home::ALL.map(|home| (*place, home))) {
        let sector = layout.table(place, home, 0) / SECTOR as u64;
        mark(&mut world.disks[1], sector..sector + 8, false);
    }
}

fn ask_write(world: &mut World, range: SectorRange) {
    world.ask_write(range);
}

fn write(world: &mut World, range: SectorRange) {
    ask_write(world, range);
    world.settle_down();
}

fn read(world: &mut World, range: SectorRange) {
    world.ask_read(range);
    world.settle_down();
}

fn flush(world: &mut World) {
    world.ask_flush();
    world.settle_down();
}

fn order(world: &mut World, order: Order) {
    world.order(order);
    world.settle_down();
}
