//! Damage to a volume, and then opening it.
//!
//! The damage may fit its checksums, so that what lies behind them is reached. Whatever is on the disks: opening
//! ends, a refusal and an opening that must not write have written nothing, and a volume that opens has a map that
//! makes sense, works, and opens again with the same map.

use std::sync::OnceLock;

use vhost_remap::device::DeviceIndex;
use vhost_remap::device::memory::MemoryDisks;
use vhost_remap::engine::healer::{Healer, Order};
use vhost_remap::engine::open::{DeviceFacts, OpenError, OpenParams, Opening};
use vhost_remap::engine::request::Status;
use vhost_remap::units::Block;
use vhost_remap::volume::layout::{PAGE, Place};

use super::engine::Engine;
use super::program::Program;
use super::rig::{BLOCK, Bad, PRIMARY, Reads, Rig, SPARE, Shape, pattern, range_of};
use super::seat::{At, Entry, Kind, Seat, seal, seats, u64_at};

/// Changes of one input.
const CHANGES_MAX: usize = 24;
/// Device operations of one input. The longest opening of what is here takes a few hundred.
const OPERATIONS_MAX: u64 = 50_000;

const LABELLED: Shape = Shape { capacity: 2048, max_remaps: 600, labelled: true };
/// The last block is short.
const ADOPTED: Shape = Shape { capacity: 2045, max_remaps: 600, labelled: false };

/// Where a superblock has numbers that matter: versions, features, sizes, places, history.
const FIELDS: [usize; 20] = [8, 16, 24, 32, 40, 56, 72, 76, 80, 88, 96, 104, 112, 116, 120, 128, 152, 160, 168, 1152];

/// Volumes at moments of their lives.
struct Base {
    shape: Shape,
    disks: MemoryDisks,
}

fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(|| [LABELLED, ADOPTED].into_iter().flat_map(life).collect())
}

fn bad(device: DeviceIndex, from: u64, to: u64) -> Bad {
    Bad { device, from, to, reads: Reads::Good, writes: true }
}

/// A volume when it is new, used, in the middle of a commit, with one place left, and poisoned.
fn life(shape: Shape) -> Vec<Base> {
    let mut bases = Vec::new();
    let mut rig = Rig::new(shape);
    let mut note = |rig: &mut Rig| {
        rig.bad.clear();
        rig.kill();
        bases.push(Base { shape, disks: rig.disks.fork() });
    };
    rig.create().expect("no end").expect("the disks are good");
    note(&mut rig);
    let mut engine = rig.open().expect("it was made");
    rig.bad = vec![bad(PRIMARY, 16 * 4096, 24 * 4096), Bad { reads: Reads::Never, ..bad(PRIMARY, 81_920, 83_000) }];
    for (sector, count) in [(128, 64), (160, 1), (2040, 5)] {
        assert_eq!(engine.write(&mut rig, sector, &pattern(sector, count, 1)), Ok(Status::Ok));
    }
    rig.bad.clear();
    engine.done(&mut rig, Order::Remap(range_of(2040, 512)));
    engine.done(&mut rig, Order::Release(range_of(136, 4096)));
    engine.done(&mut rig, Order::Save);
    engine.close(&mut rig).expect("no end").expect("the disks are good");
    note(&mut rig);
    let mut engine = rig.open().expect("closed cleanly");
    rig.bad = vec![bad(PRIMARY, 0, 4096)];
    let token = engine.begin_write(&mut rig, 0, &pattern(0, BLOCK, 2));
    assert_eq!(engine.await_answer(&mut rig, token), Ok(Status::Ok));
    note(&mut rig);
    let mut engine = rig.open().expect("only killed");
    let tail = shape.layout().place_start(Place::Tail);
    rig.bad = vec![bad(PRIMARY, 8192, 12_288), bad(SPARE, tail, shape.sizes()[1])];
    assert_eq!(engine.write(&mut rig, 16, &pattern(16, BLOCK, 3)), Ok(Status::Ok));
    note(&mut rig);
    let mut engine = rig.open().expect("one place is left");
    assert_eq!(engine.write(&mut rig, 800, &pattern(800, 1, 4)), Ok(Status::Ok));
    rig.bad_flushes = [1, 0];
    assert_eq!(engine.flush(&mut rig), Ok(Status::IoErr));
    note(&mut rig);
    bases
}

/// A damaged volume, and how it is to be opened.
struct Patient {
    rig: Rig,
    seats: Vec<Seat>,
    facts: [DeviceFacts; 2],
    how: How,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    ForWriting,
    /// Although the primary was changed.
    Anyway,
    ReadOnly,
    Degraded,
}

impl Patient {
    fn new(program: &mut Program<'_>) -> Patient {
        let bases = bases();
        let Base { shape, disks } = &bases[program.below(bases.len())];
        let how = program.pick(&[How::ForWriting, How::Anyway, How::ReadOnly, How::Degraded]);
        let mut rig = Rig::on(*shape, disks.fork());
        rig.left = Some(OPERATIONS_MAX);
        Patient { rig, seats: seats(shape), facts: shape.facts(), how }
    }

    fn seat(&self, program: &mut Program<'_>) -> Seat {
        self.seats[program.below(self.seats.len())]
    }

    fn change(&mut self, program: &mut Program<'_>) {
        let op = program.u8();
        let fits = op & 0x80 != 0;
        match op % 10 {
            0 => {
                let (seat, at, len) = (self.seat(program), program.u16(), program.below(17));
                let bytes = program.bytes(len);
                self.edit(|of| of == seat, fits, |page| put(page, usize::from(at), bytes));
            }
            1 => {
                let (which, at, wide) = (program.below(3), self.field(program), program.u8() < 128);
                let value = number(program).to_le_bytes();
                let wanted = |seat: Seat| {
                    let side = which == 0 || (seat.at == At::Label) == (which == 1);
                    side && matches!(seat.kind, Kind::Superblock(_))
                };
                self.edit(wanted, true, |page| put(page, at, if wide { &value } else { &value[..4] }));
            }
            2 => self.change_entry(program),
            3 => {
                let (from, to) = (self.seat(program), self.seat(program));
                let page = from.read(&self.rig);
                self.edit(|of| of == to, fits, |bytes| bytes.copy_from_slice(&page));
                if fits {
                    self.edit(|of| of == to, true, |bytes| give_a_home(bytes, to));
                }
            }
            4 => {
                let (seat, value) = (self.seat(program), program.pick(&[0, 0xff, 0xa5]));
                self.edit(|of| of == seat, false, |page| page.fill(value));
            }
            5 => {
                let (seat, reads) =
                    (self.seat(program), program.pick(&[Reads::Good, Reads::UntilWritten, Reads::Never]));
                let (from, to) = (seat.offset, seat.offset + u64::from(program.u16() % 4096) + 1);
                self.rig.bad.push(Bad { device: seat.device(), from, to, reads, writes: fits });
            }
            6 => self.change_age(program),
            7 => {
                let (device, at) = (program.pick(&[PRIMARY, SPARE]), program.u32());
                let len = program.below(33);
                let bytes = program.bytes(len);
                let size = self.rig.shape.sizes()[usize::from(device.0)];
                self.rig.disks.poke(device, u64::from(at) % (size - 32), bytes);
            }
            8 => self.change_facts(program),
            _ => self.rig.fails = Some((u64::from(program.u8()), u64::from(program.u8() % 8))),
        }
    }

    fn field(&self, program: &mut Program<'_>) -> usize {
        if program.u8() < 192 { program.pick(&FIELDS) } else { usize::from(program.u16() % 4088) }
    }

    /// Change the pages of some seats, and put their checksums right or not.
    fn edit(&self, wanted: impl Fn(Seat) -> bool, fits: bool, change: impl Fn(&mut [u8])) {
        for seat in self.seats.iter().filter(|seat| wanted(**seat)) {
            let mut page = seat.read(&self.rig);
            change(&mut page);
            if fits {
                seal(&mut page, seat.kind);
            }
            seat.write(&self.rig, &page);
        }
    }

    /// Write an entry into one copy of a table page, or into all of them.
    fn change_entry(&self, program: &mut Program<'_>) {
        let (seat, all) = (self.seat(program), program.u8() < 128);
        let Kind::Table(_, number) = seat.kind else { return };
        let at = 32 + 8 * (usize::from(program.u8()) % 254 * 2 + usize::from(all));
        let block = if program.u8() < 192 { u64::from(program.u8()) } else { u64::from(program.u32()) };
        let (lost, bits) = (u64::from(program.u8()), u64::from(program.u16()));
        let raw = block | lost << 40 | bits << 48;
        let later = u64::from(program.u8() & 3);
        let wanted = |of: Seat| if all { matches!(of.kind, Kind::Table(_, n) if n == number) } else { of == seat };
        self.edit(wanted, true, |page| {
            put(page, at, &raw.to_le_bytes());
            put(page, 16, &u64_at(page, 16).wrapping_add(later).to_le_bytes());
        });
    }

    /// Give a copy another sequence or generation.
    fn change_age(&self, program: &mut Program<'_>) {
        let seat = self.seat(program);
        let at = match seat.kind {
            Kind::Superblock(_) => 80,
            Kind::Poison | Kind::Counters => 32,
            Kind::Table(..) => 16,
        };
        let (how, value) = (program.below(4), number(program));
        self.edit(
            |of| of == seat,
            true,
            |page| {
                let now = u64_at(page, at);
                let age = [now.wrapping_add(1), now.wrapping_sub(1), now.wrapping_add(2), value][how];
                put(page, at, &age.to_le_bytes());
            },
        );
    }

    fn change_facts(&mut self, program: &mut Program<'_>) {
        let (which, what) = (program.below(2), program.below(4));
        let facts = &mut self.facts[which];
        match what {
            0 => {
                let size = facts.size - (u64::from(program.u16()) * 512).min(facts.size);
                facts.size = size;
                self.rig.disks.set_size([PRIMARY, SPARE][which], size);
            }
            1 => facts.mtime_ns = program.u64(),
            2 => (facts.inode, facts.wwn) = (program.u64(), String::new()),
            _ => facts.logical_block = program.pick(&[512, 4096]),
        }
    }

    fn params(&self) -> OpenParams {
        let [primary, spare] = self.facts.clone();
        let (read_only, accept_external) = (self.how == How::ReadOnly, self.how == How::Anyway);
        OpenParams { primary, spare, read_only, accept_external }
    }

    fn open(&mut self) -> Result<Healer, OpenError> {
        let opening = match self.how {
            How::Degraded => Opening::degraded(self.facts[0].clone()),
            _ => Opening::new(self.params()),
        };
        self.rig.run_opening(opening).expect("an opening ends")
    }
}

fn put(page: &mut [u8], at: usize, bytes: &[u8]) {
    let at = at % PAGE;
    let len = bytes.len().min(PAGE - at);
    page[at..at + len].copy_from_slice(&bytes[..len]);
}

/// Say in a page that it belongs to a seat.
fn give_a_home(page: &mut [u8], seat: Seat) {
    let place = match seat.at {
        At::Head => 0,
        At::Tail => 1,
        At::Label => 2,
    };
    match seat.kind {
        Kind::Superblock(copy) => put(page, 72, &[1 + u8::from(seat.at == At::Label), place, copy]),
        Kind::Poison | Kind::Counters => put(page, 12, &[place]),
        Kind::Table(home, number) => {
            put(page, 8, &number.to_le_bytes());
            put(page, 24, &[place, home]);
        }
    }
}

fn number(program: &mut Program<'_>) -> u64 {
    match program.u8() {
        0..64 => u64::from(program.u8()),
        64..128 => program.pick(&[0, 1, 512, 4096, 1 << 20, 1 << 32, 1 << 40, u64::MAX / 512, u64::MAX - 1, u64::MAX]),
        128..192 => u64::from(program.u32()),
        _ => program.u64(),
    }
}

/// Each slot and each block once, and all of them there.
fn check_map(healer: &Healer) -> Vec<Entry> {
    let (geometry, view) = (healer.geometry(), healer.view());
    let mut slots = std::collections::BTreeSet::new();
    let mut map = Vec::new();
    for (block, state) in view.map.iter_from(Block(0)) {
        assert!(block.0 < geometry.blocks(), "block {block:?} of {}", geometry.blocks());
        let Some(slot) = state.slot else { continue };
        assert!(slot.0 < geometry.slots && slots.insert(slot.0), "slot {slot:?} of {}", geometry.slots);
        map.push((block.0, slot.0, state.lost, state.primary_stale));
    }
    map
}

/// A volume that opened works; what of it can be read is read.
fn use_it(patient: &mut Patient, engine: &mut Engine, map: &[Entry]) {
    let Patient { rig, how, .. } = patient;
    let capacity = rig.shape.capacity;
    for (block, ..) in map.iter().take(8) {
        let sectors = BLOCK.min(capacity.saturating_sub(block * BLOCK));
        let read = if sectors > 0 { engine.read(rig, block * BLOCK, sectors) } else { None };
        assert!(*how != How::Degraded || read.is_none(), "block {block} has moved to the spare that is lost");
    }
    let sector = map.first().map_or(0, |(block, ..)| block * BLOCK);
    if sector < capacity {
        let status = engine.write(rig, sector, &pattern(sector, 1, 7)).expect("a write ends");
        let may_write = matches!(how, How::ForWriting | How::Anyway);
        assert!(may_write || status == Status::IoErr, "a read-only volume takes no writes");
    }
    let _ = engine.flush(rig).expect("a flush ends");
    engine.status(rig);
}

/// Open the volume that opened and worked: first as it was left, then closed.
fn open_again(patient: &mut Patient, engine: Engine) {
    let left = engine.map();
    drop(engine);
    patient.rig.kill();
    patient.rig.left = Some(OPERATIONS_MAX);
    let healer = patient.open().unwrap_or_else(|error| panic!("opened once, then refused: {error}"));
    assert_eq!(check_map(&healer), left, "the map after a kill");
    let mut engine = Engine::new(healer);
    engine.start(&mut patient.rig);
    if engine.close(&mut patient.rig).expect("a close ends").is_ok() {
        drop(engine);
        patient.rig.kill();
        patient.rig.left = Some(OPERATIONS_MAX);
        let healer = patient.open().unwrap_or_else(|error| panic!("closed cleanly, then refused: {error}"));
        assert_eq!(check_map(&healer), left, "the map after a close");
    }
}

/// Damage a volume and open it.
pub(crate) fn metadata(data: &[u8]) {
    let mut program = Program::new(data);
    let mut patient = Patient::new(&mut program);
    for _ in 0..CHANGES_MAX {
        if program.is_done() {
            break;
        }
        patient.change(&mut program);
    }
    let faulty = !patient.rig.bad.is_empty() || patient.rig.fails.is_some();
    let same_facts = patient.facts == patient.rig.shape.facts();
    let silent = matches!(patient.how, How::ReadOnly | How::Degraded);
    let healer = match patient.open() {
        Ok(healer) => healer,
        Err(error) => {
            // Unless it was a write that failed, nothing was written before everything had been checked.
            let late = faulty && !silent && matches!(error, OpenError::Io { .. });
            assert!(late || !patient.rig.was_written(), "refused ({error}), and written to");
            let line = error.to_string();
            assert!(!line.contains('\n') && line.len() < 500, "not one line: {line}");
            return;
        }
    };
    let map = check_map(&healer);
    let mut engine = Engine::new(healer);
    engine.start(&mut patient.rig);
    use_it(&mut patient, &mut engine, &map);
    assert!(!silent || !patient.rig.was_written(), "opened to be read, and written to");
    if !silent && !faulty && same_facts {
        open_again(&mut patient, engine);
    }
}
