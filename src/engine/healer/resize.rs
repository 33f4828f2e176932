//! Growing a volume while it is served.
//!
//! What is on disk changes in an order in which every state that a crash can leave behind opens:
//!
//! 0. Where an earlier attempt may have left a label that never counted, at the end of the primary, zeros are written.
//!    Only then is the primary extended, by others: nobody would find that label any more.
//! 1. A copy of the label is written behind the old one, where nobody looks for it yet.
//! 2. The spare says that the label lies there, and that the old one is to be zeroed. The capacity stays as it was:
//!    what is to be zeroed lies beyond the end of the disk, for whoever opens the volume now.
//! 3. Zeros are written over the old label.
//! 4. The spare says the new capacity, and no longer that anything is to be zeroed. Both copies of its superblock
//!    do: none is left that would have zeros written over what the guest writes there from now on.
//! 5. The shards hear of it, and when all have, whoever tells the guest.
//!
//! A failure leaves the guest with the disk it has. Before step 2 the volume is as it was. After that its label has
//! moved, and the zeros are written with the next open, or the next order to grow. From step 4 on the disk may have
//! grown when it is opened the next time.
//!
//! A volume without a label has only the last two steps.

use std::rc::Rc;
use std::sync::atomic::Ordering;

use super::failure::Failure;
use super::{Core, EventKind, Severity};
use crate::device::{DeviceIndex, Errno};
use crate::units::{BlockRange, SECTOR_SIZE, SECTORS_PER_BLOCK, Sector, SectorRange};
use crate::volume::layout::{LabelLayout, grown_primary};
use crate::volume::superblock::{CAPACITY_MAX, Superblock};

/// Why a volume has not grown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotResized {
    /// One line for a person.
    pub why: String,
    /// Nothing on the devices speaks of a larger primary: it may become as short again as it was.
    pub is_as_before: bool,
}

fn cause(failure: Failure) -> String {
    match failure.device {
        Some(device) => format!("{device}: {}", failure.cause),
        None => failure.cause,
    }
}

impl Core {
    /// Step 0, for a primary of `size` bytes that is about to be extended.
    pub(super) async fn prepare_resize(self: &Rc<Self>, size: u64) -> Result<(), String> {
        self.places.label.acquire().await;
        let settled = match self.may_write() {
            Ok(()) if self.policy.passthrough => Ok(()),
            Ok(()) => self.settle_resize(size).await,
            Err(why) => Err(why),
        };
        self.places.label.release();
        settled
    }

    /// Show the guest `capacity` sectors of a primary that has `primary_size` bytes.
    pub(super) async fn resize(self: &Rc<Self>, capacity: u64, primary_size: u64) -> Result<String, NotResized> {
        if self.places.resizing.replace(true) {
            return Err(NotResized { why: "it is being resized already".to_owned(), is_as_before: false });
        }
        let mut is_as_before = true;
        let grown = self.grow(capacity, primary_size, &mut is_as_before).await;
        self.places.resizing.set(false);
        match grown {
            Ok(()) => Ok(format!("the disk has {capacity} sectors now ({} bytes)", capacity * SECTOR_SIZE)),
            Err(why) => Err(NotResized { why, is_as_before }),
        }
    }

    async fn grow(self: &Rc<Self>, capacity: u64, primary_size: u64, is_as_before: &mut bool) -> Result<(), String> {
        self.may_write()?;
        self.check_growth(capacity, primary_size)?;
        if !self.policy.passthrough {
            // Held for every write to the primary, and for the last ones to the spare: a close that comes meanwhile
            // waits until they have ended before it looks at the primary for the last time.
            self.places.label.acquire().await;
            let moved = self.move_label(primary_size, is_as_before).await;
            self.places.label.release();
            moved?;
        }
        let before = self.geometry().capacity;
        // A job that works on a last block which is short must not find it longer in its midst.
        let is_short = !before.is_multiple_of(SECTORS_PER_BLOCK);
        let fence = match is_short {
            true => Some(self.fence(BlockRange::one(Sector(before).block())).await.map_err(cause)?),
            false => None,
        };
        self.places.label.acquire().await;
        let written = self.write_capacity(capacity, primary_size, is_as_before).await;
        self.places.label.release();
        if written.is_ok() {
            self.use_capacity(capacity);
        }
        fence.into_iter().for_each(|fence| self.lift(fence));
        written?;
        let range = SectorRange { start: Sector(before), count: capacity - before };
        let action = format!("the disk has {capacity} sectors now, and {before} before");
        self.event(
            Severity::Info,
            EventKind::Resized,
            Some(DeviceIndex::PRIMARY),
            range,
            "the operator's order",
            action,
        );
        if !self.tell_everywhere().await {
            return Err("a worker does not answer; the guest gets the larger disk from the next start on".to_owned());
        }
        self.flushes.grown();
        self.label_is_old();
        self.stamp_label().await;
        self.progress.capacity.store(capacity, Ordering::SeqCst);
        Ok(())
    }

    fn check_growth(&self, capacity: u64, primary_size: u64) -> Result<(), String> {
        let geometry = self.geometry();
        let (before, unit) = (geometry.capacity, u64::from(geometry.logical_block));
        if capacity <= before {
            let size = before * SECTOR_SIZE;
            return Err(format!("the disk has {before} sectors ({size} bytes) already, and can only grow"));
        }
        if capacity > CAPACITY_MAX {
            return Err(format!("{capacity} sectors are more than the {CAPACITY_MAX} that a volume can have"));
        }
        let guest_end = capacity * SECTOR_SIZE;
        if !guest_end.is_multiple_of(unit) {
            return Err(format!("{guest_end} bytes are no multiple of the devices' logical blocks of {unit}"));
        }
        let superblock = self.superblock.borrow();
        let (recorded, remaps) = (superblock.primary_size, superblock.max_remaps);
        let (needed, fits) = match self.label.get() {
            None => (guest_end.max(recorded), primary_size >= recorded && primary_size >= guest_end),
            Some(old) => {
                let new = LabelLayout::new(primary_size, remaps);
                let fits = |new: LabelLayout| new.start >= guest_end && (new == old || new.start >= old.end());
                (grown_primary(recorded, guest_end, remaps), new.is_some_and(fits))
            }
        };
        match fits {
            true => Ok(()),
            false => Err(format!("the primary has {primary_size} bytes, and a disk of {guest_end} needs {needed}")),
        }
    }

    /// Have the label at the end of a primary of that size, and zeros where it was (steps 1 to 3).
    async fn move_label(self: &Rc<Self>, primary_size: u64, is_as_before: &mut bool) -> Result<(), String> {
        // Waiting took time.
        self.may_write()?;
        let recorded = self.superblock.borrow().primary_size;
        self.settle_resize(recorded).await?;
        let Some(old) = self.label.get() else {
            // The size must be as durable as what is said of it.
            return self.flush(DeviceIndex::PRIMARY).await.map_err(cause);
        };
        let current = self.superblock.borrow().clone();
        let new = LabelLayout::new(primary_size, current.max_remaps).expect("it was checked that it fits");
        if new == old {
            return Ok(());
        }
        let mut moved = current;
        moved.move_label(old, new, primary_size);
        let copied = self.copy_label(new, &moved).await.map_err(cause).and_then(|()| self.refuse_closing());
        if let Err(why) = copied {
            self.places.next_label.set(None);
            return Err(why);
        }
        *is_as_before = false;
        self.change_superblock(|next| next.move_label(old, new, primary_size)).await.map_err(cause)?;
        self.label.set(Some(new));
        self.places.next_label.set(None);
        self.zero_old_labels(primary_size).await
    }

    /// Write a whole label at another place, durably.
    async fn copy_label(self: &Rc<Self>, label: LabelLayout, superblock: &Superblock) -> Result<(), Failure> {
        let primary = DeviceIndex::PRIMARY;
        self.copy_note(label).await.map_err(|errno| Failure::errno(primary, errno))?;
        let copy = Superblock::copy_for(superblock.generation);
        self.write_label(label, [(copy, superblock.clone()), (1 - copy, superblock.clone())]).await?;
        self.flush(primary).await
    }

    /// Write zeros over labels that do not count: what has moved, and what may have been meant to move to the end of a
    /// primary of `size` bytes, where that is more than is recorded.
    async fn zero_old_labels(self: &Rc<Self>, size: u64) -> Result<(), String> {
        let primary = DeviceIndex::PRIMARY;
        let mut old_labels: Vec<_> = self.superblock.borrow().old_labels().map(|old| (old.start, old.length)).collect();
        if let Some(label) = self.label.get() {
            let at_end = LabelLayout::new(size, self.layout.max_remaps).filter(|at_end| at_end.start >= label.end());
            old_labels.extend(at_end.map(|at_end| (at_end.start, at_end.end() - at_end.start)));
        }
        for (start, length) in &old_labels {
            let zeroed = match self.io.write_zeroes(primary, *start, *length).await {
                Err(Errno(libc::EOPNOTSUPP)) => self.write_zeros(*start, *length).await,
                zeroed => zeroed,
            };
            zeroed.map_err(|errno| {
                let sector = start / SECTOR_SIZE;
                format!("{primary}: zeroing an old label from sector {sector} on: {errno}; see the kernel's log")
            })?;
            self.note_primary_write();
        }
        if old_labels.is_empty() { Ok(()) } else { self.flush(primary).await.map_err(cause) }
    }

    async fn write_zeros(&self, start: u64, length: u64) -> Result<(), Errno> {
        const PIECE: usize = 1 << 20;
        for from in (start..start + length).step_by(PIECE) {
            let piece = usize::try_from(start + length - from).map_or(PIECE, |left| left.min(PIECE));
            self.io.write(DeviceIndex::PRIMARY, from, &vec![0; piece]).await?;
        }
        Ok(())
    }

    /// Finish what earlier attempts began, as far as labels are concerned. The primary has `size` bytes.
    async fn settle_resize(self: &Rc<Self>, size: u64) -> Result<(), String> {
        if self.superblock_is_in_doubt() {
            // It may say that the label lies where zeros are written next.
            self.change_superblock(|_| ()).await.map_err(cause)?;
        }
        self.places.next_label.set(None);
        self.zero_old_labels(size).await?;
        if self.superblock.borrow().old_labels().next().is_none() {
            return Ok(());
        }
        self.change_superblock(|next| next.grow(next.capacity, next.primary_size)).await.map_err(cause)
    }

    /// Do it for a volume that was just opened, on a primary of `size` bytes. Where that fails the next one tries
    /// again: nobody uses the place.
    pub(super) async fn finish_resize(self: &Rc<Self>, size: u64) {
        self.places.label.acquire().await;
        if self.may_write().is_ok()
            && let Err(why) = self.settle_resize(size).await
        {
            let action = "tried again when the volume is opened or resized";
            self.event(
                Severity::Warn,
                EventKind::OldLabel,
                Some(DeviceIndex::PRIMARY),
                SectorRange::default(),
                why,
                action,
            );
        }
        self.places.label.release();
    }

    /// Step 4. A primary that is served as it is has no metadata.
    async fn write_capacity(
        self: &Rc<Self>,
        capacity: u64,
        primary_size: u64,
        is_as_before: &mut bool,
    ) -> Result<(), String> {
        self.may_write()?;
        *is_as_before = false;
        if self.policy.passthrough {
            self.superblock.borrow_mut().grow(capacity, primary_size);
            return Ok(());
        }
        for _copy in 0..2 {
            self.change_superblock(|next| next.grow(capacity, primary_size)).await.map_err(cause)?;
        }
        Ok(())
    }

    /// Step 5: the shards hear of it with the next publication.
    fn use_capacity(&self, capacity: u64) {
        let mut geometry = self.geometry();
        geometry.capacity = capacity;
        self.geometry.set(geometry);
        self.map.borrow_mut().grow(geometry.blocks());
        self.flushes.grow(capacity);
        self.view_stale.set(true);
    }
}
