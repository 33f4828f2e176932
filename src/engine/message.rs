//! What shards and healer tell each other. Every message that carries a request moves it: a request has
//! one owner at any time and cannot be forgotten.

use std::sync::Arc;

use super::request::Request;
use super::view::View;
use crate::device::{DeviceIndex, Errno};
use crate::units::{BlockRange, SectorRange};

/// A fence's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FenceId(pub u64);

/// Where a request stands: requests with several ranges, and long ones, are served piece by piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cursor {
    /// Index of the range being served; 0 for reads and writes.
    pub segment: usize,
    /// The piece of it being served.
    pub piece: SectorRange,
}

/// Why a shard hands a request to the healer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// A device operation for the piece failed.
    Failed(DeviceIndex, Errno),
    /// The piece touches pending or lost sectors, or is not aligned to the devices' logical block.
    Special,
    /// The request must not be served now, or not at all.
    Refused(Refusal),
    /// Everything is written; only durability is missing (FLUSH, or write-through).
    Durability,
}

/// Why a request is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It reaches beyond the last sector.
    BeyondEnd,
    /// It writes to a read-only volume.
    ReadOnly,
    /// A flush failed before.
    Poisoned,
    /// The primary is gone: the policy says whether to fail or to hold.
    PrimaryGone,
    /// It needs a slot and the spare is down.
    SpareDown,
    /// It touches a block whose commit is in doubt.
    InDoubt,
}

/// A request on its way to the healer, or waiting there.
#[derive(Debug)]
pub struct Handed {
    /// The shard it came from.
    pub shard: usize,
    /// The request.
    pub request: Request,
    /// The piece in question.
    pub cursor: Cursor,
    /// The reason.
    pub why: Why,
}

/// How the healer's work on a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The piece was served.
    Served,
    /// What was written is durable: the answer to [`Why::Durability`].
    Durable,
    /// The request fails; that has been reported.
    Failed,
}

/// A message from a shard to the healer.
#[derive(Debug)]
pub enum ToHealer {
    /// See to this piece of a request.
    Handed(Handed),
    /// No device operation of `shard` overlaps the fence any more, and none will start.
    Clear {
        /// The answering shard.
        shard: usize,
        /// The fence.
        fence: FenceId,
    },
    /// `shard` works with the view that carried this number.
    Adopted {
        /// The answering shard.
        shard: usize,
        /// [`ToShard::Publish::ack`].
        ack: u64,
    },
    /// Give back the requests of a queue that no device works on; see [`ToShard::Withdrawn`].
    Withdraw {
        /// The asking shard.
        shard: usize,
        /// The queue that is stopping.
        queue: u16,
    },
    /// A queue that is stopping waits for its requests, which can be left nowhere: none of them is held any more.
    Finish {
        /// The shard.
        shard: usize,
        /// The queue.
        queue: u16,
    },
    /// A queue that was stopping is served again.
    Resumed {
        /// The shard.
        shard: usize,
        /// The queue.
        queue: u16,
    },
}

/// A message from the healer to a shard.
#[derive(Debug)]
pub enum ToShard {
    /// Answer with [`ToHealer::Clear`] once nothing of yours overlaps `range`, and park what does.
    Fence {
        /// Its name.
        fence: FenceId,
        /// Blocks.
        range: BlockRange,
    },
    /// Use this view from now on, then lift these fences. One message, so that no request is resolved
    /// with an old view after its fence is gone.
    Publish {
        /// The new snapshot.
        view: Arc<View>,
        /// Fences to lift.
        lift: Vec<FenceId>,
        /// Answer with [`ToHealer::Adopted`] and this number.
        ack: Option<u64>,
    },
    /// The healer is done with a piece.
    Handled {
        /// The request.
        request: Request,
        /// The piece it stood at.
        cursor: Cursor,
        /// How it went.
        outcome: Outcome,
    },
    /// A request given back without effect since its queue is stopping.
    Withdrawn {
        /// The request.
        request: Request,
    },
}
