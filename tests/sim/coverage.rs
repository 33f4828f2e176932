//! Which faults strike while the volume does what: a pair that no run comes by tests nothing.

use std::collections::BTreeMap;
use std::fmt;

use crate::config::{FAULTS, Fault};

/// What runs before the volume is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    Creating,
    Opening,
}

/// What a volume can be busy with; several at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Script(Phase),
    /// Nothing of the below.
    Idle,
    /// A ladder is being climbed.
    Repairing,
    /// Metadata is under way to the spare.
    Committing,
    /// A flush is under way.
    Flushing,
    /// The operator moves blocks.
    Moving,
    /// A queue is being reset.
    Stopping,
    /// Requests wait for a device or a slot.
    Holding,
    SpareFull,
    InDoubt,
    Poisoned,
    SpareDown,
    PrimaryDown,
    /// A clean close is under way.
    Closing,
}

const STATES: [(State, &str); 14] = [
    (State::Script(Phase::Opening), "opening"),
    (State::Idle, "idle"),
    (State::Repairing, "repair"),
    (State::Committing, "commit"),
    (State::Flushing, "flush"),
    (State::Moving, "move"),
    (State::Stopping, "reset"),
    (State::Holding, "holding"),
    (State::SpareFull, "full"),
    (State::InDoubt, "doubt"),
    (State::Poisoned, "poison"),
    (State::SpareDown, "no spare"),
    (State::PrimaryDown, "no prim."),
    (State::Closing, "closing"),
];

/// How often each fault struck in each state.
#[derive(Clone, Debug, Default)]
pub(crate) struct Strikes(BTreeMap<(Fault, State), u64>);

impl Strikes {
    pub(crate) fn count(&mut self, fault: Fault, states: &[State]) {
        for state in states {
            *self.0.entry((fault, *state)).or_default() += 1;
        }
    }

    pub(crate) fn add(&mut self, other: &Strikes) {
        for (cell, count) in &other.0 {
            *self.0.entry(*cell).or_default() += count;
        }
    }

    fn cell(&self, fault: Fault, state: State) -> u64 {
        self.0.get(&(fault, state)).copied().unwrap_or(0)
    }

    /// The cells that could be met and were not.
    pub(crate) fn empty(&self) -> Vec<(Fault, &'static str)> {
        let cells = FAULTS.into_iter().flat_map(|fault| STATES.map(|(state, name)| (fault, state, name)));
        let missed = cells.filter(|(fault, state, _)| !cannot_be(*fault, *state) && self.cell(*fault, *state) == 0);
        missed.map(|(fault, _, name)| (fault, name)).collect()
    }
}

impl fmt::Display for Strikes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:22}", "")?;
        STATES.iter().try_for_each(|(_, name)| write!(f, "{name:>9}"))?;
        for fault in FAULTS {
            write!(f, "\n{:22}", format!("{fault:?}"))?;
            for (state, _) in STATES {
                match (cannot_be(fault, state), self.cell(fault, state)) {
                    (true, 0) => write!(f, "{:>9}", "-")?,
                    (_, count) => write!(f, "{count:>9}")?,
                }
            }
        }
        Ok(())
    }
}

/// Pairs that no run can come by.
fn cannot_be(fault: Fault, state: State) -> bool {
    match fault {
        // Slots are neither looked at by an opening nor by a close.
        Fault::SlotRead | Fault::SlotWrite => matches!(state, State::Script(_) | State::Closing),
        // The label is the healer's: an opening writes nothing to the primary but notes of failed flushes.
        Fault::PrimaryWriteTimes | Fault::PrimaryWriteForEver => state == State::Script(Phase::Opening),
        // An open volume reads metadata only when its spare comes back.
        Fault::MetadataRead => state == State::Idle,
        // Nothing else is done while a volume is being closed.
        Fault::MetadataDamage => state == State::Closing,
        _ => false,
    }
}
