//! What the protocol thread asks of a worker, and how it waits for the answer.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::dirty::MaybeLog;
use super::memory::{MemoryMap, RegionBits};
use super::queue::{Kick, StartQueue, StopHow};
use super::ring::RingAddresses;
use crate::sync::mpsc::{Receiver, RecvTimeoutError, Sender};

/// After this long a drain is reported: the device does not return requests.
const SLOW_DRAIN: Duration = Duration::from_secs(5);

/// An order to a worker. None waits for the disk; stops and memory changes are answered when they are done.
#[derive(Debug)]
pub enum Command {
    /// Serve a queue.
    Start(Box<StartQueue>),
    /// Serve a queue no more; answered with the place where it goes on when the device has returned its requests.
    Stop {
        /// The queue.
        queue: u16,
        /// What becomes of requests that no device works on.
        how: StopHow,
        /// The answer.
        reply: Sender<u32>,
    },
    /// Take requests of a queue, or not.
    Enable {
        /// The queue.
        queue: u16,
        /// Whether to.
        enabled: bool,
    },
    /// Another kick for a live queue.
    Kick {
        /// The queue.
        queue: u16,
        /// Its kick.
        kick: Kick,
    },
    /// Another call eventfd for a live queue.
    Call {
        /// The queue.
        queue: u16,
        /// The eventfd.
        call: Option<OwnedFd>,
    },
    /// Another error eventfd for a live queue.
    Err {
        /// The queue.
        queue: u16,
        /// The eventfd.
        err: Option<OwnedFd>,
    },
    /// The ring of a live queue moved.
    Addresses {
        /// The queue.
        queue: u16,
        /// Its place.
        addresses: RingAddresses,
    },
    /// The guest's memory changed; answered when nothing uses `removed` any more.
    Memory {
        /// The new memory.
        map: Arc<MemoryMap>,
        /// Regions that are gone.
        removed: RegionBits,
        /// The answer.
        done: Sender<()>,
    },
    /// From now on what is written to guest memory is noted there, or nowhere; answered when that is so.
    DirtyLog {
        /// The log.
        log: MaybeLog,
        /// The answer.
        done: Sender<()>,
    },
    /// End the thread when the device has returned everything.
    Exit,
}

/// Wait for a worker, and say so when it takes long. `None` if the worker had nothing to say.
pub(super) fn wait<T>(from: &Receiver<T>, what: impl Fn() -> String) -> Option<T> {
    let mut reported = false;
    loop {
        match from.recv_timeout(SLOW_DRAIN) {
            Ok(value) => return Some(value),
            Err(RecvTimeoutError::Disconnected) => return None,
            Err(RecvTimeoutError::Timeout) if !reported => {
                log::warn!("{}: waiting for requests that the device does not return", what());
                reported = true;
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}
