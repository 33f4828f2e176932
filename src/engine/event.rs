//! What happened, for people: every error a guest gets has one of these (P1).

use strum::{EnumString, IntoStaticStr, VariantNames};

use crate::device::DeviceIndex;
use crate::units::{SectorRange, Time};

/// How much an event matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Good to know.
    Info,
    /// Something failed and was dealt with.
    Warn,
    /// The guest got an error, or data or availability is at risk.
    Error,
}

impl Severity {
    /// For records.
    pub fn name(self) -> &'static str {
        match self {
            Severity::Info => "info",
            Severity::Warn => "warn",
            Severity::Error => "error",
        }
    }
}

/// What happened; for records and for people in words with hyphens, as `guest-error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, EnumString, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum EventKind {
    /// The operator lifted the poison of a failed flush, or closed a breaker.
    Cleared,
    /// The volume could not be closed as it should.
    Close,
    /// Served without its spare, by the list of the label.
    Degraded,
    /// A device that was gone answers its probe.
    DeviceBack,
    /// A device does not answer its probe.
    DeviceGone,
    /// Requests did not end in time for a repair to begin.
    FenceGivenUp,
    /// A device did not flush.
    FlushFailed,
    /// A guest got an error.
    GuestError,
    /// Another process serves the volume from here on.
    HandedOver,
    /// A lost sector came back.
    Healed,
    /// The state of health changed.
    Health,
    /// A commit may or may not have become durable.
    InDoubt,
    /// The label of the primary was not written.
    LabelFailed,
    /// A sector was lost.
    Lost,
    /// A guest's request was not one.
    Malformed,
    /// A copy of the metadata is damaged, and stays so for now.
    MetadataDamaged,
    /// A copy of the metadata was written anew from another.
    MetadataRepaired,
    /// The label at the old end of a primary that has grown was not wiped.
    OldLabel,
    /// A place of the metadata is used again.
    PlaceRestored,
    /// A place of the metadata is used no more.
    PlaceRetired,
    /// A failed flush: nothing is written until the operator clears it.
    Poisoned,
    /// The primary is larger than the volume.
    PrimaryGrown,
    /// A read failed.
    ReadError,
    /// The volume was opened read-only.
    ReadOnly,
    /// A read failed and succeeded later.
    RecoveredRead,
    /// A block went back from its slot to the primary.
    Released,
    /// A block moved to a slot.
    Remapped,
    /// The volume grew.
    Resized,
    /// A block that failed was written in place and read back.
    Rewritten,
    /// A pass of the scanner began, paused or ended.
    Scan,
    /// A slot of the spare failed.
    SlotFailed,
    /// A block is slow, or was.
    SlowBlock,
    /// A spare that was down is used again.
    SpareBack,
    /// The spare is used no more for now.
    SpareDown,
    /// Few slots are left.
    SpareFilling,
    /// No slot is left.
    SpareFull,
    /// The operator had counters begin anew.
    StatsCleared,
    /// The volume came from another process.
    TakenOver,
}

impl EventKind {
    /// For records.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// On the volume's clock.
    pub time: Time,
    /// How much it matters.
    pub severity: Severity,
    /// What kind of thing.
    pub kind: EventKind,
    /// The device concerned.
    pub device: Option<DeviceIndex>,
    /// The guest's sectors concerned; empty where it is not about sectors.
    pub range: SectorRange,
    /// Why.
    pub cause: String,
    /// What was done.
    pub action: String,
}
