//! The table: what is done while one operation after the other fails.

use vhost_remap::engine::healer::Order;
use vhost_remap::engine::scan::ScanParams;
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::layout::{Home, Place};

use super::acts::{
    ask_write, bad_blocks, bad_read, bad_slots, bad_table, blocks, flush, grow_and_use, layout, make, make_crowded,
    mark, open, open_with_bad_blocks, open_with_remaps, order, read, scan, try_open, write,
};
use crate::config::Config;
use crate::disk::{Bad, Disk, Effect, Until};
use crate::faults::damage;
use crate::guest::SECTOR;
use crate::world::World;

/// A row of the table.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Blocks of the volume.
    blocks: u64,
    /// Slots. Entries of the first 60 lie in one sector with their page's header: no page that speaks of no other
    /// is ever torn.
    slots: u32,
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
    /// Weak blocks move.
    scans: bool,
    /// It begins with damage, or does some, beyond which not every further trouble leaves a whole copy.
    pub(crate) damaged: bool,
}

/// A volume of 16 blocks with a label, made, written in full and closed.
const PLAIN: Scenario = Scenario {
    name: "",
    blocks: 16,
    slots: 16,
    labelled: true,
    prepare: make,
    begin: open,
    act: |_| {},
    creates: false,
    loses: false,
    scans: false,
    damaged: false,
};

/// The first 60 slots are taken: what is committed from then on takes two sectors of its page.
const CROWDED: Scenario = Scenario { blocks: 64, slots: 72, prepare: make_crowded, ..PLAIN };

pub(crate) const TABLE: [Scenario; 37] = [
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
    Scenario {
        name: "remaps in torn pages",
        begin: |world| open_with_bad_blocks(world, 60, 2),
        act: |world| {
            write(world, blocks(60, 1));
            order(world, Order::Release(blocks(60, 1)));
            write(world, blocks(61, 1));
            flush(world);
        },
        ..CROWDED
    },
    Scenario {
        name: "return of the spare with torn pages",
        begin: |world| open_with_bad_blocks(world, 60, 1),
        act: |world| {
            write(world, blocks(60, 1));
            world.let_pass(3);
            flush(world);
        },
        ..CROWDED
    },
    // Nothing flushes the spare between the first commit's second homes and the second commit.
    Scenario {
        name: "remap and release at once",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            world.order(Order::Remap(blocks(5, 1)));
            world.order(Order::Release(blocks(2, 1)));
            world.settle_down();
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "move and release at once",
        begin: |world| {
            open_with_remaps(world, 2, 1);
            bad_slots(world, 0, 1);
        },
        act: |world| {
            ask_write(world, blocks(2, 1));
            world.order(Order::Release(blocks(2, 1)));
            world.settle_down();
            flush(world);
        },
        ..PLAIN
    },
    // The second of them waits at the fence while the commit of the first is decided.
    Scenario {
        name: "two writes to one bad block at once",
        begin: |world| {
            open(world);
            let bad = Bad { errno: libc::EIO, until: Until::Times(3), fault: None };
            world.disks[0].bad_writes.insert(20, bad);
        },
        act: |world| {
            ask_write(world, blocks(2, 1));
            ask_write(world, blocks(2, 1));
            world.settle_down();
            flush(world);
        },
        ..PLAIN
    },
    // Those of the second find their blocks while the commit of the first is under way.
    Scenario {
        name: "one remap after the other",
        begin: |world| open_with_bad_blocks(world, 2, 6),
        act: |world| {
            ask_write(world, blocks(2, 1));
            ask_write(world, blocks(4, 3));
            world.settle_down();
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "move and return of the spare",
        begin: |world| open_with_bad_blocks(world, 2, 2),
        act: |world| {
            write(world, blocks(2, 1));
            world.let_pass(3);
            write(world, blocks(3, 1));
            world.let_pass(3);
            flush(world);
        },
        ..PLAIN
    },
    Scenario {
        name: "commit in doubt in torn pages",
        damaged: true,
        begin: |world| {
            open_with_bad_blocks(world, 60, 1);
            bad_table(world, &Place::ALL);
        },
        act: |world| {
            write(world, blocks(60, 1));
            world.disks[1].bad_writes.clear();
            world.let_pass(3);
            write(world, blocks(60, 1));
            flush(world);
        },
        ..CROWDED
    },
    Scenario {
        name: "failed flush noted on the spare alone",
        labelled: false,
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            write(world, blocks(2, 3));
            world.disks[0].bad_flushes = 1;
            flush(world);
            read(world, blocks(2, 3));
        },
        ..PLAIN
    },
    Scenario {
        name: "failed flush noted on the primary alone",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            world.disks[1].gone = true;
            write(world, blocks(2, 3));
            world.disks[0].bad_flushes = 1;
            flush(world);
            read(world, blocks(4, 3));
        },
        ..PLAIN
    },
    // The note of the one failure is written while the other one is on its way, which drops all it finds.
    Scenario {
        name: "flushes of both devices fail",
        labelled: false,
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            write(world, blocks(2, 3));
            world.disks.iter_mut().for_each(|disk| disk.bad_flushes = 1);
            (world.disks[1].failing_ns, world.disks[1].effect) = (SECOND, Some(Effect::Nothing));
            flush(world);
            world.disks[1].failing_ns = 0;
            read(world, blocks(2, 3));
        },
        ..PLAIN
    },
    // A block reads only after retries, another one not at all, a third one had been rewritten, and a slot fails.
    Scenario {
        name: "scan that moves, heals and finds",
        begin: |world| {
            open_with_remaps(world, 2, 2);
            bad_read(world, 0, 5 * 8, Until::Written);
            read(world, blocks(5, 1));
            write(world, blocks(5, 1));
            bad_read(world, 0, 6 * 8 + 1, Until::Healed);
            bad_read(world, 0, 7 * 8 + 2, Until::Times(7));
            let slots = layout(world).slots_start / SECTOR as u64;
            bad_read(world, 1, slots + 3, Until::Times(7));
        },
        act: |world| {
            scan(world);
            flush(world);
            read(world, blocks(1, 4));
            write(world, blocks(7, 1));
            flush(world);
        },
        scans: true,
        ..PLAIN
    },
    Scenario {
        name: "scan that heals lost sectors",
        loses: true,
        begin: |world| {
            open(world);
            bad_read(world, 0, 2 * 8, Until::Healed);
            bad_blocks(world, 2, 1);
            write(world, SectorRange { start: Sector(17), count: 2 });
            flush(world);
            world.disks[0].bad_reads.clear();
        },
        act: |world| {
            scan(world);
            read(world, blocks(2, 1));
            flush(world);
        },
        scans: true,
        ..PLAIN
    },
    Scenario {
        name: "scan that repairs a page of the table",
        damaged: true,
        begin: |world| {
            open_with_remaps(world, 2, 1);
            let layout = layout(world);
            let home = layout.table(Place::Tail, Home::A, 0) - layout.place_start(Place::Tail);
            damage(world, home / SECTOR as u64);
        },
        act: |world| {
            scan(world);
            world.order(Order::Remap(blocks(5, 1)));
            world.settle_down();
            flush(world);
        },
        scans: true,
        ..PLAIN
    },
    // Into where its label is.
    Scenario {
        name: "resize",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| grow_and_use(world, 4),
        ..PLAIN
    },
    Scenario {
        name: "resize without a label",
        labelled: false,
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| grow_and_use(world, 4),
        ..PLAIN
    },
    // What the first attempt has left must not come to light with the second.
    Scenario {
        name: "resize after resize",
        begin: |world| open_with_remaps(world, 2, 1),
        act: |world| {
            world.resize(1);
            world.settle_down();
            if world.engine.is_some() {
                grow_and_use(world, 3);
            }
        },
        ..PLAIN
    },
];

const SECOND: u64 = 1_000_000_000;

impl Scenario {
    pub(crate) fn config(&self) -> Config {
        let scan = ScanParams { move_weak: self.scans, ..ScanParams::default() };
        Config { scan, ..Config::without_faults(2, self.blocks * 8, self.slots, self.labelled) }
    }
}
