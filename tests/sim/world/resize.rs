//! Growing the disk: the operator's part, and what is known of its size.

use vhost_remap::engine::healer::{NotResized, Order};
use vhost_remap::units::{Sector, SectorRange};
use vhost_remap::volume::layout::grown_primary;

use super::{Ordered, World, trace};
use crate::guest::SECTOR;
use crate::script::Ask;

/// What is known of the size of the disk, beside [`Config::capacity`](crate::config::Config::capacity).
#[derive(Clone, Debug)]
pub(crate) struct Growth {
    /// Sectors of the volume when it was made.
    made_with: u64,
    /// Sectors that it may have when it is opened the next time.
    may_have: Vec<u64>,
    /// Bytes of the primary before the last resize.
    extended_from: u64,
}

impl Growth {
    pub(crate) fn of(capacity: u64) -> Growth {
        Growth { made_with: capacity, may_have: Vec::new(), extended_from: 0 }
    }
}

impl World {
    /// Extend the primary, if that is needed, and order the disk to have so many blocks more.
    pub(crate) fn resize(&mut self, blocks: u64) {
        let under_way = self.orders.values().any(|order| matches!(order, Ordered::Resize(..)));
        if under_way || self.disks[0].gone {
            return;
        }
        let (status, config) = (self.status(), &self.config);
        let capacity = (config.capacity / 8 + blocks) * 8;
        let needed = match config.labelled {
            true => grown_primary(status.primary_size, capacity * SECTOR as u64, config.max_remaps),
            false => (capacity * SECTOR as u64).max(status.primary_size),
        };
        if needed > status.primary_size {
            self.done = None;
            self.order(Order::PrepareResize(self.disks[0].bytes()));
            self.serve_until(|world| !world.orders.values().any(|order| matches!(order, Ordered::PrepareResize)));
            if !matches!(self.done, Some(Ok(_))) {
                return;
            }
        }
        let before = self.disks[0].bytes();
        let mut primary_size = status.primary_size;
        if status.refusal.is_none() && needed > primary_size {
            self.disks[0].resize(needed.max(before));
            primary_size = needed.max(before);
        }
        trace!(self, "the primary had {before} bytes and has {}", self.disks[0].bytes());
        self.growth.may_have.push(capacity);
        self.growth.extended_from = before;
        self.order(Order::Resize { capacity, primary_size });
    }

    pub(super) fn resized(&mut self, capacity: u64, result: Result<String, NotResized>) {
        match result {
            Ok(_) => self.has_capacity(capacity),
            Err(failed) if failed.is_as_before => {
                self.growth.may_have.pop();
                if self.disks[0].bytes() > self.growth.extended_from {
                    self.disks[0].resize(self.growth.extended_from);
                }
            }
            Err(_) => {}
        }
    }

    fn has_capacity(&mut self, capacity: u64) {
        self.config.capacity = capacity;
        self.disks[0].data = 0..usize::try_from(capacity).expect("small disks");
    }

    /// The volume has been opened, as large as it was, or as somebody wanted it to be; on a disk that lies about
    /// flushes, as large as it had been.
    pub(crate) fn check_capacity(&mut self) {
        let (found, known) = (self.status().capacity, self.config.capacity);
        assert!(
            found == known || self.growth.may_have.contains(&found) || !self.believe,
            "{found} sectors of {known} or {:?}",
            self.growth.may_have
        );
        if self.read_only {
            // Nothing was made durable of what was found.
            self.growth.may_have.push(known);
        } else {
            self.growth.may_have.clear();
        }
        self.has_capacity(found);
    }

    /// The guest asks for sectors that there were not when the volume was made.
    pub(crate) fn ask_beyond(&mut self, write: bool, at: u64, count: u64, queue: u16) {
        let (unit, depth) = (self.config.unit(), self.config.depth);
        self.serve_until(|world| world.unanswered() < depth);
        let first = self.growth.made_with.next_multiple_of(unit);
        let more = self.config.capacity.saturating_sub(first) / unit;
        if more == 0 {
            return;
        }
        let start = first + at % more * unit;
        let count = count.next_multiple_of(unit).min(self.config.capacity - start);
        let range = SectorRange { start: Sector(start), count };
        let ask = if write { Ask::Write(range) } else { Ask::Read(range) };
        self.ask(&ask, queue, false);
    }
}
