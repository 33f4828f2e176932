//! What happened, for people: every error a guest gets has one of these (P1).

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

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// On the volume's clock.
    pub time: Time,
    /// How much it matters.
    pub severity: Severity,
    /// A short name: `remapped`, `guest-error`, ...
    pub kind: &'static str,
    /// The device concerned.
    pub device: Option<DeviceIndex>,
    /// The guest's sectors concerned; empty where it is not about sectors.
    pub range: SectorRange,
    /// Why.
    pub cause: String,
    /// What was done.
    pub action: String,
}
