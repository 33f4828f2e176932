//! Opening a volume whose spare is lost, from the label of its primary: read-only, and without the blocks
//! that the label's copy of the table says have moved. Blocks that moved after that copy was written are the
//! one exception to R1: the primary may hold older data there.

use super::pages::unknown_poison;
use super::{DeviceFacts, OpenError, build_map, label, superblocks};
use crate::device::DeviceIndex;
use crate::engine::healer::Opened;
use crate::engine::io::Io;
use crate::engine::view::Geometry;
use crate::units::SECTOR_SIZE;
use crate::volume::layout::{LabelLayout, Layout};
use crate::volume::sidecar::Poison;
use crate::volume::superblock::{Seat, Superblock};

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

pub(super) async fn open(io: &Io, primary: &DeviceFacts) -> Result<Opened, OpenError> {
    let (label, superblock) = label::find(io, primary).await?;
    check(primary, &label, &superblock)?;
    let table = label::read_table(io, &label, &superblock).await?;
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
