//! A primary served as it is: what an open volume has beside it is made up.

use uuid::Uuid;

use super::DeviceFacts;
use crate::engine::create::{CreateParams, new_superblock};
use crate::engine::healer::Opened;
use crate::engine::view::Geometry;
use crate::units::{SECTOR_SIZE, SECTORS_PER_BLOCK};
use crate::volume::layout::{Layout, REMAPS_MIN};
use crate::volume::map::Map;
use crate::volume::table::Table;

pub(super) fn opened(primary: &DeviceFacts, serial: [u8; 20], read_only: bool) -> Opened {
    let layout = Layout::new(u64::MAX / 2, REMAPS_MIN).expect("a spare that large holds it");
    let params = CreateParams {
        primary: primary.clone(),
        spare: primary.clone(),
        capacity: primary.size / SECTOR_SIZE,
        labelled: false,
        max_remaps: layout.max_remaps,
        set: Uuid::nil(),
        devices: [Uuid::nil(); 2],
        serial,
        now: 0,
    };
    let capacity = params.capacity;
    let geometry = Geometry { capacity, logical_block: primary.logical_block, slots_start: 0, slots: 0 };
    let superblock = new_superblock(&params, &layout, None);
    let (table, map) = (Table::new(layout.max_remaps), Map::new(capacity.div_ceil(SECTORS_PER_BLOCK)));
    Opened { read_only, ..Opened::new(geometry, layout, superblock, table, map) }
}
