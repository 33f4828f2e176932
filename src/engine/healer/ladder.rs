//! The read ladder (R2): retry, split to the logical block.

use std::cell::Cell;
use std::rc::Rc;

use super::Core;
use super::failure::Failure;
use crate::device::buffer::AlignedBuf;
use crate::device::{DeviceIndex, Errno};
use crate::engine::io::Took;
use crate::units::SectorRange;

/// Times a failed sector is read again.
pub(super) const RETRIES: u32 = 3;
/// Device time one request may take on the ladder, in nanoseconds (10 s).
const READ_BUDGET_NS: u64 = 10_000_000_000;
/// Bad places after which a request has failed well enough; the rest of it is not looked at.
const BAD_MAX: usize = 64;

/// Device time rewriting one request in place may take, in nanoseconds (2 s).
const IN_PLACE_BUDGET_NS: u64 = 2_000_000_000;

/// Device time that is left for operations that fail. What succeeds is not limited: a long request on a slow
/// disk is no failing one.
pub(super) struct Budget(Cell<u64>);

impl Budget {
    /// For reading (R2).
    pub(super) fn of_read() -> Budget {
        Budget(Cell::new(READ_BUDGET_NS))
    }

    /// For rewriting in place (W1).
    pub(super) fn of_write() -> Budget {
        Budget(Cell::new(IN_PLACE_BUDGET_NS))
    }

    pub(super) fn spend(&self, took: Took) {
        self.0.set(self.0.get().saturating_sub(took.0));
    }

    pub(super) fn is_spent(&self) -> bool {
        self.0.get() == 0
    }
}

/// A part of what is to be read, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) from: usize,
    pub(super) len: usize,
    /// Times it failed on the medium by itself.
    tried: u32,
}

impl Part {
    /// It was tried to the last retry; otherwise it was left before.
    pub(super) fn is_proven(self) -> bool {
        self.tried > RETRIES
    }
}

/// How far the reading of an extent has come.
pub(super) struct Ladder {
    /// The bytes; what does not read is zero and means nothing.
    pub(super) data: AlignedBuf,
    /// What is still to be read, the next part last.
    left: Vec<Part>,
    /// What failed to the last retry.
    bad: Vec<Part>,
    /// Extents that failed on the way: first byte, bytes.
    failing: Vec<(usize, usize)>,
    /// What was read, and what was proven bad, since that was taken from here.
    pub(super) news: Vec<Part>,
    /// The last error.
    pub(super) errno: Option<Errno>,
}

impl Ladder {
    /// Of so many bytes, which failed once already where there is an error.
    pub(super) fn new(len: usize, failed: Option<Errno>) -> Ladder {
        Ladder {
            data: AlignedBuf::zeroed(len),
            left: vec![Part { from: 0, len, tried: u32::from(failed.is_some()) }],
            bad: Vec::new(),
            failing: failed.map(|_| (0, len)).into_iter().collect(),
            news: Vec::new(),
            errno: failed,
        }
    }

    /// Nothing is left to be tried.
    pub(super) fn is_done(&self) -> bool {
        self.left.is_empty()
    }

    /// Bytes that are left to be read.
    pub(super) fn bytes_left(&self) -> usize {
        self.left.iter().map(|part| part.len).sum()
    }

    /// All of it was read.
    pub(super) fn is_whole(&self) -> bool {
        self.is_done() && self.bad.is_empty()
    }

    /// What was not read, in order.
    pub(super) fn unread(&self) -> Vec<Part> {
        let mut unread = [&self.bad[..], &self.left].concat();
        unread.sort_by_key(|part| part.from);
        unread
    }

    /// The smallest extents that failed and were read in the end.
    pub(super) fn recovered(&self) -> Vec<(usize, usize)> {
        let unread = self.unread();
        let mut recovered = innermost(&self.failing, |part| (part.0 as u64, (part.0 + part.1) as u64));
        recovered
            .retain(|(from, len)| !unread.iter().any(|part| part.from < from + len && *from < part.from + part.len));
        recovered
    }
}

impl Core {
    /// Read as much of an extent as the device gives, until all was tried to the last or time is up.
    ///
    /// # Errors
    /// When the device is gone or the error is not one of the medium.
    pub(super) async fn climb(
        self: &Rc<Self>,
        device: DeviceIndex,
        offset: u64,
        ladder: &mut Ladder,
        budget: &Budget,
    ) -> Result<(), Failure> {
        let unit = usize::try_from(self.geometry().logical_block).expect("512 or 4096");
        while !budget.is_spent()
            && ladder.bad.len() < BAD_MAX
            && let Some(part) = ladder.left.pop()
        {
            let Part { from, len, tried } = part;
            let departures = self.departures(device);
            let (result, took) = self.io.read(device, offset + from as u64, len).await;
            let errno = match result {
                Ok(buf) => {
                    ladder.data[from..from + len].copy_from_slice(&buf);
                    ladder.news.push(Part { tried: 0, ..part });
                    continue;
                }
                Err(errno) => errno,
            };
            budget.spend(took);
            ladder.errno = Some(errno);
            let asked = self.io.now();
            if let Err(failure) = self.diagnose(device, errno, true, SectorRange::default()).await {
                ladder.left.push(part);
                return Err(failure);
            }
            budget.spend(Took(self.io.now().since_ns(asked)));
            if self.departures(device) != departures {
                // The device was away meanwhile, which says nothing of what was read.
                ladder.left.push(part);
                continue;
            }
            ladder.failing.push((from, len));
            if len > unit {
                let half = (len / 2).next_multiple_of(unit);
                ladder.left.push(Part { from: from + half, len: len - half, tried: 0 });
                ladder.left.push(Part { from, len: half, tried: 0 });
                continue;
            }
            let part = Part { tried: tried + 1, ..part };
            if part.is_proven() {
                ladder.bad.push(part);
                ladder.news.push(part);
            } else {
                ladder.left.push(part);
            }
        }
        if !ladder.is_whole() {
            self.confirm(device).await?;
        }
        Ok(())
    }
}

/// Of the extents that failed, those with no other failed one inside: where the trouble was, as far as it
/// was narrowed down. `bounds` gives first and end.
pub(super) fn innermost<T: Copy>(failing: &[T], bounds: impl Fn(&T) -> (u64, u64)) -> Vec<T> {
    let mut inner: Vec<T> = Vec::new();
    for (i, extent) in failing.iter().enumerate() {
        let (start, end) = bounds(extent);
        let inside = |(j, other): (usize, &T)| {
            let (first, last) = bounds(other);
            // Of the same extent, failed several times, the last stands for all.
            start <= first && last <= end && ((first, last) != (start, end) || j > i)
        };
        if !failing.iter().enumerate().any(inside) {
            inner.push(*extent);
        }
    }
    inner
}
