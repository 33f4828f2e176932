//! How large a disk is.

use super::Disk;
use crate::guest::SECTOR;

impl Disk {
    pub(crate) fn bytes(&self) -> u64 {
        (self.current.len() * SECTOR) as u64
    }

    /// Another size; what is new are zeros, and what goes was written by nobody who is left.
    pub(crate) fn resize(&mut self, bytes: u64) {
        let sectors = usize::try_from(bytes).expect("small disks") / SECTOR;
        self.cache.retain(|volatile| volatile.sector < sectors);
        self.cache.resize(sectors);
        self.current.resize(sectors, 0);
        self.mtime += 1;
    }
}
