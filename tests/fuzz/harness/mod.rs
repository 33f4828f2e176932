//! What is fuzzed: four functions of bytes, each of which panics when the program breaks a promise.
//!
//! | function | the bytes are | held against them |
//! |---|---|---|
//! | [`chains`] | what a guest writes and kicks, and what its disks do meanwhile | a worker, its shard and the healer, on disks in memory |
//! | [`metadata`] | damage to a volume, with checksums that fit or not | opening it: for writing, for reading, without its spare |
//! | [`messages`] | what a front-end says on its socket, with descriptors | the protocol thread and its workers |
//! | [`control`] | requests to the control socket | the HTTP server over a volume that notes what it is told |
//!
//! The same functions are called by the fuzz targets (`make fuzz`) and, over the seeds and mutations of them,
//! by `tests/fuzz_smoke.rs`.

mod chains;
mod control;
mod guest;
mod messages;
mod metadata;
mod packed;
mod program;
mod volume;
mod world;

// The rig of the metadata tests makes volumes and damages them.
#[expect(dead_code, reason = "the metadata tests use the rest")]
#[path = "../../metadata/engine.rs"]
mod engine;
#[expect(dead_code, reason = "the metadata tests use the rest")]
#[path = "../../metadata/rig.rs"]
mod rig;
#[expect(dead_code, reason = "the metadata tests use the rest")]
#[path = "../../metadata/seat.rs"]
mod seat;

pub(crate) use chains::chains;
pub(crate) use control::control;
pub(crate) use messages::messages;
pub(crate) use metadata::metadata;
