//! The label of a primary whose spare nobody has named: found by itself, listed, and destroyed for good.

use uuid::Uuid;

use super::{DeviceFacts, OpenError, build_map, io_error, superblocks};
use crate::device::{Completion, DeviceIndex, Op};
use crate::engine::io::Io;
use crate::engine::script::Script;
use crate::units::{Block, SECTOR_SIZE, Time};
use crate::volume::layout::{Home, LabelLayout, PAGE, PAGE_SIZE, REGION_ALIGN, REMAPS_MAX, label_size};
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::{Page, PageSeat, Table};

/// Every byte at which the label of a primary of that size may start, nearest to its end first: nothing that
/// a guest of a labelled volume writes lies behind the true one.
fn starts(size: u64) -> impl Iterator<Item = u64> {
    let end = size / PAGE_SIZE * PAGE_SIZE;
    (1..=label_size(REMAPS_MAX) / REGION_ALIGN).map_while(move |regions| end.checked_sub(regions * REGION_ALIGN))
}

/// The superblocks at `start`, and their newest where it is one of a label that starts there.
async fn look(
    io: &Io,
    size: u64,
    start: u64,
) -> Result<(Option<(LabelLayout, Superblock)>, Option<String>), OpenError> {
    let found = superblocks::read_pair(io, Seat::Label, start).await?;
    let label = superblocks::newest(&found).and_then(|superblock| {
        let layout = LabelLayout::new(size, superblock.max_remaps).filter(|layout| layout.start == start)?;
        Some((layout, superblock.clone()))
    });
    Ok((label, superblocks::damage(&found)))
}

/// The label and where it lies, from the primary alone: its start depends on its own size, so it is looked for
/// wherever one can begin.
pub(super) async fn find(io: &Io, primary: &DeviceFacts) -> Result<(LabelLayout, Superblock), OpenError> {
    let mut damaged = None;
    for start in starts(primary.size) {
        match look(io, primary.size, start).await? {
            (Some(label), _) => return Ok(label),
            (None, damage) => damaged = damaged.or(damage),
        }
    }
    Err(OpenError::NoLabelToGoBy(damaged.unwrap_or_else(|| "there is none at its end".to_owned())))
}

/// The table as it was when the label was stamped. Every page counts: without one of them nobody knows which
/// blocks have moved.
pub(super) async fn read_table(io: &Io, label: &LabelLayout, superblock: &Superblock) -> Result<Table, OpenError> {
    let mut table = Table::new(superblock.max_remaps);
    for number in 0..label.table_pages {
        let page = io.read_page(DeviceIndex::PRIMARY, label.table(number)).await;
        let page = page.map_err(io_error(DeviceIndex::PRIMARY, "reading the label's list of remapped blocks"))?;
        let page = Page::decode(&page, superblock.set, number, PageSeat::Label);
        table.load_page(number, &page.ok_or(OpenError::LabelPage(number))?, Home::A);
    }
    Ok(table)
}

/// What a primary's label says of the volume it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OldLabel {
    /// The volume.
    pub set: Uuid,
    /// When it was made, seconds since the epoch.
    pub created: u64,
    /// When the list of remapped blocks was written, seconds since the epoch.
    pub stamped: u64,
    /// Blocks on that list; `None` where it is not whole.
    pub remapped: Option<usize>,
    /// Where the superblocks of labels lie that somebody could go by.
    superblocks: Vec<u64>,
}

impl OldLabel {
    /// Destroy it, durably: from then on nobody takes its list for that of another volume.
    pub(in crate::engine) async fn destroy(&self, io: &Io) -> Result<(), OpenError> {
        let primary = DeviceIndex::PRIMARY;
        let failed = io_error(primary, "destroying the label of its old volume");
        for offset in &self.superblocks {
            io.write(primary, *offset, &[0; PAGE]).await.map_err(&failed)?;
        }
        io.flush(primary).await.map_err(&failed)
    }
}

/// Labels of this very disk: others `serve --degraded` does not go by, and they may be a guest's data.
async fn search(io: &Io, primary: &DeviceFacts) -> Result<Option<OldLabel>, OpenError> {
    let mut first: Option<OldLabel> = None;
    for start in starts(primary.size) {
        let (Some((layout, superblock)), _) = look(io, primary.size, start).await? else { continue };
        let guest_end = superblock.capacity.checked_mul(SECTOR_SIZE);
        if superblock.primary_size != primary.size || guest_end.is_none_or(|end| end > layout.start) {
            continue;
        }
        let superblocks = [0, 1].map(|copy| layout.superblock(copy));
        if let Some(first) = &mut first {
            first.superblocks.extend(superblocks);
            continue;
        }
        let Superblock { set, created, stamped, capacity, .. } = superblock;
        let remapped = match read_table(io, &layout, &superblock).await.and_then(|table| build_map(&table, capacity)) {
            Ok((map, _)) if stamped != 0 => Some(map.iter_from(Block(0)).count()),
            _ => None,
        };
        first = Some(OldLabel { set, created, stamped, remapped, superblocks: superblocks.into() });
    }
    Ok(first)
}

/// A search for the label of a primary.
pub struct LabelSearch(Script<Option<OldLabel>>);

impl LabelSearch {
    /// Begin; nothing is done before the first [`LabelSearch::step`].
    pub fn new(primary: DeviceFacts) -> LabelSearch {
        LabelSearch(Script::start(|io| async move { search(&io, &primary).await }))
    }

    /// Report what has completed, and get the operations to submit.
    pub fn step(&mut self, now: Time, completions: &[Completion], ops: &mut Vec<Op>) {
        self.0.step(now, completions, ops);
    }

    /// The result, once it is there.
    pub fn result(&self) -> Option<Result<Option<OldLabel>, OpenError>> {
        self.0.outcome.borrow_mut().take()
    }
}
