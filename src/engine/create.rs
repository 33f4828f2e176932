//! Creating a volume: a script of device operations, like opening one.

use uuid::Uuid;

use super::io::Io;
use super::open::{DeviceFacts, OldLabel, OpenError, io_error, tail_starts};
use super::script::Script;
use super::task::join_all;
use crate::device::buffer::AlignedBuf;
use crate::device::{Completion, DeviceIndex, Errno, Op};
use crate::units::{BLOCK_SIZE, SECTOR_SIZE, Time};
use crate::volume::layout::{Home, LabelLayout, Layout, PAGE, PAGE_SIZE, Place, label_size};
use crate::volume::sidecar::{Poison, SavedCounters};
use crate::volume::superblock::{CloseStamp, MAGIC, Region, Seat, Superblock};
use crate::volume::table::{PageSeat, Table};

/// How to make a volume.
#[derive(Clone, Debug)]
pub struct CreateParams {
    /// The primary.
    pub primary: DeviceFacts,
    /// The spare.
    pub spare: DeviceFacts,
    /// Sectors the guest will see.
    pub capacity: u64,
    /// Put a label at the primary's end; an adopted primary is not changed by a byte.
    pub labelled: bool,
    /// Slots.
    pub max_remaps: u32,
    /// The volume's name.
    pub set: Uuid,
    /// The devices' names: primary, spare.
    pub devices: [Uuid; 2],
    /// GET_ID.
    pub serial: [u8; 20],
    /// Seconds since the epoch.
    pub now: u64,
}

/// A volume being made.
pub struct Creation(Script<()>);

impl Creation {
    /// Begin; nothing is done before the first [`Creation::step`].
    pub fn new(params: CreateParams) -> Creation {
        Creation(Script::start(|io| async move { create(&io, &params, None).await }))
    }

    /// The same on a primary that carries the label of another volume, which is destroyed: without that
    /// volume's spare, nobody could tell any more that it does not speak of the new one.
    pub fn replacing(params: CreateParams, label: OldLabel) -> Creation {
        Creation(Script::start(|io| async move { create(&io, &params, Some(&label)).await }))
    }

    /// Report what has completed, and get the operations to submit.
    pub fn step(&mut self, now: Time, completions: &[Completion], ops: &mut Vec<Op>) {
        self.0.step(now, completions, ops);
    }

    /// The result, once it is there.
    pub fn result(&self) -> Option<Result<(), OpenError>> {
        self.0.outcome.borrow_mut().take()
    }
}

/// Write a new volume: the spare complete and flushed, the primary's label last.
async fn create(io: &Io, params: &CreateParams, old_label: Option<&OldLabel>) -> Result<(), OpenError> {
    let (unit, size) = (params.primary.logical_block.max(params.spare.logical_block), params.capacity * SECTOR_SIZE);
    if !size.is_multiple_of(u64::from(unit)) {
        return Err(OpenError::Ragged { unit, size });
    }
    let layout = Layout::new(params.spare.size, params.max_remaps)?;
    let label = if params.labelled {
        let layout = LabelLayout::new(params.primary.size, params.max_remaps);
        let needed = params.capacity * SECTOR_SIZE + label_size(params.max_remaps);
        let fits = layout.filter(|label| label.start >= params.capacity * SECTOR_SIZE);
        let (size, capacity) = (params.primary.size, params.capacity);
        Some(fits.ok_or(OpenError::PrimarySmall { size, capacity, needed })?)
    } else {
        None
    };
    let superblock = new_superblock(params, &layout, label);
    let spare = DeviceIndex::SPARE;
    let failed = io_error(spare, "writing zeros over the new spare");
    forget_old_volume(io, params.spare.size).await.map_err(&failed)?;
    io.write_zeroes(spare, 0, params.spare.size / PAGE_SIZE * PAGE_SIZE).await.map_err(&failed)?;
    let failed = io_error(spare, "writing new metadata");
    let table = Table::new(params.max_remaps);
    for place in Place::ALL {
        for home in Home::ALL {
            write_all_pages(io, &layout, &superblock, &table, place, home).await.map_err(&failed)?;
        }
        let poison = Poison::default().encode(params.set, Seat::Spare(place));
        io.write(spare, layout.poison(place), &poison).await.map_err(&failed)?;
        let counters = SavedCounters::default().encode(params.set, Seat::Spare(place));
        io.write(spare, layout.counters(place), &counters).await.map_err(&failed)?;
    }
    io.flush(spare).await.map_err(&failed)?;
    if let Some(label) = old_label {
        // At no instant is there a new volume and an old label.
        label.destroy(io).await?;
    }
    for place in Place::ALL {
        for copy in 0..2 {
            let bytes = superblock.encode(Seat::Spare(place), copy);
            io.write(spare, layout.superblock(place, copy), &bytes).await.map_err(&failed)?;
        }
    }
    io.flush(spare).await.map_err(&failed)?;
    let Some(label) = label else { return Ok(()) };
    let primary = DeviceIndex::PRIMARY;
    let failed = io_error(primary, "writing the label");
    io.write(primary, label.poison(), &Poison::default().encode(params.set, Seat::Label)).await.map_err(&failed)?;
    for number in 0..label.table_pages {
        let page = table.page_with(number, 1, &[]).encode(params.set, number, PageSeat::Label);
        io.write(primary, label.table(number), &page).await.map_err(&failed)?;
    }
    for copy in 0..2 {
        let bytes = superblock.encode(Seat::Label, copy);
        io.write(primary, label.superblock(copy), &bytes).await.map_err(&failed)?;
    }
    io.flush(primary).await.map_err(&failed)
}

/// Make sure that nobody finds a volume on the spare any more before anything else of it goes: a creation
/// that is cut short must not leave an old map over slots that are zeros.
async fn forget_old_volume(io: &Io, spare_size: u64) -> Result<(), Errno> {
    let spare = DeviceIndex::SPARE;
    let mut found = false;
    for start in std::iter::once(0).chain(tail_starts(spare_size)) {
        for offset in [start, start + PAGE_SIZE] {
            let (page, _) = io.read(spare, offset, PAGE).await;
            if !page.is_ok_and(|page| !page.starts_with(&MAGIC)) {
                io.write_zeroes(spare, offset, PAGE_SIZE).await?;
                found = true;
            }
        }
    }
    if found { io.flush(spare).await } else { Ok(()) }
}

/// Write one home of a place in large pieces.
async fn write_all_pages(
    io: &Io,
    layout: &Layout,
    superblock: &Superblock,
    table: &Table,
    place: Place,
    home: Home,
) -> Result<(), Errno> {
    const PAGES_AT_ONCE: u32 = 256;
    let mut writes = Vec::new();
    for first in (0..layout.table_pages).step_by(PAGES_AT_ONCE as usize) {
        let count = PAGES_AT_ONCE.min(layout.table_pages - first);
        let mut bytes = AlignedBuf::zeroed(usize::try_from(u64::from(count) * PAGE_SIZE).expect("1 MiB"));
        for (number, at) in (first..first + count).zip(bytes.chunks_exact_mut(PAGE)) {
            let page = table.page_with(number, table.page(number).sequence, &[]);
            at.copy_from_slice(&page.encode(superblock.set, number, PageSeat::Spare(place, home)));
        }
        writes.push((layout.table(place, home, first), bytes));
    }
    let writes = writes.iter().map(|(offset, bytes)| io.write(DeviceIndex::SPARE, *offset, bytes));
    join_all(writes).await.into_iter().collect()
}

pub(super) fn new_superblock(params: &CreateParams, layout: &Layout, label: Option<LabelLayout>) -> Superblock {
    let slots = u64::from(params.max_remaps) * BLOCK_SIZE;
    let tail = layout.place_start(Place::Tail);
    let guest = params.capacity * SECTOR_SIZE;
    let mut regions = vec![
        Region { kind: 1, device: 1, start: 0, length: layout.place_len() },
        Region { kind: 2, device: 1, start: layout.slots_start, length: slots },
        Region { kind: 3, device: 1, start: tail, length: layout.place_len() },
        Region { kind: Region::GUEST, device: 0, start: 0, length: guest },
    ];
    if let Some(label) = label {
        let length = label_size(params.max_remaps);
        regions.push(Region { kind: Region::LABEL, device: 0, start: label.start, length });
    }
    Superblock {
        features: [0; 3],
        set: params.set,
        device: params.devices[1],
        clean: true,
        labelled: label.is_some(),
        retired: 0,
        generation: 1,
        capacity: params.capacity,
        primary_size: params.primary.size,
        spare_size: params.spare.size,
        max_remaps: params.max_remaps,
        logical_block: params.primary.logical_block.max(params.spare.logical_block),
        created: params.now,
        serial: params.serial,
        stamp: None::<CloseStamp>,
        sampled: 0,
        primary_inode: params.primary.inode,
        primary_wwn: params.primary.wwn.clone(),
        history: Default::default(),
        regions,
        stamped: params.now,
    }
}
