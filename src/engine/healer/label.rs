//! The label of a primary that was made by us: its superblocks, and its stamped copy of the table.

use std::rc::Rc;

use uuid::Uuid;

use super::failure::{Failure, FailureClass};
use super::{Core, EventKind, Severity};
use crate::device::buffer::AlignedBuf;
use crate::device::{DeviceIndex, Errno};
use crate::engine::task::join_all;
use crate::units::SectorRange;
use crate::volume::layout::LabelLayout;
use crate::volume::superblock::{Seat, Superblock, SuperblockError};
use crate::volume::table::PageSeat;

/// The label is left alone once the primary has gone so many times in a row while it was written.
const GOES_MAX: u32 = 3;

/// What is wrong with a superblock of the label.
#[derive(Debug, thiserror::Error)]
enum Flaw {
    #[error("{0}")]
    Unreadable(Errno),
    #[error("{0}")]
    Damaged(SuperblockError),
    #[error("it belongs to the volume {0}")]
    Foreign(Uuid),
}

impl Core {
    /// Refresh the label: its superblock and its copy of the table, where commits came since the last
    /// time. Off the path; a failure is told once, and it is tried again from time to time.
    pub(super) async fn stamp_label(self: &Rc<Self>) {
        self.stamp_label_when_free(false).await;
    }

    /// Write the label anew for a close.
    pub(super) async fn stamp_label_for_close(self: &Rc<Self>) {
        self.stamp_label_when_free(true).await;
    }

    async fn stamp_label_when_free(self: &Rc<Self>, for_close: bool) {
        self.places.label.acquire().await;
        if for_close {
            self.label_is_old();
        }
        // A close that has begun has its own stamp, and then looks at the primary for the last time.
        if let Some(label) = self.label.get()
            && (for_close || !self.closing.get())
        {
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
        let impossible = self.refuse_gone(DeviceIndex::PRIMARY).is_err()
            || self.mode.get().poisoned
            || self.places.label_goes.get() >= GOES_MAX;
        if impossible || self.places.stamped_commits.get() == Some(commits) {
            return;
        }
        match self.stamp(label).await {
            Ok(()) => {
                self.places.stamped_commits.set(Some(commits));
                self.places.label_fails.set(false);
                self.places.label_goes.set(0);
            }
            Err(failure) if failure.class == FailureClass::Gone => {
                self.places.label_goes.set(self.places.label_goes.get() + 1);
                if self.places.label_goes.get() == GOES_MAX {
                    self.label_fails(
                        "the device goes whenever that is done",
                        "left alone until the volume is opened again",
                    );
                }
            }
            Err(failure) if !self.places.label_fails.replace(true) => {
                self.label_fails(&failure.cause, "tried again each minute");
            }
            Err(_) => {}
        }
    }

    /// Whether the last attempt to write the label failed.
    pub(super) fn is_label_failing(&self) -> bool {
        self.places.label_fails.get() || self.places.label_goes.get() > 0
    }

    fn label_fails(&self, why: &str, what: &str) {
        let cause = format!("writing the label: {why}");
        let action = format!("{what}; until then `serve --degraded` would go by an older list");
        self.event(
            Severity::Warn,
            EventKind::LabelFailed,
            Some(DeviceIndex::PRIMARY),
            SectorRange::default(),
            cause,
            action,
        );
    }

    /// Of the two superblocks the one that is written last is what a power cut leaves. It is written again first,
    /// byte for byte: a killed process may have left it in the device's cache, and had a flush failed since, the
    /// next one would succeed without it.
    async fn stamp(self: &Rc<Self>, label: LabelLayout) -> Result<(), Failure> {
        let primary = DeviceIndex::PRIMARY;
        let current = self.superblock.borrow().clone();
        let copy = Superblock::copy_for(current.generation);
        let found = [self.label_superblock(label, 0).await, self.label_superblock(label, 1).await];
        if found.iter().any(|found| matches!(found, Err(Flaw::Unreadable(_)))) {
            // A device that is gone has no damaged label, and a flush that fails for it would poison the volume.
            self.confirm(primary).await?;
        }
        // The other copy keeps what it has. Where that cannot be read it gets this generation's too, and first, as
        // the last one must be whole until then.
        let superblocks = match &found[usize::from(1 - copy)] {
            Ok((other, _)) => [(copy, current), (1 - copy, other.clone())],
            Err(_) => [(1 - copy, current.clone()), (copy, current)],
        };
        let [first, last] = superblocks.each_ref().map(|(copy, _)| *copy);
        if let Ok((_, page)) = &found[usize::from(last)] {
            let written = self.io.write(primary, label.superblock(last), page).await;
            if let Err(errno) = written {
                self.confirm(primary).await?;
                // A damaged one may be written all the same.
                if found[usize::from(first)].is_ok() {
                    return Err(Failure::errno(primary, errno));
                }
            }
        }
        let stamped = self.write_label(label, superblocks).await;
        for (copy, found) in (0..).zip(found) {
            if let Err(flaw) = found
                && self.label_superblock(label, copy).await.is_ok()
            {
                self.tally.borrow_mut().metadata_repairs += 1;
                let cause = format!("superblock {copy} of the label: {flaw}");
                let action = "rewritten from the newest copy";
                self.event(
                    Severity::Warn,
                    EventKind::MetadataRepaired,
                    Some(primary),
                    SectorRange::default(),
                    cause,
                    action,
                );
            }
        }
        stamped
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
        self.flush_label().await?;
        let writes = pages.iter().map(|(offset, bytes)| self.io.write(primary, *offset, bytes));
        let written: Result<(), Errno> = join_all(writes).await.into_iter().collect();
        if let Err(errno) = written {
            self.confirm(primary).await?;
            return Err(Failure::errno(primary, errno));
        }
        self.date_label(label, &superblocks, stamp).await
    }

    /// A flush that fails poisons the volume, and one of a device that is gone does.
    pub(super) async fn flush_label(self: &Rc<Self>) -> Result<(), Failure> {
        self.refuse_gone(DeviceIndex::PRIMARY)?;
        self.flush(DeviceIndex::PRIMARY).await
    }

    /// A superblock of the label and its bytes, or what is wrong with it.
    async fn label_superblock(&self, label: LabelLayout, copy: u8) -> Result<(Superblock, AlignedBuf), Flaw> {
        let page = self.io.read_page(DeviceIndex::PRIMARY, label.superblock(copy)).await.map_err(Flaw::Unreadable)?;
        let superblock = Superblock::decode(&page, Seat::Label, copy).map_err(Flaw::Damaged)?;
        match superblock.set == self.set {
            true => Ok((superblock, page)),
            false => Err(Flaw::Foreign(superblock.set)),
        }
    }

    /// Write both superblocks of the label with the time at which its table was true, each when all that was written
    /// before is durable: a power cut tears one of them at most. One that fails is done without, as long as it does
    /// not read as one that gives the list a date which it has no more.
    async fn date_label(
        self: &Rc<Self>,
        label: LabelLayout,
        superblocks: &[(u8, Superblock); 2],
        stamped: u64,
    ) -> Result<(), Failure> {
        let primary = DeviceIndex::PRIMARY;
        let mut dated = Err(Errno(libc::EIO));
        for (copy, superblock) in superblocks {
            self.flush_label().await?;
            let superblock = Superblock { stamped, ..superblock.clone() };
            let written = self.io.write(primary, label.superblock(*copy), &superblock.encode(Seat::Label, *copy)).await;
            if let Err(errno) = written {
                self.confirm(primary).await?;
                let read = self.label_superblock(label, *copy).await;
                if stamped == 0 && read.is_ok_and(|(old, _)| old.stamped != 0) {
                    return Err(Failure::errno(primary, errno));
                }
            }
            dated = dated.or(written);
        }
        dated.map_err(|errno| Failure::errno(primary, errno))
    }
}
