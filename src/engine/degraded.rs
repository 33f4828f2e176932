//! Opening a volume whose spare is lost, from the label of its primary: read-only, and without the blocks
//! that the label's copy of the table says have moved. Blocks that moved after that copy was written are the
//! one exception to R1: the primary may hold older data there.

use super::healer::Opened;
use super::io::Io;
use super::open::{DeviceFacts, OpenError, build_map, io_error, unknown_poison};
use super::view::Geometry;
use crate::device::DeviceIndex;
use crate::units::SECTOR_SIZE;
use crate::volume::layout::{Home, LabelLayout, Layout, PAGE, PAGE_SIZE, REGION_ALIGN, REMAPS_MAX, label_size};
use crate::volume::sidecar::Poison;
use crate::volume::superblock::{INCOMPAT_KNOWN, Seat, Superblock, SuperblockError};
use crate::volume::table::{Page, PageSeat, Table};

/// The label and where it lies, from the primary alone. Its start depends on its own size, so it is looked
/// for wherever one can begin, from the end on: nothing that a guest writes lies behind it.
async fn find_label(io: &Io, primary: &DeviceFacts) -> Result<(LabelLayout, Superblock), OpenError> {
    let end = primary.size / PAGE_SIZE * PAGE_SIZE;
    let mut damaged = None;
    for len in (1..=label_size(REMAPS_MAX) / REGION_ALIGN).map(|regions| regions * REGION_ALIGN) {
        let Some(start) = end.checked_sub(len) else { break };
        let mut newest: Option<Superblock> = None;
        for copy in 0..2 {
            let (page, _) = io.read(DeviceIndex::PRIMARY, start + u64::from(copy) * PAGE_SIZE, PAGE).await;
            let decoded = match page {
                Ok(page) => Superblock::decode(&page, Seat::Label, copy),
                // A bad sector, which would say nothing of what it was.
                Err(_) => continue,
            };
            match decoded {
                Ok(found) if newest.as_ref().is_none_or(|newest| newest.generation < found.generation) => {
                    newest = Some(found);
                }
                Ok(_) | Err(SuperblockError::NotOurs) => {}
                Err(SuperblockError::Version(version)) => return Err(OpenError::Version(version)),
                Err(error) => damaged = damaged.or(Some(error.to_string())),
            }
        }
        let Some(superblock) = newest else { continue };
        let label = LabelLayout::new(primary.size, superblock.max_remaps);
        if let Some(label) = label.filter(|label| label.start == start) {
            return Ok((label, superblock));
        }
    }
    Err(OpenError::NoLabelToGoBy(damaged.unwrap_or_else(|| "there is none at its end".to_owned())))
}

fn check(primary: &DeviceFacts, label: &LabelLayout, superblock: &Superblock) -> Result<(), OpenError> {
    let unknown = superblock.features[2] & !INCOMPAT_KNOWN;
    if unknown != 0 {
        return Err(OpenError::Features(unknown));
    }
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

pub(super) async fn open_degraded(io: &Io, primary: &DeviceFacts) -> Result<Opened, OpenError> {
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
