//! The volume: which blocks live in which slots, and how that is written down.
//!
//! Pure data and arithmetic: nothing here reads a device, and nothing here knows of devices' kinds or
//! of guests. Bytes just read become a type of this module only by passing its checks.

mod growth;
pub mod layout;
pub mod map;
pub mod sidecar;
pub mod superblock;
pub mod table;
