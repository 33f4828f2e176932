//! The guest's side: the vhost-user protocol, virtqueues in shared guest memory and the virtio-blk
//! request format.
//!
//! One protocol thread talks to the front-end (vhost-user, `docs/interop/vhost-user.rst` of QEMU) and
//! never waits on the disk, except where the protocol demands a drain. Worker threads own the queues:
//! they parse descriptor chains (virtio 1.3 §2.7, §2.8 and §5.2.6) into engine requests and give every chain
//! back exactly once. Everything read from guest memory is hostile: it is copied out once and checked.
//!
//! Nothing here knows what a slot or a map is; nothing below knows what a descriptor is.

pub mod chain;
mod channel;
pub mod command;
pub mod config;
pub(crate) mod crew;
pub mod device;
pub mod dirty;
pub(crate) mod drive;
mod eventfd;
pub mod framework;
pub mod inflight;
pub mod memory;
pub(crate) mod polling;
pub mod protocol;
mod queue;
pub mod request;
pub mod ring;
pub mod server;
pub(crate) mod session;
mod state;
pub mod status;
pub mod thread;
pub(crate) mod tokens;
mod wait;
pub mod worker;

#[cfg(all(test, feature = "shuttle"))]
mod interleavings;
#[cfg(test)]
mod testing;

/// Queues offered. QEMU asks for one a vCPU and refuses a back-end that has fewer; a queue that is not
/// used costs a few words.
pub const QUEUES_MAX: u16 = 64;

/// Largest queue: the limit of virtqueues (virtio 1.3 §2.7, §2.8).
pub const QUEUE_SIZE_MAX: u16 = 32_768;
