//! Why a request is answered with an error.

use crate::device::{DeviceIndex, Errno};
use crate::engine::message::Refusal;
use crate::units::SectorRange;

/// Whether waiting may help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hold {
    /// It will not.
    Never,
    /// Until the primary is back.
    PrimaryGone,
    /// Until a slot is free.
    SpareFull,
}

/// A request cannot be served.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) device: Option<DeviceIndex>,
    /// The sectors to blame, where they are known better than by the request.
    pub(super) range: Option<SectorRange>,
    pub(super) cause: String,
    pub(super) hold: Hold,
}

impl Failure {
    pub(super) fn new(device: Option<DeviceIndex>, cause: impl Into<String>) -> Failure {
        Failure { device, range: None, cause: cause.into(), hold: Hold::Never }
    }

    pub(super) fn errno(device: DeviceIndex, errno: Errno) -> Failure {
        Failure::new(Some(device), errno.to_string())
    }

    pub(super) fn at(self, range: SectorRange) -> Failure {
        Failure { range: Some(range), ..self }
    }

    pub(super) fn refused(refusal: Refusal) -> Failure {
        let spare = Some(DeviceIndex::SPARE);
        match refusal {
            Refusal::BeyondEnd => Failure::new(None, "beyond the end of the disk"),
            Refusal::ReadOnly => Failure::new(None, "the volume is read-only"),
            Refusal::Poisoned => Failure::new(None, "a flush failed before; see `status`, then `clear`"),
            Refusal::PrimaryGone => {
                Failure { hold: Hold::PrimaryGone, ..Failure::new(Some(DeviceIndex::PRIMARY), "the primary is gone") }
            }
            Refusal::SpareDown => Failure::new(spare, "the block lives on the spare, and the spare is down"),
            Refusal::InDoubt => Failure::new(spare, "the commit of the block's mapping is in doubt"),
        }
    }

    pub(super) fn spare_down() -> Failure {
        Failure::new(Some(DeviceIndex::SPARE), "a slot is needed, and the spare is down")
    }

    pub(super) fn spare_full(slots: u32) -> Failure {
        Failure {
            hold: Hold::SpareFull,
            ..Failure::new(Some(DeviceIndex::SPARE), format!("a slot is needed, and none of {slots} is free"))
        }
    }
}
