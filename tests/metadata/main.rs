//! Metadata: what becomes of a volume whose superblocks, tables and notes are damaged, torn or half written,
//! and that its format stays what it is.
//!
//! Everything runs on disks in memory, so that all combinations fit into seconds, and what is expected is
//! derived from the damage and the documented format, never by the code under test.

mod commits;
mod crash;
mod damage;
mod degraded;
mod doubt;
mod dropped;
mod engine;
mod expect;
mod features;
mod foreign;
mod golden;
mod health;
mod hidden;
mod interrupted;
mod label;
mod ladders;
mod lost;
mod matrix;
mod order;
mod poison;
mod resize;
mod resize_fails;
mod returns;
mod rig;
mod scan;
mod scan_gone;
mod scan_metadata;
mod scan_slow;
mod seat;
mod story;
