//! Growing a served volume: its primary first, then what is written of it, then those who show it to the guest.

use super::handle::{ANSWER_TIMEOUT, ORDER_TIMEOUT, Refused, VolumeHandle};
use crate::device::DeviceIndex;
use crate::engine::healer::{HealerStatus, NotResized, Order, Reply};
use crate::units::SECTOR_SIZE;
use crate::volume::layout::{LabelLayout, grown_primary};
use crate::volume::superblock::CAPACITY_MAX;

impl VolumeHandle {
    /// Grow the disk to `size` bytes, or to all that its primary has room for. A primary that is a file is extended,
    /// a block device must have been.
    ///
    /// # Errors
    /// When the disk would not become larger, the primary has no room and gets none, or what changes cannot be made
    /// durable. The disk is as large as it was then.
    pub fn resize(&self, size: Option<u64>) -> Result<String, Refused> {
        let named = |why: String| Refused(format!("{}: {why}", self.path(DeviceIndex::PRIMARY)));
        let Ok(_turn) = self.0.resizing.try_lock() else {
            return Err(named("it is being resized already; see `events` for what comes of it".to_owned()));
        };
        let now = self.may_grow().map_err(named)?;
        let primary = self.0.devices.get(DeviceIndex::PRIMARY).expect("there is always a primary");
        let before = primary.update_size().map_err(|errno| named(errno.to_string()))?;
        let capacity = match size {
            Some(size) => size / SECTOR_SIZE,
            None => self.room(&now, primary.size()).map_err(named)?,
        };
        if capacity > CAPACITY_MAX {
            return Err(named(format!("{capacity} sectors are more than a volume has; choose a size below 4096T")));
        }
        let (recorded, guest_end) = (now.primary_size, capacity * SECTOR_SIZE);
        let facts = &self.0.opened.facts;
        let needed = match facts.labelled {
            true => grown_primary(recorded, guest_end, facts.max_remaps),
            false => guest_end.max(recorded),
        };
        let mut primary_size = recorded;
        if needed > recorded {
            self.order(Order::PrepareResize(primary.size()))?;
            primary.extend(needed).map_err(|error| Refused(error.to_string()))?;
            primary_size = primary.size();
        }
        match self.ask(Order::Resize { capacity, primary_size }, ORDER_TIMEOUT) {
            Some(Reply::Resized(Ok(done))) => {
                if let Some(announce) = self.0.standing.announce.get() {
                    announce(capacity);
                }
                Ok(done)
            }
            Some(Reply::Resized(Err(NotResized { why, is_as_before }))) => {
                if is_as_before && primary.size() > before {
                    // Where that fails it is longer than it needs to be, which does no harm.
                    let _ = primary.shorten_again(before);
                }
                Err(named(why))
            }
            _ => Err(named("the volume did not answer: it is closing, or a device hangs; see `status`".to_owned())),
        }
    }

    /// What there is to grow, if it may.
    fn may_grow(&self) -> Result<Box<HealerStatus>, String> {
        if self.0.opened.facts.degraded.is_some() {
            return Err("it is served without its spare; bring the spare back first".to_owned());
        }
        match self.ask(Order::Status, ANSWER_TIMEOUT) {
            Some(Reply::Status(now)) => match &now.refusal {
                Some(why) => Err(why.clone()),
                None => Ok(now),
            },
            _ => Err("the volume did not answer".to_owned()),
        }
    }

    /// The largest capacity that a primary of `size` bytes has room for.
    fn room(&self, now: &HealerStatus, size: u64) -> Result<u64, String> {
        let (facts, unit) = (&self.0.opened.facts, u64::from(self.0.opened.geometry.logical_block) / SECTOR_SIZE);
        let guest_end = match facts.labelled {
            true => LabelLayout::new(size, facts.max_remaps).map_or(0, |label| label.start),
            false => size,
        };
        let capacity = guest_end / SECTOR_SIZE / unit * unit;
        if capacity > now.capacity {
            return Ok(capacity);
        }
        Err(format!("it has {size} bytes and no room for a larger disk; extend it first, or say how large with --size"))
    }
}
