//! The remap engine: state machines that turn guest requests into device operations.
//!
//! Nothing in here reads a clock, starts a thread or makes a system call. Requests, completions, messages
//! and the time go in; operations, messages and answers come out, and the caller does the rest: the
//! runtime with io_uring and threads, the simulator with two disks in memory and a seed. A [`shard`] is
//! the fast path of one worker, the [`healer`] is everything rare, [`open`] makes and opens volumes.
//!
//! That makes the engine usable without the rest, as this whole driver shows: two disks in memory, of which
//! the primary has a block that takes no write. The engine moves it to the spare, and the guest never hears
//! of it.
//!
//! ```
//! use std::mem::take;
//! use std::sync::Arc;
//!
//! use vhost_remap::device::buffer::{AlignedBuf, Iovecs};
//! use vhost_remap::device::memory::MemoryDisks;
//! use vhost_remap::device::{Completion, Device, DeviceIndex, Errno, Event, Op, OpKind, Wait};
//! use vhost_remap::engine::healer::{HealerOut, HealerParams, OnLoss, Policy};
//! use vhost_remap::engine::event::EventKind;
//! use vhost_remap::engine::create::{CreateParams, Creation};
//! use vhost_remap::engine::open::{DeviceFacts, OpenParams, Opening};
//! use vhost_remap::engine::request::{Request, RequestOp, Status, Token};
//! use vhost_remap::engine::scan::ScanParams;
//! use vhost_remap::engine::shard::{Shard, ShardOut};
//! use vhost_remap::units::{Block, Sector, SectorRange, Time};
//! use vhost_remap::volume::layout::{label_size, spare_size};
//!
//! const MIB: u64 = 1 << 20;
//! let sizes = [MIB + label_size(16), spare_size(16)];
//! let mut disks = MemoryDisks::new(&sizes).queue();
//! let mut execute = |ops: Vec<Op>| -> Vec<Completion> {
//!     let mut ended = Vec::new();
//!     for op in ops {
//!         if op.device == DeviceIndex::PRIMARY && op.kind == OpKind::Write && op.offset == 4096 {
//!             ended.push(Event::Done(Completion { tag: op.tag, result: Err(Errno(libc::EIO)) }));
//!         } else {
//!             // SAFETY: whoever emitted the operation keeps its memory until told of its end.
//!             unsafe { disks.submit(op) };
//!         }
//!     }
//!     disks.poll(Time(0), Wait::No, &mut ended);
//!     ended.into_iter().filter_map(|event| if let Event::Done(done) = event { Some(done) } else { None }).collect()
//! };
//!
//! // Make a volume of 1 MiB with 16 slots, and open it.
//! let [primary, spare] = sizes.map(|size| DeviceFacts {
//!     size,
//!     logical_block: 512,
//!     inode: 0,
//!     wwn: String::new(),
//!     mtime_ns: 0,
//! });
//! let mut creation = Creation::new(CreateParams {
//!     primary: primary.clone(),
//!     spare: spare.clone(),
//!     capacity: MIB / 512,
//!     labelled: true,
//!     max_remaps: 16,
//!     set: uuid::Uuid::from_u128(1),
//!     devices: [uuid::Uuid::from_u128(2), uuid::Uuid::from_u128(3)],
//!     serial: *b"a disk in an example",
//!     now: 0,
//! });
//! let (mut ops, mut ended) = (Vec::new(), Vec::new());
//! let created = loop {
//!     creation.step(Time(0), &ended, &mut ops);
//!     match creation.result() {
//!         Some(result) => break result,
//!         None => ended = execute(take(&mut ops)),
//!     }
//! };
//! created?;
//! let mut opening = Opening::new(OpenParams { primary, spare, read_only: false, accept_external: false });
//! ended.clear();
//! while !opening.is_done() {
//!     opening.step(Time(0), &ended, &mut ops);
//!     ended = execute(take(&mut ops));
//! }
//! let policy = Policy { primary_gone: OnLoss::Fail, spare_full: OnLoss::Fail, passthrough: false };
//! let (mut healer, _) = opening.finish(&HealerParams { shards: 1, policy, epoch: 0, scan: ScanParams::default() })?;
//! let mut shard = Shard::new(0, healer.view(), healer.progress());
//!
//! // Write to the bad block.
//! let range = SectorRange { start: Sector(8), count: 8 };
//! let data = Iovecs::of_buffer(&Arc::new(AlignedBuf::copy_of(&[7; 4096])), 0, 4096);
//! let op = RequestOp::Write { range, data };
//! let (now, mut fast, mut rare) = (Time(0), ShardOut::default(), HealerOut::default());
//! shard.submit(now, Request { token: Token(1), queue: 0, write_through: false, op }, &mut fast);
//! while fast.answers.is_empty() {
//!     for done in execute(take(&mut fast.ops)) {
//!         shard.completed(now, done, &mut fast);
//!     }
//!     for message in take(&mut fast.to_healer) {
//!         healer.message(now, message, &mut rare);
//!     }
//!     for done in execute(take(&mut rare.ops)) {
//!         healer.completed(now, done, &mut rare);
//!     }
//!     for (_, message) in take(&mut rare.to_shards) {
//!         shard.message(now, message, &mut fast);
//!     }
//! }
//! assert_eq!(fast.answers[0].status, Status::Ok);
//! assert!(rare.events.iter().any(|event| event.kind == EventKind::Remapped));
//! assert!(healer.view().map.get(Block(1)).slot.is_some());
//! # Ok::<(), vhost_remap::engine::open::OpenError>(())
//! ```

pub mod create;
mod errors;
pub mod event;
pub mod healer;
pub mod health;
mod io;
pub mod message;
pub mod open;
pub mod request;
pub mod scan;
mod script;
pub mod shard;
mod task;
pub mod view;
