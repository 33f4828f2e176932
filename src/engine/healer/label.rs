//! The label of a primary that was made by us: its superblocks, and its stamped copy of the table.

use std::rc::Rc;

use super::Core;
use super::failure::Failure;
use crate::device::{DeviceIndex, Errno};
use crate::engine::task::join_all;
use crate::volume::layout::LabelLayout;
use crate::volume::superblock::{Seat, Superblock};
use crate::volume::table::PageSeat;

impl Core {
    /// Refresh the label: its superblock and its copy of the table, where commits came since the last
    /// time. Off the path; a failure is only counted.
    pub(super) async fn stamp_label(self: &Rc<Self>) {
        self.places.label.acquire().await;
        if let Some(label) = self.label.get() {
            self.stamp_in_turn(label).await;
        }
        self.places.label.release();
    }

    /// Have the label written anew the next time it is stamped.
    pub(super) fn label_is_old(&self) {
        self.places.stamped_commits.set(None);
    }

    async fn stamp_in_turn(self: &Rc<Self>, label: LabelLayout) {
        let commits = self.tally.borrow().commits;
        // While the volume is poisoned nothing is flushed, and nothing moves either.
        let impossible = self.refuse_gone(DeviceIndex::PRIMARY).is_err() || self.mode.get().poisoned;
        if impossible || self.places.stamped_commits.get() == Some(commits) {
            return;
        }
        let superblocks = self.label_superblocks(label).await;
        match self.write_label(label, superblocks).await {
            Ok(()) => self.places.stamped_commits.set(Some(commits)),
            Err(_) => self.places.label_failures.set(self.places.label_failures.get() + 1),
        }
    }

    /// Write the label's copy of the table. While that is half done, which a power cut could leave so, both
    /// superblocks of the label say that its list has no date, and nobody goes by it: a block whose entry moved
    /// from one page to another might be on neither.
    pub(super) async fn write_label(
        self: &Rc<Self>,
        label: LabelLayout,
        superblocks: [(u8, Superblock); 2],
    ) -> Result<(), Failure> {
        let primary = DeviceIndex::PRIMARY;
        let stamp = self.wall_seconds();
        let pages: Vec<_> = (0..label.table_pages)
            .map(|number| {
                let table = self.table.borrow();
                let page = table.page_with(number, table.page(number).sequence, &[]);
                (label.table(number), page.encode(self.set, number, PageSeat::Label))
            })
            .collect();
        self.date_label(label, &superblocks, 0).await?;
        self.flush(primary).await?;
        let writes = pages.iter().map(|(offset, bytes)| self.io.write(primary, *offset, bytes));
        let written: Result<(), Errno> = join_all(writes).await.into_iter().collect();
        written.map_err(|errno| Failure::errno(primary, errno))?;
        self.flush(primary).await?;
        self.date_label(label, &superblocks, stamp).await
    }

    /// What belongs into the two superblocks of the label: this generation's, and in the other copy what it has,
    /// or this generation's too where it cannot be read.
    async fn label_superblocks(&self, label: LabelLayout) -> [(u8, Superblock); 2] {
        let current = self.superblock.borrow().clone();
        let copy = Superblock::copy_for(current.generation);
        let other = self.io.read_page(DeviceIndex::PRIMARY, label.superblock(1 - copy)).await.ok();
        let other = other.and_then(|page| Superblock::decode(&page, Seat::Label, 1 - copy).ok());
        let other = other.filter(|other| other.set == self.set).unwrap_or_else(|| current.clone());
        [(copy, current), (1 - copy, other)]
    }

    /// Write both superblocks of the label with the time at which its table was true, one after the other: a
    /// power cut tears one of them at most. One that fails is done without, as long as it does not read as one
    /// that gives the list a date which it has no more.
    async fn date_label(
        self: &Rc<Self>,
        label: LabelLayout,
        superblocks: &[(u8, Superblock); 2],
        stamped: u64,
    ) -> Result<(), Failure> {
        let primary = DeviceIndex::PRIMARY;
        let mut dated = Err(Errno(libc::EIO));
        for (copy, superblock) in superblocks {
            if dated.is_ok() {
                self.flush(primary).await?;
            }
            let superblock = Superblock { stamped, ..superblock.clone() };
            let written = self.io.write(primary, label.superblock(*copy), &superblock.encode(Seat::Label, *copy)).await;
            if let Err(errno) = written
                && stamped == 0
                && let Ok(page) = self.io.read_page(primary, label.superblock(*copy)).await
                && Superblock::decode(&page, Seat::Label, *copy).is_ok_and(|old| old.stamped != 0)
            {
                return Err(Failure::errno(primary, errno));
            }
            dated = dated.or(written);
        }
        dated.map_err(|errno| Failure::errno(primary, errno))
    }
}
