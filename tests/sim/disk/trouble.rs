//! What a disk fails with, and for how long.

use std::collections::BTreeMap;

use vhost_remap::device::Errno;

use super::store::Content;
use crate::config::Fault;

/// How long a bad sector stays bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// It has failed so many times.
    Times(u32),
    /// It is written.
    Written,
    /// For ever.
    Healed,
}

/// A sector that fails.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bad {
    pub(crate) errno: i32,
    pub(crate) until: Until,
    /// What it is counted as.
    pub(crate) fault: Option<Fault>,
}

/// A write of a dead process that the kernel has still to do.
#[derive(Clone, Debug)]
pub(crate) struct Late {
    pub(crate) device: usize,
    pub(crate) first: usize,
    pub(super) contents: Vec<Content>,
    /// What a bad sector does not take.
    pub(super) is_write: bool,
}

impl Late {
    pub(crate) fn len(&self) -> usize {
        self.contents.len()
    }
}

/// Writes that succeed and are not done where they should be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Astray {
    pub(crate) count: u32,
    /// How far off they are done, if they are.
    pub(crate) by: Option<usize>,
    /// The sectors this happens in.
    pub(crate) first: usize,
    pub(crate) sectors: usize,
}

/// What an operation does all the same that fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing; of a flush: it drops everything.
    Nothing,
    /// The first half; of a flush: it drops that of the sectors.
    Half,
    /// Everything; of a flush: it drops nothing.
    All,
}

/// A bad sector in the range fails the operation; each of them counts it. Those that do not stop
/// failing by themselves are added to `hard`.
pub(super) fn strike(
    bad: &mut BTreeMap<usize, Bad>,
    first: usize,
    last: usize,
    hard: &mut Vec<usize>,
) -> Option<(Errno, Option<Fault>)> {
    let mut struck = None;
    let mut over = Vec::new();
    for (sector, bad) in bad.range_mut(first..last) {
        struck = Some((Errno(bad.errno), bad.fault));
        match &mut bad.until {
            Until::Times(1) => over.push(*sector),
            Until::Times(times) => {
                if *times > 3 {
                    hard.push(*sector);
                }
                *times -= 1;
            }
            Until::Written | Until::Healed => hard.push(*sector),
        }
    }
    over.iter().for_each(|sector| _ = bad.remove(sector));
    struck
}
