//! Opening a volume whose spare is lost, from the label of its primary: read-only, and without the blocks
//! that the label's copy of the table says have moved. Blocks that moved after that copy was written are the
//! one exception to R1: the primary may hold older data there.

use super::pages::unknown_poison;
use super::{DeviceFacts, OpenError, build_map, io_error, superblocks};
use crate::device::DeviceIndex;
use crate::engine::healer::Opened;
use crate::engine::io::Io;
use crate::engine::view::Geometry;
use crate::units::SECTOR_SIZE;
use crate::volume::layout::{Home, LabelLayout, Layout, PAGE, PAGE_SIZE, REGION_ALIGN, REMAPS_MAX, label_size};
use crate::volume::sidecar::Poison;
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::{Page, PageSeat, Table};

/// The label and where it lies, from the primary alone. Its start depends on its own size, so it is looked
/// for wherever one can begin, from the end on: nothing that a guest writes lies behind it.
async fn find_label(io: &Io, primary: &DeviceFacts) -> Result<(LabelLayout, Superblock), OpenError> {
    let end = primary.size / PAGE_SIZE * PAGE_SIZE;
    let mut damaged = None;
    for len in (1..=label_size(REMAPS_MAX) / REGION_ALIGN).map(|regions| regions * REGION_ALIGN) {
        let Some(start) = end.checked_sub(len) else { break };
        let found = superblocks::read_pair(io, Seat::Label, start).await?;
        if let Some(superblock) = superblocks::newest(&found) {
            let label = LabelLayout::new(primary.size, superblock.max_remaps);
            if let Some(label) = label.filter(|label| label.start == start) {
                return Ok((label, superblock.clone()));
            }
        }
        damaged = damaged.or_else(|| superblocks::damage(&found));
    }
    Err(OpenError::NoLabelToGoBy(damaged.unwrap_or_else(|| "there is none at its end".to_owned())))
}

fn check(primary: &DeviceFacts, label: &LabelLayout, superblock: &Superblock) -> Result<(), OpenError> {
    superblocks::check_features(superblock, DeviceIndex::PRIMARY)?;
    let (found, expected) = (primary.size, superblock.primary_size);
    if found > expected {
        return Err(OpenError::Grown { found, expected });
    }
    let guest_end = superblock.capacity.checked_mul(SECTOR_SIZE);
    if found < expected || guest_end.is_none_or(|end| end > label.start) {
        return Err(OpenError::Shrunk { device: DeviceIndex::PRIMARY, found, expected });
    }
    if primary.logical_block > superblock.logical_block {
        let (found, expected) = (primary.logical_block, superblock.logical_block);
        return Err(OpenError::LogicalBlock { device: DeviceIndex::PRIMARY, found, expected });
    }
    if superblock.stamped == 0 {
        return Err(OpenError::LabelHalfWritten);
    }
    Ok(())
}

/// The table as it was when the label was stamped. Every page counts: without one of them nobody knows which
/// blocks have moved.
async fn read_table(io: &Io, label: &LabelLayout, superblock: &Superblock) -> Result<Table, OpenError> {
    let mut table = Table::new(superblock.max_remaps);
    for number in 0..label.table_pages {
        let (page, _) = io.read(DeviceIndex::PRIMARY, label.table(number), PAGE).await;
        let page = page.map_err(io_error(DeviceIndex::PRIMARY, "reading the label's list of remapped blocks"))?;
        let page = Page::decode(&page, superblock.set, number, PageSeat::Label);
        table.load_page(number, &page.ok_or(OpenError::LabelPage(number))?, Home::A);
    }
    Ok(table)
}

pub(super) async fn open(io: &Io, primary: &DeviceFacts) -> Result<Opened, OpenError> {
    let (label, superblock) = find_label(io, primary).await?;
    check(primary, &label, &superblock)?;
    let table = read_table(io, &label, &superblock).await?;
    let (map, _) = build_map(&table, superblock.capacity)?;
    let page = io.read_page(DeviceIndex::PRIMARY, label.poison()).await;
    let poison = page.ok().and_then(|page| Poison::decode(&page, superblock.set, Seat::Label));
    let layout = Layout::new(superblock.spare_size, superblock.max_remaps)?;
    let geometry = Geometry {
        capacity: superblock.capacity,
        logical_block: superblock.logical_block,
        slots_start: layout.slots_start,
        slots: superblock.max_remaps,
    };
    Ok(Opened {
        read_only: true,
        poison: poison.unwrap_or_else(unknown_poison),
        stamped: Some(superblock.stamped),
        ..Opened::new(geometry, layout, superblock, table, map)
    })
}
