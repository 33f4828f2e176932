//! The remap engine: state machines that turn guest requests into device operations.

mod errors;
pub mod event;
pub mod healer;
mod io;
pub mod message;
pub mod open;
pub mod request;
pub mod shard;
mod task;
pub mod view;
