//! Threads and wiring: the engine's state machines driven by real devices and clocks.

pub mod counters;
pub mod devices;
pub mod eventlog;
pub mod handle;
pub mod handover;
pub mod healer;
pub mod health;
pub mod latency;
pub mod lines;
pub mod load;
pub mod mailbox;
pub mod options;
pub mod report;
mod resize;
pub mod scan_options;
pub mod scan_report;
pub mod signals;
mod signature;
pub mod stats;
pub mod surface;
pub mod volume;
pub mod worker;
