//! The volume: which blocks live in which slots, and how that is written down.
//!
//! Pure data and arithmetic: nothing here reads a device, and nothing here knows of devices' kinds or
//! of guests.

pub mod map;
