//! Threads and wiring: the engine's state machines driven by real devices and clocks.

pub mod handle;
pub mod mailbox;
pub mod report;
pub mod worker;
