//! vhost-remap: a vhost-user-blk backend that serves a guest's virtqueues straight out of shared
//! guest memory through a bad-sector remap engine.

pub mod cli;
pub mod control;
pub mod device;
pub mod engine;
pub mod runtime;
pub mod serve;
pub mod units;
pub mod vhost;
pub mod volume;
