//! The operator's side of a running volume.

use std::sync::Arc;

use super::report::{EventPage, ListEntry, ListFilter, StatusReport};
use crate::device::fault::FaultTable;

/// A cheap clone that any thread may ask. No answer waits for a disk.
#[derive(Clone)]
pub struct VolumeHandle {
    faults: Option<Arc<FaultTable>>,
}

/// Why an operator's order was not carried out: one line for a person.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl VolumeHandle {
    /// The volume's state now.
    pub fn status(&self) -> StatusReport {
        todo!()
    }

    /// Blocks that are remapped, pending or hold lost sectors, by address, at most `limit` from sector `from`.
    pub fn list(&self, _filter: ListFilter, _from: u64, _limit: usize) -> Vec<ListEntry> {
        todo!()
    }

    /// Events after number `after`, at most `limit`.
    pub fn events(&self, _after: u64, _limit: usize) -> EventPage {
        todo!()
    }

    /// The fault rules, where the server was started with fault injection.
    pub fn faults(&self) -> Option<&Arc<FaultTable>> {
        self.faults.as_ref()
    }

    /// Lift the poison of a failed flush and close tripped breakers.
    ///
    /// # Errors
    /// When there is nothing to clear, or the cleared state could not be made durable.
    pub fn clear(&self) -> Result<String, Refused> {
        todo!()
    }

    /// Move the blocks of `sectors` (start, count) to slots.
    ///
    /// # Errors
    /// When a sector is beyond the end, the spare is full or the data cannot be read.
    pub fn remap(&self, _start: u64, _count: u64) -> Result<String, Refused> {
        todo!()
    }

    /// Copy the blocks of the sectors back to the primary and free their slots.
    ///
    /// # Errors
    /// When a block is not remapped, or the primary does not take it.
    pub fn release(&self, _start: u64, _count: u64) -> Result<String, Refused> {
        todo!()
    }

    /// Write counters and the label's copy of the table now.
    ///
    /// # Errors
    /// When the spare does not take them.
    pub fn save(&self) -> Result<String, Refused> {
        todo!()
    }
}
