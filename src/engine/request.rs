//! What a guest asks of the volume, free of any protocol.

use crate::device::buffer::Iovecs;
use crate::units::SectorRange;

/// A request's place in its worker's table: opaque to the engine, handed back with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u32);

/// One guest request. It exists only once its shape was checked: a `Flush` has no buffer.
#[derive(Debug)]
pub struct Request {
    /// The submitter's name for it.
    pub token: Token,
    /// The queue it came from, counted over the whole device; drains are per queue.
    pub queue: u16,
    /// Whether its effect must be durable before the answer (write-through: FLUSH was not negotiated,
    /// or the guest cleared the writeback bit).
    pub write_through: bool,
    /// What to do.
    pub op: RequestOp,
}

/// What a request does. Ranges may lie beyond the end of the volume: the engine refuses those.
#[derive(Debug)]
pub enum RequestOp {
    /// Fill `data` from `start`; `data.len()` is `range.bytes()`.
    Read {
        /// Where.
        range: SectorRange,
        /// The guest's memory.
        data: Iovecs,
    },
    /// Write `data`; `data.len()` is `range.bytes()`.
    Write {
        /// Where.
        range: SectorRange,
        /// The guest's memory.
        data: Iovecs,
    },
    /// Make every write answered before durable.
    Flush,
    /// Drop the content of the ranges.
    Discard {
        /// Where, in the guest's order; none is empty.
        ranges: Vec<SectorRange>,
    },
    /// Make the ranges read as zeros.
    WriteZeroes {
        /// Where, with the guest's unmap flag; none is empty.
        ranges: Vec<(SectorRange, bool)>,
    },
}

/// Which kind of request it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// [`RequestOp::Read`].
    Read,
    /// [`RequestOp::Write`].
    Write,
    /// [`RequestOp::Flush`].
    Flush,
    /// [`RequestOp::Discard`].
    Discard,
    /// [`RequestOp::WriteZeroes`].
    WriteZeroes,
}

impl Operation {
    /// How many there are.
    pub const COUNT: usize = 5;
    /// All of them, by their [`Operation::index`].
    pub const ALL: [Operation; Operation::COUNT] =
        [Operation::Read, Operation::Write, Operation::Flush, Operation::Discard, Operation::WriteZeroes];

    /// For tables: below [`Operation::COUNT`].
    #[inline]
    pub fn index(self) -> usize {
        self as usize
    }

    /// For reports.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::WriteZeroes => "write_zeroes",
        }
    }
}

impl RequestOp {
    /// Its kind.
    #[inline]
    pub fn operation(&self) -> Operation {
        match self {
            RequestOp::Read { .. } => Operation::Read,
            RequestOp::Write { .. } => Operation::Write,
            RequestOp::Flush => Operation::Flush,
            RequestOp::Discard { .. } => Operation::Discard,
            RequestOp::WriteZeroes { .. } => Operation::WriteZeroes,
        }
    }

    /// The bytes it is about.
    #[inline]
    pub fn bytes(&self) -> u64 {
        match self {
            RequestOp::Read { range, .. } | RequestOp::Write { range, .. } => range.bytes(),
            RequestOp::Flush => 0,
            RequestOp::Discard { ranges } => ranges.iter().map(|range| range.bytes()).sum(),
            RequestOp::WriteZeroes { ranges } => ranges.iter().map(|(range, _)| range.bytes()).sum(),
        }
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed: the guest gets an I/O error.
    IoErr,
}

/// A request and its end: the guest may be told.
#[derive(Debug)]
pub struct Answer {
    /// The request as submitted, so that its parts can be used again.
    pub request: Request,
    /// How it ended.
    pub status: Status,
}
