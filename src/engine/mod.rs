//! The remap engine: state machines that turn guest requests into device operations.

pub mod message;
pub mod request;
pub mod shard;
pub mod view;
