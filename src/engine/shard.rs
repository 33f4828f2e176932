//! The fast path of one worker: requests in, device operations and answers out.

use super::request::{Answer, Request};
use crate::device::{Completion, Op};
use crate::units::Time;

/// A message from the healer to a shard.
#[derive(Debug)]
pub enum ToShard {}

/// A message from a shard to the healer.
#[derive(Debug)]
pub enum ToHealer {}

/// What a step of a [`Shard`] asks its driver to do.
#[derive(Debug, Default)]
pub struct ShardOut {
    /// Operations to submit to the worker's device, in order.
    pub ops: Vec<Op>,
    /// Messages for the healer.
    pub to_healer: Vec<ToHealer>,
    /// Requests that ended.
    pub answers: Vec<Answer>,
}

/// The fast path of one worker.
#[derive(Debug)]
pub struct Shard {}

impl Shard {
    /// Take a request.
    pub fn submit(&mut self, _now: Time, _request: Request, _out: &mut ShardOut) {
        todo!()
    }

    /// A device operation of this shard ended.
    pub fn completed(&mut self, _now: Time, _completion: Completion, _out: &mut ShardOut) {
        todo!()
    }

    /// A message from the healer.
    pub fn message(&mut self, _now: Time, _message: ToShard, _out: &mut ShardOut) {
        todo!()
    }

    /// Requests taken from `queue` and not yet answered.
    pub fn unanswered(&self, _queue: u16) -> usize {
        todo!()
    }

    /// Give back, unanswered and without effect, the requests of `queue` that no device and no healer
    /// works on (parked on a fence). They never land later.
    pub fn withdraw(&mut self, _queue: u16, _out: &mut Vec<Request>) {
        todo!()
    }
}
