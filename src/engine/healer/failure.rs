//! Why a request is answered with an error.

use crate::device::{DeviceIndex, Errno};
use crate::engine::errors::{Class, class_of};
use crate::engine::message::Refusal;
use crate::units::SectorRange;

/// What kind of reason it is, to be counted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FailureClass {
    /// The medium does not read or take it, or no device holds it any more.
    Medium,
    /// The device is gone.
    Gone,
    /// The host has no space left for it.
    Space,
    /// The spare is down, full, or in doubt.
    Spare,
    /// A flush failed, now or before.
    Flush,
    /// It should not have been asked for: beyond the end, or a write to a read-only disk.
    Refused,
    /// Anything else.
    Other,
}

impl FailureClass {
    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            FailureClass::Medium => "medium",
            FailureClass::Gone => "gone",
            FailureClass::Space => "space",
            FailureClass::Spare => "spare",
            FailureClass::Flush => "flush",
            FailureClass::Refused => "refused",
            FailureClass::Other => "other",
        }
    }
}

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
    pub(super) class: FailureClass,
}

impl Failure {
    pub(super) fn new(device: Option<DeviceIndex>, cause: impl Into<String>) -> Failure {
        Failure { device, range: None, cause: cause.into(), hold: Hold::Never, class: FailureClass::Other }
    }

    pub(super) fn errno(device: DeviceIndex, errno: Errno) -> Failure {
        let class = match class_of(errno) {
            Class::Medium | Class::Ambiguous => FailureClass::Medium,
            Class::Gone => FailureClass::Gone,
            Class::Space => FailureClass::Space,
            Class::Target | Class::Ours | Class::Unlisted => FailureClass::Other,
        };
        Failure::new(Some(device), errno.to_string()).of(class)
    }

    pub(super) fn of(self, class: FailureClass) -> Failure {
        Failure { class, ..self }
    }

    pub(super) fn at(self, range: SectorRange) -> Failure {
        Failure { range: Some(range), ..self }
    }

    pub(super) fn refused(refusal: Refusal) -> Failure {
        let spare = Some(DeviceIndex::SPARE);
        match refusal {
            Refusal::BeyondEnd => Failure::new(None, "beyond the end of the disk").of(FailureClass::Refused),
            Refusal::ReadOnly => Failure::new(None, "the volume is read-only").of(FailureClass::Refused),
            Refusal::Poisoned => {
                Failure::new(None, "a flush failed before; see `status`, then `clear`").of(FailureClass::Flush)
            }
            Refusal::PrimaryGone => {
                let failure = Failure::new(Some(DeviceIndex::PRIMARY), "the primary is gone");
                Failure { hold: Hold::PrimaryGone, ..failure.of(FailureClass::Gone) }
            }
            Refusal::SpareDown => {
                Failure::new(spare, "the block lives on the spare, and the spare is down").of(FailureClass::Spare)
            }
            Refusal::InDoubt => {
                Failure::new(spare, "the commit of the block's mapping is in doubt").of(FailureClass::Spare)
            }
        }
    }

    pub(super) fn spare_down() -> Failure {
        Failure::new(Some(DeviceIndex::SPARE), "a slot is needed, and the spare is down").of(FailureClass::Spare)
    }

    pub(super) fn spare_full(slots: u32) -> Failure {
        let cause = format!("a slot is needed, and none of {slots} is free");
        let failure = Failure::new(Some(DeviceIndex::SPARE), cause).of(FailureClass::Spare);
        Failure { hold: Hold::SpareFull, ..failure }
    }
}
